"""What the maps of scans are compared with where it is known: files of the truth, and the scores."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxmed.arrays.grid import resample_to
from jaxmed.config import checked
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.worse_scans import to_unit_range
from jaxmed.systems.brainfm.evaluation import compare
from jaxmed.systems.brainfm.prediction import Prediction

IN_UNIT_RANGE = ("T1", "T2", "FLAIR")


@dataclasses.dataclass(frozen=True)
@checked
class Truth:
    """True maps: a file of the only scan, or a folder with one for each scan by the same name; on any grid.

    Attributes:
        T1: T1-weighted images, in any unit; their extremes become 0 and 1.
        T2: T2-weighted images, likewise.
        FLAIR: FLAIR images, likewise.
        CT: CT in HU.
        distance: Signed distances in mm, with as many channels as the network tells.
        bias_field: Gains, in any unit.
        coordinates: Places in MNI space in mm, with three channels.
    """

    T1: Path | None = None
    T2: Path | None = None
    FLAIR: Path | None = None
    CT: Path | None = None
    distance: Path | None = None
    bias_field: Path | None = None
    coordinates: Path | None = None

    @property
    def places(self) -> dict[str, Path | None]:
        """By the name of the map."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def read_labels(found: Prediction, path: Path | None) -> Int[np.ndarray, "x y z"] | None:
    """Read the label map of a scan onto the grid of its maps.

    Raises:
        InputError: The map is none of the network's labels, or cannot be read.
    """
    if path is None:
        return None
    truth = nifti.read(path, dimensions=(3,), dtype=np.int32, allow_constant=False)
    moved = resample_to(truth, found.scan.volume.grid, order=0).array
    if not any(label and (moved == label).any() for label in found.voxels):
        expected = f"labels of the network, such as {[*found.voxels][1:4]}"
        raise InputError(path, expected, f"{np.unique(moved)[:6].tolist()}", "give a map in the network's labels")
    return moved


def read_truth(found: Prediction, files: Mapping[str, Path | None]) -> dict[str, np.ndarray]:
    """Read true maps of a scan onto the grid of its maps.

    Args:
        found: Of the scan, with every map that there is a file of.
        files: By the name of the map; those that are None are left out.

    Raises:
        InputError: A file cannot be read, or has other channels.
    """
    result = {}
    for name, path in files.items():
        if path is None:
            continue
        channels = found.maps[name].shape[3:]
        volume = nifti.read(path, dimensions=(3 + len(channels),), dtype=np.float32)
        if volume.array.shape[3:] != channels:
            raise InputError(path, f"{channels[0]} channels, as of {name}", f"shape {volume.array.shape}")
        moved = resample_to(volume, found.scan.volume.grid, order=1, fill=None).array
        result[name] = to_unit_range(moved) if name in IN_UNIT_RANGE else moved.astype(np.float32)
    return result


def score_maps(
    found: Prediction, labels: Int[np.ndarray, "x y z"] | None, truth: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return the scores of `evaluation.compare` against the truth, as far as it is known."""
    known = dict(truth) if labels is None else {"segmentation": labels, **truth}
    return compare(known, found.maps, labels, found)


def dice_by_label(found: Prediction, labels: Int[np.ndarray, "x y z"] | None) -> dict[str, float]:
    """Return Dice of every label of the network that a label map holds, at the network's voxel size."""
    if labels is None:
        return {}
    known = [label for label in found.voxels if label and (labels == label).any()]
    return {str(label): dice(labels == label, found.maps["segmentation"] == label) for label in known}

"""Held-out volumes as a masked autoencoder completes them: written on the model's grid, and drawn."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from jaxmed.arrays.grid import reorient
from jaxmed.data.preprocess import Preprocess
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.recipes.pretrain_mae import Reconstruction
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Figure
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

KINDS = {
    "image": "the model's input",
    "seen": "the input with hidden patches 0",
    "completed": "the input with hidden patches as predicted",
}
# Axes of the cube where a volume comes without a place in the world: slices from foot to head, rows from front to back,
# columns from right to left, as axial slices are stored.
AXIAL = np.array([[0.0, 0.0, -1.0, 0.0], [0.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@dataclasses.dataclass(frozen=True)
class Completed:
    """A held-out volume: mean squared error of its hidden voxels, and their variance."""

    error: float
    variance: float


def completed(pictures: Sequence[Reconstruction]) -> tuple[Completed, ...]:
    """Return what a summary keeps of held-out volumes."""
    return tuple(Completed(float(picture.error), float(picture.variance)) for picture in pictures)


def write_volumes(
    folder: Path,
    pictures: Sequence[Reconstruction],
    scans: Sequence[ScanFiles],
    preprocess: Preprocess,
    channels: Sequence[str] = ("",),
    constants: Mapping[str, float] | None = None,
) -> None:
    """Write held-out volumes and their completion on the model's grid, in the scan's world, with sidecars.

    Args:
        folder: Gets held_out_N_image, seen and completed; of several channels held_out_N_CHANNEL_image and so on.
        pictures: As the model completes them.
        scans: Where they came from.
        preprocess: What they went through.
        channels: Name of each; one empty name for a single one.
        constants: Of the intensities, for the sidecars.
    """
    for number, (picture, scan) in enumerate(zip(pictures, scans, strict=False)):
        affine = find_affine(scan, preprocess)
        for place, channel in enumerate(channels):
            for name, definition in KINDS.items():
                stem = file_stem(number, channel, name)
                array = getattr(picture, name)[..., place]
                nifti.write(folder / f"{stem}.nii.gz", Volume.make(np.asarray(array, np.float32), affine))
                sidecar = {
                    "definition": definition,
                    "unit": "1",
                    "constants": dict(constants or {}),
                    "source": str(scan.path),
                    "axes": "slice, row, column of the model; the affine leads to the scan's world",
                    "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
                }
                write_json(folder / f"{stem}.json", sidecar)


def file_stem(number: int, channel: str, name: str) -> str:
    """Return the name of a file of `write_volumes`, without suffix."""
    return "_".join(filter(None, (f"held_out_{number}", channel, name)))


def find_affine(scan: ScanFiles, preprocess: Preprocess) -> Float64[np.ndarray, "4 4"]:
    """Return where the voxels of a scan's cube stand; of one in a store, whose file is elsewhere, nobody knows."""
    grid = preprocess.prepare(scan).grid if scan.path.exists() else None
    return AXIAL if grid is None else preprocess.input_grid(grid).affine


def volume_figure(outputs: Path, number: int, channel: str, caption: str, style: MapStyle) -> Figure:
    """Draw slices of a held-out volume beside what the encoder sees of it and what the model makes of that."""
    labels = {"Input": "image", "Seen": "seen", "Completed": "completed"}
    volumes = {
        label: reorient(nifti.read(outputs / f"{file_stem(number, channel, name)}.nii.gz"))
        for label, name in labels.items()
    }
    x, y, z = map(float, volumes["Input"].spacing)
    arrays = {label: volume.array for label, volume in volumes.items()}
    return slice_maps(arrays, (x, y, z), caption=caption, styles=dict.fromkeys(labels, style), num_slices=4)

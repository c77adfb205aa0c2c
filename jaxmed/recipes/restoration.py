"""Restore scans: what belongs to one, its maps on its own grid and in its own unit, and what a page shows of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import reorient, resample_to
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.data.preprocess import Loaded, Preprocess, load, load_head
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.io.maps import write_map
from jaxmed.io.tables import write_table
from jaxmed.metrics.tissue import TISSUES, label_volumes
from jaxmed.recipes.map_images import Inputs
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Block, Section, Table
from jaxmed.report.volumes import show_volumes
from jaxmed.volume import Volume

TITLES = {"input": "Input", "initial": "Estimate", "enhanced": "Enhanced", "difference": "Difference"}
TITLES |= {"uncertainty": "Uncertainty"}
IS_DIFFERENCE = ("difference", "uncertainty")
"""Maps of distances between intensities, whose 0 stays 0."""
Volumes = tuple[str, Mapping[str, Mapping[str, float]], Mapping[str, float]]
"""Name of a scan, tissue volumes of its images, and volumes of the labels of its label map, in ml."""


class Case(NamedTuple):
    """A scan and what belongs to it, on the network's grid.

    Attributes:
        scan: The scan.
        estimate: By another tool, in the network's unit; None where nothing is given.
        head: Where to restore, and to measure tissue: a mask, or else the largest bright region.
        labels_ml: Volume of every label of its label map.
    """

    scan: Loaded
    estimate: Float32[np.ndarray, "x y z"] | None
    head: Bool[np.ndarray, "x y z"]
    labels_ml: dict[str, float]


def read_case(one: Inputs, preprocess: Preprocess, fill: float | None) -> Case:
    """Read and check a scan and what belongs to it: "initial", "mask" and "labels".

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    scan = load(one.scan, preprocess, fill)
    initial, mask, labels = (one.beside[name] for name in ("initial", "mask", "labels"))
    estimate, volumes = None, {}
    if initial is not None:
        other = load(initial, preprocess, fill)
        moved = resample_to(other.volume, scan.volume.grid, order=1, fill=np.nan).array
        inside = float(np.isfinite(moved).mean())
        if inside < 0.5:
            found = f"one that covers {inside:.0%} of it"
            raise InputError(initial, f"an image of the space of {one.path}", found, "register it first")
        # Beyond its field of view the scan stands in.
        estimate = np.where(np.isfinite(moved), moved, scan.volume.array).astype(np.float32)
    if labels is not None:
        found = nifti.read(labels, dimensions=(3,), dtype=np.int32, allow_constant=False)
        volumes = label_volumes(found.array, None, float(np.prod(found.spacing)) / 1000)
    # A mask says what the brain is; what lies outside is not restored.
    head = find_foreground(scan.volume.array) if mask is None else load_head(mask, scan, preprocess)
    return Case(scan, estimate, head, volumes)


def write_restored(
    folder: Path,
    one: Inputs,
    scan: Loaded,
    maps: Mapping[str, Float32[np.ndarray, "x y z"]],
    definitions: Mapping[str, str],
    constants: Mapping[str, Any],
) -> None:
    """Write maps, names as in TITLES, in the unit of the scan, each with a sidecar; of a picture also a picture."""
    told = {"intensity_of_0": scan.low, "intensity_of_2": scan.high, **constants}
    for name, array in maps.items():
        stored = scan.restore_stored(array, is_difference=name in IS_DIFFERENCE)
        stem = f"{one.name}_{name}"
        write_map(folder, stem, stored, definitions[name], "that of the input", told, reference=one.path)
    if scan.kind == "picture":
        picture = scan.as_stored(scan.restore(maps["enhanced"])) / MAX_INTENSITY * 255
        write_png(folder / f"{one.name}_enhanced.png", np.clip(picture, 0, 255).astype(np.uint8))


def write_volumes(folder: Path, scans: Sequence[Volumes]) -> None:
    """Write volumes.csv where tissue was measured."""
    rows = [
        {"id": name, "image": image, **{f"{tissue}_ml": f"{values[tissue]:.6g}" for tissue in TISSUES}}
        for name, images, _ in scans
        for image, values in images.items()
    ]
    if rows:
        write_table(folder / "volumes.csv", tuple(rows[0]), rows)


# The page -----------------------------------------------------------------------------------------------------------


def restored_blocks(outputs: Path, name: str, maps: Sequence[str], samples: int, *, is_viewed: bool) -> list[Block]:
    """Show a scan, its maps, and where samples disagree if there are several; nothing where the maps are gone.

    Args:
        outputs: Of the run.
        name: Of the scan.
        maps: That were written.
        samples: How many were drawn.
        is_viewed: Whether a volume gets a viewer beside its slices.
    """
    try:
        read = {kind: reorient(nifti.read(outputs / f"{name}_{kind}.nii.gz")) for kind in maps}
    except (OSError, InputError):
        return []
    arrays = {kind: volume.array for kind, volume in read.items()}
    arrays["input"] = arrays["enhanced"] - arrays["difference"]
    mask = np.abs(arrays["input"]) > 0
    size, spread = (float(np.percentile(np.abs(arrays[kind]), 99.5)) or 1e-6 for kind in IS_DIFFERENCE)
    top = max(float(np.percentile(arrays["enhanced"][mask], 99.5)) if mask.any() else 1.0, 1e-6)
    styles = dict.fromkeys(TITLES, MapStyle(limits=(0.0, top), colormap="gray", unit="scan intensity")) | {
        "difference": MapStyle(limits=(-size, size), colormap="RdBu_r", unit="scan intensity"),
        "uncertainty": MapStyle(limits=(0.0, spread), colormap="magma", unit="scan intensity"),
    }
    shown = {kind: title for kind, title in TITLES.items() if kind != "uncertainty" or samples > 1}
    caption = f"{name}: input, estimate, result, and result minus input"
    caption += f"; standard deviation over {samples} samples." if samples > 1 else "."
    volumes = {title: Volume.make(arrays[kind], read["enhanced"].affine) for kind, title in shown.items()}
    told = {title: styles[kind] for kind, title in shown.items()}
    return show_volumes(volumes, caption=caption, styles=told, is_viewed=is_viewed)


def volume_sections(scans: Sequence[Volumes]) -> list[Section]:
    """List tissue volumes of every image, and those of label maps; nothing where no tissue was measured."""
    rows = [
        (name, TITLES[image], *(values[tissue] for tissue in TISSUES))
        for name, images, _ in scans
        for image, values in images.items()
    ]
    caption = (
        "Tissue volumes by a Gaussian mixture with partial volume and gain, the same for every image. It expects the "
        "order of a T1-weighted brain, fluid darkest and white matter brightest: of other contrasts, and of heads "
        "without a mask, these numbers mean nothing."
    )
    blocks = [Table(("scan", "image", *(f"{tissue} (ml)" for tissue in TISSUES)), rows, caption)]
    labels = [(name, label, value) for name, _, found in scans for label, value in found.items()]
    if labels:
        blocks.append(Table(("scan", "label", "volume (ml)"), labels, "Volumes counted in the label map."))
    return [Section("Tissue volumes", blocks)] if rows else []

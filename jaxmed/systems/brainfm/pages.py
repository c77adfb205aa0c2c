"""What the pages of train and predict show: a scan with its maps, an example with its truth, worse versions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmed.arrays.foreground import find_foreground
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.numpy_files import restore_npz
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Block, Figure, Note, Section, Table
from jaxmed.report.volumes import show_volumes
from jaxmed.volume import Volume

STYLES = {
    **{name: MapStyle(colormap="gray") for name in ("input", "T1", "T2", "FLAIR", "atlas", "reference")},
    "CT": MapStyle("HU", (0.0, 80.0), "gray"),
    "distance": MapStyle("mm", (-3.0, 3.0), "RdBu_r"),
    "bias_field": MapStyle(limits=(0.5, 1.5)),
    "coordinates": MapStyle("mm", (-90.0, 90.0), "RdBu_r"),
    "cortex": MapStyle(limits=(0.0, 110.0), colormap="gray"),
    "high_res_residual": MapStyle(limits=(-0.2, 0.2), colormap="RdBu_r"),
    "pathology": MapStyle(limits=(0.0, 1.0), colormap="magma"),
}
SIGNED = ("distance", "registration", "bias_field_log", "high_res_residual")
"""Targets about zero."""
SHORT = {"segmentation": "class", "registration": "MNI x", "bias_field_log": "bias", "high_res_residual": "detail"}


def scan_section(outputs: Path, name: str, maps: Sequence[str], *, is_viewed: bool) -> Section:
    """Show a scan as the network saw it, and its maps, of several channels the first: in slices, and in a viewer."""
    try:
        read = {one: nifti.read(outputs / f"{name}_{one}.nii.gz") for one in ("input", *maps)}
    except (OSError, InputError):
        return Section(name, [Note("The maps are no longer in this folder.", "warning")])
    arrays = {one: np.asarray(v.array if v.array.ndim == 3 else v.array[..., 0]) for one, v in read.items()}
    styles = {one: STYLES.get(one, MapStyle()) for one in arrays}
    if "segmentation" in arrays:
        # Numbers of labels lie far apart: colours go by their order.
        known = np.unique(arrays["segmentation"])
        arrays["segmentation"] = np.searchsorted(known, arrays["segmentation"])
        styles["segmentation"] = MapStyle("label, in order", (0.0, max(len(known) - 1.0, 1.0)), "turbo")
    caption = f"{name}: the scan as the network saw it, and its maps, within the head."
    head, own = find_foreground(arrays["input"]), {one: Volume.make(a, read[one].affine) for one, a in arrays.items()}
    told = {"caption": caption, "styles": styles, "mask": head if head.any() else None, "whole": ("input",)}
    return Section(name, show_volumes(own, **told, is_viewed=is_viewed))


SCORES = {
    "dice": "mean over labels",
    "coordinate_mm": "mean error in the brain, mm",
    "pair_mm": "mean error of the place of a voxel in another scan, mm",
    "distance_mm": "mean absolute error in the brain, mm",
    "bias_error": "length of the difference of gains in lengths of the true one, at the best factor",
    "corrected_error": "mean absolute difference of the corrected scans, in their means",
    "CT_error": "mean absolute error, HU",
    "center_mm": "distance of the centres of structures, mm",
}
DETAILS = ("_psnr", "_ssim", "_background", "corrected_error")
"""Ends of scores that stand in the tables of outputs/ alone where there are many columns."""


def truth_sections(found: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """Tabulate what maps score against the truth, by scan; nothing where none is known."""
    if not found:
        return []
    names = [*dict.fromkeys(name for scores in found.values() for name in scores)]
    known = {name: [scores[name] for scores in found.values() if name in scores] for name in names}
    rows = [
        (name, float(np.mean(values)), len(values), SCORES.get(name, _unit_of(name))) for name, values in known.items()
    ]
    caption = "Means over the scans whose truth is known; outputs/scans.csv holds every scan."
    return [Section("Against the truth", [Table(("score", "mean", "scans", "what"), rows, caption)])]


def registration_sections(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Section]:
    """Tabulate how label maps that are brought onto scans agree with theirs; nothing where there are none."""
    rows = [
        (name, what, scores.get("dice"), scores.get("center_mm"))
        for name, brought in found.items()
        for what, scores in brought.items()
    ]
    if not rows:
        return []
    caption = (
        "Label maps of the atlas, or of the reference, brought onto each scan by its coordinates: Dice with the scan's "
        "own, and how far from the centre of a structure that of the scan is found; means over structures."
    )
    return [Section("Registration", [Table(("scan", "brought", "Dice", "centres (mm)"), rows, caption)])]


def robustness_sections(scans: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> list[Section]:
    """Tabulate what worse versions of scans change, by condition and by modality; nothing where none were asked about.

    Args:
        scans: Modality of each scan, or "", and its scores by condition.
    """
    if not scans:
        return []
    found = [scores for _, scores in scans]
    order, present = [*SCORES], [name for name in found[0]["as it is"] if not name.endswith(DETAILS)]
    names = sorted(present, key=lambda name: order.index(name) if name in order else len(order))
    rows = [
        (condition, *(_mean_of([one[condition].get(name) for one in found]) for name in names))
        for condition in found[0]
    ]
    caption = (
        "Means over scans. Dice is that with the label map where there is one, else with the maps of the scan as it "
        "is; pair_mm is the error of registering the worse scan with the scan as it is, whose voxels are known; all "
        "else are changes against the maps of the scan as it is. outputs/robustness.csv holds every scan and score."
    )
    blocks: list[Block] = [Table(("condition", *names), rows, caption)]
    modalities = sorted({modality for modality, _ in scans})
    if len(scans) > 1 and names:
        groups = [[one for known, one in scans if known == modality] for modality in modalities]
        each = [
            (modality or "not told", len(group), *(_mean_of([one[c].get(names[0]) for one in group]) for c in found[0]))
            for modality, group in zip(modalities, groups, strict=True)
        ]
        told = f"The score {names[0]} by the modality of the scans: means over those of one modality."
        blocks.append(Table(("modality", "scans", *found[0]), each, told))
    return [Section("Worse versions of the scans", blocks)]


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _unit_of(name: str) -> str:
    ends = {"_psnr": "dB", "_ssim": "between the extremes of both, at most 1", "_background": "with the background"}
    return next((text for end, text in ends.items() if name.endswith(end)), "mean absolute error, image in [0, 1]")


def example_figure(path: Path) -> Figure | Note:
    """Show an image of training, its targets and what the network finds."""
    arrays = restore_npz(path)
    if arrays is None:
        return Note("The example is no longer in this folder.", "warning")
    styles: dict[str, MapStyle] = {}
    for name, array in arrays.items():
        if name.partition("/")[0] in SIGNED:
            largest = float(np.abs(arrays.get(name.replace("found", "truth"), array)).max()) or 1.0
            styles[name] = MapStyle(limits=(-largest, largest), colormap="RdBu_r")
        elif name.startswith("segmentation"):
            styles[name] = MapStyle(limits=(0.0, max(1.0, float(arrays["segmentation/truth"].max()))))
        else:
            styles[name] = MapStyle(colormap="gray")
    # Names that fit beside a row: "MNI x, true".
    shown = {}
    for name in arrays:
        task, _, which = name.partition("/")
        shown[name] = task if not which else f"{SHORT.get(task, task)}, {'true' if which == 'truth' else which}"
    caption = "An image that was not trained on; truth and what the network finds, of several channels the first."
    mask = np.ones(arrays["image"].shape, bool)
    maps = {shown[name]: array for name, array in arrays.items()}
    styles = {shown[name]: style for name, style in styles.items()}
    return slice_maps(maps, (1.0, 1.0, 1.0), caption=caption, styles=styles, mask=mask, num_slices=4)

"""What the pages of train and predict show: a scan with its maps, an example with its truth, worse versions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.numpy_files import restore_npz
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Figure, Note, Section, Table

STYLES = {
    "input": MapStyle(limits=(0.0, 1.0), colormap="gray"),
    **{name: MapStyle(limits=(0.0, 1.0), colormap="gray") for name in ("T1", "T2", "FLAIR")},
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


def scan_section(outputs: Path, name: str, maps: Sequence[str]) -> Section:
    """Show a scan as the network saw it, and its maps; of several channels the first."""
    try:
        read = {one: nifti.read(outputs / f"{name}_{one}.nii.gz") for one in ("input", *maps)}
    except (OSError, InputError):
        return Section(name, [Note("The maps are no longer in this folder.", "warning")])
    arrays = {one: np.asarray(v.array if v.array.ndim == 3 else v.array[..., 0]) for one, v in read.items()}
    figure = slice_maps(
        arrays, read["input"].spacing, caption=f"{name}: the scan as the network saw it, and its maps.",
        styles={one: STYLES.get(one, MapStyle()) for one in arrays}, mask=arrays["input"] != 0, num_slices=4,
    )  # fmt: skip
    return Section(name, [figure])


def robustness_sections(found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Section]:
    """Tabulate what worse versions of scans change; nothing where none were asked about."""
    if not found:
        return []
    names = list(found[0]["as it is"])
    rows = [
        (condition, *(float(np.mean([one[condition].get(name, np.nan) for one in found])) for name in names))
        for condition in found[0]
    ]
    caption = (
        "Means over scans. Dice is that with the label map where there is one, else with the maps of the scan as it "
        "is; all else are changes against those. outputs/robustness.csv holds every scan."
    )
    return [Section("Worse versions of the scans", [Table(("condition", *names), rows, caption)])]


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

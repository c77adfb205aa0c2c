"""The reports of both training stages, made from what a run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io import nifti
from jaxmed.report.figures import MapStyle, curves, slice_maps
from jaxmed.report.page import Section, Table, Text, write_report
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary

STYLE = MapStyle(colormap="gray", limits=(0.0, 2.0))
ONE_MM = (1.0, 1.0, 1.0)


def write_prior_page(folder: Path) -> None:
    """Write report.html of a train-prior run from its config.json, metrics.jsonl and outputs/."""
    record, summary, lines = _read(folder)
    captions = {
        "training": "Images as the prior is trained on them: scans, and contrasts drawn from label maps where there "
        "are any, scaled to [0, 2].",
        "samples": f"Images drawn from the prior in {record['config']['sample_steps']} steps, from noise alone. "
        "A prior that is good enough for DynamicDPS shows heads with plausible tissue, not copies of the above.",
    }
    loss = curves(
        _series(lines, {"training": "loss", "held out": "evaluation/loss"}),
        xlabel="step", ylabel="loss", log=True,
        caption="Mean squared error of the predicted noise over all times; a network that knows nothing has 1.",
    )  # fmt: skip
    image = curves(
        _series(lines, {"training": "image_error", "held out": "evaluation/image_error"}),
        xlabel="step", ylabel="error", log=True,
        caption="Mean squared error of the denoised image, which late times, where nothing is left to see, rule.",
    )  # fmt: skip
    tiles = [
        *_tiles(summary, lines),
        ("Loss", float(f"{_last(lines, 'evaluation/loss', 'loss'):.3g}"), "of the noise, held out where there is any"),
    ]
    sections = [
        Section("Training", [loss, image, _counts_table(summary)]),
        Section("What the prior has learnt", [_images(folder, name, text) for name, text in captions.items()]),
        _reading(
            "The prior is the moving average of the parameters, in outputs/model; jaxmed dynamicdps enhance takes the "
            "run as --weights. The loss is dominated by times of little noise and hardly moves late in training while "
            "the samples still improve: look at the images."
        ),
    ]
    _write(folder, record, summary, "DynamicDPS prior", "A diffusion prior of brain images", tiles, sections)


def write_initial_page(folder: Path) -> None:
    """Write report.html of a train-initial run from its config.json, metrics.jsonl and outputs/."""
    record, summary, lines = _read(folder)
    shown = {"training": "loss", "held out": "evaluation/loss", "measurement, held out": "evaluation/measurement_error"}
    loss = curves(
        _series(lines, shown), xlabel="step", ylabel="mean absolute error", log=True,
        caption="Mean absolute error of the enhanced image, and of the low-field image taken as it is.",
    )  # fmt: skip
    names = {"Truth": "truth", "Low field": "measurement", "Enhanced": "enhanced"}
    stacks = {label: _stack(folder, name)[0] for label, name in names.items()}
    picture = slice_maps(
        stacks, ONE_MM, styles=dict.fromkeys(stacks, STYLE),
        caption="Images that were not trained on (where any were held out): truth, simulated low field, and what the "
        "network makes of it. Sharp detail that the low-field image does not show is a guess: the enhance stage checks "
        "it against the measurement and the prior.",
    )  # fmt: skip
    gained = summary["psnr"]["enhanced"] - summary["psnr"]["measurement"]
    tiles = [
        *_tiles(summary, lines),
        ("PSNR", f"{summary['psnr']['enhanced']:.1f} dB", f"{gained:+.1f} dB on the low-field image; range 2"),
    ]
    sections = [
        Section("Training", [loss, _counts_table(summary)]),
        Section("What the network makes of low-field images", [picture]),
        _reading(
            "The network is the moving average of the parameters, in outputs/model; jaxmed dynamicdps enhance takes "
            "the run as --initial. It is trained on one kind of scanner and contrast; on others it invents, which is "
            "what the refinement is for."
        ),
    ]
    _write(folder, record, summary, "DynamicDPS initial network", "A conditional enhancer", tiles, sections)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    summary = read_summary(folder)
    return read_record(folder / "config.json"), summary, read_metrics(folder)


def _write(
    folder: Path,
    record: dict[str, Any],
    summary: dict[str, Any],
    title: str,
    subtitle: str,
    tiles: list[Any],
    sections: list[Section],
) -> None:
    write_report(
        folder / "report.html",
        title=title,
        subtitle=f"{subtitle}, {summary['parameters']:,} parameters",
        summary=tiles,
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _series(lines: list[dict[str, float]], names: dict[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for label, name in names.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if len(points) > 1 or (points and not found):
            found[label] = (np.array([step for step, _ in points]), np.array([value for _, value in points]))
    return found


def _last(lines: list[dict[str, float]], *names: str) -> float:
    return next(line[name] for name in names for line in reversed(lines) if name in line)


def _tiles(summary: dict[str, Any], lines: list[dict[str, float]]) -> list[tuple[str, object, str]]:
    counts = summary["counts"]
    return [
        ("Steps", int(_last(lines, "step")), f"{_last(lines, 'steps_per_second'):.2g} per second"),
        ("Images", counts["train images"], f"{counts['train scans']} scans, {counts['train label maps']} label maps"),
    ]


def _counts_table(summary: dict[str, Any]) -> Table:
    counts = summary["counts"]
    kinds = ("scans", "label maps", "images")
    rows = [(split, *(counts[f"{split} {kind}"] for kind in kinds)) for split in ("train", "validation")]
    return Table(("", *(kind.capitalize() for kind in kinds)), rows, "What was read; whole subjects are held out.")


def _images(folder: Path, name: str, caption: str) -> Any:
    stacks = _stack(folder, name)
    label = name.capitalize()
    maps = {label: stacks[0]} if len(stacks) == 1 else {f"{label} {i + 1}": array for i, array in enumerate(stacks)}
    slices = stacks[0].shape[2] if len(stacks) == 1 else 6
    return slice_maps(maps, ONE_MM, caption=caption, styles=dict.fromkeys(maps, STYLE), num_slices=slices)


def _stack(folder: Path, name: str) -> list[np.ndarray]:
    """Return images that a stage wrote: slices side by side as one array, or the first four volumes."""
    place = folder / "outputs"
    if (place / f"{name}.nii.gz").exists():
        return [nifti.read(place / f"{name}.nii.gz").array]
    return [nifti.read(place / f"{name}_{number}.nii.gz").array for number in range(4)
            if (place / f"{name}_{number}.nii.gz").exists()]  # fmt: skip


def _reading(text: str) -> Section:
    source = "Method: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis."
    return Section("How to read this", [Text([text, source])])

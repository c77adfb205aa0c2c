"""The report of meta-training, made from what the run left in its folder."""

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from jaxmed.config import read_record
from jaxmed.metrics.imaging import dice
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of a meta-train run."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    lines = read_metrics(folder)
    last = next((line for line in reversed(lines) if "evaluation/overlap" in line), {})
    which = "a task that is not trained on" if summary["held_out"] else "the tasks that are trained on"
    sections = [
        Section("Training", [_overlaps(lines, which), _losses(lines), _counts(summary)]),
        Section("What the generator makes of " + which, [example_figure(folder / "outputs" / "examples.npz")]),
        Section("How to read this", [Text([
            "Reptile moves the averages of both networks towards where a few steps on one task lead. The generator's "
            "Dice is that of the averages, without adaptation: what a few labels add is seen by the adapt stage.",
            "Discrimination is the mean of D of true masks minus D of generated ones. Near 0 the generator's masks "
            "please the verifier as much as true ones do: with a good generator that is as it should be, with a bad "
            "one it means that the verifier has learnt nothing.",
        ])]),
    ]  # fmt: skip
    if summary["failed"]:
        sections.insert(0, Section("Failed records", [
            Note(f"Records that could not be used: {summary['failed']}; see outputs/failed.csv.", "warning")
        ]))  # fmt: skip
    write_report(
        folder / "report.html",
        title="System I, meta-trained",
        subtitle=f"Self-play reasoning, {len(summary['cases'])} familiar tasks",
        summary=[
            ("Tasks", len(summary["cases"]), f"{sum(summary['cases'].values()):,} cases"),
            ("Dice", f"{100 * last.get('evaluation/overlap', float('nan')):.1f} %", f"on {which}"),
            ("Discrimination", f"{last.get('evaluation/discrimination', float('nan')):.3f}", "D(true) - D(generated)"),
            ("Parameters", f"{sum(summary['parameters'].values()):,}", "of both networks"),
        ],
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def example_figure(path: Path) -> Figure:
    """Show images with true and generated outlines."""
    with np.load(path) as stored:
        images, masks, generated = (stored[name] for name in ("images", "masks", "generated"))
    panels = []
    for image, mask, soft in zip(images, masks, generated, strict=True):
        outlines = {"true": plane(mask, mask), "generated": plane(soft > 0.5, mask)}
        panels.append(Panel(plane(image, mask), f"Dice {100 * dice(mask, soft > 0.5):.0f} %", outlines))
    return mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption="Images with the outlines of the true mask and of the generator's; of volumes, the slice with most of "
        "the mask.",
        alt=f"{len(panels)} images with outlines of true and generated masks.",
    )  # fmt: skip


def plane(
    array: Shaped[np.ndarray, "..."], mask: Shaped[np.ndarray, "..."] | None = None
) -> Shaped[np.ndarray, "row column"]:
    """Return an image as it is looked at, x to the right and y up; of a volume the slice with most of a mask."""
    if array.ndim == 3:
        sizes = np.zeros(array.shape[2]) if mask is None else mask.sum(axis=(0, 1))
        array = array[..., int(np.argmax(sizes)) if sizes.any() else array.shape[2] // 2]
    return np.flip(array.T, 0)


def _overlaps(lines: list[dict[str, float]], which: str) -> Figure:
    names = {"training, within a task": "overlap", which: "evaluation/overlap"}
    return curves(
        {name: _series(lines, key, 100.0) for name, key in names.items()},
        xlabel="tasks seen", ylabel="Dice of the generator (%)",
        caption="Dice of the generated masks: in the inner loops, and of the averages.",
    )  # fmt: skip


def _losses(lines: list[dict[str, float]]) -> Figure:
    return curves(
        {name: _series(lines, name) for name in ("generator", "verifier")},
        xlabel="tasks seen", ylabel="loss",
        caption="Losses of both networks in the inner loops. The verifier's cannot reach 0: its targets are overlaps.",
    )  # fmt: skip


def _series(lines: list[dict[str, float]], name: str, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], factor * line[name]) for line in lines if name in line]
    return np.array([x for x, _ in found]), np.array([y for _, y in found])


def _counts(summary: dict) -> Table:
    rows = list(summary["cases"].items())
    return Table(("task", "cases"), rows, "Familiar tasks; held out: " + (", ".join(summary["held_out"]) or "none"))

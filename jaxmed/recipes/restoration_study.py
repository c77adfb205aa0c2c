"""Compare methods that restore images: one cell per condition, initial estimate and method; tables, and their page.

Methods that start from an estimate are run for every one; the others once per condition, at `NOISE`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.data.subject_images import SubjectImages
from jaxmed.metrics.restoration import MEASURES
from jaxmed.recipes.study import Cell, Result
from jaxmed.recipes.study_sections import mean_bars, show_examples, side_by_side
from jaxmed.recipes.study_tables import Difference, Mean, compare, summarise
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Section

AXES = ("condition", "initial", "arm")
NOISE = "noise"
"""Where methods begin that take no estimate: their value on the axis "initial"."""
Scorer: TypeAlias = Callable[..., dict[str, float]]
"""(truth, estimate, brain, lesions) -> scores."""
SHOWN = ("psnr", "residual", "volume_error", "false_lesions")
"""Drawn as bars."""
# Headings of the tables; what is not among them is in outputs/means.csv and differences.csv.
COLUMNS = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "residual": "residual", "volume_error": "volume error",
    "contradicted": "contra- dicted", "unseen": "unseen", "false_lesions": "false lesions", "perceptual": "perceptual",
}  # fmt: skip
COST = {"evaluations": "evalu- ations", "steps": "steps", "seconds": "s"}
CHANGED = {name: text for name, text in COLUMNS.items() if name not in ("ssim", "unseen")}
TOLD = (
    "Volume error: relative, mean of CSF, grey and white matter. Contradicted, unseen: share of the error that the "
    "measurement contradicts, and that it cannot see, relative to the truth. False lesions: share of images with one. "
    "Perceptual: hallucination score. Evaluations are passes of the network, forward and backward counted together, "
    "steps those of the chain that were walked, seconds per image without compilation."
)


def score_subjects(
    scorer: Scorer,
    subjects: Sequence[SubjectImages],
    estimate: Float32[np.ndarray, "image ..."],
    further: Mapping[str, Shaped[np.ndarray, " image"]],
) -> list[dict[str, Any]]:
    """Return a row per subject: scores of its images, and means of what else is known of them."""
    rows, first = [], 0
    for subject in subjects:
        own = slice(first, first := first + len(subject.images))
        scores = scorer(subject.images, estimate[own], subject.brain, subject.lesions)
        found = scores | {name: float(values[own].mean()) for name, values in further.items()}
        rows.append({"subject": subject.subject} | {name: found[name] for name in (*MEASURES, *found)})
    return rows


def tabulate(results: Sequence[Result], baseline: str, seed: int) -> tuple[list[Mean], list[Difference]]:
    """Return means of every method, and its differences from a baseline on the same subjects."""
    means = [row for name in (*MEASURES, "evaluations") for row in summarise(results, AXES, name, seed=seed)]
    differences = [
        row
        for name in MEASURES if any(result.cell["arm"] == baseline for result in results)
        for row in compare(results, AXES[:2], baseline, name, seed=seed, shared={"initial": NOISE}, test="wilcoxon",
                           family=AXES[:2])
    ]  # fmt: skip
    return means, differences


def method_sections(
    outputs: Path, results: Sequence[Result], baseline: tuple[str, str], seed: int, style: MapStyle, remark: str
) -> list[Section]:
    """Show images, means and differences, condition by condition; nothing without results.

    Args:
        outputs: Of the run, where `keep_examples` kept "truth", "measurement, CONDITION" and images of the cells.
        results: Finished cells, whose metrics tell evaluations, steps and seconds.
        baseline: The arm that the others are compared with, and how a sentence names it.
        seed: Seed for resampling subjects.
        style: Of the images.
        remark: On how long the methods were run.
    """
    means, differences = tabulate(results, baseline[0], seed) if results else ([], [])
    several = len({result.cell["initial"] for result in results} - {NOISE}) > 1
    is_cohort = any(len(result.subjects) > 1 for result in results)

    def label(row: Mean | Cell) -> str:
        """Name a method, and its initial estimate where there are several."""
        place = dict(row.key if isinstance(row, Cell) else row.group)
        return f"{place['initial']}: {place['arm']}" if several and place["initial"] != NOISE else str(place["arm"])

    def against(row: Difference) -> str:
        return f"{row.arm} against {dict(row.group)['initial']}" if several else row.arm

    over = "subjects with its 95 % bootstrap interval" if is_cohort else "the images of the one subject"
    figures = [
        mean_bars([row for row in means if row.measure == shown], label, xlabel=MEASURES[shown], group="condition",
                  caption=f"{MEASURES[shown]}: mean over {over}.")
        for shown in SHOWN
    ]  # fmt: skip
    tested = ", 95 % bootstrap interval, and p of Wilcoxon's signed-rank test, by Holm over the methods."
    tested = tested if is_cohort else ". One subject: there is neither an interval nor a test."
    images, tables, changes = [], [], []
    for condition in dict.fromkeys(str(result.cell["condition"]) for result in results):
        here = [result for result in results if result.cell["condition"] == condition]
        rows = [row for row in means if dict(row.group)["condition"] == condition]
        rows += [row for name in ("steps", "seconds") for row in summarise(here, AXES, name)]
        kept: Mapping[str, str] = {"truth": "truth", "input": f"measurement, {condition}"}
        kept |= {label(result.cell): result.cell.slug for result in here}
        caption = f"Images spread over all, {condition}; intensities in {list(style.limits or ())}."
        images.append(show_examples(outputs, kept, style, caption))
        tables.append(side_by_side(rows, label, COLUMNS | COST, f"Means over subjects, {condition}. {TOLD} {remark}"))
        caption = f"Each method minus {baseline[1]}, {condition}, subject by subject: mean{tested}"
        lines = [row for row in differences if dict(row.group)["condition"] == condition]
        changes.append(side_by_side(lines, against, CHANGED, caption))
    sections = {"Images": images, "Methods": [*figures, *tables], f"Against {baseline[1]}": changes}
    return [Section(title, blocks) for title, blocks in sections.items()] if results else []

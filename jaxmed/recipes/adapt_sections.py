"""What the page of an adaptation shows: scores of every set, curves, calibration, training, and what failed."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.data.labels import is_unlabelled
from jaxmed.errors import InputError
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table
from jaxmed.metrics.classification import operating_curve, reliability_curve
from jaxmed.metrics.cohort import HEADLINE, MEASURES, spell
from jaxmed.recipes.adapt import FITTED
from jaxmed.recipes.adapt_stage import Summary, output_names
from jaxmed.recipes.stage import Finished, Page
from jaxmed.report.figures import Bar, agreement, bars, curves
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.train.log import duration, read_metrics, series

GROUPS = {
    "seen": "distribution seen in pre-training",
    "unseen": "distribution not seen in pre-training",
    "other": "other centre, seen in neither stage",
}
MOST_CURVES = 12
FEWEST_FOR_CALIBRATION = 20
HOW = {
    "full": "Fine-tuned from", "frozen": "A head trained on", "logistic": "A logistic probe on",
    "mae-probe": "MAE's linear probe on", "dinov2-probe": "DINOv2's linear probe on",
    "knn": "Nearest neighbours among features of",
}  # fmt: skip


def adapt_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show an adaptation.

    Args:
        run: The run.
        title: System and stage.
        source: Whose model it is, and what it is not for.
    """
    summary, task = run.summary, run.summary.task
    scores = read_rows(run.outputs / "metrics.csv")
    sections = [
        _scores_section(scores, task, summary),
        *_prediction_sections(run.outputs, task, summary),
        *_training_section(read_metrics(run.path), summary),
        *_probe_section(run.outputs),
        _effort_section(summary),
        *_failed_section(run.outputs, summary),
        _reading_section(source, task, summary),
    ]
    subtitle = f"{HOW[summary.mode]} {summary.start}: {', '.join(task.names)} ({task.kind})"
    return Page(title, f"{subtitle}, {summary.records['train']:,} training scans", _tiles(scores, summary), sections)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table of our own, which may be empty."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _tiles(scores: list[dict[str, str]], summary: Summary) -> list[Tile]:
    tiles: list[Tile] = []
    headline = HEADLINE[summary.task.kind]
    for one in summary.sets:
        row = next((row for row in scores if row["set"] == one.name and row["measure"] == headline), None)
        if row is not None:
            low, high = _number(row["low"]), _number(row["high"])
            text = f"{one.name}, 95 % interval {low:.2f} to {high:.2f}" if low == low else one.name
            tiles.append((spell(headline), round(float(row["estimate"]), 3), text))
    tiles.append(("Parameters", summary.parameters, f"selected after step {summary.step:,}"))
    return tiles[:6]


def _scores_section(scores: list[dict[str, str]], task: Task, summary: Summary) -> Section:
    blocks: list[Any] = [Note(text) for text in summary.notes]
    headline = HEADLINE[task.kind]
    kinds = (headline, headline.removesuffix("_macro"))
    shown = [row for row in scores if row["measure"] in kinds]
    if shown:
        rows = [
            Bar(f"{row['set']}{_about(row, task)}", *(_number(row[name]) for name in ("estimate", "low", "high")),
                group=GROUPS[row["group"]])
            for group in GROUPS for row in shown if row["group"] == group
        ]  # fmt: skip
        caption = f"{spell(headline.removesuffix('_macro'))} of every set with its 95 % interval."
        blocks.append(bars(rows, xlabel=spell(headline.removesuffix("_macro")), caption=caption))
    order = {name: place for place, name in enumerate(MEASURES[task.kind])}
    for group, words in GROUPS.items():
        rows = [row for row in scores if row["group"] == group and row["measure"] in order]
        names = list(dict.fromkeys(row["set"] for row in rows))
        rows.sort(key=lambda row: (names.index(row["set"]), order[row["measure"]]))
        if rows:
            cells = [
                (row["set"], spell(row["measure"]), row["label"], float(row["estimate"]), _number(row["low"]),
                 _number(row["high"]), int(row["records"]), int(row["subjects"]))
                for row in rows
            ]  # fmt: skip
            columns = ("Set", "Measure", "Of", "Estimate", "Low", "High", "Scans", "Subjects")
            blocks.append(Table(columns, cells, f"{words[0].upper()}{words[1:]}."))
    return Section("How well it does", blocks)


def _number(cell: str) -> float:
    return float(cell) if cell else float("nan")


def _about(row: dict[str, str], task: Task) -> str:
    return "" if row["label"] == "all" or task.names == (row["label"],) else f", {row['label']}"


def _prediction_sections(outputs: Path, task: Task, summary: Summary) -> list[Section]:
    path = outputs / "predictions.csv"
    names = [one.name for one in summary.sets if one.records]
    if not names:
        return []
    table = read_table(path)
    if task.kind == "regression":
        return [_agreement_section(table, task, names)]
    chance = np.array([0.0, 1.0])
    roc: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    calibration: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in names:
        rows = [row for row in table.rows if row["set"] == name]
        for number, label in enumerate(task.names):
            truth, values = _column(rows, task, number)
            title = name if len(task.names) == 1 else f"{name}, {label}"
            try:
                curve = operating_curve(truth, values)
            except InputError:  # one class only: the scores say so
                continue
            roc[title] = (1 - curve.specificity, curve.sensitivity)
            if len(truth) >= FEWEST_FOR_CALIBRATION:
                bins = reliability_curve(truth, values, num_bins=8, binning="equal_mass")
                calibration[title] = (bins.confidence, bins.frequency)
    sections = []
    if roc:
        shown = dict(list(roc.items())[:MOST_CURVES]) | {"chance": (chance, chance)}
        caption = "Sensitivity over 1 - specificity; of several classes, each against the rest."
        sections.append(
            Section("ROC", [curves(shown, xlabel="1 - specificity", ylabel="sensitivity", caption=caption)])
        )
    if calibration:
        shown = dict(list(calibration.items())[:MOST_CURVES]) | {"perfect": (chance, chance)}
        caption = "How often it was true over how probable it was called, in eight groups of equal size."
        figure = curves(shown, xlabel="predicted probability", ylabel="observed frequency", caption=caption)
        sections.append(Section("Calibration", [figure]))
    return sections


def _column(rows: list[dict[str, str]], task: Task, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return who has a label, and the probability of it, where it is known."""
    label = task.names[number]
    column = "label" if f"label_{label}" not in rows[0] else f"label_{label}"
    known = [row for row in rows if not is_unlabelled(row[column])]
    truth = [_is_positive(row[column], label, task) for row in known]
    return np.array(truth, np.int64), np.array([float(row[output_names(task)[number]]) for row in known], np.float64)


def _is_positive(cell: str, label: str, task: Task) -> bool:
    if cell == label:
        return True
    try:
        value = float(cell)
    except ValueError:
        return False
    if task.kind == "multiclass":
        return label == str(int(value)) if value == int(value) else False
    return value == 1


def _agreement_section(table: Rows, task: Task, names: list[str]) -> Section:
    blocks: list[Any] = []
    for name in names:
        rows = [row for row in table.rows if row["set"] == name]
        truth, estimate = {}, {}
        for number, label in enumerate(task.names):
            column = "label" if f"label_{label}" not in table.columns else f"label_{label}"
            known = [row for row in rows if not is_unlabelled(row[column])]
            truth[label] = np.array([float(row[column]) for row in known], np.float64)
            estimate[label] = np.array([float(row[output_names(task)[number]]) for row in known], np.float64)
        blocks.append(
            agreement(truth, estimate, caption=f"{name}: predicted over true value, in the unit of the labels.")
        )
    return Section("Predicted and true", blocks)


def _training_section(lines: list[dict[str, float]], summary: Summary) -> list[Section]:
    if summary.mode in FITTED or not lines:
        return []
    shown = {"training": series(lines, "loss"), "validation": series(lines, "evaluation/loss")}
    caption = f"Loss. Kept: step {summary.step:,}, of the best validation {spell(summary.select)}."
    blocks: list[Any] = [curves(shown, xlabel="step", ylabel="loss", caption=caption)]
    areas = series(lines, "evaluation/auroc")
    if len(areas[0]):
        text = "AUROC of the validation scans; of several classes or labels, the mean."
        blocks.append(curves({"validation": areas}, xlabel="step", ylabel="AUROC", caption=text))
    scores = series(lines, "evaluation/score")
    if summary.select == "score" and len(scores[0]):
        text = "Score of the validation scans: the mean of macro F1, AUROC and Cohen's kappa."
        blocks.append(curves({"validation": scores}, xlabel="step", ylabel="score", caption=text))
    text = "Learning rate of the head; the rate of each layer before it is smaller by the layer decay."
    rate = {"rate": series(lines, "learning_rate")}
    blocks.append(curves(rate, xlabel="step", ylabel="learning rate", caption=text))
    return [Section("Training", blocks)]


def _probe_section(outputs: Path) -> list[Section]:
    path = outputs / "probe.csv"
    if not path.exists():
        return []
    table = read_table(path)
    if "strength" not in table.columns:
        return [_tried_section(table)]
    lines = {}
    for label in dict.fromkeys(table.column("label")):
        rows = [row for row in table.rows if row["label"] == label]
        strengths, losses = (np.array([float(row[n]) for row in rows]) for n in ("strength", "validation_loss"))
        lines[label] = (np.log10(strengths), losses)
    chosen = [(row["label"], float(row["strength"]), float(row["validation_loss"])) for row in table.rows
              if row["chosen"] == "1"]  # fmt: skip
    caption = "Loss of the validation scans over the weight C of the training loss beside the L2 penalty."
    blocks = [
        curves(lines, xlabel="log10 C", ylabel="validation loss", caption=caption),
        Table(("Label", "C", "Validation loss"), chosen, "The strengths that were kept."),
    ]
    return [Section("Strength of the probe", blocks)]


def _tried_section(table: Rows) -> Section:
    """Show what a probe has tried: the losses of a grid of heads over their rates, and the best ten of all."""
    blocks: list[Any] = []
    if "rate" in table.columns:
        lines = {}
        for blocks_seen, features in dict.fromkeys((row["blocks"], row["features"]) for row in table.rows):
            rows = [row for row in table.rows if (row["blocks"], row["features"]) == (blocks_seen, features)]
            rates, losses = (np.array([float(row[name]) for row in rows]) for name in ("rate", "loss"))
            lines[f"{features}, last {blocks_seen}"] = (np.log10(rates), losses)
        caption = "Loss of the validation scans over the learning rate, per 256 records of a batch."
        blocks.append(curves(lines, xlabel="log10 rate", ylabel="validation loss", caption=caption))
    best = sorted(table.rows, key=lambda row: (row["chosen"] != "1", float(row["loss"])))[:10]
    cells = [tuple(row[name] for name in table.columns) for row in best]
    blocks.append(Table(tuple(spell(name) for name in table.columns), cells, "What was chosen, then by loss."))
    return Section("What the probe tried", blocks)


def _effort_section(summary: Summary) -> Section:
    effort = summary.effort
    rows = [
        ("Trained parameters", f"{effort.trained_parameters:,}"),
        ("Operations of a prediction", f"{effort.operations / 1e9:,.4g} GFLOP"),
        *(
            (name, duration(seconds))
            for name, seconds in (
                ("An epoch of training", effort.seconds_per_epoch),
                ("Until the kept parameters", effort.seconds_to_best),
            )
            if seconds is not None
        ),
    ]
    if effort.peak_memory is not None:
        rows.append(("Largest memory of a device so far", f"{effort.peak_memory / 1e9:,.2f} GB"))
    return Section("What it took", [Table(("What", "How much"), rows, "Compilation is not included.")])


def _failed_section(outputs: Path, summary: Summary) -> list[Section]:
    number = sum(one.failed for one in summary.sets)
    if not number:
        return []
    rows = [(row["set"], row["reason"]) for row in read_table(outputs / "failed.csv").rows[:20]]
    text = f"{number:,} scans could not be read and were not scored; outputs/failed.csv lists them all."
    return [Section("Failed", [Note(text, "warning"), Table(("Set", "Reason"), rows)])]


def _reading_section(source: str, task: Task, summary: Summary) -> Section:
    text = [
        "Intervals are the middle 95 % of 2000 bootstrap resamples of subjects; they do not hold what another training "
        "run or another choice of subjects to train on would change. The validation set selected the model, so its "
        "scores are too good; the test set and other centres tell what to expect.",
    ]
    if task.kind in ("binary", "multilabel"):
        text.append(
            f"Accuracy, F1, sensitivity and specificity count a probability of {summary.threshold:g} and above as "
            "predicted. Class weights move probabilities: look at the calibration before using them."
        )
    text.append(source)
    return Section("How to read this", [Text(text)])

"""The report of a fitted course, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.report.figures import agreement, curves, histograms
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.report.regions import glass_brain
from jaxmed.systems.igndmoe.results import read_course
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary

MOST_CURVES = 8
LEADING = {"igndmoe": "a mixture of three mechanisms", "fkpp": "diffusion and growth", "ndm": "network diffusion"}


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json, metrics.jsonl and outputs/."""
    record, outputs = read_record(folder / "config.json"), folder / "outputs"
    summary = read_summary(outputs.parent)
    scores = summary["scores"]
    said = "test" if "test" in scores else "train"
    tiles: list[tuple[str, object, str]] = [
        ("Subjects", summary["subjects"], f"{summary['visits']} visits, {len(summary['regions'])} regions"),
        ("R", scores[said]["r"], f"mean correlation over regions, {said} subjects, staged with all their visits"),
        ("SSE", scores[said]["sse"], f"over {scores[said]['visits']} visits of {said} subjects, values on [0, 1]"),
        ("At an end", summary["clipped"], "subjects staged at the first or last point of the course"),
    ]
    if summary["stage_recovery_spearman"] is not None:
        tiles.append(("Stage recovery", summary["stage_recovery_spearman"], "Spearman, against planted stages"))
    sections = [_course_section(outputs, summary)]
    if (outputs / "weights.csv").exists():
        sections.append(_weights_section(outputs))
    sections += [
        _stages_section(outputs),
        _scores_section(outputs, scores),
        _rounds_section(folder),
        _reading_section(summary),
    ]
    write_report(
        folder / "report.html",
        title="The course of a disease",
        subtitle=f"{LEADING.get(summary['equation'], summary['equation'])} on a connectome of "
        f"{len(summary['regions'])} regions, from {' and '.join(summary['seeds'])}",
        summary=tiles,
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _course_section(outputs: Path, summary: dict[str, Any]) -> Section:
    course = read_course(outputs)
    times, states = np.asarray(course.trajectory.times), np.asarray(course.trajectory.states)
    low, high = course.scale
    measured = low + (high - low) * states
    regions = course.regions
    # From those that change first to those that change last.
    order = np.argsort(-states[len(times) // 2])
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(MOST_CURVES, len(order))).astype(int))]
    lines = curves(
        {regions[index]: (times, measured[:, index]) for index in chosen},
        xlabel="stage (years)",
        ylabel="regional amount, in the unit of the table",
        caption="The fitted course in regions from early to late ones.",
    )
    maps = {f"stage {times[i]:.0f} years": measured[i] for i in (len(times) // 3, 2 * len(times) // 3, len(times) - 1)}
    centroids = outputs / "centroids.csv"
    points = None
    if centroids.exists():
        table = read_table(centroids, ("region", "x", "y", "z"))
        points = np.array([table.floats(axis) for axis in "xyz"]).T
    told = "" if points is not None else " Regions stand on a ring: no centroids were given."
    brain = glass_brain(maps, regions, points, caption=f"The fitted course at three stages.{told}")
    return Section("Course", [lines, brain])


def _weights_section(outputs: Path) -> Section:
    table = read_table(outputs / "weights.csv")
    stage = np.array(table.floats("stage"))
    names = [name for name in table.columns if name != "stage" and not name.endswith("_rate")]
    weights = curves(
        {name.replace("_", " "): (stage, np.array(table.floats(name))) for name in names},
        xlabel="stage (years)",
        ylabel="weight",
        caption="Weights of the mechanisms over stage. They sum to 1; a weight times its mechanism's own size counts.",
    )
    rates = curves(
        {name.replace("_", " "): (stage, np.array(table.floats(f"{name}_rate"))) for name in names},
        xlabel="stage (years)",
        ylabel="root mean square over regions of weight x mechanism, per year",
        caption="What each mechanism adds to the change of an average region.",
    )
    note = Note(
        "Experts are not identifiable from one fit: a weight can shrink while its network grows. jaxmed igndmoe "
        "attribute gives bands over subjects and starts, and what leaving one out costs."
    )
    return Section("Mechanisms", [weights, rates, note])


def _stages_section(outputs: Path) -> Section:
    table = read_table(outputs / "stages.csv")
    stages, roles = np.array(table.floats("stage")), np.array(table.column("role"))
    values = {role: stages[roles == role] for role in ("train", "validation", "test") if (roles == role).any()}
    figure = histograms(
        values,
        units=dict.fromkeys(values, "years"),
        caption="Stage at the first visit, by role.",
        bins=20,
    )
    return Section("Stages", [figure])


def _scores_section(outputs: Path, scores: dict[str, dict[str, Any]]) -> Section:
    rows = [(role, s["visits"], s["sse"], s["mse"], s["r"], s["r2"]) for role, s in scores.items()]
    table = Table(
        ("Subjects", "Visits", "SSE", "MSE", "R over regions", "R2, median region"),
        rows,
        "Values on [0, 1]; every subject staged with all of its visits, as the paper does, so this is fit after a "
        "shift in time and not a forecast.",
    )
    with np.load(outputs / "fitted_visits.npz") as stored:
        roles = [role for role in scores if f"{role}_measured" in stored]
        known = {role: np.isfinite(stored[f"{role}_measured"]) for role in roles}
        figure = agreement(
            {role: stored[f"{role}_measured"][known[role]] for role in roles},
            {role: stored[f"{role}_predicted"][known[role]] for role in roles},
            caption="Regional values, observed (across) against predicted by the course at the subject's stage (up).",
        )
    return Section("Errors", [table, figure])


def _rounds_section(folder: Path) -> Section:
    lines = read_metrics(folder)
    steps = np.array([line["step"] for line in lines])
    shown = {
        label: (steps, np.array([line.get(f"fit/{key}", np.nan) for line in lines]))
        for label, key in (("training", "train_mse"), ("validation", "validation_mse"))
    }
    figure = curves(
        shown,
        xlabel="round of training and staging",
        ylabel="mean squared error per visit and region",
        caption="Dual optimisation: each round trains at fixed stages, then stages all subjects.",
    )
    return Section("Optimisation", [figure])


def _reading_section(summary: dict[str, Any]) -> Section:
    text = Text(
        [
            "outputs/course.csv holds the course, stages.csv the stage of every subject, weights.csv the mechanisms; "
            "course.npz and model.json are what jaxmed igndmoe stage and forecast read.",
            "Years of stage are anchored by subjects seen more than once. Where the course is steep, stages are sharp; "
            "where it is flat, they are not.",
        ]
    )
    return Section("How to read it", [*(Note(note) for note in summary["notes"]), text])

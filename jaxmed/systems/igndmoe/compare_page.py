"""The report of a comparison, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Note, Section, Table, Text, Tile, write_report
from jaxmed.report.regions import glass_brain
from jaxmed.report.scatter import scatter
from jaxmed.train.run_folder import read_summary

MOST_SEEDS = 10


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record, outputs = read_record(folder / "config.json"), folder / "outputs"
    summary = read_summary(outputs.parent)
    tiles, sections = _visits(summary) if summary["kind"] == "visits" else _map(outputs, summary)
    sections.append(Section("How to read it", [*(Note(note) for note in summary["notes"]), _reading(summary)]))
    write_report(
        folder / "report.html",
        title="Models of spread, compared",
        subtitle="On the same folds of a cohort" if summary["kind"] == "visits" else "Against one regional map",
        summary=tiles,
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _visits(summary: dict[str, Any]) -> tuple[list[Tile], list[Section]]:
    columns = ("Model", "Parameters", "SSE", "sd", "R", "sd", "MSE", "R2", "AICc", "BIC")
    rows = [
        (m["model"], m["parameters"], m["sse"], m["sse_sd"], m["r"], m["r_sd"], m["mse"], m["r2"], m["aicc"], m["bic"])
        for m in summary["models"]
    ]
    caption = (
        "Held-out subjects, staged with all their visits; mean and spread over folds and starts, values on [0, 1]."
    )
    shown = [
        Bar(m["model"], m["sse"], m["sse"] - (m["sse_sd"] or np.nan), m["sse"] + (m["sse_sd"] or np.nan))
        for m in summary["models"]
    ]
    tests = [(t["model"], t["against"], t["difference"], t["p_holm"]) for t in summary["tests"]]
    blocks = [
        Table(columns, rows, caption),
        bars(shown, xlabel="SSE of held-out subjects per fold", caption="Squared error, with the spread of runs."),
        Table(
            ("Model", "Against the best", "Difference in MSE", "p, Holm"),
            tests,
            "Wilcoxon's signed-rank test over subjects, corrected for the number of models.",
        ),
    ]
    tiles: list[Tile] = [
        ("Chosen", summary["chosen"], "the simplest within one standard error of the best"),
        ("Models", len(summary["models"]), "on the same folds"),
        ("Subjects", summary["subjects"], f"{summary['visits']} visits"),
    ]
    return tiles, [Section("Held-out errors", blocks)]


def _map(outputs: Path, summary: dict[str, Any]) -> tuple[list[Tile], list[Section]]:
    models = summary["models"]
    columns = ("Model", "r", "Seed", "At", "Fitted numbers", "AICc", "BIC")
    rows = [(m["model"], m["r"], m["seed"], m["setting"], m["parameters"], m["aicc"], m["bic"]) for m in models]
    caption = (
        f"Pearson's r over {summary['scored']} regions, the best of all seeds, times and settings: in sample. Criteria "
        "count all of these as fitted, and are not defined where regions are no more than fitted numbers + 1."
    )
    table = read_table(outputs / "predictions.csv")
    known = np.array([cell != "" for cell in table.column("map")])
    measured = np.array(table.floats("map", allow_missing=True))[known]
    points = {}
    scaled = {"map": _unit(measured)}
    for model in models:
        predicted = np.array(table.floats(model["model"]))[known]
        points[f"{model['model']}, r = {model['r']:.2f}"] = np.stack([_unit(predicted), _unit(measured)], axis=1)
        scaled[model["model"]] = _unit(predicted)
    names = [name for name, keep in zip(table.column("region"), known, strict=True) if keep]
    best = max(models[:-1], key=lambda m: m["r"])
    figure = scatter(
        points, xlabel="predicted, scaled to [0, 1]", ylabel="map, scaled to [0, 1]",
        caption="Every region, each model at its best seed and time.",
    )  # fmt: skip
    brain = glass_brain(
        {name: scaled[name] for name in ("map", best["model"])}, names, None,
        caption="The map and the best model that tries every seed, scaled to [0, 1]; regions on a ring.",
    )  # fmt: skip
    seeds = read_table(outputs / "seeds.csv")
    values = np.array(seeds.floats(best["model"]))
    ranked = np.argsort(-values)[:MOST_SEEDS]
    seed_bars = bars(
        [Bar(seeds.column("seed")[i], float(values[i])) for i in ranked],
        xlabel="Pearson's r",
        caption=f"The best seeds of {best['model']}.",
    )
    # With more numbers than regions any map is fitted: not a figure to stand beside the others without saying so.
    said = [f"from {m['seed']}" if m["aicc"] is not None else f"in sample, {m['parameters']} numbers" for m in models]
    tiles: list[Tile] = [(m["model"], m["r"], f"r, {text}") for m, text in zip(models, said, strict=True)]
    return tiles, [Section("Models", [Table(columns, rows, caption), figure]), Section("Regions", [brain, seed_bars])]


def _unit(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / (span if span > 0 else 1.0)


def _reading(summary: dict[str, Any]) -> Text:
    if summary["kind"] == "visits":
        return Text(
            [
                "outputs/runs.csv has a row per model, fold and start. A subject held out is staged with all of its "
                "visits before it is scored, as in the paper: this measures the shape of a course, not a forecast."
            ]
        )
    return Text(
        [
            "outputs/predictions.csv has every model's map, seeds.csv the best correlation from every seed.",
            "One map cannot tell mechanisms apart: the mixture has more numbers than regions and fits in sample what "
            "it is given. What is comparable is the models that try every seed with a handful of numbers.",
        ]
    )

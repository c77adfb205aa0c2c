"""The report of a study of efficiency, made from what it left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.recipes.study import make_cells, read_failures, read_results
from jaxmed.recipes.study_tables import compare, comparison_table, summarise, summary_curves, summary_table
from jaxmed.report.bands import Band, banded_curves
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.train.run_folder import read_summary

NAMES = {"auroc": "AUROC", "loss": "Loss"}


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    config = record["config"]
    cells = make_cells({
        "arm": tuple(summary["arms"]), "fraction": tuple(summary["fractions"]),
        "seed": tuple(range(config["seed"], config["seed"] + config["seeds"])),
    })  # fmt: skip
    study = read_record(folder / "outputs" / "study.json")["config"]
    results = read_results(cells, folder, study)
    failures = read_failures(cells, folder)
    sections = [Section("What was done", [Note(text) for text in summary["notes"]])]
    if results:
        sections = [_scores_section(results, summary), *_convergence_section(folder, results, summary), *sections]
    if failures:
        rows = [(str(failure.cell), failure.reason) for failure in failures]
        sections.append(
            Section("Failed", [Table(("Cell", "Reason"), rows, "Cells that failed; others were finished.")])
        )
    write_report(
        folder / "report.html",
        title="TANGERINE efficiency",
        subtitle=f"Pre-trained against from scratch: {', '.join(summary['task']['names'])} "
        f"({summary['task']['kind']}), {summary['records']['train']:,} training scans",
        summary=_tiles(results, summary),
        sections=[*sections, _reading_section(summary)],
        config=config,
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(results: Any, summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = []
    if results:
        means = {
            tuple(dict(row.group).values()): row for row in summarise(results, ("arm", "fraction"), summary["metric"])
        }
        smallest = min(summary["fractions"])
        for arm in summary["arms"]:
            row = means.get((arm, smallest))
            if row is not None:
                words = f"{arm}, {smallest:.0%} of the labels, mean of {row.num_cells} seeds"
                tiles.append((NAMES[summary["metric"]], round(row.mean, 3), words))
        if summary.get("smallest_matching_fraction") is not None:
            share = summary["smallest_matching_fraction"]
            tiles.append(("Labels", f"{share:.0%}", "that pre-trained needs to match scratch with all"))
    tiles.append(("Cells", summary["cells"], f"{summary['failed']} failed"))
    return tiles


def _scores_section(results: Any, summary: dict[str, Any]) -> Section:
    metric, name = summary["metric"], NAMES[summary["metric"]]
    means = summarise(results, ("arm", "fraction"), metric)
    caption = f"{name} on test scans against the share of labelled training subjects: mean of seeds, 95 % interval."
    blocks: list[Any] = []
    if len(summary["fractions"]) > 1:
        blocks.append(
            summary_curves(means, x="fraction", ylabel=name, xlabel="share of labels", log_x=True, caption=caption)
        )
    blocks.append(summary_table(means, f"{name}: mean of seeds with Student's 95 % interval."))
    if {result.cell["arm"] for result in results} == set(summary["arms"]):
        tests = compare(results, "scratch", metric, correction="bonferroni")
        blocks.append(comparison_table(tests, "Paired two-sided t-tests over seeds, corrected by Bonferroni."))
    return Section("Labels", blocks)


def _convergence_section(folder: Path, results: Any, summary: dict[str, Any]) -> list[Section]:
    blocks: list[Any] = []
    for fraction in sorted({min(summary["fractions"]), max(summary["fractions"])}):
        figure = _curves_of(folder, results, summary, fraction)
        if figure is not None:
            blocks.append(figure)
    path = folder / "outputs" / "convergence.csv"
    if path.exists():
        table = read_table(path)
        columns = [name for name in table.columns if name != "seed"]
        rows = _averaged(table, columns)
        headings = [name.replace("_", " ") for name in columns] + ["seeds that reach 99%"]
        blocks.append(
            Table(headings, rows, "Until 95 % and 99 % of the best validation AUROC of the model from scratch with the "
                  "same labels and seed: mean over the seeds that reach it. Seconds are those of training.")
        )  # fmt: skip
    return [Section("Convergence", blocks)] if blocks else []


def _averaged(table: Any, columns: list[str]) -> list[list[object]]:
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in table.rows:
        groups.setdefault((row["arm"], row["fraction"]), []).append(row)
    found = []
    for (arm, fraction), rows in groups.items():
        means: list[object] = []
        for name in columns[2:]:
            values = [float(row[name]) for row in rows if row[name]]
            means.append(float(np.mean(values)) if values else None)
        reached = sum(bool(row["epochs_to_99%"]) for row in rows)
        found.append([arm, float(fraction), *means, f"{reached} of {len(rows)}"])
    return found


def _curves_of(folder: Path, results: Any, summary: dict[str, Any], fraction: float) -> Figure | None:
    bands = {}
    for arm in summary["arms"]:
        cells = [r.cell for r in results if r.cell["arm"] == arm and r.cell["fraction"] == fraction]
        tables = [read_table(folder / "outputs" / "curves" / f"{cell.slug}.csv") for cell in cells]
        columns = [(np.array(table.floats("epoch")), np.array(table.floats("value"))) for table in tables]
        if not columns or len({len(x) for x, _ in columns}) > 1 or len(columns[0][0]) < 2:
            continue
        values = np.stack([y for _, y in columns])
        bands[arm] = Band(columns[0][0], values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    if not bands:
        return None
    name = NAMES[summary["metric"]]
    caption = f"{name} on validation scans while training with {fraction:.0%} of the labels: mean and range of seeds."
    return banded_curves(bands, xlabel="epochs", ylabel=name, caption=caption)


def _reading_section(summary: dict[str, Any]) -> Section:
    budget = (
        "Every fraction had as many steps as all scans have."
        if summary["budget"] == "steps"
        else "Every fraction had as many epochs: few labels mean few steps."
    )
    return Section(
        "How to read this",
        [
            Text(
                [
                    "Both arms are the same model with the same recipe, labels, order and augmentation; one starts "
                    "from pre-trained weights, the other from random ones. Fractions are nested and drawn by subject, "
                    f"and all validation scans select the parameters. {budget}",
                    "An interval over seeds tells how much a repetition differs, not how other patients would. "
                    "Model: TANGERINE, arXiv:2507.01881. For research only, not for diagnosis.",
                ]
            )
        ],
    )

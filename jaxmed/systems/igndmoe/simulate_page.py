"""The report of a simulated cohort, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.report.figures import curves, histograms
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.report.regions import glass_brain
from jaxmed.train.run_folder import read_summary

MOST_CURVES = 10


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record, outputs = read_record(folder / "config.json"), folder / "outputs"
    summary = read_summary(outputs.parent)
    regions, truth = tuple(summary["regions"]), outputs / "truth"
    course, weights = read_table(truth / "course.csv"), read_table(truth / "weights.csv")
    times = np.array(course.floats("stage"))
    states = np.array([course.floats(region) for region in regions])
    chosen = np.unique(np.linspace(0, len(regions) - 1, min(MOST_CURVES, len(regions))).astype(int))
    order = np.argsort(-states[:, len(times) // 2])
    figures = [
        curves(
            {regions[order[i]]: (times, states[order[i]]) for i in chosen},
            xlabel="stage (years)",
            ylabel="true regional amount, 0 to 1",
            caption="The planted course, in regions from early to late ones.",
        ),
        glass_brain(
            {f"stage {times[i]:.0f} years": states[:, i] for i in (len(times) // 3, len(times) - 1)},
            regions,
            None,
            caption="Amounts early and late; regions on a ring, since nothing says where they lie.",
        ),
    ]
    planted = {
        name.replace("_", " "): (np.array(weights.floats("stage")), np.array(weights.floats(name)))
        for name in weights.columns[1:]
    }
    stages = np.array(read_table(truth / "stages.csv").floats("stage"))
    people = [
        histograms({"stage": stages}, units={"stage": "years"}, caption="True stages at the first visit."),
    ]
    mechanism = record["config"]["cohort"]["mechanism"]
    gates = curves(planted, xlabel="stage (years)", ylabel="weight", caption="Planted weights of the mechanisms.")
    sections = [Section("Course", figures)]
    if mechanism == "moe":
        sections.append(Section("Mechanisms", [gates]))
    sections.append(Section("Patients", people))
    if (outputs / "stage_recovery.csv").exists():
        sections.append(_recovery(outputs / "stage_recovery.csv", record["config"]["recovery"]))
    sections.append(_reading(summary))
    write_report(
        folder / "report.html",
        title="A simulated cohort",
        subtitle=f"{summary['subjects']} patients of a disease that starts in {' and '.join(summary['seeds'])}",
        summary=[
            ("Patients", summary["subjects"], "one to four visits each"),
            ("Visits", summary["visits"], "with noise"),
            ("Regions", len(regions), f"{summary['edges']} connections"),
        ],
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _recovery(file: Path, study: dict) -> Section:
    table = read_table(file)
    visits, irregularity = np.array(table.floats("visits")), np.array(table.floats("irregularity"))
    spearman, years = np.array(table.floats("spearman")), np.array(table.floats("years"))
    lowest = table.floats("lowest")
    kinds = np.unique(irregularity)
    # One visit has no gaps, and begins every line.
    rows = {kind: (irregularity == kind) | (visits == 1) for kind in kinds}
    by_kind = {f"irregularity {kind:g}": row for kind, row in rows.items()}
    caption = (
        f"Spearman's correlation of estimated with planted stages, mean of {study['cohorts']} cohorts of this size, "
        f"fitted by {study['fit']['model']['equation']}; gaps between visits are uniform on their mean times 1 plus or "
        "minus the irregularity."
    )
    figures = [
        curves({name: (visits[row], spearman[row]) for name, row in by_kind.items()}, xlabel="visits per patient",
               ylabel="Spearman's correlation", caption=caption),
        curves({name: (visits[row], years[row]) for name, row in by_kind.items()}, xlabel="visits per patient",
               ylabel="error of a stage, years", caption="Mean absolute error of the stage at the first visit."),
    ]  # fmt: skip
    cells = list(
        zip(visits.astype(int).tolist(), irregularity.tolist(), spearman.tolist(), lowest, years.tolist(), strict=True)
    )
    columns = ("Visits", "Irregularity", "Spearman", "Lowest cohort", "Error, years")
    return Section("How well stages are recovered", [*figures, Table(columns, cells, "The same in numbers.")])


def _reading(summary: dict) -> Section:
    text = Text(
        [
            "RUN/outputs holds connectome.csv and visits.csv as jaxmed igndmoe fit takes them, and truth/ with stages, "
            "course and weights.",
            "The disease is an equation, not a patient: it tells whether a fit finds what was planted, not whether "
            "tau spreads this way.",
        ]
    )
    return Section("How to use it", [*(Note(note) for note in summary["notes"]), text])

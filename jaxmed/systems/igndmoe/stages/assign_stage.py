"""Stage `jaxmed igndmoe stage`: where new subjects are on a fitted course."""

import dataclasses

import numpy as np

from jaxmed.config import checked
from jaxmed.io.tables import read_table
from jaxmed.metrics.regional import Scores
from jaxmed.recipes.fitted_course import SubjectFlags, SubjectSource, score, write_stages
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import histograms
from jaxmed.report.page import Note, Section, Text
from jaxmed.systems.igndmoe.cohort_fit import trajectory_inputs
from jaxmed.systems.igndmoe.fitting import stage_subjects
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Stage subjects.

    Attributes:
        source: The fit and the subjects.
    """

    source: SubjectFlags = SubjectSource()


def paper() -> Config:
    """Your subjects on your fit."""
    return Config()


def smoke() -> Config:
    """In seconds: your patients on your fit, or simulated ones on a fit of others."""
    return Config(SubjectSource(synthetic=20))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a staging found.

    Attributes:
        subjects: How many were staged.
        visits: Visits of all of them.
        clipped: Subjects at an end of the course.
        score: Scores of all visits at their stages.
        notes: What a reader should know.
    """

    subjects: int
    visits: int
    clipped: int
    score: Scores
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read, stage, write."""
    clock = Clock()
    fitted, cohort, notes = trajectory_inputs(config.source, folder)
    staged = stage_subjects(fitted.trajectory, cohort.visits, fitted.stages)
    clipped = int(np.asarray(staged.clipped).sum())
    if clipped:
        notes.append(f"{clipped} of {len(cohort.subjects)} subjects lie at an end of the course, or beyond.")
    log = begin(folder, notes)
    write_stages(folder.outputs / "stages.csv", cohort, *staged)
    log.metrics(0, {"subjects": len(cohort.subjects), "clipped": clipped})
    found = score(fitted.trajectory, cohort.visits, np.asarray(staged.onsets), np.ones(len(cohort.subjects), bool))
    visits = int(np.asarray(cohort.visits.present).sum())
    clock.lap("read and stage")
    finish(folder, config, Summary(len(cohort.subjects), visits, clipped, found, tuple(notes)), clock, page)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the stages and how far subjects lie from the course."""
    summary, table = run.summary, read_table(run.outputs / "stages.csv")
    figure = histograms(
        {"stage": np.array(table.floats("stage")), "error": np.array(table.floats("rms_error"))},
        units={"stage": "years", "error": "root mean square, unit of the table"},
        caption="Stages at the first visit, and how far visits lie from the course there.",
        bins=20,
    )
    text = "outputs/stages.csv has a row per subject. A large error says that this subject does not follow the course."
    return Page(
        "Stages on a course of disease",
        "New subjects on a fitted course",
        [
            ("Subjects", summary.subjects, f"{summary.visits} visits"),
            ("R", summary.score["r"], "mean correlation over regions with the course at the stage"),
            ("At an end", summary.clipped, "subjects at the first or last point of the course"),
        ],
        [
            Section("Stages", [figure]),
            Section("How to read it", [*(Note(note) for note in summary.notes), Text([text])]),
        ],
    )

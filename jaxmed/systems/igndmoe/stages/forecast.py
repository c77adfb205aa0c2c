"""Stage `jaxmed igndmoe forecast`: regional values at later ages, and how good such forecasts were."""

import dataclasses

import numpy as np

from jaxmed.arrays.visits import first_visits, later_visits, measured_values
from jaxmed.config import NonNegative, checked
from jaxmed.io.numpy_files import write_npz
from jaxmed.metrics.regional import Scores
from jaxmed.recipes.fitted_course import (
    SubjectFlags,
    SubjectSource,
    predict,
    score,
    score_unchanged,
    write_forecasts,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import agreement
from jaxmed.report.page import Block, Note, Section, Table, Text
from jaxmed.systems.igndmoe.cohort_fit import trajectory_inputs
from jaxmed.systems.igndmoe.fitting import stage_subjects
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Forecast subjects.

    Attributes:
        source: The fit and the subjects.
        horizons: Years after the last visit to forecast.
    """

    source: SubjectFlags = SubjectSource()
    horizons: tuple[NonNegative, ...] = (1.0, 2.0, 5.0)

    def __post_init__(self) -> None:
        if not self.horizons or min(self.horizons) <= 0:
            raise ValueError(f"horizons: expected positive years, found {self.horizons}")


def paper() -> Config:
    """Your subjects on your fit."""
    return Config()


def smoke() -> Config:
    """In seconds: your patients on your fit, or simulated ones on a fit of others."""
    return Config(SubjectSource(synthetic=20))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was forecast, and how good forecasts of known visits were.

    Attributes:
        subjects: How many.
        followed: How many of these were seen more than once.
        scores: Scores of later visits, by what they were predicted from.
        notes: What a reader should know.
    """

    subjects: int
    followed: int
    scores: dict[str, Scores]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read, stage with all visits and with the first alone, forecast, write."""
    clock = Clock()
    fitted, cohort, notes = trajectory_inputs(config.source, folder)
    visits = cohort.visits
    onsets = np.asarray(stage_subjects(fitted.trajectory, visits, fitted.stages).onsets)
    horizons = np.array(config.horizons)
    gaps = np.asarray(visits.gaps).max(axis=1)[:, None] + horizons
    beyond = onsets[:, None] + gaps > float(fitted.trajectory.times[-1])
    if beyond.any():
        leaving = int(beyond.any(axis=1).sum())
        notes.append(f"{leaving} subjects leave the course within the horizons; they stay at its end.")
    several = np.asarray(visits.present).sum(axis=1) > 1
    if not several.any():
        notes.append("Nobody was seen twice: how good forecasts are cannot be told from this table.")
    log = begin(folder, notes)
    write_forecasts(folder.outputs / "forecasts.csv", fitted, cohort, onsets, gaps, horizons, beyond)
    baseline = np.asarray(stage_subjects(fitted.trajectory, first_visits(visits), fitted.stages).onsets)
    # A baseline stage may leave less room than the subject was followed: such visits count at the course's end.
    scores = {
        "staged with the first visit": score(fitted.trajectory, visits, baseline, several, later=True),
        "staged with all visits (not a forecast)": score(fitted.trajectory, visits, onsets, several, later=True),
        "no change since the first visit": score_unchanged(visits, several),
    }
    present = later_visits(visits, several)
    forecast = predict(fitted.trajectory, baseline, np.asarray(visits.gaps))[present]
    write_npz(folder.outputs / "later_visits.npz", {"measured": measured_values(visits)[present], "forecast": forecast})
    log.metrics(0, {"subjects": len(cohort.subjects), "followed": int(several.sum())})
    clock.lap("read, stage and forecast")
    summary = Summary(len(cohort.subjects), int(several.sum()), scores, tuple(notes))
    finish(folder, config, summary, clock, page)


def page(run: Finished[Config, Summary]) -> Page:
    """Show how good forecasts of later visits were."""
    summary = run.summary
    rows = [(name, s["visits"], s["mse"], s["r"], s["r2"]) for name, s in summary.scores.items()]
    caption = (
        "Later visits of subjects seen more than once, values on [0, 1]. Only the first row is a forecast by the "
        "course; the last is what it must beat."
    )
    columns = ("Later visits predicted from", "Visits", "MSE", "R over regions", "R2, median region")
    blocks: list[Block] = [Table(columns, rows, caption)]
    if summary.followed:
        with np.load(run.outputs / "later_visits.npz") as stored:
            is_known = np.isfinite(stored["measured"])
            measured, forecast = stored["measured"][is_known], stored["forecast"][is_known]
        caption = "Regional values at later visits, forecast from the first visit alone."
        blocks.append(agreement({"value": measured}, {"value": forecast}, caption=caption))
    text = "outputs/forecasts.csv has a row per subject and horizon, in the unit of the table."
    first = summary.scores["staged with the first visit"]
    return Page(
        "Forecasts on a course of disease",
        "Subjects followed along a fitted course",
        [
            ("Subjects", summary.subjects, f"{summary.followed} seen more than once"),
            ("Forecast error", first["mse"], "mean squared, values on [0, 1], from the first visit"),
            ("Horizons", ", ".join(f"{h:g}" for h in run.config.horizons), "years after the last visit"),
        ],
        [
            Section("How good", blocks),
            Section("How to read it", [*(Note(note) for note in summary.notes), Text([text])]),
        ],
    )

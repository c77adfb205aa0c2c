"""Stage `jaxmed igndmoe forecast`: regional values at later ages, and how good such forecasts were."""

import dataclasses
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed.arrays.visits import Visits, first_visits
from jaxmed.config import NonNegative, Number, Seed, checked
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.systems.igndmoe.apply import read_inputs
from jaxmed.systems.igndmoe.apply_page import write_forecast_page as write_page
from jaxmed.systems.igndmoe.fitting import stage_program
from jaxmed.systems.igndmoe.measures import measured_values, predictions, score
from jaxmed.systems.igndmoe.results import predict
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, write_summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Forecast subjects.

    Attributes:
        weights: Run folder of `jaxmed igndmoe fit`.
        table: CSV file with a row per visit: subject, age in years, a column for every region of the fit, in its unit.
        horizons: Years after the last visit to forecast.
        embedded: Patients to simulate, with a course fitted to others, where neither is given.
        seed: Of the embedded patients.
    """

    weights: Path | None = None
    table: Path | None = None
    horizons: tuple[NonNegative, ...] = (1.0, 2.0, 5.0)
    embedded: Number | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.horizons or min(self.horizons) <= 0:
            raise ValueError(f"horizons: expected positive years, found {self.horizons}")


def paper() -> Config:
    """Your subjects on your fit."""
    return Config()


def smoke() -> Config:
    """In seconds: your patients on your fit, or simulated ones on a fit of others."""
    return Config(embedded=20)


def run(config: Config, folder: RunFolder) -> None:
    """Read, stage with all visits and with the first alone, forecast, write."""
    began = time.monotonic()
    course, cohort, notes = read_inputs(folder, config.weights, config.table, config.embedded, config.seed)
    log = Log(folder.path, folder.options.quiet)
    program, visits = stage_program(course.stages), cohort.visits
    staged = program(course.trajectory, visits)
    onsets = np.asarray(staged.onsets)
    followed = np.asarray(visits.gaps).max(axis=1)
    horizons = np.array(config.horizons)
    gaps = followed[:, None] + horizons
    beyond = onsets[:, None] + gaps > float(course.trajectory.times[-1])
    if beyond.any():
        leaving = int(beyond.any(axis=1).sum())
        notes.append(f"{leaving} subjects leave the course within the horizons; they stay at its end.")
    values = predict(course, onsets, gaps)
    rows = [
        {"subject": name, "age": float(cohort.ages[i] + gaps[i, j]), "years_ahead": float(horizons[j])}
        | {"beyond_course": int(beyond[i, j])}
        | {region: float(value) for region, value in zip(course.regions, values[i, j], strict=True)}
        for i, name in enumerate(cohort.subjects)
        for j in range(len(horizons))
    ]
    columns = ("subject", "age", "years_ahead", "beyond_course", *course.regions)
    write_table(folder.outputs / "forecasts.csv", columns, rows)
    several = np.asarray(visits.present).sum(axis=1) > 1
    baseline = np.asarray(program(course.trajectory, first_visits(visits)).onsets)
    # A baseline stage may leave less room than the subject was followed: such visits count at the course's end.
    scores = {
        "staged with the first visit": score(course, visits, baseline, several, later=True),
        "staged with all visits (not a forecast)": score(course, visits, onsets, several, later=True),
        "no change since the first visit": _unchanged(visits, several),
    }
    if not several.any():
        notes.append("Nobody was seen twice: how good forecasts are cannot be told from this table.")
    present = np.asarray(visits.present) & several[:, None] & (np.arange(visits.present.shape[1]) > 0)
    forecast = predictions(course, visits, baseline)[present]
    later = {"measured": measured_values(visits)[present], "forecast": forecast}
    write_npz(folder.outputs / "later_visits.npz", later)
    for note in notes:
        log.say(f"Note: {note}")
    summary = {
        "subjects": len(cohort.subjects),
        "followed": int(several.sum()),
        "horizons": list(config.horizons),
        "scores": scores,
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe forecast --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read, stage and forecast": time.monotonic() - began},
    }
    write_summary(folder, summary)
    log.metrics(0, {"subjects": len(cohort.subjects), "followed": int(several.sum())})
    write_page(folder.path)


report = write_page


def _unchanged(visits: Visits, several: np.ndarray) -> dict[str, float | int | None]:
    """Score the forecast that nothing changes, which any model must beat."""
    present = np.asarray(visits.present) & several[:, None] & (np.arange(visits.present.shape[1]) > 0)
    if not present.any():
        return {"sse": None, "r": None, "mse": None, "r2": None, "visits": 0}
    values = measured_values(visits)
    errors = np.square(values - values[:, :1])[present]
    known = np.isfinite(errors)  # regions measured at both visits
    if not known.any():
        return {"sse": None, "r": None, "mse": None, "r2": None, "visits": 0}
    sse = float(errors[known].sum())
    return {"sse": sse, "r": None, "mse": sse / int(known.sum()), "r2": None, "visits": int(present.sum())}

"""Stage `jaxmed igndmoe stage`: where new subjects are on a fitted course."""

import dataclasses
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import Number, Seed, checked
from jaxmed.systems.igndmoe.apply import read_inputs
from jaxmed.systems.igndmoe.apply_page import write_stage_page as write_page
from jaxmed.systems.igndmoe.fitting import stage_program
from jaxmed.systems.igndmoe.measures import score
from jaxmed.systems.igndmoe.results import write_stages
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, write_summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Stage subjects.

    Attributes:
        weights: Run folder of `jaxmed igndmoe fit`.
        table: CSV file with a row per visit: subject, age in years, a column for every region of the fit, in its unit.
        embedded: Patients to simulate, with a course fitted to others, where neither is given.
        seed: Of the embedded patients.
    """

    weights: Path | None = None
    table: Path | None = None
    embedded: Number | None = None
    seed: Seed = 0


def paper() -> Config:
    """Your subjects on your fit."""
    return Config()


def smoke() -> Config:
    """In seconds: your patients on your fit, or simulated ones on a fit of others."""
    return Config(embedded=20)


def run(config: Config, folder: RunFolder) -> None:
    """Read, stage, write."""
    began = time.monotonic()
    course, cohort, notes = read_inputs(folder, config.weights, config.table, config.embedded, config.seed)
    log = Log(folder.path, folder.options.quiet)
    staged = stage_program(course.stages)(course.trajectory, cohort.visits)
    clipped = int(np.asarray(staged.clipped).sum())
    if clipped:
        notes.append(f"{clipped} of {len(cohort.subjects)} subjects lie at an end of the course, or beyond.")
    for note in notes:
        log.say(f"Note: {note}")
    write_stages(folder.outputs / "stages.csv", cohort, staged)
    everyone = np.ones(len(cohort.subjects), bool)
    summary = {
        "subjects": len(cohort.subjects),
        "visits": int(np.asarray(cohort.visits.present).sum()),
        "clipped": clipped,
        "score": score(course, cohort.visits, np.asarray(staged.onsets), everyone),
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe stage --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and stage": time.monotonic() - began},
    }
    write_summary(folder, summary)
    log.metrics(0, {"subjects": len(cohort.subjects), "clipped": clipped})
    write_page(folder.path)


report = write_page

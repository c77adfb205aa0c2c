"""Stage `jaxmed igndmoe fit`: the course of a disease, the stage of every subject, and the weights of mechanisms."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

from jaxmed.config import Size, checked
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import read_table
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.systems.igndmoe.alignment import Alignment
from jaxmed.systems.igndmoe.fit_page import write_page
from jaxmed.systems.igndmoe.fitting import Fit
from jaxmed.systems.igndmoe.job import (
    DataConfig,
    Files,
    Inputs,
    fit_in_folder,
    read_inputs,
    role_weights,
    write_embedded,
)
from jaxmed.systems.igndmoe.measures import measured_values, predictions, score
from jaxmed.systems.igndmoe.options import FitConfig
from jaxmed.systems.igndmoe.reading import read_centroids
from jaxmed.systems.igndmoe.results import Course, write_centroids, write_course, write_stages
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit a course of disease to a cohort.

    Attributes:
        connectome: CSV file: a square matrix with region names, or edges as source, target, weight.
        table: CSV file with a row per visit: subject, age in years, optionally split, a column for every region.
        seeds: Regions where the disease starts, by name; for tau the two entorhinal ones.
        data: How they are read, or embedded data.
        fit: Equation and recipe.
        centroids: CSV file with region, x, y and z (mm, RAS+) for the glass brain of the report; without it regions are
            drawn on a ring.
        starts: Runs from different first weights; the one with the lowest validation error is kept.
    """

    connectome: Path | None = None
    table: Path | None = None
    seeds: tuple[str, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    centroids: Path | None = None
    starts: Size = 3

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise ValueError(f"starts: expected 1 or more, found {self.starts}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded is not None and self.connectome is None and self.table is None


def paper() -> Config:
    """The paper's equation and split, three starts, on your files."""
    return Config()


def laptop() -> Config:
    """A simulated cohort of 100 patients and 20 regions, in minutes."""
    return Config(data=DataConfig(embedded=100, embedded_regions=20), fit=FitConfig(), starts=1)


def smoke() -> Config:
    """A small model, in seconds: your cohort, or a small simulated one."""
    recipe = FitConfig(model=ProgressionConfig(width=8, latent=4), grid_steps=32, stages=64, steps=20, loops=2)
    return Config(data=DataConfig(embedded=40), fit=recipe, starts=1)


def run(config: Config, folder: RunFolder) -> None:
    """Read, fit, write."""
    began = time.monotonic()
    notes: list[str] = []
    files = Files(config.connectome, config.table, config.seeds, config.data.scaling)
    if config.is_synthetic:
        start(folder)
        files = write_embedded(config.data, folder.path / "inputs", config.fit.seed)
    inputs = read_inputs(files, config.data, config.fit, notes)
    centroids = None if config.centroids is None else read_centroids(config.centroids, inputs.connectome.regions)
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    for note in notes:
        log.say(f"Note: {note}")
    runs = np.arange(config.starts) + config.fit.seed
    train = role_weights(inputs.roles, "train", config.starts)
    validation = role_weights(inputs.roles, "validation", config.starts)
    fitted = fit_in_folder(inputs, config.fit, train, validation, runs, folder, log)
    best = int(np.argmin((np.asarray(fitted.errors) * (validation if validation.any() else train)).sum(axis=1)))
    kept = jax.tree.map(lambda leaf: leaf[best], fitted)
    seconds = time.monotonic() - began
    regions = inputs.connectome.regions
    write_course(folder.outputs, kept, inputs.cohort, regions, config.fit.stages)
    staged = Alignment(kept.onsets, kept.errors, kept.clipped)
    write_stages(folder.outputs / "stages.csv", inputs.cohort, staged, inputs.roles)
    write_fitted_visits(folder.outputs / "fitted_visits.npz", config, inputs, kept)
    if centroids is not None:
        write_centroids(folder.outputs / "centroids.csv", regions, centroids)
    export_parameters(folder.outputs / "model", kept.params, {"regions": list(regions)})
    summary = summarise(config, inputs, kept, files, notes) | {
        "best_start": best + 1,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe fit --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read, fit and compile": seconds},
    }
    write_summary(folder, summary)
    write_page(folder.path)


report = write_page


def write_fitted_visits(path: Path, config: Config, inputs: Inputs, kept: Fit) -> None:
    """Write measured and predicted values of all visits of each role, (visit, region) on [0, 1]; NaN: not measured."""
    course = Course(kept.course, inputs.connectome.regions, (0.0, 1.0), config.fit.stages)
    visits = inputs.cohort.visits
    predicted, present = predictions(course, visits, np.asarray(kept.onsets)), np.asarray(visits.present)
    arrays = {}
    for role in sorted(set(inputs.roles)):
        chosen = present & np.array([found == role for found in inputs.roles])[:, None]
        arrays |= {f"{role}_measured": measured_values(visits)[chosen], f"{role}_predicted": predicted[chosen]}
    write_npz(path, arrays)


def summarise(config: Config, inputs: Inputs, kept: Fit, files: Files, notes: list[str]) -> dict[str, Any]:
    """Collect the numbers of the report."""
    cohort, course = inputs.cohort, Course(kept.course, inputs.connectome.regions, (0.0, 1.0), config.fit.stages)
    scores = {}
    for role in ("train", "validation", "test"):
        chosen = np.array([found == role for found in inputs.roles])
        if chosen.any():
            scores[role] = score(course, cohort.visits, np.asarray(kept.onsets), chosen)
    clipped = int(np.asarray(kept.clipped).sum())
    if clipped:
        text = f"{clipped} of {len(cohort.subjects)} subjects were staged at an end of the course; "
        notes = [*notes, text + "their true stage may lie beyond, and the fit is worse for it."]
    recovery = None
    if files.truth is not None:
        truth = np.array(read_table(files.truth / "stages.csv").floats("stage"))
        recovery = float(scipy.stats.spearmanr(truth, kept.onsets)[0])  # pyright: ignore[reportArgumentType]
    return {
        "equation": config.fit.model.equation,
        "regions": list(inputs.connectome.regions),
        "seeds": [inputs.connectome.regions[index] for index in inputs.seeds],
        "subjects": len(cohort.subjects),
        "visits": int(np.asarray(cohort.visits.present).sum()),
        "scale": [cohort.low, cohort.high],
        "rounds": int(kept.rounds),
        "clipped": clipped,
        "scores": scores,
        "stage_recovery_spearman": recovery,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(kept.params)),
        "notes": notes,
    }

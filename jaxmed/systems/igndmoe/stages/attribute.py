"""Stage `jaxmed igndmoe attribute`: which mechanism drives which stage, with bands, and what leaving one out costs."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.config import Size, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.models.graph_diffusion import EXPERTS
from jaxmed.systems.igndmoe.attribute_page import write_page
from jaxmed.systems.igndmoe.attribution import ablations, bands, contributions, draw_weights
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
from jaxmed.systems.igndmoe.measures import score
from jaxmed.systems.igndmoe.options import ATTRIBUTION, FitConfig
from jaxmed.systems.igndmoe.results import Course
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Attribute a course to mechanisms.

    Attributes:
        connectome: CSV file: a square matrix with region names, or edges as source, target, weight.
        table: CSV file with a row per visit: subject, age in years, optionally split, a column for every region.
        seeds: Regions where the disease starts, by name; for tau the two entorhinal ones.
        data: How they are read, or embedded data.
        fit: Mixture and recipe; by default one whose weights can be read, see `options.ATTRIBUTION`.
        draws: Bootstrap draws of training subjects; each is a fit of its own, from its own first weights.
        ablate: Fit the mixture with each part left out too.
    """

    connectome: Path | None = None
    table: Path | None = None
    seeds: tuple[str, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    fit: FitConfig = dataclasses.field(default_factory=lambda: ATTRIBUTION)
    draws: Size = 50
    ablate: bool = True

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(f"draws: expected 2 or more, found {self.draws}")
        if self.fit.model.equation != "igndmoe":
            raise ValueError(f"fit.model.equation: expected igndmoe, found {self.fit.model.equation}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded is not None and self.connectome is None and self.table is None


def paper() -> Config:
    """The paper's experts, fifty draws of your cohort, and every part left out."""
    return Config(fit=FitConfig())


def laptop() -> Config:
    """Ten draws of a simulated cohort, in minutes."""
    return Config(data=DataConfig(embedded=100, embedded_regions=20), draws=10)


def smoke() -> Config:
    """Two draws of a small simulated cohort, in seconds."""
    recipe = dataclasses.replace(ATTRIBUTION, stages=64, steps=20, loops=1)
    return Config(data=DataConfig(embedded=40), fit=recipe, draws=2, ablate=False)


def run(config: Config, folder: RunFolder) -> None:
    """Fit the cohort, its draws and its ablations; write weights, contributions and stages with bands."""
    began, notes = time.monotonic(), []
    files = Files(config.connectome, config.table, config.seeds, config.data.scaling)
    if config.is_synthetic:
        start(folder)
        files = write_embedded(config.data, folder.path / "inputs", config.fit.seed)
    inputs = read_inputs(files, config.data, config.fit, notes)
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    for note in notes:
        log.say(f"Note: {note}")
    train = draw_weights(jax.random.key(config.fit.seed), role_weights(inputs.roles, "train")[0], config.draws)
    validation = role_weights(inputs.roles, "validation", config.draws + 1)
    numbers = config.fit.seed + np.arange(config.draws + 1)
    fitted = fit_in_folder(inputs, config.fit, train, validation, numbers, folder, log, "bootstrap")
    _write_bands(folder, inputs, fitted)
    costs = {"complete": _held_out(inputs, fitted, config.fit)}
    if config.ablate:
        for name, model in ablations(config.fit.model).items():
            if name == "complete":
                continue
            recipe = dataclasses.replace(config.fit, model=model)
            alone = fit_in_folder(
                inputs, recipe, train[:1], validation[:1], numbers[:1], folder, log, name.replace(" ", "_")
            )
            costs[name] = _held_out(inputs, alone, recipe)
    share = contributions(fitted)[1:]
    slope = share[:, -1] - share[:, 0]
    summary: dict[str, Any] = {
        "subjects": len(inputs.cohort.subjects),
        "regions": list(inputs.connectome.regions),
        "draws": config.draws,
        "ablations": costs,
        "falls": {name: float(np.mean(slope[:, i] < 0)) for i, name in enumerate(EXPERTS)},
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed igndmoe attribute --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read, fit and compile": time.monotonic() - began},
    }
    write_summary(folder, summary)
    write_page(folder.path)


report = write_page


def _held_out(inputs: Inputs, fitted: Fit, config: FitConfig) -> dict[str, float | int | None]:
    """Score the first run on test subjects, or on validation subjects where there are none."""
    role = "test" if "test" in inputs.roles else "validation"
    chosen = np.array([found == role for found in inputs.roles])
    if not chosen.any():
        raise InputError("data.fractions", "test or validation subjects", "none", "give them a share")
    course = Course(jax.tree.map(lambda leaf: leaf[0], fitted.course), (), (0.0, 1.0), config.stages)
    return score(course, inputs.cohort.visits, np.asarray(fitted.onsets[0]), chosen)


def _write_bands(folder: RunFolder, inputs: Inputs, fitted: Fit) -> None:
    times = np.asarray(fitted.course.times)[0]
    for name, values in (("weights", np.asarray(fitted.weights, float)), ("contributions", contributions(fitted))):
        found, rows = bands(values[1:]), []
        for t, stage in enumerate(times):
            row = {"stage": float(stage)}
            for i, expert in enumerate(EXPERTS):
                key = expert.replace(" ", "_")
                row |= {key: float(values[0, t, i]), f"{key}_median": float(found.middle[t, i])}
                row |= {f"{key}_low": float(found.low[t, i]), f"{key}_high": float(found.high[t, i])}
            rows.append(row)
        write_table(folder.outputs / f"{name}.csv", tuple(rows[0]), rows)
    found = bands(np.asarray(fitted.onsets, float)[1:])
    onsets = np.asarray(fitted.onsets)[0]
    rows = [
        {"subject": name, "stage": float(onsets[i]), "low": float(found.low[i]), "high": float(found.high[i])}
        for i, name in enumerate(inputs.cohort.subjects)
    ]
    write_table(folder.outputs / "stages.csv", ("subject", "stage", "low", "high"), rows)

"""Stage `jaxmed igndmoe attribute`: which mechanism drives which stage, with bands, and what leaving one out costs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from jaxmed.config import Bounds, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_columns
from jaxmed.metrics.bands import bands, draw_weights
from jaxmed.metrics.regional import Scores
from jaxmed.models.graph_diffusion import EXPERTS
from jaxmed.recipes.fitted_course import score
from jaxmed.recipes.regional import CohortSource, RegionalCohort, SourceFlags, in_role, role_weights, synthetic
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import histograms
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.regions import stage_curves
from jaxmed.systems.igndmoe.cohort_fit import fit_in_folder, read_inputs
from jaxmed.systems.igndmoe.comparing import ATTRIBUTION, ablations, contributions
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import Fit
from jaxmed.train.run_folder import RunFolder

FEWER = 4
"""Every fourth point of a curve is drawn: its marks would touch otherwise."""
KEYS = [name.replace(" ", "_") for name in EXPERTS]


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Attribute a course to mechanisms.

    Attributes:
        source: The cohort.
        fit: Mixture and recipe; by default one whose weights can be read, see `comparing.ATTRIBUTION`.
        draws: Bootstrap draws of training subjects; each is a fit of its own, from its own first weights.
        ablate: Fit the mixture with each part left out too.
    """

    source: SourceFlags = dataclasses.field(default_factory=CohortSource)
    fit: FitConfig = dataclasses.field(default_factory=lambda: ATTRIBUTION)
    draws: Annotated[int, Bounds(2, 65_536)] = 50
    ablate: bool = True

    def __post_init__(self) -> None:
        if self.fit.model.equation != "igndmoe":
            raise ValueError(f"fit.model.equation: expected igndmoe, found {self.fit.model.equation}")


def paper() -> Config:
    """The paper's experts, fifty draws of your cohort, and every part left out."""
    return Config(fit=FitConfig())


def laptop() -> Config:
    """Ten draws of a simulated cohort, in minutes."""
    return Config(synthetic(100, 20), draws=10)


def smoke() -> Config:
    """Two draws of a small simulated cohort, in seconds."""
    return Config(synthetic(40), dataclasses.replace(ATTRIBUTION, stages=64, steps=20, loops=1), draws=2, ablate=False)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What drives which stage.

    Attributes:
        subjects: Number of subjects, of all roles.
        regions: Names.
        draws: Bootstrap draws of training subjects.
        ablations: Scores of held-out subjects, of the mixture and without each part.
        falls: Share of draws in which a mechanism contributes less late than early.
        notes: What a reader should know.
    """

    subjects: int
    regions: tuple[str, ...]
    draws: int
    ablations: dict[str, Scores]
    falls: dict[str, float]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Fit the cohort, its draws and its ablations; write weights, contributions and stages with bands."""
    clock, notes = Clock(), []
    inputs = read_inputs(config.source, config.fit, folder, notes)
    log = begin(folder, notes)
    train = draw_weights(jax.random.key(config.fit.seed), role_weights(inputs.roles, "train")[0], config.draws)
    validation = role_weights(inputs.roles, "validation", config.draws + 1)
    numbers = config.fit.seed + np.arange(config.draws + 1)
    fitted = fit_in_folder(inputs, config.fit, train, validation, numbers, folder, log, "bootstrap")
    _write_bands(folder.outputs, inputs, fitted)
    costs = {"complete": _held_out(inputs, fitted)}
    for name, model in list(ablations(config.fit.model).items())[1:] if config.ablate else ():
        recipe, part = dataclasses.replace(config.fit, model=model), name.replace(" ", "_")
        alone = fit_in_folder(inputs, recipe, train[:1], validation[:1], numbers[:1], folder, log, part)
        costs[name] = _held_out(inputs, alone)
    share = contributions(fitted)[1:]
    slope = share[:, -1] - share[:, 0]
    falls = {name: float(np.mean(slope[:, i] < 0)) for i, name in enumerate(EXPERTS)}
    clock.lap("read, fit and compile")
    summary = Summary(len(inputs.cohort.subjects), inputs.regions, config.draws, costs, falls, tuple(notes))
    finish(folder, config, summary, clock, page)


def _held_out(inputs: RegionalCohort, fitted: Fit) -> Scores:
    """Score the first run on test subjects, or on validation subjects where there are none."""
    chosen = in_role(inputs.roles, "test" if "test" in inputs.roles else "validation")
    if not chosen.any():
        raise InputError("data.fractions", "test or validation subjects", "none", "give them a share")
    first = jax.tree.map(lambda leaf: leaf[0], fitted.trajectory)
    return score(first, inputs.cohort.visits, np.asarray(fitted.onsets[0]), chosen)


def _write_bands(outputs: Path, inputs: RegionalCohort, fitted: Fit) -> None:
    for name, values in (("weights", np.asarray(fitted.weights, float)), ("contributions", contributions(fitted))):
        (middle, low, high), columns = bands(values[1:]), {"stage": np.asarray(fitted.trajectory.times)[0]}
        for i, key in enumerate(KEYS):
            columns |= {key: values[0, :, i], f"{key}_median": middle[:, i]}
            columns |= {f"{key}_low": low[:, i], f"{key}_high": high[:, i]}
        write_columns(outputs / f"{name}.csv", columns)
    onsets = np.asarray(fitted.onsets, float)
    _, low, high = bands(onsets[1:])
    columns = {"subject": inputs.cohort.subjects, "stage": onsets[0], "low": low, "high": high}
    write_columns(outputs / "stages.csv", columns)


def page(run: Finished[Config, Summary]) -> Page:
    """Show mechanisms over stage, what each one left out costs, and how sure stages are."""
    summary, outputs = run.summary, run.outputs
    told = f"of {summary.draws} draws: its share late below early"
    tiles = [(f"{name.capitalize()} falls", f"{100 * share:.0f}%", told) for name, share in summary.falls.items()]
    stages = read_table(outputs / "stages.csv")
    uncertain = histograms(
        {"width of a stage's band": np.array(stages.floats("high")) - np.array(stages.floats("low"))},
        units={"width of a stage's band": "years"},
        caption="How far a subject's stage moves over draws of the cohort.",
        bins=20,
    )
    bands = "Lines are medians over draws, bands 90%."
    words = {
        "contributions": ("share of the change", f"What moves an average region: weight x size. {bands}"),
        "weights": ("weight", f"Weights alone. {bands}"),
    }
    curves = [
        stage_curves(outputs / f"{file}.csv", dict(zip(EXPERTS, KEYS, strict=True)), *told, every=FEWER)
        for file, told in words.items()
    ]
    rows = [(name, s["sse"], s["mse"], s["r"], s["visits"]) for name, s in summary.ablations.items()]
    table = Table(("Model", "SSE", "MSE", "R over regions", "Visits"), rows, "Held-out subjects, values on [0, 1].")
    text = Text(
        [
            "Bands are the 5th to 95th percentile over draws of the training subjects, each fitted anew from its own "
            "first weights, so they hold the uncertainty of subjects and of the optimisation.",
            "Weights are not contributions: a network can grow while its weight shrinks. Only differences that a part "
            "left out makes on held-out subjects say that this part is needed.",
        ]
    )
    sections = [
        Section("Mechanisms", curves),
        Section("Left out", [table]),
        Section("Stages", [uncertain]),
        Section("How to read it", [*(Note(note) for note in summary.notes), text]),
    ]
    subtitle = f"{summary.subjects} subjects, {summary.draws} bootstrap draws"
    return Page("Mechanisms over stage", subtitle, tiles, sections)

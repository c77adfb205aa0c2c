"""Stage `jaxmed igndmoe fit`: the course of a disease, the stage of every subject, and the weights of mechanisms."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import scipy.stats

from jaxmed.config import Size, checked
from jaxmed.data.connectomes import read_centroids
from jaxmed.io.tables import read_table, write_columns
from jaxmed.metrics.regional import Scores
from jaxmed.models.graph_diffusion import EXPERTS, ProgressionConfig
from jaxmed.recipes.fitted_course import (
    FittedTrajectory,
    scores_section,
    write_fitted_visits,
    write_stages,
    write_trajectory,
)
from jaxmed.recipes.regional import CohortSource, RegionalCohort, SourceFlags, role_weights, synthetic
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import curves, histograms
from jaxmed.report.page import Note, Section, Text, Tile
from jaxmed.report.regions import course_figures, stage_curves
from jaxmed.systems.igndmoe.cohort_fit import fit_in_folder, read_inputs
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import Fit
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics, series
from jaxmed.train.run_folder import RunFolder

LEADING = {"igndmoe": "a mixture of three mechanisms", "fkpp": "diffusion and growth", "ndm": "network diffusion"}


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit a course of disease to a cohort.

    Attributes:
        source: The cohort.
        fit: Equation and recipe.
        centroids: CSV file with region, x, y and z (mm, RAS+) for the glass brain of the report; without it regions are
            drawn on a ring.
        starts: Runs from different first weights; the one with the lowest validation error is kept.
    """

    source: SourceFlags = dataclasses.field(default_factory=CohortSource)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    centroids: Path | None = None
    starts: Size = 3


def paper() -> Config:
    """The paper's equation and split, three starts, on your files."""
    return Config()


def laptop() -> Config:
    """A simulated cohort of 100 patients and 20 regions, in minutes."""
    return Config(synthetic(100, 20), starts=1)


def smoke() -> Config:
    """A small model, in seconds: your cohort, or a small simulated one."""
    recipe = FitConfig(model=ProgressionConfig(width=8, latent=4), grid_steps=32, stages=64, steps=20, loops=2)
    return Config(synthetic(40), recipe, starts=1)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a fit found.

    Attributes:
        equation: Its name.
        regions: Names.
        seeds: Names of those where the disease starts.
        subjects: Number of subjects, of all roles.
        visits: Visits of all of them.
        scale: Measurements at 0 and 1.
        rounds: Rounds of training and staging.
        clipped: Subjects at an end of the course.
        scores: By role.
        stage_recovery_spearman: Against the planted stages of a simulated cohort.
        parameters: Fitted numbers.
        best_start: Number of the start that was kept, from 1.
        notes: What a reader should know.
    """

    equation: str
    regions: tuple[str, ...]
    seeds: tuple[str, ...]
    subjects: int
    visits: int
    scale: tuple[float, float]
    rounds: int
    clipped: int
    scores: dict[str, Scores]
    stage_recovery_spearman: float | None
    parameters: int
    best_start: int
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read, fit, write."""
    clock, notes = Clock(), []
    inputs = read_inputs(config.source, config.fit, folder, notes)
    centroids = None if config.centroids is None else read_centroids(config.centroids, inputs.regions)
    log = begin(folder, notes)
    train = role_weights(inputs.roles, "train", config.starts)
    validation = role_weights(inputs.roles, "validation", config.starts)
    starts = np.arange(config.starts) + config.fit.seed
    fitted = fit_in_folder(inputs, config.fit, train, validation, starts, folder, log)
    best = int(np.argmin((np.asarray(fitted.errors) * (validation if validation.any() else train)).sum(axis=1)))
    kept = jax.tree.map(lambda leaf: leaf[best], fitted)
    clock.lap("read, fit and compile")
    scale = (inputs.cohort.low, inputs.cohort.high)
    write_trajectory(folder.outputs, FittedTrajectory(kept.trajectory, inputs.regions, scale, config.fit.stages))
    if config.fit.model.equation == "igndmoe":
        _write_mechanisms(folder.outputs / "weights.csv", kept)
    staged = kept.onsets, kept.errors, kept.clipped
    write_stages(folder.outputs / "stages.csv", inputs.cohort, *staged, inputs.roles)
    visits = folder.outputs / "fitted_visits.npz"
    scores = write_fitted_visits(visits, kept.trajectory, inputs, np.asarray(kept.onsets))
    if centroids is not None:
        x, y, z = centroids.T
        write_columns(folder.outputs / "centroids.csv", {"region": inputs.regions, "x": x, "y": y, "z": z})
    export_parameters(folder.outputs / "model", kept.params, {"regions": list(inputs.regions)})
    finish(folder, config, _summarise(config, inputs, kept, scores, best, notes), clock, page)


def _write_mechanisms(path: Path, kept: Fit) -> None:
    """Write the weight of each expert over stage, and the root mean square over regions of its rate as it counts."""
    weights, columns = np.asarray(kept.weights), {"stage": kept.trajectory.times}
    rates = np.sqrt(np.mean((weights[..., None] * np.asarray(kept.experts)) ** 2, axis=-1))
    for ending, values in (("", weights), ("_rate", rates)):
        columns |= {name.replace(" ", "_") + ending: values[:, i] for i, name in enumerate(EXPERTS)}
    write_columns(path, columns)


def _summarise(
    config: Config, inputs: RegionalCohort, kept: Fit, scores: dict[str, Scores], best: int, notes: list[str]
) -> Summary:
    cohort, clipped = inputs.cohort, int(np.asarray(kept.clipped).sum())
    if clipped:
        text = f"{clipped} of {len(cohort.subjects)} subjects were staged at an end of the course; "
        notes = [*notes, text + "their true stage may lie beyond, and the fit is worse for it."]
    still = ~np.asarray(kept.trajectory.slopes).any(axis=1)
    if config.fit.ode.has_event and still.any():
        notes = [*notes, f"The course was stopped at stage {float(kept.trajectory.times[still.argmax()]):.1f} years."]
    recovery = None
    if inputs.truth is not None:
        truth = np.array(read_table(inputs.truth / "stages.csv").floats("stage"))
        recovery = float(scipy.stats.spearmanr(truth, kept.onsets)[0])  # pyright: ignore[reportArgumentType]
    return Summary(
        equation=config.fit.model.equation,
        regions=inputs.regions,
        seeds=tuple(inputs.regions[index] for index in inputs.seeds),
        subjects=len(cohort.subjects),
        visits=int(np.asarray(cohort.visits.present).sum()),
        scale=(cohort.low, cohort.high),
        rounds=int(kept.rounds),
        clipped=clipped,
        scores=scores,
        stage_recovery_spearman=recovery,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(kept.params)),
        best_start=best + 1,
        notes=tuple(notes),
    )


def page(run: Finished[Config, Summary]) -> Page:
    """Show the course, the mechanisms, the stages and how well they fit."""
    summary, outputs = run.summary, run.outputs
    said = "test" if "test" in summary.scores else "train"
    found = summary.scores[said]
    tiles: list[Tile] = [
        ("Subjects", summary.subjects, f"{summary.visits} visits, {len(summary.regions)} regions"),
        ("R", found["r"], f"mean correlation over regions, {said} subjects, staged with all their visits"),
        ("SSE", found["sse"], f"over {found['visits']} visits of {said} subjects, values on [0, 1]"),
        ("At an end", summary.clipped, "subjects staged at the first or last point of the course"),
    ]
    if summary.stage_recovery_spearman is not None:
        tiles.append(("Stage recovery", summary.stage_recovery_spearman, "Spearman, against planted stages"))
    words = {"ylabel": "regional amount, in the unit of the table", "caption": "The fitted course"}
    sections = [Section("Course", course_figures(outputs / "course.csv", **words))]
    if (outputs / "weights.csv").exists():
        sections.append(_weights_section(outputs))
    table = read_table(outputs / "stages.csv")
    stages, roles = np.array(table.floats("stage")), np.array(table.column("role"))
    by_role = {role: stages[roles == role] for role in summary.scores}
    units = dict.fromkeys(by_role, "years")
    lines = read_metrics(run.path)
    errors = {"training": series(lines, "fit/train_mse"), "validation": series(lines, "fit/validation_mse")}
    sections += [
        Section("Stages", [histograms(by_role, units=units, caption="Stage at the first visit, by role.", bins=20)]),
        scores_section(outputs / "fitted_visits.npz", summary.scores),
        Section("Optimisation", [
            curves(errors, xlabel="round of training and staging", ylabel="mean squared error per visit and region",
                   caption="Dual optimisation: each round trains at fixed stages, then stages all subjects."),
        ]),
        Section("How to read it", [
            *(Note(note) for note in summary.notes),
            Text([
                "outputs/course.csv holds the course, stages.csv the stage of every subject, weights.csv the "
                "mechanisms; course.npz and model.json are what jaxmed igndmoe stage and forecast read.",
                "Years of stage are anchored by subjects seen more than once. Where the course is steep, stages are "
                "sharp; where it is flat, they are not.",
            ]),
        ]),
    ]  # fmt: skip
    subtitle = (
        f"{LEADING.get(summary.equation, summary.equation)} on a connectome of {len(summary.regions)} regions, "
        f"from {' and '.join(summary.seeds)}"
    )
    return Page("The course of a disease", subtitle, tiles, sections)


def _weights_section(outputs: Path) -> Section:
    columns = {ending: {name: name.replace(" ", "_") + ending for name in EXPERTS} for ending in ("", "_rate")}
    weights = stage_curves(
        outputs / "weights.csv",
        columns[""],
        "weight",
        "Weights of the mechanisms over stage. They sum to 1; a weight times its mechanism's own size counts.",
    )
    rates = stage_curves(
        outputs / "weights.csv",
        columns["_rate"],
        "weight x mechanism per year, RMS over regions",
        "What each mechanism adds to the change of an average region.",
    )
    note = Note(
        "Experts are not identifiable from one fit: a weight can shrink while its network grows. jaxmed igndmoe "
        "attribute gives bands over subjects and starts, and what leaving one out costs."
    )
    return Section("Mechanisms", [weights, rates, note])

"""Stage `jaxmed igndmoe fit`: the course of a disease, the stage of every subject, and the weights of mechanisms."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import scipy.stats

from jaxmed.config import Size, checked
from jaxmed.data.connectomes import read_centroids
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.regional import Scores
from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import agreement, curves, histograms
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.report.regions import glass_brain
from jaxmed.systems.igndmoe.alignment import Alignment
from jaxmed.systems.igndmoe.cohort_fit import (
    CohortSource,
    FittedTrajectory,
    Inputs,
    SourceFlags,
    fit_in_folder,
    in_role,
    measured_values,
    predict,
    read_inputs,
    read_trajectory,
    role_weights,
    score,
    synthetic,
    write_stages,
    write_trajectory,
)
from jaxmed.systems.igndmoe.dual import FitConfig
from jaxmed.systems.igndmoe.fitting import Fit
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import RunFolder

MOST_CURVES = 8
LEADING = {"igndmoe": "a mixture of three mechanisms", "fkpp": "diffusion and growth", "ndm": "network diffusion"}
ROLES = ("train", "validation", "test")


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
        subjects: Of all roles.
        visits: Of all of them.
        scale: Measurements at 0 and 1.
        rounds: Of training and staging.
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
    write_trajectory(folder.outputs, kept, inputs.cohort, inputs.regions, config.fit.stages)
    staged = Alignment(kept.onsets, kept.errors, kept.clipped)
    write_stages(folder.outputs / "stages.csv", inputs.cohort, staged, inputs.roles)
    scores = _write_fitted_visits(folder.outputs / "fitted_visits.npz", config, inputs, kept)
    if centroids is not None:
        rows = [
            {"region": name, **dict(zip("xyz", map(float, point), strict=True))}
            for name, point in zip(inputs.regions, centroids, strict=True)
        ]
        write_table(folder.outputs / "centroids.csv", ("region", "x", "y", "z"), rows)
    export_parameters(folder.outputs / "model", kept.params, {"regions": list(inputs.regions)})
    finish(folder, config, _summarise(config, inputs, kept, scores, best, notes), clock, page)


def _write_fitted_visits(path: Path, config: Config, inputs: Inputs, kept: Fit) -> dict[str, Scores]:
    """Score visits by role; write what was measured, NaN where nothing was, and predicted, (visit, region)."""
    fitted = FittedTrajectory(kept.trajectory, inputs.regions, stages=config.fit.stages)
    visits, onsets = inputs.cohort.visits, np.asarray(kept.onsets)
    predicted, measured = predict(fitted, onsets, np.asarray(visits.gaps)), measured_values(visits)
    arrays, scores = {}, {}
    for role in (role for role in ROLES if role in inputs.roles):
        people = in_role(inputs.roles, role)
        chosen = np.asarray(visits.present) & people[:, None]
        arrays |= {f"{role}_measured": measured[chosen], f"{role}_predicted": predicted[chosen]}
        scores[role] = score(fitted, visits, onsets, people)
    write_npz(path, dict(sorted(arrays.items())))
    return scores


def _summarise(
    config: Config, inputs: Inputs, kept: Fit, scores: dict[str, Scores], best: int, notes: list[str]
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
    sections = [_course_section(outputs)]
    if (outputs / "weights.csv").exists():
        sections.append(_weights_section(outputs))
    sections += [_stages_section(outputs), _scores_section(outputs, summary.scores)]
    sections += [_rounds_section(run.path), _reading_section(summary)]
    subtitle = (
        f"{LEADING.get(summary.equation, summary.equation)} on a connectome of {len(summary.regions)} regions, "
        f"from {' and '.join(summary.seeds)}"
    )
    return Page("The course of a disease", subtitle, tiles, sections)


def _course_section(outputs: Path) -> Section:
    fitted = read_trajectory(outputs)
    times, states = np.asarray(fitted.trajectory.times), np.asarray(fitted.trajectory.states)
    low, high = fitted.scale
    measured, regions = low + (high - low) * states, fitted.regions
    # From those that change first to those that change last.
    order = np.argsort(-states[len(times) // 2])
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(MOST_CURVES, len(order))).astype(int))]
    lines = curves(
        {regions[index]: (times, measured[:, index]) for index in chosen},
        xlabel="stage (years)",
        ylabel="regional amount, in the unit of the table",
        caption="The fitted course in regions from early to late ones.",
    )
    maps = {f"stage {times[i]:.0f} years": measured[i] for i in (len(times) // 3, 2 * len(times) // 3, len(times) - 1)}
    centroids = outputs / "centroids.csv"
    points = None
    if centroids.exists():
        table = read_table(centroids, ("region", "x", "y", "z"))
        points = np.array([table.floats(axis) for axis in "xyz"]).T
    told = "" if points is not None else " Regions stand on a ring: no centroids were given."
    brain = glass_brain(maps, regions, points, caption=f"The fitted course at three stages.{told}")
    return Section("Course", [lines, brain])


def _weights_section(outputs: Path) -> Section:
    table = read_table(outputs / "weights.csv")
    stage = np.array(table.floats("stage"))
    names = [name for name in table.columns if name != "stage" and not name.endswith("_rate")]
    weights = curves(
        {name.replace("_", " "): (stage, np.array(table.floats(name))) for name in names},
        xlabel="stage (years)",
        ylabel="weight",
        caption="Weights of the mechanisms over stage. They sum to 1; a weight times its mechanism's own size counts.",
    )
    rates = curves(
        {name.replace("_", " "): (stage, np.array(table.floats(f"{name}_rate"))) for name in names},
        xlabel="stage (years)",
        ylabel="root mean square over regions of weight x mechanism, per year",
        caption="What each mechanism adds to the change of an average region.",
    )
    note = Note(
        "Experts are not identifiable from one fit: a weight can shrink while its network grows. jaxmed igndmoe "
        "attribute gives bands over subjects and starts, and what leaving one out costs."
    )
    return Section("Mechanisms", [weights, rates, note])


def _stages_section(outputs: Path) -> Section:
    table = read_table(outputs / "stages.csv")
    stages, roles = np.array(table.floats("stage")), np.array(table.column("role"))
    values = {role: stages[roles == role] for role in ROLES if (roles == role).any()}
    figure = histograms(
        values,
        units=dict.fromkeys(values, "years"),
        caption="Stage at the first visit, by role.",
        bins=20,
    )
    return Section("Stages", [figure])


def _scores_section(outputs: Path, scores: dict[str, Scores]) -> Section:
    rows = [(role, s["visits"], s["sse"], s["mse"], s["r"], s["r2"]) for role, s in scores.items()]
    table = Table(
        ("Subjects", "Visits", "SSE", "MSE", "R over regions", "R2, median region"),
        rows,
        "Values on [0, 1]; every subject staged with all of its visits, as the paper does, so this is fit after a "
        "shift in time and not a forecast.",
    )
    with np.load(outputs / "fitted_visits.npz") as stored:
        roles = [role for role in scores if f"{role}_measured" in stored]
        known = {role: np.isfinite(stored[f"{role}_measured"]) for role in roles}
        figure = agreement(
            {role: stored[f"{role}_measured"][known[role]] for role in roles},
            {role: stored[f"{role}_predicted"][known[role]] for role in roles},
            caption="Regional values, observed (across) against predicted by the course at the subject's stage (up).",
        )
    return Section("Errors", [table, figure])


def _rounds_section(folder: Path) -> Section:
    lines = read_metrics(folder)
    steps = np.array([line["step"] for line in lines])
    shown = {
        label: (steps, np.array([line.get(f"fit/{key}", np.nan) for line in lines]))
        for label, key in (("training", "train_mse"), ("validation", "validation_mse"))
    }
    figure = curves(
        shown,
        xlabel="round of training and staging",
        ylabel="mean squared error per visit and region",
        caption="Dual optimisation: each round trains at fixed stages, then stages all subjects.",
    )
    return Section("Optimisation", [figure])


def _reading_section(summary: Summary) -> Section:
    text = Text(
        [
            "outputs/course.csv holds the course, stages.csv the stage of every subject, weights.csv the mechanisms; "
            "course.npz and model.json are what jaxmed igndmoe stage and forecast read.",
            "Years of stage are anchored by subjects seen more than once. Where the course is steep, stages are sharp; "
            "where it is flat, they are not.",
        ]
    )
    return Section("How to read it", [*(Note(note) for note in summary.notes), text])

"""Stage `jaxmed mupm transfer`: coefficients fitted on some cases predict the variances of others, without a refit."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Bounds, Seed, checked
from jaxmed.data.cohort import parse_externals
from jaxmed.data.splits import assign_folds, shared_subjects
from jaxmed.errors import InputError, listed, nearest
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.cohort import error_statistics
from jaxmed.metrics.statistics import bootstrap_all, spearman
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import Bar, bars
from jaxmed.report.heatmap import heat_maps
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.systems.mupm.answers import (
    AnswerConfig,
    Answers,
    given_or_planted,
    measured_cases,
    read_answers,
    require_decided,
    variances_of,
)
from jaxmed.systems.mupm.branches import Variances
from jaxmed.systems.mupm.regression import (
    PREDICTORS,
    FitConfig,
    coefficient_intervals,
    fit,
    held_out,
    make_design,
    predict,
    score,
)
from jaxmed.train.run_folder import RunFolder

FOLDS = 5
WHOLE = "table"
COLUMNS = ("fitted_on", "scored_on", "cases", "r2", "r2_low", "r2_high", "r2_case", "mae", "mse", "spearman")


@dataclasses.dataclass(frozen=True)
@checked
class TransferData(AnswerConfig):
    """How tables of answers are read.

    Attributes:
        external: Further tables, scored and never fitted to, as NAME=CSV; options and tasks may be others.
    """

    external: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit on one set of cases, score on the others.

    Attributes:
        table: CSV of answers; `jaxmed mupm` says which columns.
        by: Column of the table whose values are the sets, such as a diagnosis, a task or a strength of perturbation;
            without it the whole table is fitted to and the external tables are scored.
        data: How tables are read, and external ones.
        fit: How coefficients are fitted.
        resamples: Resamples of subjects, for intervals.
        seed: Seed of folds, resamples and the planted table.
    """

    table: Path | None = None
    by: str = ""
    data: TransferData = TransferData()
    fit: FitConfig = FitConfig()
    resamples: Annotated[int, Bounds(10, 1_000_000)] = 2000
    seed: Seed = 0


def paper() -> Config:
    """Your answers, least squares as published."""
    return Config()


def smoke() -> Config:
    """In seconds: your answers, or those of two planted sites whose perturbations differ in strength."""
    return Config(data=TransferData(synthetic=40), resamples=500)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found.

    Attributes:
        sets: Cases and subjects of each set.
        fitted: Sets that were fitted to.
        coefficients: Of each of them, estimate and both ends of the interval by predictor.
        median_transfer: Median R2 on a set by the coefficients of another; None where there is none.
        median_own: Median R2 on held-out subjects of the set itself.
        notes: What a reader should know.
    """

    sets: dict[str, tuple[int, int]]
    fitted: tuple[str, ...]
    coefficients: dict[str, dict[str, tuple[float, float, float]]]
    median_transfer: float | None
    median_own: float | None
    notes: tuple[str, ...]


class Rows(NamedTuple):
    """The cases of one set."""

    subjects: tuple[str, ...]
    design: jax.Array
    v: jax.Array


def run(config: Config, folder: RunFolder) -> None:
    """Read, divide into sets, fit each, score all others."""
    clock = Clock()
    externals = parse_externals(config.data.external)
    answers = given_or_planted(config.table, config.data, config.seed, folder)
    by = config.by or ("site" if config.table is None else "")
    if not by and not externals:
        expected = "a column that divides the cases, or further tables"
        raise InputError("by", expected, "neither", "give --by COLUMN or --data.external NAME=CSV")
    notes = list(answers.notes)
    sets = _divide(answers, by, config, notes)
    fitted = tuple(name for name, rows in sets.items() if len(set(rows.subjects)) > 2)
    notes += [
        f"{name} has fewer than three subjects: it is scored, not fitted to." for name in sets if name not in fitted
    ]
    for external in externals:
        if external.name in sets:
            raise InputError("data.external", "names that no set of the table has", f"'{external.name}'")
        other = read_answers(external.path, config.data, config.seed)
        notes += [f"{external.name}: {note}" for note in other.notes]
        sets[external.name] = _rows(other, np.ones(len(other.cases), bool), config)
    if not fitted or len(sets) < 2:
        found = f"{len(sets)}, of which {len(fitted)} can be fitted to"
        raise InputError(answers.path, "two sets of cases, one of three subjects or more", found)
    program = jax.jit(partial(fit, config=config.fit))
    fits = {name: _fit(program, sets[name], answers) for name in fitted}
    notes += shared_subjects({name: part.subjects for name, part in sets.items()})
    log = begin(folder, notes)
    clock.lap("read and fit")

    rows = []
    for source in fitted:
        for target, cases in sets.items():
            rows.append(_score(source, target, fits[source], cases, config))
            log.say(f"Fitted on {source}, scored on {target}: R2 {rows[-1]['r2']:.3f}")
    write_table(folder.outputs / "transfer.csv", COLUMNS, rows)
    intervals = {
        name: coefficient_intervals(
            sets[name].design, sets[name].v, sets[name].subjects, config.fit,
            seed=config.seed, resamples=config.resamples,
        )
        for name in fitted
    }  # fmt: skip
    clock.lap("score and resample")
    own = [row["r2"] for row in rows if row["fitted_on"] == row["scored_on"]]
    other = [row["r2"] for row in rows if row["fitted_on"] != row["scored_on"]]
    summary = Summary(
        {name: (len(part.v), len(set(part.subjects))) for name, part in sets.items()}, fitted,
        {name: {key: (one.estimate, one.low, one.high) for key, one in found.items()}
         for name, found in intervals.items()},
        float(np.median(other)) if other else None, float(np.median(own)) if own else None,
        tuple(notes),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)


def _divide(answers: Answers, by: str, config: Config, notes: list[str]) -> dict[str, Rows]:
    if not by:
        return {WHOLE: _rows(answers, np.ones(len(answers.cases), bool), config)}
    if by not in answers.groups:
        expected = "a column with one value per case"
        raise InputError(
            f"{answers.path} by", expected, f"'{by}'", nearest(by, answers.groups) if answers.groups else ""
        )
    values = np.array(answers.groups[by])
    names = sorted(set(values) - {""})
    if len(names) > 20:
        raise InputError(f"{answers.path} by", "a column of at most 20 values", f"{len(names)}: {listed(names, 3)}")
    if (values == "").any():
        notes.append(f"{(values == '').sum()} cases without a value under '{by}' are left out.")
    return {str(name): _rows(answers, values == name, config) for name in names}


def _rows(answers: Answers, is_chosen: np.ndarray, config: Config) -> Rows:
    variances = variances_of(answers, config.data)
    kept = is_chosen & measured_cases(variances)
    if not kept.any():
        raise InputError(answers.path, "cases with answers of branches image, text and joint", "none in a set")
    image, text, covariance, joint = (jnp.asarray(np.asarray(part)[kept]) for part in variances)
    return Rows(tuple(np.array(answers.subjects)[kept].tolist()), make_design(image, text, covariance), joint)


def _fit(program, rows: Rows, answers: Answers) -> jax.Array:
    image, text, covariance = jnp.moveaxis(rows.design, -1, 0)
    parts = Variances(image, text, covariance, rows.v)
    found = program(*parts).coefficients
    require_decided(answers, np.asarray(found), parts)
    return found


def _score(source: str, target: str, coefficients: jax.Array, rows: Rows, config: Config) -> dict[str, object]:
    """Score a set by the coefficients of another; by folds of its subjects where it is the same."""
    subjects = np.array(rows.subjects)
    if source == target:
        folds = assign_folds(subjects, min(FOLDS, len(set(subjects))), config.seed)
        predicted = held_out(rows.design, rows.v, jnp.asarray(folds), int(folds.max()) + 1, config.fit)
    else:
        predicted = predict(coefficients, rows.design)
    truth, values = np.asarray(rows.v), np.asarray(predicted)
    statistics = error_statistics(truth.ravel(), values.ravel())
    found: dict[str, object] = {"fitted_on": source, "scored_on": target, "cases": len(truth)}
    found["r2_case"] = float(score(rows.v, predicted).r2_case)
    found["spearman"] = spearman(truth.sum(axis=1), values.sum(axis=1))
    ones = np.ones((1, truth.size))
    found |= {name: float(statistics[name](ones)[0]) for name in ("r2", "mae", "mse")}
    if len(set(subjects)) > 1:
        rows_of = np.repeat(subjects, truth.shape[1])
        interval = bootstrap_all(
            lambda weights: {"r2": statistics["r2"](weights)}, rows_of, seed=config.seed, num_resamples=config.resamples
        )["r2"]
        found |= {"r2_low": interval.low, "r2_high": interval.high}
    return found


def page(run: Finished[Config, Summary]) -> Page:
    """Show what coefficients of one set explain of the others."""
    summary, stored = run.summary, read_table(run.outputs / "transfer.csv")
    cells = {(row["fitted_on"], row["scored_on"]): float(row["r2"]) for row in stored.rows}
    names = list(summary.sets)
    tables = {"R2": np.array([[cells.get((one, other), np.nan) for other in names] for one in summary.fitted])}
    caption = (
        "Explained share of the variances of rows by coefficients fitted elsewhere; where both are one set, by fits on "
        "its other subjects."
    )
    figure = heat_maps(tables, summary.fitted, names, ylabel="fitted on", xlabel="scored on", caption=caption)
    signs = {"image": "b1, of V_I", "text": "b2, of V_T", "covariance": "b3, of C"}
    strips = [Bar(name, *summary.coefficients[name][key], group=signs[key])
              for key in PREDICTORS for name in summary.fitted]  # fmt: skip
    compared = bars(strips, xlabel="coefficient", caption="Coefficients of each set with 95 % intervals over subjects.")
    rows = [tuple(row[name] if name in COLUMNS[:2] else _cell(row[name]) for name in COLUMNS) for row in stored.rows]
    heads = ("Fitted on", "Scored on", "Cases", "R2", "Low", "High", "R2 of cases", "MAE", "MSE", "Spearman")
    text = "A coefficient that differs between sets need not hurt: C is a function of V_I and V_T, so they trade off."
    return Page(
        "Transfer of uncertainty propagation",
        f"Coefficients of {len(summary.fitted)} sets of cases, tried on {len(summary.sets)} without a refit",
        [
            ("Sets", len(summary.sets), ", ".join(f"{name} {cases}" for name, (cases, _) in summary.sets.items())),
            ("R2 elsewhere", summary.median_transfer, "median over pairs of sets"),
            ("R2 at home", summary.median_own, "median, held-out subjects"),
        ],
        [
            Section("How far coefficients carry", [figure, Table(heads, rows, "Intervals resample subjects.")]),
            Section("Coefficients", [compared, Text([text])]),
            Section("How to read it", [Note(note) for note in summary.notes]),
        ],
    )


def _cell(text: str) -> float | None:
    return float(text) if text else None

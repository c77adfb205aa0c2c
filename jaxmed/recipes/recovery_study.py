"""Estimators of known parameters, scored at several levels of noise: a cell of a study for each, tables, the page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.errors import InputError
from jaxmed.files import make_folder
from jaxmed.io.gradient_match import Table
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.metrics.recovery import BOUND, Scores, correlation, score, tabulate
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.monte_carlo import Estimator, average_bound, estimate
from jaxmed.recipes.study import Cell, Outcome, StudyRun, make_cells, run_study
from jaxmed.recipes.study_sections import failed_cells
from jaxmed.report.page import Section, Tile
from jaxmed.report.parameter_maps import map_label
from jaxmed.report.recovery import noise_section, scores_section, truth_section
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder

SHOWN_SNR = 20.0
"""Noise level of the curves over the truth; the nearest one there is."""


def score_levels(
    model: MicrostructureModel,
    table: Table,
    estimators: Mapping[str, Estimator],
    grid: Float[np.ndarray, "point parameter"],
    snr: Sequence[float],
    repeats: int,
    seed: int,
    folder: RunFolder,
    config: object,
    log: Log,
) -> StudyRun:
    """Score estimators at every noise level that is not finished, on the same noise; write points/ and scores.csv.

    Args:
        model: The forward model.
        table: The protocol.
        estimators: By name; correlations are with "MLE", where it is among them.
        grid: True parameters.
        snr: Signal-to-noise ratios at b = 0.
        repeats: Noise repetitions of each point.
        seed: Seed of directions and noise.
        folder: Of the run.
        config: Of the stage.
        log: Of the run.

    Raises:
        InputError: No noise level could be finished.
    """
    weight = np.asarray(model.relevance(jnp.asarray(grid, jnp.float32)))
    noise_key, direction_key = jax.random.split(jax.random.key(seed))
    each = len(grid) * repeats
    announce(
        log, f"Scoring {', '.join(estimators)} at {len(snr)} levels of noise", count=each * len(snr), unit="voxels"
    )
    with log.progress("Scoring", each * len(snr), "voxels") as update:

        def run_cell(cell: Cell) -> Outcome:
            level, number = float(cell["snr"]), snr.index(float(cell["snr"]))
            key = jax.random.fold_in(noise_key, number)
            found = estimate(
                key, model, table, estimators, grid, repeats, level, lambda done: update(number * each + done)
            )
            bound = average_bound(direction_key, model, table, grid, level)
            scores = {name: score(one, grid) for name, one in found.items()}
            stacked = {name: np.stack([getattr(one, name) for one in scores.values()]) for name in Scores._fields}
            place = make_folder(folder.outputs / "points") / f"{cell.slug}.npz"
            write_npz(place, {"grid": grid, "weight": weight, "bound": bound, **stacked})
            rows = tabulate(model.names, scores | {BOUND: Scores(np.zeros_like(grid), bound, bound)}, grid, weight)
            agreement = {n: correlation(one, found["MLE"], weight) for n, one in found.items() if "MLE" in found}
            for row in rows:
                values = agreement.get(row["estimator"], [math.nan] * len(model.names))
                value = values[model.names.index(row["parameter"])]
                row["correlation"] = value if math.isfinite(value) else None
            shown = [row for row in rows if row["estimator"] != BOUND]
            metrics = {f"{row['estimator']}/{row['parameter']}/rmse": row["rmse"] for row in shown}
            log.metrics(number, {"snr": level} | metrics)
            return Outcome(metrics, rows)

        done = run_study(make_cells({"snr": snr}), run_cell, folder.path, config)
    for failure in done.failures:
        log.say(f"Failed: {failure.cell}: {failure.reason}")
    rows = scored_rows(done)
    write_table(folder.outputs / "scores.csv", tuple(rows[0]), rows)
    return done


def scored_rows(study: StudyRun) -> list[dict[str, Any]]:
    """Return the rows of `tabulate` of every noise level, under snr.

    Raises:
        InputError: No noise level could be finished.
    """
    rows = [{**dict(result.cell.key), **row} for result in study.results for row in result.subjects]
    if not rows:
        raise InputError("snr", "a noise level that could be scored", "none", "see outputs/failed.csv for the reasons")
    return rows


def recovery_sections(
    outputs: Path, study: StudyRun, units: Mapping[str, str], estimators: Sequence[str]
) -> tuple[list[Tile], list[Section]]:
    """Show scores over the noise and over the truth, all of them in a table, and which levels failed.

    Args:
        outputs: Of the run.
        study: Of `score_levels`.
        units: Unit of each parameter.
        estimators: Their names, without the bound.
    """
    rows = scored_rows(study)
    snr = min((row["snr"] for row in rows), key=lambda snr: abs(snr - SHOWN_SNR))
    tiles: list[Tile] = []
    for parameter in units:
        found = [
            row for row in rows if (row["snr"], row["parameter"]) == (snr, parameter) and row["estimator"] != BOUND
        ]
        best = min(found, key=lambda row: row["rmse"])
        said = f"{best['estimator']}, the lowest at SNR {snr:g}"
        tiles.append((f"{map_label(parameter)} RMSE", float(f"{best['rmse']:.3g}"), said))
    (shown,) = (result.cell for result in study.results if result.cell["snr"] == snr)
    return tiles, [
        noise_section(rows, units, estimators),
        truth_section(outputs / "points" / f"{shown.slug}.npz", snr, units, estimators),
        scores_section(rows),
        *failed_cells(study.failures),
    ]

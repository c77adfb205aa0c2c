"""Sections on estimators of known parameters: over the noise, over the truth, and in a table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.io.maps import Quantity
from jaxmed.io.tables import read_table
from jaxmed.metrics.recovery import BOUND, DEFINED, Scores, bias_curve
from jaxmed.report.figures import agreement, curves
from jaxmed.report.page import Figure, Section, Table
from jaxmed.report.parameter_maps import error_table, map_label


def noise_section(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str], estimators: Sequence[str]) -> Section:
    """Show spread beside its bound, error and bias over the noise.

    Args:
        rows: Of `metrics.recovery.tabulate`, with their signal-to-noise ratio as snr.
        units: Unit of each parameter.
        estimators: Their names, without the bound.
    """
    blocks = []
    for parameter, unit in units.items():
        label = map_label(parameter)
        for measure, title, shown in (
            ("median_sd", "standard deviation, median over the grid", [*estimators, BOUND]),
            ("rmse", "root mean squared error", estimators),
            ("bias", "bias, mean over the grid", estimators),
        ):
            series = {}
            for name in shown:
                found = [row for row in rows if (row["estimator"], row["parameter"]) == (name, parameter)]
                points = sorted((row["snr"], row[measure]) for row in found)
                series[name] = tuple(np.array(points).T)
            ylabel = f"{label} {title}" + ("" if unit == "1" else f" ({unit})")
            caption = f"{label}: {title}."
            caption += " An estimator below the bound pays for it in bias." if measure == "median_sd" else ""
            blocks.append(curves(series, xlabel="signal-to-noise ratio at b = 0", ylabel=ylabel, caption=caption))
    return Section("Over the noise", blocks)


def truth_section(path: Path, snr: float, parameters: Iterable[str], estimators: Sequence[str]) -> Section:
    """Show bias and spread over the truth at one noise level.

    Args:
        path: A .npz file of grid, weight, bound, and of each field of `Scores` by estimator.
        snr: Signal-to-noise ratio at b = 0.
        parameters: Their names.
        estimators: Their names, without the bound.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    grid, weight = arrays["grid"], arrays["weight"]
    blocks: list[Figure] = []
    for column, label in enumerate(map(map_label, parameters)):
        bias, spread = {}, {}
        for number, name in enumerate(estimators):
            scores = Scores(*(arrays[field][number] for field in Scores._fields))
            values, mean, sd = bias_curve(scores, grid, weight, column)
            bias[name], spread[name] = (values, mean), (values, sd)
        # Median, because the bound has no upper limit where a parameter hardly matters.
        values = np.unique(grid[:, column])
        inside = [(weight[:, column] >= DEFINED) & (grid[:, column] == value) for value in values]
        medians = [np.median(arrays["bound"][rows, column]) if rows.any() else np.nan for rows in inside]
        spread[f"{BOUND}, median"] = (values, np.array(medians))
        blocks += [
            curves(bias, xlabel=f"true {label}", ylabel=f"{label} bias",
                   caption=f"Bias of {label} over its true value at SNR {snr:g}, averaged over the other parameters. A "
                   "falling line is shrinkage."),
            curves(spread, xlabel=f"true {label}", ylabel=f"{label} standard deviation", log=True,
                   caption=f"Spread of {label} over its true value at SNR {snr:g}."),
        ]  # fmt: skip
    return Section("Over the truth", blocks)


def scores_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Show all scores but the bound's; rows as for `noise_section`."""
    columns = {
        "snr": "SNR", "parameter": "Parameter", "estimator": "Estimator", "bias": "Bias", "sd": "Standard deviation",
        "rmse": "RMSE", "slope": "Slope", "correlation": "Correlation with MLE",
    }  # fmt: skip
    named = [{**row, "parameter": map_label(row["parameter"])} for row in rows if row["estimator"] != BOUND]
    caption = (
        f"Over the points where at least {DEFINED:g} of the voxel lets the signal depend on the parameter; standard "
        "deviation and RMSE are root means of squares; correlations are Pearson's, with the maximum-likelihood fit of "
        "the same voxels. outputs/scores.csv has all columns, and the bound."
    )
    return Section("Table", [Table([*columns.values()], [[row[name] for name in columns] for row in named], caption)])


def validation_section(path: Path, outputs: Sequence[Quantity], snr: float) -> Section:
    """Show an estimator on fresh voxels of one noise level.

    Args:
        path: A .npz file of truth, estimate and weight, (voxel, output).
        outputs: What was estimated.
        snr: Signal-to-noise ratio at b = 0.
    """
    with np.load(path, allow_pickle=False) as stored:
        truth, estimate, weight = stored["truth"], stored["estimate"], stored["weight"]
    truths, estimates, units = {}, {}, {}
    for column, output in enumerate(outputs):
        label, inside = map_label(output.name), weight[:, column] >= DEFINED
        truths[label], estimates[label] = truth[inside, column], estimate[inside, column]
        units[label] = "" if output.unit == "1" else output.unit
    said = "Estimate against truth. A slope below 1 is shrinkage to the middle of the training range."
    return Section(
        "Against the truth",
        [
            agreement(truths, estimates, units=units,
                      caption=f"Fresh simulated signals at a signal-to-noise ratio of {snr:g}; a "
                      "parameter is shown where at least half of the voxel lets the signal depend on it."),
            error_table(truths, estimates, said, first="Parameter", has_slope=True),
        ],
    )  # fmt: skip


def stage_recovery_section(file: Path, cohorts: int, equation: str) -> Section:
    """Show how well planted stages are recovered, from a table of visits, irregularity and what came of it."""
    table = read_table(file)
    rows = np.array([table.floats(name) for name in ("visits", "irregularity", "spearman", "lowest", "years")]).T

    def by_kind(column: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        # One visit has no gaps, and begins every line.
        lines = {kind: rows[(rows[:, 1] == kind) | (rows[:, 0] == 1)] for kind in np.unique(rows[:, 1])}
        return {f"irregularity {kind:g}": (line[:, 0], line[:, column]) for kind, line in lines.items()}

    caption = (
        f"Spearman's correlation of estimated with planted stages, mean of {cohorts} cohorts of this size, "
        f"fitted by {equation}; gaps between visits are uniform on their mean times 1 plus or "
        "minus the irregularity."
    )
    figures = [
        curves(by_kind(2), xlabel="visits per patient", ylabel="Spearman's correlation", caption=caption),
        curves(by_kind(4), xlabel="visits per patient", ylabel="error of a stage, years",
               caption="Mean absolute error of the stage at the first visit."),
    ]  # fmt: skip
    cells = [(int(visits), *others) for visits, *others in rows.tolist()]
    columns = ("Visits", "Irregularity", "Spearman", "Lowest cohort", "Error, years")
    return Section("How well stages are recovered", [*figures, Table(columns, cells, "The same in numbers.")])

"""The report of an evaluation, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.figures import curves
from jaxmed.report.page import Section, Table, Text, write_report
from jaxmed.systems.noddi.evaluation import DEFINED, Scores, bias_curve
from jaxmed.systems.noddi.predict_page import map_label
from jaxmed.train.run_folder import read_summary

SHOWN_SNR = 20.0
"""Noise level of the curves over the truth; the nearest one there is."""


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    with np.load(folder / "outputs" / "scores.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    repeats = record["config"]["repeats"]
    write_report(
        folder / "report.html",
        title="Networks and fits on known parameters",
        subtitle=f"{', '.join(summary['estimators'])}: {summary['points']:,} points of the parameter range x "
        f"{repeats} repetitions x {len(summary['snr'])} noise levels, {summary['images']} images",
        summary=_tiles(summary),
        sections=[
            _noise_section(summary),
            _truth_section(summary, arrays),
            _table_section(summary),
            _reading_section(),
        ],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    snr = _nearest(summary)
    tiles: list[tuple[str, object, str]] = []
    for parameter in summary["parameters"]:
        found = [
            row
            for row in summary["rows"]
            if row["snr"] == snr and row["parameter"] == parameter["name"] and row["estimator"] in summary["estimators"]
        ]
        best = min(found, key=lambda row: row["rmse"])
        tiles.append(
            (
                f"{map_label(parameter['name'])} RMSE",
                float(f"{best['rmse']:.3g}"),
                f"{best['estimator']}, the lowest at SNR {snr:g}",
            )
        )
    return tiles


def _nearest(summary: dict[str, Any]) -> float:
    return min(summary["snr"], key=lambda snr: abs(snr - SHOWN_SNR))


def _noise_section(summary: dict[str, Any]) -> Section:
    blocks: list[Any] = []
    names = [*summary["estimators"], "Cramer-Rao bound"]
    for parameter in summary["parameters"]:
        label = map_label(parameter["name"])
        unit = "" if parameter["unit"] == "1" else f" ({parameter['unit']})"
        for measure, title, shown in (
            ("median_sd", "standard deviation, median over the grid", names),
            ("rmse", "root mean squared error", summary["estimators"]),
            ("bias", "bias, mean over the grid", summary["estimators"]),
        ):
            series = {name: _over_noise(summary, name, parameter["name"], measure) for name in shown}
            caption = (
                f"{label}: {title}. An estimator below the bound pays for it in bias."
                if measure == "median_sd"
                else f"{label}: {title}."
            )
            blocks.append(
                curves(
                    series, xlabel="signal-to-noise ratio at b = 0", ylabel=f"{label} {title}{unit}", caption=caption
                )
            )
    return Section("Over the noise", blocks)


def _over_noise(summary: dict[str, Any], estimator: str, parameter: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in summary["rows"] if (row["estimator"], row["parameter"]) == (estimator, parameter)]
    rows.sort(key=lambda row: row["snr"])
    return np.array([row["snr"] for row in rows]), np.array([row[measure] for row in rows])


def _truth_section(summary: dict[str, Any], arrays: dict[str, np.ndarray]) -> Section:
    snr = _nearest(summary)
    place = summary["snr"].index(snr)
    grid, weight = arrays["grid"], arrays["weight"]
    blocks: list[Any] = []
    for column, parameter in enumerate(summary["parameters"]):
        label = map_label(parameter["name"])
        bias, spread = {}, {}
        for number, name in enumerate(summary["estimators"]):
            scores = Scores(*(arrays[field][place, number] for field in Scores._fields))
            values, mean, sd = bias_curve(scores, grid, weight, column)
            bias[name], spread[name] = (values, mean), (values, sd)
        bound = Scores(np.zeros_like(grid), arrays["bound"][place], arrays["bound"][place])
        # Median, because the bound has no upper limit where a parameter hardly matters.
        values = np.unique(grid[:, column])
        inside = [(weight[:, column] >= DEFINED) & (grid[:, column] == value) for value in values]
        medians = [np.median(bound.sd[rows, column]) if rows.any() else np.nan for rows in inside]
        spread["Cramer-Rao bound, median"] = (values, np.array(medians))
        blocks += [
            curves(bias, xlabel=f"true {label}", ylabel=f"{label} bias",
                   caption=f"Bias of {label} over its true value at SNR {snr:g}, averaged over the other parameters. A "
                   "falling line is shrinkage."),
            curves(spread, xlabel=f"true {label}", ylabel=f"{label} standard deviation", log=True,
                   caption=f"Spread of {label} over its true value at SNR {snr:g}."),
        ]  # fmt: skip
    return Section("Over the truth", blocks)


def _table_section(summary: dict[str, Any]) -> Section:
    rows = [
        (row["snr"], map_label(row["parameter"]), row["estimator"], row["bias"], row["sd"], row["rmse"], row["slope"])
        for row in summary["rows"]
        if row["estimator"] in summary["estimators"]
    ]
    columns = ("SNR", "Parameter", "Estimator", "Bias", "Standard deviation", "RMSE", "Slope")
    caption = (
        f"Over the points where at least {DEFINED:g} of the voxel lets the signal depend on the parameter; standard "
    )
    caption += "deviation and RMSE are root means of squares. outputs/scores.csv has all columns, and the bound."
    blocks: list[Any] = [Table(columns, rows, caption)]
    if summary["agreement"]:
        pairs = [
            (row["snr"], map_label(row["parameter"]), row["estimator"], row["correlation"])
            for row in summary["agreement"]
        ]
        caption = "Pearson's r with the maximum-likelihood fit of the same voxels."
        blocks.append(Table(("SNR", "Parameter", "Estimator", "Correlation with MLE"), pairs, caption))
    return Section("Table", blocks)


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "All estimators saw the same simulated voxels. MLE is the maximum-likelihood fit, told the true "
                    "noise level; NN_MLE are networks trained on such fits, NN_GT networks trained on the true "
                    "parameters.",
                    "Low spread with a slope below 1 is not precision: such an estimator answers with the middle of "
                    "its training range where the signal says little.",
                    "After arXiv:2507.12632. For research only, not for diagnosis.",
                ]
            )
        ],
    )

"""The report of a calibration, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.config import read_record
from jaxmed.io.tables import read_table
from jaxmed.report.bands import Band, banded_curves
from jaxmed.report.figures import curves
from jaxmed.report.page import Note, Section, Table, Text, write_report
from jaxmed.systems.dynamicdps.options import CALIBRATION, Calibrated, read_calibration
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    calibrated = read_calibration(folder)
    bank = _read_bank(folder / "outputs" / "bank.csv")
    write_report(
        folder / "report.html",
        title="Calibration of DynamicDPS",
        subtitle=f"{len(summary['references'])} full runs of DPS on reference images",
        summary=_tiles(calibrated, summary),
        sections=[
            _bank_section(calibrated, bank, summary),
            _acquisition_section(calibrated, summary),
            _reading_section(),
        ],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _read_bank(path: Path) -> dict[str, np.ndarray]:
    table = read_table(path)
    return {name: np.array([float(row[name]) for row in table.rows]) for name in table.columns}


def _tiles(calibrated: Calibrated, summary: dict) -> list[tuple[str, object, str]]:
    rule = calibrated.start
    return [
        ("Runs", len(summary["references"]), "of DPS, one per reference image"),
        ("First bin", round(rule.means[0], 3), "mean residual |y - A(x)|"),
        ("Tau", round(rule.tau, 3), f"compression, at a scale of {rule.scale:.3g}"),
        ("Familiar", round(float(np.median(summary["familiar"])), 3), "median residual of estimates"),
    ]


def _bank_section(calibrated: Calibrated, bank: dict[str, np.ndarray], summary: dict) -> Section:
    left = bank["steps_left"]
    blocks = []
    if not summary["monotone"]:
        text = "The means of the bins do not rise throughout; the rule reads their running maximum."
        blocks.append(Note(text, "warning"))
    band = Band(left, bank["mean"], bank["lowest"], bank["highest"])
    blocks.append(
        banded_curves(
            {"residual": band},
            xlabel="steps left",
            ylabel="residual |y - A(x)|",
            caption="Residual of the denoised image during full runs: mean, lowest and highest over the runs.",
        )
    )
    rule = calibrated.start
    residual = np.geomspace(max(min(summary["familiar"]) / 4, 1e-6), max(bank["highest"].max(), 1e-5), 200)
    q = rule.scale * (residual / rule.scale) ** rule.tau
    below = (np.maximum.accumulate(np.array(rule.means))[:, None] < q).sum(0)
    started = rule.steps_per_bin * (np.minimum(below, len(rule.means) - 1) + 1) - 1
    blocks.append(
        curves(
            {"start": (residual, started.astype(float))},
            xlabel="residual of an estimate",
            ylabel="start (steps left)",
            caption="Where an estimate enters the chain: the more it contradicts the measurement, the further back.",
        )
    )
    rows = [
        (index, rule.steps_per_bin * (index + 1) - 1, mean, rule.scale * (mean / rule.scale) ** (1 / rule.tau))
        for index, mean in enumerate(rule.means)
    ]
    columns = ("bin", "start (steps left)", "mean residual", "residual of an estimate that passes it")
    blocks.append(Table(columns, rows, "The bins of the bank."))
    return Section("Bank", blocks)


def _acquisition_section(calibrated: Calibrated, summary: dict) -> Section:
    acquisition, fit = calibrated.acquisition, summary["fit"]
    said = "given" if fit is None else f"fitted to pairs in {fit['steps']} steps, error {fit['rms']:.3g}"
    rows = [
        ("gamma (power of contrast)", acquisition.gamma, said),
        ("blur (voxels)", str(acquisition.sigma), said),
        ("ratio of voxel sizes", str(acquisition.scale), "given"),
        ("noise (in [0, 2])", acquisition.noise, "given" if fit is None else "what the fit leaves over"),
    ]
    quantities = [("estimates", summary["familiar"]), ("truth", summary["truth"])]
    residuals = [(name, *(float(v) for v in np.quantile(values, [0, 0.5, 1]))) for name, values in quantities]
    caption = f"Residuals |y - A(x)| of the reference images' estimates ({summary['estimates']}) and of the truth."
    return Section(
        "Acquisition",
        [
            Table(("quantity", "value", "how"), rows, "From the reference images to low field."),
            Table(("of", "lowest", "median", "highest"), residuals, caption),
        ],
    )


def _reading_section() -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    f"outputs/{CALIBRATION} is what jaxmed dynamicdps enhance --calibration RUN reads. It belongs to "
                    "one prior, one acquisition and one size of images: residuals are norms over whole images.",
                    "Residuals of estimates below the first bin's mean start as late as there is; tau compresses those "
                    "above, so that estimates unlike anything in the bank do not begin in pure noise.",
                    "Source: DynamicDPS, arXiv:2503.01075, and its code. The choice of tau and scale is ours.",
                ]
            )
        ],
    )

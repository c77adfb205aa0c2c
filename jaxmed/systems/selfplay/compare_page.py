"""The report of a comparison, made from what the run left in its folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.bands import Band, banded_curves
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.report.scatter import scatter
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of a compare run."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    sections = [Section("Notes", [Note(text) for text in summary["notes"]])]
    if summary["failed"]:
        text = f"Records that could not be used: {summary['failed']}; see outputs/failed.csv."
        sections.insert(0, Section("Failed records", [Note(text, "warning")]))
    sections += [
        Section("Thinking curves", [_curves(summary)]),
        Section("Where each method ends", [_bars(summary), _table(summary)]),
        Section("Does the verifier know?", [_scatter(summary)]),
        Section("How to read this", [Text([
            "All arms answer for the same test images. Thinking uses those images, but no label of them; budgets are "
            f"of {record['config']['together']} images that are thought about together. Every seed draws its own "
            "labelled images, adapts System I, and plays anew.",
            "Random proposals follow the same rules as self-play with a policy that knows nothing: what they gain is "
            "the verifier's doing, what self-play gains beyond is the policy's. If the score rises while Dice falls, "
            "the verifier is being exploited.",
            *(["Thinking begins from the threshold of System I's probability that the verifier likes best: what this "
               "gives is the arm 'verifier's level', and only what lies beyond it is the game's. To beat is one "
               "threshold for all, the best on the other subjects, which needs no verifier."]
              if record["config"]["think"].get("levels") else []),
            "Foundation models and human readers are not compared with: neither can be had here.",
        ])]),
    ]  # fmt: skip
    write_report(
        folder / "report.html",
        title="Thinking, compared",
        subtitle=f"Self-play reasoning on '{summary['task']}', {summary['cases']} images, {summary['seeds']} seeds",
        summary=_tiles(summary),
        sections=[section for section in sections if section.blocks],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    arms, tests = summary["arms"], summary["tests"]
    tiles: list[tuple[str, object, str]] = [
        ("System I", f"{100 * arms['System I'][0]['mean']:.1f} %", f"Dice, {summary['shots']} labelled images")
    ]
    if "self-play" in arms:
        gain = arms["self-play"][-1]["gain"]
        tiles.append(("Thinking adds", f"{100 * gain['mean']:+.1f}", f"points of Dice, {_span(gain)}"))
    if "against_random" in tests:
        tiles.append(("Beyond random", f"{100 * tests['against_random']['mean']:+.1f}", "points of Dice"))
    if tests["score_and_dice"] is not None:
        tiles.append(("Verifier", f"{tests['score_and_dice']:.2f}", "Spearman of score and Dice, all answers"))
    return tiles


def _span(entry: dict[str, float | None], sign: str = "+") -> str:
    low, high = entry["low"], entry["high"]
    return "one subject" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _percent(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _curves(summary: dict[str, Any]) -> Figure:
    base = summary["arms"]["System I"][0]
    bands = {}
    for name, entries in summary["arms"].items():
        if not entries[-1]["budget"]:
            continue
        points = [base, *entries]
        x = np.array([max(entry["budget"], entries[0]["budget"] / 4) for entry in points], float)
        middle, error = (np.array([100 * (entry[key] or 0.0) for entry in points]) for key in ("mean", "error"))
        bands[name] = Band(x, middle, middle - error, middle + error)
    return banded_curves(
        bands, xlabel="steps of the game", ylabel="Dice (%)", log_x=True,
        caption="Dice of the best masks so far against the budget; the first point is System I. Bands: one standard "
        "error over subjects.",
    )  # fmt: skip


def _bars(summary: dict[str, Any]) -> Figure:
    rows = [
        Bar(name, 100 * entries[-1]["mean"], _percent(entries[-1]["low"]), _percent(entries[-1]["high"]))
        for name, entries in summary["arms"].items()
    ]
    return bars(
        rows, xlabel="Dice (%)",
        caption="Mean Dice at the largest budget, with 95 % intervals bootstrapped over subjects.",
    )  # fmt: skip


def _table(summary: dict[str, Any]) -> Table:
    rows = [
        [name, entry["budget"] or None, round(100 * entry["mean"], 2), _span(entry, ""),
         round(100 * entry["gain"]["mean"], 2), _span(entry["gain"]), round(entry["hausdorff_95"], 2),
         round(100 * entry["region_f1"], 1), entry["score"]]
        for name, entries in summary["arms"].items() for entry in entries
    ]  # fmt: skip
    columns = ("method", "steps", "Dice (%)", "95 % interval", "gain (points)", "95 % interval of the gain",
               f"HD95 ({summary['unit']})", "region F1 (%)", "score")  # fmt: skip
    return Table(columns, rows, "Means over cases and seeds; the gain is over System I. A mask without voxels is as "
                 "far from the truth as the image is wide; a region is found by a single shared voxel.")  # fmt: skip


def _scatter(summary: dict[str, Any]) -> Figure:
    return scatter(
        {"answers": np.array(summary["points"], float)}, xlabel="Dice with the true mask", ylabel="verifier's score",
        caption="Every answer of every arm: the verifier's score against Dice. Thinking can be trusted as far as one "
        "rises with the other.",
    )  # fmt: skip

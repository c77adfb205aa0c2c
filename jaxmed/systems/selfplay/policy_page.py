"""The report of a trained policy, made from what the run left in its folder."""

from pathlib import Path

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.figures import curves
from jaxmed.report.page import Figure, Note, Section, Table, Text, write_report
from jaxmed.train.log import read_metrics
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of a train-policy run."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    lines = read_metrics(folder)
    last = next(line for line in reversed(lines) if "evaluation/score_gain" in line)
    which = f"'{summary['looked_at']}', which it was not taught on" if summary["looked_at"] else "a task of training"
    sections = [
        Section("Learning to think", [
            _figure(lines, summary, "score_gain", "the verifier's score", 1.0),
            _figure(lines, summary, "overlap_gain", "Dice, in points", 100.0),
        ]),
        Section("Snapshots against each other", [_ratings(summary), _scores(summary)]),
        Section("How to read this", [Text([
            f"A visit adapts System I to a familiar task and thinks about other images of it for "
            f"{summary['steps_of_visit']:,} steps of the game. What it gains in them should grow from visit to visit, "
            "if what the policy learns on one task serves the next.",
            f"Now and then the policy thinks about images of {which}: always the same, for as many steps. The flat "
            "line is what a policy gains there that has learnt nothing before. If the score's gain grows and that of "
            "Dice falls, the policy learns to exploit the verifier. If both fall to 0, "
            "it has learnt to pass: a policy is paid for its proposals on average, the answer is the best of all, and "
            "where System I is good most changes are for the worse. Without think.play.game.at-most-k nobody passes.",
            "Snapshots of the policy play each other on images of that task. 400 points of Elo are odds of ten to one "
            "to make the better proposal; a policy is exploitable as far as another one gains on it.",
        ])]),
    ]  # fmt: skip
    if summary["failed"]:
        text = f"Records that could not be used: {summary['failed']}; see outputs/failed.csv."
        sections.insert(0, Section("Failed records", [Note(text, "warning")]))
    fresh = summary["fresh"]
    write_report(
        folder / "report.html",
        title="System II's policy, taught",
        subtitle=f"Self-play reasoning, {len(summary['tasks'])} familiar tasks",
        summary=[
            ("Visits", int(last["step"]), ", ".join(summary["tasks"])),
            ("Score gained", f"{last['evaluation/score_gain']:+.4f}", f"untaught {fresh['score_gain']:+.4f}"),
            ("Dice gained", f"{100 * last['evaluation/overlap_gain']:+.2f}",
             f"points; untaught {100 * fresh['overlap_gain']:+.2f}"),
            ("Parameters", f"{summary['parameters']:,}", "of the policy"),
        ],
        sections=sections,
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )  # fmt: skip


def _ratings(summary: dict) -> Figure:
    match = summary["match"]
    return curves(
        {"snapshot": (np.array(match["visits"], float), np.array(match["elo"]))},
        xlabel="visits", ylabel="Elo", caption="Rating of each snapshot among all, with mean 0.",
    )  # fmt: skip


def _scores(summary: dict) -> Table:
    match = summary["match"]
    rows, last = [], len(match["visits"]) - 1
    for row, visits in enumerate(match["visits"]):
        shares = (None if row == rival else round(100 * match["scores"][row][rival], 1) for rival in (0, last))
        rows.append([visits, round(match["elo"][row]), match["exploitability"][row], *shares])
    return Table(
        ("visits", "Elo", "exploitability (score a step)", "against the first (%)", "against the last (%)"), rows,
        "Snapshots; the last columns are shares of steps in which this one makes the better proposal.",
    )  # fmt: skip


def _figure(lines: list[dict[str, float]], summary: dict, name: str, what: str, factor: float) -> Figure:
    def series(key: str) -> tuple[np.ndarray, np.ndarray]:
        found = [(line["step"], factor * line[key]) for line in lines if key in line]
        return np.array([x for x, _ in found]), np.array([y for _, y in found])

    visits, evaluated = series(name), series(f"evaluation/{name}")
    level = factor * summary["fresh"][name]
    ends = np.array([min(visits[0].min(), 1.0), max(visits[0].max(), evaluated[0].max())])
    return curves(
        {"visits": visits, "looked at": evaluated, "looked at, untaught": (ends, np.full(2, level))},
        xlabel="visits", ylabel=f"gain in {what}",
        caption=f"Gain of a visit in {what}.",
    )  # fmt: skip

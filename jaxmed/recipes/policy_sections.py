"""What a page shows of a policy that learns: its gains from visit to visit, and its snapshots against each other."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.report.figures import curves
from jaxmed.report.page import Block, Figure, Table
from jaxmed.rl.tournament import Match
from jaxmed.train.log import series


@dataclasses.dataclass(frozen=True)
class SnapshotMatch:
    """Snapshots after so many visits against each other; see `rl.tournament.Match`."""

    visits: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    elo: tuple[float, ...]
    exploitability: tuple[float, ...]


def keep_match(visits: tuple[int, ...], match: Match) -> SnapshotMatch:
    """Return a match as a summary keeps it."""
    scores, elo, exploitability = (part.round(4).tolist() for part in match)
    return SnapshotMatch(visits, tuple(map(tuple, scores)), tuple(elo), tuple(exploitability))


def rating_blocks(match: SnapshotMatch) -> list[Block]:
    """Draw the rating of each snapshot, and list its scores against the first and the last."""
    end = len(match.visits) - 1
    rows = [
        [visits, round(match.elo[row]), match.exploitability[row],
         *(None if row == rival else round(100 * match.scores[row][rival], 1) for rival in (0, end))]
        for row, visits in enumerate(match.visits)
    ]  # fmt: skip
    return [
        curves(
            {"snapshot": (np.array(match.visits, float), np.array(match.elo))},
            xlabel="visits", ylabel="Elo", caption="Rating of each snapshot among all, with mean 0.",
        ),
        Table(
            ("visits", "Elo", "exploitability (score a step)", "against the first (%)", "against the last (%)"), rows,
            "Snapshots; the last columns are shares of steps in which this one makes the better proposal.",
        ),
    ]  # fmt: skip


def gain_curves(
    lines: Sequence[dict[str, float]], fresh: Mapping[str, float], name: str, what: str, factor: float
) -> Figure:
    """Draw what a metric gains in visits and in evaluations, beside the gain of a policy that has learnt nothing."""
    visits, evaluated = series(lines, name, factor), series(lines, f"evaluation/{name}", factor)
    ends = np.array([min(visits[0].min(), 1.0), max(visits[0].max(), evaluated[0].max())])
    untaught = ends, np.full(2, factor * fresh[name])
    return curves(
        {"visits": visits, "looked at": evaluated, "looked at, untaught": untaught},
        xlabel="visits", ylabel=f"gain in {what}", caption=f"Gain of a visit in {what}.",
    )  # fmt: skip

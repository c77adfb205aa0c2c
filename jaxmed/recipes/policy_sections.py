"""What a page shows of games and of a policy that learns them: debates, gains by visits, snapshots side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.io.weights_files import load_parameters
from jaxmed.report.figures import curves
from jaxmed.report.masks import proposal_panels
from jaxmed.report.page import Block, Figure, Section, Table
from jaxmed.rl.driver import Game
from jaxmed.rl.tournament import Debate, Match
from jaxmed.train.log import series

DEBATES = {
    "pixel": "A debate of the trained policy with itself, from where the game began. In every step both players name "
    "voxels to flip; the titles give the scores of both results. The better one becomes the next mask, unless both are "
    "worse than what there is and the rules keep it.",
    "patch": "A patch game of the trained policy with itself, until it was stopped or the figure ends. In every turn "
    "both players name a patch, the second when the first one's is gone; the titles give System I's mean probability "
    "in both. The mask is what has been named so far.",
}
GAMES = {
    "pixel": "The pixel game: two players propose flips of the mask, the verifier judges, the better proposal stays.",
    "patch": "The patch game (RLSP): two players name patches of the image in turn, the one whose patch shows more of "
    "the object wins, and either may end the game. The patches that a game has named are a mask; the verifier judges "
    "it after every move. So the answer is made of whole patches (think.patch.game.patches); System I's mask is where "
    "the curve begins, and no candidate.",
}
STOPS = {
    "budget": "the budget was used up",
    "time": "the time was up",
    "plateau": "no better mask was found any more",
    "constant verifier": "the verifier gives every mask the same score: this is System I's answer",
}
SNAPSHOT = "visit_"


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


def read_snapshots(folder: Path, last: int) -> tuple[tuple[int, ...], list[Params]]:
    """Read the policies that a run kept on its way: after how many visits, and their parameters."""
    found = {int(place.name.removeprefix(SNAPSHOT)): place for place in folder.glob(f"{SNAPSHOT}*")}
    numbers = tuple(sorted(number for number in found if number <= last))
    return numbers, [load_parameters(found[number])[0] for number in numbers]


def learning_sections(
    lines: Sequence[dict[str, float]], fresh: Mapping[str, float], match: SnapshotMatch
) -> list[Section]:
    """Show what is gained from visit to visit, by metrics and what a policy gains that has learnt nothing."""
    gains = [
        gain_curves(lines, fresh, "score_gain", "the verifier's score", 1.0),
        gain_curves(lines, fresh, "overlap_gain", "Dice, in points", 100.0),
    ]
    return [Section("Learning to think", gains), Section("Snapshots against each other", rating_blocks(match))]


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


def debate_panels(arrays: Mapping[str, np.ndarray], game: Game) -> Figure:
    """Draw a debate: "debate_image", and each field of `Debate` as "debate_NAME"."""
    told = Debate(*(arrays[f"debate_{name}"] for name in Debate._fields))
    scores = enumerate(zip(told.values, told.is_won, told.rival_values, strict=True), 1)
    titles = [f"{step}: {own:.3f} {'>' if won else '<'} {rival:.3f}" for step, (own, won, rival) in scores]
    flips = {"first player": told.flips, "second player": told.rival_flips}
    return proposal_panels(arrays["debate_image"], told.masks, flips, titles, DEBATES[game])

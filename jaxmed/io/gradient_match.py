"""When two gradient tables are the same protocol, for networks that know one.

A network is trained for one gradient table in one order. The table travels with the weights; a scan may have its rows
in any order, and numbers that differ by what a scanner rounds. Beyond that it is refused: the same numbers at other
directions give maps that look like maps.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmed.errors import InputError
from jaxmed.io.gradients import GradientTable

BVAL_TOLERANCE = (0.03, 20.0)
"""b-values may differ by this share or by this many s/mm^2, whichever is more: less than noise."""
ANGLE_TOLERANCE = 2.0
"""Directions may differ by this many degrees: tables have few digits, and are turned with a head that moved."""
TILTS = 5
"""Rounds of matching rows and turning the table, for a slab that was scanned tilted and whose rows changed places."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The gradient table of a network, in its order.

    Attributes:
        bvals: b-values in s/mm^2.
        bvecs: Unit directions; zero where b is.
        b0_threshold: Rows up to this b-value are unweighted: their mean divides the others.
    """

    bvals: tuple[float, ...]
    bvecs: tuple[tuple[float, float, float], ...]
    b0_threshold: float = 50.0

    @classmethod
    def make(cls, bvals: np.ndarray, bvecs: np.ndarray, b0_threshold: float) -> "Table":
        """Keep what matters of a table.

        Raises:
            ValueError: Shapes disagree, or nothing or everything is unweighted.
        """
        if bvecs.shape != (len(bvals), 3):
            raise ValueError(f"bvecs: expected {len(bvals)} directions, one per b-value, found shape {bvecs.shape}")
        is_b0 = np.asarray(bvals) <= b0_threshold
        if not is_b0.any():
            raise ValueError(f"bvals: expected a row at b <= {b0_threshold:g} s/mm^2, found none")
        if is_b0.all():
            raise ValueError(f"bvals: expected rows above b = {b0_threshold:g} s/mm^2, found none")
        directions = np.where(np.asarray(bvals)[:, None] > 0, np.asarray(bvecs, float), 0.0) + 0.0
        rows = tuple((float(x), float(y), float(z)) for x, y, z in directions)
        return cls(tuple(float(bval) for bval in bvals), rows, float(b0_threshold))

    @property
    def is_b0(self) -> Bool[np.ndarray, " image"]:
        """Which rows are unweighted."""
        return np.array(self.bvals) <= self.b0_threshold

    @property
    def gradients(self) -> GradientTable:
        """The rows as a checked table."""
        return GradientTable(np.array(self.bvals), np.array(self.bvecs), ())

    @property
    def hash(self) -> str:
        """Name of the table: SHA-256 of threshold, b-values (0.1 s/mm^2) and directions (4 digits), in order."""
        rows = [
            f"{bval:.1f} " + " ".join(f"{round(component, 4) + 0.0:.4f}" for component in bvec)
            for bval, bvec in zip(self.bvals, self.bvecs, strict=True)
        ]
        return hashlib.sha256("\n".join([f"{self.b0_threshold:g}", *rows]).encode()).hexdigest()


class Match(NamedTuple):
    """How the rows of a scan are those of a network.

    Attributes:
        order: Row of the scan for each row of the network.
        notes: In what they differ, one sentence each.
    """

    order: Int[np.ndarray, " image"]
    notes: list[str]


def match_table(table: Table, bvals: np.ndarray, bvecs: np.ndarray, where: object) -> Match:
    """Find the rows of a network's table in that of a scan.

    Rows may stand in any order, antipodes are one direction, and a rotation of all directions together makes no
    difference: networks are trained on fibres of every direction, and a tilted slab is scanned with a turned table.

    Args:
        table: The network's.
        bvals: The scan's b-values in s/mm^2.
        bvecs: Its unit directions.
        where: The file that messages name.

    Raises:
        InputError: Numbers of images, a b-value or a direction differ by more than `BVAL_TOLERANCE` and
            `ANGLE_TOLERANCE`.

    `scripts/noddi_onnx.py` does the same without this package; a test holds the two together.
    """
    expected, directions = np.array(table.bvals), np.array(table.bvecs)
    is_weighted = ~table.is_b0

    def refuse(wanted: str, found: str) -> InputError:
        advice = "train a network for this protocol with jaxmed noddi train"
        return InputError(where, f"the protocol of the network ({table.hash[:12]}), with {wanted}", found, advice)

    if len(bvals) != len(expected):
        raise refuse(f"{len(expected)} images", f"{len(bvals)}")
    difference = np.abs(expected[:, None] - bvals)
    allowed = difference <= np.maximum(BVAL_TOLERANCE[0] * expected, BVAL_TOLERANCE[1])[:, None]
    best, error = None, np.inf
    for order in _orders(allowed, (expected, bvals), np.where(is_weighted[:, None], directions, 0.0), bvecs):
        off = _angles_off(directions[is_weighted], bvecs[order][is_weighted])
        if best is None or off.max() < error:
            best, error = order, off.max()
        if error <= 2 * ANGLE_TOLERANCE:
            break
    if best is None:
        row, other = _first_apart(expected, bvals, allowed)
        within = f"{100 * BVAL_TOLERANCE[0]:g} % or {BVAL_TOLERANCE[1]:g} s/mm^2"
        raise refuse(
            f"b = {expected[row]:g} s/mm^2 in place {row + 1} to {within}", f"b = {bvals[other]:g} in place {other + 1}"
        )
    if error > 2 * ANGLE_TOLERANCE:
        off = _angles_off(directions[is_weighted], bvecs[best][is_weighted])
        row = np.flatnonzero(is_weighted)[int(np.median(off, axis=1).argmax())]
        raise refuse(
            f"its directions to {ANGLE_TOLERANCE:g} degrees",
            f"another direction in place {best[row] + 1}: angles between directions differ by {error:.0f} degrees",
        )
    return Match(best, _match_notes(expected, bvals[best], best, float(error)))


def _orders(
    allowed: np.ndarray, ranks: tuple[np.ndarray, np.ndarray], directions: np.ndarray, bvecs: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield permutations of the scan's rows: its own order, then the nearest directions, turned and mirrored."""
    difference = np.abs(ranks[0][:, None] - ranks[1])
    if np.all(np.diagonal(allowed)):
        yield np.arange(len(allowed))
    for mirror in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        turned = bvecs * np.array(mirror)
        for _ in range(TILTS):
            cosine = turned @ directions.T
            order = _assign(allowed, difference, np.abs(cosine.T), directions)
            if order is None:
                mine, theirs = (np.argsort(part, kind="stable") for part in ranks)
                if np.all(allowed[mine, theirs]):
                    yield theirs[np.argsort(mine)]
                return
            yield order
            # Turn the scan's directions onto the network's (Kabsch), signs as they are now.
            sign = np.where(cosine[order, np.arange(len(order))] < 0, -1.0, 1.0)
            left, _, right = np.linalg.svd((turned[order] * sign[:, None]).T @ directions)
            turned = turned @ left @ right


def _assign(allowed, difference, cosine, directions) -> np.ndarray | None:
    """Pair rows, the nearest first; None where b-values leave rows alone."""
    count = len(allowed)
    angle = np.where(np.any(directions, axis=1)[:, None], np.degrees(np.arccos(np.minimum(cosine, 1.0))), 0.0)
    # Of repeated directions the nearest b-value, and then the nearest place.
    place = np.abs(np.arange(count)[:, None] - np.arange(count))
    cost = np.where(allowed, np.round(angle, 1) + 1e-3 * difference + 1e-6 * place, np.inf)
    order, taken = np.full(count, -1), np.zeros(count, bool)
    for pair in np.argsort(cost, axis=None, kind="stable")[: int(allowed.sum())]:
        row, other = divmod(int(pair), count)
        if order[row] < 0 and not taken[other]:
            order[row], taken[other] = other, True
    return order if taken.all() else None


def _angles_off(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "row row"]:
    """Return by how many degrees the angles between axes differ: a common rotation or mirror changes none."""
    angles = [np.degrees(np.arccos(np.minimum(np.abs(part @ part.T), 1.0))) for part in (first, second)]
    off = np.abs(angles[0] - angles[1])
    np.fill_diagonal(off, 0.0)
    return off


def _first_apart(expected: np.ndarray, bvals: np.ndarray, allowed: np.ndarray) -> tuple[int, int]:
    """Return the first rows, by b-value, that have no partner."""
    mine, theirs = np.argsort(expected, kind="stable"), np.argsort(bvals, kind="stable")
    apart = np.flatnonzero(~allowed[mine, theirs])
    rank = int(apart[0]) if len(apart) else 0
    return int(mine[rank]), int(theirs[rank])


def _match_notes(expected: np.ndarray, bvals: np.ndarray, order: np.ndarray, angle: float) -> list[str]:
    notes = []
    if np.any(order != np.arange(len(order))):
        notes.append("The images stand in another order than the network's; they were put into its order.")
    apart = float(np.abs(bvals - expected).max())
    if apart > 0.5 or angle > 0.5:
        notes.append(
            f"The table is the network's within what is allowed: b-values differ by up to {apart:.0f} s/mm^2 "
            f"({100 * BVAL_TOLERANCE[0]:g} % or {BVAL_TOLERANCE[1]:g}), angles between directions by up to "
            f"{angle:.1f} degrees (2 x {ANGLE_TOLERANCE:g})."
        )
    return notes

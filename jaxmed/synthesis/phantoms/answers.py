"""Answers of a model that never was, with planted propagation coefficients: tables to try `jaxmed mupm` on.

In every case the probability of class k is p_k + a_k x_I + b_k x_T, where x_I and x_T are the perturbations of image
and text: V_I = a_k^2, V_T = b_k^2, and with correlation rho of the two V = V_I + V_T + 2 rho sqrt(V_I V_T)
(a_k and b_k have one sign). So b1 = b2 = 1 and b3 = 2 rho. x_I and x_T are sums over named factors.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float64

from jaxmed.config import Bounds, checked
from jaxmed.io.tables import write_table

FACTORS = {"bmi": 0.0, "symptoms": 0.6, "history": 0.8}
"""Share of each factor in the perturbation of the text; their squares sum to 1, and bmi says nothing."""
IMAGE_FACTORS = {"affine": 0.8, "noise": 0.6, "phase": 0.0}
"""The same of the image: which phase is seen says nothing."""
SITES = {"north": 1.0, "south": 0.6}
"""Strength of the perturbations by where a case comes from."""
OPTIONS = ("valve", "failure", "ischaemic", "none")


@dataclasses.dataclass(frozen=True)
@checked
class AnswersConfig:
    """A planted table of answers.

    Attributes:
        cases: Cases; two of a subject.
        draws: Perturbations per branch.
        correlation: Of the perturbations of image and text in the joint branch: b3 is twice that.
        is_exact: Whether the perturbations of a case have exactly their variances and correlation, so that a fit finds
            the coefficients to rounding; otherwise few draws blur V_I and V_T, which pulls coefficients down.
    """

    cases: Annotated[int, Bounds(4, 100_000)] = 40
    draws: Annotated[int, Bounds(4, 1_000)] = 20
    correlation: Annotated[float, Bounds(0, 1)] = 0.3
    is_exact: bool = True


def write_answers(path: Path, seed: int, config: AnswersConfig) -> Path:
    """Write a planted table: the columns that `jaxmed mupm` reads, sites, and answers without each factor."""
    rng = np.random.default_rng(seed)
    rows = [row for case in range(config.cases) for row in _answer(rng, case, config)]
    write_table(path, tuple(rows[0]), rows)
    return path


def _answer(rng: np.random.Generator, case: int, config: AnswersConfig) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a case."""
    site, shares = list(SITES)[(case // 2) % len(SITES)], np.array(list(FACTORS.values()))
    base, image, text = _case(rng, SITES[site])
    label = OPTIONS[int(rng.choice(len(OPTIONS), p=base))]
    first = {"case": f"case{case:03d}", "subject": f"subject{case // 2:03d}", "site": site, "label": label}
    pair, parts = _draws(rng, config, 2), _draws(rng, config, len(FACTORS))
    other = config.correlation * pair[:, 0] + np.sqrt(1 - config.correlation**2) * pair[:, 1]
    blocks = [
        ("image", "", _draws(rng, config, 1) * image),
        ("text", "", (parts @ shares)[:, None] * text),
        ("joint", "", pair[:, :1] * image + other[:, None] * text),
    ]
    # From a stream of their own: what a factor of the image changes is planted beside the rest, not into it.
    sides = (("text", FACTORS, text, rng), ("image", IMAGE_FACTORS, image, rng.spawn(1)[0]))
    for branch, factors, size, stream in sides:
        for place, factor in enumerate(factors):
            kept = np.where(np.arange(len(factors)) == place, 0, list(factors.values()))
            blocks.append((branch, factor, (_draws(stream, config, len(factors)) @ kept)[:, None] * size))
    for branch, factor, changes in blocks:
        moves = changes if factor else np.concatenate([np.zeros((1, len(OPTIONS))), changes])
        for draw, move in enumerate(moves, 1 if factor else 0):
            cells = {f"p_{name}": f"{p:.8f}" for name, p in zip(OPTIONS, base + move, strict=True)}
            yield first | {"branch": branch, "draw": draw, "factor": factor} | cells


def _case(rng: np.random.Generator, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the unperturbed distribution and how far image and text move it; both moves sum to 0 over classes."""
    number = len(OPTIONS)
    base = rng.dirichlet(np.full(number, 0.7)) * 0.68 + 0.08
    signs = np.array([1.0, -1.0, 1.0, -1.0])[rng.permutation(number)]
    order = np.argsort(signs)
    # The less certain, the further it moves; five standard deviations of both stay within the smallest share.
    most = 0.008 * strength * (1.2 - base.max())
    moves = []
    for _ in range(2):
        sizes = np.empty(number)
        sizes[order] = np.tile(rng.uniform(0.2, 1.0, number // 2), 2)
        moves.append(most * sizes * signs)
    return base / base.sum(), moves[0], moves[1]


def _draws(rng: np.random.Generator, config: AnswersConfig, number: int) -> Float64[np.ndarray, "draw number"]:
    drawn = rng.standard_normal((config.draws, number))
    if not config.is_exact:
        return drawn
    # Orthonormal columns of mean 0: sample variances and correlations are what was planted.
    drawn, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    return drawn * np.sqrt(config.draws - 1)

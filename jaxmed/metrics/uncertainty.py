"""How uncertain repeated answers are, and whether the uncertain ones are the wrong ones.

Spreads and entropies are functions of arrays on the device, over draws of which some may be missing. Risk over
coverage, and what compares uncertainty with right and wrong answers, is NumPy on the host.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Real, Shaped

from jaxmed.errors import InputError
from jaxmed.metrics import weighted
from jaxmed.metrics.statistics import bootstrap


class Entropies(NamedTuple):
    """Uncertainty of a set of distributions, in nats.

    Attributes:
        predictive: Entropy of their mean.
        conditional: Mean of their entropies.
        information: The difference: what the draws disagree about.
    """

    predictive: Float[Array, "*batch"]
    conditional: Float[Array, "*batch"]
    information: Float[Array, "*batch"]


class RiskCoverage(NamedTuple):
    """What is lost when only the most certain answers are given.

    Attributes:
        coverage: Share of answers given, ascending to 1.
        risk: Share of them that is wrong.
        area: Mean risk over all numbers of answers given.
        best: That area if every wrong answer were more uncertain than every right one.
    """

    coverage: Float64[np.ndarray, " row"]
    risk: Float64[np.ndarray, " row"]
    area: float
    best: float


class Doubt(NamedTuple):
    """One measure of uncertainty against the right and wrong answers.

    Attributes:
        auroc: Chance that a wrong answer is the more uncertain of a wrong and a right one, and its interval; None
            where all are right or all are wrong.
        area: Mean risk over all shares of answers given.
        best: The least that area could be.
        curve: Risk over coverage.
    """

    auroc: tuple[float, float, float] | None
    area: float
    best: float
    curve: RiskCoverage


def draw_variance(
    values: Float[Array, "*batch draw class"], is_valid: Bool[Array, "*batch draw"]
) -> Float[Array, "*batch class"]:
    """Return the variance (divisor n - 1) over the valid draws; NaN where there are fewer than two."""
    return draw_covariance(values, values, is_valid)


def draw_covariance(
    first: Float[Array, "*batch draw class"],
    second: Float[Array, "*batch draw class"],
    is_valid: Bool[Array, "*batch draw"],
) -> Float[Array, "*batch class"]:
    """Return the covariance (divisor n - 1) over the valid draws; NaN where there are fewer than two.

    Args:
        first: Values; what stands at draws that are not valid is not looked at.
        second: Values of the same draws.
        is_valid: Draws that count.
    """
    mask = is_valid[..., None]
    number = mask.sum(-2)
    one, other = (jnp.where(mask, values, 0) for values in (first, second))
    one, other = (side - side.sum(-2, keepdims=True) / jnp.maximum(number, 1)[..., None, :] for side in (one, other))
    total = jnp.where(mask, one * other, 0).sum(-2)
    return jnp.where(number > 1, total / jnp.maximum(number - 1, 1), jnp.nan)


def entropies(probabilities: Float[Array, "*batch draw class"], is_valid: Bool[Array, "*batch draw"]) -> Entropies:
    """Split the entropy of the mean answer into what each draw is unsure of and what the draws disagree about.

    Args:
        probabilities: A distribution over classes for every draw.
        is_valid: Draws that count; without one the entropies are NaN.

    Source: Depeweg et al., arXiv:1710.07283, section 3.
    """
    mask = is_valid[..., None]
    number = is_valid.sum(-1)
    count = jnp.where(number > 0, number, jnp.nan)
    kept = jnp.where(mask, probabilities, 0)
    predictive = _entropy(kept.sum(-2) / count[..., None])
    conditional = jnp.where(is_valid, _entropy(kept), 0).sum(-1) / count
    return Entropies(predictive, conditional, predictive - conditional)


def risk_coverage(uncertainty: Real[np.ndarray, " row"], is_wrong: Shaped[np.ndarray, " row"]) -> RiskCoverage:
    """Return the risk of the k most certain answers for every k.

    Equally uncertain answers come in no order: each of them counts with the share that is wrong among them.

    Args:
        uncertainty: A number per answer; the higher, the less certain.
        is_wrong: Whether the answer is wrong.

    Raises:
        InputError: There is no answer, or an uncertainty is not finite.

    Source: Geifman and El-Yaniv, arXiv:1705.08500, section 2.
    """
    uncertainty, wrong = np.asarray(uncertainty, np.float64), np.asarray(is_wrong, np.float64)
    if not len(uncertainty) or not np.isfinite(uncertainty).all():
        raise InputError("uncertainty", "one finite number per answer", f"{len(uncertainty)} numbers, not all finite")
    _, groups = np.unique(uncertainty, return_inverse=True)
    share = np.bincount(groups, wrong) / np.bincount(groups)
    counts = np.arange(1, len(wrong) + 1)

    def risks(losses: np.ndarray) -> np.ndarray:
        return np.cumsum(losses) / counts

    risk = risks(share[np.sort(groups)])
    return RiskCoverage(counts / len(wrong), risk, float(risk.mean()), float(risks(np.sort(wrong)).mean()))


def judge(
    uncertainty: Float64[np.ndarray, " case"],
    is_wrong: Bool[np.ndarray, " case"],
    subjects: np.ndarray,
    seed: int,
) -> Doubt:
    """Compare a measure with right and wrong answers; intervals resample subjects."""
    curve = risk_coverage(uncertainty, is_wrong)
    auroc = None
    if 0 < is_wrong.sum() < len(is_wrong) and all(len(set(subjects[is_wrong == side])) > 1 for side in (True, False)):
        found = bootstrap(lambda weights: weighted.auroc(is_wrong, uncertainty, weights), subjects, seed=seed)
        auroc = found.estimate, found.low, found.high
    return Doubt(auroc, curve.area, curve.best, curve)


def decile_calibration(variances: Float[np.ndarray, "case class"], is_right: Bool[np.ndarray, " case"]) -> float:
    """Return the released calibration of variances: deciles of their norm against a pseudo-confidence.

    The pseudo-confidence, norm / (1 + norm), RISES with the variance: a low value does not mean good calibration. It
    is here to be compared with the release.

    Source: MUPM's code: sum over bins of |accuracy - mean confidence| times the bin's share.
    """
    norm = np.linalg.norm(np.asarray(variances, np.float64), axis=1)
    confidence = norm / (1 + norm)
    edges = np.quantile(norm, np.arange(1, 10) / 10)
    places = np.searchsorted(edges, norm, side="left")
    counts = np.bincount(places, minlength=10)
    gaps = np.bincount(places, is_right, 10) - np.bincount(places, confidence, 10)
    return float(np.abs(gaps[counts > 0]).sum() / len(norm))


def _entropy(probabilities: Float[Array, "*batch class"]) -> Float[Array, "*batch"]:
    is_positive = probabilities > 0
    logarithm = jnp.log(jnp.where(is_positive, probabilities, 1))
    # NaN, of no valid draw, is not above 0 and must stay.
    return -jnp.where(jnp.isnan(probabilities), jnp.nan, probabilities * logarithm).sum(-1)

"""From answers under perturbed inputs to the variances that the propagation model relates.

Every case is asked with the image varied (branch image), the text varied (text) and both (joint). An answer is a
distribution over classes: the model's own probabilities of the options, or one-hot for sampled text.

Source: MUPM, arXiv:2507.12945, and its public code, steps b2 of the method. Deviation: probabilities are the preferred
readout; one-hot answers hold the noise of decoding in every variance, which `noise` (V_0) measures.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxmed.metrics.uncertainty import draw_covariance, draw_variance
from jaxmed.systems.mupm.regression import make_design, predict

BRANCHES = ("image", "text", "joint")
Covariance = Literal["geometric", "empirical"]


class Variances(NamedTuple):
    """Variances of the answers to each case, per class; NaN where a branch has fewer than two answers.

    Attributes:
        image: V_I.
        text: V_T.
        covariance: C.
        joint: V.
    """

    image: Float[Array, "case class"]
    text: Float[Array, "case class"]
    covariance: Float[Array, "case class"]
    joint: Float[Array, "case class"]


def index_layout(draws: int) -> list[tuple[str, int]]:
    """Return branch and draw of every question about a case in the released order; draw 0 is the unperturbed input.

    With 20 draws: 0 to 20 vary the image, 21 to 41 the text, 42 to 62 both.
    """
    return [(branch, draw) for branch in BRANCHES for draw in range(draws + 1)]


def branch_variances(
    answers: Float[Array, "case 3 draw class"],
    is_valid: Bool[Array, "case 3 draw"],
    kind: Covariance = "geometric",
    noise: Float[Array, "case class"] | None = None,
) -> Variances:
    """Return V_I, V_T, C and V.

    Args:
        answers: Distributions over classes, of branches image, text and joint.
        is_valid: Draws that were answered.
        kind: C is sqrt(V_I V_T), the released surrogate, which is no covariance; or the covariance of answers to image
            r and to text r, which tells something only where the joint branch pairs these very draws.
        noise: V_0, the variance under identical inputs, taken off all three variances. What falls below 0 by it
            stays so in them, and counts as 0 in the geometric C.
    """
    image, text, joint = (draw_variance(answers[:, branch], is_valid[:, branch]) for branch in range(3))
    if noise is not None:
        image, text, joint = image - noise, text - noise, joint - noise
    if kind == "empirical":
        both = is_valid[:, 0] & is_valid[:, 1]
        covariance = draw_covariance(answers[:, 0], answers[:, 1], both)
    else:
        covariance = jnp.sqrt(jnp.maximum(image, 0) * jnp.maximum(text, 0))
    return Variances(image, text, covariance, joint)


def redraw_predictions(
    key: Key[Array, ""],
    answers: Float[Array, "case 3 draw class"],
    is_valid: Bool[Array, "case 3 draw"],
    coefficients: Float[Array, "3"],
    kind: Covariance,
    number: int,
) -> Float[Array, "resample case"]:
    """Return how the predicted joint variance of each case, summed over classes, varies with the draws.

    The draws of a case are resampled with replacement, within each branch. A variance of a resample is n / (n - 1)
    times too small on average, which is corrected.

    Args:
        key: Consumed.
        answers: As in `branch_variances`.
        is_valid: Draws that were answered.
        coefficients: Of V_I, V_T and C; they stay as they are.
        kind: Of C.
        number: Resamples.
    """
    counts = is_valid.sum(-1)
    inflation = jnp.where(counts > 1, counts / jnp.maximum(counts - 1, 1), 1.0)[:, :2, None].astype(answers.dtype)
    # Valid draws come first in this order, so that a number below their count names one.
    order = jnp.argsort(~is_valid, axis=-1, stable=True)

    def resample(one: Array) -> Array:
        uniform = jax.random.uniform(one, (2, is_valid.shape[0], is_valid.shape[2]))
        numbers = [jnp.floor(uniform[branch] * counts[:, branch, None]).astype(int) for branch in range(2)]
        places = [jnp.take_along_axis(order[:, branch], number, axis=1) for branch, number in enumerate(numbers)]
        if kind == "empirical":  # pairs of draws stay together
            places[1] = places[0]
        drawn = [
            jnp.take_along_axis(answers[:, branch], place[..., None], axis=1) for branch, place in enumerate(places)
        ]
        found = branch_variances(jnp.stack([*drawn, drawn[0]], 1), is_valid, kind)
        image, text = found.image * inflation[:, 0], found.text * inflation[:, 1]
        covariance = found.covariance * jnp.sqrt(inflation[:, 0] * inflation[:, 1])
        return predict(coefficients, make_design(image, text, covariance)).sum(-1)

    # One resample at a time: all at once would hold every answer `number` times.
    return jax.lax.map(resample, jax.random.split(key, number))


def count_calls(draws: int) -> dict[str, int]:
    """Return calls of the model per case: with the joint branch as released, and where it is predicted.

    The released code asks the unperturbed question once per branch; predicted, one such answer serves both.
    """
    return {"measured": 3 * (draws + 1), "predicted": 2 * draws + 1}

"""The propagation model: V = b1 V_I + b2 V_T + b3 C without an intercept, over rows of cases and classes.

Everything is a function of arrays. A fit needs only the products of a case's predictors with each other and with its V
(`case_products`), so that a refit on any weighting of cases is one small matrix product and one 3 x 3 solve: 10,000
bootstrap refits of 50 cases take milliseconds (tests/systems/test_mupm_regression.py holds them under a second).

Source: MUPM, arXiv:2507.12945, and its public code. Deviations: the released fit is scored on the rows that it was made
of; here scores are of held-out subjects. Ridge, non-negative fits, weights and the bootstrap over subjects are ours.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from jaxmed.config import NonNegative, Positive, checked
from jaxmed.metrics.statistics import Interval, bootstrap_all
from jaxmed.solvers.least_squares import invert_positive, solve_nonnegative, solve_regular

Values: TypeAlias = Real[Array | np.ndarray, "case class"]
PREDICTORS = ("image", "text", "covariance")


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How coefficients are fitted.

    Attributes:
        method: "ols" (the paper's), "nonnegative" (no coefficient below 0) or "ridge".
        ridge: Of method ridge: what is added to the diagonal of the normal matrix, relative to its mean.
        weighting: "equal" rows, or "inverse": a row counts 1 / (V + floor), so that small variances matter as much.
        floor: Of weighting inverse.
    """

    method: Literal["ols", "nonnegative", "ridge"] = "ols"
    ridge: NonNegative = 1e-6
    weighting: Literal["equal", "inverse"] = "equal"
    floor: Positive = 1e-3


class Scores(NamedTuple):
    """How near predicted variances are.

    Attributes:
        r2: Explained share of the rows' spread about their mean, as scikit-learn has it.
        r2_nonzero: The same on rows whose variance is above 0: rows of zeros, most of a one-hot readout, inflate it.
        r2_case: The same on sums over the classes of a case.
        mae: Mean absolute error of the rows.
        mse: Mean squared error of the rows.
    """

    r2: Float[Array, ""]
    r2_nonzero: Float[Array, ""]
    r2_case: Float[Array, ""]
    mae: Float[Array, ""]
    mse: Float[Array, ""]


class Fit(NamedTuple):
    """A fitted propagation model.

    Attributes:
        coefficients: Of V_I, V_T and C; not finite where the three cannot be told apart.
        scores: On the rows of the fit itself: no measure of how it does elsewhere.
        vif: Variance inflation of each coefficient, without an intercept as the model is: 1 where a predictor is
            orthogonal to the others. C is a function of V_I and V_T, so these are never small.
        condition: Condition number of the predictors, scaled to equal length.
    """

    coefficients: Float[Array, "3"]
    scores: Scores
    vif: Float[Array, "3"]
    condition: Float[Array, ""]


class Products(NamedTuple):
    """What a fit needs of every case.

    Attributes:
        gram: Products of predictors with each other, summed over classes.
        cross: Products of predictors with V.
    """

    gram: Float[Array, "case predictor predictor"]
    cross: Float[Array, "case predictor"]


def fit(v_image: Values, v_text: Values, covariance: Values, v: Values, config: FitConfig | None = None) -> Fit:
    """Fit V = b1 V_I + b2 V_T + b3 C, one row per case and class.

    jax.jit, jax.vmap and jax.grad go through.

    Args:
        v_image: Variance of the answers when the image alone is varied (probability squared).
        v_text: Variance when the text alone is varied.
        covariance: The interaction, such as sqrt(v_image v_text).
        v: Variance when both are varied.
        config: Method and weights; ordinary least squares by default.

    Source: MUPM's code: no intercept, coefficients shared by all cases and classes.
    """
    config = config or FitConfig()
    design = make_design(v_image, v_text, covariance)
    target = jnp.asarray(v, design.dtype)
    products = case_products(design, target, config)
    gram, cross = products.gram.sum(0), products.cross.sum(0)
    coefficients = solve(gram[None], cross[None], config)[0]
    length = jnp.sqrt(jnp.diagonal(gram))
    scaled = gram / (length[:, None] * length)
    # jnp.linalg.cond is not differentiable where singular values meet; eigenvalues of 3 x 3 are as good here.
    eigenvalues = jnp.linalg.eigvalsh(scaled)
    condition = jnp.sqrt(eigenvalues[-1] / jnp.maximum(eigenvalues[0], jnp.finfo(scaled.dtype).tiny))
    vif = jnp.diagonal(invert_positive(scaled[:, :, None])[..., 0])
    return Fit(coefficients, score(target, predict(coefficients, design)), vif, condition)


def make_design(v_image: Values, v_text: Values, covariance: Values) -> Float[Array, "case class 3"]:
    """Stack the three predictors."""
    kind = jnp.result_type(float, *(jnp.asarray(part).dtype for part in (v_image, v_text, covariance)))
    return jnp.stack([jnp.asarray(part, kind) for part in (v_image, v_text, covariance)], axis=-1)


def predict(
    coefficients: Float[Array, "*batch predictor"], design: Float[Array, "case class predictor"]
) -> Float[Array, "*batch case class"]:
    """Return the predicted joint variance of every case and class: no joint answer is needed for it."""
    # Accelerators would round a plain product to three digits.
    return jnp.einsum("...p,nkp->...nk", coefficients, design, precision="highest")


def case_products(
    design: Float[Array, "case class predictor"], v: Float[Array, "case class"], config: FitConfig
) -> Products:
    """Return what a fit needs of every case."""
    weights = 1 / (v + config.floor) if config.weighting == "inverse" else jnp.ones_like(v)
    weighted = design * weights[..., None]
    gram = jnp.einsum("nkp,nkq->npq", weighted, design, precision="highest")
    return Products(gram, jnp.einsum("nkp,nk->np", weighted, v, precision="highest"))


def refit(
    products: Products, weights: Float[Array, "resample case"], config: FitConfig
) -> Float[Array, "resample predictor"]:
    """Fit on every weighting of the cases: 0 leaves a case out, 2 counts it twice; NaN where that does not decide."""
    gram = jnp.einsum("rn,npq->rpq", weights, products.gram, precision="highest")
    cross = jnp.einsum("rn,np->rp", weights, products.cross, precision="highest")
    found = solve(gram, cross, config)
    return jnp.where(jnp.isfinite(found).all(-1, keepdims=True), found, jnp.nan)


def solve(
    gram: Float[Array, "problem predictor predictor"], cross: Float[Array, "problem predictor"], config: FitConfig
) -> Float[Array, "problem predictor"]:
    """Solve normal equations by the method of the configuration; not finite where they have no single solution."""
    size = gram.shape[-1]
    if config.method == "ridge":
        mean = jnp.diagonal(gram, axis1=1, axis2=2).mean(-1)
        gram = gram + config.ridge * mean[:, None, None] * jnp.eye(size, dtype=gram.dtype)
    # Predictors of equal length: what is left of the conditioning is their angles.
    length = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    gram, cross = gram / (length[:, :, None] * length[:, None, :]), cross / length
    if config.method == "nonnegative":
        return solve_nonnegative(gram, cross) / length
    return solve_regular(gram, cross) / length


def score(
    v: Float[Array, "case class"],
    predicted: Float[Array, "case class"],
    is_counted: Bool[Array, " case"] | None = None,
) -> Scores:
    """Score predicted variances on the counted cases, all by default."""
    counted = jnp.ones(len(v), bool) if is_counted is None else is_counted
    rows = jnp.broadcast_to(counted[:, None], v.shape)
    number = rows.sum()
    errors = jnp.where(rows, predicted - v, 0)
    return Scores(
        _explained(v, predicted, rows),
        _explained(v, predicted, rows & (v > 0)),
        _explained(v.sum(-1), predicted.sum(-1), counted),
        jnp.abs(errors).sum() / number,
        (errors**2).sum() / number,
    )


def _explained(truth: Array, values: Array, is_counted: Array) -> Array:
    number = is_counted.sum()
    mean = jnp.where(is_counted, truth, 0).sum() / number
    spread = jnp.where(is_counted, (truth - mean) ** 2, 0).sum()
    error = jnp.where(is_counted, (values - truth) ** 2, 0).sum()
    return jnp.where(spread > 0, 1 - error / jnp.where(spread > 0, spread, 1), jnp.nan)


def held_out(
    design: Float[Array, "case class predictor"],
    v: Float[Array, "case class"],
    folds: Int[Array, " case"],
    num_folds: int,
    config: FitConfig,
) -> Float[Array, "case class"]:
    """Predict every case by a fit on the cases of the other folds.

    Args:
        design: Predictors.
        v: What is to be predicted.
        folds: Fold of every case; cases of one subject have one fold.
        num_folds: How many there are.
        config: Of the fits.
    """
    weights = (folds != jnp.arange(num_folds)[:, None]).astype(design.dtype)
    coefficients = refit(case_products(design, v, config), weights, config)
    return jnp.einsum("np,nkp->nk", coefficients[folds], design, precision="highest")


def few_cases(
    design: Float[Array, "case class predictor"],
    v: Float[Array, "case class"],
    subsets: Bool[Array, "subset case"],
    config: FitConfig,
) -> tuple[Float[Array, "subset predictor"], Float[Array, " subset"]]:
    """Fit on subsets of the cases.

    Returns:
        Coefficients of every subset, and R2 on the cases outside it; NaN where a subset does not decide on three
        coefficients, or leaves none out.
    """
    coefficients = refit(case_products(design, v, config), subsets.astype(design.dtype), config)

    def rest(one: Array, subset: Array) -> Array:
        return score(v, predict(one, design), ~subset).r2

    return coefficients, jax.vmap(rest)(coefficients, subsets)


def coefficient_intervals(
    design: Float[Array, "case class predictor"],
    v: Float[Array, "case class"],
    subjects: Sequence[str],
    config: FitConfig,
    *,
    seed: int,
    resamples: int,
) -> dict[str, Interval]:
    """Return 95 % intervals of the coefficients from refits on resampled subjects; on the host.

    Raises:
        InputError: There are fewer than two subjects, or most resamples do not decide on the coefficients.
    """
    products = case_products(design, v, config)
    # One program for all resamples: eagerly, each of its forty operations would be dispatched by itself.
    program = jax.jit(partial(refit, config=config))

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = np.asarray(program(products, jnp.asarray(weights, design.dtype)), np.float64)
        return dict(zip(PREDICTORS, found.T, strict=True))

    return bootstrap_all(statistics, np.array(subjects), seed=seed, num_resamples=resamples)

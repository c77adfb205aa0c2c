"""Linear probes on features that stay as they are: L2 logistic regression, or ridge for regression.

On the host, by scikit-learn. Features are standardised over the training records, and the strength of the penalty is
the one with the lowest loss on validation records, for every label (or target) on its own.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from jaxmed.arrays.task import TaskKind
from jaxmed.objectives.supervised import task_losses

# Factors C on the sum of the losses beside half the squared norm of the coefficients.
STRENGTHS = tuple(10.0**power for power in range(-6, 3))
ITERATIONS = 10_000


class Probe(NamedTuple):
    """A linear map of features to logits.

    Attributes:
        kernel: Coefficients on features as they come: the standardisation is folded in.
        bias: Constants.
        chosen: The chosen factor of every label or target; one for all classes of a multi-class task.
        strengths: Factors that were tried.
        losses: Of every factor (down) for every label or target (across): mean loss on validation records.
    """

    kernel: Float[np.ndarray, "feature output"]
    bias: Float[np.ndarray, " output"]
    chosen: tuple[float, ...]
    strengths: tuple[float, ...]
    losses: Float[np.ndarray, "strength column"]


def fit_probe(
    kind: TaskKind,
    features: Float[np.ndarray, "record feature"],
    targets: Float[np.ndarray, "record column"],
    validation_features: Float[np.ndarray, "other feature"],
    validation_targets: Float[np.ndarray, "other column"],
    weights: Float[np.ndarray, " output"],
    importance: Float[np.ndarray, " record"] | None = None,
) -> Probe:
    """Fit a probe for every strength and keep the best.

    Args:
        kind: Of the task.
        features: Of the training records.
        targets: As for `objectives.supervised.task_losses`, NaN where missing.
        validation_features: Of the records that choose the strength.
        validation_targets: Their targets.
        weights: Of positives or classes.
        importance: How much each training record counts, about 1; None for all alike.

    Source: TANGERINE, arXiv:2507.01881, names no probe; this is the linear-probe protocol of CLIP, arXiv:2103.00020,
        appendix A.3, on standardised features.
    """
    mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    inside, outside = ((values - mean) / spread for values in (features, validation_features))
    each = np.ones(len(features)) if importance is None else importance.astype(np.float64)
    kernels, biases, chosen, table = [], [], [], []
    for column in range(targets.shape[1]):
        known = np.isfinite(targets[:, column])
        here = weights if kind == "multiclass" else weights[column : column + 1]
        # A step of L-BFGS is a few small products: on busy cores BLAS's threads waited for one another ten times as
        # long as one takes alone (142 s and 14 s for 54 fits of 325 coefficients to 960 records).
        with threadpool_limits(1, "blas"):
            own = inside[known], targets[known, column], here
            fits = [_fit(kind, *own, strength, each[known]) for strength in STRENGTHS]
        wanted = jnp.asarray(validation_targets[:, column : column + 1], jnp.float32)
        losses = []
        for kernel, bias in fits:
            logits = jnp.asarray(outside @ kernel + bias, jnp.float32)
            loss = task_losses(kind, logits, wanted, jnp.asarray(here, jnp.float32))
            losses.append(float(np.mean(np.asarray(loss), dtype=np.float64)))
        best = int(np.argmin(losses))
        kernels.append(fits[best][0])
        biases.append(fits[best][1])
        chosen.append(STRENGTHS[best])
        table.append(losses)
    kernel, bias = np.concatenate(kernels, axis=1), np.concatenate(biases)
    kernel = kernel / spread[:, None]
    constants = (bias - mean @ kernel).astype(np.float32)
    return Probe(kernel.astype(np.float32), constants, tuple(chosen), STRENGTHS, np.array(table).T)


def _fit(
    kind: TaskKind,
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    strength: float,
    importance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients [feature, output] and constants of one strength."""
    if kind == "regression":
        ridge: Any = Ridge(alpha=1 / (2 * strength)).fit(features, targets, importance)
        return ridge.coef_[:, None], np.atleast_1d(ridge.intercept_)
    if kind == "multiclass":
        balance = {label: float(weight) for label, weight in enumerate(weights)}
    else:
        balance = {0: 1.0, 1: float(weights[0])}
    model: Any = LogisticRegression(C=strength, class_weight=balance, max_iter=ITERATIONS)
    model.fit(features, targets.astype(np.int64), importance)
    kernel, bias = model.coef_.T, model.intercept_
    if kind == "multiclass" and kernel.shape[1] == 1:  # of two classes scikit-learn gives the second's log odds alone
        kernel, bias = np.concatenate([-kernel, kernel], axis=1) / 2, np.concatenate([-bias, bias]) / 2
    return kernel, bias

"""A Gaussian mixture as a diffusion prior: everything a network would have to learn, in closed form.

Noised to alpha x_0 + sigma eps a mixture stays a mixture, so its denoiser is known. Samplers and posterior methods are
checked against it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Mixture(NamedTuple):
    """Weights, means, and covariances by their eigenvectors.

    Attributes:
        log_weights: Logarithms of the weights of the modes; sum to 1 after exponentiation.
        means: Means of the modes.
        variances: Eigenvalues of the covariances; zero where a mode has no extent.
        axes: Eigenvectors, one per column; absent where all are the coordinate axes, as images want it.
    """

    log_weights: Float[Array, " mode"]
    means: Float[Array, "mode dim"]
    variances: Float[Array, "mode dim"]
    axes: Float[Array, "mode dim dim"] | None = None


def make_isotropic(
    weights: Float[Array, " mode"], means: Float[Array, "mode dim"], std: Float[Array, " mode"]
) -> Mixture:
    """Return a mixture of round Gaussians, for points as large as images."""
    variances = jnp.broadcast_to(jnp.square(std)[:, None], means.shape)
    return Mixture(_normalise(jnp.log(weights)), means, variances)


def responsibilities(
    mixture: Mixture, x: Float[Array, "sample dim"], alpha: Float[Array, " sample"], sigma: Float[Array, " sample"]
) -> Float[Array, "sample mode"]:
    """Return the probability of each mode given the noisy points."""
    return jax.nn.softmax(_log_parts(mixture, x, alpha, sigma), axis=1)


def denoise(
    mixture: Mixture, x: Float[Array, "sample dim"], alpha: Float[Array, " sample"], sigma: Float[Array, " sample"]
) -> Float[Array, "sample dim"]:
    """Return E[x_0 | alpha x_0 + sigma eps = x]."""
    total = _total(mixture, alpha, sigma)
    pulled = _turn(mixture, x, alpha) * (alpha[:, None, None] * mixture.variances) / total
    if mixture.axes is not None:
        pulled = jnp.einsum("mij,smj->smi", mixture.axes, pulled)
    share = responsibilities(mixture, x, alpha, sigma)
    return jnp.einsum("sm,smi->si", share, mixture.means + pulled)


def _log_parts(mixture, x, alpha, sigma):
    """Log of weight times density of each mode, (sample, mode)."""
    total = _total(mixture, alpha, sigma)
    distance = jnp.sum(jnp.square(_turn(mixture, x, alpha)) / total + jnp.log(2 * jnp.pi * total), axis=2)
    return mixture.log_weights - 0.5 * distance


def _turn(mixture, x, alpha):
    """Offsets from the modes along their axes, (sample, mode, dim)."""
    offset = x[:, None] - alpha[:, None, None] * mixture.means
    return offset if mixture.axes is None else jnp.einsum("mij,smi->smj", mixture.axes, offset)


def _total(mixture, alpha, sigma):
    """Variances of the noisy modes along their axes, (sample, mode, dim)."""
    return jnp.square(alpha)[:, None, None] * mixture.variances + jnp.square(sigma)[:, None, None]


def _normalise(log_weights):
    return log_weights - jax.nn.logsumexp(log_weights)

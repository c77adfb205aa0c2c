"""What is known of a Gaussian mixture in closed form: draws, density, score, posterior of a linear measurement."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.synthesis.phantoms.mixture import Mixture, _log_parts, _normalise, _total, _turn, responsibilities


def make_mixture(
    weights: Float[Array, " mode"], means: Float[Array, "mode dim"], covariances: Float[Array, "mode dim dim"]
) -> Mixture:
    """Return a mixture of Gaussians with full covariances; weights need not sum to 1."""
    variances, axes = jnp.linalg.eigh(covariances)
    return Mixture(_normalise(jnp.log(weights)), means, jnp.maximum(variances, 0.0), axes)


def draw(key: KeyArray, mixture: Mixture, count: int) -> tuple[Float[Array, "sample dim"], Int[Array, " sample"]]:
    """Draw points, and the modes they come from."""
    mode_key, point_key = jax.random.split(key)
    modes = jax.random.categorical(mode_key, mixture.log_weights, shape=(count,))
    noise = jax.random.normal(point_key, (count, mixture.means.shape[1]), mixture.means.dtype)
    offsets = jnp.sqrt(mixture.variances)[modes] * noise
    if mixture.axes is not None:
        offsets = jnp.einsum("sij,sj->si", mixture.axes[modes], offsets)
    return mixture.means[modes] + offsets, modes


def log_density(
    mixture: Mixture, x: Float[Array, "sample dim"], alpha: Float[Array, " sample"], sigma: Float[Array, " sample"]
) -> Float[Array, " sample"]:
    """Return log p(x) of alpha x_0 + sigma eps; alpha = 1, sigma = 0 is the mixture itself."""
    return jax.nn.logsumexp(_log_parts(mixture, x, alpha, sigma), axis=1)


def score(
    mixture: Mixture, x: Float[Array, "sample dim"], alpha: Float[Array, " sample"], sigma: Float[Array, " sample"]
) -> Float[Array, "sample dim"]:
    """Return the gradient of `log_density` by x."""
    pushed = -_turn(mixture, x, alpha) / _total(mixture, alpha, sigma)
    if mixture.axes is not None:
        pushed = jnp.einsum("mij,smj->smi", mixture.axes, pushed)
    return jnp.einsum("sm,smi->si", responsibilities(mixture, x, alpha, sigma), pushed)


def posterior(
    mixture: Mixture,
    matrix: Float[Array, "row dim"],
    measurement: Float[Array, " row"],
    noise_std: float | Float[Array, ""],
) -> Mixture:
    """Return the mixture given y = A x_0 + noise.

    Args:
        mixture: A mixture of few dimensions.
        matrix: A.
        measurement: y.
        noise_std: Standard deviation of the white noise in y, positive.

    Source: Bishop, Pattern Recognition and Machine Learning, section 2.3.3.
    """

    def condition(log_weight, mean, covariance):
        seen = matrix @ covariance @ matrix.T + jnp.square(noise_std) * jnp.eye(len(matrix), dtype=mean.dtype)
        gain = jnp.linalg.solve(seen, matrix @ covariance).T
        surprise = measurement - matrix @ mean
        log_weight += jax.scipy.stats.multivariate_normal.logpdf(measurement, matrix @ mean, seen)
        return log_weight, mean + gain @ surprise, covariance - gain @ matrix @ covariance

    log_weights, means, covariances = jax.vmap(condition)(
        mixture.log_weights, mixture.means, covariance_matrices(mixture)
    )
    variances, axes = jnp.linalg.eigh(0.5 * (covariances + covariances.mT))
    return Mixture(_normalise(log_weights), means, jnp.maximum(variances, 0.0), axes)


def covariance_matrices(mixture: Mixture) -> Float[Array, "mode dim dim"]:
    """Return the covariances of the modes."""
    if mixture.axes is None:
        return jax.vmap(jnp.diag)(mixture.variances)
    return jnp.einsum("mij,mj,mkj->mik", mixture.axes, mixture.variances, mixture.axes)

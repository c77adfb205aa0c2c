"""The Rician distribution of magnitude images: density, the score's pseudo-data, and Fisher information."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Float

TABLE_END = 16.0
"""Signal-to-noise ratio beyond which the information's asymptote 1 - 1 / (2 snr^2) is exact to 1e-5."""


def log_rician(
    measured: Float[Array, "*batch"],
    predicted: Float[Array, "*batch"],
    sigma: Float[Array, "*#batch"],
) -> Float[Array, "*batch"]:
    """Return the log density of a Rician magnitude.

    log I0 is computed as log(i0e(z)) + z, finite for every z; I0 itself overflows beyond z = 90 in float32.

    Source: Gudbjartsson and Patz, MRM 1995, equation 1.
    """
    z = measured * predicted / sigma**2
    gaussian = -((measured - predicted) ** 2) / (2 * sigma**2)
    # The exponent -(m^2 + s^2) / 2 sigma^2 + z is gaussian: cancelling by hand keeps float32 exact at high SNR.
    return jnp.log(measured / sigma**2) + gaussian + jnp.log(jax.scipy.special.i0e(z))


def cost_and_target(
    measured: Float[Array, "*batch"], predicted: Float[Array, "*batch"], precision: Float[Array, "*#batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return the part of -log p that depends on the prediction, and the pseudo-data of its least squares.

    The derivative of the cost by the prediction is (predicted - target) times the precision: the expectation over the
    unknown phase turns the likelihood into least squares on target = m I1(z) / I0(z), z = m s / sigma^2.

    Args:
        measured: Magnitudes, not negative.
        predicted: Noise-free signals.
        precision: 1 / sigma^2.
    """
    z = measured * predicted * precision
    scaled = i0e(z)
    cost = 0.5 * precision * (predicted - measured) ** 2 - jnp.log(scaled)
    return cost, measured * (i1e(z) / scaled)


def information(snr: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the Fisher information about the noise-free signal, times sigma^2: 1 at high snr, snr^2 near 0.

    Interpolated in a table, to 1e-4 of its value.
    """
    knots, ratios = _information_table()
    rising = jnp.interp(snr, knots, ratios) * (snr**2 / (1 + snr**2))
    return jnp.where(snr < TABLE_END, rising, 1 - 0.5 / jnp.maximum(snr, 1.0) ** 2)


@functools.lru_cache
def _information_table() -> tuple[np.ndarray, np.ndarray]:
    """Return signal-to-noise ratios, and the information over snr^2 / (1 + snr^2), which is near 1 everywhere."""
    knots = np.linspace(0.0, TABLE_END, 257)
    ratios = [integrate_information(snr) * (1 + snr**2) / snr**2 for snr in knots[1:]]
    return knots, np.array([1.0, *ratios])


def integrate_information(snr: float) -> float:
    """Integrate the Fisher information E[(m I1 / I0)^2] / sigma^2 - snr^2 over the density, in float64.

    Source: the score of a Rician is (m I1(z) / I0(z) - s) / sigma^2; its variance is the information.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    low, high = max(0.0, snr - 10.0), snr + 10.0
    m = low + (high - low) * (nodes + 1) / 2
    z = m * snr
    scaled = scipy.special.i0e(z)
    density = m * np.exp(-((m - snr) ** 2) / 2) * scaled
    score = m * scipy.special.i1e(z) / scaled - snr
    return float(np.sum(weights * (high - low) / 2 * density * score**2))

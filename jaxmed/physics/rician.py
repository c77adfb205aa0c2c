"""The Rician distribution of magnitude images: density, the score's pseudo-data, and Fisher information."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Float

SIGMA_FLOOR = 1e-3
"""Smallest noise level relative to S0: the Rician likelihood has no maximum without noise."""


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
    log_scaled, ratio = log_i0e_and_ratio(measured * predicted * precision)
    return 0.5 * precision * (predicted - measured) ** 2 - log_scaled, measured * ratio


# By powers of (z / 3.75)^2 for z up to 3.75: I0, and I1 / z.
_NEAR_I0 = (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813)
_NEAR_I1 = (0.5, 0.87890594, 0.51498869, 0.15084934, 0.02658733, 0.00301532, 0.00032411)
# By powers of 3.75 / z beyond: sqrt(z) exp(-z) times I0, and I1.
_FAR_I0 = (
    0.39894228,
    0.01328592,
    0.00225319,
    -0.00157565,
    0.00916281,
    -0.02057706,
    0.02635537,
    -0.01647633,
    0.00392377,
)
_FAR_I1 = (
    0.39894228,
    -0.03988024,
    -0.00362018,
    0.00163801,
    -0.01031555,
    0.02282967,
    -0.02895312,
    0.01787654,
    -0.00420059,
)


def log_i0e_and_ratio(z: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return log(I0(z) exp(-|z|)) and I1(z) / I0(z) together.

    In single precision by polynomials that are exact to 1e-6 and take a third of the time of both functions apart; in
    double precision, where such an error would show, by the functions themselves.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 9.8.1 to 9.8.4.
    """
    if z.dtype == jnp.float64:
        scaled = i0e(z)
        return jnp.log(scaled), i1e(z) / scaled
    size = jnp.abs(z)
    is_near = size < 3.75
    near, far = jnp.minimum(size / 3.75, 1.0) ** 2, 3.75 / jnp.maximum(size, 3.75)
    i0 = jnp.where(is_near, _polynomial(_NEAR_I0, near), _polynomial(_FAR_I0, far))
    i1 = jnp.where(is_near, size * _polynomial(_NEAR_I1, near), _polynomial(_FAR_I1, far))
    # One logarithm: of I0, or of its far form over sqrt(z).
    inside = jnp.where(is_near, i0, i0 * jax.lax.rsqrt(jnp.maximum(size, 3.75)))
    return jnp.log(inside) - jnp.where(is_near, size, 0.0), jnp.sign(z) * i1 / i0


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = coefficients[-1] + 0 * x
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def information(snr: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the Fisher information about the noise-free signal, times sigma^2: 1 at high snr, snr^2 near 0.

    With t = snr^2 / (1 + snr^2), which has the same limits, it is t times a polynomial in t that stays between 1 and
    1.07; exact to 2e-4 of its value.
    """
    t = snr**2 / (1 + snr**2)
    return t * _polynomial(_information_polynomial(), 2 * t - 1)


@functools.lru_cache
def _information_polynomial() -> tuple[float, ...]:
    """Fit the ratio at Chebyshev nodes of t up to a signal-to-noise ratio of 40, powers of 2 t - 1."""
    t = (np.cos(np.pi * (np.arange(200) + 0.5) / 200) + 1) / 2
    snr = np.minimum(np.sqrt(t / (1 - t)), 40.0)
    t = snr**2 / (1 + snr**2)
    ratio = integrate_information(snr) / t
    series = np.polynomial.chebyshev.chebfit(2 * t - 1, ratio, 8)
    return tuple(np.polynomial.chebyshev.cheb2poly(series).tolist())


def integrate_information(snr: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Integrate the Fisher information E[(m I1 / I0)^2] / sigma^2 - snr^2 over the density, in float64.

    Source: the score of a Rician is (m I1(z) / I0(z) - s) / sigma^2; its variance is the information.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    snr = snr[..., None]
    # A magnitude lies within 10 sigma of its signal, for all that double precision can see.
    low, high = np.maximum(snr - 10.0, 0.0), snr + 10.0
    m = low + (high - low) * (nodes + 1) / 2
    z = m * snr
    scaled = scipy.special.i0e(z)
    density = m * np.exp(-((m - snr) ** 2) / 2) * scaled
    score = m * scipy.special.i1e(z) / scaled - snr
    return np.sum(weights * (high - low) / 2 * density * score**2, axis=-1)

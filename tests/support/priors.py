"""Gaussian mixtures as denoisers, for tests of everything that a diffusion prior enters."""

import jax
import jax.numpy as jnp
import numpy as np
from mixtures import covariance_matrices, make_mixture

from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.schedule import Schedule
from jaxmed.synthesis.phantoms.mixture import Mixture, denoise


def random_mixture(seed: int, modes: int, dim: int, spread: float = 1.0) -> Mixture:
    """Modes at random places with full covariances of about unit size, in the precision that is switched on."""
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((modes, dim, dim)) / np.sqrt(dim)
    covariances = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(dim)
    weights = rng.uniform(0.5, 1.5, modes)
    means = spread * rng.standard_normal((modes, dim))
    return make_mixture(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(covariances))


def oracle(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """The exact denoiser of a mixture, on samples of any shape whose size is its dimension."""

    # Op by op, each operation would be compiled as a program of its own.
    @jax.jit
    def apply(x, t):
        flat = denoise(mixture, x.reshape(len(x), -1), schedule.alpha(t), schedule.sigma(t))
        return flat.reshape(x.shape).astype(x.dtype)

    return Denoiser(apply, schedule)


def times(schedule: Schedule, count: int) -> jax.Array:
    """Times all over a schedule's range."""
    return jnp.asarray(schedule.times(count))


def gaussian_mean(prior: Mixture, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x_0 | x_t] of a prior with one mode, rows of x, by solving with its covariance in NumPy."""
    mean, covariance = np.asarray(prior.means[0]), np.asarray(covariance_matrices(prior)[0])
    total = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
    return mean + alpha * (x - alpha * mean) @ np.linalg.solve(total, covariance)


MATRIX = np.array([[1.0, 0.5, 0.0], [0.0, 0.3, -0.8]])
"""A linear measurement of three numbers."""
MEASUREMENT = np.array([0.8, -0.5])

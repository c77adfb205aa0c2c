"""DiffPIR: a fit in closed form at every step, and the paper's recursion for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import MATRIX, MEASUREMENT, gaussian_mean, oracle, random_mixture

from jaxmed.diffusion.posterior.diffpir import Diffpir, diffpir
from jaxmed.diffusion.samplers import draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(200)
TIMES = (190.0, 120.0, 60.0, 20.0, 4.0)


def test_run_is_the_papers_recursion(key):
    with jax.enable_x64(True):
        prior, noise = random_mixture(8, 1, 3), 0.2
        config = Diffpir(noise, strength=3.0, renewal=0.3, solver_steps=2, times=TIMES)
        measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (4, 2))
        run = jax.jit(
            lambda: diffpir(
                key, oracle(prior, CHAIN), measurement, lambda x: jnp.asarray(MATRIX) @ x, jnp.zeros((4, 3)), config
            )
        )
        image, info = run()
        keys = sample_keys(key, jnp.arange(4))

        def noise_of(left):
            return np.asarray(draw_noise(keys, left, (3,), jnp.float64))

        levels = [(float(CHAIN.alpha(np.array([t]))[0]), float(CHAIN.sigma(np.array([t]))[0])) for t in TIMES]
        x = levels[0][1] * noise_of(5)
        for index, ((a, s), (a2, s2)) in enumerate(zip(levels, [*levels[1:], (1.0, 0.0)], strict=True)):
            mean = gaussian_mean(prior, x, a, s)
            weight = 3.0 * noise**2 / (s / a) ** 2
            np.testing.assert_allclose(info.step_sizes[index], weight, rtol=1e-9)
            # The minimiser of |y - A u|^2 + weight |u - mean|^2, by its normal equations.
            normal = MATRIX.T @ MATRIX + weight * np.eye(3)
            fitted = np.linalg.solve(normal, (MEASUREMENT @ MATRIX + weight * mean).T).T
            blend = np.sqrt(0.7) * (x - a * fitted) / s + np.sqrt(0.3) * noise_of(4 - index)
            x = a2 * fitted + s2 * blend
        np.testing.assert_allclose(image, x, rtol=1e-7, atol=1e-7)
        assert np.all(info.evaluations == 5)


def test_settings_out_of_range_are_named():
    for name, value in (
        ("noise_std", 0.0),
        ("strength", -1.0),
        ("renewal", 2.0),
        ("num_steps", 0),
        ("solver_steps", 0),
    ):
        with pytest.raises(ValueError, match=name):
            Diffpir(**{name: value})

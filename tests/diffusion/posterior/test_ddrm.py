"""DDRM: spectra that rebuild their operators, and runs equal to the paper's update direction by direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_operators import dense_spectrum, mask_spectrum
from priors import MATRIX, MEASUREMENT, gaussian_mean, oracle, random_mixture

from jaxmed.diffusion.posterior.ddrm import Ddrm, ddrm, separable_spectrum
from jaxmed.diffusion.samplers import draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.physics.operators import resize_matrix, separable

pytestmark = pytest.mark.core
CHAIN = VpDiscrete(200)
TIMES = (190.0, 120.0, 60.0, 20.0, 4.0)


@pytest.mark.parametrize("kind", ["separable", "dense", "mask"])
def test_spectra_rebuild_their_operators(kind):
    shape = (6, 4, 1)
    image = jax.random.normal(jax.random.key(0), shape)
    keep = np.random.default_rng(0).random(shape) > 0.4
    # Down along x, up along y: measurements with fewer and with more voxels than the image.
    matrices = [resize_matrix(6, 3, True), resize_matrix(4, 5, True)]
    match kind:
        case "separable":
            operator, spectrum = separable(matrices), separable_spectrum(matrices, shape)
        case "dense":
            operator = separable(matrices)
            spectrum = dense_spectrum(operator, shape)
        case _:
            operator, spectrum = lambda x: jnp.where(keep, x, 0.0), mask_spectrum(keep)
    coefficients = spectrum.to_coefficients(image)
    np.testing.assert_allclose(spectrum.to_image(coefficients), image, atol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(coefficients), jnp.linalg.norm(image), rtol=1e-5)
    # U^T A = S V^T, and the range of A is where S is not zero.
    np.testing.assert_allclose(spectrum.to_measured(operator(image)), spectrum.singular * coefficients, atol=2e-6)
    assert np.sum(spectrum.singular > 0) == (keep.sum() if kind == "mask" else 3 * 4)
    assert np.all(spectrum.singular >= 0)


def reference(prior, noise, eta, eta_b, draw):
    """Equations of the paper in NumPy: loops over samples and directions."""
    left, values, right = np.linalg.svd(MATRIX)
    singular = np.append(values, 0.0)
    measured = np.append(left.T @ MEASUREMENT, 0.0)
    alphas = [float(CHAIN.alpha(np.array([t]))[0]) for t in TIMES]
    ratios = [float(CHAIN.sigma(np.array([t]))[0]) / a for t, a in zip(TIMES, alphas, strict=True)] + [0.0]
    z = draw(5)
    u = np.zeros_like(z)
    for i in range(len(z)):
        for d in range(3):
            if singular[d] > 0 and ratios[0] >= noise / singular[d]:
                width = np.sqrt(ratios[0] ** 2 - (noise / singular[d]) ** 2)
                u[i, d] = measured[d] / singular[d] + width * z[i, d]
            else:
                u[i, d] = ratios[0] * z[i, d]
    for index, alpha in enumerate(alphas):
        now, after = ratios[index], ratios[index + 1]
        mean = gaussian_mean(prior, alpha * u @ right, alpha, alpha * now) @ right.T
        z, new = draw(4 - index), np.zeros_like(u)
        for i in range(len(z)):
            for d in range(3):
                fresh = eta * after * z[i, d]
                if singular[d] == 0:
                    drift = np.sqrt(1 - eta**2) * after * (u[i, d] - mean[i, d]) / now
                    new[i, d] = mean[i, d] + drift + fresh
                elif after < noise / singular[d]:
                    target = measured[d] / singular[d]
                    drift = np.sqrt(1 - eta**2) * after * (target - mean[i, d]) / (noise / singular[d])
                    new[i, d] = mean[i, d] + drift + fresh
                else:
                    target = measured[d] / singular[d]
                    width = np.sqrt(after**2 - (noise / singular[d] * eta_b) ** 2)
                    new[i, d] = (1 - eta_b) * mean[i, d] + eta_b * target + width * z[i, d]
        u = new
    return u @ right


@pytest.mark.parametrize(
    ("noise", "eta", "eta_b"),
    [
        pytest.param(0.0, 0.85, 1.0, marks=pytest.mark.slow),
        pytest.param(0.3, 0.85, 1.0, marks=pytest.mark.slow),
        (0.3, 0.6, 0.7),
    ],
)
def test_run_is_the_papers_update(noise, eta, eta_b, key):
    with jax.enable_x64(True):
        prior = random_mixture(8, 1, 3)
        # Directions come from the same decomposition, so that signs and order agree.
        spectrum = separable_spectrum([MATRIX], (3,))
        measurement = jnp.broadcast_to(jnp.asarray(MEASUREMENT), (4, 2))
        config = Ddrm(noise, eta, eta_b, times=TIMES)
        run = jax.jit(lambda: ddrm(key, oracle(prior, CHAIN), measurement, spectrum, jnp.zeros((4, 3)), config))
        image, info = run()
        keys = sample_keys(key, jnp.arange(4))
        expected = reference(
            prior, noise, eta, eta_b, lambda left: np.asarray(draw_noise(keys, left, (3,), jnp.float64))
        )
        np.testing.assert_allclose(image, expected, rtol=1e-8, atol=1e-8)
        assert np.all(info.evaluations == 5)
        if noise == 0:
            np.testing.assert_allclose(image @ MATRIX.T, measurement, atol=1e-10)


def test_settings_out_of_range_are_named():
    for name, value in (("noise_std", -1.0), ("eta", 2.0), ("eta_b", -0.1), ("num_steps", 0)):
        with pytest.raises(ValueError, match=name):
            Ddrm(**{name: value})

"""The data term against SciPy and the host's SSIM, its gradients, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from priors import oracle, random_mixture

from jaxmed.diffusion.posterior.fidelity import FIDELITY2026, PLAIN, Fidelity, evaluate, fidelity
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.metrics.imaging import ssim

pytestmark = pytest.mark.core

RNG = np.random.default_rng(0)


def smooth(shape):
    image = scipy.ndimage.gaussian_filter(RNG.normal(size=shape), 2.0)
    return (2 * (image - image.min()) / np.ptp(image)).astype(np.float32)


def expected(image, measurement, config):
    """The definition in double precision, patch by patch."""
    image, measurement = (np.asarray(x, np.float64)[..., 0] for x in (np.maximum(image, 0.0), measurement))
    residual = np.linalg.norm(measurement - image)
    ours, theirs = image / 2, measurement / 2

    def sobel(x):
        slopes = [scipy.ndimage.sobel(x, axis, mode="constant") for axis in range(x.ndim)]
        return np.sqrt(sum(slope**2 for slope in slopes) + 1e-7)

    edges = np.linalg.norm(sobel(theirs) - sobel(ours))
    patches = []
    for i in range(0, image.shape[0] - 31, 32):
        for j in range(0, image.shape[1] - 31, 32):
            window = slice(i, i + 32), slice(j, j + 32)
            patches.append(ssim(theirs[window], ours[window], data_range=1.0))
    dissimilarity = np.linalg.norm(1 - np.array(patches))
    return residual + config.edge_weight * edges + config.similarity_weight * dissimilarity, residual, len(patches)


@pytest.mark.parametrize("config", [Fidelity(), Fidelity(similarity_weight=0.5)], ids=["default", "similarity"])
def test_the_terms_are_their_definitions(config):
    # 70 voxels: two patches, and a rim that is not compared.
    image, measurement = smooth((64, 70))[..., None] - 0.1, smooth((64, 70))[..., None]
    loss, residual = jax.jit(lambda x, y: fidelity(x, y, lambda u: u, config))(image, measurement)
    true_loss, true_residual, num_patches = expected(image, measurement, config)
    assert num_patches == 4
    np.testing.assert_allclose(loss, true_loss, rtol=1e-5)
    np.testing.assert_allclose(residual, true_residual, rtol=1e-6)


def test_the_plain_term_takes_any_measurement():
    image = jnp.asarray([[-1.0, 2.0], [0.5, 0.0]])
    loss, residual = fidelity(image, jnp.ones(2), lambda x: x.sum(0), PLAIN)
    assert loss == residual
    # Negative values count as they are: nothing says that this is an image.
    np.testing.assert_allclose(loss, np.hypot(1.5, 1.0), rtol=1e-6)


def test_gradients_are_finite_where_the_fit_is_perfect_and_right_elsewhere():
    image = jnp.asarray(smooth((32, 32))[..., None])
    gradient = jax.jit(jax.grad(lambda x, y: fidelity(x, y, lambda u: u, FIDELITY2026)[0]))
    # Single precision leaves a similarity of 1 - 1e-7, whose root is not 0.
    assert np.all(np.isfinite(gradient(image, image)))
    assert np.all(np.isfinite(gradient(jnp.zeros_like(image), jnp.zeros_like(image))))
    with jax.enable_x64(True):
        x, y, direction = (jnp.asarray(smooth((32, 32))[..., None], jnp.float64) + 0.1 for _ in range(3))
        value = jax.jit(lambda x: fidelity(x, y, lambda u: u**0.8, FIDELITY2026)[0])
        slope = jax.jvp(value, (x,), (direction,))[1]
        numeric = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(slope, numeric, rtol=1e-7)


def test_a_volume_is_compared_in_three_dimensions():
    config = Fidelity(edge_weight=0.0, similarity_weight=1.0, patch=11)
    x, y = (smooth((11, 12, 11)) for _ in range(2))
    loss, residual = fidelity(jnp.asarray(x[..., None]), jnp.asarray(y[..., None]), lambda u: u, config)
    similarity = ssim(x[:, :11] / 2, y[:, :11] / 2, data_range=1.0)
    np.testing.assert_allclose(loss - residual, 1 - similarity, rtol=1e-4)


def test_images_too_small_for_a_window_are_refused():
    image = jnp.zeros((8, 32, 1))
    with pytest.raises(ValueError, match="expected 11 voxels or more"):
        fidelity(image, image, lambda u: u, FIDELITY2026)


@pytest.mark.parametrize("wrong", [{"edge_weight": -1.0}, {"window": 10}, {"window": 33}, {"window_sigma": 0.0}])
def test_impossible_terms_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Fidelity(**wrong)


def test_gradients_go_through_the_denoiser_sample_by_sample():
    denoiser = oracle(random_mixture(0, 2, 4), VpDiscrete())
    x, y = (jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    t = jnp.array([10.0, 300.0, 700.0])
    found = jax.jit(lambda x: evaluate(denoiser, y, lambda u: u * 2, PLAIN, x, t))(x)
    np.testing.assert_allclose(found.mean, denoiser.denoise(x, t), rtol=1e-6)
    np.testing.assert_allclose(found.residual, np.linalg.norm(y - 2 * found.mean, axis=1), rtol=1e-6)

    def one(x, y, t):
        return jnp.linalg.norm(y - 2 * denoiser.denoise(x[None], t[None])[0])

    np.testing.assert_allclose(found.gradient, jax.vmap(jax.grad(one))(x, y, t), rtol=1e-4, atol=1e-6)

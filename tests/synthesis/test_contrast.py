"""Contrasts: tables, mixtures, marginals, gamma (BrainFM specification, checks 6 and 7)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.synthesis.contrast import (
    CT_GROUPS,
    ContrastConfig,
    apply_gamma,
    draw_contrast,
    partial_volume_shares,
    render,
)

pytestmark = pytest.mark.core
KEYS = jax.random.split(jax.random.key(2), 2000)


@functools.cache
def tables(config=ContrastConfig(), is_photo=False):
    drawn = jax.jit(jax.vmap(lambda key: draw_contrast(key, config, is_photo)))(KEYS)
    return np.asarray(drawn.mean), np.asarray(drawn.std)


def test_tables_are_drawn_evenly():
    mean, std = tables()
    for label in (2, 3, 46, 99, 255):
        assert scipy.stats.kstest(mean[:, label], "uniform", (25, 200)).pvalue > 1e-3
        assert scipy.stats.kstest(std[:, label], "uniform", (5, 20)).pvalue > 1e-3
    assert abs(np.corrcoef(mean[:, 2], mean[:, 3])[0, 1]) < 0.1


def test_background_is_dark_half_of_the_time_and_always_in_photographs():
    mean, std = tables()
    share = (mean[:, 0] == 0).mean()
    assert scipy.stats.binomtest(int(share * 2000), 2000, 0.5).pvalue > 1e-3
    assert (std[:, 0] >= 5).all()
    assert (tables(is_photo=True)[0][:, 0] == 0).all()


def test_mixtures_have_mean_and_variance_of_their_classes():
    mean, std = tables()
    np.testing.assert_allclose(mean[:, 125], (mean[:, 1] + mean[:, 2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(std[:, 125] ** 2, (std[:, 1] ** 2 + std[:, 2] ** 2) / 2, rtol=1e-5)
    np.testing.assert_allclose(mean[:, 160], 0.8 * mean[:, 2] + 0.2 * mean[:, 3], rtol=1e-5)
    np.testing.assert_allclose(mean[:, 245], 0.1 * mean[:, 3] + 0.9 * mean[:, 4], rtol=1e-5)
    for label, pure in ((100, 1), (150, 2), (200, 3), (250, 4)):
        np.testing.assert_array_equal(mean[:, label], mean[:, pure])
    shares = partial_volume_shares()
    np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(shares[:100], np.eye(256)[:100])


def test_stated_means_are_those_of_every_image():
    mean, std = tables(ContrastConfig(means=((0, 10.0), (1, 40.0), (2, 200.0))))
    for label, value in ((0, 10.0), (1, 40.0), (2, 200.0), (125, 120.0)):
        np.testing.assert_allclose(mean[:, label], value, rtol=1e-5)
    assert np.ptp(mean[:, 3]) > 190 and np.ptp(std[:, 2]) > 19
    with pytest.raises(ValueError, match="means: expected each label once"):
        ContrastConfig(means=((2, 10.0), (2, 20.0)))


def test_ct_ties_the_labels_of_a_group():
    mean, _ = tables(ContrastConfig(ct_probability=1.0))
    for labels, base, width in CT_GROUPS:
        group = mean[:, list(labels)]
        assert (np.ptp(group, 1) == 0).all()
        assert scipy.stats.kstest(group[:, 0], "uniform", (base, width)).pvalue > 1e-3


def test_each_label_has_its_mean_and_spread(key):
    table_key, render_key = jax.random.split(key)
    contrast = jax.jit(draw_contrast)(table_key)
    # Far enough from zero that nothing is cut off.
    contrast = contrast._replace(mean=contrast.mean + 200)
    labels = jnp.repeat(jnp.array([2, 3, 77, 160]), 5000).reshape(4, 50, 100)
    draw = jax.jit(render)
    image = np.asarray(draw(render_key, labels, contrast))
    for row, label in enumerate((2, 3, 2, 160)):
        std = float(contrast.std[label])
        assert abs(image[row].mean() - float(contrast.mean[label])) < 4 * std / np.sqrt(5000)
        assert image[row].std() == pytest.approx(std, rel=0.05)
    dark = contrast._replace(mean=jnp.zeros(256))
    assert draw(render_key, labels, dark).min() == 0


def test_gamma_keeps_zero_and_its_fixed_point(key):
    image = jnp.array([0.0, 30.0, 150.0, 300.0])
    np.testing.assert_allclose(apply_gamma(key, image, 0.0), image, rtol=1e-6)
    bent = jax.jit(jax.vmap(lambda key: apply_gamma(key, image, 0.1)))(KEYS)
    np.testing.assert_array_equal(bent[:, 0], 0.0)
    np.testing.assert_allclose(bent[:, 3], 300.0, rtol=1e-6)
    exponents = np.log(np.log(np.asarray(bent[:, 2]) / 300) / np.log(0.5))
    assert exponents.std() == pytest.approx(0.1, rel=0.1) and abs(exponents.mean()) < 0.01
    slope = jax.jit(jax.grad(lambda image: apply_gamma(key, image, 0.5).sum()))(image)
    assert np.isfinite(np.asarray(slope)).all()


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="mean: expected a range in order"):
        ContrastConfig(mean=(30.0, 20.0))
    with pytest.raises(ValueError, match="ct_probability: expected a number from 0 to 1, found 1.5"):
        ContrastConfig(ct_probability=1.5)

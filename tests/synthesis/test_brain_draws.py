"""What the brain generator draws, without volumes (BrainFM specification, checks 6 to 8)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.data.subject_files import CUMULATIVE, thresholds_of
from jaxmed.synthesis.bias_field import draw_log_bias
from jaxmed.synthesis.brain_draws import (
    CT,
    INTENSITY,
    RELEASED_FLIP,
    SYNTHETIC,
    GeneratorConfig,
    draw_sample,
    draw_shared,
    draw_shares,
)

pytestmark = pytest.mark.core
NUM = 4000
KEYS = jax.random.split(jax.random.key(11), NUM)
SIZE = jnp.array([150, 180, 160], jnp.int32)
ALL = jnp.ones(4, bool)
HCP = jnp.array(CUMULATIVE["HCP"])
RELEASED = GeneratorConfig(match_release=True)


@functools.cache
def many(config=GeneratorConfig()):
    """Draw shared and own numbers for every key."""

    @jax.jit
    @jax.vmap
    def draw(key, present, read):
        shared_key, sample_key = jax.random.split(key)
        shared = draw_shared(shared_key, present, SIZE, read, config)
        severities = [config.severity(number) for number in range(config.samples)]
        own = [
            draw_sample(jax.random.fold_in(sample_key, n), present, shared, s, config) for n, s in enumerate(severities)
        ]
        return shared, own

    return lambda present=ALL, read=HCP: jax.tree.map(
        np.asarray, draw(KEYS, jnp.tile(present, (NUM, 1)), jnp.tile(read, (NUM, 1)))
    )


def counts(source):
    return np.bincount(source, minlength=5)


def is_share(found, expected):
    return scipy.stats.binomtest(int(np.sum(found)), len(found), expected).pvalue > 1e-3


@pytest.mark.parametrize("dataset", ["HCP", "AIBL", "OASIS3", "ISLES", "ADNI3"])
def test_each_modality_is_read_as_often_as_its_data_set_says(dataset):
    """The numbers are cumulative: T2 of HCP comes from .3333 to .6667."""
    read = np.array(CUMULATIVE[dataset])
    shares, before = np.zeros(5), 0.0
    for index, value in enumerate(read):
        shares[index] = max(value - before, 0)
        before = max(before, value)
    shares[SYNTHETIC] = 1 - before
    shared, _ = many()(read=jnp.array(read))
    found = counts(shared.source)
    assert (found[shares == 0] == 0).all()
    assert scipy.stats.chisquare(found[shares > 0], NUM * shares[shares > 0]).pvalue > 1e-3


def test_a_missing_modality_leaves_its_turn_to_the_next():
    """Without a T1 of HCP both thirds of its draw fall to T2, as in the source."""
    shared, _ = many()(present=jnp.array([False, True, False, False]))
    assert counts(shared.source)[[0, 2, 3]].sum() == 0 and is_share(shared.source == 1, 0.6667)
    none, _ = many()(present=jnp.zeros(4, bool))
    assert (none.source == SYNTHETIC).all()


def test_a_data_set_that_states_nothing_takes_the_configurations_numbers():
    shared, _ = many()(read=-jnp.ones(4))
    assert is_share(shared.source == 0, 0.5) and set(np.unique(shared.source)) == {0, SYNTHETIC}
    assert thresholds_of("Chinese-HCP") is None and thresholds_of("adni-3") == CUMULATIVE["ADNI3"]


def test_flips_are_even_and_those_of_the_release_are_not():
    assert is_share(many()()[0].is_flipped, 0.5)
    assert is_share(many(RELEASED)()[0].is_flipped, scipy.stats.norm.cdf(0.5))
    assert pytest.approx(scipy.stats.norm.cdf(0.5)) == RELEASED_FLIP
    hemisphere, _ = many(GeneratorConfig(hemisphere=True))()
    assert hemisphere.photo.is_on.all() and not hemisphere.is_flipped.any()


def test_photographs_and_dark_backgrounds_have_their_probabilities():
    """P(background = 0) = .5 + .5 P(photo); the resolution of a photograph is that of its slabs."""
    shared, (own,) = many()()
    assert is_share(shared.photo.is_on, 0.2)
    assert is_share(own.contrast.mean[:, 0] == 0, 0.5 + 0.5 * 0.2)
    on = shared.photo.is_on
    np.testing.assert_allclose(shared.acquisition.resolution[on, 1], shared.photo.spacing[on])
    low = GeneratorConfig(resolution=dataclasses.replace(GeneratorConfig().resolution, low_only=True))
    assert not many(low)()[0].photo.is_on.any()


def test_centres_use_the_room_that_the_subject_has():
    deformation = dataclasses.replace(GeneratorConfig().deformation, random_shift=True)
    shared, _ = many(GeneratorConfig(shape=(140, 200, 150), deformation=deformation))()
    assert np.abs(shared.affine.shift).max(0) == pytest.approx([5.0, 0.0, 5.0], abs=0.1)


def test_noise_depends_on_where_the_image_comes_from():
    shared, (own,) = many()()
    is_synthetic = shared.source == SYNTHETIC
    assert scipy.stats.kstest(own.noise_std[is_synthetic], "uniform", (5, 10)).pvalue > 1e-3
    assert scipy.stats.kstest(own.noise_std[~is_synthetic], "uniform", (0, 0.02 * INTENSITY)).pvalue > 1e-3
    shared, (own,) = many(RELEASED)()
    is_synthetic = shared.source == SYNTHETIC
    assert scipy.stats.kstest(own.noise_std[~is_synthetic], "uniform", (0, 0.02)).pvalue > 1e-3


def test_mild_images_have_less_noise_unless_the_release_overwrites_it():
    several = GeneratorConfig(read=(0.0, 0.0, 0.0, 0.0), samples=2, mild_samples=1)
    _, (mild, severe) = many(several)(read=-jnp.ones(4))
    assert mild.noise_std.max() <= 0.02 and severe.noise_std.min() >= 5
    assert (mild.contrast.mean[:, 2] != severe.contrast.mean[:, 2]).all()
    released = dataclasses.replace(several, match_release=True)
    _, (mild, severe) = many(released)(read=-jnp.ones(4))
    assert mild.noise_std.min() >= 5
    with pytest.raises(ValueError, match="mild_samples: expected at most samples, found 3 of 2"):
        dataclasses.replace(several, mild_samples=3)


def test_mild_bias_is_smaller_and_its_zoom_has_no_more_than_its_control_points():
    """Log fields have mean 0, no more than the drawn spread, and no energy above the control grid's Nyquist rate."""
    config, shape = GeneratorConfig(), (96, 1, 1)
    fields = {}
    for name, severity in (("mild", config.mild), ("severe", config.severe)):
        draw = jax.jit(jax.vmap(lambda key, severity=severity: draw_log_bias(key, shape, severity.bias)))
        fields[name] = np.asarray(draw(KEYS[:1500])).reshape(1500, -1)
    assert fields["mild"].std() < 0.1 * fields["severe"].std()
    assert config.mild.gamma < config.severe.gamma
    severe = fields["severe"]
    assert abs(severe.mean()) < 4 * severe.std() / np.sqrt(1500)
    assert severe.std() <= np.sqrt(np.mean(np.linspace(0.1, 0.6, 1000) ** 2))
    # At most round(.04 x 96) = 4 control points: piecewise linear, with at most 5 kinks.
    kinks = (np.abs(np.diff(severe, 2, axis=1)) > 1e-4).sum(1)
    assert kinks.max() <= 4 * 2


def test_mixtures_are_convex_and_never_hold_what_is_missing():
    present = jnp.array([True, False, True, True])
    draw = jax.jit(jax.vmap(lambda key: draw_shares(key, present)))
    shares = np.asarray(draw(KEYS))
    np.testing.assert_allclose(shares.sum(1), 1.0, rtol=1e-5)
    assert (shares[:, 2] == 0).all() and (shares[:, [0, 1, 3]] > 0).all()
    # v in U(0, 1)^3 normalised: each of three has a third on average.
    np.testing.assert_allclose(shares[:, [0, 1, 3]].mean(0), 1 / 3, atol=0.01)


def test_synthetic_images_alone_are_mixed_and_a_fifth_of_them():
    shared, (own,) = many()()
    is_synthetic, is_mixed = shared.source == SYNTHETIC, own.shares[:, 0] < 1
    assert not is_mixed[~is_synthetic].any()
    assert is_share(is_mixed[is_synthetic], 0.2)
    assert own.shares.shape[1] == CT + 1  # synthetic, T1, T2, FLAIR: no CT
    _, (own,) = many(GeneratorConfig(mix=1.0))(present=jnp.zeros(4, bool))
    np.testing.assert_array_equal(own.shares, np.tile([1.0, 0, 0, 0], (NUM, 1)))

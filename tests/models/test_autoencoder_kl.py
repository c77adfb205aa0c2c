"""The KL autoencoder: sizes, shapes, ways to run it that must agree; MONAI's numbers are tested with its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, AutoencoderKlConfig, autoencoder

pytestmark = pytest.mark.core

CONFIG = AutoencoderKlConfig(dimensions=2, widths=(4, 8), blocks=(1, 1), latent_channels=2, groups=2)
IMAGE = jax.random.normal(jax.random.key(1), (2, 8, 6, 1))
MODEL = autoencoder(CONFIG)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IMAGE)


@pytest.fixture(scope="module")
def run():
    return jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def decode():
    return jax.jit(MODEL.decode)


def test_published_sizes():
    """From the shapes alone: no arrays are made."""
    model = autoencoder(COCOLIT_AUTOENCODER)
    image = jax.ShapeDtypeStruct((1, 128, 152, 128, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = jax.tree.leaves(shapes)
    assert (sum(leaf.size for leaf in leaves), len(leaves)) == (20_944_897, 130)
    mean, deviation = jax.eval_shape(model.encode, shapes, image)
    assert mean.shape == deviation.shape == (1, 32, 38, 32, 4)
    assert jax.eval_shape(model.decode, shapes, mean).shape == image.shape


def test_a_key_draws_the_latent_and_none_takes_the_mean(params, run, decode):
    image, mean, deviation = run(params, IMAGE)
    assert image.shape == IMAGE.shape and mean.shape == deviation.shape == (2, 4, 3, 2)
    assert bool((deviation > 0).all())
    np.testing.assert_allclose(image, decode(params, mean), atol=1e-5)
    key = jax.random.key(3)
    drawn, *_ = jax.jit(MODEL.apply)(params, IMAGE, key=key)
    latent = mean + deviation * jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(drawn, decode(params, latent), atol=1e-5)


def test_the_variance_is_cut_off(params, run):
    wild = {**params, "to_log_variance": jax.tree.map(lambda leaf: 1e4 + 0 * leaf, params["to_log_variance"])}
    deviation = np.asarray(run(wild, IMAGE)[2])
    low, high = np.exp([-15.0, 10.0])
    assert set(np.round(np.log(deviation.ravel()), 3)) <= {-15.0, 10.0}
    assert low * 0.99 < deviation.min() and deviation.max() < high * 1.01


def test_images_of_a_batch_do_not_see_one_another(params, run):
    whole = run(params, IMAGE)[0]
    other = run(params, IMAGE.at[0].set(0.0))[0]
    np.testing.assert_allclose(other[1], whole[1], atol=1e-5)
    assert float(jnp.abs(other[0] - whole[0]).max()) > 1e-3


def test_images_are_volumes_of_one_repeated_plane(params, run):
    """3D against 2D: taps in one plane of every kernel, the first one where it halves, so that planes do not mix."""
    deep = autoencoder(dataclasses.replace(CONFIG, dimensions=3))
    volume = jnp.repeat(IMAGE[:, :, :, None], 2, axis=3)
    shapes = jax.eval_shape(deep.init, jax.random.key(0), volume)

    def thicken(path, leaf, wanted):
        if leaf.ndim == wanted.ndim:
            return leaf
        tap = 0 if path[1].key.startswith("down_") else wanted.shape[2] // 2
        return jnp.stack([leaf if number == tap else 0 * leaf for number in range(wanted.shape[2])], axis=2)

    thick = jax.tree.map_with_path(thicken, params, shapes)
    for found, expected in zip(jax.jit(deep.apply)(thick, volume), run(params, IMAGE), strict=True):
        for plane in range(found.shape[3]):
            np.testing.assert_allclose(found[:, :, :, plane], expected, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradient(params):
    def gradient(config):
        model = autoencoder(config)
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, IMAGE)[0]))))(params)

    plain, again = gradient(CONFIG), gradient(dataclasses.replace(CONFIG, remat=True))
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, float(jnp.abs(two).max())))
    assert all(bool(jnp.abs(leaf).max() > 0) for leaf in jax.tree.leaves(plain["decoder"]))


def test_bfloat16_is_close_and_the_result_float32(params, run):
    found = jax.jit(autoencoder(dataclasses.replace(CONFIG, dtype="bfloat16")).apply)(params, IMAGE)
    for one, two in zip(found, run(params, IMAGE), strict=True):
        assert one.dtype == jnp.float32
        assert float(jnp.linalg.norm(one - two) / jnp.linalg.norm(two)) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "blocks: expected a number for each of 0 widths"),
        ({"blocks": (2, 2)}, r"blocks: expected a number for each of 3 widths, found \(2, 2\)"),
        ({"widths": (48, 64, 64)}, "groups: expected a divisor of all of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKlConfig(**settings)


@pytest.mark.parametrize(("shape", "message"), [((1, 8, 8, 2), "and 1 channels"), ((1, 8, 1, 1), "2 voxels or more")])
def test_images_are_checked(params, shape, message):
    with pytest.raises(ValueError, match=message):
        MODEL.encode(params, jnp.zeros(shape))

"""Verifiers of masks: sizes of the reference, the two halves and the whole, images that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.mask_verifier import DEMO_VERIFIER, Joint, Plain, VerifierConfig, make_verifier


def test_the_plain_network_has_the_parameters_of_the_reference(key):
    image = jnp.zeros((1, 32, 32, 1))
    shapes = jax.eval_shape(make_verifier(DEMO_VERIFIER).init, key, image, image[..., 0])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 3_435_777


@pytest.fixture(scope="module", params=["joint", "plain"])
def judge(request):
    config = VerifierConfig(request.param, widths=(8, 16), dense=(8,))
    verifier = make_verifier(config)
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    masks = (jax.random.uniform(jax.random.key(2), (3, 8, 8)) < 0.5).astype(jnp.float32)
    params = verifier.init(jax.random.key(0), images, masks)
    # The last convolution of the U-Net starts at 0: such a verifier sees no image.
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return config, verifier, params, images, masks


def test_the_halves_make_the_whole(judge):
    config, verifier, params, images, masks = judge
    module = (Plain if config.kind == "plain" else Joint)(config)
    whole = module.apply({"params": params}, images, masks)
    parts = verifier.score(params, verifier.embed(params, images), masks)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_each_image_is_judged_by_itself(judge):
    _, verifier, params, images, masks = judge
    embedding = verifier.embed(params, images)
    together = verifier.score(params, embedding, masks)
    alone = [
        verifier.score(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], embedding), masks[i : i + 1])[0]
        for i in range(3)
    ]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=1e-5)


def test_image_and_mask_both_count(judge):
    _, verifier, params, images, masks = judge
    first = verifier.score(params, verifier.embed(params, images), masks)
    other_image = verifier.score(params, verifier.embed(params, images[::-1]), masks)
    other_mask = verifier.score(params, verifier.embed(params, images), 1 - masks)
    assert np.abs(first - other_image).max() > 1e-4 and np.abs(first - other_mask).max() > 1e-4


def test_volumes_are_judged(key):
    verifier = make_verifier(VerifierConfig(dimensions=3, widths=(8, 16)))
    images = jnp.zeros((2, 8, 8, 8, 1))
    params = jax.eval_shape(verifier.init, key, images, images[..., 0])
    embedding = jax.eval_shape(verifier.embed, params, images)
    assert jax.eval_shape(verifier.score, params, embedding, images[..., 0]).shape == (2,)

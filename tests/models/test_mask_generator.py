"""Segmenting networks: sizes of the reference, shapes in 2D and 3D, and refusals."""

import jax
import jax.numpy as jnp
import pytest

from jaxmed.models.mask_generator import DEMO_GENERATOR, GeneratorConfig, make_generator


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_plain_network_has_the_parameters_of_the_reference(key):
    shapes = jax.eval_shape(make_generator(DEMO_GENERATOR).init, key, jnp.zeros((1, 32, 32, 1)))
    assert count(shapes) == 314_817


@pytest.mark.parametrize("kind", ["unet", "plain"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_voxel_gets_a_logit(key, kind, dimensions):
    model = make_generator(GeneratorConfig(kind, dimensions, (8, 16)))
    images = jnp.zeros((2, *(8,) * dimensions, 1))
    params = jax.eval_shape(model.init, key, images)
    logits = jax.eval_shape(model.apply, params, images)
    assert logits.shape == images.shape[:-1] and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "name"), [({"widths": ()}, "widths"), ({"widths": (12, 24)}, "widths"), ({"blocks": 0}, "blocks")]
)
def test_impossible_sizes_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        GeneratorConfig(**settings)

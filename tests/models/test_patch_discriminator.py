"""The patch discriminator: published size, shapes, its norm; PyTorch's layers under the mark peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.patch_discriminator import (
    COCOLIT_DISCRIMINATOR,
    PatchDiscriminatorConfig,
    normalise_channels,
    patch_discriminator,
)

SMALL = PatchDiscriminatorConfig(dimensions=2, width=4, layers=2)


@pytest.mark.core
def test_published_size():
    model = patch_discriminator(COCOLIT_DISCRIMINATOR)
    image = jax.ShapeDtypeStruct((1, 128, 152, 128, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_770_977
    assert jax.eval_shape(model.apply, shapes, image).shape == (1, 14, 17, 14, 1)


@pytest.mark.core
def test_the_least_size_gives_one_logit_and_less_is_refused(key):
    model = patch_discriminator(SMALL)
    assert SMALL.least_size == 12 and COCOLIT_DISCRIMINATOR.least_size == 24
    image = jnp.zeros((1, 12, 13, 1))
    params = model.init(key, image)
    assert model.apply(params, image).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="expected 12 voxels or more"):
        model.apply(params, jnp.zeros((1, 11, 12, 1)))
    with pytest.raises(ValueError, match="expected 2 axes of space and 1 channels"):
        model.apply(params, jnp.zeros((1, 12, 12, 2)))


@pytest.mark.core
def test_channels_of_an_image_are_normalised_by_themselves(key):
    x = 3 * jax.random.normal(key, (2, 5, 4, 3)) + jnp.arange(3.0)
    found = np.asarray(normalise_channels(x))
    values = np.asarray(x, np.float64)
    expected = (values - values.mean((1, 2), keepdims=True)) / np.sqrt(values.var((1, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("config", [SMALL, PatchDiscriminatorConfig(width=4, layers=1)], ids=["2D", "3D"])
def test_logits_are_those_of_torch_layers(config, key):
    torch = pytest.importorskip("torch")
    flat = config.dimensions == 2
    convolve = torch.nn.functional.conv2d if flat else torch.nn.functional.conv3d
    model = patch_discriminator(config)
    image = jax.random.normal(key, (2, *(16, 15, 14)[: config.dimensions], 1))
    drawn = model.init(jax.random.key(1), image)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), drawn)

    def layer(x, name, stride):
        part = params[name]
        kernel = torch.tensor(np.moveaxis(np.asarray(part["kernel"]), [-1, -2], [0, 1]).copy())
        bias = torch.tensor(np.asarray(part["bias"]).copy()) if "bias" in part else None
        return convolve(x, kernel, bias, stride=stride, padding=1)

    x = torch.tensor(np.moveaxis(np.asarray(image), -1, 1).copy())
    for number in range(config.layers + 1):
        x = layer(x, f"layer_{number}", 1 if number == config.layers else 2)
        x = torch.nn.functional.instance_norm(x) if number else x
        x = torch.nn.functional.leaky_relu(x, 0.2)
    expected = np.moveaxis(layer(x, "head", 1).numpy(), 1, -1)
    np.testing.assert_allclose(model.apply(params, image), expected, atol=1e-4 * np.abs(expected).max())

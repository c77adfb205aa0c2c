"""LPIPS by SqueezeNet: its layers in NumPy and PyTorch, its files, and slices of volumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.published import lpips as family
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.squeezenet import FIRES, LEAST, POOLED, READ, SCALE, SHIFT, LpipsConfig, pool
from jaxmed.objectives.perceptual import PerceptualConfig, make_slice_distance, slice_distance

pytestmark = pytest.mark.core

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 2, 24, 19, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def tensors():
    """Draw tensors by the names of torchvision and of the linear layers."""
    rng = np.random.default_rng(1)
    drawn = {}
    for entry in family.entries(LpipsConfig()):
        fan = np.prod(entry.shape[1:]) if len(entry.shape) == 4 else 1
        drawn[entry.name] = (rng.normal(size=entry.shape) * np.sqrt(2 / fan)).astype(np.float32)
    return {name: np.abs(value) if name.startswith("lin") else value for name, value in drawn.items()}


@pytest.fixture(scope="module")
def published(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    safetensors.write(path, tensors, {})
    return load_published(path)


@pytest.fixture(scope="module")
def distance(published):
    return jax.jit(published.model.apply)


def test_a_file_is_used_whole_under_either_naming_and_comes_back_exactly(tensors, published, tmp_path):
    assert published.report.family == "lpips" and len(published.report.used) == len(tensors) == 57
    assert sum(value.size for value in tensors.values()) == 722_496 + 2_240
    slices = {0: 1, 3: 2, 4: 2, 6: 3, 7: 3, 9: 4, 10: 5, 11: 6, 12: 7}
    other = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        number, _, last = rest.partition(".")
        other[f"net.slice{slices[int(number)]}.{number}.{last}" if part == "features" else name] = value
    other["scaling_layer.shift"] = np.array(SHIFT, np.float32).reshape(1, 3, 1, 1)
    safetensors.write(tmp_path / "own.safetensors", other, {})
    again = load_published(tmp_path / "own.safetensors")
    for one, two in zip(jax.tree.leaves(published.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, two)
    export_published(published, tmp_path / "export.safetensors")
    back = load_published(tmp_path / "export.safetensors")
    for one, two in zip(jax.tree.leaves(published.params), jax.tree.leaves(back.params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_equal_images_have_no_distance_and_a_gradient(published, distance):
    one, other = IMAGES
    assert float(jnp.abs(distance(published.params, one, one)).max()) == 0
    found = distance(published.params, one, other)
    assert found.shape == (2,) and float(found.min()) > 0
    np.testing.assert_allclose(found, distance(published.params, other, one), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda image: published.model.apply(published.params, image, jnp.asarray(other)).sum()))
    assert np.isfinite(np.asarray(slope(jnp.asarray(one)))).all()


def test_windows_that_reach_beyond_the_end_count_as_in_ceil_mode():
    image = jnp.arange(36.0).reshape(1, 6, 6, 1)
    np.testing.assert_array_equal(pool(image)[0, :, :, 0], [[14, 16, 17], [26, 28, 29], [32, 34, 35]])
    assert pool(image[:, :5, :5]).shape == (1, 2, 2, 1)


@pytest.mark.peers
def test_distances_are_those_of_torch(tensors, published, distance):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    weights = {name: torch.tensor(value) for name, value in tensors.items()}

    def conv(name, x, **options):
        return functional.relu(functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options))

    def features(image):
        x = torch.tensor(np.moveaxis(image, -1, 1).copy())
        x = (x - torch.tensor(SHIFT).reshape(1, 3, 1, 1)) / torch.tensor(SCALE).reshape(1, 3, 1, 1)
        x = conv("features.0", x, stride=2)
        found = [x]
        for number, _, _ in FIRES:
            if number in POOLED:
                x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
            x = conv(f"features.{number}.squeeze", x)
            name = f"features.{number}.expand"
            x = torch.cat([conv(f"{name}1x1", x), conv(f"{name}3x3", x, padding=1)], 1)
            if number in READ:
                found.append(x)
        return [one / (torch.sqrt((one**2).sum(1, keepdim=True)) + 1e-10) for one in found]

    total = 0
    for level, pair in enumerate(zip(features(IMAGES[0]), features(IMAGES[1]), strict=True)):
        squares = (pair[0] - pair[1]) ** 2
        total = total + functional.conv2d(squares, weights[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
    np.testing.assert_allclose(distance(published.params, *IMAGES), total.numpy(), rtol=1e-3)


def mean_error(one, other):
    return jnp.abs(one - other).mean((1, 2, 3))


def test_slices_of_all_axes_count_and_all_of_them_give_the_whole_volume():
    volumes = jax.random.normal(jax.random.key(0), (2, 2, 6, 7, 8, 1))
    keys = jax.random.split(jax.random.key(1), 2)
    whole = float(jnp.abs(volumes[0] - volumes[1]).mean())
    assert float(slice_distance(mean_error, keys, *volumes, share=1.0)) == pytest.approx(3 * whole, rel=1e-4)
    draws = [float(slice_distance(mean_error, jax.random.split(jax.random.key(n), 2), *volumes)) for n in range(30)]
    assert np.std(draws) > 0 and np.mean(draws) == pytest.approx(3 * whole, rel=0.05)
    shapes = []
    slice_distance(lambda one, other: shapes.append(one.shape) or mean_error(one, other), keys, *volumes, share=0.34)
    assert shapes == [(4, 7, 8, 1), (4, 6, 8, 1), (4, 6, 7, 1)]


def test_other_weights_and_shares_are_refused(published):
    with pytest.raises(ValueError, match="share: expected a number above 0"):
        PerceptualConfig(0.0)
    term = make_slice_distance(published, PerceptualConfig(0.1), "squeeze")
    volumes = jnp.zeros((2, 1, LEAST, LEAST, LEAST, 1))
    assert jax.eval_shape(term, jax.random.split(jax.random.key(0), 1), *volumes).shape == ()
    with pytest.raises(InputError, match="expected weights of LPIPS by SqueezeNet"):
        make_slice_distance(published.__class__(**{**vars(published), "config": None}), PerceptualConfig(), "other")

"""Linear measurements: adjoints, pseudo-inverses by the four conditions of Penrose, and resizing as PyTorch does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_operators import blur, from_function, mask

from jaxmed.physics.operators import resize_matrix, separable

pytestmark = pytest.mark.core

SHAPE = (12, 9)
RNG = np.random.default_rng(0)
KEEP = RNG.random(SHAPE) < 0.4
OPERATORS = {
    "blur": (blur(SHAPE, (0.8, 0.0)), SHAPE),
    "blur with zeros outside": (blur(SHAPE, 0.6, radius=3, mode="zero"), SHAPE),
    "thick slices": (separable([resize_matrix(12, 4, True), None]), SHAPE),
    "there and back": (separable([resize_matrix(5, 12, True) @ resize_matrix(12, 5, True), None]), SHAPE),
    "mask": (mask(KEEP[..., None]), SHAPE),
    "volume": (separable([None, None, resize_matrix(8, 2, True)]), (6, 5, 8)),
    "any function": (from_function(lambda x: jnp.cumsum(x[::2], axis=0) - x[1::2], (*SHAPE, 1)), SHAPE),
}


def dense(operator, shape):
    """Return the matrix of an operator in double precision, and of its adjoint."""
    image = jnp.zeros((*shape, 1))
    measurement = operator.apply(image)
    columns = jax.jacobian(lambda x: operator.apply(x.reshape(image.shape)).ravel())(image.ravel())
    rows = jax.jacobian(lambda y: operator.adjoint(y.reshape(measurement.shape)).ravel())(measurement.ravel())
    return np.asarray(columns, np.float64), np.asarray(rows, np.float64)


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoints_are_transposes(name):
    operator, shape = OPERATORS[name]
    forward, backward = dense(operator, shape)
    np.testing.assert_allclose(backward, forward.T, atol=1e-6)
    # The dot product, which also tells an operator that is not linear.
    x, y = RNG.normal(size=forward.shape[1]), RNG.normal(size=forward.shape[0])
    measured = operator(jnp.asarray(x.reshape(*shape, 1), jnp.float32))
    returned = operator.adjoint(jnp.asarray(y.reshape(measured.shape), jnp.float32))
    scale = np.linalg.norm(y) * np.linalg.norm(np.asarray(measured))
    assert abs(np.vdot(y, measured) - np.vdot(x, returned)) < 1e-5 * scale


@pytest.mark.parametrize("name", [name for name, (operator, _) in OPERATORS.items() if operator.pseudo_inverse])
def test_pseudo_inverses_are_those_of_penrose(name):
    operator, shape = OPERATORS[name]
    forward, _ = dense(operator, shape)
    measurement = operator.apply(jnp.zeros((*shape, 1)))
    found = jax.jacobian(lambda y: operator.pseudo_inverse(y.reshape(measurement.shape)).ravel())(measurement.ravel())
    np.testing.assert_allclose(np.asarray(found), np.linalg.pinv(forward, 1e-3), atol=2e-3)


def test_small_singular_values_do_not_blow_up_noise():
    shape = (32, 32)
    operator = blur(shape, 2.0, relative_cutoff=1e-2)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(*shape, 1)), jnp.float32)
    assert operator.pseudo_inverse is not None
    assert np.abs(operator.pseudo_inverse(noise)).max() < 1e2 * 6
    smooth = operator.adjoint(noise)
    np.testing.assert_allclose(
        operator.apply(operator.pseudo_inverse(operator.apply(smooth))), operator(smooth), atol=5e-3
    )


def test_matrices_of_one_axis_leave_the_others_alone():
    image = jnp.asarray(RNG.normal(size=(4, 3, 2)), jnp.float32)
    operator = separable([None, np.array([[1.0, 1.0, 0.0]])])
    np.testing.assert_allclose(operator(image), np.asarray(image)[:, :1] + np.asarray(image)[:, 1:2], rtol=1e-6)


def test_resizing_keeps_constants_and_straight_lines():
    for old, new in ((64, 16), (64, 45), (16, 64)):
        matrix = resize_matrix(old, new, antialias=True)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-12)
        inner = slice(new // 8, -new // 8)
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        # The sampled triangle of a ratio that is not whole is not symmetric: a tenth of a voxel at most.
        np.testing.assert_allclose((matrix @ np.arange(old))[inner], centres[inner], atol=0.1)


@pytest.mark.peers
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("new", [16, 45, 100])
def test_resizing_equals_pytorch(antialias, new):
    import torch

    image = RNG.normal(size=(64, 64))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None, None], (new, new), mode="bilinear", antialias=antialias, align_corners=False
    )
    matrix = resize_matrix(64, new, antialias)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected[0, 0].numpy(), atol=1e-12)


def test_operators_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="one value or 2"):
        blur(SHAPE, (1.0, 1.0, 1.0))

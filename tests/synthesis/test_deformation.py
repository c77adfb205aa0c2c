"""Deformations: identities, volumes, inverses, distances and coordinates (BrainFM specification, checks 3 to 5)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.warping import compose, identity_grid, jacobian_determinant, sample
from jaxmed.synthesis.control_grid import Photo
from jaxmed.synthesis.deformation import (
    Affine,
    DeformationConfig,
    draw_affine,
    draw_deformation,
    draw_displacement,
    integrate,
    sampling_coordinates,
)

pytestmark = pytest.mark.core
SHAPE = (40, 40, 40)
pull = jax.jit(sample, static_argnames="order")
STILL = DeformationConfig(rotation=0, shear=0, scaling=0, amplitude=0)


@functools.cache
def drawn(config, native=SHAPE, shape=SHAPE):
    return jax.jit(lambda key: draw_deformation(key, native, shape, config))


def ball(radius):
    return (np.linalg.norm(np.asarray(identity_grid(SHAPE)) - 19.5, axis=-1) - radius).astype(np.float32)


def still(matrix, native=SHAPE, shape=SHAPE, displacement=None):
    displacement = jnp.zeros((*shape, len(shape))) if displacement is None else displacement
    scale = abs(np.linalg.det(matrix)) ** (1 / len(shape))
    return sampling_coordinates(
        native, Affine(jnp.asarray(matrix, jnp.float32), jnp.float32(scale), jnp.zeros(len(shape))), displacement
    )


@pytest.mark.parametrize("shape", [SHAPE, (20, 24)], ids=["3d", "2d"])
def test_nothing_to_draw_is_the_identity(key, shape):
    places, affine = drawn(STILL, shape, shape)(key)
    np.testing.assert_allclose(places, identity_grid(shape), atol=1e-5)
    assert affine.distance_scale == 1 and (np.asarray(affine.shift) == 0).all()


def test_centres_stay_on_centres_when_the_output_is_smaller(key):
    places, _ = drawn(STILL, (20, 24), (11, 14))(key)
    np.testing.assert_allclose(places, identity_grid((11, 14)) + jnp.array([4.5, 5.0]), atol=1e-5)


def test_rotations_keep_volume_and_are_right_handed():
    affines = jax.jit(jax.vmap(lambda key: draw_affine(key, SHAPE, SHAPE, dataclasses.replace(STILL, rotation=15.0))))
    matrices = np.asarray(affines(jax.random.split(jax.random.key(3), 300)).matrix)
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        matrices @ matrices.swapaxes(1, 2), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-5
    )
    # Rx Ry Rz: the entry (0, 2) is sin of the angle about y.
    angles = np.degrees(np.arcsin(matrices[:, 0, 2]))
    assert np.abs(angles).max() <= 15.01 and angles.std() == pytest.approx(15 / np.sqrt(3), rel=0.1)
    assert (pull(ball(12.0)[..., None] <= 0, still(matrices[0]), order=0)).sum() == pytest.approx(
        4 / 3 * np.pi * 12**3, rel=0.01
    )


def test_scalings_shrink_volumes_by_their_product_and_distances_by_their_mean():
    """An output-to-native scale above 1 makes the ball smaller."""
    inside = jnp.asarray(ball(12.0))[..., None]
    uneven = pull(inside, still(np.diag([1.2, 1.1, 0.9])))[..., 0]
    assert (np.asarray(uneven) <= 0).sum() == pytest.approx(4 / 3 * np.pi * 12**3 / (1.2 * 1.1 * 0.9), rel=0.01)
    scale = 1.2
    warped = np.asarray(pull(inside, still(np.eye(3) * scale))[..., 0]) / scale
    expected = ball(12.0 / scale)
    # Near the ball's surface, where distances are kept; the outer voxels repeat.
    near = np.abs(expected) < 3
    assert np.abs(warped - expected)[near].max() < 0.1


def test_shears_and_scalings_follow_the_published_order(key):
    affine = jax.jit(lambda key: draw_affine(key, SHAPE, SHAPE, dataclasses.replace(STILL, shear=0.2, scaling=0.2)))(
        key
    )
    _, shear_key, scaling_key, _ = jax.random.split(key, 4)
    h0, h1, h2 = 0.2 * np.asarray(jax.random.uniform(shear_key, (3,), minval=-1.0))
    scalings = 1 + 0.2 * np.asarray(jax.random.uniform(scaling_key, (3,), minval=-1.0))
    along_x = np.array([[1, 0, 0], [h1, 1, 0], [h2, 0, 1]])
    along_y = np.array([[1, h0, 0], [0, 1, 0], [0, h2, 1]])
    along_z = np.array([[1, 0, h0], [0, 1, h1], [0, 0, 1]])
    np.testing.assert_allclose(affine.matrix, np.diag(scalings) @ along_x @ along_y @ along_z, atol=1e-6)
    assert affine.distance_scale == pytest.approx(np.prod(scalings) ** (1 / 3), rel=1e-6)


def test_coordinates_are_where_a_coordinate_map_is_sampled(key):
    """What a target of coordinates holds after the warp is the sampling coordinate itself."""
    native = (44, 38, 41)
    places, _ = drawn(DeformationConfig(), native, SHAPE)(key)
    np.testing.assert_allclose(pull(identity_grid(native), places), places, atol=1e-4)
    assert (np.asarray(places) >= 0).all() and (np.asarray(places) <= np.array(native) - 1).all()
    assert np.asarray(places - identity_grid(SHAPE)).std() > 1


def test_shifts_use_the_room_there_is_only_when_asked(key):
    keys = jax.random.split(key, 200)
    config = dataclasses.replace(STILL, random_shift=True)
    shifts = np.asarray(jax.jit(jax.vmap(lambda key: draw_affine(key, (50, 40, 30), SHAPE, config).shift))(keys))
    assert np.abs(shifts).max(0) == pytest.approx([5.0, 0.0, 0.0], abs=0.2)


def test_velocities_integrate_to_inverses_without_folds():
    with_steps = jax.jit(integrate)
    draw = jax.jit(lambda key: draw_displacement(key, SHAPE, DeformationConfig(control_scale=(0.05, 0.05))))
    for index in range(3):
        velocity = draw(jax.random.key(index))
        velocity = velocity * (4.0 / jnp.maximum(velocity.std() * 2, 1e-6))  # control values of about std 4
        there, back = with_steps(velocity), with_steps(-velocity)
        inner = (slice(8, -8),) * 3
        error = jnp.linalg.norm(jax.jit(compose)(there, back)[inner], axis=-1)
        assert error.mean() < 0.05
        assert jax.jit(jacobian_determinant)(there).min() > 0


def test_a_constant_velocity_is_a_translation():
    moved = jax.jit(integrate)(jnp.full((*SHAPE, 3), 2.5))
    np.testing.assert_allclose(moved, 2.5, rtol=1e-5)


def test_the_raw_field_has_the_drawn_amplitude_and_may_fold():
    fields = jax.jit(jax.vmap(lambda key: draw_displacement(key, SHAPE, DeformationConfig())))
    found = fields(jax.random.split(jax.random.key(5), 24))
    # std 4u per control value, u even on [0, 1]: 4 / sqrt(3) over draws; linear zoom lowers it.
    assert 1.2 < float(found.std()) < 4 / np.sqrt(3) * 1.25
    folded = (jax.jit(jax.vmap(jacobian_determinant))(found) <= 0).mean()
    assert 0 <= folded < 0.05


def test_slabs_of_a_photographed_brain_stay_in_their_planes(key):
    photo = Photo(jnp.array(True), jnp.array(5.0))
    draw = jax.jit(lambda key, photo: draw_displacement(key, SHAPE, DeformationConfig(), photo))
    field = np.asarray(draw(key, photo))
    assert (field[..., 1] == 0).all() and field[..., 0].std() > 0.1
    # Eight control points along axis 1: the second difference is zero between them.
    curvature = np.abs(np.diff(field[20, :, 20, 0], 2))
    assert (curvature > 1e-4).sum() <= 2 * 8
    other = np.asarray(draw(key, photo._replace(is_on=jnp.array(False))))
    assert other[..., 1].std() > 0.1


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="scaling: expected a number from 0 and below 1, found 1.5"):
        DeformationConfig(scaling=1.5)
    with pytest.raises(ValueError, match="control_scale: expected a range"):
        DeformationConfig(control_scale=(0.1, 0.05))

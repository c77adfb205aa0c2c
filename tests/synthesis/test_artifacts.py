"""Ghosts and motion: nothing changes without them, and what changes is what k-space says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.synthesis.artifacts import ghost, move

pytestmark = pytest.mark.core

IMAGE = jax.random.uniform(jax.random.key(0), (8, 12, 6))


def test_nothing_changes_without_strength_or_shift():
    np.testing.assert_allclose(ghost(IMAGE, strength=0.0), IMAGE, atol=1e-6)
    np.testing.assert_allclose(move(jax.random.key(1), IMAGE, most=0.0), IMAGE, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ghost_is_a_copy_half_a_field_away(axis):
    """Every second line scaled by 1 - s is (1 - s / 2) of the image less s / 2 of the image half a field away."""
    shape = [1, 1, 1]
    shape[axis] = 12
    image = jnp.zeros(shape).at[tuple(2 if n == axis else 0 for n in range(3))].set(1.0)
    found = np.asarray(ghost(image, axis, 2, 0.4)).ravel()
    mean = 0.4 / 12  # of the line without frequency, which is not scaled
    expected = np.full(12, mean)
    expected[2] += 0.8
    expected[8] -= 0.2
    np.testing.assert_allclose(found, np.abs(expected), atol=1e-6)


def test_motion_keeps_the_mean_and_differs_from_draw_to_draw():
    one, two = (np.asarray(move(jax.random.key(number), IMAGE)) for number in (1, 2))
    assert np.abs(one - two).max() > 0.05 and np.isfinite(one).all()
    assert np.abs(one.mean() - float(IMAGE.mean())) < 0.1


def test_a_head_that_moved_before_all_but_the_first_line_lies_where_it_is():
    """Between two moves at the very ends the head is at one place, which is where the centre of k-space saw it."""
    still = move(jax.random.key(3), IMAGE, times=0)
    np.testing.assert_allclose(still, IMAGE, atol=1e-5)

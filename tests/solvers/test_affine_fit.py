"""Affine maps from points: exact where they are, and not moved by outliers where they should not be."""

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.solvers.affine_fit import fit_affine

pytestmark = pytest.mark.core

MATRIX = np.array([[1.1, 0.2, -0.1, 5.0], [0.0, 0.9, 0.3, -7.0], [0.1, -0.2, 1.2, 2.0], [0, 0, 0, 1]])


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform(-80, 80, (2000, 3))


def move(points):
    return points @ MATRIX[:3, :3].T + MATRIX[:3, 3]


def test_an_affine_map_is_found_exactly(points):
    for is_robust in (True, False):
        found = fit_affine(points, move(points), is_robust=is_robust)
        np.testing.assert_allclose(found.matrix, MATRIX, atol=1e-8)
        assert found.residual < 1e-8 and found.inliers == 1


def test_outliers_move_least_squares_alone(points):
    rng = np.random.default_rng(1)
    targets = move(points) + rng.normal(scale=0.5, size=points.shape)
    targets[:400] += 60.0
    robust, plain = (fit_affine(points, targets, is_robust=value) for value in (True, False))
    assert np.abs(robust.matrix - MATRIX).max() < 0.1 < np.abs(plain.matrix - MATRIX).max()
    assert 0.75 < robust.inliers < 0.81


def test_points_in_a_plane_are_refused(points):
    for some in (points[:3], points * [1, 1, 0]):
        with pytest.raises(InputError, match="points: expected four or more that are not in a plane"):
            fit_affine(some, some)

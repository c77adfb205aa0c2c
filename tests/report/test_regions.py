"""Region maps: a glass brain with centroids, a ring without, left regions on the left."""

import numpy as np
import pytest

from jaxmed.report.regions import _ring, glass_brain

pytestmark = pytest.mark.core

NAMES = ("L_a", "L_b", "R_a", "R_b", "stem")


def test_maps_are_drawn_for_both_themes_with_and_without_centroids():
    values = {"early": np.array([0.1, 0.2, 0.3, 0.0, 0.5]), "late": np.ones(5)}
    centroids = np.arange(15, dtype=float).reshape(5, 3)
    for points in (None, centroids):
        figure = glass_brain(values, NAMES, points, caption="Two maps.", unit="SUVR")
        assert b"<svg" in figure.light and b"<svg" in figure.dark and figure.light != figure.dark
        assert "early: highest in stem, R_a, L_b" in figure.alt


def test_hemispheres_of_a_ring_mirror_each_other_and_the_rest_is_below():
    points = _ring(NAMES)
    assert (points[:2, 0] < 0).all() and (points[2:4, 0] > 0).all()
    np.testing.assert_allclose(points[:2] * [-1, 1], points[2:4], atol=1e-12)
    assert points[4, 1] < -0.9 or abs(points[4, 0]) < 0.5
    alone = _ring(("a", "b", "c", "d"))
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1)
    assert len(np.unique(alone.round(6), axis=0)) == 4

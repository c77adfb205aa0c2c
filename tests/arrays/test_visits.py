"""Padded visits: gaps, padding, selections, and times that do not ascend."""

import numpy as np
import pytest

from jaxmed.arrays.visits import first_visits, pad_visits, take_subjects

pytestmark = pytest.mark.core


def test_visits_keep_gaps_and_say_what_is_padding():
    values = [np.array([[0.1, 0.2]], np.float32), np.array([[0.3, 0.4], [0.5, 0.6]], np.float32)]
    visits = pad_visits(values, [np.array([70.0]), np.array([65.5, 67.0])])
    np.testing.assert_array_equal(visits.present, [[True, False], [True, True]])
    np.testing.assert_array_equal(visits.gaps, [[0, 0], [0, 1.5]])
    np.testing.assert_array_equal(visits.values[0, 1], 0)
    np.testing.assert_array_equal(visits.values[1], values[1])
    np.testing.assert_array_equal(take_subjects(visits, np.array([1])).values, visits.values[1:])
    np.testing.assert_array_equal(first_visits(visits).present, [[True, False], [True, False]])


def test_times_must_ascend():
    with pytest.raises(ValueError, match="ascending"):
        pad_visits([np.zeros((2, 1), np.float32)], [np.array([2.0, 1.0])])

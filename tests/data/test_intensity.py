"""Intensities to a network's unit and back."""

import dataclasses

import numpy as np
import pytest

from jaxmed.data.intensity import Intensity, scale, to_range, unscale
from jaxmed.errors import InputError

pytestmark = pytest.mark.core


@pytest.fixture
def array():
    found = np.random.default_rng(0).normal(100, 10, (12, 10, 8)).astype(np.float32)
    found[:2] = 0
    return found


def test_window_maps_ends_and_clips():
    hu = np.array([-2000, -1000, -300, 400, 3000], np.int16)
    np.testing.assert_allclose(to_range(hu, -1000, 400), [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(to_range(hu, -1000, 400, (-1.0, 1.0), clip=False)[1:4], [-1, 0, 1], atol=1e-6)


def test_z_score_standardises_the_foreground(array):
    intensity = Intensity("zscore", inside="foreground")
    scaled = scale(array, intensity, "a").array
    assert abs(scaled[2:].mean()) < 1e-4 and abs(scaled[2:].std() - 1) < 1e-4
    assert scaled[0].max() < -5
    both = scale(np.stack([array, 3 * array + 0], axis=-1), intensity, "a").array
    np.testing.assert_allclose(both[..., 0], both[..., 1], atol=1e-3)
    with pytest.raises(InputError, match="a spread of intensities"):
        scale(np.ones((4, 4, 4), np.float32), Intensity("zscore"), "a")
    with pytest.raises(InputError, match="some foreground"):
        scale(np.zeros((4, 4, 4), np.float32), Intensity("zscore", inside="nonzero"), "a")


def test_percentiles_become_the_ends_of_the_range(array):
    intensity = Intensity("percentile", percentiles=(25.0, 75.0), clip=False)
    scaled = scale(array, intensity, "a").array
    np.testing.assert_allclose(np.percentile(scaled, [25, 75]), [0, 1], atol=1e-5)
    clipped = scale(array, dataclasses.replace(intensity, clip=True), "a").array
    assert clipped.min() == 0 and clipped.max() == 1
    extremes = scale(array, Intensity("minmax", range=(-1.0, 1.0)), "a")
    assert (extremes.array.min(), extremes.array.max()) == (-1, 1) and extremes.low == 0


@pytest.mark.parametrize(
    "intensity",
    [
        Intensity("window", window=(-20.0, 200.0), range=(-1.0, 1.0)), Intensity("minmax", mean=(0.4,), std=(0.2,)),
        Intensity("zscore"), Intensity("keep", mean=(100.0,), std=(10.0,)),
        Intensity("background", percentiles=(0.0, 99.0), reference=1.0, range=(0.0, 4.0)),
    ],
)  # fmt: skip
def test_the_way_back_gives_stored_intensities_and_distances(intensity, array):
    found = scale(array, intensity, "a")
    back = unscale(found.array, intensity, found.low, found.high)
    np.testing.assert_allclose(back, array, atol=1e-3)
    shifted = unscale(found.array, intensity, found.low, found.high, is_difference=True)
    assert np.ptp(shifted - back) < 1e-3 and unscale(np.zeros(1), intensity, 1.0, 9.0, is_difference=True) == 0


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="low below high"):
        Intensity("window", window=(1.0, 1.0))
    with pytest.raises(ValueError, match="percentages"):
        Intensity("percentile", percentiles=(0.0, 101.0))
    with pytest.raises(ValueError, match="as many numbers"):
        Intensity(mean=(1.0,))
    with pytest.raises(InputError, match="3 channels, as mean and std have"):
        scale(np.ones((2, 2, 2)), Intensity("keep", mean=(1.0,) * 3, std=(1.0,) * 3), "a")

"""WhiteStripe against a transcription that sums over voxels, and on brains whose white matter is known."""

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from jaxmed.data.white_stripe import kernel_density, white_stripe
from jaxmed.errors import InputError

pytestmark = pytest.mark.core
WHITE = 110.0


def brain(seed=0, count=40):
    """Fluid, grey and white matter as normal intensities within a box, 0 around it."""
    rng = np.random.default_rng(seed)
    array, mask = np.zeros((count, count, count), np.float32), np.zeros((count, count, count), bool)
    mask[4:-4, 4:-4, 4:-4] = True
    tissue = rng.choice(3, mask.sum(), p=[0.15, 0.45, 0.4])
    array[mask] = rng.normal(np.array([30.0, 75.0, WHITE])[tissue], np.array([8.0, 7.0, 5.0])[tissue])
    return array, mask


def direct(array, mask):
    """The steps of the source, one after the other, over voxels."""
    values = array[mask].astype(np.float64)
    below = values[values <= np.percentile(values, 96)]
    places = np.linspace(below.min(), below.max(), 80)
    density = scipy.stats.gaussian_kde(below)(places)
    modes = scipy.signal.argrelmax(density)[0]
    mode = places[modes[-1]] if len(modes) else places[density.argmax()]
    share = np.mean(values <= mode)
    low, high = np.quantile(values, [max(share - 0.05, 0), min(share + 0.05, 1)])
    stripe = values[(values > low) & (values < high)]
    return (array - stripe.mean()) / stripe.std(), mode, (places, density)


def test_it_is_the_sum_over_voxels():
    array, mask = brain()
    expected, mode, (places, density) = direct(array, mask)
    found = white_stripe(array, mask)
    values = array[mask].astype(np.float64)
    at, height = kernel_density(values[values <= np.percentile(values, 96)])
    np.testing.assert_allclose(at, places)
    np.testing.assert_allclose(height, density, atol=1e-4 * density.max())
    assert found.mode == pytest.approx(mode)
    np.testing.assert_allclose(found.array, expected, rtol=1e-5, atol=1e-5)
    assert found.array.dtype == np.float32


def test_the_mode_is_that_of_the_white_matter_whatever_the_scale():
    array, mask = brain(1)
    found = white_stripe(array, mask)
    step = (np.percentile(array[mask], 96) - array[mask].min()) / 79
    assert abs(found.mode - WHITE) <= step
    assert found.array[~mask].max() == found.array.min() < -20  # the background is scaled too
    again = white_stripe(3.5 * array + 40, mask)
    np.testing.assert_allclose(again.array[mask], found.array[mask], rtol=1e-3, atol=1e-3)
    assert again.mode == pytest.approx(3.5 * found.mode + 40, rel=1e-5)


def test_one_slope_without_a_mode_takes_the_largest_density():
    rng = np.random.default_rng(2)
    array = np.zeros((20, 20, 20), np.float32)
    array[...] = rng.exponential(10.0, array.shape)
    values = array.astype(np.float64).reshape(-1)
    places, density = kernel_density(values[values <= np.percentile(values, 96)])
    assert white_stripe(array, np.ones(array.shape, bool)).mode in places
    assert density.max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array, mask: (array, np.zeros_like(mask)), "found an empty mask"),
        (lambda array, mask: (np.full_like(array, 3), mask), "of one intensity, 3"),
        (lambda array, mask: (np.where(array > 50, 1.0, 0.0).astype(np.float32), mask), "not a label map"),
    ],
)
def test_what_has_no_white_matter_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        white_stripe(*change(*brain()), "scan.nii.gz")

import numpy as np
import pytest

from jaxmed.data.intensity import Intensity, scale
from jaxmed.data.transforms import (
    percentile_range,
    random_crop,
    window,
)
from jaxmed.errors import InputError
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


@pytest.fixture
def volume():
    array = np.random.default_rng(0).normal(100, 10, (12, 10, 8)).astype(np.float32)
    array[:2] = 0
    return Volume.make(array, np.diag([-2.0, 2.0, 2.0, 1.0]))


def test_window_maps_ends_and_clips():
    hu = np.array([-2000, -1000, -300, 400, 3000], np.int16)
    np.testing.assert_allclose(window(hu, -1000, 400), [0, 0, 0.5, 1, 1], atol=1e-6)


def z_score(array):
    return scale(array, Intensity("zscore", inside="foreground"), "image").array


def test_z_score_standardises_the_foreground(volume):
    scaled = z_score(volume.array)
    assert abs(scaled[2:].mean()) < 1e-4 and abs(scaled[2:].std() - 1) < 1e-4
    assert scaled[0].max() < -5
    both = z_score(np.stack([volume.array, 3 * volume.array + 0], axis=-1))
    np.testing.assert_allclose(both[..., 0], both[..., 1], atol=1e-3)
    with pytest.raises(InputError, match="a spread of intensities"):
        z_score(np.ones((4, 4, 4), np.float32))
    with pytest.raises(InputError, match="some foreground"):
        percentile_range(volume.array, mask=np.zeros(volume.array.shape, bool))


def test_percentiles_become_0_and_1(volume):
    mask = np.ones(volume.array.shape, bool)
    scaled = percentile_range(volume.array, 25, 75, mask, clip=False)
    np.testing.assert_allclose(np.percentile(scaled, [25, 75]), [0, 1], atol=1e-5)
    clipped = percentile_range(volume.array, 25, 75, mask)
    assert clipped.min() == 0 and clipped.max() == 1


@pytest.mark.parametrize("spatial", [(9, 7), (9, 7, 5)])
def test_random_crops_cut_fields_alike(spatial):
    image = np.arange(np.prod(spatial)).reshape(spatial)
    size = (4,) * len(spatial)
    cut = random_crop({"image": image[..., None], "label": image}, size, np.random.default_rng(3))
    np.testing.assert_array_equal(cut["image"][..., 0], cut["label"])
    assert cut["label"].shape == size
    corners = {random_crop({"a": image}, size, np.random.default_rng(s))["a"].flat[0] for s in range(40)}
    assert len(corners) > 5


def test_random_crops_extend_short_axes():
    cut = random_crop({"a": np.ones((3, 8))}, (6, 4), np.random.default_rng(0), {"a": -1})["a"]
    assert cut.shape == (6, 4) and (cut == 1).sum() == 12 and (cut == -1).sum() == 12
    with pytest.raises(InputError, match="arrays of one shape"):
        random_crop({"a": np.ones((3, 8)), "b": np.ones((8, 3))}, (2, 2), np.random.default_rng(0))

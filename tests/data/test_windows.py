"""Windows: weights that sum to 1, what was cut comes back, random crops of several fields."""

import numpy as np
import pytest

from jaxmed.data.windows import cut, paste, place, planes, random_crop, tile
from jaxmed.errors import InputError

pytestmark = pytest.mark.core
RNG = np.random.default_rng(2)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(16, 13, 9), (9, 8, 8), (8, 8, 31)])
def test_tiles_cover_a_volume_and_count_as_one(shape, overlap):
    windows = tile(1, shape, (8, 8, 8), overlap)
    ones = paste(np.ones((len(windows), 8, 8, 8)), windows, np.zeros(shape, np.float32), None)
    np.testing.assert_allclose(ones, 1.0, rtol=0, atol=1e-15)
    for axis, count in enumerate(shape):
        starts = sorted({window.starts[axis] for window in windows})
        assert starts[0] == 0 and starts[-1] + 8 == count and max(np.diff(starts), default=0) <= 8


@pytest.mark.parametrize(
    ("shape", "axis", "size", "overlap"), [((16, 13, 9), None, (8, 8, 8), 0.5), ((21, 17, 2), 2, (8, 9), 0.3)]
)
def test_pasting_what_was_cut_gives_the_volume(shape, axis, size, overlap):
    volume = RNG.normal(size=shape).astype(np.float32)
    images = planes(volume, axis)
    windows = tile(len(images), images.shape[1:], size, overlap)
    cuts = cut(images, windows, size)
    np.testing.assert_allclose(paste(cuts, windows, np.zeros_like(volume), axis), volume, atol=1e-6)
    np.testing.assert_array_equal(cuts[0], images[0][tuple(slice(length) for length in size)])
    # A function of single voxels does not see the windows.
    np.testing.assert_allclose(paste(3 * cuts + 1, windows, np.zeros_like(volume), axis), 3 * volume + 1, atol=1e-5)


def test_one_window_is_the_image_and_small_images_are_extended_and_cut_back():
    volume = RNG.normal(size=(8, 9, 1)).astype(np.float32)
    (window,) = windows = tile(1, (8, 9), (8, 9))
    np.testing.assert_array_equal(cut(planes(volume, 2), windows, (8, 9))[0], volume[..., 0])
    assert window.starts == (0, 0)
    windows = tile(1, (5, 12), (8, 8))
    assert [one.starts for one in windows] == [(-1, 0), (-1, 4)]
    volume = RNG.normal(size=(5, 12, 1)).astype(np.float32)
    cuts = cut(planes(volume, 2), windows, (8, 8))
    assert cuts.shape == (2, 8, 8) and not cuts[:, 0].any() and not cuts[:, 6:].any()
    np.testing.assert_allclose(paste(cuts, windows, np.zeros_like(volume), 2), volume, atol=1e-6)
    # Where no window stands the background shows.
    alone = paste(cuts[:1], windows[:1], np.full_like(volume, 7.0), 2)
    np.testing.assert_allclose(alone[:, 8:], 7.0)


def test_a_window_follows_a_centre_as_far_as_it_shows_all():
    assert place((20, 6), (8, 10), (19, 1)) == (12, -2)
    assert place((20, 6), (8, 10), (19, 1), follow=True) == (12, -4)
    assert place((20, 7), (8, 10), (2, 6), follow=True) == (0, 0)


def test_impossible_overlaps_are_refused():
    with pytest.raises(ValueError, match="overlap: expected a share from 0 up to below 1, found 1"):
        tile(1, (8, 8), (8, 8), 1.0)


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

"""Finding the object without a mask."""

import numpy as np
import pytest

from jaxmed.arrays.foreground import find_foreground

pytestmark = pytest.mark.core


def test_the_largest_bright_region_is_found_with_its_holes_filled():
    image = np.zeros((20, 20, 5))
    image[4:16, 4:16] = 100.0
    image[9:11, 9:11, 2] = 0.0  # a ventricle
    image[0, 0, 0] = 100.0  # a spike outside
    mask = find_foreground(image)
    assert mask[4:16, 4:16].all() and mask.sum() == 12 * 12 * 5


def test_an_empty_image_has_no_foreground():
    assert not find_foreground(np.zeros((3, 3, 3))).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxels_that_are_not_finite_are_left_out_and_part_the_region_nowhere(axis):
    """A plane of NaN through a body, in a background of NaN or of zeros: before, the smaller half was lost."""
    body = np.zeros((9, 9, 9))
    body[2:7, 2:7, 2:7] = 100.0
    inside = body > 0
    plane = np.zeros_like(inside)
    plane[(slice(None),) * axis + (3,)] = True
    for background in (0.0, np.nan):
        image = np.where(inside, body, background)
        image[plane & inside] = np.nan
        np.testing.assert_array_equal(find_foreground(image), inside & ~plane)

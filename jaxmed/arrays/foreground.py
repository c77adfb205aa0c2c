"""Find the imaged object in a volume without a mask, on the host."""

from typing import cast

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage


def find_foreground(image: Float[np.ndarray, "x y z"], fraction: float = 0.1) -> Bool[np.ndarray, "x y z"]:
    """Return the largest connected bright region, with its holes filled.

    Args:
        image: Intensities of any unit, background near zero.
        fraction: Threshold relative to the 98th percentile, which a few bright voxels do not move.
    """
    bright = image > fraction * np.percentile(image, 98)
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(bright))
    if count == 0:
        return bright
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(labels == np.argmax(sizes)), bool)

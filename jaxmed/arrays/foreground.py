"""Find the imaged object in a volume without a mask, on the host."""

from typing import cast

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage


def find_foreground(image: Float[np.ndarray, "x y z"], fraction: float = 0.1) -> Bool[np.ndarray, "x y z"]:
    """Return the largest connected bright region, with its holes filled.

    Args:
        image: Intensities of any unit, background near zero. A voxel that is not finite is not in the region, and parts
            it nowhere: nobody knows what lies there.
        fraction: Threshold relative to the 98th percentile, which a few bright voxels do not move.
    """
    known = np.isfinite(image)
    image = np.where(known, image, 0.0)
    bright = image > fraction * np.percentile(image, 98)
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(bright | ~known))
    if count == 0:
        return bright
    sizes = np.bincount(labels.reshape(-1), weights=bright.reshape(-1))
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(labels == np.argmax(sizes)) & known, bool)

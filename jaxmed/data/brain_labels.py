"""Label maps of brains in FreeSurfer's numbering, as images are drawn from them and scored with them; on the host."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped
from scipy import ndimage

from jaxmed.arrays.grid import reorient
from jaxmed.data.preprocess import Preprocess
from jaxmed.io import nifti
from jaxmed.volume import Volume

FLUID, FLUID_DISTANCE = 24, 5.0  # mm
LESION = 77


def read_labels(path: Path, preprocess: Preprocess) -> Volume:
    """Read a label map in FreeSurfer's numbering as one brain: RAS+, at the network's voxel size, int32.

    Both sides have one label (`simplify_labels`), and fluid ends 5 mm outside of the brain: in some maps the label 24
    fills spaces down to the neck.

    Raises:
        InputError: It is no volume of whole numbers, or holds one label only.
    """
    volume = nifti.read(path, dimensions=(3,), dtype=np.int32, allow_constant=False)
    volume = preprocess.lay_out(reorient(volume), "volume", preprocess.slice_axis, order=0)
    labels = simplify_labels(volume.array)
    brain = (labels > 0) & (labels != FLUID)
    distance = np.asarray(ndimage.distance_transform_edt(~brain, volume.spacing)) if brain.any() else np.inf
    return Volume.make(np.where(distance <= FLUID_DISTANCE, labels, 0).astype(np.int32), volume.affine)


def simplify_labels(labels: Shaped[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """Give both sides of the brain one label, and the rest of the head 0.

    Args:
        labels: In FreeSurfer's numbering; 256 and more are no brain.

    Source: FreeSurfer's colour table, for the pairs.
    """
    table = np.arange(256, dtype=np.int32)
    for right, left in PAIRS.items():
        table[right] = left
    is_brain = (labels >= 0) & (labels < 256)
    return np.where(is_brain, table[np.where(is_brain, labels, 0)], 0).astype(np.int32)


PAIRS = {
    41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 57: 25, 58: 26, 60: 28,
    62: 30, 63: 31, 137: 136, 164: 163,
}  # fmt: skip

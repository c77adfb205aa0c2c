"""Worse versions of a scan: thick slices, bias, another contrast, deformation, ghosts and motion.

Each is a function of a key and a volume between 0 and 1, so that a network can be asked again.

Source: thick slices and bias: BrainFM, arXiv:2509.00549, official test code (linear interpolation without blur, back
and forth; bias of 3 to 6 control points and a deviation of .1 to .6). The others are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Real

from jaxmed.arrays.grid import resample, resample_to
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.synthesis.artifacts import ghost, move
from jaxmed.synthesis.bias_field import BiasFieldConfig, draw_log_bias
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation
from jaxmed.volume import Volume

THICK = (1.5, 1.5, 5.0)  # mm
DEFORMATION = DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, amplitude=2.0)


# Compiled here, once for all scans of a size: operation by operation they take longer to compile than the network.
_deformation = jax.jit(draw_deformation, static_argnums=(1, 2, 3))
_log_bias = jax.jit(draw_log_bias, static_argnums=(1, 2))
_ghost = jax.jit(ghost, static_argnums=(1, 2))
_move = jax.jit(move)
_sample = jax.jit(sample, static_argnames="order")


class Degraded(NamedTuple):
    """A worse scan.

    Attributes:
        image: The network's input.
        places: Where each of its voxels was before, in voxels; None where nothing moved.
    """

    image: Float32[np.ndarray, "x y z"]
    places: Array | None = None


def thicken(key: KeyArray, volume: Volume) -> Degraded:
    """Resample to thick slices and back, linearly and without blur."""
    del key
    coarse = resample(volume, THICK, order=1, antialias=False)
    back = resample_to(coarse, volume.grid, order=1, antialias=False, fill=None)
    return Degraded(np.asarray(back.array, np.float32))


def bias(key: KeyArray, volume: Volume) -> Degraded:
    """Multiply by a bias field of the release's severe range, of 3 to 6 control points whatever the voxel size."""
    longest = max(volume.array.shape)
    field = _log_bias(key, volume.array.shape, BiasFieldConfig((min(3 / longest, 1.0), min(6 / longest, 1.0))))
    return Degraded(to_unit_range(volume.array * np.exp(np.asarray(field))))


def thicken_and_bias(key: KeyArray, volume: Volume) -> Degraded:
    """Do both."""
    return thicken(key, Volume.make(bias(key, volume).image, volume.affine))


def change_contrast(key: KeyArray, volume: Volume) -> Degraded:
    """Turn bright into dark within the head: a contrast that no scanner has."""
    del key
    image = volume.array
    return Degraded(np.where(image != 0, 1.0 - 0.8 * image, 0).astype(np.float32))


def deform(key: KeyArray, volume: Volume) -> Degraded:
    """Deform the head; truth is deformed alike."""
    shape = volume.array.shape
    places, _ = _deformation(key, shape, shape, DEFORMATION)
    return Degraded(pull(np.asarray(volume.array, np.float32), places), places)


def add_ghosts(key: KeyArray, volume: Volume) -> Degraded:
    """Add ghosts from front to back."""
    del key
    return Degraded(to_unit_range(np.asarray(_ghost(volume.array, 1, 2, 0.4))))


def shake(key: KeyArray, volume: Volume) -> Degraded:
    """Move the head during the scan."""
    return Degraded(to_unit_range(np.asarray(_move(key, volume.array))))


CONDITIONS: dict[str, Callable[[KeyArray, Volume], Degraded]] = {
    "1.5 x 1.5 x 5 mm": thicken,
    "bias": bias,
    "1.5 x 1.5 x 5 mm, bias": thicken_and_bias,
    "inverted contrast": change_contrast,
    "deformation": deform,
    "ghosts": add_ghosts,
    "motion": shake,
}


def pull(values: np.ndarray, places: Array) -> np.ndarray:
    """Sample a map where its voxels were before: labels by the nearest voxel, all else linearly."""
    is_class = values.dtype.kind in "iu"
    wide = values if values.ndim == 4 else values[..., None]
    found = np.asarray(_sample(wide, places, order=0 if is_class else 1), values.dtype)
    return found if values.ndim == 4 else found[..., 0]


def to_unit_range(image: Real[np.ndarray, "x y z"]) -> Float32[np.ndarray, "x y z"]:
    """Bring the extremes of an image to 0 and 1."""
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1e-12)).astype(np.float32)

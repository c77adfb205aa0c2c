"""The space of a template: whether a scan is in it, and how one that is not gets there, by an affine map."""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Float64

from jaxmed.arrays.grid import orientation, resize
from jaxmed.errors import InputError
from jaxmed.solvers.registration import RegistrationConfig, register_affine
from jaxmed.volume import Grid, Volume, affine_spacing, corner_distance, is_same_grid

REGISTERED = (64, 72, 64)
"""Most voxels that are aligned, over the whole field of view."""


def require_template_space(volume: Volume, grid: Grid, where: object, advice: str) -> None:
    """Refuse a scan on another grid than the template's.

    Args:
        volume: The scan.
        grid: Of the template.
        where: The file, for messages.
        advice: What to do about it.

    Raises:
        InputError: Orientation, voxel size, number of voxels or place differ.
    """
    codes, wanted = orientation(volume.affine), orientation(grid.affine)
    if codes != wanted:
        raise InputError(where, f"the template's axes, {wanted}", codes, advice)
    if not np.allclose(volume.spacing, affine_spacing(grid.affine), rtol=1e-2):
        expected = f"the template's voxels of {_times(affine_spacing(grid.affine))} mm"
        raise InputError(where, expected, _times(volume.spacing), advice)
    if volume.grid.shape != grid.shape:
        raise InputError(where, f"the template's {_times(grid.shape)} voxels", _times(volume.grid.shape), advice)
    if not is_same_grid(volume.grid, grid):
        found = f"one that lies {corner_distance(volume.grid, grid):.3g} mm beside it"
        raise InputError(where, "the template's place in MNI space", found, advice)


def align_brain(
    template: Volume, brain: Volume, config: RegistrationConfig = RegistrationConfig("correlation")
) -> tuple[Float64[np.ndarray, "4 4"], float]:
    """Align a brain with a template.

    Args:
        template: A brain without a skull.
        brain: Likewise, of any grid.
        config: Of the alignment.

    Returns:
        Place in the template, in mm, to the place in the scan; and the correlation of both after alignment.
    """
    fixed, moving = (_shrunk(one) for one in (template, brain))
    found = _align(config)(fixed.array[..., None], _single(fixed), moving.array[..., None], _single(moving))
    return np.asarray(found.matrix, np.float64), 1 - float(found.loss[-1].min())


@cache
def _align(config: RegistrationConfig) -> Any:
    return jax.jit(partial(register_affine, config=config))


def _shrunk(volume: Volume) -> Volume:
    """Return a brain above a background of 0, on at most `REGISTERED` voxels."""
    x, y, z = (min(length, most) for length, most in zip(volume.grid.shape, REGISTERED, strict=True))
    lifted = Volume.make(volume.array - volume.array.min(), volume.affine)
    return resize(lifted, (x, y, z), order=1)


def _single(volume: Volume) -> Float32[np.ndarray, "4 4"]:
    return volume.affine.astype(np.float32)


def _times(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)

"""From a T1-weighted MRI to what the networks see, and from their map back onto its grid; on the host.

The networks know one space, that of the MNI152 template at 1 mm with the template's axes, and one scale, WhiteStripe's
then a fixed mean and deviation. Nothing in their input tells them that it is another: so files are checked first.

Source: CoCoLIT, arXiv:2508.01292, official code.
Deviation: brains come from a mask that the user gives, where the release runs SynthStrip, and the affine registration
is `solvers.registration`, where it runs ANTs.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Shaped

from jaxmed.arrays.grid import resample_to, spaced_from_first
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.white_stripe import white_stripe
from jaxmed.data.windows import cut_window
from jaxmed.errors import InputError
from jaxmed.io.masks import read_mask
from jaxmed.io.scans import ScanFiles, read_volume
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig
from jaxmed.recipes.template_space import align_brain, require_template_space
from jaxmed.solvers.registration import RegistrationConfig
from jaxmed.volume import Grid, Volume, require_same_grid

MNI152 = Grid((182, 218, 182), np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]]))
"""The template's grid at 1 mm: x runs to the left."""
MULTIPLE = 8
"""The release pads to multiples of this, whatever the autoencoder halves."""
LEAST_BACKGROUND = 0.55
"""Share of voxels around a brain in MNI space, at the least: 74 % of the template; around a head they are 40 %."""
POOR = 0.6
"""Correlation with the template below which an alignment has probably failed; two brains have .8 to .95."""
ADVICE = "register it first, or let --preprocess do it with --mask and --template"


class Prepared(NamedTuple):
    """An MRI in the template's space.

    Attributes:
        volume: The brain by WhiteStripe, on the template's grid.
        mask: The brain.
        matrix: Place in the template, in mm, to the place in the scan; None where the scan came prepared.
        correlation: With the template, after alignment; None likewise.
        notes: What is unexpected.
    """

    volume: Volume
    mask: Bool[np.ndarray, "x y z"]
    matrix: Float64[np.ndarray, "4 4"] | None = None
    correlation: float | None = None
    notes: tuple[str, ...] = ()


def fit_preprocess(preprocess: Preprocess, grid: Grid, autoencoder: AutoencoderKlConfig) -> Preprocess:
    """Return the preprocessing of an autoencoder for scans of a grid: 128 x 152 x 128 voxels of 1.5 mm for MNI152.

    Args:
        preprocess: That travels with the weights, of which voxel size, mean and deviation count.
        grid: Of the scans.
        autoencoder: Its sizes.
    """
    (spacing,) = preprocess.spacing
    multiple = int(np.lcm(MULTIPLE, autoencoder.divisor))
    size = tuple(-(-length // multiple) * multiple for length in spaced_from_first(grid, spacing).shape)
    return dataclasses.replace(
        preprocess, size=size, axes="xyz", fit="crop", interpolation="linear-first", order="cut-then-scale", padding=0.0
    )


def network_input(volume: Volume, preprocess: Preprocess) -> Float32[np.ndarray, "x y z"]:
    """Return a prepared MRI at the network's voxel size: padded with zeros, and only then scaled."""
    return preprocess(volume)[..., 0]


def on_scan_grid(values: Float[np.ndarray, "x y z"], preprocess: Preprocess, grid: Grid) -> Volume:
    """Bring a map of the network's size onto the grid of the scan, by cubic splines, what was padded cut off first."""
    inner = spaced_from_first(grid, preprocess.spacing[0])
    starts = [(padded - length) // 2 for padded, length in zip(values.shape, inner.shape, strict=True)]
    cut = cut_window(np.asarray(values, np.float32), starts, inner.shape)
    return resample_to(Volume.make(cut, inner.affine), grid, order=3, antialias=False)


def read_prepared(scan: ScanFiles, grid: Grid) -> Prepared:
    """Read an MRI that is in the template's space, without its skull and in WhiteStripe's unit.

    Raises:
        InputError: The file cannot be read, or is not such an MRI.
    """
    volume, _, notes = read_volume(scan)
    require_template_space(volume, grid, scan.path, ADVICE)
    mask = require_brain(volume.array, scan.path)
    low, high = float(volume.array.min()), float(volume.array.max())
    if low >= 0:
        expected = "intensities by WhiteStripe, white matter near 0 and the background far below"
        raise InputError(scan.path, expected, f"{low:g} to {high:g}", "let --preprocess scale them")
    return Prepared(volume, mask, notes=notes)


def read_raw(scan: ScanFiles, mask: Path | None) -> tuple[Volume, Bool[np.ndarray, "x y z"], tuple[str, ...]]:
    """Read any T1-weighted MRI and the mask of its brain, for `prepare`; return notes on the file too.

    Args:
        scan: The MRI.
        mask: Of its brain; None where there is nothing else in it.

    Raises:
        InputError: A file cannot be read, mask and scan are on different grids, or there is no brain.
    """
    volume, _, notes = read_volume(scan)
    if mask is None:
        return volume, require_brain(volume.array, scan.path, "give --mask, a mask of the brain by any tool"), notes
    inside, grid = read_mask(mask, allow_labels=True)
    if grid is None:
        raise InputError(mask, "a mask as NIfTI, on the grid of the scan", "a file without a grid")
    require_same_grid(grid, volume.grid, str(mask), str(scan.path))
    if not inside.any():
        raise InputError(mask, "a mask with voxels", "none", "check the mask")
    return volume, inside, notes


def prepare(
    volume: Volume,
    mask: Bool[np.ndarray, "x y z"],
    template: Volume,
    notes: tuple[str, ...] = (),
    where: object = "volume",
    config: RegistrationConfig = RegistrationConfig("correlation"),
) -> Prepared:
    """Bring the brain of an MRI onto the template's grid and scale it by WhiteStripe.

    Args:
        volume: The MRI.
        mask: Its brain, on the same grid.
        template: A brain in MNI space.
        notes: What is known to be unexpected.
        where: The file, for messages.
        config: Of the alignment.

    Raises:
        InputError: As of `white_stripe`.
    """
    background = min(0.0, float(volume.array.min()))
    brain = Volume.make(np.where(mask, volume.array, background).astype(np.float32), volume.affine)
    matrix, correlation = align_brain(template, brain, config)
    if correlation < POOR:
        notes = (*notes, f"the brain and the template correlate by {correlation:.2f}: see whether they are aligned")
    # The template's voxels, where they lie in the scan.
    places = Grid(template.grid.shape, matrix @ template.affine)
    moved = resample_to(brain, places, order=1, antialias=False, fill=background)
    inside = resample_to(Volume.make(mask.astype(np.uint8), volume.affine), places, order=0).array > 0
    scaled = white_stripe(moved.array, inside, where)
    return Prepared(Volume.make(scaled.array, template.affine), inside, matrix, correlation, notes)


def require_brain(
    array: Shaped[np.ndarray, "x y z"], where: object, advice: str = "let --preprocess cut it out, with --mask"
) -> Bool[np.ndarray, "x y z"]:
    """Return which voxels are not the background, which is one value: the lowest.

    Raises:
        InputError: There are too many: a skull.
    """
    low, high = float(array.min()), float(array.max())
    inside = array > low + 1e-3 * (high - low)
    share = 1 - float(inside.mean())
    if share < LEAST_BACKGROUND:
        expected = f"a brain without its skull, {LEAST_BACKGROUND:.0%} of the voxels of one value around it"
        raise InputError(where, expected, f"{share:.0%} at the lowest value, {low:g}", advice)
    return inside

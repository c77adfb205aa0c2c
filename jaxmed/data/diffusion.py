"""Diffusion scans from files: NIfTI with FSL's text files or DICOM, masks, and the nonlinearity of gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxmed.arrays.foreground import find_foreground
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import masks, nifti
from jaxmed.io.dicom_diffusion import read_diffusion
from jaxmed.io.gradients import GradientTable, Numbers, as_numbers, read_gradients
from jaxmed.io.scans import kind_of
from jaxmed.volume import Volume, require_same_grid

MAX_LENGTH_CHANGE = 0.5
"""Largest change of a gradient by nonlinearity: coils reach 0.1 to 0.2 at the edge of a head."""


class DiffusionScan(NamedTuple):
    """A diffusion scan as it was read.

    Attributes:
        path: Its file or folder.
        dwi: Magnitudes, 4D; NaN and Inf may be among them.
        gradients: b-values and directions in FSL's frame.
        mask: Voxels that count.
        notes: What a reader of its maps should know, one sentence each.
        sigma: Noise of each channel; None where not known.
        gradient_map: What gradients are multiplied by, voxel by voxel; None where they do not vary.
    """

    path: Path
    dwi: Volume
    gradients: GradientTable
    mask: Bool[np.ndarray, "x y z"]
    notes: list[str]
    sigma: float | None = None
    gradient_map: Float32[np.ndarray, "x y z 3 3"] | None = None

    @property
    def reference(self) -> Path | None:
        """The file whose header maps take, where it is NIfTI."""
        return self.path if kind_of(self.path) == "nifti" else None


class Voxels(NamedTuple):
    """Data of some voxels, voxel first, as scans are stored.

    Attributes:
        signals: Magnitudes.
        sigma: Noise of each channel, in the same unit; 0 where not known.
        gradient_map: Matrix that a voxel's gradients are multiplied by; None where all have the table's.
    """

    signals: Float[Array | np.ndarray, "voxel measurement"]
    sigma: Float[Array | np.ndarray, " voxel"]
    gradient_map: Float[Array | np.ndarray, "voxel 3 3"] | None


def gather_voxels(
    signals: Float[np.ndarray, "*voxel image"],
    mask: Numbers | None,
    sigma: Numbers | None,
    gradient_map: Numbers | None,
) -> tuple[Voxels, Bool[np.ndarray, "*voxel"]]:
    """Check what comes beside magnitudes, and take the voxels inside the mask; return them, and where they are.

    Raises:
        InputError: An argument is not what it should be, by its name.
    """
    shape = signals.shape[:-1]
    inside = np.ones(shape, bool) if mask is None else as_numbers(mask, "mask", np.float32) != 0
    if inside.shape != shape:
        raise InputError("mask", f"the shape of the voxels, {shape}", f"{inside.shape}")
    if not inside.any():
        raise InputError("mask", "at least one voxel inside", "none")
    level = as_numbers(0.0 if sigma is None else sigma, "sigma", np.float32)
    if level.ndim and level.shape != shape:
        raise InputError("sigma", f"one number, or the shape of the voxels, {shape}", f"{level.shape}")
    level = np.broadcast_to(level, shape)[inside]
    wrong = level[~((level > 0) & np.isfinite(level))]
    if sigma is not None and len(wrong):
        raise InputError("sigma", "noise levels above 0 in the unit of the signals", f"{wrong[0]:g}")
    matrices = None if gradient_map is None else as_numbers(gradient_map, "gradient_map", np.float32)
    if matrices is not None:
        if matrices.shape != (*shape, 3, 3):
            raise InputError("gradient_map", f"a 3 x 3 matrix per voxel, {(*shape, 3, 3)}", f"{matrices.shape}")
        matrices = matrices[inside]
        if not np.isfinite(matrices).all():
            raise InputError("gradient_map", "finite numbers inside the mask", "NaN or Inf")
    return Voxels(signals[inside], level, matrices), inside


def read_scan(
    dwi: Path | None,
    bvals: Path | None,
    bvecs: Path | None,
    mask: Path | None,
    b0_threshold: float,
    check: Callable[[GradientTable, object], GradientTable],
    *,
    series: str | None = None,
) -> DiffusionScan:
    """Read a scan, its gradient table and its mask: 4D NIfTI with FSL's text files, or DICOM (a folder, or one file).

    Args:
        dwi: The scan.
        bvals: File of b-values; none beside DICOM.
        bvecs: File of directions, likewise.
        mask: NIfTI file on the grid of the scan; None for the largest region of bright unweighted signal.
        b0_threshold: Images up to this b-value, in s/mm^2, are unweighted and need no direction.
        check: (table, file that messages name) -> table with more notes; called before NIfTI's voxels are read.
        series: SeriesInstanceUID to read from a DICOM folder.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    dwi = require_given(dwi, "dwi")
    if kind_of(dwi) == "dicom":
        for name, path in (("bvals", bvals), ("bvecs", bvecs)):
            if path is not None:
                raise InputError(name, "no table beside DICOM files, whose headers hold it", path, f"drop --{name}")
        volume, gradients = read_diffusion(dwi, series=series, b0_threshold=b0_threshold)
        gradients = check(gradients, dwi)
    else:
        shape = nifti.describe(dwi)["shape"]
        images = shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None
        bvals, bvecs = require_given(bvals, "bvals"), require_given(bvecs, "bvecs")
        gradients = check(read_gradients(bvals, bvecs, b0_threshold=b0_threshold, num_images=images), bvals)
        volume = nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True)
    notes = list(gradients.notes)
    if mask is not None:
        return DiffusionScan(dwi, volume, gradients, _read_mask(mask, volume, dwi), notes)
    unweighted = gradients.bvals <= max(b0_threshold, gradients.bvals.min())
    inside = find_foreground(volume.array[..., unweighted].mean(axis=-1))
    notes.append(f"No mask was given: {int(inside.sum()):,} voxels of bright unweighted signal were taken.")
    return DiffusionScan(dwi, volume, gradients, inside, notes)


def _read_mask(path: Path, dwi: Volume, dwi_path: Path) -> Bool[np.ndarray, "x y z"]:
    mask, grid = masks.read_mask(path, allow_labels=True)
    if grid is None:
        raise InputError(path, "a mask as NIfTI, on the grid of the scan", "a picture or an array", "convert it")
    require_same_grid(grid, dwi, str(path), str(dwi_path))
    if not mask.any():
        raise InputError(path, "a mask with voxels inside", "zeros only", "check the mask")
    return mask


def check_voxels(
    signals: Float[np.ndarray, "voxel image"],
    is_b0: Bool[np.ndarray, " image"],
    path: Path,
    notes: list[str],
    left_out: str = "they were not fitted, and map 'flags' shows them",
) -> Bool[np.ndarray, " voxel"]:
    """Refuse a scan with little to fit, note voxels that are not, and return which ones are finite.

    Raises:
        InputError: No voxel has unweighted signal, or most have numbers that are not finite.
    """
    finite = np.asarray(np.isfinite(signals).all(axis=1))
    if not finite.all():
        bad = int((~finite).sum())
        if bad > len(finite) / 2:
            found = f"NaN or Inf in {bad:,} of {len(finite):,}"
            raise InputError(path, "finite voxels inside the mask", found, "mask or repair them first")
        notes.append(f"{bad:,} voxels hold NaN or Inf; {left_out}.")
    b0 = signals[finite][:, is_b0].mean(axis=1)
    empty = int((b0 <= 0).sum())
    if empty == len(b0):
        raise InputError(path, "unweighted signal inside the mask", "none above 0", "check the mask")
    if empty:
        notes.append(f"{empty:,} voxels inside the mask have no unweighted signal; their maps are 0.")
    if (signals[finite] < 0).any():
        notes.append("The scan holds negative values: magnitudes are expected. They were taken as they are.")
    return finite


def read_gradient_map(path: Path, scan: DiffusionScan) -> Float32[np.ndarray, "x y z 3 3"]:
    """Read gradient nonlinearity as the Human Connectome Project stores it.

    Args:
        path: 4D NIfTI file of nine images on the grid of the scan: the matrix L, column by column; the gradients of
            a voxel are (I + L) times those of the table.
        scan: The scan.

    Source: HCP reference manual, appendix on gradient nonlinearity.

    Raises:
        InputError: Another number of images, another grid, or deviations that no gradient coil has.
    """
    volume = nifti.read(path, dimensions=(4,))
    if volume.array.shape[3] != 9:
        raise InputError(path, "nine images, a 3 x 3 matrix per voxel", f"{volume.array.shape[3]}")
    grid = Volume.make(volume.array[..., 0], volume.affine)
    require_same_grid(grid, scan.dwi, str(path), str(scan.path))
    deviation = np.swapaxes(volume.array.reshape(*volume.array.shape[:3], 3, 3), -1, -2)
    largest = float(np.abs(deviation).max())
    if largest > MAX_LENGTH_CHANGE:
        expected = f"deviations below {MAX_LENGTH_CHANGE:g} of a gradient"
        raise InputError(
            path, expected, f"{largest:.3g}", "give the file of deviations, as a share, without the identity"
        )
    return (deviation + np.eye(3)).astype(np.float32)

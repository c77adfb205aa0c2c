"""Diffusion scans from files: NIfTI with FSL's text files or DICOM, and the nonlinearity of their gradients."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import nifti
from jaxmed.io.dicom_diffusion import read_diffusion
from jaxmed.io.gradients import GradientTable, read_gradients
from jaxmed.io.scans import kind_of
from jaxmed.volume import Volume, require_same_grid

MAX_LENGTH_CHANGE = 0.5
"""Largest change of a gradient by nonlinearity: coils reach 0.1 to 0.2 at the edge of a head."""


def count_images(dwi: Path) -> int | None:
    """Return the number of images of a 4D NIfTI file from its header; None where it is something else."""
    shape = nifti.describe(dwi)["shape"]
    return shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None


def read_magnitudes(dwi: Path) -> Volume:
    """Read a 4D NIfTI file of magnitudes; NaN and Inf may be among them."""
    return nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True)


def read_dwi(
    dwi: Path,
    bvals: Path | None,
    bvecs: Path | None,
    b0_threshold: float,
    check: Callable[[GradientTable, object], GradientTable],
    *,
    series: str | None = None,
) -> tuple[Volume, GradientTable]:
    """Read a scan and its gradient table: 4D NIfTI with FSL's text files, or DICOM (a folder, or an enhanced file).

    Args:
        dwi: The scan.
        bvals: File of b-values; none beside DICOM.
        bvecs: File of directions, likewise.
        b0_threshold: Images up to this b-value, in s/mm^2, need no direction.
        check: (table, file that messages name) -> table with more notes; called before NIfTI's voxels are read.
        series: SeriesInstanceUID to read from a DICOM folder.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if kind_of(dwi) == "dicom":
        for name, path in (("bvals", bvals), ("bvecs", bvecs)):
            if path is not None:
                raise InputError(name, "no table beside DICOM files, whose headers hold it", path, f"drop --{name}")
        volume, gradients = read_diffusion(dwi, series=series, b0_threshold=b0_threshold)
        return volume, check(gradients, dwi)
    images = count_images(dwi)
    bvals, bvecs = require_given(bvals, "bvals"), require_given(bvecs, "bvecs")
    gradients = read_gradients(bvals, bvecs, b0_threshold=b0_threshold, num_images=images)
    gradients = check(gradients, bvals)
    return read_magnitudes(dwi), gradients


def read_gradient_map(path: Path, dwi: Volume, dwi_path: Path) -> Float32[np.ndarray, "x y z 3 3"]:
    """Read gradient nonlinearity as the Human Connectome Project stores it.

    Args:
        path: 4D NIfTI file of nine images on the grid of the scan: the matrix L, column by column; the gradients of
            a voxel are (I + L) times those of the table.
        dwi: The scan.
        dwi_path: File of the scan, for messages.

    Source: HCP reference manual, appendix on gradient nonlinearity.

    Raises:
        InputError: Another number of images, another grid, or deviations that no gradient coil has.
    """
    volume = nifti.read(path, dimensions=(4,))
    if volume.array.shape[3] != 9:
        raise InputError(path, "nine images, a 3 x 3 matrix per voxel", f"{volume.array.shape[3]}")
    grid = Volume.make(volume.array[..., 0], volume.affine)
    require_same_grid(grid, dwi, str(path), str(dwi_path))
    deviation = np.swapaxes(volume.array.reshape(*volume.array.shape[:3], 3, 3), -1, -2)
    largest = float(np.abs(deviation).max())
    if largest > MAX_LENGTH_CHANGE:
        expected = f"deviations below {MAX_LENGTH_CHANGE:g} of a gradient"
        raise InputError(
            path, expected, f"{largest:.3g}", "give the file of deviations, as a share, without the identity"
        )
    return (deviation + np.eye(3)).astype(np.float32)

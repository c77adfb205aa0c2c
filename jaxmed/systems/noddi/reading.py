"""Read a diffusion scan, for a fit or for a network, and check everything that would make its maps wrong.

What cannot be fitted is refused; what can be fitted but should be known becomes a note, one sentence each.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxmed.arrays.foreground import find_foreground
from jaxmed.errors import InputError
from jaxmed.io import masks, nifti
from jaxmed.io.dicom_diffusion import read_diffusion
from jaxmed.io.gradients import GradientTable, read_gradients
from jaxmed.io.scans import kind_of
from jaxmed.physics.acquisition import estimate_sigma, find_shells
from jaxmed.systems.noddi.options import Noise
from jaxmed.systems.noddi.table import Table, check_protocol, match_table
from jaxmed.volume import Volume

SERIES_TOLERANCE = 0.15
"""Unweighted images of one scan differ by less than this in their median; drift is a few percent."""
MAX_LENGTH_CHANGE = 0.5
"""Of a gradient by nonlinearity: coils reach 0.1 to 0.2 at the edge of a head."""


class Scan(NamedTuple):
    """A checked diffusion scan, ready to fit.

    Attributes:
        path: Of the file or folder that it came from.
        dwi: Magnitudes, 4D; NaN and Inf may be among them.
        gradients: b-values and directions in FSL's frame.
        mask: Voxels to fit.
        sigma: Noise of each channel; None where not known.
        gradient_map: What gradients are multiplied by, voxel by voxel; None where they do not vary.
        notes: What a reader of the maps should know.
    """

    path: Path
    dwi: Volume
    gradients: GradientTable
    mask: Bool[np.ndarray, "x y z"]
    sigma: float | None
    gradient_map: Float32[np.ndarray, "x y z 3 3"] | None
    notes: list[str]


class Signals(NamedTuple):
    """A checked scan of a network's protocol.

    Attributes:
        dwi: The 4D scan.
        mask: Voxels inside whose values are all finite.
        signals: Magnitudes of those voxels, images in the network's order.
        notes: What a reader of the maps should know, one sentence each.
    """

    dwi: Volume
    mask: Bool[np.ndarray, "x y z"]
    signals: Float32[np.ndarray, "voxel image"]
    notes: list[str]


def require_path(path: Path | None, name: str) -> Path:
    """Return a path that a stage cannot do without.

    Raises:
        InputError: It was not given.
    """
    if path is None:
        raise InputError(name, "a file", "nothing", f"give --{name} FILE, or try --preset smoke")
    return path


def read_table(
    bvals: Path | None,
    bvecs: Path | None,
    b0_threshold: float,
    *,
    num_images: int | None = None,
    needs_two_shells: bool = True,
) -> GradientTable:
    """Read a gradient table and check that it can be fitted or trained for; see `check_protocol`.

    Raises:
        InputError: It is missing or wrong.
    """
    bvals, bvecs = require_path(bvals, "bvals"), require_path(bvecs, "bvecs")
    table = read_gradients(bvals, bvecs, b0_threshold=b0_threshold, num_images=num_images)
    notes = check_protocol(table, bvals, b0_threshold, needs_two_shells=needs_two_shells)
    return table._replace(notes=(*table.notes, *notes))


def count_images(dwi: Path) -> int | None:
    """Return the number of images of a 4D NIfTI file from its header; None where it is something else."""
    shape = nifti.describe(dwi)["shape"]
    return shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None


def read_dwi(
    dwi: Path,
    bvals: Path | None,
    bvecs: Path | None,
    b0_threshold: float,
    *,
    needs_two_shells: bool,
    series: str | None = None,
) -> tuple[Volume, GradientTable]:
    """Read a scan and its gradient table: 4D NIfTI with FSL's text files, or DICOM (a folder, or an enhanced file).

    Of a NIfTI scan the table is checked before the voxels are read.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if kind_of(dwi) == "dicom":
        for name, path in (("bvals", bvals), ("bvecs", bvecs)):
            if path is not None:
                raise InputError(name, "no table beside DICOM files, whose headers hold it", path, f"drop --{name}")
        volume, gradients = read_diffusion(dwi, series=series, b0_threshold=b0_threshold)
        notes = check_protocol(gradients, dwi, b0_threshold, needs_two_shells=needs_two_shells)
        return volume, gradients._replace(notes=(*gradients.notes, *notes))
    gradients = read_table(bvals, bvecs, b0_threshold, num_images=count_images(dwi), needs_two_shells=needs_two_shells)
    return nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True), gradients


def read_signals(dwi: Path | None, bvals: Path | None, bvecs: Path | None, mask: Path | None, table: Table) -> Signals:
    """Read a scan of a network's protocol.

    Args:
        dwi: 4D NIfTI file of magnitudes.
        bvals: Its b-values.
        bvecs: Its directions.
        mask: NIfTI file on its grid; None for the bright unweighted voxels.
        table: The protocol that it must have, in whatever order.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    dwi, bvals, bvecs = require_path(dwi, "dwi"), require_path(bvals, "bvals"), require_path(bvecs, "bvecs")
    gradients = read_gradients(bvals, bvecs, b0_threshold=table.b0_threshold, num_images=count_images(dwi))
    match = match_table(table, gradients.bvals, gradients.bvecs, bvals)
    volume = nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True)
    notes = [*gradients.notes, *match.notes]
    b0 = volume.array[..., match.order[table.is_b0]].mean(axis=-1)
    inside = read_mask(mask, volume, dwi, b0, notes)
    signals = volume.array[inside][:, match.order]
    finite = check_voxels(signals, table.is_b0, dwi, notes, left_out="their maps are 0, and map 'mask' leaves them out")
    inside[inside] = finite
    return Signals(volume, inside, signals[finite], notes)


def read_mask(path: Path | None, dwi: Volume, dwi_path: Path, b0: np.ndarray, notes: list[str]) -> np.ndarray:
    """Read a mask on the grid of a scan, or find the bright region.

    Raises:
        InputError: The mask is on another grid, or empty.
    """
    if path is None:
        mask = find_foreground(b0)
        notes.append(f"No mask was given: {int(mask.sum()):,} voxels of bright unweighted signal were taken.")
        return mask
    mask, grid = masks.read_mask(path, allow_labels=True)
    if grid is None:
        raise InputError(path, "a mask as NIfTI, on the grid of the scan", "a picture or an array", "convert it")
    nifti.require_same_grid(grid, dwi, str(path), str(dwi_path))
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


def series_scales(
    signals: Float[np.ndarray, "voxel image"], is_b0: Bool[np.ndarray, " image"]
) -> Float[np.ndarray, " image"]:
    """Return the brightness of each image's series relative to the first.

    A series is a run of images from one run of unweighted images to the next; its brightness is the median over voxels
    of its unweighted images. Scanners scale series apart, and files that join them keep the difference.
    """
    starts = np.flatnonzero(is_b0 & ~np.concatenate([[False], is_b0[:-1]]))
    # Images before the first unweighted one belong to its series.
    series = np.maximum(np.searchsorted(starts, np.arange(len(is_b0)), side="right") - 1, 0)
    usable = np.isfinite(signals).all(axis=1)
    levels = np.array(
        [np.median(signals[usable][:, is_b0 & (series == index)].mean(axis=1)) for index in range(len(starts))]
    )
    if levels[0] <= 0:
        return np.ones(len(is_b0))
    return (levels / levels[0])[series]


def check_series(
    signals: Float[np.ndarray, "voxel image"], is_b0: Bool[np.ndarray, " image"], scale: bool, notes: list[str]
) -> Float[np.ndarray, " image"] | None:
    """Note series that differ in brightness, and return what to divide their images by where asked to."""
    scales = series_scales(signals, is_b0)
    if np.max(np.abs(np.log(np.maximum(scales, 1e-6)))) <= np.log(1 + SERIES_TOLERANCE):
        return None
    image = int(np.argmax(np.abs(np.log(np.maximum(scales, 1e-6)))))
    said = (
        f"Unweighted images differ in brightness: those of image {image + 1} on have {scales[image]:.2f} of the first"
    )
    if scale:
        notes.append(f"{said}; every series was divided by its own.")
        return scales
    notes.append(
        f"{said}. If series were scaled apart, the maps are wrong: --scale-series divides each by its own unweighted "
        "images."
    )
    return None


def read_gradient_map(path: Path, dwi: Volume, dwi_path: Path) -> Float32[np.ndarray, "x y z 3 3"]:
    """Read gradient nonlinearity as the Human Connectome Project stores it.

    Args:
        path: 4D NIfTI file of nine images on the grid of the scan: the matrix L, column by column; the gradients of
            a voxel are (I + L) times those of the table.
        dwi: The scan.
        dwi_path: Of the scan, for messages.

    Source: HCP reference manual, appendix on gradient nonlinearity.

    Raises:
        InputError: Another number of images, another grid, or deviations that no gradient coil has.
    """
    volume = nifti.read(path, dimensions=(4,))
    if volume.array.shape[3] != 9:
        raise InputError(path, "nine images, a 3 x 3 matrix per voxel", f"{volume.array.shape[3]}")
    grid = Volume.make(volume.array[..., 0], volume.affine)
    nifti.require_same_grid(grid, dwi, str(path), str(dwi_path))
    deviation = np.swapaxes(volume.array.reshape(*volume.array.shape[:3], 3, 3), -1, -2)
    largest = float(np.abs(deviation).max())
    if largest > MAX_LENGTH_CHANGE:
        expected = f"deviations below {MAX_LENGTH_CHANGE:g} of a gradient"
        raise InputError(
            path, expected, f"{largest:.3g}", "give the file of deviations, as a share, without the identity"
        )
    return (deviation + np.eye(3)).astype(np.float32)


def choose_sigma(
    noise: Noise | str, sigma: float | None, b0: Float[np.ndarray, "voxel repeat"], notes: list[str]
) -> float | None:
    """Return the noise level of the Rician likelihood, or None for least squares.

    Raises:
        InputError: Rician was asked for and the noise is not known.
    """
    if noise == "gaussian":
        return None
    if sigma is not None:
        return sigma
    repeats = b0[np.isfinite(b0).all(axis=1)]
    if repeats.shape[1] >= 3:
        found = estimate_sigma(repeats)
        if found > 0:
            notes.append(f"Noise was estimated from {repeats.shape[1]} unweighted images: sigma = {found:.4g}.")
            return found
    if noise == "rician":
        raise InputError(
            "sigma",
            "a noise level for the Rician likelihood",
            f"{repeats.shape[1]} unweighted image(s)",
            "give --sigma",
        )
    notes.append(
        f"With {repeats.shape[1]} unweighted image(s) the noise is not known: squares were minimised. "
        "Give --sigma for the Rician likelihood."
    )
    return None


def attenuation_notes(
    signals: Float[np.ndarray, "voxel image"],
    s0: Float[np.ndarray, " voxel"],
    bvals: Float[np.ndarray, " image"],
    b0_threshold: float,
    free_diffusivity: float,
) -> list[str]:
    """Note shells whose mean signal cannot be diffusion: above the unweighted one, or below that of free water."""
    notes = []
    for shell in find_shells(bvals, b0_threshold)[1:]:
        level = mean_attenuation(signals, s0, shell.rows)
        free = float(np.exp(-1e-3 * shell.bval * free_diffusivity))
        where = f"At b = {shell.bval:.0f} the mean signal is {level:.2f} of the unweighted one"
        if level > 1.0:
            notes.append(f"{where}, more than diffusion allows: were the images scaled apart?")
        elif level < 0.8 * free:
            notes.append(f"{where}, less than the {free:.2f} of free water: were the images scaled apart?")
    return notes


def mean_attenuation(signals: np.ndarray, s0: np.ndarray, rows: tuple[int, ...]) -> float:
    """Return the mean over voxels of the mean signal of some images relative to the unweighted signal."""
    return float(np.mean(signals[:, list(rows)].mean(axis=1) / s0))

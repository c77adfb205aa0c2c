"""Read a diffusion scan and check everything that would make its maps wrong.

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
from jaxmed.physics.acquisition import estimate_sigma, find_shells
from jaxmed.systems.noddi.options import Noise
from jaxmed.volume import Volume

SERIES_TOLERANCE = 0.15
"""Unweighted images of one scan differ by less than this in their median; drift is a few percent."""
HCP_THRESHOLD = 100.0
"""What Human Connectome 7T scans want, whose unweighted images have b = 55 to 65."""
NEARLY_UNWEIGHTED = 70.0
"""Above it an image is weighted, if weakly."""
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


def check_protocol(gradients: GradientTable, path: Path, b0_threshold: float, allow_single_shell: bool) -> list[str]:
    """Refuse tables that NODDI cannot be fitted to, and return notes on the others.

    Raises:
        InputError: Nothing is unweighted, one shell only, or directions lie on a plane.
    """
    bvals = gradients.bvals
    shells = find_shells(bvals, b0_threshold)
    if shells[0].bval > b0_threshold:
        lowest = float(bvals.min())
        advice = "raise --fit.b0-threshold if these images are meant as b = 0"
        if lowest <= HCP_THRESHOLD:
            advice = f"--fit.b0-threshold {HCP_THRESHOLD:g} takes them as unweighted, as HCP 7T scans want"
        expected = f"an unweighted image (b <= {b0_threshold:g} s/mm^2)"
        raise InputError(path, expected, f"a smallest b-value of {lowest:g}", advice)
    weighted = shells[1:]
    directions = gradients.bvecs[bvals > b0_threshold]
    if len(weighted) < 2 and not allow_single_shell:
        raise InputError(
            path,
            "two or more weighted shells",
            f"one at b = {weighted[0].bval:.0f} s/mm^2",
            "one shell cannot tell neurite density from free water, so its maps mean nothing; "
            "--allow-single-shell fits it anyway",
        )
    if np.linalg.matrix_rank(directions.T @ directions, tol=1e-3) < 3 or len(directions) < 6:
        raise InputError(
            path, "six or more weighted images in different directions", f"{len(directions)} on a plane or line"
        )
    return _protocol_notes(bvals, b0_threshold)


def _protocol_notes(bvals: np.ndarray, b0_threshold: float) -> list[str]:
    notes = []
    weighted = np.unique(bvals[bvals > b0_threshold])
    shells = find_shells(bvals, b0_threshold)[1:]
    if len(weighted) > len(shells):
        ranges = ", ".join(
            f"{min(bvals[list(shell.rows)]):g} to {max(bvals[list(shell.rows)]):g}"
            for shell in shells
            if np.ptp(bvals[list(shell.rows)]) > 0
        )
        notes.append(
            f"{len(weighted)} different b-values make {len(shells)} shell(s) ({ranges} s/mm^2): shells are for checks "
            "and tables, every image was fitted at its own b-value."
        )
    nearly = (bvals > b0_threshold) & (bvals <= NEARLY_UNWEIGHTED)
    if nearly.any():
        notes.append(
            f"{int(nearly.sum())} image(s) at b = {bvals[nearly].min():g} to {bvals[nearly].max():g} count as "
            f"weighted; --fit.b0-threshold {HCP_THRESHOLD:g} takes them as unweighted, as HCP 7T scans want."
        )
    return notes


def read_dwi(
    dwi: Path,
    bvals: Path | None,
    bvecs: Path | None,
    b0_threshold: float,
    *,
    allow_single_shell: bool,
    series: str | None = None,
) -> tuple[Volume, GradientTable, list[str]]:
    """Read a scan and its gradient table: 4D NIfTI with FSL's text files, or a folder of DICOM files.

    Of a NIfTI scan the table is checked before the voxels are read.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if dwi.is_dir():
        for name, path in (("bvals", bvals), ("bvecs", bvecs)):
            if path is not None:
                raise InputError(name, "no table beside DICOM files, whose headers hold it", path, f"drop --{name}")
        volume, gradients = read_diffusion(dwi, series=series, b0_threshold=b0_threshold)
        return volume, gradients, check_protocol(gradients, dwi, b0_threshold, allow_single_shell)
    for name, path in (("bvals", bvals), ("bvecs", bvecs)):
        if path is None:
            raise InputError(name, "a file", "nothing", f"give --{name} FILE, or try --preset smoke")
    assert bvals is not None and bvecs is not None
    shape = nifti.describe(dwi)["shape"]
    num_images = shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None
    gradients = read_gradients(bvals, bvecs, b0_threshold=b0_threshold, num_images=num_images)
    notes = list(gradients.notes) + check_protocol(gradients, bvals, b0_threshold, allow_single_shell)
    volume = nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True)
    return volume, gradients, notes


def read_mask(path: Path | None, dwi: Volume, dwi_path: Path, b0: np.ndarray, notes: list[str]) -> np.ndarray:
    """Read a mask on the grid of a scan, or find the bright region.

    Raises:
        InputError: The mask is on another grid, or empty.
    """
    if path is None:
        mask = find_foreground(np.nan_to_num(b0, posinf=0.0, neginf=0.0))
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
    signals: Float[np.ndarray, "voxel image"], is_b0: Bool[np.ndarray, " image"], path: Path, notes: list[str]
) -> None:
    """Refuse a scan with little to fit, and note voxels that are not.

    Raises:
        InputError: No voxel has unweighted signal, or most have numbers that are not finite.
    """
    finite = np.asarray(np.isfinite(signals).all(axis=1))
    if not finite.all():
        bad = int((~finite).sum())
        if bad > len(finite) / 2:
            found = f"NaN or Inf in {bad:,} of {len(finite):,}"
            raise InputError(path, "finite voxels inside the mask", found, "mask or repair them first")
        notes.append(f"{bad:,} voxels hold NaN or Inf; they were not fitted, and map 'flags' shows them.")
    b0 = signals[finite][:, is_b0].mean(axis=1)
    empty = int((b0 <= 0).sum())
    if empty == len(b0):
        raise InputError(path, "unweighted signal inside the mask", "none above 0", "check the mask")
    if empty:
        notes.append(f"{empty:,} voxels inside the mask have no unweighted signal; they were not fitted.")
    if (signals[finite] < 0).any():
        notes.append("The scan holds negative values: magnitudes are expected. They were fitted as they are.")


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

"""Head scans of any modality: CT is told by its air, and refused in another unit than HU; on the host."""

from pathlib import Path
from typing import Literal, TypeAlias

import jax
import numpy as np

from jaxmed.data.preprocess import Loaded, Preprocess, load
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.volume import Volume

Modality: TypeAlias = Literal["auto", "CT", "other"]
LARGEST_AIR = -500.0  # HU: a scan that goes below is CT
SOFT_HU = (-100.0, 150.0)  # what the median of the middle of a head is within
# CT that is stored 1024 above its HU: the median of the middle, the spread of its middle half, the largest value.
STORED_SOFT, STORED_SPREAD, STORED_LARGEST = (924.0, 1174.0), 120.0, (1800.0, 4200.0)


def load_head(
    image: Volume | ScanFiles | Path | str | np.ndarray | jax.Array,
    plain: Preprocess,
    ct: Preprocess,
    modality: Modality = "auto",
    fill: float | None = None,
    *,
    average: bool = False,
    crop: bool = False,
) -> Loaded:
    """Read a scan for a network that takes CT, cut to a window of HU, and any other modality.

    Args:
        image: A volume, a file, a DICOM folder, or an array.
        plain: How any scan is read.
        ct: How CT is.
        modality: Which it is; "auto" takes scans with values below -500 for CT.
        fill: Intensity of voxels that have none; None refuses them.
        average: Whether the last of four axes, of colours or echoes, is averaged.
        crop: Whether what is 0 around the head is cut off.

    Raises:
        InputError: For whatever is wrong with it; CT without air whose values are not HU.
    """
    image = Path(image) if isinstance(image, str) else image
    image = np.asarray(image) if isinstance(image, jax.Array) else image
    image = _averaged(image, fill) if average else image
    scan = load(image, ct if modality == "CT" else plain, fill)
    if scan.volume.array.ndim != 3:
        raise InputError(scan.path, "a volume of one channel", f"shape {scan.volume.array.shape}")
    if scan.extent[0] >= LARGEST_AIR:
        _require_unit(scan, modality)
    elif modality == "auto":
        scan = load(image, ct, fill)
    return scan._replace(volumes=(_cropped(scan.volume),)) if crop else scan


def _averaged(
    volume: Volume | ScanFiles | Path | np.ndarray, fill: float | None
) -> Volume | ScanFiles | Path | np.ndarray:
    """Return a volume of four axes without the last; anything else as it is."""
    path = volume.path if isinstance(volume, ScanFiles) else volume
    if isinstance(path, Path) and path.name.lower().endswith(nifti.SUFFIXES):
        read = nifti.read(path, fill=fill)
        volume = read if read.array.ndim == 4 else volume
    if isinstance(volume, Volume) and volume.array.ndim == 4:
        return Volume.make(volume.array.mean(-1, dtype=np.float32), volume.affine)
    return volume


def _cropped(volume: Volume) -> Volume:
    """Cut a volume to the box of what is not 0."""
    low, high = (edge(np.argwhere(volume.array), 0) for edge in (np.min, np.max))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    return Volume.make(volume.array[tuple(map(slice, low, high + 1))], affine)


def _require_unit(scan: Loaded, modality: Modality) -> None:
    """Refuse CT in another unit than HU, of a scan without air: cut to 0 to 80 it would be white all over.

    Raises:
        InputError: It was called CT and the middle of it is no soft tissue, or it looks like CT above its HU.
    """
    array = scan.stored.volumes[0].array
    middle = array[tuple(slice(size // 4, size - size // 4) for size in array.shape)]
    middle = middle[middle != 0]
    if not middle.size or modality == "other":
        return
    low, median, high = (float(value) for value in np.percentile(middle, (25, 50, 75)))
    found = f"no air below {LARGEST_AIR:g} and a median of {median:,.0f} in the middle, up to {scan.extent[1]:,.0f}"
    if modality == "CT" and not SOFT_HU[0] <= median <= SOFT_HU[1]:
        expected = f"HU, so soft tissue of {SOFT_HU[0]:g} to {SOFT_HU[1]:g} in the middle"
        raise InputError(scan.path, expected, found, "give it in HU, or leave --modality out to go by its extremes")
    is_stored = STORED_SOFT[0] <= median <= STORED_SOFT[1] and high - low <= STORED_SPREAD
    if modality == "auto" and is_stored and STORED_LARGEST[0] <= scan.extent[1] <= STORED_LARGEST[1]:
        advice = "subtract 1024 where it is CT, else set --modality other"
        raise InputError(
            scan.path, "CT in HU, or another scan", f"values like those of CT stored 1024 above HU: {found}", advice
        )

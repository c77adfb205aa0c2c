"""Host-side preparation of images: to one frame, one voxel size, one intensity range, one shape.

Small functions of arrays and volumes, and `VolumeTransform`, which does them in order from settings. Arrays leave
with channels last, as float32. What is random takes the record's generator.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import crop_or_pad, reorient, resample, resize
from jaxmed.data.records import read_file
from jaxmed.errors import InputError
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
class Intensity:
    """How stored intensities become those that a model sees.

    Attributes:
        kind: "window" maps [low, high] to [0, 1] and clips; "percentile" does so between two percentiles of the
            foreground; "zscore" gives the foreground mean 0 and standard deviation 1; "none" keeps the values.
        low: Lower end: HU (or the image's unit) of a window, percent of a percentile.
        high: Upper end, likewise.
        clip: Whether percentiles clip.
    """

    kind: Literal["window", "percentile", "zscore", "none"] = "zscore"
    low: float = 0.0
    high: float = 100.0
    clip: bool = True

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low, high: expected low below high, found {self.low, self.high}")
        if self.kind == "percentile" and not 0 <= self.low < self.high <= 100:
            raise ValueError(f"low, high: expected percentages, found {self.low, self.high}")


@dataclasses.dataclass(frozen=True)
class VolumeTransform:
    """One volume, always in the same way: reorient, resample, scale intensities, cut or extend.

    Attributes:
        frame: Where the array axes point, such as "RAS"; empty keeps the stored axes.
        spacing: New voxel size in mm; None keeps the stored one.
        size: New number of voxels; None keeps it.
        fit: How the size is reached: "crop" cuts or extends about the centre, "resize" resamples the whole field of
            view.
        intensity: What becomes of the values; applied before cutting, so it sees the whole field of view.
        padding: Value of added voxels, in the new intensities.
        order: Interpolation: 0 (labels), 1 or 3.
    """

    frame: str = "RAS"
    spacing: tuple[float, float, float] | None = None
    size: tuple[int, int, int] | None = None
    fit: Literal["crop", "resize"] = "crop"
    intensity: Intensity = Intensity()
    padding: float = 0.0
    order: Literal[0, 1, 3] = 1

    def __call__(self, image: Volume | str | Path) -> Float32[np.ndarray, "x y z channel"]:
        """Return the array of `apply`, with channels last.

        Raises:
            InputError: When the file cannot be read, is not a volume, or its intensities have no spread.
        """
        array = self.apply(image).array
        return np.ascontiguousarray(array[..., None] if array.ndim == 3 else array, np.float32)

    def apply(self, image: Volume | str | Path) -> Volume:
        """Return the volume on its new grid, whose affine leads back to the world."""
        volume = image if isinstance(image, Volume) else load_volume(image)
        if self.frame:
            volume = reorient(volume, self.frame)
        if self.spacing is not None:
            volume = resample(volume, self.spacing, order=self.order)
        if self.size is not None and self.fit == "resize":
            volume = resize(volume, self.size, order=self.order)
        volume = Volume.make(scale_intensity(volume.array, self.intensity), volume.affine)
        if self.size is not None and self.fit == "crop":
            volume = crop_or_pad(volume, self.size, fill=self.padding)
        return volume


def load_volume(path: str | Path) -> Volume:
    """Read a file that has to be a volume.

    Raises:
        InputError: When it cannot be read or is a 2D image.
    """
    volume = read_file(Path(path))
    if not isinstance(volume, Volume):
        raise InputError(path, "a NIfTI volume", "an image without a place in the world")
    return volume


def scale_intensity(image: Shaped[np.ndarray, "..."], intensity: Intensity) -> Shaped[np.ndarray, "..."]:
    """Do what an `Intensity` says."""
    match intensity.kind:
        case "window":
            return window(image, intensity.low, intensity.high)
        case "percentile":
            return percentile_range(image, intensity.low, intensity.high, clip=intensity.clip)
        case "zscore":
            return z_score(image)
        case "none":
            return image


def window(image: Shaped[np.ndarray, "..."], low: float, high: float) -> Float32[np.ndarray, "..."]:
    """Map [low, high] to [0, 1] and clip what is beyond; for CT both are in HU."""
    scaled = np.subtract(image, np.float32(low), dtype=np.float32)
    scaled *= np.float32(1 / (high - low))
    return np.clip(scaled, 0, 1, out=scaled)


def z_score(
    image: Shaped[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None = None
) -> Float32[np.ndarray, "..."]:
    """Shift and scale so that the masked voxels have mean 0 and standard deviation 1.

    Args:
        image: Voxels; of a 4D volume each channel has its own mean and deviation.
        mask: Voxels that count; by default the largest bright region (`arrays.foreground`), or all of a 2D image.

    Raises:
        InputError: When the voxels that count are all equal, or there are none.
    """
    if image.ndim == 4:
        return np.stack([z_score(image[..., channel], mask) for channel in range(image.shape[3])], axis=-1)
    values = _counted(image, mask)
    deviation = values.std(dtype=np.float64)
    if not deviation > 0:
        raise InputError("image", "a spread of intensities", f"{len(values)} voxels of one value")
    scaled = np.subtract(image, np.float32(values.mean(dtype=np.float64)), dtype=np.float32)
    scaled *= np.float32(1 / deviation)
    return scaled


def percentile_range(
    image: Shaped[np.ndarray, "..."],
    low: float = 1.0,
    high: float = 99.0,
    mask: Bool[np.ndarray, "..."] | None = None,
    *,
    clip: bool = True,
) -> Float32[np.ndarray, "..."]:
    """Map the range between two percentiles to [0, 1].

    Args:
        image: Voxels; of a 4D volume each channel has its own range.
        low: In percent.
        high: In percent.
        mask: Voxels that count; by default as in `z_score`.
        clip: Whether values beyond the percentiles are clipped.

    Raises:
        InputError: When the percentiles coincide.
    """
    if image.ndim == 4:
        channels = (image[..., channel] for channel in range(image.shape[3]))
        return np.stack([percentile_range(channel, low, high, mask, clip=clip) for channel in channels], axis=-1)
    bottom, top = np.percentile(_counted(image, mask), (low, high))
    if not top > bottom:
        raise InputError("image", f"a spread between percentiles {low:g} and {high:g}", f"{bottom:g} for both")
    if clip:
        return window(image, bottom, top)
    return np.multiply(np.subtract(image, np.float32(bottom), dtype=np.float32), np.float32(1 / (top - bottom)))


def random_crop(
    fields: Mapping[str, Shaped[np.ndarray, "..."]],
    size: tuple[int, ...],
    generator: np.random.Generator,
    padding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Cut the same random window out of several arrays; mapped arrays are read only there.

    Args:
        fields: Arrays of equal leading (spatial) axes, as many as `size` has; further axes are kept whole.
        size: Voxels along each spatial axis. An axis that is shorter is extended on both sides.
        generator: The record's.
        padding: Value of added voxels per field, 0 by default.

    Raises:
        InputError: When the arrays differ in shape.
    """
    shapes = {name: array.shape[: len(size)] for name, array in fields.items()}
    spatial = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(spatial) != len(size):
        raise InputError("random_crop", f"arrays of one shape in {len(size)} axes", shapes)
    spare = [old - new for old, new in zip(spatial, size, strict=True)]
    start = [int(generator.integers(0, extra + 1)) if extra > 0 else 0 for extra in spare]
    inside = tuple(slice(first, first + new) for first, new in zip(start, size, strict=True))
    margins = [(max(0, -extra // 2), max(0, -extra - (-extra // 2))) for extra in spare]
    cut = {}
    for name, array in fields.items():
        part = np.array(array[inside])
        if any(map(any, margins)):
            rest = [(0, 0)] * (part.ndim - len(size))
            part = np.pad(part, margins + rest, constant_values=(padding or {}).get(name, 0))
        cut[name] = part
    return cut


def _counted(image: Shaped[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None) -> Float[np.ndarray, " voxel"]:
    if mask is None and image.ndim == 3:
        mask = find_foreground(np.asarray(image, np.float32))
    values = np.asarray(image if mask is None else image[mask]).reshape(-1)
    if not values.size:
        raise InputError("image", "some foreground", "none", "give a mask, or check the image")
    return values.astype(np.float32, copy=False)

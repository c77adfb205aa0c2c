"""How stored intensities become those that a network sees, and back; on the host.

Every kind is a straight line through two stored intensities, `low` and `high`, that become the ends of `range`; then,
if asked for, clipping, and a mean and deviation per channel.

Source: DynamicDPS, arXiv:2503.01075, official code, for "background" in [0, 2]; it divides by 4096, which only suits
data in that unit (`high` does the same).
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.arrays.foreground import find_foreground
from jaxmed.config import NonNegative, Positive, checked
from jaxmed.errors import InputError

Kind = Literal["keep", "unit", "window", "percentile", "minmax", "zscore", "background"]
KINDS = ("keep", "unit", "window", "percentile", "minmax", "zscore", "background")
LEAST_UNIT = 4095 / 65535
"""A range that ends below this is no image in [0, 1]: data of 12 bits in 16, or labels."""
LEAST_HU = 2.0
"""A range of values below this is no CT scan in HU."""
# A background this far below 0 is one of its own, and more than such a share of voxels so far below it is no noise;
# distances as shares of the range from the background to the 99.5th percentile.
LEAST_SHIFT, LARGEST_DEPTH, LARGEST_SHARE = 0.02, 0.3, 0.01


@dataclasses.dataclass(frozen=True)
@checked
class Intensity:
    """How stored intensities become those that a network sees.

    Attributes:
        kind: "keep" leaves them. "unit" takes values in [0, 1] (pictures of 8 bits are divided by 255, of 16 by 65535)
            that reach beyond a sixteenth of it, which data of 12 bits stored in 16 do not. "window" maps the ends of
            `window`, "percentile" two percentiles, "minmax" the extremes to the ends of `range`. "zscore" gives mean 0
            and deviation 1. "background" is for magnitudes: the background, 0 or a lower value in scaled scans, becomes
            the lower end, and a percentile of what is inside the head `reference`. Each channel has its own statistics.
        window: Stored intensities, such as HU, of "window".
        percentiles: Of "percentile"; the second one of "background"; in percent.
        inside: Which voxels the statistics of "percentile", "minmax" and "zscore" are of: "all", "foreground" (the
            largest bright region), or "nonzero", where zeros stay 0.
        reference: What the percentile of "background" becomes, in the network's unit.
        high: Of "background": stored intensity that becomes the upper end, for data of one known unit; 0 goes by the
            percentile.
        range: Ends of the network's unit.
        clip: Whether what lies beyond the range is clipped; never for "keep" and "zscore".
        mean: Subtracted last, one number per channel; empty for none.
        std: Divided by last, likewise.
    """

    kind: Kind = "unit"
    window: tuple[float, float] = (-175.0, 250.0)
    percentiles: tuple[float, float] = (1.0, 99.0)
    inside: Literal["all", "foreground", "nonzero"] = "all"
    reference: Positive = 1.6
    high: NonNegative = 0.0
    range: tuple[float, float] = (0.0, 1.0)
    clip: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found '{self.kind}'")
        for name in ("window", "range"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name}: expected two numbers in order, low below high, found {(low, high)}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles: expected two percentages in order, found {self.percentiles}")
        if self.kind == "background" and not self.range[0] < self.reference <= self.range[1]:
            raise ValueError(f"reference: expected a number within {self.range}, found {self.reference:g}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean, std: expected as many numbers, found {len(self.mean)} and {len(self.std)}")

    @property
    def limits(self) -> tuple[float, float]:
        """Least and largest number that a network sees, after mean and deviation; infinite where nothing bounds it."""
        if self.kind in ("keep", "zscore") or not (self.clip or self.kind == "unit"):
            return -np.inf, np.inf
        pairs = [*zip(self.mean, self.std, strict=True)] or [(0.0, 1.0)]
        low, high = ([(end - mean) / std for mean, std in pairs] for end in self.range)
        return min(low), max(high)


class Scaled(NamedTuple):
    """Intensities as a network sees them.

    Attributes:
        array: In the network's unit.
        low: Stored intensity that became the lower end of the range; of the first channel.
        high: The same of the upper end.
    """

    array: Float32[np.ndarray, "..."]
    low: float
    high: float


def scale(array: Shaped[np.ndarray, "..."], intensity: Intensity, where: object) -> Scaled:
    """Do what an `Intensity` says.

    Args:
        array: x y z, or with channels last.
        intensity: What becomes of the values.
        where: The file, for messages.

    Raises:
        InputError: The values are not what the kind expects.
    """
    bare = dataclasses.replace(intensity, mean=(), std=())
    if array.ndim == 4 and intensity.kind not in ("keep", "unit", "window"):
        found = [_scale_channel(array[..., channel], bare, where) for channel in range(array.shape[3])]
        scaled = Scaled(np.stack([one.array for one in found], axis=-1), found[0].low, found[0].high)
    else:
        scaled = _scale_one(array, intensity, where)
    if not intensity.mean:
        return scaled
    if len(intensity.mean) not in (1, array.shape[3] if array.ndim == 4 else 1):
        raise InputError(where, f"{len(intensity.mean)} channels, as mean and std have", f"shape {array.shape}")
    mean, std = (np.array(values, np.float32) for values in (intensity.mean, intensity.std))
    return scaled._replace(array=(scaled.array - mean) / std)


def unscale(
    array: Shaped[np.ndarray, "..."], intensity: Intensity, low: float, high: float, *, is_difference: bool = False
) -> Float32[np.ndarray, "..."]:
    """Return intensities of one channel in the unit of the file.

    Args:
        array: In the network's unit.
        intensity: As the scan was scaled.
        low: Stored intensity of the lower end.
        high: Of the upper end.
        is_difference: Whether they are distances between intensities, whose 0 stays 0.
    """
    bottom, top = intensity.range
    values = np.asarray(array, np.float32)
    for mean, std in zip(intensity.mean[:1], intensity.std[:1], strict=True):
        values = values * np.float32(std) + np.float32(0 if is_difference else mean)
    shift = 0.0 if is_difference else low - bottom * (high - low) / (top - bottom)
    stored = values * np.float32((high - low) / (top - bottom))
    return stored + np.float32(shift) if shift else stored


def to_range(
    array: Shaped[np.ndarray, "..."],
    low: float,
    high: float,
    ends: tuple[float, float] = (0.0, 1.0),
    *,
    clip: bool = True,
) -> Float32[np.ndarray, "..."]:
    """Map [low, high] to the ends of a range, and clip what is beyond."""
    bottom, top = ends
    scaled = np.subtract(array, np.float32(low), dtype=np.float32)
    scaled /= np.float32(high - low)
    if ends != (0.0, 1.0):
        scaled *= np.float32(top - bottom)
        scaled += np.float32(bottom)
    return np.clip(scaled, bottom, top, out=scaled) if clip else scaled


def _scale_channel(array: Shaped[np.ndarray, "x y z"], intensity: Intensity, where: object) -> Scaled:
    if intensity.inside == "nonzero" and not array.any():  # a sequence that a case lacks
        return Scaled(np.zeros(array.shape, np.float32), *intensity.range)
    return scale(array, intensity, where)


def _scale_one(array: Shaped[np.ndarray, "..."], intensity: Intensity, where: object) -> Scaled:
    if intensity.kind == "keep":
        return Scaled(np.asarray(array, np.float32), *intensity.range)
    is_counted = _counted(array, intensity)
    match intensity.kind:
        case "unit":
            low, high = _unit(array, where)
        case "window":
            low, high = intensity.window
            if intensity.clip:
                _check_window(array, intensity, where)
        case "percentile" | "minmax":
            low, high = _extremes(array if is_counted is None else array[is_counted], intensity, where)
        case "zscore":
            low, high = _moments(array if is_counted is None else array[is_counted], where)
        case _:
            low, high = _background(array, intensity, where)
    clip = intensity.clip and intensity.kind != "zscore"
    scaled = to_range(array, low, high, intensity.range, clip=clip)
    if intensity.inside == "nonzero" and is_counted is not None:
        scaled[~is_counted] = 0
    return Scaled(scaled, low, high)


def _counted(array: Shaped[np.ndarray, "..."], intensity: Intensity) -> Shaped[np.ndarray, "..."] | None:
    """Return which voxels the statistics are of; None for all."""
    if intensity.kind not in ("percentile", "minmax", "zscore") or intensity.inside == "all":
        return None
    return array != 0 if intensity.inside == "nonzero" else find_foreground(np.asarray(array, np.float32))


def _unit(array: Shaped[np.ndarray, "..."], where: object) -> tuple[float, float]:
    low, high = _contrast(array, where)
    # Interpolation and 16-bit floats may miss the ends by rounding.
    if low < -1e-3 or high > 1 + 1e-3:
        advice = "scale the file, or set --preprocess.intensity.kind window or percentile"
        raise InputError(where, "values in [0, 1]", f"values in [{low:g}, {high:g}]", advice)
    if high <= LEAST_UNIT * (1 + 1e-6):
        advice = "set --preprocess.intensity.kind percentile (data of 12 bits or less, stored in 16?)"
        raise InputError(where, "values that reach across [0, 1]", f"values in [{low:g}, {high:g}]", advice)
    return 0.0, 1.0


def _check_window(array: Shaped[np.ndarray, "..."], intensity: Intensity, where: object) -> None:
    low, high = _contrast(array, where)
    bottom, top = intensity.window
    if high - low < LEAST_HU < top - bottom:
        advice = "set --preprocess.intensity.kind unit or percentile"
        raise InputError(where, "a CT scan in HU", f"values in [{low:g}, {high:g}]", advice)
    if high <= bottom or low >= top:
        expected = f"values inside the window of {bottom:g} to {top:g} HU"
        advice = "set --preprocess.intensity.window"
        raise InputError(where, expected, f"values in [{low:g}, {high:g}]", advice)


def _extremes(values: Shaped[np.ndarray, "..."], intensity: Intensity, where: object) -> tuple[float, float]:
    first, second = intensity.percentiles if intensity.kind == "percentile" else (0.0, 100.0)
    _require_some(values, where)
    _contrast(values, where)
    low, high = np.percentile(np.asarray(values, np.float32).reshape(-1), (first, second))
    if not high > low:
        advice = "set --preprocess.intensity.kind unit, or other --preprocess.intensity.percentiles"
        expected = f"a spread between percentiles {first:g} and {second:g}"
        raise InputError(where, expected, f"{low:g} for both", advice)
    return float(low), float(high)


def _moments(values: Shaped[np.ndarray, "..."], where: object) -> tuple[float, float]:
    _require_some(values, where)
    mean, deviation = (float(moment(values, dtype=np.float64)) for moment in (np.mean, np.std))
    if not deviation > 0:
        raise InputError(where, "a spread of intensities", f"{values.size} voxels of one value")
    return mean, mean + deviation


def _background(array: Shaped[np.ndarray, "x y z"], intensity: Intensity, where: object) -> tuple[float, float]:
    """Return the intensity of the background, by the faces of the volume, and that of the upper end."""
    sides = [np.take(array, (0, -1), axis) for axis in range(3) if array.shape[axis] > 1]
    background = float(np.median(np.concatenate([side.reshape(-1) for side in sides])))
    top = float(np.percentile(array, 99.5))
    span = max(top - background, 0.0)
    low = background if background < -LEAST_SHIFT * span and not intensity.high else 0.0
    deep = float(np.mean(array < low - LARGEST_DEPTH * max(top - low, 0.0)))
    if top > low and deep > LARGEST_SHARE:
        expected = "a scan whose background is its lowest intensity"
        found = f"{deep:.0%} of it below a background of {low:g}, down to {array.min():g}"
        raise InputError(where, expected, found, "give it unscaled: not divided by its deviation within a mask")
    if intensity.high:
        return low, intensity.high
    above = array - np.float32(low)
    inside = above[find_foreground(above)]
    value = float(np.percentile(inside, intensity.percentiles[1])) if inside.size else 0.0
    if not value > 0:
        raise InputError(where, "a scan with positive intensities", f"values up to {above.max():g}", "check the file")
    bottom, end = intensity.range
    return low, low + value * (end - bottom) / (intensity.reference - bottom)


def _contrast(array: Shaped[np.ndarray, "..."], where: object) -> tuple[float, float]:
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputError(where, "an image with contrast", f"{low:g} everywhere")
    return low, high


def _require_some(values: Shaped[np.ndarray, "..."], where: object) -> None:
    if not values.size:
        raise InputError(where, "some foreground", "none", "give a mask, or check the image")

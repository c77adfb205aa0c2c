"""From a picture or a volume to what an image network expects: size about the centre, and range of intensities."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float32, Shaped

from jaxmed.arrays.grid import crop_or_pad, resize
from jaxmed.errors import InputError
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
class ImagePreprocess:
    """What published weights expect of an image. Called with an array.

    Attributes:
        size: Voxels along each axis.
        channels: Last axis of the result; an array of one channel may leave the axis out.
        low: Stored value that becomes `bottom`.
        high: Stored value that becomes `top`.
        bottom: Lower end of the network's range.
        top: Upper end.
        fit: How the size is reached: "crop" cuts, or extends by `low`, about the centre, and keeps the voxel size;
            "cover" first scales the shorter side to the size, then cuts.
    """

    size: tuple[int, ...] = (256, 256)
    channels: int = 1
    low: float = 0.0
    high: float = 4096.0
    bottom: float = 0.0
    top: float = 2.0
    fit: Literal["crop", "cover"] = "crop"

    def __post_init__(self) -> None:
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"size: expected two or three positive numbers, found {self.size}")
        if self.channels < 1:
            raise ValueError(f"channels: expected 1 or more, found {self.channels}")
        if not (self.low < self.high and self.bottom < self.top):
            raise ValueError(
                f"low, high, bottom, top: expected low below high and bottom below top, "
                f"found {self.low, self.high} and {self.bottom, self.top}"
            )

    def __call__(self, image: Shaped[np.ndarray, "..."]) -> Float32[np.ndarray, "*size channel"]:
        """Return the network's input; values beyond low and high are not clipped.

        Args:
            image: Stored values: rows and columns of a picture, x and y of a slice, or x, y and z of a volume; the
                channels last.

        Raises:
            InputError: It has other axes or channels, or holds NaN or Inf.
        """
        spatial = len(self.size)
        if image.ndim == spatial and self.channels == 1:
            image = image[..., None]
        if image.ndim != spatial + 1 or image.shape[-1] != self.channels or 0 in image.shape:
            expected = f"{spatial} axes of space and {self.channels} channel(s)"
            raise InputError("image", expected, f"shape {image.shape}")
        values = image.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError("image", "finite values", "NaN or Inf", "mask or repair them first")
        flat = (1,) * (3 - spatial)  # a picture is a volume of one plane
        volume = Volume.make(values.reshape(*image.shape[:-1], *flat, self.channels), np.eye(4))
        if self.fit == "cover":
            scale = max(new / old for new, old in zip(self.size, image.shape, strict=False))
            x, y, z = (*(max(1, round(old * scale)) for old in image.shape[:-1]), *flat)
            volume = resize(volume, (x, y, z), order=1)
        x, y, z = (*self.size, *flat)
        array = crop_or_pad(volume, (x, y, z), fill=self.low).array.reshape(*self.size, self.channels)
        scaled = (array - self.low) / (self.high - self.low) * (self.top - self.bottom) + self.bottom
        return scaled.astype(np.float32)

"""Augmentation of pictures as published recipes have it: fine-tuning, linear probes and MAE, and the crops of DINO.

A recipe is a frozen record with a call, `recipe(key, picture)`, one picture [row, column, channel] at a time, for `jit`
and `vmap`; equal records are one function, compiled once. Pictures come as a network sees them: `mean` and `std` of
their normalisation are undone first, since colours are changed in [0, 1], and done again at the end. Without them
pictures are in [0, 1] before and after.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxmed.arrays.filters import gaussian_blur
from jaxmed.config import FractionRange, Length, NonNegative, Positive, PositiveRange, Share, Size, Whole, checked
from jaxmed.data import picture_operations as operations
from jaxmed.data.augment import draw_flips, flip
from jaxmed.data.picture_operations import Picture

TRIES = 10  # draws of a box after which torchvision and timm give up


@dataclasses.dataclass(frozen=True)
@checked
class Normalised:
    """How the pictures of a recipe are normalised.

    Attributes:
        mean: Subtracted from pictures in [0, 1], one number per channel; empty for none.
        std: Divided by afterwards, likewise.
    """

    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean, std: expected as many numbers, found {len(self.mean)} and {len(self.std)}")

    def undo(self, picture: Picture) -> Picture:
        """Return a picture in [0, 1]."""
        if not self.mean:
            return picture
        return jnp.clip(picture * jnp.array(self.std) + jnp.array(self.mean), 0, 1)

    def redo(self, picture: Picture) -> Picture:
        """Return a picture as the network sees it."""
        return (picture - jnp.array(self.mean)) / jnp.array(self.std) if self.mean else picture


@dataclasses.dataclass(frozen=True)
@checked
class CropAugment(Normalised):
    """A random crop of a random size, resized, and a flip: the recipes of linear probes, and with `MAE_CROP` of MAE.

    Attributes:
        size: Rows and columns of the result.
        scale: Range of the crop's share of the picture's area.
        ratio: Range of its width over its height.
        flip: Probability of swapping left and right.

    Source: torchvision's RandomResizedCrop, as MAE (arXiv:2111.06377, appendix A), DINOv2 (arXiv:2304.07193) and timm
        use it: bicubic.
    """

    size: tuple[Size, Size] = (224, 224)
    scale: FractionRange = (0.08, 1.0)
    ratio: PositiveRange = (3 / 4, 4 / 3)
    flip: Share = 0.5

    def __call__(self, key: Key[Array, ""], picture: Picture) -> Float[Array, "new_row new_column channel"]:
        """Return one view of a picture."""
        return self.redo(self.view(key, self.undo(picture)))

    def view(self, key: Key[Array, ""], picture: Picture) -> Float[Array, "new_row new_column channel"]:
        """Return one view of a picture in [0, 1], in [0, 1]."""
        crop_key, flip_key = jax.random.split(key)
        box = draw_box(crop_key, (picture.shape[0], picture.shape[1]), self.scale, self.ratio)
        cropped = operations.cut(picture, box.start, box.extent, self.size)
        return flip(cropped, draw_flips(flip_key, 2, (1,), self.flip))


MAE_CROP = CropAugment(scale=(0.2, 1.0))


class Box(NamedTuple):
    """A part of a picture.

    Attributes:
        start: First row and column.
        extent: Height and width, in pixels.
    """

    start: Float[Array, "2"]
    extent: Float[Array, "2"]


def draw_box(
    key: Key[Array, ""], shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw the box of torchvision's RandomResizedCrop, in whole pixels.

    Of ten draws the first that fits counts; without one it is the largest box about the middle whose proportions are
    within the range.

    Args:
        key: Consumed.
        shape: Rows and columns of the picture.
        scale: Range of the share of its area.
        ratio: Range of width over height, evenly on a logarithmic scale.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    rows, columns = shape
    areas = rows * columns * jax.random.uniform(area_key, (TRIES,), minval=scale[0], maxval=scale[1])
    ends = math.log(ratio[0]), math.log(ratio[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=ends[0], maxval=ends[1]))
    extents = jnp.round(jnp.sqrt(jnp.stack([areas / ratios, areas * ratios], axis=1)))
    has_fit, extent = _first(extents, ((extents > 0) & (extents <= jnp.array(shape))).all(axis=1))
    own = columns / rows
    middle = jnp.array([min(rows, round(columns / ratio[0])), min(columns, round(rows * ratio[1]))], jnp.float32)
    middle = jnp.where(jnp.array(ratio[0] <= own <= ratio[1]), jnp.array(shape, jnp.float32), middle)
    extent = jnp.where(has_fit, extent, middle)
    spare = jnp.array(shape) - extent
    start = jnp.where(has_fit, jnp.floor(jax.random.uniform(place_key, (2,)) * (spare + 1)), jnp.floor(spare / 2))
    return Box(start, extent)


def _first(
    values: Float[Array, "try axis"], fits: Bool[Array, " try"]
) -> tuple[Bool[Array, ""], Float[Array, " axis"]]:
    """Tell whether one of several draws fits, and return the first that does."""
    return fits.any(), values[jnp.argmax(fits)]


# Fine-tuning ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class FineTuneAugment(CropAugment):
    """Crop and flip, RandAugment "rand-m9-mstd0.5-inc1", and erasing of a box.

    Attributes:
        num_operations: Operations of RandAugment, drawn with replacement from `picture_operations.OPERATIONS`.
        chance: Probability of each of them.
        magnitude: Mean of their strength, of 10.
        magnitude_std: Its standard deviation; every operation draws its own, clipped to [0, 10].
        erase: Probability that a box is filled with normal noise of unit variance, after the normalisation.
        erase_area: Range of the box's share of the area.
        erase_ratio: Range of its height over its width.

    Source: timm's training transform, as the code of RETFound (Nature 2023, 622:156) and MAE (arXiv:2111.06377) calls
        it: RandAugment (arXiv:1909.13719) with magnitudes that grow with the strength, random erasing
        (arXiv:1708.04896) in the mode "pixel". Everything is interpolated bicubically, and what comes from outside is
        the mean colour: timm draws between bilinear and bicubic only where a run names no interpolation.
    Deviation: see `picture_operations`; Pillow rounds to 8 bits after every operation.
    """

    num_operations: Length = 2
    chance: Share = 0.5
    magnitude: NonNegative = 9.0
    magnitude_std: NonNegative = 0.5
    erase: Share = 0.25
    erase_area: FractionRange = (0.02, 1 / 3)
    erase_ratio: PositiveRange = (0.3, 10 / 3)

    def __call__(self, key: Key[Array, ""], picture: Picture) -> Float[Array, "new_row new_column channel"]:
        """Return one view of a picture."""
        view_key, colour_key, erase_key = jax.random.split(key, 3)
        view = self.view(view_key, self.undo(picture))
        for one in jax.random.split(colour_key, self.num_operations):
            view = self._operate(one, view)
        return self._erase(erase_key, self.redo(view))

    def _operate(self, key: Key[Array, ""], picture: Picture) -> Picture:
        due_key, kind_key, strength_key, sign_key = jax.random.split(key, 4)
        strength = self.magnitude + self.magnitude_std * jax.random.normal(strength_key)
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        kind = jax.random.randint(kind_key, (), 0, len(operations.OPERATIONS))
        fill = jnp.array(self.mean) if self.mean else jnp.full(picture.shape[-1], 128 / operations.LARGEST)
        changed = operations.operate(picture, kind, jnp.clip(strength, 0, 10), sign, fill)
        return jnp.where(jax.random.bernoulli(due_key, float(self.chance)), changed, picture)

    def _erase(self, key: Key[Array, ""], picture: Picture) -> Picture:
        due_key, box_key, noise_key = jax.random.split(key, 3)
        has_fit, box = draw_erased(box_key, (picture.shape[0], picture.shape[1]), self.erase_area, self.erase_ratio)
        rows, columns = (jnp.arange(length) for length in picture.shape[:2])
        inside = [
            (places >= box.start[axis]) & (places < box.start[axis] + box.extent[axis])
            for axis, places in enumerate((rows, columns))
        ]
        is_due = has_fit & jax.random.bernoulli(due_key, float(self.erase))
        is_erased = is_due & inside[0][:, None] & inside[1][None, :]
        return jnp.where(is_erased[..., None], jax.random.normal(noise_key, picture.shape), picture)


def draw_erased(
    key: Key[Array, ""], shape: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Bool[Array, ""], Box]:
    """Draw the box of timm's random erasing, smaller than the picture; tell whether one of ten draws fitted.

    Args:
        key: Consumed.
        shape: Rows and columns of the picture.
        area: Range of the share of its area.
        ratio: Range of height over width, evenly on a logarithmic scale.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = shape[0] * shape[1] * jax.random.uniform(area_key, (TRIES,), minval=area[0], maxval=area[1])
    ends = math.log(ratio[0]), math.log(ratio[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=ends[0], maxval=ends[1]))
    extents = jnp.round(jnp.sqrt(jnp.stack([areas * ratios, areas / ratios], axis=1)))
    has_fit, extent = _first(extents, (extents < jnp.array(shape)).all(axis=1))
    spare = jnp.array(shape) - extent
    return has_fit, Box(jnp.floor(jax.random.uniform(place_key, (2,)) * (spare + 1)), extent)


# DINO ----------------------------------------------------------------------------------------------------------------


class Crops(NamedTuple):
    """Views of one picture.

    Attributes:
        globals_: Large ones, of much of the picture; teacher and student see them.
        locals_: Small ones, of little of it; the student alone sees them.
    """

    globals_: Float[Array, "2 row column channel"]
    locals_: Float[Array, "local small_row small_column channel"]


@dataclasses.dataclass(frozen=True)
@checked
class DinoAugment(Normalised):
    """Crops of DINOv2 at two sizes, each flipped, its colours changed, blurred and solarised by chance.

    Attributes:
        global_size: Rows and columns of the two global crops.
        local_size: Of the local crops.
        num_locals: Local crops.
        global_scale: Range of a global crop's share of the picture's area.
        local_scale: Of a local crop's.
        ratio: Range of width over height of both.
        flip: Probability of swapping left and right.
        jitter: Probability that brightness, contrast, saturation and hue are changed, in random order.
        brightness: Largest distance of its factor from 1.
        contrast: Likewise.
        saturation: Likewise.
        hue: Largest turn, a share of the circle.
        grey: Probability that colour is lost.
        global_blur: Probabilities of a blur of the first and of the second global crop.
        local_blur: Of a local crop.
        blur_sigma: Range of the blur's standard deviation, in pixels.
        blur_radius: Pixels to each side that it looks at.
        solarise: Probability that the second global crop is solarised.
        solarise_threshold: Level, of 255, from which colours are inverted.
        match_release: Whether blurs are as frequent as in the released code, which takes 1 - p for p: 0, 0.9, 0.5.

    Source: DINOv2, arXiv:2304.07193, released code; torchvision's transforms.
    Deviation: see `picture_operations`; hue is turned by any angle, where Pillow has 256.
    """

    global_size: tuple[Size, Size] = (224, 224)
    local_size: tuple[Size, Size] = (96, 96)
    num_locals: Length = 8
    global_scale: FractionRange = (0.32, 1.0)
    local_scale: FractionRange = (0.05, 0.32)
    ratio: PositiveRange = (3 / 4, 4 / 3)
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Share = 0.1
    grey: Share = 0.2
    global_blur: tuple[Share, Share] = (1.0, 0.1)
    local_blur: Share = 0.5
    blur_sigma: PositiveRange = (0.1, 2.0)
    blur_radius: Size = 4
    solarise: Share = 0.2
    solarise_threshold: Whole = 128
    match_release: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blur_radius >= min(*self.global_size, *(self.local_size if self.num_locals else self.global_size)):
            raise ValueError(f"blur_radius: expected less than the crops' edges, found {self.blur_radius}")

    def __call__(self, key: Key[Array, ""], picture: Picture) -> Crops:
        """Return the crops of one picture."""
        picture = self.undo(picture)
        keys = jax.random.split(key, 2 + self.num_locals)
        first, second, local = self.blur_probabilities
        large, small = (
            CropAugment(size=size, scale=scale, ratio=self.ratio, flip=self.flip)
            for size, scale in ((self.global_size, self.global_scale), (self.local_size, self.local_scale))
        )

        def one(recipe: CropAugment, key: Array, blur: Array, solarise: Array) -> Picture:
            view_key, colour_key = jax.random.split(key)
            return self.redo(self.change(colour_key, recipe.view(view_key, picture), blur, solarise))

        blurs, solarised = jnp.array([first, second]), jnp.array([0.0, self.solarise])
        globals_ = jax.vmap(lambda *told: one(large, *told))(keys[:2], blurs, solarised)
        blurs = jnp.full(self.num_locals, local)
        locals_ = jax.vmap(lambda *told: one(small, *told))(keys[2:], blurs, jnp.zeros_like(blurs))
        return Crops(globals_, locals_)

    @property
    def blur_probabilities(self) -> tuple[float, float, float]:
        """How often the two global crops and a local one are blurred."""
        told = (*self.global_blur, self.local_blur)
        first, second, local = (1 - share for share in told) if self.match_release else told
        return first, second, local

    def change(
        self, key: Key[Array, ""], picture: Picture, blur: Float[Array, ""], solarise: Float[Array, ""]
    ) -> Picture:
        """Change colours by chance.

        Args:
            key: Consumed.
            picture: In [0, 1].
            blur: Probability of a blur.
            solarise: Probability that what is light is inverted.
        """
        keys = jax.random.split(key, 5)
        jittered = self._jitter(keys[0], picture)
        picture = jnp.where(jax.random.bernoulli(keys[1], float(self.jitter)), jittered, picture)
        is_grey = jax.random.bernoulli(keys[2], float(self.grey))
        picture = jnp.where(is_grey, operations.to_grey(picture), picture)
        sigma_key, blur_key = jax.random.split(keys[3])
        sigma = jax.random.uniform(sigma_key, minval=self.blur_sigma[0], maxval=self.blur_sigma[1])
        blurred = gaussian_blur(picture, sigma, self.blur_radius, axes=(0, 1), mode="reflect")
        picture = jnp.where(jax.random.bernoulli(blur_key, blur), blurred, picture)
        inverted = operations.solarise(picture, self.solarise_threshold)
        return jnp.where(jax.random.bernoulli(keys[4], solarise), inverted, picture)

    def _jitter(self, key: Key[Array, ""], picture: Picture) -> Picture:
        order_key, factor_key = jax.random.split(key)
        draws = jax.random.uniform(factor_key, (4,), minval=-1.0, maxval=1.0)
        brightness, contrast, saturation = 1 + jnp.array([self.brightness, self.contrast, self.saturation]) * draws[:3]
        for which in jax.random.permutation(order_key, 4):
            changed = [
                operations.change_brightness(picture, brightness),
                operations.change_contrast(picture, contrast),
                operations.change_saturation(picture, saturation),
            ]
            turned = operations.turn_hue(picture, self.hue * draws[3])
            picture = jnp.select([which == place for place in range(3)], changed, turned)
        return picture

"""What Pillow does to pictures, on the device: colours, counted levels, moves and cuts.

A picture is [row, column, channel] in [0, 1], with the three colours red, green and blue. Everything takes traced
numbers, so that one program draws any operation; `jit` and `vmap` go through.

Source: Pillow's ImageOps, ImageEnhance, Image.transform and Image.resize, which torchvision and timm call.
Deviation: Pillow keeps 8 bits and rounds after every operation; here numbers stay as they are, and only what counts
levels looks at the nearest of the 256. Both agree within a rounding, except where a level stands at a threshold.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.filters import along, correlate
from jaxmed.arrays.position import keys_kernel
from jaxmed.arrays.warping import identity_grid

Picture = Float[Array, "row column channel"]
Number = Float[Array, ""] | Int[Array, ""] | float | int
LUMINANCE = (0.299, 0.587, 0.114)
LARGEST = 255  # of the levels of 8 bits
OPERATIONS = (
    "autocontrast", "equalise", "invert", "posterise", "solarise", "lighten dark", "saturation", "contrast",
    "brightness", "sharpness", "rotate", "shear x", "shear y", "translate x", "translate y",
)  # fmt: skip
"""Those of timm's RandAugment; the first six change levels, four blend, five move."""


def levels(picture: Picture) -> Picture:
    """Return the nearest of the levels 0 to 255, as floats."""
    return jnp.round(LARGEST * jnp.clip(picture, 0, 1))


# Colours -------------------------------------------------------------------------------------------------------------


def blend(ground: Float[Array, "..."] | float, picture: Picture, factor: Number) -> Picture:
    """Go from a ground (0) to a picture (1) and beyond it, and clip."""
    return jnp.clip(ground + factor * (picture - ground), 0, 1)


def to_grey(picture: Picture) -> Float[Array, "row column 1"]:
    """Return the luminance of ITU-R 601-2."""
    return (picture * jnp.array(LUMINANCE)).sum(axis=-1, keepdims=True)


def change_brightness(picture: Picture, factor: Number) -> Picture:
    """Blend with black."""
    return blend(0.0, picture, factor)


def change_contrast(picture: Picture, factor: Number) -> Picture:
    """Blend with the mean luminance, at its nearest level."""
    return blend(mean_grey(picture), picture, factor)


def mean_grey(picture: Picture) -> Float[Array, ""]:
    """Return the mean luminance, at its nearest level."""
    return jnp.floor(levels(to_grey(picture)).mean() + 0.5) / LARGEST


def change_saturation(picture: Picture, factor: Number) -> Picture:
    """Blend with the luminance."""
    return blend(to_grey(picture), picture, factor)


def smooth(picture: Picture) -> Picture:
    """Average 3 x 3 pixels, the middle one five times; the outermost pixels stay."""
    box = correlate(correlate(picture, jnp.ones(3), 0), jnp.ones(3), 1)
    rows, columns, _ = picture.shape
    inner = jnp.zeros((rows, columns, 1), bool).at[1:-1, 1:-1].set(True)
    return jnp.where(inner, (box + 4 * picture) / 13, picture)


def turn_hue(picture: Picture, turn: Number) -> Picture:
    """Turn the hue; lightest colour and saturation (HSV) stay.

    Args:
        picture: The picture.
        turn: Share of the circle of colours, from red towards green.
    """
    lightest, darkest = picture.max(axis=-1), picture.min(axis=-1)
    spread = lightest - darkest
    is_colour = spread > 0
    red, green, blue = jnp.moveaxis((lightest[..., None] - picture) / jnp.where(is_colour, spread, 1)[..., None], -1, 0)
    sixth = jnp.where(
        picture[..., 0] == lightest,
        blue - green,
        jnp.where(picture[..., 1] == lightest, 2 + red - blue, 4 + green - red),
    )
    hue = jnp.where(is_colour, sixth, 0) + 6 * turn
    place = (jnp.array([5.0, 3.0, 1.0]) + hue[..., None]) % 6
    share = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return lightest[..., None] - spread[..., None] * share


# Levels --------------------------------------------------------------------------------------------------------------


def invert(picture: Picture) -> Picture:
    """Swap dark and light."""
    return 1 - picture


def stretch_contrast(picture: Picture) -> Picture:
    """Stretch every colour to [0, 1]; one of a single level stays (Pillow's autocontrast)."""
    low, high = picture.min(axis=(0, 1)), picture.max(axis=(0, 1))
    return jnp.where(high > low, (picture - low) / jnp.where(high > low, high - low, 1), picture)


def equalise(picture: Picture) -> Picture:
    """Give every colour about as many pixels at each level.

    Level i becomes floor((half a step + pixels below i) / step), a step being the pixels below the highest level that
    occurs over 255.
    """

    def one(colour: Int[Array, "row column"]) -> Float[Array, "row column"]:
        counts = jnp.bincount(colour.reshape(-1), length=LARGEST + 1)
        below = jnp.cumsum(counts) - counts
        step = below[colour.max()] // LARGEST
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), LARGEST)
        return jnp.where(step > 0, table[colour], colour).astype(jnp.float32)

    whole = levels(picture).astype(jnp.int32)
    return jax.vmap(one, in_axes=-1, out_axes=-1)(whole) / LARGEST


def posterise(picture: Picture, bits: Number) -> Picture:
    """Keep the highest bits of 8."""
    step = 2.0 ** (8 - bits)
    return jnp.floor(levels(picture) / step) * step / LARGEST


def solarise(picture: Picture, threshold: Number) -> Picture:
    """Invert what is at or above a level."""
    return jnp.where(levels(picture) < threshold, picture, 1 - picture)


def lighten_dark(picture: Picture, more: Number) -> Picture:
    """Add levels to what is below 128 (timm's SolarizeAdd)."""
    return jnp.where(levels(picture) < 128, jnp.minimum(picture + more / LARGEST, 1), picture)


# Moves and cuts ------------------------------------------------------------------------------------------------------


def rotation(degrees: Number, shape: tuple[int, int]) -> Float[Array, "2 3"]:
    """Return the matrix of a turn about the middle, anticlockwise as one sees it."""
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    linear = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
    middle = jnp.array(shape) / 2
    return jnp.concatenate([linear, (middle - (linear * middle).sum(axis=1))[:, None]], axis=1)


def move(picture: Picture, matrix: Float[Array, "2 3"], fill: Float[Array, " channel"]) -> Picture:
    """Show at each place what stands at another, by Pillow's bicubic interpolation of transforms (Keys, a = -1).

    Args:
        picture: The picture.
        matrix: From rows and columns of the result, the corner of the first pixel being (0, 0), to those of `picture`.
        fill: What stands outside.
    """
    rows, columns, channels = picture.shape
    places = jnp.einsum("ij,...j->...i", matrix[:, :2], identity_grid((rows, columns)) + 0.5, precision="highest")
    places = places + matrix[:, 2]
    is_inside = ((places >= 0) & (places < jnp.array([rows, columns]))).all(axis=-1)
    first = jnp.floor(places - 0.5)
    share = places - 0.5 - first
    pixels, total = picture.reshape(-1, channels), jnp.zeros_like(picture)
    for down in range(-1, 3):
        row = jnp.clip(first[..., 0] + down, 0, rows - 1).astype(jnp.int32)
        for across in range(-1, 3):
            column = jnp.clip(first[..., 1] + across, 0, columns - 1).astype(jnp.int32)
            weight = keys_kernel(share[..., 0] - down, -1.0) * keys_kernel(share[..., 1] - across, -1.0)
            total = total + weight[..., None] * pixels[row * columns + column]
    return jnp.where(is_inside[..., None], jnp.clip(total, 0, 1), fill)


def cut(
    picture: Picture, start: Float[Array, "2"], extent: Float[Array, "2"], size: tuple[int, int]
) -> Float[Array, "new_row new_column channel"]:
    """Cut a box out and resize it, by Pillow's bicubic interpolation of resizing (Keys, a = -0.5, anti-aliased).

    Rows are resized first, and what overshoots is clipped before the columns are; which comes first in Pillow depends
    on the sizes.

    Args:
        picture: The picture.
        start: First row and column of the box, in pixels.
        extent: Its height and width; pixels beyond it are not looked at.
        size: Rows and columns of the result.
    """
    for axis in (0, 1):
        zoom = extent[axis] / size[axis]
        middles = start[axis] + (jnp.arange(size[axis]) + 0.5) * zoom
        pixels = jnp.arange(picture.shape[axis])
        weights = keys_kernel((pixels + 0.5 - middles[:, None]) / jnp.maximum(zoom, 1), -0.5)
        is_inside = (pixels >= start[axis]) & (pixels < start[axis] + extent[axis])
        weights = jnp.where(is_inside, weights, 0)
        picture = jnp.clip(along(weights / weights.sum(axis=1, keepdims=True), picture, axis), 0, 1)
    return picture


# RandAugment ---------------------------------------------------------------------------------------------------------


def operate(
    picture: Picture,
    kind: Int[Array, ""],
    magnitude: Float[Array, ""],
    sign: Float[Array, ""],
    fill: Float[Array, " channel"],
) -> Picture:
    """Do one of `OPERATIONS`.

    All moves are one bicubic move and all blends one blend, so that under `vmap`, where every operation is computed for
    every picture and one is kept, there are eight to compute and not fifteen.

    Args:
        picture: In [0, 1].
        kind: Its place in `OPERATIONS`.
        magnitude: From 0, which changes little or nothing, to 10; autocontrast, equalise and invert have none.
        sign: 1 or -1, the direction of moves and blends.
        fill: Colour of what a move brings in from outside.

    Source: timm's `_RAND_INCREASING_TRANSFORMS`, with its ranges: 4 to 0 bits, thresholds 256 to 0, 0 to 110 levels
        more, factors 1 +- 0.9, turns of 30 degrees, shears of 0.3, shifts of 0.45 of an edge.
    """
    share = magnitude / 10
    signed = sign * share
    counted = [
        stretch_contrast(picture),
        equalise(picture),
        invert(picture),
        posterise(picture, 4 - jnp.floor(4 * share)),
        solarise(picture, 256 - jnp.floor(256 * share)),
        lighten_dark(picture, jnp.floor(110 * share)),
    ]
    grounds = [
        jnp.broadcast_to(to_grey(picture), picture.shape),
        jnp.broadcast_to(mean_grey(picture), picture.shape),
        jnp.zeros_like(picture),
        smooth(picture),
    ]
    ground = jnp.select([kind == 6, kind == 7, kind == 8], grounds[:3], grounds[3])
    blended = blend(ground, picture, jnp.maximum(0.1, 1 + 0.9 * signed))
    moved = move(picture, _matrix(kind, signed, (picture.shape[0], picture.shape[1])), fill)
    found = jnp.select([kind == place for place in range(6)], counted, blended)
    return jnp.where(kind >= 10, moved, found)


def _matrix(kind: Int[Array, ""], signed: Float[Array, ""], shape: tuple[int, int]) -> Float[Array, "2 3"]:
    """Return the matrix of a rotation, shear or translation, rows before columns."""
    rows, columns = shape
    still = jnp.eye(2, 3)
    moves = [
        rotation(30 * signed, shape),
        still.at[1, 0].set(0.3 * signed),
        still.at[0, 1].set(0.3 * signed),
        still.at[1, 2].set(0.45 * signed * columns),
        still.at[0, 2].set(0.45 * signed * rows),
    ]
    return jnp.stack(moves)[jnp.clip(kind - 10, 0, len(moves) - 1)]

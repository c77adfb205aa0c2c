"""Operations on pictures against Pillow, on a photograph of a retina and on a picture of many colours."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from jaxmed.data import picture_operations as ops

SHAPE = (40, 48)
FILL = (124, 116, 104)
operate = jax.jit(ops.operate)


@pytest.fixture(scope="module", params=["colours", "retina"])
def picture(request):
    """An 8-bit picture of 40 x 48."""
    if request.param == "retina":
        folder = request.getfixturevalue("shared_data")
        with Image.open(folder / "fundus_photo" / "retina.jpg") as photo:
            return photo.convert("RGB").resize(SHAPE[::-1], Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(size=(*SHAPE, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (1.5, 1.5, 0))
    return Image.fromarray(np.clip(128 + 300 * smooth, 20, 250).astype(np.uint8))


def as_array(picture):
    return jnp.asarray(np.asarray(picture), jnp.float32) / 255


def by_pillow(picture, name, magnitude, sign):
    """What timm asks Pillow to do: rand-m9-inc1's arguments, written down anew from its ranges."""
    share, wide, high = magnitude / 10, picture.size[0], picture.size[1]
    factor = max(0.1, 1 + 0.9 * sign * share)

    def shift(*matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)

    lifted = [min(255, level + int(110 * share)) if level < 128 else level for level in range(256)] * 3
    match name:
        case "autocontrast":
            return ImageOps.autocontrast(picture)
        case "equalise":
            return ImageOps.equalize(picture)
        case "invert":
            return ImageOps.invert(picture)
        case "posterise":
            bits = 4 - int(4 * share)
            # Of no bits nothing is left; newer Pillow refuses them.
            return ImageOps.posterize(picture, bits) if bits else Image.new("RGB", picture.size)
        case "solarise":
            return ImageOps.solarize(picture, 256 - int(256 * share))
        case "lighten dark":
            return picture.point(lifted)
        case "saturation":
            return ImageEnhance.Color(picture).enhance(factor)
        case "contrast":
            return ImageEnhance.Contrast(picture).enhance(factor)
        case "brightness":
            return ImageEnhance.Brightness(picture).enhance(factor)
        case "sharpness":
            return ImageEnhance.Sharpness(picture).enhance(factor)
        case "rotate":
            return picture.rotate(30 * sign * share, Image.Resampling.BICUBIC, fillcolor=FILL)
        case "shear x":
            return shift(1, 0.3 * sign * share, 0, 0, 1, 0)
        case "shear y":
            return shift(1, 0, 0, 0.3 * sign * share, 1, 0)
        case "translate x":
            return shift(1, 0, 0.45 * sign * share * wide, 0, 1, 0)
        case "translate y":
            return shift(1, 0, 0, 0, 1, 0.45 * sign * share * high)


# Levels of 255: what counts levels is exact or one rounding away, blends round twice, moves once.
TOLERANCES = dict.fromkeys(("equalise", "invert", "posterise", "solarise", "lighten dark"), 0.01)
TOLERANCES |= {"autocontrast": 1.01, "sharpness": 1.6, "saturation": 1.6, "contrast": 1.6, "brightness": 1.01}


@pytest.mark.parametrize(("kind", "name"), [*enumerate(ops.OPERATIONS)])
def test_an_operation_is_that_of_pillow(picture, kind, name):
    fill = jnp.array(FILL, jnp.float32) / 255
    for magnitude in (0.0, 2.3, 9.0, 10.0):
        for sign in (1.0, -1.0):
            found = operate(as_array(picture), jnp.asarray(kind), jnp.asarray(magnitude), jnp.asarray(sign), fill)
            expected = np.asarray(by_pillow(picture, name, magnitude, sign), np.float32)
            error = np.abs(255 * np.asarray(found) - expected)
            if name in TOLERANCES:
                assert error.max() <= TOLERANCES[name], (magnitude, sign)
            else:
                # A place on the picture's very edge is inside by float64 and outside by float32, or the reverse.
                is_off = error.max(axis=-1) > 1.1
                assert is_off.mean() <= 0.002, (magnitude, sign)


def test_a_cut_is_a_crop_that_is_resized(picture):
    cut = jax.jit(ops.cut, static_argnums=3)
    for start, extent in (((0, 0), SHAPE), ((3, 5), (30, 20)), ((10, 20), (9, 12)), ((39, 0), (1, 48))):
        found = cut(as_array(picture), jnp.array(start, jnp.float32), jnp.array(extent, jnp.float32), (16, 24))
        box = (start[1], start[0], start[1] + extent[1], start[0] + extent[0])
        expected = picture.crop(box).resize((24, 16), Image.Resampling.BICUBIC)
        error = np.abs(255 * np.asarray(found) - np.asarray(expected, np.float32))
        # Pillow rounds after each of two passes.
        assert error.max() < 2 and error.mean() < 0.5


def test_a_whole_picture_at_its_own_size_is_itself():
    array = jnp.asarray(np.random.default_rng(3).uniform(size=(6, 7, 3)), jnp.float32)
    found = ops.cut(array, jnp.zeros(2), jnp.array([6.0, 7.0]), (6, 7))
    np.testing.assert_allclose(found, array, atol=1e-6)
    np.testing.assert_allclose(jax.jit(ops.move)(array, jnp.eye(2, 3), jnp.zeros(3)), array, atol=1e-6)


def test_hue_turns_as_in_the_standard_library():
    colours = np.random.default_rng(1).integers(0, 256, (8, 9, 3)) / 255
    colours[0] = 0.4
    for turn in (0.0, 0.1, -0.25):
        expected = np.empty_like(colours)
        for place in np.ndindex(8, 9):
            hue, saturation, value = colorsys.rgb_to_hsv(*colours[place])
            expected[place] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(ops.turn_hue(jnp.asarray(colours, jnp.float32), turn), expected, atol=2e-6)


def test_a_picture_of_one_level_has_no_contrast_to_stretch():
    flat = jnp.full((4, 4, 3), 0.3)
    for change in (ops.stretch_contrast, ops.equalise):
        np.testing.assert_allclose(change(flat), jnp.round(255 * flat) / 255, atol=2e-3)

"""Masks by the values that are found in them, in every kind of file."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from jaxmed.errors import InputError
from jaxmed.io.masks import read_mask, to_mask

pytestmark = pytest.mark.core

DISC = np.hypot(*np.mgrid[-20:20, -24:24]) < 11
NIFTI = DISC[:, :, None] & np.ones(5, bool)


def palette(colours, numbers=DISC):
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return image


def rgb(inside, outside):
    return Image.fromarray(np.where(DISC[..., None], inside, outside).astype(np.uint8))


def transparent(inside, outside):
    """Return black with the mask as alpha."""
    return Image.fromarray(np.dstack([np.zeros((*DISC.shape, 3)), np.where(DISC, inside, outside)]).astype(np.uint8))


PICTURES = {
    "bits": Image.fromarray(DISC),
    "0 and 1": Image.fromarray(DISC.astype(np.uint8)),
    "0 and 255": Image.fromarray(DISC.astype(np.uint8) * 255),
    "two greys": Image.fromarray(np.where(DISC, 200, 150).astype(np.uint8)),
    "close greys": Image.fromarray(np.where(DISC, 101, 100).astype(np.uint8)),
    "16 bits": Image.fromarray(DISC.astype(np.uint16) * 65535),
    "16 bits, 0 and 1": Image.fromarray(DISC.astype(np.uint16)),
    "grey and alpha": Image.fromarray(DISC.astype(np.uint8) * 255).convert("LA"),
    "grey as RGB": Image.fromarray(DISC.astype(np.uint8) * 255).convert("RGB"),
    "grey as RGBA": Image.fromarray(DISC.astype(np.uint8) * 255).convert("RGBA"),
    "green on black": rgb((0, 180, 0), (0, 0, 0)),
    "grey palette": palette([(0, 0, 0), (255, 255, 255)]),
    "grey palette, white first": palette([(255, 255, 255), (0, 0, 0)], ~DISC),
    "red on black": palette([(0, 0, 0), (255, 0, 0)]),
    "black last": palette([(255, 0, 0), (0, 0, 0)], ~DISC),
    "numbers of a palette": palette([(20, 30, 40), (255, 0, 0)]),
    "a number far up": palette([(0, 0, 0)] * 15 + [(255, 0, 9)], DISC * 15),
}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_two_values_are_masks(tmp_path, name, suffix):
    PICTURES[name].save(tmp_path / f"a{suffix}")
    inside, grid = read_mask(tmp_path / f"a{suffix}")
    assert grid is None and inside.dtype == bool
    np.testing.assert_array_equal(inside, DISC)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("greys", [(0, 255), (60, 200)])
def test_smeared_masks_are_cut_in_the_middle(tmp_path, quality, greys):
    Image.fromarray(np.where(DISC, greys[1], greys[0]).astype(np.uint8)).save(tmp_path / "a.jpg", quality=quality)
    assert (read_mask(tmp_path / "a.jpg")[0] != DISC).mean() < 0.01


def test_images_and_other_pictures_are_no_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, DISC.shape).astype(np.uint8)
    wrong = {
        "a.jpg": (Image.fromarray(noise), "a mask of two greys"),
        "a.png": (Image.fromarray(noise), r"such as 0 and 1, found the values 0, 1, 2, .* in all\)"),
        "colour.png": (rgb((255, 0, 0), (0, 0, 255)), r"found 2 colours: \(0, 0, 255\), \(255, 0, 0\)"),
        "alpha.png": (transparent(255, 0), "one colour, of which some is transparent"),
        "voc.png": (palette([(0, 0, 0), (128, 0, 0), (0, 128, 0)], DISC * 1 + (noise > 250)), "the values 0, 1, 2;"),
    }
    three = DISC * 128
    three[0, :5] = 255
    wrong["three.png"] = Image.fromarray(three.astype(np.uint8)), "found the values 0, 128, 255; give one mask"
    for name, (picture, words) in wrong.items():
        picture.save(tmp_path / name)
        with pytest.raises(InputError, match=words):
            read_mask(tmp_path / name)
    np.testing.assert_array_equal(read_mask(tmp_path / "three.png", value=128)[0], three == 128)
    with pytest.raises(InputError, match=r"three\.png: expected the label 7, found the labels 0, 128, 255"):
        read_mask(tmp_path / "three.png", value=7)


VALUES = {
    "flags": (NIFTI, NIFTI),
    "0 and 1": (NIFTI.astype(np.uint8), NIFTI),
    "0 and 255 as floats": (NIFTI * 255.0, NIFTI),
    "-1 and 1": (NIFTI * 2.0 - 1, NIFTI),
    "two greys": (NIFTI * 3 + 4, NIFTI),
    "two fractions": (NIFTI * 0.99999, NIFTI),
    "all inside": (np.ones_like(NIFTI, np.int16), np.ones_like(NIFTI)),
    "all outside": (np.zeros_like(NIFTI, np.int16), np.zeros_like(NIFTI)),
    "large labels": (NIFTI * np.int32(10**8), NIFTI),
    "negative": (-NIFTI.astype(np.int8), "found the values -1, 0; 0 is outside, and 1 inside"),
    "all negative": (-np.ones_like(NIFTI, np.int8), "found the values -1;"),
    "three": (NIFTI + NIFTI[::-1] * 1 + (np.arange(5) > 3) * 7, "found the values 0, 1, 2, 7, 8, 9; give one mask"),
    "probabilities": (np.linspace(0, 1, NIFTI.size).reshape(NIFTI.shape), "cut probabilities at one half first"),
    "not a number": (np.where(NIFTI, np.nan, 0), "a mask of finite values, found .* NaN or Inf"),
    "infinite": (np.where(NIFTI, np.inf, 0), "a mask of finite values, found"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("suffix", [".npy", ".nii.gz"])
def test_the_values_of_arrays_tell_what_is_inside(tmp_path, name, suffix):
    array, expected = VALUES[name]
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, np.asfortranarray(array))
    else:
        kind = {"bool": np.uint8, "int64": np.int32}.get(array.dtype.name, array.dtype)
        nib.save(nib.Nifti1Image(array.astype(kind), np.eye(4)), path)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as caught:
            read_mask(path)
        assert str(caught.value).startswith(f"{path}: expected ")
    else:
        np.testing.assert_array_equal(read_mask(path)[0], expected)


def test_labels_count_where_they_are_asked_for():
    labels = np.array([0, 3, 9, 3])
    np.testing.assert_array_equal(to_mask(labels, "a", allow_labels=True), [False, True, True, True])
    np.testing.assert_array_equal(to_mask(labels, "a", value=3), [False, True, False, True])
    with pytest.raises(InputError, match="a: expected a mask of two values, such as 0 and 1, found the values 1, 3, 9"):
        to_mask(labels + (labels == 0), "a", allow_labels=True)
    with pytest.raises(InputError, match=r"found the values -1, 0, 3"):
        to_mask(np.array([-1, 0, 3]), "a", allow_labels=True)

"""Photographs of the retina: the disc is found and squared, maps come back to the pixels, and channels are scaled."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxmed.config import from_record, to_record
from jaxmed.data.intensity import Intensity
from jaxmed.data.picture_crop import NO_RIM, Square, find_disc
from jaxmed.data.preprocess import Preprocess, load, load_mask
from jaxmed.data.stored import as_pixels
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles

pytestmark = pytest.mark.core
SIZE = (27, 27)
CROPPED = Preprocess(SIZE, 3, axes="xyz", crop="disc", fit="stretch", interpolation="bicubic")


def fundus(shape=(90, 120), middle=(44, 61), radius=40, seed=0):
    """Return red, green and blue of a disc, darker towards its rim, in the noise of a camera."""
    generator = np.random.default_rng(seed)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    square = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2
    light = (1 - 0.5 * square / radius**2)[..., None] * np.array([210, 120, 60]) + generator.integers(
        0, 20, (*shape, 3)
    )
    picture = generator.integers(0, 4, (*shape, 3))
    return np.where((square <= radius**2)[..., None], light, picture).astype(np.uint8)


# Middle and radius of discs in pictures of 90 x 120 pixels: whole, and cut off on one side or on two opposite ones.
DISCS = {
    "whole": ((44, 61), 40),
    "small": ((70, 20), 12),
    "above": ((20, 60), 40),
    "below": ((75, 60), 40),
    "left": ((45, 25), 40),
    "above and below": ((45, 60), 50),
}


@pytest.mark.parametrize("disc", DISCS)
def test_a_disc_is_found_to_the_pixel_also_where_it_is_cut_off(disc):
    middle, radius = DISCS[disc]
    picture = fundus(middle=middle, radius=radius)
    expected = (middle[0] - radius, middle[1] - radius)
    for scale in (1.0, 1 / 255, 257.0):
        for image in (picture * np.float32(scale), picture[..., 0] * np.float32(scale)):
            found = find_disc(image, "a.png")
            assert found is not None and (found.starts, found.edge) == (expected, 2 * radius + 1)
            assert 0 <= found.fill <= 3 * scale


def test_of_a_disc_that_is_cut_off_along_both_axes_the_longer_side_counts():
    picture = fundus(middle=(20, 30)).astype(np.float32)  # rows 0 to 60, columns 0 to 70
    found = find_disc(picture, "a.png")
    assert found is not None and (found.starts, found.edge) == ((61 - 71, 0), 71)


def test_dates_logos_and_specks_in_the_rim_are_no_part_of_it():
    picture = fundus()
    picture[2:8, 90:118] = 255  # a date
    picture[80:, :10] = 180  # a logo over one corner
    picture[::9, ::7][picture[::9, ::7].max(-1) < 4] = 90
    assert find_disc(picture.astype(np.float32), "a.png") == Square((4, 21), 81, find_disc_fill(picture))


def find_disc_fill(picture):
    corners = [picture[x, y].max(-1) for x in (slice(3), slice(-3, None)) for y in (slice(3), slice(-3, None))]
    return sorted(float(np.percentile(corner, 50, method="lower")) for corner in corners)[1]


def test_a_large_picture_is_looked_at_by_every_few_pixels():
    picture = np.kron(fundus()[..., 0], np.ones((25, 25), np.uint8)).astype(np.float32)
    found = find_disc(picture, "a.png")
    assert found is not None and found.edge == pytest.approx(81 * 25, abs=6)
    np.testing.assert_allclose(found.starts, (4 * 25, 21 * 25), atol=3)


def test_without_a_dark_rim_a_picture_is_taken_whole_and_it_is_said(tmp_path):
    whole = np.random.default_rng(0).integers(90, 200, (60, 90, 3)).astype(np.uint8)
    vignetted = fundus((60, 90), (30, 45), 70)  # the disc fills the picture
    vignetted[:4, :4] = vignetted[-4:, -4:] = 0  # two corners are cut, as by a mask
    for number, picture in enumerate((whole, fundus((60, 90), (30, 45), 70))):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        found = CROPPED.prepare(tmp_path / f"{number}.png")
        assert found.notes == (NO_RIM,) and found.cropped is None
        np.testing.assert_array_equal(
            found.image, dataclasses.replace(CROPPED, crop="none")(tmp_path / f"{number}.png")
        )
    assert find_disc(vignetted.astype(np.float32), "a.png") is not None


def dark(kind):
    picture = np.zeros((60, 90), np.uint8)
    if kind == "noise":
        picture += np.random.default_rng(0).integers(0, 5, picture.shape).astype(np.uint8)
    if kind == "specks":
        picture[::20, ::20] = 255
    return picture


@pytest.mark.parametrize("kind", ["constant", "noise", "specks"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_dark_picture_is_refused(kind, channels, tmp_path):
    Image.fromarray(dark(kind)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: expected an image with contrast") as caught:
        dataclasses.replace(CROPPED, channels=channels)(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def squared(picture, disc):
    """Cut and extend by hand."""
    (row, column), radius = DISCS[disc]
    fill = np.zeros((200, 200, *picture.shape[2:]), picture.dtype) + int(find_disc(picture, "").fill)
    fill[50 : 50 + picture.shape[0], 50 : 50 + picture.shape[1]] = picture
    top, left = 50 + row - radius, 50 + column - radius
    return fill[top : top + 2 * radius + 1, left : left + 2 * radius + 1]


@pytest.mark.parametrize("axes", ["xyz", "RAS"])
@pytest.mark.parametrize("disc", ["whole", "above", "left"])
def test_the_input_is_that_of_the_square_in_grey_and_in_colour_at_any_depth(axes, disc, tmp_path):
    middle, radius = DISCS[disc]
    colour = fundus(middle=middle, radius=radius)
    grey = colour[..., 0]
    pictures = {"colour.png": colour, "grey.png": grey, "deep.png": grey.astype(np.uint16) * 257, "a.tif": colour}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / name)
        Image.fromarray(squared(picture, disc)).save(tmp_path / f"square_{name}")
        preprocess = dataclasses.replace(CROPPED, axes=axes, channels=1 if picture.ndim == 2 else 3)
        expected = dataclasses.replace(preprocess, crop="none")(tmp_path / f"square_{name}")
        np.testing.assert_array_equal(preprocess(tmp_path / name), expected)


@pytest.mark.parametrize("axes", ["xyz", "RAS"])
def test_maps_of_a_cropped_picture_come_back_to_its_pixels(axes, tmp_path):
    picture = fundus(middle=(20, 60))[..., 0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    exact = Preprocess((81, 81), axes=axes, crop="disc", fit="stretch")  # as many pixels as the square has
    found = exact.prepare(tmp_path / "a.png")
    back = as_pixels(exact.inverse(found.image[..., 0], found.grid, found.cropped))[0]
    expected = np.zeros_like(back)
    expected[:61, 20:101] = picture[:61, 20:101] / np.float32(255)
    np.testing.assert_allclose(back, expected, atol=1e-6)
    coarse = dataclasses.replace(exact, size=(27, 27))
    found, values = coarse.prepare(tmp_path / "a.png"), np.zeros((27, 27), np.float32)
    values[18, 5] = 1  # x or row 18, y or column 5
    place = np.unravel_index(as_pixels(coarse.inverse(values, found.grid, found.cropped))[0].argmax(), picture.shape)
    row, column = (18, 5) if axes == "xyz" else (26 - 5, 18)
    assert place == (-20 + 3 * row + 1, 20 + 3 * column + 1)


def test_maps_of_a_picture_that_is_covered_and_cut_come_back_too(tmp_path):
    picture = fundus()
    Image.fromarray(picture).save(tmp_path / "a.png")
    preprocess = Preprocess((28, 28), 3, axes="xyz", fit="cover", shorter=30, interpolation="bicubic")
    found = preprocess.prepare(tmp_path / "a.png")
    assert found.grid.shape == (90, 120, 1) and found.cropped is None
    back = as_pixels(preprocess.inverse(np.ones((28, 28), np.float32), found.grid))[0]
    # 30 of 90 rows, 40 of 120 columns; one row of these is cut off on either side, and six columns.
    expected = np.zeros((90, 120))
    expected[3:-3, 18:-18] = 1
    np.testing.assert_allclose(back, expected, atol=1e-6)
    with pytest.raises(InputError, match=r"a map of shape \(1, 28, 28\), found \(27, 28\)"):
        preprocess.inverse(np.ones((27, 28), np.float32), found.grid)


def test_a_mask_is_cropped_as_its_picture_is_and_results_are_written_on_the_whole(tmp_path):
    picture = fundus(middle=(20, 60))
    Image.fromarray(picture).save(tmp_path / "a.png")
    inside = np.zeros(picture.shape[:2], np.uint8)
    inside[10:30, 30:50] = 255
    Image.fromarray(inside).save(tmp_path / "mask.png")
    preprocess = Preprocess((27, 27), 3, crop="disc")
    loaded = load(ScanFiles(tmp_path / "a.png"), preprocess)
    (mask,) = load_mask(tmp_path / "mask.png", loaded, preprocess)
    assert mask.grid.shape == loaded.volume.grid.shape == (81, 81, 1)
    np.testing.assert_array_equal(mask.affine, loaded.volume.affine)
    stored = loaded.as_stored(loaded.restore(mask.array.astype(np.float32)))
    np.testing.assert_array_equal(stored, inside > 0)


def test_stacks_and_volumes_are_not_cropped(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([fundus()[..., 0], fundus(seed=1)[..., 0]]))
    with pytest.raises(InputError, match=r"a\.npy: expected pictures one by one, .*found a stack of 2"):
        load(tmp_path / "a.npy", Preprocess(SIZE, crop="disc"), allow_stack=True)
    with pytest.raises(ValueError, match="crop: expected none for volumes"):
        Preprocess((4, 4, 4), crop="disc")


def test_the_crop_travels_with_weights_and_older_records_have_none():
    record = json.loads(json.dumps(to_record(CROPPED)))
    assert record["crop"] == "disc" and from_record(Preprocess, record, "here") == CROPPED
    del record["crop"]
    assert from_record(Preprocess, record, "here").crop == "none"


def test_every_channel_of_every_picture_has_mean_0_and_deviation_1(tmp_path):
    Image.fromarray(fundus()).save(tmp_path / "a.png")
    scaled = dataclasses.replace(CROPPED, intensity=Intensity("zscore"), order="cut-then-scale")
    found, plain = scaled(tmp_path / "a.png"), CROPPED(tmp_path / "a.png").astype(np.float64)
    assert found.shape == (*SIZE, 3)
    np.testing.assert_allclose(found, (plain - plain.mean((0, 1))) / plain.std((0, 1)), atol=2e-5)
    # By the whole field of view, of which here all is seen, it is the same.
    before = dataclasses.replace(scaled, order="scale-then-cut")(tmp_path / "a.png")
    np.testing.assert_allclose(before, found, atol=2e-5)
    grey = dataclasses.replace(scaled, channels=1, axes="RAS")
    Image.fromarray(fundus()[..., 0]).save(tmp_path / "grey.png")
    values = grey(tmp_path / "grey.png")
    assert abs(values.mean()) < 1e-5 and values.std() == pytest.approx(1, abs=1e-5)
    Image.fromarray(fundus() * np.array([1, 1, 0], np.uint8)).save(tmp_path / "no_blue.png")
    with pytest.raises(InputError, match=r"no_blue\.png: expected a spread of intensities"):
        scaled(tmp_path / "no_blue.png")


# Real photographs ----------------------------------------------------------------------------------------------------


def test_the_disc_of_a_real_photograph_is_found_and_cut_off_by_hand(shared_data, tmp_path):
    path = shared_data / "fundus_photo" / "retina.jpg"
    if not path.exists():
        pytest.skip("the photograph is not here")
    picture = np.asarray(Image.open(path))
    whole = find_disc(picture.astype(np.float32), path)
    assert whole is not None and whole.edge == pytest.approx(1395, abs=6)
    np.testing.assert_allclose(whole.starts, (6, 7), atol=4)
    # Without its upper sixth the square is the same, and reaches above the picture.
    lower = find_disc(picture[235:].astype(np.float32), path)
    assert lower is not None and lower.edge == pytest.approx(whole.edge, abs=4)
    np.testing.assert_allclose(lower.starts, (whole.starts[0] - 235, whole.starts[1]), atol=4)


def test_nearly_all_discs_of_retinamnist_are_found(shared_data):
    path = shared_data / "retinamnist" / "retinamnist_trainval.npz"
    if not path.exists():
        pytest.skip("retinamnist is not here")
    pictures = np.load(path)["train_images"]
    found = [find_disc(picture / np.float32(255), number) for number, picture in enumerate(pictures)]
    edges = np.array([one.edge for one in found if one is not None])
    assert len(edges) > 0.97 * len(pictures)
    assert (np.abs(edges - 27) <= 2).mean() > 0.95

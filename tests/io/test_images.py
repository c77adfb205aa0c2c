"""Images: range, orientation, palettes, pages, and damaged files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxmed import files
from jaxmed.errors import InputError
from jaxmed.io.images import read_image, write_png

pytestmark = pytest.mark.core


@pytest.fixture
def gray():
    return np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.uint8)


@pytest.fixture
def colour():
    return np.random.default_rng(1).integers(0, 256, (6, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_integers_are_scaled_to_one_by_their_range(tmp_path, gray, colour, suffix):
    wide = gray.astype(np.uint16) * 257
    for pixels, largest in ((gray, 255), (colour, 255), (wide, 65535)):
        Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
        image = read_image(tmp_path / f"a{suffix}")
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image, (pixels / np.float32(largest)).astype(np.float32))


def test_floating_point_and_array_files_keep_their_values(tmp_path, gray):
    values = gray.astype(np.float32) * 3 - 200
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), values)
    np.save(tmp_path / "a.npy", values.astype(np.float64))
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy"), values)
    np.save(tmp_path / "b.npy", gray)
    assert read_image(tmp_path / "b.npy").max() <= 1


def test_npz_asks_for_a_key_when_it_holds_several(tmp_path, gray):
    np.savez(tmp_path / "one.npz", image=gray)
    np.savez(tmp_path / "two.npz", image=gray, other=gray + 1)
    np.testing.assert_array_equal(read_image(tmp_path / "one.npz"), read_image(tmp_path / "two.npz", key="image"))
    with pytest.raises(InputError, match="image, other"):
        read_image(tmp_path / "two.npz")
    with pytest.raises(InputError, match="'none'"):
        read_image(tmp_path / "two.npz", key="none")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # Two halves survive JPEG compression well enough to tell the eight cases apart.
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels[::-1].T,
        7: pixels[::-1, ::-1].T,
        8: pixels[:, ::-1].T,
    }[orientation]
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), upright / 255, atol=0.02)


def test_alpha_is_dropped_and_palettes_are_expanded(tmp_path, gray, colour):
    alpha = gray[..., None]
    Image.fromarray(np.concatenate([colour, alpha], -1)).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png") * 255, colour)
    Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray)]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png") * 255, gray)
    palette = Image.fromarray(gray % 3).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata((gray % 3).ravel().tolist())
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), np.eye(3)[gray % 3])
    palette.save(tmp_path / "t.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "t.png"), np.eye(3)[gray % 3])
    Image.fromarray(gray > 99).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bit.png"), gray > 99)


def test_tiff_pages_are_stacked_and_must_have_one_size(tmp_path, gray):
    pages = [Image.fromarray(np.roll(gray, shift, 0)) for shift in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    expected = np.stack([np.roll(gray, shift, 0) for shift in range(3)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif") * 255, expected)
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=[Image.fromarray(gray[:3])])
    with pytest.raises(InputError, match="pages of one size"):
        read_image(tmp_path / "b.tif")


def test_wrong_files_are_told(tmp_path, gray):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    for suffix in ("png", "jpg", "tif"):
        Image.fromarray(noise).save(tmp_path / f"good.{suffix}")
        content = (tmp_path / f"good.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"start.{suffix}").write_bytes(content[:30])
        (tmp_path / f"text.{suffix}").write_text("not an image")
        (tmp_path / f"none.{suffix}").write_text("")
        for name in ("half", "start", "text", "none", "missing"):
            path = tmp_path / f"{name}.{suffix}"
            with pytest.raises(InputError) as caught:
                read_image(path)
            assert str(caught.value).startswith(f"{path}: expected "), name
    for name, array in {
        "nan": np.full((2, 2), np.nan),
        "object": np.array([[{}, 1]], object),
        "text": np.array([["a"]]),
        "complex": np.ones((2, 2), complex),
        "line": np.ones(3),
        "void": np.ones((0, 3)),
    }.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(InputError, match=f"{name}.npy"):
            read_image(tmp_path / f"{name}.npy")
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(b"no numbers here")
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.ones((3, 3)))
    with pytest.raises(InputError, match="1 everywhere"):
        read_image(tmp_path / "flat.npy", allow_constant=False)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="suffix"):
        read_image(tmp_path / "a.gif")


def test_written_png_returns(tmp_path, gray, colour):
    for pixels in (gray, colour, gray.astype(np.uint16) * 257):
        write_png(tmp_path / "a.png", pixels)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    write_png(tmp_path / "b.png", colour / 255)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png") * 255, colour)
    for wrong in (gray / 100, np.full((2, 2), np.nan), gray.astype(int), colour[..., :2]):
        with pytest.raises(InputError):
            write_png(tmp_path / "c.png", wrong)
    assert not (tmp_path / "c.png").exists()


def png(width, height):
    """Return a PNG that claims a size, and holds a few bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(2**30, 2**30), (20_000, 20_000), (12_000, 12_000), (0, 5)])
def test_images_that_claim_an_impossible_size_are_told(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=r"a\.png: expected (an image|a whole image)"):
        read_image(tmp_path / "a.png")


def test_pages_that_grow_beyond_all_measure_are_told(tmp_path, gray, monkeypatch):
    pages = [Image.fromarray(np.zeros((300, 300), np.uint8))] * 9
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    assert read_image(tmp_path / "a.tif").shape == (9, 300, 300)
    monkeypatch.setattr(files, "FREELY_UNPACKED", 500_000)
    with pytest.raises(InputError, match=r"a\.tif: expected at most 488.3 KiB, or 40 times .*, found"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("fill", [np.nan, -np.inf, -3.4e38, 1e20])
def test_pixels_without_a_value_are_refused_or_replaced(tmp_path, fill):
    pixels = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    pixels[0, :2] = fill
    np.save(tmp_path / "a.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    for name in ("a.npy", "a.tif"):
        with pytest.raises(InputError, match=rf"{name}: expected .* 2 .*of 30.*--fill VALUE"):
            read_image(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, fill=0.25)[0, :2], 0.25)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "CMYK", "YCbCr", "LAB", "I;16", "I", "F", "1", "P"])
def test_pictures_of_every_mode_are_read_in_one_range(tmp_path, gray, mode):
    wide = {"I;16": gray.astype(np.uint16) * 257, "I": gray.astype(np.int32), "F": gray / np.float32(255)}
    picture = Image.fromarray(wide[mode]) if mode in wide else Image.fromarray(gray).convert("RGB").convert(mode)
    picture.save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.shape[:2] == gray.shape and image.dtype == np.float32
    if mode not in ("I", "1", "P", "CMYK", "LAB", "YCbCr"):
        np.testing.assert_allclose(image if image.ndim == 2 else image[..., 0], gray / 255, atol=0.02)

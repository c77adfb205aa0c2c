"""2D images, and masks as images: PNG, JPEG and TIFF through Pillow, and arrays in .npy and .npz.

Images are stored as seen: first axis rows from the top, second axis columns from the left, then,
for colour, red, green, blue. 8-bit and 16-bit integers are scaled to [0, 1] by 255 and 65535, bits
to 0 and 1, in every format; other integers and floating point values are kept as they are.
"""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image, ImageOps

from jaxmed.errors import InputError
from jaxmed.files import DAMAGED, atomic_path, require_file, require_room
from jaxmed.io.numpy_files import array_names, read_array, read_member
from jaxmed.volume import require_intensities

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz")


def read_image(
    path: str | Path,
    *,
    key: str | None = None,
    allow_nonfinite: bool = False,
    allow_constant: bool = True,
    fill: float | None = None,
) -> Float32[np.ndarray, "..."]:
    """Read a grayscale or colour image.

    EXIF orientation is applied, alpha is dropped (colours under transparent pixels show), palettes
    and other colour spaces, such as CMYK, become RGB; colour profiles are not applied. The pages of a
    TIFF are stacked along a new first axis and must have one size; of other formats the first picture
    is read. 16-bit colour (PNG, TIFF) comes at 8 bits, which is what Pillow decodes.

    Args:
        path: A .png, .jpg, .jpeg, .tif, .tiff, .npy or .npz file.
        key: Name of the array in an .npz file; needed when it holds several.
        allow_nonfinite: Whether NaN and Inf may pass.
        allow_constant: Whether an image of one single value may pass.
        fill: Value of pixels that have none (NaN, Inf, beyond `volume.LARGEST_INTENSITY`); None refuses them.

    Returns:
        row, column for grayscale, row, column, 3 for colour, with pages before them; arrays
        keep the 2 to 4 axes they have.

    Raises:
        InputError: For whatever is wrong with the file.
    """
    path, pixels = _read(path, key, _pixels)
    image = _to_float(path, pixels)
    if not allow_nonfinite or fill is not None:
        image = require_intensities(image, path, fill=fill)
    if not allow_constant and image.min() == image.max():
        raise InputError(path, "an image with contrast", f"{image.flat[0]:g} everywhere")
    return image


def read_levels(path: str | Path, *, key: str | None = None) -> Shaped[np.ndarray, "..."]:
    """Read a mask or a label image with the values that are stored, unscaled, one per pixel.

    Palettes give their numbers, or grey values where all colours in use are grey. Of pictures in two colours, black
    gives 0 and the other 1. EXIF orientation and pages are as in `read_image`.

    Args:
        path: As in `read_image`.
        key: As in `read_image`.

    Returns:
        row, column, with pages before them; arrays keep their axes.

    Raises:
        InputError: For whatever is wrong with the file; it is of several colours, or transparency alone tells anything.
    """
    path, levels = _read(path, key, _levels)
    if levels.dtype.kind not in "biuf":
        raise InputError(path, "real numbers", f"{levels.dtype}")
    return levels


def drop_colour(image: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return row, column of a grey picture that is saved in colour; any other array as it is."""
    if image.ndim == 3 and image.shape[2] == 3 and (image == image[..., :1]).all():
        return image[..., 0]
    return image


def write_png(path: str | Path, image: Shaped[np.ndarray, "row column *channel"]) -> None:
    """Write a PNG, wholly or not at all.

    Args:
        path: A .png file.
        image: As in `encode_png`.

    Raises:
        InputError: When the array is no such image, or the place is not writable.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(path, "a .png name", f"the suffix '{path.suffix}'")
    encoded = encode_png(image, path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def encode_png(image: Shaped[np.ndarray, "row column *channel"], where: object = "image") -> bytes:
    """Return the bytes of a PNG.

    Args:
        image: row, column or row, column, 3. uint8 and (grayscale only) uint16 are written as they
            are; floating point has to lie in [0, 1] and is written with 8 bits.
        where: Its name in messages.

    Raises:
        InputError: When the array is no such image.
    """
    is_colour = image.ndim == 3 and image.shape[2] == 3
    if not (image.ndim == 2 or is_colour) or image.size == 0:
        raise InputError(where, "an image of row, column or row, column, 3", f"shape {image.shape}")
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            found = f"values in [{low:g}, {high:g}]"
            raise InputError(where, "values in [0, 1]", found, "scale the image first")
        image = np.rint(image * 255).astype(np.uint8)
    if image.dtype != np.uint8 and not (image.dtype == np.uint16 and image.ndim == 2):
        raise InputError(where, "uint8, grayscale uint16 or floating point", f"{image.dtype}")
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, format="PNG")
    return encoded.getvalue()


def _read(
    path: str | Path, key: str | None, pixels_of: Callable[[Image.Image, bool], Shaped[np.ndarray, "..."]]
) -> tuple[Path, Shaped[np.ndarray, "..."]]:
    path = require_file(path, "an image", PICTURE_SUFFIXES + ARRAY_SUFFIXES)
    is_array = path.suffix.lower() in ARRAY_SUFFIXES
    kinds = ("npy", "zip") if is_array else ("png", "jpeg", "tiff")
    require_file(path, "a NumPy file" if is_array else "a PNG, JPEG or TIFF image", kinds=kinds)
    pixels = _read_array(path, key) if is_array else _read_picture(path, pixels_of)
    if pixels.ndim not in (2, 3, 4) or pixels.size == 0:
        raise InputError(path, "an image of 2 to 4 axes", f"shape {pixels.shape}")
    return path, pixels


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of images that are half as large as those that it refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=("PNG", "JPEG", "TIFF"))


def _read_picture(
    path: Path, pixels_of: Callable[[Image.Image, bool], Shaped[np.ndarray, "..."]]
) -> Shaped[np.ndarray, "..."]:
    try:
        with _open(path) as picture:
            # Only TIFF has pages; an MPO's further pictures are previews or other views.
            count = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
            pages, size = [], 0
            for index in range(count):
                if index:
                    picture.seek(index)
                size += picture.width * picture.height * len(picture.getbands())
                require_room(path, size, path.stat().st_size)
                picture.load()
                pages.append(pixels_of(ImageOps.exif_transpose(picture), picture.format == "TIFF"))
    except Image.UnidentifiedImageError as error:
        advice = "check the path"
        raise InputError(path, "an image", "something that is not an image", advice) from error
    except Image.DecompressionBombError as error:
        raise InputError(path, "an image of ordinary size", error, "cut it into tiles") from error
    except InputError:
        raise
    except _SeveralColours as error:
        advice = "give a grey picture, or one of black and one colour"
        raise InputError(path, "a mask of two values", error, advice) from error
    except DAMAGED as error:
        raise InputError(path, "a whole image", f"a damaged one ({error})", "copy again") from error
    shapes = {page.shape for page in pages}
    if len(shapes) > 1:
        raise InputError(path, "pages of one size", f"{sorted(shapes)}", "split the file")
    return pages[0] if len(pages) == 1 else np.stack(pages)


def _pixels(picture: Image.Image, is_tiff: bool) -> Shaped[np.ndarray, "..."]:
    mode = picture.mode
    if mode == "1":
        return np.asarray(picture)
    if mode.startswith("I;16"):
        pixels = np.asarray(picture)
        return pixels.astype(pixels.dtype.newbyteorder("="))
    if mode == "I" and not is_tiff:
        return np.asarray(picture).astype(np.uint16)  # a 16-bit PNG, as older versions decode it
    if mode in ("L", "I", "F"):
        return np.asarray(picture)
    if mode in ("LA", "La"):
        return np.asarray(picture.convert("LA"))[..., 0]
    if mode in ("RGBA", "PA") or "transparency" in picture.info:
        # Channels are cut, not converted: conversion to RGB would blend in some Pillow versions.
        return np.asarray(picture.convert("RGBA"))[..., :3]
    return np.asarray(picture.convert("RGB"))


class _SeveralColours(Exception):
    """A mask whose colours do not tell what is inside."""


def _levels(picture: Image.Image, is_tiff: bool) -> Shaped[np.ndarray, "row column"]:
    if picture.mode == "P":
        levels = _palette_levels(picture)
    else:
        levels = drop_colour(_pixels(picture, is_tiff))
        if levels.ndim == 3:
            levels = _colour_levels(levels)
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if levels.min() == levels.max() and alpha.min() != alpha.max():
            raise _SeveralColours("one colour, of which some is transparent")
    return levels


def _palette_levels(picture: Image.Image) -> Shaped[np.ndarray, "row column"]:
    numbers = np.asarray(picture)
    used = np.unique(numbers)
    palette = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    if used[-1] >= len(palette):
        return numbers
    colours = palette[used]
    if (colours == colours[:, :1]).all():
        return palette[numbers][..., 0]
    is_black = (colours == 0).all(1)
    if len(used) == 2 and is_black.sum() == 1:
        return (numbers == used[~is_black][0]).astype(np.uint8)
    return numbers


def _colour_levels(pixels: Shaped[np.ndarray, "row column 3"]) -> Shaped[np.ndarray, "row column"]:
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    is_black = (colours == 0).all(1)
    if len(colours) == 2 and is_black.any():
        return (pixels != 0).any(-1).astype(np.uint8)
    told = ", ".join(str(tuple(colour)) for colour in colours[:4].tolist())
    raise _SeveralColours(f"{len(colours)} colours: {told}" + (", ..." if len(colours) > 4 else ""))


def _read_array(path: Path, key: str | None) -> Shaped[np.ndarray, "..."]:
    try:
        if not zipfile.is_zipfile(path):
            return read_array(path)
        names = array_names(path)
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            found = f"the arrays {', '.join(names) or '(none)'}"
            raise InputError(path, f"array '{key}'" if key else "one array", found, "name one")
        return read_member(path, key)
    except DAMAGED as error:
        if isinstance(error, InputError):
            raise
        advice = "save plain numbers, without pickled objects" if "pickle" in str(error) else ""
        raise InputError(path, "an array of numbers", f"a bad file ({error})", advice) from error


def _to_float(path: Path, pixels: Shaped[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    if pixels.dtype.kind not in "biuf":
        raise InputError(path, "real numbers", f"{pixels.dtype}")
    with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which is counted and refused
        image = np.ascontiguousarray(pixels, np.float32)
    largest = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
    scale = largest.get(pixels.dtype.newbyteorder("="))
    return image / np.float32(scale) if scale else image

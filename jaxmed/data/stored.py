"""What a file, or an array in memory, holds: as volumes with their axes as stored; on the host.

A picture is a volume of one plane; rows run down and columns to the right. It is taken either as it is stored, or as it
is shown: x to the right and y up, like the slice of a volume. A stack of pictures has its items along z.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxmed.errors import InputError
from jaxmed.files import require_file
from jaxmed.io.images import PICTURE_SUFFIXES, drop_colour, read_image
from jaxmed.io.numpy_files import array_names, read_array, read_member
from jaxmed.io.scans import ScanFiles, kind_of, read_volume
from jaxmed.volume import Volume, require_intensities

Kind = Literal["volume", "picture", "stack", "array"]
PICTURE_AFFINE = np.diag([1.0, -1.0, 1.0, 1.0])


class Form(NamedTuple):
    """What a network asks of its input.

    Attributes:
        size: Of an image, along each axis.
        channels: Of it; 3 are colours.
        as_shown: Whether a picture's axes are x to the right and y up; rows and columns otherwise.
        allow_stack: Whether the first axis of a .npy file may be the item.
    """

    size: tuple[int, ...]
    channels: int = 1
    as_shown: bool = True
    allow_stack: bool = False


class Stored(NamedTuple):
    """What was read.

    Attributes:
        volumes: Axes as stored; several for a stack of volumes.
        kind: A volume with its place in the world, a picture, a stack of pictures, or volumes without a place.
        path: The file, or what to call an array.
        knows_frame: Whether it states where its axes point.
        notes: What is unexpected about it.
    """

    volumes: tuple[Volume, ...]
    kind: Kind
    path: Path
    knows_frame: bool = True
    notes: tuple[str, ...] = ()


def read_stored(image: Volume | ScanFiles | Path | np.ndarray, form: Form) -> Stored:
    """Return what a file holds.

    Args:
        image: A volume; its file or DICOM folder; a picture; a .npy file; or an array in the axis order of a file.
        form: What is expected.

    Raises:
        InputError: For whatever is wrong with the file: damaged, not finite, constant, of another number of axes.
    """
    if isinstance(image, Volume):
        require_volume("volume", image.array, form.channels)
        return Stored((image,), "volume", Path("volume"))
    if isinstance(image, np.ndarray):
        return Stored((_in_memory(image, form),), "picture" if len(form.size) == 2 else "array", Path("image"))
    scan = image if isinstance(image, ScanFiles) else ScanFiles(image)
    if kind_of(scan.path) in ("picture", "array"):
        array = read_image(scan.path, allow_constant=False, fill=scan.fill)
        return Stored(*as_volumes(array, scan.path, form), scan.path)
    volume, knows_frame, notes = read_volume(scan, allow_plane=len(form.size) == 2)
    require_volume(scan.path, volume.array, form.channels)
    return Stored((volume,), "volume", scan.path, knows_frame, notes)


def as_volumes(array: Shaped[np.ndarray, "..."], path: Path, form: Form) -> tuple[tuple[Volume, ...], Kind]:
    """Place the pixels of a picture, or the items of an array.

    Raises:
        InputError: It is no such array as is expected.
    """
    is_picture, is_flat = path.name.lower().endswith(PICTURE_SUFFIXES), len(form.size) == 2
    colours = int(form.channels > 1)
    if colours and is_flat and array.ndim == 2:
        array = np.repeat(array[..., None], form.channels, axis=2)  # grey, as Pillow makes colour of it
    elif is_picture and not colours:
        array = drop_colour(array)
    if colours and is_flat and array.shape[-1] != form.channels:
        advice = "give one page, or channels last"
        raise InputError(path, f"a picture of {form.channels} channels", f"shape {array.shape}", advice)
    axes = array.ndim - colours
    if is_flat and axes != 2 and (is_picture or not form.allow_stack):
        expected = "a colour picture" if colours else "a grey picture"
        raise InputError(path, expected, f"shape {array.shape}", "convert it, or give one page or slice")
    # In 3D a stack alone is welcome: three axes could be a stack of pictures as well.
    if axes not in ((2, 3) if is_flat else (4,)):
        wanted = "2D pictures, or a stack of them," if is_flat else "NIfTI, or an array of item, x, y, z,"
        advice = "give --preprocess.size as many numbers as images have axes"
        found = f"{array.ndim}D of shape {array.shape}"
        raise InputError(path, f"{wanted} for images of {form.size}", found, advice)
    if not is_flat:
        if len(array) > 1 and not form.allow_stack:
            raise InputError(path, "one volume", f"a stack of {len(array)}", "give them one by one")
        return tuple(Volume.make(item, np.eye(4)) for item in array), "array"
    stack = np.moveaxis(array if axes == 3 else array[None], 0, 2)
    kind: Kind = "stack" if axes == 3 else "picture"
    if not form.as_shown:
        return (Volume.make(stack, np.eye(4)),), kind
    return (Volume.make(np.ascontiguousarray(np.swapaxes(stack, 0, 1)), PICTURE_AFFINE),), kind


def as_pixels(volume: Volume) -> Shaped[np.ndarray, "item row column *channel"]:
    """Return what lies on the grid of a picture, or of a stack of them, as rows and columns of pixels."""
    is_shown = volume.affine[1, 1] < 0  # x to the right, y up
    array = np.swapaxes(volume.array, 0, 1) if is_shown else volume.array
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))


def require_volume(where: object, array: Shaped[np.ndarray, "..."], channels: int = 1) -> None:
    """Refuse what is no 3D image: another number of axes, NaN or Inf, one value everywhere.

    Raises:
        InputError: It is none.
    """
    if array.ndim != 3 + (channels > 1) or 0 in array.shape:
        raise InputError(where, "a 3D volume", f"shape {array.shape}", "choose one volume of it")
    if array.dtype.kind == "f":
        require_intensities(array, where)
    low, high = array.min(), array.max()
    if low == high:
        raise InputError(where, "an image with contrast", f"a constant volume, {low:g} everywhere")


def read_prepared(path: Path) -> Shaped[np.ndarray, "..."]:
    """Read an array that was prepared before; axes of length 1 before or after it are dropped.

    Args:
        path: A .npy file, or a .npz file with the array "volume".

    Raises:
        InputError: It is no such file, or not of real numbers.
    """
    require_file(path, "a NumPy file", kinds=("npy", "zip"))
    try:
        if not zipfile.is_zipfile(path):
            cube = read_array(path)
        elif "volume" in (names := array_names(path)):
            cube = read_member(path, "volume")
        else:
            advice = "save it with np.savez(path, volume=cube)"
            raise InputError(path, "an array named 'volume'", ", ".join(names) or "none", advice)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path, "a NumPy file of numbers", f"a damaged one or one of objects ({error})") from error
    if cube.dtype.kind not in "biuf":
        raise InputError(path, "real numbers", f"{cube.dtype}")
    while cube.ndim > 3 and 1 in (cube.shape[0], cube.shape[-1]):
        cube = cube[0] if cube.shape[0] == 1 else cube[..., 0]
    return cube


def _in_memory(array: Shaped[np.ndarray, "..."], form: Form) -> Volume:
    spatial = len(form.size)
    if array.ndim == spatial and form.channels == 1:
        array = array[..., None]
    if array.ndim != spatial + 1 or array.shape[-1] != form.channels or 0 in array.shape:
        expected = f"{spatial} axes of space and {form.channels} channel(s)"
        raise InputError("image", expected, f"shape {array.shape}")
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("image", "finite values", "NaN or Inf", "mask or repair them first")
    flat = (1,) * (3 - spatial)  # a picture is a volume of one plane
    shape = (*array.shape[:-1], *flat, *((form.channels,) if form.channels > 1 else ()))
    return Volume.make(values.reshape(shape), np.eye(4))

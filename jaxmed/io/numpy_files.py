"""Arrays in .npy and .npz files, read by several threads at once, and written as the same bytes every time.

NumPy has Python parse the header of a file, and Python up to 3.12 counts the depth of that parser for all threads
together. jax runs Python code in the garbage collector, where another thread may take over: about one read in a few
thousand then ends in a SystemError. Here headers are parsed one at a time; voxels are read side by side.
"""

import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Shaped

from jaxmed.files import atomic_path, require_room

_one_header = threading.Lock()
# By the version of the format; version 3 is for structured types alone.
_HEADERS: dict[tuple[int, int], Callable] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def map_array(path: Path) -> Shaped[np.ndarray, "..."]:
    """Map the array of a .npy file into memory, read-only.

    Raises:
        ValueError: It is damaged, or holds Python objects.
        OSError: It cannot be read.
    """
    with _one_header:
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_array(path: Path) -> Shaped[np.ndarray, "..."]:
    """Read the array of a .npy file.

    Raises:
        ValueError: It is damaged, or holds Python objects.
        OSError: It cannot be read.
        InputError: It is larger than the machine's memory.
    """
    size = path.stat().st_size
    require_room(path, size)
    with path.open("rb") as file:
        return _read(file, size)


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in a .npz file.

    Raises:
        zipfile.BadZipFile: It is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_member(path: Path, name: str) -> Shaped[np.ndarray, "..."]:
    """Read one array of a .npz file.

    Raises:
        KeyError: There is no such array.
        ValueError: It is damaged, or holds Python objects.
        zipfile.BadZipFile: The archive is damaged.
        InputError: It would grow beyond all measure when unpacked; see `files.require_room`.
    """
    with zipfile.ZipFile(path) as archive:
        found = archive.getinfo(f"{name}.npy")
        require_room(f"{path}, array '{name}'", found.file_size, found.compress_size)
        with archive.open(found) as file:
            return _read(file, found.file_size)


def _read(file: BufferedIOBase | IO[bytes], size: int) -> Shaped[np.ndarray, "..."]:
    """Read an array from the bytes of a .npy file, of which there are `size`."""
    with _one_header:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"an array in version {version} of the format")
        shape, is_column_major, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects (pickled)")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if count < 0 or count * dtype.itemsize > size:
        raise ValueError(f"{size} bytes where shape {shape} of {dtype} needs {count * dtype.itemsize}")
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes of {count * dtype.itemsize}")
    array = np.frombuffer(content, dtype, count)
    return array.reshape(shape[::-1]).T if is_column_major else array.reshape(shape)


def write_npz(path: str | Path, arrays: Mapping[str, object], *, is_compressed: bool = False) -> None:
    """Write arrays by name as a .npz file, wholly or not at all.

    NumPy's own function stores the time of day, so that equal arrays make different files.

    Raises:
        InputError: The place cannot be written or is full.
        ValueError: An array holds Python objects.
    """
    method = zipfile.ZIP_DEFLATED if is_compressed else zipfile.ZIP_STORED
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = method
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def restore_npz(path: Path) -> dict[str, Shaped[np.ndarray, "..."]] | None:
    """Read back all arrays of a .npz file that a run may continue from; None where it is missing or damaged.

    Every member has a checksum, so that a changed bit is noticed.
    """
    try:
        return {name: read_member(path, name) for name in array_names(path)}
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None

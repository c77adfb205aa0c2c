"""Safetensors files: names to NumPy arrays.

The format is eight bytes of header length, a JSON header and the raw tensors, so it is read here
without a framework: bfloat16 and float8 have no place in that package's NumPy side, and a mapped
file costs no memory until a tensor is used.

Source: the format description at https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxmed.errors import InputError
from jaxmed.files import atomic_path, require_file

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation


def read(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read every tensor of a file; the arrays are read-only views of it.

    Raises:
        InputError: When the file is missing, truncated or not safetensors.
    """
    path = require_file(path, "a safetensors file")
    header, start = _header(path)
    content = np.memmap(path, np.uint8, mode="r")[start:]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            found = f"the entry {entry}"
            raise InputError(path, f"type, shape and place of '{name}'", found) from error
        if min(shape, default=0) < 0 or not 0 <= begin <= end:
            raise InputError(path, f"type, shape and place of '{name}'", f"the entry {entry}")
        if end > content.size:
            found = f"{start + content.size} in a truncated file"
            raise InputError(path, f"{start + end} bytes", found, "copy it again")
        if end - begin != math.prod(shape) * dtype.itemsize:
            found = f"{end - begin} bytes"
            raise InputError(path, f"{dtype} of shape {shape} for '{name}'", found)
        tensors[name] = np.asarray(content[begin:end]).view(dtype).reshape(shape)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the free-form strings that a file carries beside its tensors.

    Raises:
        InputError: When the file is missing, truncated or not safetensors.
    """
    header, _ = _header(require_file(path, "a safetensors file"))
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise InputError(path, "metadata of strings", f"{metadata!r}")
    return {str(name): str(value) for name, value in metadata.items()}


def write(
    path: str | Path,
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named arrays, wholly or not at all.

    Args:
        path: The file.
        tensors: Names to arrays; the file holds them by falling element size, then by name.
        metadata: Strings to keep beside them.

    Raises:
        InputError: When an array has a type that the format lacks, or the place is not writable.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(path, "a .safetensors name", f"the suffix '{path.suffix}'")
    names = {dtype: name for name, dtype in DTYPES.items()}
    arrays, header, position = [], {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    # By falling element size every tensor is aligned, whatever comes before it.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = np.asarray(tensors[name])
        dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
        if dtype not in names:
            raise InputError(f"tensor '{name}'", f"one of {', '.join(names.values())}", array.dtype)
        place = [position, position + array.nbytes]
        header[name] = {"dtype": names[dtype], "shape": array.shape, "data_offsets": place}
        arrays.append(array.astype(dtype, copy=False))
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.tobytes())


def _header(path: Path) -> tuple[dict, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        first = file.read(1)
        if size < 8 or length > LARGEST_HEADER or first != b"{":
            raise InputError(path, "a safetensors file", "other content", "check the path")
        if 8 + length > size:
            found = f"{size} in a truncated file"
            raise InputError(path, f"more than {8 + length} bytes", found, "copy it again")
        text = first + file.read(length - 1)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(path, "a safetensors header", error, "copy it again") from error
    if not isinstance(header, dict):
        raise InputError(path, "a safetensors header", type(header).__name__)
    return header, 8 + length

"""Safetensors files: names to NumPy arrays.

The safetensors library reads and checks the header: names, types, shapes, and that tensors cover the file without
holes or overlaps. The values are viewed here, where it would copy them: a mapped file costs no memory until a tensor is
used. Files are written here because the library orders metadata at random: the same weights shall be the same bytes.

Source: the format description at https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
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
MOST_AXES = 64  # of a NumPy array


def read(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read every tensor of a file; the arrays are read-only views of it.

    Raises:
        InputError: When the file is missing, truncated or not safetensors.
    """
    path = require_file(path, "a safetensors file", kinds=("safetensors",))
    tensors, position = {}, path.stat().st_size
    with _open(path) as file:
        entries = [(name, file.get_slice(name)) for name in file.offset_keys()]
        kinds = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries]
    content = np.memmap(path, np.uint8, mode="r")
    # Tensors cover the end of the file without holes, as the library made sure.
    for name, kind, shape in reversed(kinds):
        if kind not in DTYPES:
            raise InputError(path, f"'{name[:200]}' of a type among {', '.join(DTYPES)}", kind)
        if len(shape) > MOST_AXES:
            raise InputError(path, f"'{name[:200]}' of at most {MOST_AXES} axes", f"{len(shape)} of them")
        end, position = position, position - math.prod(shape) * DTYPES[kind].itemsize
        tensors[name] = np.asarray(content[position:end]).view(DTYPES[kind]).reshape(shape)
    return dict(reversed(tensors.items()))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the free-form strings that a file carries beside its tensors.

    Raises:
        InputError: When the file is missing, truncated or not safetensors.
    """
    with _open(require_file(path, "a safetensors file", kinds=("safetensors",))) as file:
        return dict(file.metadata() or {})


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


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) < 9 or start[8:] != b"{":
        raise InputError(path, "a safetensors file", "other content", "check the path")
    try:
        return safetensors.safe_open(path, "np")  # pyright: ignore[reportAttributeAccessIssue]
    except (safetensors.SafetensorError, OSError, ValueError) as error:  # pyright: ignore[reportAttributeAccessIssue]
        found = f"a damaged or truncated one ({str(error)[:200]})"
        raise InputError(path, "a safetensors file", found, "copy it again") from error

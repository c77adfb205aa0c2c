"""PyTorch checkpoints (.pth, .pt, .bin) without PyTorch and without executing anything.

A pickle is a program: `pickle_opcodes` interprets it over the stand-ins of `pickle_names`. Both layouts are read: the
zip archive of torch 1.6 and later, and the bare stream before it. What a file may ask for is bounded, and no tensor is
read before it is chosen.

Source: torch/serialization.py of PyTorch (the layouts).
"""

import io
import mmap
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jaxmed.errors import InputError
from jaxmed.files import DAMAGED, require_file
from jaxmed.io.pickle_names import STORAGE_NAMES, Global, Refused, Storage, Tensor, Unread, typed
from jaxmed.io.pickle_opcodes import MOST_STEPS, Budget, Interpreter, Plain, TooMuch, UnknownOpcode

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 1 << 28  # bytes; tensors are not in it
LARGEST_DIRECTORY = 1 << 23  # bytes of a zip file's table of contents: 100,000 tensors
LARGEST_EXPANSION = 1 << 28  # bytes of compressed members in all; torch.save compresses nothing
LARGEST_TENSORS = 1 << 32  # bytes of the chosen ones; beyond, safetensors is read in place


def read_checkpoint(path: str | Path, choose: Callable[[Any], Any] | None = None) -> Any:
    """Read what `torch.save` wrote.

    Tensors and parameters become NumPy arrays (bfloat16 and float8 through ml_dtypes), without a copy where they lie
    densely in their storage, so tensors that share a storage share memory and arrays may be read-only. Ordered dicts,
    counters, other kinds of dicts and `argparse.Namespace` become dicts, `torch.Size` a tuple, dtypes NumPy dtypes,
    devices and paths strings; objects of other classes `pickle_names.Unread`, which say what the file says of them.

    Args:
        path: The file.
        choose: Given what was saved, with `pickle_names.Tensor` (shape, no values) in the place of tensors, returns the
            part to read; all of it by default. An optimizer's moments need not be read.

    Returns:
        The object that was saved, as a rule a nested dict; or what `choose` made of it.

    Raises:
        InputError: The file is missing, damaged, no checkpoint, asks for more than the bounds above, or mentions a name
            that no checkpoint needs; that name is given, and nothing of it was run.
    """
    path = require_file(path, "a PyTorch checkpoint", kinds=("zip", "pickle"))
    advice = "save the state dict alone, or convert it to safetensors where it was made"
    try:
        with _Short(io.FileIO(path)) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = Plain(lambda tensor: tensor).convert(
                _read_zip(path, file) if is_zip else _read_legacy(path, file)
            )
            if isinstance(content, Unread):
                expected = "a checkpoint of tensors and plain values"
                raise InputError(path, expected, f"an object of {content.name[:200]}, which was not made", advice)
            return _read_tensors(content if choose is None else choose(content))
    except InputError:
        raise
    except Refused as error:
        found = f"the name {str(error)[:200]} in its pickle, which was not run"
        raise InputError(path, "a checkpoint of tensors and plain values", found, advice) from error
    except TooMuch as error:
        raise InputError(path, error, "more", advice) from error
    except UnknownOpcode as error:
        raise InputError(path, "the opcodes of a checkpoint", f"the opcode {error}") from error
    except DAMAGED as error:
        found = f"a damaged or other file ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(path, "a PyTorch checkpoint", found, "copy it again") from error


def _read_tensors(content: Any) -> Any:
    """Read the tensors of what was chosen."""
    storages: dict[int, Storage] = {}

    def note(tensor: Tensor) -> Tensor:
        root = tensor.storage.root or tensor.storage
        storages[id(root)] = root
        return tensor

    def check(unread: Unread) -> None:
        if ".".join(unread.name.split(".")[:2]) in ("torch._utils", "torch._tensor"):  # quantized, sparse, without data
            raise Refused(unread.name)

    Plain(note, check).convert(content)
    size = sum(storage.nbytes for storage in storages.values())
    if size > LARGEST_TENSORS:
        raise TooMuch(f"at most {LARGEST_TENSORS >> 30} GiB of tensors in a pickled checkpoint")
    # Tensors of one storage in another order are copies; many of them could ask for any amount of memory.
    copies = Budget(2 * size + (1 << 26), "bytes of tensors in another order than their storage")
    return Plain(lambda tensor: tensor.array(copies.spend)).convert(content)


class _Short(io.BufferedReader):
    """A file of which no more than so much is read at once: of a table of contents, before it is looked at."""

    most: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > self.most:
            raise TooMuch(f"at most {self.most:,} bytes of table of contents")
        return super().read(size)


def _read_zip(path: Path, file: _Short) -> Any:
    file.most = LARGEST_DIRECTORY
    archive = zipfile.ZipFile(file)
    file.most = None
    names = archive.namelist()
    pickles = [name for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(pickles) != 1:
        raise InputError(path, "a PyTorch checkpoint", "a zip file without data.pkl", "check the path")
    root = pickles[0][: -len("data.pkl")]
    if f"{root}constants.pkl" in names:
        found = "a TorchScript program"
        raise InputError(path, "a checkpoint of tensors", found, "save its state dict instead")
    expanded = Budget(LARGEST_EXPANSION, "bytes in compressed members (torch.save compresses none)")

    def read(name: str, most: int = sys.maxsize) -> bytes:
        info = archive.getinfo(name)
        if info.file_size > most:
            raise TooMuch(f"at most {most:,} bytes in {name[-40:]}")
        if info.compress_type != zipfile.ZIP_STORED:
            expanded.spend(info.file_size)
        elif info.file_size != info.compress_size:
            raise ValueError(f"{info.compress_size} bytes for {info.file_size}")
        return archive.read(info)

    is_big = f"{root}byteorder" in names and read(f"{root}byteorder", 16) == b"big"
    order = ">" if is_big else "<"
    storages: dict[str, Storage] = {}

    def persistent(reference: Any) -> Storage | Unread:
        kind, key, count = _reference(reference)
        if kind not in STORAGE_NAMES:
            return Unread(kind.replace(" ", "."))
        if order == ">" and kind.endswith("UntypedStorage"):
            raise ValueError("an untyped storage of a big-endian machine")
        dtype = STORAGE_NAMES[kind].newbyteorder(order)
        if key not in storages:
            name = f"{root}data/{key}"
            size = archive.getinfo(name).file_size
            if size != count * dtype.itemsize:
                raise ValueError(f"{size} bytes for {count} of {dtype}")
            storages[key] = Storage(dtype, count)
            storages[key].load = lambda: read(name)
        if storages[key].dtype != dtype:
            raise ValueError(f"two types for the storage {key}")
        return storages[key]

    return Interpreter(persistent, Budget(MOST_STEPS)).run(io.BytesIO(read(pickles[0], LARGEST_PICKLE)))


def _read_legacy(path: Path, file: BinaryIO) -> Any:
    if file.read(1) != b"\x80":
        found = "something that is not a checkpoint"
        raise InputError(path, "a PyTorch checkpoint", found, "check the path")
    budget, size = Budget(MOST_STEPS), path.stat().st_size
    storages: dict[str, Storage] = {}
    views: dict[str, Storage] = {}
    order: Literal["<", ">"] = "<"

    def persistent(reference: Any) -> Storage | Global | Unread:
        if typed(reference, tuple)[0] == "module":  # a class, with its source
            return typed(reference[1], Global)
        kind, key, count = _reference(reference)
        if kind not in STORAGE_NAMES:
            raise ValueError(f"a storage of type {kind[:40]}")  # whose size in the file nobody knows
        dtype, view = STORAGE_NAMES[kind].newbyteorder(order), reference[5] if len(reference) > 5 else None
        root = storages.setdefault(key, Storage(dtype, count))
        if view is None:
            return root
        name, start, length = typed(view, tuple)
        return views.setdefault(_key(name), Storage(dtype, typed(length, int), root, typed(start, int)))

    def plain(_: Any) -> Any:
        raise ValueError("a reference before the data")

    with mmap.mmap(file.fileno(), min(size, LARGEST_PICKLE), access=mmap.ACCESS_READ) as stream:
        try:
            if not _is_number(Interpreter(plain, budget).run(stream), LEGACY_MAGIC):
                raise InputError(path, "a PyTorch checkpoint", "a pickle of another kind", "save it with torch.save")
            Interpreter(plain, budget).run(stream)  # the protocol version, 1001 ever since
            system = typed(Interpreter(plain, budget).run(stream), dict)
            order = "<" if system.get("little_endian", sys.byteorder == "little") is not False else ">"
            content = Interpreter(persistent, budget).run(stream)
            keys = typed(Interpreter(plain, budget).run(stream), list)
        except (ValueError, EOFError) as error:
            if stream.tell() == LARGEST_PICKLE < size:
                raise TooMuch(f"at most {LARGEST_PICKLE:,} bytes of pickles") from error
            raise
        file.seek(stream.tell())
    for key in keys:
        # Written in the order of the machine, the count always little endian.
        count = int.from_bytes(file.read(8), "little")
        storage = storages[_key(key)]
        if count != storage.count:
            raise ValueError(f"{count} elements for {storage.count}")
        start = file.tell()
        if start + storage.nbytes > size:
            raise EOFError("the file ends before its last tensor")
        storage.load = lambda start=start, size=storage.nbytes: _read_at(file, start, size)
        file.seek(start + storage.nbytes)
    return content


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _reference(reference: Any) -> tuple[str, str, int]:
    """Return type, key and number of elements of the storage that a reference means."""
    kind, storage_type, key, _, count = typed(reference, tuple)[:5]
    name = typed(storage_type, Global).name
    if typed(kind, str) != "storage" or not re.fullmatch(r"torch\S* \w+Storage", name):
        raise ValueError("a reference to something that is no storage")
    if typed(count, int) < 0:
        raise ValueError(f"a storage of {count} elements")
    return name, _key(key), count


def _key(key: Any) -> str:
    text = str(typed(key, str | int))
    if len(text) > 200:
        raise ValueError("a storage's key of endless length")
    return text


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number

"""PyTorch checkpoints (.pth, .pt, .bin) without PyTorch and without executing anything.

A pickle is a program. This file has its own small interpreter for it: only the names in `ALLOWED`
can be mentioned, each is answered by an inert stand-in, and nothing is imported, called or given
attributes on behalf of the file. Both layouts are read: the zip archive of torch 1.6 and later, and
the bare stream before it.

Source: torch/serialization.py and torch/_utils.py of PyTorch (the layouts and rebuild functions);
opcodes as in the standard library's `pickletools`.
"""

import io
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxmed.errors import InputError
from jaxmed.files import require_file

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
    "UntypedStorage": "u1",
}
DTYPES = {
    **{"float64": "f8", "double": "f8", "float32": "f4", "float": "f4", "float16": "f2"},
    **{"half": "f2", "bfloat16": ml_dtypes.bfloat16, "int64": "i8", "long": "i8", "int32": "i4"},
    **{"int": "i4", "int16": "i2", "short": "i2", "int8": "i1", "uint8": "u1", "bool": "?"},
    **{"uint16": "u2", "uint32": "u4", "uint64": "u8", "complex64": "c8", "complex128": "c16"},
    **{"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2},
}
CORRUPT = (
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
    RuntimeError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_checkpoint(path: str | Path) -> Any:
    """Read what `torch.save` wrote.

    Tensors and parameters become NumPy arrays (bfloat16 and float8 through ml_dtypes), without a
    copy where they lie densely in their storage, so tensors that share a storage share memory and
    arrays may be read-only. Ordered dicts and `argparse.Namespace` become dicts, `torch.Size` a
    tuple, dtypes NumPy dtypes, devices and paths strings.

    Returns:
        The object that was saved, as a rule a nested dict.

    Raises:
        InputError: When the file is missing, damaged, no checkpoint, or mentions a name outside the
            allow-list; that name is given, and nothing of it was run.
    """
    path = require_file(path, "a PyTorch checkpoint")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _Plain().convert(_read_zip(path) if is_zip else _read_legacy(path, file))
    except CORRUPT as error:
        if isinstance(error, InputError):
            raise
        found = f"a damaged or other file ({type(error).__name__}: {error})"
        raise InputError(path, "a PyTorch checkpoint", found, "copy it again") from error


# Stand-ins: what the allowed names build. They hold data and do nothing.


class _Global(NamedTuple):
    name: str


class _Storage:
    def __init__(self, dtype: np.dtype, count: int, data: "bytes | _Storage | None", start: int = 0):
        self.dtype, self.count, self.data, self.start = dtype, count, data, start

    def array(self) -> Shaped[np.ndarray, " element"]:
        if isinstance(self.data, _Storage):  # a view into another storage, in old files
            return self.data.array()[self.start : self.start + self.count]
        if self.data is None:
            raise ValueError("a tensor's storage is not in the file")
        return np.frombuffer(self.data, self.dtype, self.count)


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype | None

    def array(self) -> Shaped[np.ndarray, "..."]:
        values = self.storage.array()
        if self.dtype is not None:  # an untyped storage: bytes, seen as the tensor's own type
            values = values.view(np.uint8)
            values = values[: values.size // self.dtype.itemsize * self.dtype.itemsize]
            values = values.view(self.dtype)
        if not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        size, stride = self.size, self.stride
        if len(size) != len(stride) or min((self.offset, *size, *stride)) < 0:
            raise ValueError(f"a tensor of size {size}, stride {stride}, offset {self.offset}")
        if 0 in size:
            return np.zeros(size, values.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= values.size:
            raise ValueError(f"a tensor reaches element {last} of {values.size}")
        steps = [step * values.itemsize for step in stride]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], size, steps, writeable=False)
        # An expanded tensor stays a view: copied, a few bytes could ask for any amount of memory.
        return view if view.size > values.size else np.ascontiguousarray(view).reshape(size)


class _Dict(dict):
    """A Namespace or OrderedDict; hashable and comparable by identity is not needed."""


class _NumpyDtype:
    def __init__(self, code: str):
        if not re.fullmatch(r"[<>=|]?[biufc]\d{1,2}", code):
            raise ValueError(f"an array of type {code!r}")
        self.dtype = np.dtype(code)


class _NumpyArray:
    def __init__(self):
        self.array = np.zeros(0)


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _bytes(value: object) -> bytes | bytearray:
    # Python 2 pickles hold raw bytes as text.
    return value.encode("latin-1") if isinstance(value, str) else _typed(value, bytes | bytearray)


def _typed(value: Any, kind: type | UnionType) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in the place of {kind}")
    return value


def _tensor(storage: Any, offset: int, size: Any, stride: Any, dtype: np.dtype | None) -> _Tensor:
    numbers = [tuple(int(n) for n in _typed(part, tuple)) for part in (size, stride)]
    return _Tensor(_typed(storage, _Storage), int(offset), numbers[0], numbers[1], dtype)


def _rebuild_v3(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> _Tensor:
    return _tensor(storage, offset, size, stride, _typed(rest[2], np.dtype))


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin-1")


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    return np.frombuffer(_bytes(raw), _typed(dtype, _NumpyDtype).dtype, 1)[0]


def _numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> Any:
    # How NumPy pickles in protocol 5; order K is C order with the axes permuted afterwards.
    shell = _NumpyArray()
    values = np.frombuffer(_bytes(raw), _typed(dtype, _NumpyDtype).dtype)
    shell.array = values.reshape(shape, order="F" if order == "F" else "C")
    if order == "K" and axes is not None:
        shell.array = shell.array.transpose(axes)
    return shell


def _reconstruct(cls: Any, base: Any, state: Any) -> Any:
    if cls != _Global("argparse Namespace") or state is not None:
        raise TypeError(f"an object of class {cls}")
    return _Dict()


def _mapping(*args: Any) -> _Dict:
    # Pickled empty, or in old files with a list of pairs.
    return _Dict(*[arg if isinstance(arg, dict) else [(k, v) for k, v in arg] for arg in args[:1]])


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": lambda *a: _tensor(*a[:4], dtype=None),
    "torch._utils _rebuild_tensor_v2": lambda *a: _tensor(*a[:4], dtype=None),
    "torch._utils _rebuild_tensor_v3": _rebuild_v3,
    "torch._utils _rebuild_parameter": lambda data, *_: _typed(data, _Tensor),
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: _typed(data, _Tensor),
    "torch Size": lambda items=(): tuple(items),
    "torch device": lambda *parts: ":".join(str(part) for part in parts),
    "torch.serialization _get_layout": _text,
    "collections OrderedDict": _mapping,
    "collections defaultdict": lambda _=None, *args: _mapping(*args),
    "argparse Namespace": lambda: _Dict(),
    "numpy dtype": lambda code, *_: _NumpyDtype(_text(code)),
    "numpy ndarray": lambda *_: _NumpyArray(),
    "numpy.core.multiarray _reconstruct": lambda *_: _NumpyArray(),
    "numpy.core.multiarray scalar": _numpy_scalar,
    "numpy.core.numeric _frombuffer": _numpy_frombuffer,
    "_codecs encode": _encode,
    "copyreg _reconstructor": _reconstruct,
    "builtins object": lambda: None,
    "builtins set": lambda items=(): set(items),
    "builtins frozenset": lambda items=(): frozenset(items),
    "builtins list": lambda items=(): list(items),
    "builtins dict": lambda items=(): dict(items),
    "builtins tuple": lambda items=(): tuple(items),
    "builtins int": lambda value=0: int(value),
    "builtins float": lambda value=0.0: float(value),
    "builtins complex": lambda real=0.0, imag=0.0: complex(real, imag),
    "builtins slice": lambda *args: slice(*args),
    **{
        f"pathlib{module} {kind}": lambda *parts: str(PurePosixPath(*map(_text, parts)))
        for module in ("", "._local")
        for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")
    },
}
_STORAGE_NAMES = {
    f"{module} {name}": np.dtype(code)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, code in STORAGES.items()
}
_DTYPE_NAMES = {f"torch {name}": np.dtype(code) for name, code in DTYPES.items()}
ALLOWED = frozenset(_REBUILD) | frozenset(_STORAGE_NAMES) | frozenset(_DTYPE_NAMES)
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED |= {f"numpy._core.{name}": f"numpy.core.{name}" for name in ("multiarray", "numeric")}


class _Interpreter:
    """Runs the opcodes of one pickle over stand-ins."""

    def __init__(self, path: Path, persistent: Callable[[Any], Any]):
        self.path, self.persistent = path, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO | io.BufferedReader) -> Any:
        for opcode, arg, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, arg)
        raise EOFError("the pickle has no end")

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(set())
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "POP":
                stack.pop() if stack else self.items()
            case "POP_MARK":
                self.items()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(self.top(count))]
            case "TUPLE":
                self.collect(tuple)
            case "LIST":
                self.collect(list)
            case "FROZENSET":
                self.collect(frozenset)
            case "DICT":
                self.collect(lambda items: dict(zip(items[::2], items[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS" | "SETITEM" | "SETITEMS":
                self.fill(name)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "GLOBAL":
                stack.append(self.named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self.top(2)
                stack[-2:] = [self.named(_typed(module, str), _typed(attribute, str))]
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, args = self.top(2)
                stack[-2:] = [self.build(function, _typed(args, tuple))]
            case "BUILD":
                state = stack.pop()
                stack[-1] = self.with_state(stack[-1], state)
            case _ if arg is not None and not name.startswith(("EXT", "INST", "PERSID")):
                stack.append(arg)
            case _:
                raise InputError(self.path, "the opcodes of a checkpoint", f"the opcode {name}")

    def top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the pickle takes more than it has put down")
        return self.stack[-count:]

    def items(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self.items()
        self.stack.append(kind(items))

    def fill(self, name: str) -> None:
        if name == "APPEND":
            items = [self.stack.pop()]
        elif name == "SETITEM":
            items = self.top(2)
            del self.stack[-2:]
        else:
            items = self.items()
        target = self.stack[-1]
        if name.startswith("SETITEM"):
            _typed(target, dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS":
            _typed(target, set).update(items)
        else:
            _typed(target, list).extend(items)

    def named(self, module: str, attribute: str) -> Any:
        name = f"{_RENAMED.get(module, module)} {attribute}"
        if name in _DTYPE_NAMES:
            return _DTYPE_NAMES[name]
        if name not in ALLOWED:
            raise InputError(
                self.path,
                "a checkpoint of tensors and plain values",
                f"the name {module}.{attribute} in its pickle, which was not run",
                "save the state dict alone, or convert it to safetensors where it was made",
            )
        return _Global(name)

    def build(self, function: Any, args: tuple[Any, ...]) -> Any:
        if not isinstance(function, _Global) or function.name not in _REBUILD:
            raise TypeError(f"{function} is called, which is not a function")
        return _REBUILD[function.name](*args)

    def with_state(self, target: Any, state: Any) -> Any:
        if isinstance(target, _NumpyDtype):
            # (version, byte order, ...): the rest describes fields, which no plain number has.
            order = _text(state[1])
            if order in ("<", ">"):
                target.dtype = target.dtype.newbyteorder(order)
        elif isinstance(target, _NumpyArray):
            _, shape, dtype, is_fortran, raw = state
            values = np.frombuffer(_bytes(raw), _typed(dtype, _NumpyDtype).dtype)
            target.array = values.reshape(shape, order="F" if is_fortran else "C")
        elif isinstance(target, _Dict):
            # A Namespace has its content here; an OrderedDict of tensors has `_metadata`, which
            # holds module versions and no weights.
            content = {} if state is None else dict(_typed(state, dict))
            content.pop("_metadata", None)
            target.update(content)
        elif not isinstance(target, _Tensor):
            raise TypeError(f"state for {type(target).__name__}")
        return target


class _Plain:
    """Turns stand-ins into what the caller sees; each object once, so that sharing is free."""

    def __init__(self):
        self.done: dict[int, tuple[Any, Any]] = {}
        self.open: set[int] = set()

    def convert(self, value: Any) -> Any:
        if value is None or isinstance(value, str | int | float | bytes):
            return value
        key = id(value)
        if key in self.done:
            return self.done[key][1]
        if key in self.open:
            raise ValueError("an object that contains itself")
        self.open.add(key)
        result = self.fresh(value)
        self.open.discard(key)
        # The original is kept beside the result, so that its id is not given to another object.
        self.done[key] = (value, result)
        return result

    def fresh(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            return value.array()
        if isinstance(value, _Storage):
            return value.array()
        if isinstance(value, _NumpyArray):
            return value.array
        if isinstance(value, _NumpyDtype):
            return value.dtype
        if isinstance(value, _Global):
            return value.name.replace(" ", ".")
        if isinstance(value, dict):
            return {self.convert(key): self.convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.convert(item) for item in value)
        return value


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(pickles) != 1:
            found = "a zip file without data.pkl"
            raise InputError(path, "a PyTorch checkpoint", found, "check the path")
        root = pickles[0][: -len("data.pkl")]
        if f"{root}constants.pkl" in names:
            found = "a TorchScript program"
            raise InputError(path, "a checkpoint of tensors", found, "save its state dict instead")
        is_big = f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big"
        order = ">" if is_big else "<"
        storages: dict[str, _Storage] = {}

        def persistent(reference: Any) -> _Storage:
            kind, storage_type, key, _, count = _typed(reference, tuple)[:5]
            if kind != "storage" or getattr(storage_type, "name", "") not in _STORAGE_NAMES:
                raise ValueError(f"a reference to {kind} {storage_type}")
            if order == ">" and storage_type.name.endswith("UntypedStorage"):
                raise ValueError("an untyped storage of a big-endian machine")
            dtype = _STORAGE_NAMES[storage_type.name].newbyteorder(order)
            if str(key) not in storages:
                info = archive.getinfo(f"{root}data/{key}")
                if info.file_size != int(count) * dtype.itemsize:
                    raise ValueError(f"{info.file_size} bytes for {count} of {dtype}")
                storages[str(key)] = _Storage(dtype, int(count), archive.read(info))
            if storages[str(key)].dtype != dtype:
                raise ValueError(f"two types for the storage {key}")
            return storages[str(key)]

        return _Interpreter(path, persistent).run(io.BytesIO(archive.read(pickles[0])))


def _read_legacy(path: Path, file: io.BytesIO | io.BufferedReader) -> Any:
    if file.read(1) != b"\x80":
        found = "something that is not a checkpoint"
        raise InputError(path, "a PyTorch checkpoint", found, "check the path")
    file.seek(0)
    storages: dict[str, _Storage] = {}
    views: dict[str, _Storage] = {}
    order: Literal["<", ">"] = "<"

    def persistent(reference: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = _typed(reference, tuple)
        if kind != "storage" or getattr(storage_type, "name", "") not in _STORAGE_NAMES:
            raise ValueError(f"a reference to {kind} {storage_type}")
        dtype = _STORAGE_NAMES[storage_type.name].newbyteorder(order)
        root = storages.setdefault(str(key), _Storage(dtype, int(count), None))
        if not view or view[0] is None:
            return root
        name, start, length = view[0]
        return views.setdefault(str(name), _Storage(dtype, int(length), root, int(start)))

    def plain(reference: Any) -> Any:
        raise ValueError(f"a reference to {reference} before the data")

    if _Interpreter(path, plain).run(file) != LEGACY_MAGIC:
        found = "a pickle of another kind"
        raise InputError(path, "a PyTorch checkpoint", found, "save it with torch.save")
    _Interpreter(path, plain).run(file)  # the protocol version, 1001 ever since
    system = _typed(_Interpreter(path, plain).run(file), dict)
    order = "<" if system.get("little_endian", sys.byteorder == "little") else ">"
    content = _Interpreter(path, persistent).run(file)
    for key in _typed(_Interpreter(path, plain).run(file), list):
        # Written in the order of the machine, the count always little endian.
        count = int.from_bytes(file.read(8), "little")
        storage = storages[str(key)]
        if count != storage.count:
            raise ValueError(f"{count} elements for {storage.count}")
        storage.data = file.read(count * storage.dtype.itemsize)
        if len(storage.data) != count * storage.dtype.itemsize:
            raise EOFError("the file ends before its last tensor")
    return content

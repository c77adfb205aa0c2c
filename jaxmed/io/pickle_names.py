"""What the names in a pickled checkpoint stand for: our data for the few that tensors need, placeholders for others.

Nothing is imported or called on behalf of a file. Names of packages (a training script's own classes, configurations,
schedulers) become placeholders, so that the tensors beside them are found. Names of Python's own library that are no
data (os.system, builtins.eval) are refused: no checkpoint needs them, and a file with them is better not trusted.

Source: torch/_utils.py and torch/_weights_only_unpickler.py of PyTorch (rebuild functions and names allowed there).
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import PurePosixPath
from types import UnionType
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

STORAGES = {
    **{"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": ml_dtypes.bfloat16},
    **{"LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1"},
    **{"BoolStorage": "?", "ComplexFloatStorage": "c8", "ComplexDoubleStorage": "c16", "UntypedStorage": "u1"},
    **{"QInt8Storage": "i1", "QUInt8Storage": "u1", "QInt32Storage": "i4"},
}
DTYPES = {
    **{"float64": "f8", "double": "f8", "float32": "f4", "float": "f4", "float16": "f2"},
    **{"half": "f2", "bfloat16": ml_dtypes.bfloat16, "int64": "i8", "long": "i8", "int32": "i4"},
    **{"int": "i4", "int16": "i2", "short": "i2", "int8": "i1", "uint8": "u1", "bool": "?"},
    **{"uint16": "u2", "uint32": "u4", "uint64": "u8", "complex64": "c8", "complex128": "c16"},
    **{"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2},
}
# Of Python's own library: modules that hold nothing but kinds of data, and single names of others.
DATA_MODULES = frozenset(
    ("collections", "argparse", "datetime", "decimal", "fractions", "uuid", "enum", "typing", "pathlib")
    + ("pathlib._local",)
)
DATA_NAMES = frozenset(
    ("types SimpleNamespace", "functools partial", "random Random", "re _compile", "copyreg __newobj__")
    + ("builtins bool", "builtins xrange", "builtins unicode", "builtins long", "builtins range", "builtins slice")
    + ("builtins str", "builtins type", "builtins Ellipsis", "builtins NoneType")
)
MOST_AXES = 64
LONGEST_TEXT = 4096  # of paths and devices, whose parts could double at every step


class Refused(ValueError):
    """A name that no checkpoint of tensors needs; the argument is the name."""


class Global:
    """A name that was mentioned, "module attribute"; it becomes a string with a dot."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name.replace(" ", ".")


class Unread:
    """An object of a class that is not read: what the file says of it, inert. Hashed and compared by identity.

    Attributes:
        name: Name of its class or maker, such as "__main__.Config".
        args: What it would have been made from.
        items: What was put into it, where it is a kind of dict, list or set.
        state: Its attributes.
    """

    __slots__ = ("name", "args", "items", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()):
        self.name, self.args = name, args
        self.items: dict[Any, Any] | list[Any] | set[Any] | None = None
        self.state: Any = {}

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class Storage:
    """The memory of tensors: where its bytes are, read when they are asked for."""

    def __init__(self, dtype: np.dtype, count: int, root: "Storage | None" = None, start: int = 0):
        self.dtype, self.count, self.root, self.start = dtype, count, root, start
        self.load: Callable[[], bytes] | None = None
        self.data: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.count * self.dtype.itemsize

    def array(self) -> Shaped[np.ndarray, " element"]:
        """Return its elements, read once."""
        if self.root is not None:  # a view into another storage, in old files
            return self.root.array()[self.start : self.start + self.count]
        if self.data is None:
            if self.load is None:
                raise ValueError("a tensor's storage is not in the file")
            self.data = self.load()
        return np.frombuffer(self.data, self.dtype, self.count) if self.count else np.zeros(0, self.dtype)


class Tensor:
    """A tensor: its place in a storage. Hashed and compared by identity."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: Any):
        self.storage, self.offset, self.shape, self.stride, self.dtype = storage, offset, size, stride, dtype

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, were each of them stored."""
        return math.prod(self.shape) * (self.dtype or self.storage.dtype).itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def array(self, spend: Callable[[int], None]) -> Shaped[np.ndarray, "..."]:
        """Return the values; `spend` is told the bytes that had to be copied."""
        values = self.storage.array()
        if self.dtype is not None:  # an untyped storage: bytes, seen as the tensor's own type
            values = values.view(np.uint8)
            values = values[: values.size // self.dtype.itemsize * self.dtype.itemsize]
            values = values.view(self.dtype)
        if not values.dtype.isnative:
            spend(values.nbytes)
            values = values.astype(values.dtype.newbyteorder("="))
        size, stride = self.shape, self.stride
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
        if view.size > values.size:
            return view
        if not view.flags.c_contiguous:
            spend(view.nbytes)
        return np.ascontiguousarray(view).reshape(size)


class Attributes(dict):
    """A Namespace or OrderedDict: a dict whose attributes are entries."""


class NumpyDtype:
    """A NumPy type; `dtype` is None of those that are not read (objects, records, dates)."""

    def __init__(self, code: str):
        is_plain = re.fullmatch(r"[<>=|]?([biufc]\d{1,2}|[US]\d{1,4})", code)
        self.dtype: Any = np.dtype(code) if is_plain else None


class NumpyArray:
    """A NumPy array, filled by its state; None where its type is not read."""

    def __init__(self):
        self.array: Any = np.zeros(0)


def typed(value: Any, kind: type | UnionType) -> Any:
    """Return a value of a kind.

    Raises:
        TypeError: It is of another; the message holds no part of the value, whose text may be endless.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in the place of {kind}")
    return value


def numbers(values: Any) -> tuple[int, ...]:
    """Return a shape or its strides."""
    if len(typed(values, tuple | list)) > MOST_AXES:
        raise ValueError(f"{len(values)} axes")
    return tuple(int(typed(n, int | np.integer)) for n in values)


def as_bytes(value: Any) -> bytes | bytearray:
    """Return raw bytes, which Python 2 pickles hold as text."""
    return value.encode("latin-1") if isinstance(value, str) else typed(value, bytes | bytearray)


def as_key(value: Any) -> Any:
    """Return a value that may be a key of a dict or a member of a set.

    Numbers beyond the modulus of Python's hash and tuples that nest could be made to collide, all of them.
    """
    if isinstance(value, tuple) and len(value) <= 4:
        for item in value:
            _as_plain_key(item)
        return value
    return _as_plain_key(value)


def named(module: str, attribute: str) -> Any:
    """Return what a name stands for.

    Raises:
        Refused: Python's own library has it, and it is no data.
    """
    module = _RENAMED.get(module, module)
    name = f"{module} {attribute}"
    if name in _DTYPE_NAMES:
        return _DTYPE_NAMES[name]
    root = module.partition(".")[0]
    is_python = root in sys.stdlib_module_names or root in ("__builtin__", "nt", "posix")
    if is_python and not (name in REBUILD or name in DATA_NAMES or module in DATA_MODULES):
        raise Refused(f"{module}.{attribute}")
    return Global(name)


def build(function: Any, args: tuple[Any, ...]) -> Any:
    """Return what a call of a name stands for."""
    if isinstance(function, Unread):  # a method of something that is not read
        return Unread(function.name, args)
    if not isinstance(function, Global):
        raise TypeError(f"a {type(function).__name__} is called, which is no function")
    maker = REBUILD.get(function.name)
    return Unread(str(function), args) if maker is None else maker(*args)


def with_state(target: Any, state: Any) -> Any:
    """Give an object its attributes; return it."""
    if isinstance(target, NumpyDtype):
        # (version, byte order, ...): the rest describes fields, which no plain number has.
        order = _text(state[1])
        if order in ("<", ">") and target.dtype is not None:
            target.dtype = target.dtype.newbyteorder(order)
    elif isinstance(target, NumpyArray):
        _, shape, dtype, is_fortran, raw = state
        target.array = _numpy_values(raw, dtype, shape, "F" if is_fortran else "C")
    elif isinstance(target, Attributes):
        # A Namespace has its content here; an OrderedDict of tensors has `_metadata`, which holds module versions and
        # no weights.
        content = {} if state is None else dict(typed(state, dict))
        content.pop("_metadata", None)
        target.update(content)
    elif isinstance(target, Unread):
        target.state = state
    elif not isinstance(target, Tensor):
        raise TypeError(f"state for {type(target).__name__}")
    return target


def _as_plain_key(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= sys.hash_info.modulus:
        raise ValueError("a key beyond 2^61")
    plain = str | bytes | int | float | bool | np.integer | np.floating | np.str_ | np.dtype | None
    return typed(value, plain | Unread | Global | Tensor)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else typed(value, str)


def _joined(parts: tuple[Any, ...], join: Callable[[list[str]], str]) -> str:
    texts = [_text(part) for part in parts]
    if sum(map(len, texts)) > LONGEST_TEXT:
        raise ValueError("a path or device of endless length")
    return join(texts)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> Any:
    if isinstance(storage, Unread):  # of a type that is not read
        return Unread(f"torch._utils._rebuild_tensor of {storage.name}")
    return Tensor(typed(storage, Storage), int(typed(offset, int)), numbers(size), numbers(stride), dtype)


def _rebuild_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    return _tensor(storage, offset, size, stride, typed(rest[2], np.dtype))


def _rebuild_from_type(function: Any, _: Any, args: Any, *__: Any) -> Any:
    # A tensor with attributes, or of a subclass.
    return build(function, typed(args, tuple))


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes of another encoding than latin-1")
    return typed(text, str).encode("latin-1")


def _numpy_values(raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
    kind = typed(dtype, NumpyDtype).dtype
    if kind is None:
        return None
    data = as_bytes(raw)
    values = np.frombuffer(data, kind) if len(data) else np.zeros(0, kind)
    return values.reshape(numbers(shape), order="F" if order == "F" else "C")


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    kind = typed(dtype, NumpyDtype).dtype
    return Unread("numpy scalar") if kind is None else np.frombuffer(as_bytes(raw), kind, 1)[0]


def _numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> NumpyArray:
    # How NumPy pickles in protocol 5; order K is C order with the axes permuted afterwards.
    shell = NumpyArray()
    shell.array = _numpy_values(raw, dtype, shape, order)
    if order == "K" and axes is not None and shell.array is not None:
        shell.array = shell.array.transpose(numbers(axes))
    return shell


def _reconstruct(cls: Any, base: Any, state: Any) -> Any:
    # Protocols 0 and 1: an object, or a subclass of a kind of data with its content.
    name = typed(cls, Global).name
    if name == "argparse Namespace" and state is None:
        return Attributes()
    if name in REBUILD or name.startswith("builtins "):
        raise TypeError(f"an object of class {cls}")
    made = Unread(str(cls))
    made.items = state if isinstance(state, dict | list) else None
    return made


def _attribute(owner: Any, name: Any) -> Unread:
    # Members of enumerations, as Python 3.11 pickles them.
    if not isinstance(owner, Global | Unread) or getattr(owner, "name", "") in REBUILD:
        raise Refused("builtins.getattr")
    return Unread(f"{owner if isinstance(owner, Global) else owner.name}.{typed(name, str)}")


def _mapping(*args: Any) -> Attributes:
    # Pickled empty, with a dict (Counter), or in old files with a list of pairs.
    if not args or isinstance(args[0], dict):
        return Attributes(*args[:1])
    return Attributes((as_key(k), v) for k, v in typed(args[0], list | tuple))


def _number(kind: type, value: Any = 0) -> Any:
    return kind(typed(value, int | float | np.number | str))


REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": lambda *a: _tensor(*a[:4]),
    "torch._utils _rebuild_tensor_v2": lambda *a: _tensor(*a[:4]),
    "torch._utils _rebuild_tensor_v3": _rebuild_v3,
    "torch._utils _rebuild_parameter": lambda data, *_: typed(data, Tensor | Unread),
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: typed(data, Tensor | Unread),
    "torch._tensor _rebuild_from_type": _rebuild_from_type,
    "torch._tensor _rebuild_from_type_v2": _rebuild_from_type,
    "torch.nn.parameter Parameter": lambda data=None, *_: typed(data, Tensor),
    "torch Size": lambda items=(): tuple(typed(items, tuple | list)),
    "torch device": lambda kind, *index: _joined((kind, *(str(typed(number, int)) for number in index)), ":".join),
    "torch.serialization _get_layout": _text,
    "collections OrderedDict": _mapping,
    "collections Counter": _mapping,
    "collections defaultdict": lambda _=None, *args: _mapping(*args),
    "argparse Namespace": lambda: Attributes(),
    "types SimpleNamespace": lambda: Attributes(),
    "numpy dtype": lambda code, *_: NumpyDtype(_text(code)),
    "numpy ndarray": lambda *_: NumpyArray(),
    "numpy.core.multiarray _reconstruct": lambda *_: NumpyArray(),
    "numpy.core.multiarray scalar": _numpy_scalar,
    "numpy.core.numeric _frombuffer": _numpy_frombuffer,
    "_codecs encode": _encode,
    "copyreg _reconstructor": _reconstruct,
    "copyreg __newobj__": lambda cls, *args: build(cls, args),
    "builtins getattr": _attribute,
    "builtins object": lambda: None,
    "builtins set": lambda items=(): {as_key(item) for item in typed(items, list | tuple | set)},
    "builtins frozenset": lambda items=(): frozenset(as_key(item) for item in typed(items, list | tuple | set)),
    "builtins list": lambda items=(): list(typed(items, list | tuple)),
    "builtins dict": lambda items=(): dict(_mapping(items)),
    "builtins tuple": lambda items=(): tuple(typed(items, list | tuple)),
    "builtins bytearray": lambda data=b"", *_: bytearray(as_bytes(data)),
    "builtins bytes": lambda data=b"", *_: bytes(as_bytes(data)),  # empty, before protocol 3
    "builtins int": lambda value=0: _number(int, value),
    "builtins float": lambda value=0.0: _number(float, value),
    "builtins complex": lambda real=0.0, imag=0.0: complex(_number(float, real), _number(float, imag)),
    **{
        f"pathlib{module} {kind}": lambda *parts: _joined(parts, lambda texts: str(PurePosixPath(*texts)))
        for module in ("", "._local")
        for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
STORAGE_NAMES = {
    f"{module} {name}": np.dtype(code)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, code in STORAGES.items()
}
_DTYPE_NAMES = {f"torch {name}": np.dtype(code) for name, code in DTYPES.items()}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED |= {f"numpy._core.{name}": f"numpy.core.{name}" for name in ("multiarray", "numeric")}

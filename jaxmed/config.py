"""Frozen dataclasses to and from JSON.

A configuration is a nested frozen dataclass of numbers, words, paths, tuples, `Literal`s and further dataclasses; a
stage's summary may hold dictionaries too. The JSON form is what a run folder keeps; reading it back checks every name
and type and says what is wrong in one line.

Values are checked where a record is made, by the command line, config.json or Python alike: `@checked` under the
dataclass decorator holds every float finite, every number within the bounds that its type names, every `Literal` to its
words, and ranges in order.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jaxmed.errors import InputError, nearest
from jaxmed.files import expand_home

Config = TypeVar("Config")
Class = TypeVar("Class", bound=type)
SHOWN = 80  # characters of a wrong value that a message repeats


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Which numbers a field takes; stands in its type, as `Annotated[float, Bounds(0, 1)]`.

    Attributes:
        low: The smallest.
        high: The largest; infinite values are taken where it is infinite by intent, see `Unbounded`.
        above: Whether `low` itself is left out.
        below: Whether `high` itself is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def takes(self, value: float) -> bool:
        """Tell whether a number lies within."""
        is_low_enough = value < self.high if self.below else value <= self.high
        return bool(is_low_enough and (value > self.low if self.above else value >= self.low))  # also of NumPy's

    def words(self, kind: str) -> str:
        """Say what is expected, `kind` being "a number" or "a whole number"."""
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:,.10g}"
        if self.high == math.inf:
            return f"{kind}{low}{'' if self.above or not low else ' on'}"
        joint = " and below" if self.below else " and at most" if self.above or not low else " to"
        return f"{kind}{low}{joint} {self.high:,.10g}"


# What the types of fields say. The largest numbers are those of float32 and int32, in which they are computed with.
FLOATS, WHOLE_NUMBERS = Bounds(-3e38, 3e38), Bounds(-(2**31) + 1, 2**31 - 1)
Unbounded = Annotated[float, Bounds()]  # infinity too
Positive = Annotated[float, Bounds(0, 3e38, above=True)]
NonNegative = Annotated[float, Bounds(0, 3e38)]
Share = Annotated[float, Bounds(0, 1)]
Fraction = Annotated[float, Bounds(0, 1, above=True)]
Probability = Annotated[float, Bounds(0, 1, above=True, below=True)]
Decay = Annotated[float, Bounds(0, 1, below=True)]
Epochs = Annotated[float, Bounds(0, 1e6)]
Count = Annotated[int, Bounds(1, 2**31 - 1)]
Whole = Annotated[int, Bounds(0, 2**31 - 1)]
Axis = Annotated[int, Bounds(0, 2)]  # of space
Size = Annotated[int, Bounds(1, 65_536)]  # of an axis, a layer, a batch
Length = Annotated[int, Bounds(0, 65_536)]  # the same, where 0 means none or all
Regions = Annotated[int, Bounds(2, 2_000)]
Spread = Annotated[float, Bounds(0, 100)]  # a blur in voxels, whose kernel is as large
Workers = Annotated[int, Bounds(0, 1024)]
Threads = Annotated[int, Bounds(1, 1024)]
Number = Annotated[int, Bounds(0, 1_000_000)]  # of things to generate
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # beyond it jax would drop digits
ASCENDING = "ascending"
"""In the type of a pair: the first number is not above the second."""
Range = Annotated[tuple[NonNegative, NonNegative], ASCENDING]
PositiveRange = Annotated[tuple[Positive, Positive], ASCENDING]
ShareRange = Annotated[tuple[Share, Share], ASCENDING]
FractionRange = Annotated[tuple[Fraction, Fraction], ASCENDING]


def checked(kind: Class) -> Class:
    """Check the values of every instance, before the class's own `__post_init__`.

    Raises:
        InputError: A float is not finite, a number out of bounds, a word unknown or a range upside down; the message
            names field, value and expectation.
    """
    own = kind.__dict__.get("__post_init__")

    def check(self: Any) -> None:
        for name, hint in _hints(type(self)).items():
            _check_value(hint, getattr(self, name), name)
        if own is not None:
            own(self)
        elif hasattr(super(kind, self), "__post_init__"):
            super(kind, self).__post_init__()  # pyright: ignore[reportAttributeAccessIssue]

    kind.__post_init__ = check
    return kind


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check_value(hint: Any, value: Any, field: str, bounds: Bounds | None = None) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        named = next((one for one in arguments[1:] if isinstance(one, Bounds)), bounds)
        _check_value(arguments[0], value, field, named)
        if ASCENDING in arguments[1:] and isinstance(value, tuple) and value[0] > value[1]:
            raise InputError(field, "a range in order", _shown(value))
    elif origin is typing.Literal and value not in arguments:
        raise InputError(field, "one of " + ", ".join(map(str, arguments)), _shown(value))
    elif origin is tuple and isinstance(value, tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        for kind, item in zip(kinds, value, strict=False):
            _check_value(kind, item, field, bounds)
    elif origin in (typing.Union, types.UnionType):
        for kind in arguments:
            is_tuple = typing.get_origin(kind) is tuple
            if is_tuple == isinstance(value, tuple) and typing.get_origin(kind) is not typing.Literal:
                _check_value(kind, value, field, bounds)
    elif hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if hint is int and isinstance(value, float):
            return
        allowed = bounds or (FLOATS if hint is float else WHOLE_NUMBERS)
        if not allowed.takes(value):
            expected = allowed.words("a number" if hint is float else "a whole number")
            expected = "a finite number" if allowed is FLOATS else expected
            raise InputError(field, expected, _shown(value))


def to_record(config: object) -> Any:
    """Return the JSON form of a configuration: paths as strings, tuples as lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_record(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, tuple | list):
        return [to_record(item) for item in config]
    if isinstance(config, dict):
        return {name: to_record(item) for name, item in config.items()}
    return config


def from_record(kind: type[Config] | types.UnionType, record: object, where: str) -> Config:
    """Build a configuration from its JSON form.

    Args:
        kind: The dataclass, or a union of dataclasses, of which the first takes it that has its names.
        record: What `json.loads` returned.
        where: The file, for messages.

    Raises:
        InputError: A name is unknown, a value has another type, or the dataclass refuses it.
    """
    return _parse(kind, record, where, "")


def resolve_paths(config: Config) -> Config:
    """Make every path absolute, so that a stored configuration runs from any folder."""

    def resolve(value: Any) -> Any:
        if isinstance(value, Path):
            return expand_home(value).absolute()
        if isinstance(value, tuple):
            return tuple(resolve(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {
                field.name: resolve(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init
            }
            return dataclasses.replace(value, **changes)
        return value

    return resolve(config)


def walk(record: Any) -> Iterator[Any]:
    """Yield a configuration and every record in it."""
    if dataclasses.is_dataclass(record):
        yield record
        for field in dataclasses.fields(record):
            yield from walk(getattr(record, field.name))


def _parse(kind: Any, value: Any, where: str, field: str) -> Any:
    def wrong(expected: str) -> InputError:
        return InputError(f"{where}, {field}" if field else where, expected, _short(json.dumps(value)))

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _parse(arguments[0], value, where, field)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(arguments, value, where, field)
    if origin is typing.Literal:
        if value not in arguments:
            raise wrong("one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where, field, wrong)
    if origin is dict and isinstance(value, dict):
        return {name: _parse(arguments[1], item, where, f"{field}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where, field, wrong)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) > FLOATS.high:
            raise wrong("a finite number")
        return float(value)
    if kind in (int, str, bool, type(None)) and type(value) is kind:
        return value
    raise wrong(f"a value of type {getattr(kind, '__name__', kind)}")


def _parse_union(kinds, value, where, field):
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _parse(kind, value, where, field)
        except InputError:
            continue
    return _parse(kinds[-1], value, where, field)


def _parse_tuple(kinds, value, where, field, wrong):
    if not isinstance(value, list):
        raise wrong("a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise wrong(f"a list of {len(kinds)} values")
    return tuple(
        _parse(kind, item, where, f"{field}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _parse_dataclass(kind, value, where, field, wrong):
    if not isinstance(value, dict):
        raise wrong("an object")
    hints = _hints(kind)
    names = list(hints)
    for name in value:
        if name not in names:
            path = f"{field}.{name}" if field else name
            raise InputError(f"{where}, {path}", "a known field", "an unknown one", nearest(name, names))
    children = {
        name: _parse(hints[name], item, where, f"{field}.{name}" if field else name) for name, item in value.items()
    }
    try:
        return kind(**children)
    except TypeError as error:
        raise wrong("an object with every required field") from error
    except InputError as error:
        place = f"{field}.{error.where}" if field else error.where
        raise InputError(f"{where}, {place}", error.expected, error.found, error.advice) from error
    except ValueError as error:
        raise InputError(f"{where}, {field}" if field else where, "valid values", str(error)) from error


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    try:
        return _short(str(value))
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a number of thousands of digits"


def _short(text: str, length: int = SHOWN) -> str:
    return text if len(text) <= length else f"{text[:length]}..."

"""Frozen dataclasses to and from JSON.

A configuration is a nested frozen dataclass of numbers, words, paths, tuples, `Literal`s and further dataclasses. Its
JSON form is what a run folder keeps; reading it back checks every name and type and says what is wrong in one line.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from jaxmed.errors import InputError, nearest
from jaxmed.files import expand_home, require_file

Config = TypeVar("Config")


def to_record(config: object) -> Any:
    """Return the JSON form of a configuration: paths as strings, tuples as lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_record(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, tuple | list):
        return [to_record(item) for item in config]
    return config


def from_record(kind: type[Config], record: object, where: str) -> Config:
    """Build a configuration from its JSON form.

    Args:
        kind: The dataclass.
        record: What `json.loads` returned.
        where: The file, for messages.

    Raises:
        InputError: A name is unknown, a value has another type, or the dataclass refuses it.
    """
    return _parse(kind, record, where, "")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, saying what is wrong with a file that is none."""
    path = require_file(path, "a JSON file", kinds=("json",))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(path, "a JSON object", f"text that is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(path, "a JSON object", f"a {type(record).__name__}")
    return record


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


def _parse(kind: Any, value: Any, where: str, field: str) -> Any:
    def wrong(expected: str) -> InputError:
        return InputError(f"{where}, {field}" if field else where, expected, json.dumps(value))

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
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where, field, wrong)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
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
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [item.name for item in dataclasses.fields(kind)]
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
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}, {field}" if field else where, "valid values", str(error)) from error

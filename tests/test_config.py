"""Configurations to JSON and back."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from jaxmed.config import from_record, resolve_paths, to_record
from jaxmed.errors import InputError, nearest
from jaxmed.files import read_record

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate: expected a positive number, found {self.rate:g}")


@dataclasses.dataclass(frozen=True)
class Outer:
    path: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    box: tuple[int, int, int] | None = None
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize("config", [Outer(), Outer(Path("x/y"), (3,), (1, 2, 3), True, Inner(2.0, "b"))])
def test_a_configuration_comes_back_equal(config):
    assert from_record(Outer, to_record(config), "config.json") == config


def test_whole_numbers_are_read_as_floats_where_a_float_stands():
    config = from_record(Outer, {"inner": {"rate": 2}}, "f")
    assert config.inner.rate == 2.0 and isinstance(config.inner.rate, float)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"pth": "x"}, "f, pth: expected a known field, found an unknown one; did you mean 'path'?"),
        ({"inner": {"rat": 1}}, "f, inner.rat: expected a known field"),
        ({"inner": {"kind": "c"}}, 'f, inner.kind: expected one of a, b, found "c"'),
        ({"inner": {"rate": "fast"}}, 'f, inner.rate: expected a value of type float, found "fast"'),
        ({"inner": {"rate": -1}}, "rate: expected a positive number, found -1"),
        ({"on": 1}, "f, on: expected a value of type bool, found 1"),
        ({"sizes": [1, 2.5]}, "f, sizes[1]: expected a value of type int, found 2.5"),
        ({"box": [1, 2]}, "f, box: expected a list of 3 values, found [1, 2]"),
        ([], "f: expected an object, found []"),
    ],
)
def test_a_wrong_record_is_refused_by_field(record, message):
    with pytest.raises(InputError) as caught:
        from_record(Outer, record, "f")
    assert message in str(caught.value)


def test_paths_become_absolute_everywhere():
    assert resolve_paths(Outer(path=Path("a"))).path == Path.cwd() / "a"


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="text that is not JSON"):
        read_record(tmp_path / "config.json")


def test_the_nearest_word_is_suggested():
    assert nearest("nodi", ["noddi", "cocolit"]) == "did you mean 'noddi'?"

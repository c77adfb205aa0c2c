"""The options of all stages: their numbers, their names, and what messages say of them."""

import dataclasses
import functools
import math
import re
import types
import typing
from pathlib import Path

import pytest

from jaxmed.cli import STAGES, SYSTEMS, load_stage, main
from jaxmed.config import from_record
from jaxmed.errors import InputError
from jaxmed.files import read_record
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.train.run_folder import RunOptions

pytestmark = pytest.mark.core

# Fields that take numbers below 0, and why.
NEGATIVE = {
    "window": "HU",
    "range": "ends of a network's range",
    "padding": "a network's lower end",
    "fill": "an intensity",
    "mean": "an intensity",
    "early": "logits of a gate",
    "late": "logits of a gate",
    "intensity_shift": "a summand",
    "limits": "intensities",
}


@functools.cache
def records():
    """Every record that a stage's configuration is made of, by its class: stage, place and an instance."""
    found = {}

    def walk(record, stage, place):
        found.setdefault(type(record), (stage, place, record))
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if dataclasses.is_dataclass(value):
                walk(value, stage, f"{place}.{field.name}".strip("."))

    for stage in STAGES:
        walk(load_stage(*stage.split()).smoke(), stage, "")
    return found


def kinds_of(hint):
    """Return the numbers that a type allows: int, float."""
    if hint in (int, float):
        return {hint}
    if typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType, tuple):
        parts = typing.get_args(hint)
        return set().union(*map(kinds_of, parts[:1] if typing.get_origin(hint) is typing.Annotated else parts))
    return set()


def numbers():
    for kind, (stage, _, record) in records().items():
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            for number in kinds_of(hint) if name in {field.name for field in dataclasses.fields(kind)} else ():
                yield pytest.param(kind, record, name, number, id=f"{stage} {kind.__name__}.{name} {number.__name__}")


def put(record, name, value, number):
    """Build a record anew with one number changed; the first of several, or of the kind in the first group of some."""
    old, hint = getattr(record, name), typing.get_type_hints(type(record), include_extras=True)[name]
    if old is None and (pair := _pair_of(hint)):
        old = (0.0,) * pair
    group = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    if typing.get_origin(group) is tuple:
        value = tuple(value if number in kinds_of(part) else 1 for part in typing.get_args(group))
    return dataclasses.replace(record, **{name: (value, *old[1:]) if isinstance(old, tuple) else value})


def _pair_of(hint):
    """Return how many numbers a field takes that is None or a tuple."""
    found = [part for part in typing.get_args(hint) if typing.get_origin(part) is tuple]
    return len(typing.get_args(found[0])) if found else 0


@pytest.mark.parametrize(("kind", "record", "name", "number"), list(numbers()))
def test_every_number_of_every_stage_is_within_bounds_or_refused_by_name(kind, record, name, number):
    values = [-1, 0, 10**12, 10**400, -(10**12)] if number is int else [-1.0, 0.0, 10**400, -1e30]
    values += [math.nan, math.inf, -math.inf] if number is float else []
    for value in values:
        try:
            put(record, name, value, number)
        except ValueError as error:
            said = str(error)
            assert name in said and "expected" in said and "found" in said and "\n" not in said and len(said) < 400
            continue
        assert abs(value) < 1e300, (name, value)
        assert value >= 0 or name in NEGATIVE, (kind, name, value)
        assert number is float or abs(value) < 2**32, (kind, name, value)


def test_the_walk_finds_what_there_is():
    assert len(records()) > 60 and len(list(numbers())) > 250


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("noddi fit --sigma inf", "sigma: expected a number above 0 and at most"),
        ("noddi fit --sigma nan", "sigma: expected a number above 0 and at most"),
        ("tangerine pretrain --epochs nan", "epochs: expected a number from 0 to 1,000,000, found nan"),
        ("tangerine pretrain --epochs 1e300", "epochs: expected a number from 0 to 1,000,000, found 1e+300"),
        ("tangerine pretrain --model.encoder.width 0", "width: expected a whole number from 1 to 65,536, found 0"),
        ("selfplay adapt --adapt.rate nan", "adapt.rate: expected a number above 0"),
        ("igndmoe fit --fit.norm-weight nan", "fit.norm_weight: expected a number from 0"),
        ("igndmoe fit --data.synthetic-regions 1", "synthetic_regions: expected a whole number from 2"),
        ("noddi fit --seed -1", "seed: expected a whole number from 0 to 4,294,967,295, found -1"),
        (f"selfplay think --seed {2**63}", "seed: expected a whole number from 0 to 4,294,967,295, found 92233720368"),
        ("noddi fit --synthetic-shape 100000 100000 1", "synthetic_shape: expected a whole number from 1 to 65,536"),
        ("noddi fit --synthetic-shape 60000 60000 9", "synthetic_shape: expected sizes that make at most 5,000,000"),
        ("noddi fit --seed " + "9" * 5000, "seed: expected"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_one_line_of_the_command(words, message, tmp_path, capsys):
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("jaxmed: ") and said.count("\n") == 1 and len(said) < 400
    assert not (tmp_path / "run").exists()


def test_a_user_that_is_not_there_is_one_line(capsys):
    assert main(["noddi", "fit", "--out", "~nosuchuser/r"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxmed: ") and said.count("\n") == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_are_checked_in_python_too(value):
    from jaxmed.systems.noddi.protocol import FitConfig

    with pytest.raises(InputError, match="damping: expected a number above 0"):
        FitConfig(damping=value)
    with pytest.raises(InputError, match="damping: expected a number above 0"):
        dataclasses.replace(FitConfig(), damping=value)


def stored(text):
    return '{"system": "noddi", "stage": "fit", "config": ' + text + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stored("[" * 200_000 + "]" * 200_000), "nested too deeply"),
        (stored('{"x":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
        (stored('{"seed": ' + "9" * 5000 + "}"), "expected a JSON object"),
        (stored('{"sigma": 1e999}'), "1e999 is too large"),
        (stored('{"sigma": NaN}'), "NaN is no number"),
        (stored('{"sigma": -Infinity}'), "-Infinity is no number"),
        (stored('{"seed": 1, "seed": 2}'), "the name 'seed' twice"),
        (stored('{"scan": {"seed": ' + "9" * 400 + "}}"), "seed: expected a whole number"),
        (stored('{"sigma": ' + "9" * 400 + "}"), "sigma: expected a"),
        (stored('{"dwi": "Kopf-Größe"}').encode("latin-1"), "is not JSON"),
        ("", "an empty file"),
        ("[1]", "expected a JSON object, found a list"),
    ],
    ids="lists objects digits overflow nan infinity twice int float latin-1 empty list".split(),
)  # fmt: skip
def test_a_hostile_configuration_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["noddi", "fit", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and "config.json" in said and said.count("\n") == 1 and len(said) < 500
    with pytest.raises(InputError):
        from_record(load_stage("noddi", "fit").Config, read_record(path).get("config"), str(path))


# Names ---------------------------------------------------------------------------------------------------------------

# Records that stand under two names in one system, and why.
TWO_NAMES = {
    ("tangerine", "VitConfig"): "pretrain trains an autoencoder, of which the encoder is a part",
    ("retfound", "VitConfig"): "either method of pre-training has its encoder, and adaptation from scratch has one",
    ("retfound", "DinoHeadConfig"): "class tokens and hidden patches may have heads of their own",
    ("retfound", "OptimizerConfig"): "either method of pre-training has its own",
    ("profound", "ConvNextConfig"): "pretrain trains an autoencoder, of which the encoder is a part",
    ("profound", "FitConfig"): "the study pre-trains and fine-tunes",
    ("profound", "OptimizerConfig"): "as above",
    ("noddi", "ForwardConfig"): "evaluate has no training settings to hold it",
    ("noddi", "Tissue"): "part of a fit and of a forward model",
    ("brainfm", "Severity"): "images are mild or severe",
    ("brainfm", "BiasFieldConfig"): "as above",
    ("cocolit", "PatchDiscriminatorConfig"): "of the autoencoder, and of the baseline",
    ("igndmoe", "FitConfig"): "simulate fits within its recovery study",
    ("igndmoe", "ProgressionConfig"): "as above",
    ("igndmoe", "ConnectomeConfig"): "of a cohort and of a connectome alone; the command names it --data.graph in both",
    ("igndmoe", "OdeConfig"): "as above; the command names it --ode in every stage",
    ("selfplay", "AdaptConfig"): "compare adapts once before thinking and again while thinking",
    ("selfplay", "AugmentConfig"): "of meta-training, of adaptation, and of compare's supervised networks",
    ("selfplay", "OpponentConfig"): "of the pixel game and of the patch game",
    ("selfplay", "DeformationConfig"): "part of AugmentConfig",
}


@functools.cache
def options(system):
    """Every option of a system's stages, and the places of every record."""
    names, places = set(), {}

    def walk(kind, prefix):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            parts = (hints[field.name], *typing.get_args(hints[field.name]))
            place = "" if NO_PREFIX in parts else field.name
            # An option may drop the name of the record that it stands in.
            before = "" if any(getattr(part, "prefix_name", None) is False for part in parts) else prefix
            if place:
                names.add(f"--{before}{place}".replace("_", "-"))
            for part in parts:
                if isinstance(part, type) and dataclasses.is_dataclass(part):
                    places.setdefault(part.__name__, set()).add(f"{before}{place}")
                    walk(part, f"{before}{place}." if place else before)

    for stage in STAGES:
        if stage.split()[0] == system:
            walk(load_stage(*stage.split()).Config, "")
    return names, places


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_record_has_one_name_in_all_stages_of_a_system(system):
    _, places = options(system)
    doubles = {(system, name): sorted(where) for name, where in places.items() if len(where) > 1}
    unknown = {key: where for key, where in doubles.items() if key not in TWO_NAMES and key[1] != "DataConfig"}
    assert not unknown


GENERAL = {"--preset", "--config", "--help", "--peers", "--slow", "--debug"}
GENERAL |= {"--ddim-n", "--ddim_n"}  # of the released tool of CoCoLIT, which translate takes too


@pytest.mark.parametrize("system", SYSTEMS)
def test_messages_name_options_that_exist(system):
    """Whatever looks like an option in a system's messages, notes and pages is one of its stages'."""
    known = options(system)[0] | {f"--{field.name}" for field in dataclasses.fields(RunOptions)} | GENERAL
    known |= {"--no-" + name[2:] for name in known}
    folder = Path(__file__).parents[1] / "jaxmed" / "systems" / system
    wrong = {}
    for path in sorted(folder.rglob("*.py")):
        for name in re.findall(r"(?<![-\w])--[a-z][a-z0-9_.-]*[a-z0-9]", path.read_text(encoding="utf-8")):
            if name not in known:
                wrong.setdefault(name, path.name)
    assert not wrong

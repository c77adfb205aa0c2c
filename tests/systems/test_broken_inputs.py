"""A broken file ends a run before its folder is begun: in every stage that learns from files, in its preset smoke.

Files of a cohort of phantoms are cut off in the middle, which no header tells: one that is trained on; of stages that
go past broken files all of them, or a single one.
"""

import shutil
from pathlib import Path

import pytest

from jaxmed.cli import main
from jaxmed.io.tables import read_table, write_table
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.synthesis.phantoms.write_heads import write_small_heads
from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort
from jaxmed.synthesis.phantoms.write_puzzles import Counts, write_puzzle_cohort
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort

HALVES = (0.5, 0.25, 0.25)


def write_all(place: Path) -> None:
    """Write a cohort of every kind, with a table table.csv beside each: path, subject, label and split."""
    made = {
        "chest": write_chest_cohort(place / "chest", 0, 12, (32, 32, 32), finding="effusion", fractions=HALVES),
        "retina": write_retina_cohort(place / "retina", 0, 40, 32, fractions=HALVES),
        "prostate": write_prostate_cohort(place / "prostate", 0, 12, (32, 32, 16), fractions=HALVES),
        "brain": write_brain_cohort(place / "brain", 0, 6, (32, 32), fractions=HALVES),
        "puzzles": write_puzzle_cohort(
            place / "puzzles", 0, Counts(train=4, validation=2, support=4, test=2), (16, 16)
        ),
    }
    for name, manifest in made.items():
        shutil.copy(manifest, place / name / "table.csv")
    write_small_heads(place / "heads", 0, 3)
    rows = [{"path": f"labels/{path.name}"} for path in sorted((place / "heads" / "labels").iterdir())]
    write_table(place / "heads" / "table.csv", ("path",), rows)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    place = tmp_path_factory.mktemp("cohorts")
    write_all(place)
    return place


BINARY = ("--label.columns", "hypertension")
ALL = ("--data.check", "64")  # by default 16 files of labelled data are read from end to end beforehand
CASES = {
    "tangerine pretrain": ("chest", "one"),
    "tangerine adapt": ("chest", "one"),
    "retfound pretrain": ("retina", "one"),
    "retfound adapt": ("retina", "one", *BINARY, *ALL),
    "retfound compare": ("retina", "one", *BINARY, *ALL, "--encoders", "a=random", "b=random"),
    "profound pretrain": ("prostate", "one"),
    "profound adapt": ("prostate", "one"),
    "profound segment": ("prostate", "one", "--data.mask", "zones"),
    "profound quality-study": ("retina", "one", *BINARY),
    "brainfm generate": ("heads", "single"),
    "brainfm train": ("heads", "one"),
    "dynamicdps train-prior": ("brain", "one"),
    "dynamicdps train-initial": ("brain", "one"),
    "selfplay meta-train": ("puzzles", "all"),
    "selfplay train-policy": ("puzzles", "all"),
    "selfplay adapt": ("puzzles", "all"),
    "selfplay compare": ("puzzles", "all"),
}


def cut_off(table: Path, which: str) -> list[Path]:
    """Leave three fifths of one file to train on, or of all files of a table; a single one has the table to itself."""
    rows = [dict(row) for row in read_table(table).rows]
    if which == "single":
        write_table(table, tuple(rows[0]), rows[:1])
    chosen = rows if which == "all" else rows[1:2] if which == "one" else rows[:1]
    paths = [table.parent / row["path"] for row in chosen]
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: 3 * len(content) // 5])
    return paths


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_leaves_no_run_behind(name, cohorts, tmp_path, capsys):
    kind, which, *words = CASES[name]
    shutil.copytree(cohorts / kind, tmp_path / "data")
    table = tmp_path / "data" / "table.csv"
    broken = cut_off(table, which)
    words = [*name.split(), "--preset", "smoke", "--data.manifest", str(table), *words, "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxmed: ") and error.count("\n") == 1, error
    assert any(path.name in error for path in broken), error
    assert not (tmp_path / "run").exists(), error

"""Killed at random moments and started again, a stage ends with the bytes of an undisturbed run.

What it prints is kept in benchmarks/results/slow/kills.txt: pytest -s -m slow tests/train/test_kills.py
"""

import csv
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmed.files import LEFTOVER
from jaxmed.train.log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("JAXMED_KILLS", "10"))
STAGES = ("igndmoe fit", "selfplay meta-train", "dynamicdps enhance", "tangerine efficiency", "tangerine adapt")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a user, whose starts after the first find what was compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    kept.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def begin(stage, out, environment):
    words = [sys.executable, "-m", "jaxmed", *stage.split(), "--preset", "smoke", "--out", str(out), "--quiet"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def files_of(run):
    """Return every file of the outputs; of curves over time without the seconds, which are measured."""
    found = {}
    for path in sorted((run / "outputs").rglob("*")):
        if path.is_file():
            name = path.relative_to(run).as_posix()
            found[name] = path.read_bytes()
            if path.parent.name == "curves" or path.name == "convergence.csv":
                rows = list(csv.reader(path.read_text().splitlines()))
                kept = [column for column, word in enumerate(rows[0]) if "seconds" not in word]
                found[name] = "\n".join(",".join(row[column] for column in kept) for row in rows).encode()
    return found


def numbers_of(run):
    lines = read_metrics(run)
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


def leftovers_of(run):
    names = [path for path in run.rglob("*") if LEFTOVER.match(path.name) or "orbax-checkpoint-tmp" in path.name]
    return [str(path.relative_to(run)) for path in names]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_with_the_bytes_of_an_undisturbed_one(stage, environment, tmp_path):
    out, done = tmp_path / "run", []  # always in one place: tables name it
    for _ in range(2):  # the first finds out what has to be compiled
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        finish(begin(stage, out, environment))
        length = time.monotonic() - began
        done.append((files_of(out), numbers_of(out)))
    assert done[0] == done[1]
    wanted, numbers = done[1]
    draw, moments, chains, wrong, left = random.Random(stage), [], 0, [], []
    while len(moments) < KILLS:
        shutil.rmtree(out)
        while len(moments) < KILLS:
            moment = draw.uniform(0.15, 1.0) * length
            process = begin(stage, out, environment)
            try:
                _, errors = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                moments.append(moment)
                continue
            assert process.returncode == 0, errors
            break  # done before its moment came
        else:
            finish(begin(stage, out, environment))
        chains += 1
        found = files_of(out)
        wrong += [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        wrong += ["metrics.jsonl"] if numbers_of(out) != numbers else []
        left += leftovers_of(out)
    times = ", ".join(f"{moment:.0f}" for moment in moments)
    print(f"\n{stage}: undisturbed {length:.0f} s; {len(moments)} kills after {times} s, in {chains} runs; "
          f"{len(wanted)} files each: {len(wrong)} differ, {len(left)} left over")  # fmt: skip
    assert not wrong and not left, (wrong, left)

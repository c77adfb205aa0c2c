"""Runs that are killed, and runs of several processes: the toy of tests/support in processes of its own."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
from toy_processes import (
    assert_close,
    assert_same_curve,
    final,
    finish,
    metrics,
    run_processes,
    saved_steps,
    start_toy,
    wait_for_step,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start_toy(out))
    return out


def test_a_run_killed_at_five_random_steps_ends_bit_equal(tmp_path, unbroken):
    out = tmp_path / "run"
    draw = random.Random(3)
    for step in sorted(draw.sample(range(2, 30), 5)):
        process = start_toy(out, "--pause", 0.05)
        wait_for_step(process, out, step)
        time.sleep(draw.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start_toy(out))
    found, expected = final(out), final(unbroken)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # The record of the run reads as if nothing had happened, and every step stands in it once.
    shown = [{name: value for name, value in line.items() if name != "steps_per_second"} for line in metrics(out)]
    straight = [
        {name: value for name, value in line.items() if name != "steps_per_second"} for line in metrics(unbroken)
    ]
    assert shown == straight
    assert [line["step"] for line in shown] == list(range(1, 31))


def test_sigterm_finishes_the_step_and_saves_it(tmp_path, unbroken):
    out = tmp_path / "run"
    process = start_toy(out, "--pause", 0.05, "--save-every", 0)
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors and "which is saved" in errors
    assert "Traceback" not in errors
    assert saved_steps(out) == [metrics(out)[-1]["step"]]
    finish(start_toy(out, "--save-every", 0))
    assert_close(final(out), final(unbroken), 0)


@pytest.mark.multiprocess
def test_saved_by_two_processes_restored_by_one_and_four(tmp_path, unbroken):
    """Two processes of two devices each train the first 12 steps; others train on from there."""
    expected = final(unbroken)
    out = tmp_path / "two"
    run_processes(out, 2, 2, "--mesh.data", 2, "--mesh.model", 2, "--stop-at", 12)
    assert saved_steps(out)
    one, four = tmp_path / "one", tmp_path / "four"
    shutil.copytree(out, one)
    shutil.copytree(out, four)
    finish(start_toy(one))
    assert "Continuing after step 12" in (one / "log.txt").read_text()
    assert_close(final(one), expected)
    run_processes(four, 4, 1)
    assert "Continuing after step 12" in (four / "log.txt").read_text()
    assert_close(final(four), expected)


@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path, unbroken):
    run_processes(tmp_path / "run", 2, 1)
    assert_close(final(tmp_path / "run"), final(unbroken))
    assert_same_curve(tmp_path / "run", unbroken)
    # Only the first process writes: every line stands there once.
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 31))


@pytest.mark.multiprocess
def test_four_processes_read_every_record_once_and_train_as_one(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    finish(start_toy(one, "--records", "--steps", 6))
    run_processes(four, 4, 2, "--records", "--steps", 6)

    def read(out, process):
        lines = (out / f"records-{process}.jsonl").read_text().splitlines()
        return {line["step"]: line["records"] for line in map(json.loads, lines)}

    whole, shares = read(one, 0), [read(four, process) for process in range(4)]
    for step in range(6):
        assert all(len(share[step]) == 4 for share in shares)
        assert [record for share in shares for record in share[step]] == whole[step]
    for epoch in (range(3), range(3, 6)):  # 48 records in batches of 16
        assert sorted(record for step in epoch for share in shares for record in share[step]) == list(range(48))
    assert_close(final(four), final(one))
    assert_same_curve(four, one)

"""Runs that are killed, and runs of several processes: the toy of tests/support in processes of its own."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ROOT = SUPPORT.parents[1]


def start_toy(out, *arguments, devices=1, **environment):
    environment = {
        **os.environ,
        "TOY_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        "NPROC": "16",  # gloo hangs on few cores with jax's default pool
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    command = [sys.executable, str(SUPPORT / "train_toy.py"), "--out", str(out), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes, limit=120):
    """Wait for all of them; nobody outlives the limit, not even one that ignores SIGTERM."""
    deadline = time.monotonic() + limit
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in outputs]


def metrics(out):
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(process, out, step, limit=60):
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["step"] >= step for line in metrics(out)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-2000:]}")


def final(out):
    with np.load(Path(out) / "final.npz") as stored:
        return dict(stored)


def run_processes(out, count, devices, *arguments):
    """Run the toy in `count` processes of `devices` devices each."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    shared = ["--mesh.distributed", "--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.processes", count]
    processes = [
        start_toy(out, *arguments, *shared, "--mesh.process", index, devices=devices) for index in range(count)
    ]
    return finish(*processes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start_toy(out))
    return out


def assert_close(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


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
    assert process.returncode == 130
    assert "stopped by SIGTERM after step" in errors and "which is saved" in errors
    assert "Traceback" not in errors
    stopped_at = metrics(out)[-1]["step"]
    saved = [int(path.name) for path in (out / "checkpoints" / "state").iterdir() if path.name.isdigit()]
    assert saved == [stopped_at]
    finish(start_toy(out, "--save-every", 0))
    assert_close(final(out), final(unbroken), 0)


@pytest.mark.multiprocess
def test_saved_by_two_processes_restored_by_one_and_four(tmp_path, unbroken):
    """Two processes of two devices each train the first 12 steps; others train on from there."""
    expected = final(unbroken)
    out = tmp_path / "two"
    run_processes(out, 2, 2, "--mesh.data", 2, "--mesh.model", 2, "--stop-at", 12)
    assert [path.name for path in (out / "checkpoints" / "state").iterdir() if path.name.isdigit()]
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
    # Only the first process writes: every line stands there once.
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 31))

"""A whole stage by the command line in two processes: one run folder, and the curve of one process."""

import os
import subprocess
import sys

import numpy as np
import pytest
from toy_processes import ROOT, free_port, metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
WORDS = ("tangerine", "pretrain", "--preset", "smoke", "--epochs", "8", "--loop.save-every", "5", "--mesh.data", "2")


def start(out, devices, *words):
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "NPROC": "16", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxmed", *WORDS, "--out", str(out), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    try:
        for process in processes:
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
            yield output
    finally:
        for process in processes:
            process.kill()


def run_two(out):
    place = f"127.0.0.1:{free_port()}"
    shared = ("--mesh.distributed", "--mesh.coordinator", place, "--mesh.processes", 2, "--mesh.process")
    return list(finish(*[start(out, 1, *shared, process) for process in range(2)]))


def losses(out):
    lines = [line for line in metrics(out) if "loss" in line]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def test_two_processes_pretrain_as_one(tmp_path):
    list(finish(start(tmp_path / "one", 2)))
    run_two(tmp_path / "two")
    (steps, found), (expected_steps, expected) = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert steps == expected_steps and len(steps) > 3
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    names = [sorted(path.name for path in (tmp_path / name / "outputs").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] and (tmp_path / "two" / "report.html").exists()
    assert all("Complete already" in output for output in run_two(tmp_path / "two"))

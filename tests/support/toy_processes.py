"""The toy of `train_toy.py` in processes of its own: started, awaited, and what it left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SUPPORT = Path(__file__).resolve().parent
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


def end(*processes, limit=240):
    """Wait for all of them and return what each printed; nobody outlives the limit, not even who ignores SIGTERM."""
    deadline = time.monotonic() + limit
    try:
        return [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def finish(*processes, limit=240):
    """Wait until all of them have ended well."""
    outputs = end(*processes, limit=limit)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in outputs]


def metrics(out):
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(process, out, step, limit=150):
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["step"] >= step for line in metrics(out)):
            return
        time.sleep(0.01)
    process.kill()  # or its last words would have to be waited for
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-2000:]}")


def final(out):
    with np.load(Path(out) / "final.npz") as stored:
        return dict(stored)


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start_processes(out, count, devices, *arguments):
    """Start the toy in `count` processes of `devices` devices each, which train together."""
    place = f"127.0.0.1:{free_port()}"
    shared = ["--mesh.distributed", "--mesh.coordinator", place, "--mesh.processes", count]
    return [start_toy(out, *arguments, *shared, "--mesh.process", index, devices=devices) for index in range(count)]


def run_processes(out, count, devices, *arguments):
    return finish(*start_processes(out, count, devices, *arguments))


def assert_close(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


def saved_steps(out):
    return sorted(int(path.name) for path in (Path(out) / "checkpoints" / "state").iterdir() if path.name.isdigit())


def assert_same_curve(out, other):
    """Check that two runs logged the same steps, and the same loss at each."""
    found, expected = metrics(out), metrics(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-5)

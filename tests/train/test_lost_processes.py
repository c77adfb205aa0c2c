"""One of two processes dies, hangs, fails or is told to stop: the other ends too, soon, and says why in one line.

With `-s` the tests print how long the other took to notice, and how many steps were taken again.
"""

import signal
import time

import pytest
from toy_processes import (
    assert_close,
    end,
    final,
    finish,
    metrics,
    run_processes,
    saved_steps,
    start_processes,
    start_toy,
    wait_for_step,
)

from jaxmed.errors import InputError
from jaxmed.train.processes import lost_sign

pytestmark = pytest.mark.multiprocess
BOUND = 60.0  # seconds in which the others must have ended
SLOWLY = ("--pause", 0.1, "--save-every", 4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start_toy(out))
    return out


def told(errors):
    """Return the lines that jaxmed itself says of an error, among those of jax and of the log."""
    return [line for line in errors.splitlines() if line.startswith("jaxmed: ")]


def assert_lost(process, errors, index):
    assert process.returncode == 1, errors[-3000:]
    (line,) = told(errors)
    assert line.startswith(f"jaxmed: process {index} of 2: expected the other processes to answer, found that one has")
    assert "start all again: the run continues after its last save" in line
    assert "Traceback" not in errors


def lose(tmp_path, victim, number, *arguments):
    """Send one of two processes a signal in the middle of a run, and wait for the other's end."""
    out = tmp_path / "run"
    processes = start_processes(out, 2, 1, *SLOWLY, *arguments)
    try:
        wait_for_step(processes[0], out, 6)
        began = time.monotonic()
        processes[victim].send_signal(number)
        ((_, errors),) = end(processes[1 - victim], limit=BOUND)
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    reached, saved = metrics(out)[-1]["step"], saved_steps(out)[-1]
    print(f"\nprocess {victim} of 2, {signal.Signals(number).name}: the other ended after {seconds:.1f} s; "
          f"{reached - saved} steps lost")  # fmt: skip
    assert_lost(processes[1 - victim], errors, 1 - victim)
    return out


def test_the_second_process_is_killed(tmp_path, unbroken):
    out = lose(tmp_path, 1, signal.SIGKILL)
    run_processes(out, 2, 1)
    assert "Continuing after step" in (out / "log.txt").read_text()
    assert_close(final(out), final(unbroken))


def test_the_first_process_is_killed_which_the_others_are_connected_through(tmp_path, unbroken):
    out = lose(tmp_path, 0, signal.SIGKILL)
    finish(start_toy(out))  # on one process of one device
    assert "Continuing after step" in (out / "log.txt").read_text()
    assert_close(final(out), final(unbroken))


@pytest.mark.slow
def test_a_process_that_hangs_is_missed_after_its_heartbeats(tmp_path):
    lose(tmp_path, 1, signal.SIGSTOP, "--heartbeat", 10)


def test_a_mistake_in_one_process_ends_both(tmp_path):
    out = tmp_path / "run"
    processes = start_processes(out, 2, 1, *SLOWLY, "--fail-at", 6)
    (_, first), (_, second) = end(*processes, limit=BOUND + 180)
    assert processes[1].returncode == 2
    assert told(second) == ["jaxmed: scan_7.nii.gz: expected an image, found a truncated file"]
    assert_lost(processes[0], first, 0)


def test_processes_that_cannot_find_each_other_say_so(tmp_path):
    process = start_toy(tmp_path / "run", "--mesh.distributed")
    ((_, errors),) = end(process)
    assert process.returncode == 2, errors[-3000:]
    (line,) = told(errors)
    assert line.startswith("jaxmed: mesh.distributed: expected SLURM, Open MPI or a TPU pod, or the fields coordinator")
    assert line.endswith("found coordinator_address should be defined; see scripts/launch/ --help")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed"), True),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: save"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("shapes (2, 3) and (4,) do not fit"), False),
        (InputError("Gloo.nii.gz", "an image", "a truncated file"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_errors_of_another_process_are_told_from_others(error, is_lost):
    assert bool(lost_sign(error)) == is_lost


def test_sigterm_to_one_process_saves_on_all(tmp_path, unbroken):
    out = tmp_path / "run"
    processes = start_processes(out, 2, 1, "--pause", 0.5, "--save-every", 0)
    wait_for_step(processes[0], out, 5)
    processes[1].send_signal(signal.SIGTERM)
    outputs = end(*processes, limit=BOUND)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, outputs[0][1][-3000:]
    lines = [told(errors) for _, errors in outputs]
    assert lines[0] == lines[1]
    (step,) = saved_steps(out)
    assert step < 30
    assert lines[0] == [f"jaxmed: stopped by SIGTERM after step {step} of 30, which is saved; "
                        "the same command continues there"]  # fmt: skip
    finish(start_toy(out, "--save-every", 0))
    assert f"Continuing after step {step}" in (out / "log.txt").read_text()
    assert_close(final(out), final(unbroken))

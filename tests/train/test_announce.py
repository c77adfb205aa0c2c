"""What a run says before and during long work."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxmed import cli
from jaxmed.cli import main
from jaxmed.errors import InputError
from jaxmed.nn.convolution import conv
from jaxmed.train import announce as module
from jaxmed.train import log as log_module
from jaxmed.train.announce import announce, count_operations, require_memory
from jaxmed.train.log import Log, Screen, at_work, keep_speaking

pytestmark = pytest.mark.core


def scanned(x):
    return jax.lax.scan(jax.checkpoint(lambda c, _: (c @ x, None)), x, None, length=5)[0]


def branching(x):
    return jax.lax.cond(x[0, 0] > 0, lambda a: jax.jit(jnp.matmul)(a, a), lambda a: a, x)


def convolved(x):
    return jax.lax.conv(x[None, None], jnp.ones((3, 1, 2, 2)), (1, 1), "VALID")


def convolved_by_ours(x):
    """The convolution and its gradient by the image."""
    return jax.vjp(lambda x: conv(x, jnp.ones((3, 3, 1, 4))), x[None, :, :, None])[1](jnp.ones((1, 8, 8, 4)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x, 2 * 8**3),
        (scanned, 5 * 2 * 8**3),
        (branching, 2 * 8**3),
        (convolved, 2 * (3 * 7 * 7) * 4),
        (convolved_by_ours, 2 * 2 * (8 * 8 * 4) * 9),
        (lambda x: jax.grad(lambda y: (y @ x).sum())(x), 2 * 2 * 8**3),
    ],
    ids=["product", "loop", "branch", "convolution", "our convolution", "gradient"],
)
def test_operations_of_products_are_counted_in_loops_branches_and_gradients(function, expected):
    found = count_operations(jax.make_jaxpr(function)(jnp.ones((8, 8))).jaxpr)
    assert expected <= found <= 1.3 * expected + 400


def test_size_time_and_memory_are_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "matmul_rate", lambda: 1e9 / module.REACHED)
    square = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    program = jax.make_jaxpr(jnp.matmul)(square, square)
    log = Log(tmp_path)
    smaller = "--preset laptop (Small)"
    announce(log, "Training", params=square, batch=square, program=program, count=100, smaller=smaller)
    said = capsys.readouterr().err
    assert said == (
        "Training: 100 steps of 1000 x 1000 (4.00 MB); a model of 1.0 million parameters (4.00 MB held); "
        "2 GFLOP each, which may take 2.0 s, and 3 min 20 s in all. Compiling comes first.\n"
    )
    announce(log, "Training", params=square, batch=square, program=program, count=1000, smaller=smaller)
    assert "That is much for a CPU; --preset laptop (Small) fits one." in capsys.readouterr().err
    large = jax.ShapeDtypeStruct((8000, 8000), jnp.float32)
    announce(log, "Drawing", params=large, smaller=smaller)
    assert "fits one" in capsys.readouterr().err


def test_a_step_beyond_this_machine_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(module, "machine_memory", lambda: 16e9)
    require_memory(15e9, "")
    with pytest.raises(InputError, match="memory: expected a step that fits into the 16.0 GB .* found one of 46.6 GB"):
        require_memory(46.57e9, "--preset laptop")


def test_silence_is_broken_by_what_is_being_done(monkeypatch):
    monkeypatch.setattr(log_module, "_SCREEN", screen := Screen())
    now = screen.spoken
    assert screen.heartbeat(now + 7) == ""
    assert screen.heartbeat(now + 9) == "Reading and checking the inputs: 9.0 s so far"
    screen.say("11 volumes to train on.")
    assert screen.heartbeat(screen.spoken + 9) == "Still at work after '11 volumes to train on.': 9.0 s so far"
    with at_work("Compiling the step") as work:
        assert screen.heartbeat(work.began + 70) == "Compiling the step: 1 min 10 s so far"
    assert not screen.work


def test_a_stage_that_says_nothing_is_heard(monkeypatch, capsys):
    """No real clock: the limit of silence is put to nothing, and the thread looks without pause."""
    monkeypatch.setattr(log_module, "SECONDS_OF_SILENCE", 0.0)
    heard, until = "", time.monotonic() + 20
    with keep_speaking(0.001), at_work("Counting"):
        while "Counting" not in heard and time.monotonic() < until:
            heard += capsys.readouterr().err
    assert "Counting: " in heard and " so far" in heard


def test_progress_names_what_is_awaited_and_counts_from_the_end_of_compilation(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log_module, "_SCREEN", screen := Screen())
    with Log(tmp_path).progress("Training", 10, "steps", 2) as update:
        clock[0] = 100.0  # compiled
        assert screen.heartbeat(100.0).startswith("Training, 2 of 10 steps done, the next: 1 min 40 s")
        update(2)
        clock[0] = 102.0
        update(4)
        clock[0] = 106.0
        update(8)
    assert "Training: 8 of 10 steps, 1 steps/s, 2.0 s left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError("1 TB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_no_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    from jaxmed.systems.noddi.stages import simulate

    def run(config, folder):
        raise error

    monkeypatch.setattr(simulate, "run", run)
    assert main(["noddi", "simulate", "--preset", "smoke", "--out", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxmed: memory: expected enough for this run, found ") and said.count("\n") == 1


def test_the_stage_hears_which_smaller_preset_there_is(tmp_path, monkeypatch):
    from jaxmed.systems.noddi.stages import simulate

    found = []
    monkeypatch.setattr(simulate, "run", lambda config, folder: found.append(folder.smaller))
    for words in ([], ["--preset", "laptop"], ["--preset=smoke"]):
        main(["noddi", "simulate", *words, "--out", str(tmp_path / "r")])
    assert [text.split(" (")[0] for text in found] == ["--preset laptop", "--preset smoke", ""]


def test_the_imports_of_a_stage_are_no_silence(monkeypatch, capsys):
    """A start that takes long on a busy machine is told before the stage has said anything."""
    monkeypatch.setattr(log_module, "SECONDS_OF_SILENCE", 0.0)
    keep = log_module.keep_speaking
    monkeypatch.setattr(log_module, "keep_speaking", lambda: keep(0.001))
    heard, until = "", time.monotonic() + 20

    def load(system, stage):
        nonlocal heard
        while "Starting: " not in heard and time.monotonic() < until:
            heard += capsys.readouterr().err
        raise InputError("stage", "one that loads", "none")

    monkeypatch.setattr(cli, "load_stage", load)
    assert cli.main(["noddi", "fit", "--out", "nowhere"]) == 2
    assert "Starting: " in heard and " so far" in heard

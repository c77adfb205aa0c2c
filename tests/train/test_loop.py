"""The loop: intervals, resuming, bad numbers, early stops."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxmed.errors import InputError, Interrupted
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.loop import LoopConfig, fit, restore_best
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.run_folder import RunOptions, open_run, start
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

CONFIG = LoopConfig(steps=12, log_every=3, save_every=5)


@pytest.fixture(scope="module")
def parts():
    mesh = make_mesh(MeshConfig(data=1))
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-2, weight_decay=0.0), 12)
    state = create_state(jax.random.key(0), toy.init, optimizer, mesh)
    return mesh, state, make_train_step(toy.loss, optimizer, state=state)


def run(path: Path, parts, config=CONFIG, batches=None, evaluate=None, step=None, **options):
    mesh, state, compiled = parts
    folder = open_run("toy", "train", "toy", RunOptions(path, quiet=True, **options))
    start(folder)
    log = Log(path, quiet=True)
    batches = batches or toy.batches()
    return fit(config, state, step or compiled, batches, mesh=mesh, folder=folder, log=log, evaluate=evaluate), folder


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


def saved(path, name="state"):
    return sorted(int(item.name) for item in (path / "checkpoints" / name).iterdir() if item.name.isdigit())


def test_intervals_of_log_and_checkpoints(tmp_path, parts):
    state, _ = run(tmp_path, parts)
    assert int(state.step) == 12
    assert steps_of(tmp_path) == [3, 6, 9, 12]
    assert saved(tmp_path) == [10, 12]
    assert {"loss", "root", "grad_norm", "steps_per_second"} <= set(read_metrics(tmp_path)[0])


def test_a_run_cut_short_continues_to_the_same_numbers(tmp_path, parts):
    whole, _ = run(tmp_path / "whole", parts)
    cut = tmp_path / "cut"

    def ending(first):
        return (batch for _, batch in zip(range(first, 8), toy.batches()(first), strict=False))

    with pytest.raises(InputError, match="data: expected a batch for step 9, found no more records"):
        run(cut, parts, batches=ending)
    assert (steps_of(cut), saved(cut)) == ([3, 6], [5])
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    state, _ = run(cut, parts)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    assert steps_of(cut) == [3, 6, 9, 12]
    again, _ = run(cut, parts)  # complete: nothing is left to do
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


class Sum(NamedTuple):
    value: jax.Array


def test_rounds_of_a_part_stop_once_finished_and_are_not_done_again(tmp_path):
    folder = open_run("toy", "train", "toy", RunOptions(tmp_path, quiet=True))
    start(folder)

    def one_round(state, problem):
        state = Sum(state.value + problem)
        return state, {"value": float(state.value)}

    def rounds(first):
        config = LoopConfig(steps=9, log_every=1, save_every=1)
        options = {"mesh": None, "folder": folder, "log": Log(tmp_path, quiet=True), "part": "sum", "unit": "round"}
        return fit(
            config,
            Sum(first),
            one_round,
            lambda _: itertools.repeat(np.float32(2)),
            **options,
            is_finished=lambda state: bool(state.value >= 6),
        )

    assert float(rounds(jnp.zeros(())).value) == 6
    told = [{"step": 1, "sum/value": 2.0}, {"step": 2, "sum/value": 4.0}, {"step": 3, "sum/value": 6.0}]
    assert read_metrics(tmp_path) == told and saved(tmp_path, "sum") == [2, 3]
    assert float(rounds(jnp.zeros(())).value) == 6 and read_metrics(tmp_path) == told
    assert "Continuing after round 3" in (tmp_path / "log.txt").read_text()


def test_a_number_that_is_not_finite_stops_with_step_and_metric(tmp_path, parts):
    def broken(first):
        for number, batch in enumerate(toy.batches()(first), first):
            yield {"image": batch["image"] * (np.float32(np.nan) if number == 6 else np.float32(1))}

    with pytest.raises(InputError, match=r"step 7, (loss|root|grad_norm): expected a finite number, found nan"):
        run(tmp_path, parts, batches=broken)
    assert saved(tmp_path) == [5]
    assert steps_of(tmp_path) == [3, 6]


def test_a_bad_number_just_before_a_save_is_not_saved(tmp_path, parts):
    def broken(first):
        for number, batch in enumerate(toy.batches()(first), first):
            yield {"image": batch["image"] * (np.float32(np.inf) if number == 4 else np.float32(1))}

    with pytest.raises(InputError, match="step 5,"):
        run(tmp_path, parts, batches=broken)
    assert saved(tmp_path) == []


def spoilt(*bad):
    """Return a stream whose batches of some numbers, from 1, are not finite."""

    def batches(first):
        for number, batch in enumerate(toy.batches()(first), first + 1):
            yield {"image": batch["image"] * (np.float32(np.nan) if number in bad else np.float32(1))}

    return batches


def without(*left_out):
    """Return the stream without the batches of some numbers, from 1."""

    def batches(first):
        numbered = ((number, batch) for number, batch in enumerate(toy.batches()(0), 1) if number not in left_out)
        return (batch for _, batch in itertools.islice(numbered, first, None))

    return batches


def test_a_run_goes_back_to_its_last_save_and_on_without_the_batches_since(tmp_path, parts):
    config = dataclasses.replace(CONFIG, rollbacks=2)
    state, _ = run(tmp_path / "bad", parts, config, batches=spoilt(3, 10))
    # Batch 3 comes before any save. Without 1 to 3, step 5 takes batch 8 and is saved, and step 7 takes batch 10.
    expected, _ = run(tmp_path / "good", parts, batches=without(1, 2, 3, 9, 10))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    record = json.loads((tmp_path / "bad" / "checkpoints" / "state-rollbacks.json").read_text())["rollbacks"]
    assert [(entry["step"], entry["back_to_step"]) for entry in record] == [(3, 0), (7, 5)]
    assert [(entry["first_batch"], entry["last_batch"]) for entry in record] == [(1, 3), (9, 10)]
    assert all(entry["value"] == "nan" for entry in record)
    assert steps_of(tmp_path / "bad") == [3, 6, 9, 12]
    found = [line["loss"] for line in read_metrics(tmp_path / "bad")]
    assert found == [line["loss"] for line in read_metrics(tmp_path / "good")]
    told = (tmp_path / "bad" / "log.txt").read_text()
    assert "is nan: going back to step 5, and on without batches 9 to 10 (rollback 2 of 2)." in told


def test_a_resumed_run_leaves_the_same_batches_out_and_counts_its_rollbacks(tmp_path, parts):
    config = dataclasses.replace(CONFIG, rollbacks=1)

    def ending(first):
        return (batch for _, batch in zip(range(first, 9), spoilt(7)(first), strict=False))

    with pytest.raises(InputError, match="data: expected a batch for step 8, found no more records"):
        run(tmp_path / "cut", parts, config, batches=ending)
    state, _ = run(tmp_path / "cut", parts, config, batches=spoilt(7))
    whole, _ = run(tmp_path / "whole", parts, config, batches=spoilt(7))
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    # Without 6 and 7, step 12 takes batch 14, and the one rollback is spent.
    with pytest.raises(InputError, match=r"step 12, \w+: expected a finite number, found nan; .*--loop.rollbacks"):
        run(tmp_path / "twice", parts, config, batches=spoilt(7, 14))


def test_a_rollback_forgets_the_evaluations_after_the_save(tmp_path, parts):
    config = dataclasses.replace(CONFIG, rollbacks=1, evaluate_every=1, best="auroc")
    turn = itertools.count(1)  # better every time, so that step 7 was the best when it was taken back

    def evaluate(state):
        return {"auroc": float(next(turn) if int(state.step) in (5, 6, 7) else 0.0)}

    run(tmp_path, parts, config, batches=spoilt(8), evaluate=evaluate)
    assert steps_of(tmp_path) == sorted([*range(1, 13), 3, 6, 9, 12])
    assert saved(tmp_path, "best") == [7]
    values = {line["step"]: line["evaluation/auroc"] for line in read_metrics(tmp_path) if "evaluation/auroc" in line}
    assert values[7] == 5.0  # of the second time


def test_checkpoints_of_round_steps_stay(tmp_path, parts):
    run(tmp_path, parts, dataclasses.replace(CONFIG, save_every=2, keep=1, keep_every=4))
    assert saved(tmp_path) == [4, 8, 12]


def test_a_signal_ends_the_run_after_its_step(tmp_path, parts):
    def stopping(first):
        for number, batch in enumerate(toy.batches()(first), first):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 12, which is saved"):
        run(tmp_path, parts, batches=stopping)
    assert signal.getsignal(signal.SIGTERM) == before
    assert saved(tmp_path) == [4]
    whole, _ = run(tmp_path / "whole", parts)
    state, _ = run(tmp_path, parts)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


def test_evaluations_keep_the_best_and_end_without_progress(tmp_path, parts):
    scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8}
    config = dataclasses.replace(CONFIG, evaluate_every=2, best="auroc", patience=2)

    def evaluate(state):
        return {"auroc": scores[int(state.step)]}

    state, folder = run(tmp_path, parts, config, evaluate=evaluate)
    assert int(state.step) == 8 and saved(tmp_path) == [5, 8] and saved(tmp_path, "best") == [4]
    assert int(restore_best(folder, parts[1]).step) == 4
    # The same, cut at step 7 and continued from step 5: the history is read back.
    cut = tmp_path / "cut"

    def ending(first):
        return (batch for _, batch in zip(range(first, 7), toy.batches()(first), strict=False))

    with pytest.raises(InputError):
        run(cut, parts, config, batches=ending, evaluate=evaluate)
    resumed, _ = run(cut, parts, config, evaluate=evaluate)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)
    assert saved(cut, "best") == [4]
    with pytest.raises(InputError, match=r"loop.best: expected a metric of the evaluation \(auroc\), found dice"):
        run(tmp_path / "other", parts, dataclasses.replace(config, best="dice"), evaluate=evaluate)


def test_any_state_with_its_own_step_is_trained(tmp_path, parts):
    """A plain function and a state of another shape, as an alternating fit would bring."""

    def step(state, batch):
        value = state["mean"] + batch["image"].mean()
        return {"step": state["step"] + 1, "mean": value}, {"mean": value}

    mesh = parts[0]
    first = jax.device_put({"step": jnp.int32(0), "mean": jnp.float32(0)}, jax.NamedSharding(mesh, jax.P()))
    state, _ = run(tmp_path, (mesh, first, step))
    assert int(state["step"]) == 12 and np.isfinite(state["mean"])


def test_a_profile_is_written_when_asked(tmp_path, parts):
    run(tmp_path, parts, profile=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert sum(found["shares"].values()) == pytest.approx(1) and found["shares"]["compute"] > 0
    assert found["operations"] and found["devices"] == 1
    told = (tmp_path / "log.txt").read_text()
    assert "Profile of" in told and "input wait" in told and "Longest operations: " in told
    # A run too short for it says so.
    run(tmp_path / "short", parts, dataclasses.replace(CONFIG, steps=1), profile=2)
    assert "Nothing was traced" in (tmp_path / "short" / "log.txt").read_text()


def test_tensorboard_gets_the_numbers_or_a_line_of_advice(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(InputError, match="pip install 'jaxmed\\[tensorboard\\]'"):
        Log(tmp_path, tensorboard=True)


def test_a_log_of_another_process_writes_nothing(tmp_path):
    log = Log(tmp_path, is_writer=False)
    log.say("nothing")
    log.metrics(1, {"loss": 1.0})
    log.rewind(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"steps": 0}, {"save_every": -1}, {"patience": 3}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoopConfig(**settings)


class Killed(BaseException):
    """What happens to a process at once, without any saying."""


@pytest.mark.parametrize("place", ["before the state", "after the state"])
def test_a_kill_around_a_save_keeps_the_best_of_an_undisturbed_run(tmp_path, parts, monkeypatch, place):
    """Writing goes on behind the run: here the best state is written as late as possible, when it is waited for."""
    scores = dict(zip(range(1, 13), [0.1, 0.2, 0.3, 0.2, 0.5, 0.4, 0.6, 0.3, 0.3, 0.9, 0.8, 0.7], strict=True))
    config = dataclasses.replace(CONFIG, evaluate_every=1, save_every=5, best="auroc")

    def evaluate(state):
        return {"auroc": scores[int(state.step)]}

    save, wait, waiting = Checkpoints.save, Checkpoints.wait, {}

    def late_save(self, step, state):
        if self.folder.name == "best":
            waiting[self.folder] = (step, jax.tree.map(jnp.copy, state))  # the step takes its state's place
            return
        if step == 10 and place == "before the state":
            raise Killed
        save(self, step, state)
        if step == 10:
            wait(self)
            raise Killed

    def late_wait(self):
        if self.folder in waiting:
            save(self, *waiting.pop(self.folder))
        wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", late_save)
        patch.setattr(Checkpoints, "wait", late_wait)
        with pytest.raises(Killed):
            run(tmp_path / "cut", parts, config, evaluate=evaluate)
    _, folder = run(tmp_path / "cut", parts, config, evaluate=evaluate)
    _, other = run(tmp_path / "whole", parts, config, evaluate=evaluate)
    assert saved(tmp_path / "cut", "best") == saved(tmp_path / "whole", "best") == [10]
    best, wanted = restore_best(folder, parts[1]), restore_best(other, parts[1])
    jax.tree.map(np.testing.assert_array_equal, best.params, wanted.params)
    lines = [[line["step"] for line in read_metrics(tmp_path / name)] for name in ("cut", "whole")]
    assert lines[0] == lines[1]

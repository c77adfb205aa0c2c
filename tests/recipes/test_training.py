"""The set-up of training: epochs, starts, averages, scores of held-out records, and states of another kind."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.errors import InputError
from jaxmed.nn.model import Network
from jaxmed.recipes.training import (
    TrainConfig,
    TrainData,
    check_fit,
    handed_on,
    in_steps,
    ramped_decay,
    run_steps,
    run_training,
)
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, learning_rate
from jaxmed.train.run_folder import RunOptions, open_run, start

pytestmark = pytest.mark.core
NETWORK = Network(toy.init, toy.loss, toy.RULES)
CONFIG = TrainConfig(
    OptimizerConfig(peak_lr=1e-2), LoopConfig(steps=4, log_every=1, save_every=0), LoaderConfig(batch_size=4),
    MeshConfig(data=1),
)  # fmt: skip


def source(number, seed):
    images = np.random.default_rng(seed).standard_normal((number, toy.EDGE, toy.EDGE, toy.EDGE))
    return ArraySource({"image": images.astype(np.float32)})


DATA = TrainData(source(8, 0), source(6, 1), lambda fields, generator: {"image": np.asarray(fields["image"])})


def open_folder(path):
    folder = open_run("toy", "train", None, RunOptions(path, quiet=True))
    start(folder)
    return {"folder": folder, "log": Log(folder.path, quiet=True)}


def score(params, keys, batch):
    """The first number of each record's key, and its brightness: what they are is known."""
    return {"draw": jax.vmap(jax.random.uniform)(keys), "mean": batch["image"].mean(axis=(1, 2, 3))}


def test_an_evaluation_is_the_mean_over_records_whose_keys_stay(tmp_path):
    """Six records in batches of 4: what fills the last batch does not count."""
    config = dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, evaluate_every=2))
    run_training(config, NETWORK, toy.loss, DATA, **open_folder(tmp_path / "run"), score=score, score_seed=5)
    lines = [line for line in read_metrics(tmp_path / "run") if "evaluation/draw" in line]
    draws = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(5), record))) for record in range(6)]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        np.testing.assert_allclose(line["evaluation/draw"], np.mean(draws), rtol=1e-6)
        np.testing.assert_allclose(line["evaluation/mean"], DATA.held_out.arrays["image"].mean(), rtol=1e-4)


def test_the_average_is_handed_on_where_there_is_one(tmp_path):
    config = dataclasses.replace(CONFIG, ema_decay=0.5)
    state = run_training(config, NETWORK, toy.loss, DATA, **open_folder(tmp_path / "run"))
    assert handed_on(state) is state.ema_params and handed_on(state._replace(ema_params=None)) is state.params
    np.testing.assert_allclose([ramped_decay(0.9999, step) for step in (0, 90, 10**6)], [0.1, 0.91, 0.9999], rtol=1e-6)


def test_what_is_frozen_in_the_network_stays_and_what_is_given_is_the_start(tmp_path):
    given = {"decoder": {"bias": np.full(toy.EDGE**3, 2.0, np.float32)}}
    network = NETWORK._replace(frozen=("^decoder/bias$",))
    state = run_training(CONFIG, network, toy.loss, DATA, **open_folder(tmp_path / "run"), start=given)
    np.testing.assert_array_equal(state.params["decoder"]["bias"], given["decoder"]["bias"])
    assert int(state.step) == 4


class Pair(NamedTuple):
    """A student that is trained and a teacher that follows it."""

    step: Any
    student: Any
    teacher: Any
    key: Any


def test_a_teacher_and_a_student_bring_their_own_state_and_step(tmp_path):
    config = in_steps(dataclasses.replace(CONFIG, epochs=3.0), len(DATA.training))
    mesh = make_mesh(config.mesh)
    check_fit(config, NETWORK)
    params = toy.init(jax.random.key(0))
    first = Pair(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), jax.random.key(1))
    first = jax.device_put(first, jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    def step(state, batch):
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(batch["image"]))
        (value, _), gradient = jax.value_and_grad(toy.loss, has_aux=True)(state.student, keys, batch)
        student = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, state.student, gradient)
        teacher = optax.incremental_update(student, state.teacher, 0.1)
        return Pair(state.step + 1, student, teacher, state.key), {"loss": value}

    state = run_steps(config, first, step, DATA, mesh=mesh, **open_folder(tmp_path / "run"))
    assert int(state.step) == config.loop.steps == 6  # three passes over 8 records, 4 at a time
    distances = [float(optax.tree.norm(optax.tree.sub(part, params))) for part in (state.student, state.teacher)]
    assert distances[0] > 2 * distances[1] > 0


def test_schedule_of_the_paper():
    # MAE: 98,000 volumes in batches of 224, 400 epochs of which 20 warm up; 1e-4 when warm, 0 at both ends.
    config = in_steps(
        TrainConfig(OptimizerConfig(peak_lr=1e-4), loader=LoaderConfig(batch_size=224), epochs=400, warmup_epochs=20),
        98000,
    )
    assert config.loop.steps == 175000 and config.optimizer.warmup_steps == 8750
    rate = learning_rate(config.optimizer, config.loop.steps)
    assert float(rate(0)) == 0
    np.testing.assert_allclose(rate(8750), 1e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(8750 // 2), 5e-5, rtol=1e-3)
    assert float(rate(175000)) < 1e-12


def test_a_batch_has_at_least_one_part():
    with pytest.raises(InputError, match="accumulation: expected a whole number from 1"):
        dataclasses.replace(CONFIG, accumulation=0)

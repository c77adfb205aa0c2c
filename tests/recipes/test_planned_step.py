"""Steps that are planned are the steps that run; memory by part is the compiler's; layouts reach a configuration."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.platform import compiling_for, is_planned, target_platform
from jaxmed.arrays.task import Task
from jaxmed.cli import PLANNED, STAGES, load_stage, option_words
from jaxmed.errors import InputError
from jaxmed.models.heads import HeadConfig
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.nn.attention import _choose
from jaxmed.planning.estimate import Rates
from jaxmed.planning.layouts import Layout
from jaxmed.planning.program_text import parse_program
from jaxmed.planning.topologies import find_topology
from jaxmed.planning.traffic import measure_work
from jaxmed.recipes import training
from jaxmed.recipes.adapt import FINE_TUNING, AdaptConfig, Labelled, plan_adaptation
from jaxmed.recipes.planned_step import (
    arrange,
    asked_layout,
    device_bytes,
    differences,
    evaluate,
    measure_memory,
    needed_memory,
    record_bytes,
)
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.retfound.stages import pretrain as retfound_pretrain
from jaxmed.systems.tangerine.stages import pretrain as tangerine_pretrain
from jaxmed.train.announce import count_operations
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.run_folder import RunOptions, open_run

TINY = VitConfig((16, 16), (4, 4), 3, width=24, depth=2, heads=2, hidden=48, final_norm=False)


class Caught(Exception):
    pass


def text_of(step, *arguments):
    """Return a traced program as words that do not depend on where functions lie in memory."""
    return re.sub(r"0x[0-9a-f]+", "", str(step.trace(*arguments).jaxpr))


def in_ten_steps(config):
    """Return a configuration whose length is told in steps: epochs become steps where records are counted."""

    def change(train):
        loop = dataclasses.replace(train.loop, steps=10)
        return dataclasses.replace(train, epochs=0, warmup_epochs=0, loop=loop)

    return dataclasses.replace(config, train=change(config.train))


@pytest.mark.parametrize(
    ("name", "module", "changes"),
    [("tangerine pretrain", tangerine_pretrain, {}), ("retfound pretrain", retfound_pretrain, {"method": "mae"})],
)
def test_what_is_planned_is_what_runs(name, module, changes, tmp_path, monkeypatch):
    config = dataclasses.replace(in_ten_steps(module.smoke()), **changes)
    seen = {}

    def catch(loop, state, step, batches, *, mesh, **others):
        seen.update(state=state, step=step, batch=shard_batch(next(iter(batches(0))), mesh))
        raise Caught

    monkeypatch.setattr(training, "fit", catch)
    folder = open_run(*name.split(), config, RunOptions(tmp_path / "run", quiet=True))
    with pytest.raises(Caught):
        module.run(config, folder)
    workload = module.plan_step(config, make_mesh(config.train.mesh))
    state, batch = workload.arguments
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (seen["state"], state)]
    assert shapes[0] == shapes[1]
    assert {field: (leaf.shape, leaf.dtype) for field, leaf in batch.items()} == {
        field: (leaf.shape, leaf.dtype) for field, leaf in seen["batch"].items()
    }
    assert text_of(seen["step"], seen["state"], seen["batch"]) == text_of(workload.step, state, batch)
    assert workload.records == config.train.loader.batch_size


def test_a_planned_batch_of_labels_has_the_fields_of_a_run(monkeypatch):
    task, head = Task("multilabel", ("one", "two", "three")), HeadConfig(3, "mean")
    config = AdaptConfig(TrainConfig(FINE_TUNING, mesh=MeshConfig(data=1)))
    workload = plan_adaptation(config, vit_encoder(TINY), head, task, (16, 16, 3), make_mesh(MeshConfig(data=1)))
    fields = {"image": np.zeros((16, 16, 3), np.float32), "target": np.zeros(3, np.float32)}
    found = Labelled(lambda fields, generator: fields, task, (1.0, 1.0, 1.0))(fields, np.random.default_rng(0))
    assert {name: np.shape(value) for name, value in found.items()} == {
        name: leaf.shape for name, leaf in workload.record.items()
    }
    assert jax.eval_shape(workload.step, *workload.arguments)[0].params["head"]


def test_a_head_on_features_that_are_made_once_has_no_step_to_plan():
    config = AdaptConfig(TrainConfig(FINE_TUNING, mesh=MeshConfig(data=1)), mode="logistic")
    with pytest.raises(InputError, match="mode: expected steps that run the encoder"):
        plan_adaptation(config, vit_encoder(TINY), HeadConfig(1, "mean"), Task(), (16, 16, 3), make_mesh())


# Memory and work -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small step on eight devices, compiled: its workload and its program."""
    config = tangerine_pretrain.smoke()
    encoder = dataclasses.replace(config.model.encoder, width=256, hidden=2048, depth=1, heads=4, scan=True, remat=True)
    config = arrange(
        dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder, decoder_depth=1)),
        Layout(8, 1, 16, 2, True),
    )  # fmt: skip
    workload = tangerine_pretrain.plan_step(config, make_mesh(MeshConfig(data=8)))
    traced = workload.step.trace(*workload.arguments)
    return workload, traced, traced.lower().compile()


def test_arguments_by_part_are_the_compilers(small):
    workload, _, compiled = small
    memory, analysis = measure_memory(compiled, workload.parts), compiled.memory_analysis()
    known = sum(size for name, size in memory.arguments.items() if name != "padding of arguments")
    assert known == pytest.approx(analysis.argument_size_in_bytes, rel=0.02)
    assert memory.temporaries == analysis.temp_size_in_bytes
    assert {"parameters", "optimiser", "batch"} <= set(memory.arguments)
    # Two moments of every parameter but the table of positions, which does not train.
    assert 1.5 < memory.arguments["optimiser"] / memory.arguments["parameters"] < 2.01
    kernel = workload.parts["parameters"][0]["encoder"]["blocks"]["layer_0"]["mlp"]["fc1"]["kernel"]
    assert device_bytes(kernel) == 256 * 2048 * 4 / 8


def test_products_of_all_devices_are_those_of_the_traced_program(small):
    _, traced, compiled = small
    work = measure_work(parse_program(compiled.as_text()), {"data": 8, "model": 1})
    # Traced programs count what is no product too; devices compute nothing twice.
    assert 0.7 < 8 * work.flops / count_operations(traced.jaxpr.jaxpr) <= 1.05


def test_parameters_are_gathered_gradients_summed_and_nothing_else_is_sent(small):
    workload, _, compiled = small
    work = measure_work(parse_program(compiled.as_text()), {"data": 8, "model": 1})
    sums, gathers = {"all-reduce", "reduce-scatter"}, {"all-gather"}
    assert {message.axis for message in work.messages} == {"data"}
    assert {message.kind for message in work.messages} <= sums | gathers
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(workload.parts["parameters"]))
    gathered = sum(message.payload * 8 for message in work.messages if message.kind in gathers)
    # Two parts of a batch, each forward and once more for the backward pass, which computes layers again.
    assert gathered <= 2 * 2.5 * parameters
    summed = sum(message.payload for message in work.messages if message.kind in sums)
    assert summed <= 2.2 * parameters


def test_the_stages_that_plan_are_those_that_are_told():
    found = [name for name in STAGES if hasattr(load_stage(*name.split(" ")), "plan_step")]
    assert set(found) == set(PLANNED)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANNED)
def test_a_layout_reaches_mesh_batch_and_recomputation_and_nothing_else(name):
    module = load_stage(*name.split(" "))
    config = module.paper()
    asked, _ = asked_layout(config)
    layout = Layout(16, 4, 64, 1, None if asked.remat is None else not asked.remat)
    changed = dict(differences(config, arrange(config, layout)))
    assert {place.split(".")[-1] for place in changed} <= {
        "data", "model", "batch_size", "accumulation", "remat", "chunk",
    }  # fmt: skip
    assert asked_layout(arrange(config, layout))[0] == layout
    for place, value in changed.items():
        assert option_words(module.Config, place, value).startswith("--")


def test_options_are_written_as_the_command_line_takes_them():
    kind = tangerine_pretrain.Config
    assert option_words(kind, "train.loader.batch_size", 256) == "--loader.batch-size 256"
    assert option_words(kind, "train.mesh.data", 64) == "--mesh.data 64"
    assert option_words(kind, "model.encoder.remat", True) == "--model.encoder.remat"
    assert option_words(kind, "model.encoder.remat", False) == "--model.encoder.no-remat"


def test_a_layout_that_a_stage_refuses_is_told_and_not_compiled():
    rates = Rates(1e12, 1e11, 1e10, 1e9)
    config, topology = tangerine_pretrain.smoke(), find_topology("cpu:8")
    found = evaluate(tangerine_pretrain, config, Layout(8, 1, 12, 1, True), topology, jax.devices(), rates)
    assert "loader.batch_size: expected a multiple of" in found.problem and not found.runs


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * 2**30),
        ("Ran out of memory: Used 512.0M of 16K smem", 512 * 2**20),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error", 0.0),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_compilers_that_run_out_of_memory_are_understood(message, expected):
    assert needed_memory(message) == expected


def test_a_record_has_the_bytes_of_its_arrays():
    record = {"image": jax.ShapeDtypeStruct((4, 4, 1), jnp.bfloat16), "label": jax.ShapeDtypeStruct((), jnp.float32)}
    assert record_bytes(record) == 36


# Other platforms -----------------------------------------------------------------------------------------------------


def test_programs_for_accelerators_choose_as_accelerators_do():
    assert (target_platform(), is_planned()) == ("cpu", False)
    assert _choose(512, jnp.bfloat16, 64) == "products"
    with compiling_for("tpu"):
        assert (target_platform(), is_planned()) == ("tpu", True)
        assert _choose(512, jnp.bfloat16, 64) == "xla"
    with compiling_for("gpu"):
        assert _choose(512, jnp.bfloat16, 64) == "blocks"  # in place of cuDNN
        assert _choose(512, jnp.float32, 64) == "xla"
    assert not is_planned()

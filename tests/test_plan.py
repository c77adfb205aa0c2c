"""jaxmed plan: its words, its mistakes, what it shows; and whole plans in processes of their own."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jaxmed import plan
from jaxmed.cli import load_stage, main
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.planning.estimate import ASSUMPTIONS, Memory, rates_of
from jaxmed.planning.layouts import Layout
from jaxmed.planning.topologies import V6E, find_topology
from jaxmed.planning.traffic import Message, Work
from jaxmed.recipes.plan_tables import line, print_plan, read_outcomes, verdict, write_outputs
from jaxmed.recipes.planned_step import Outcome, arrange, asked_layout, describe
from jaxmed.systems.brainfm.stages import train as brainfm_train
from jaxmed.systems.retfound.stages import pretrain as retfound_pretrain
from jaxmed.systems.tangerine.stages import pretrain
from jaxmed.train.workload import Workload

HUNDRED_GB = 100e9


def workload(records=256):
    image = jnp.zeros((8, 8, 8, 1), jnp.float32)
    return Workload(jax.jit(lambda: None), (), {}, records, {"image": image}, notes=("Something was assumed.",))


def outcome(layout=Layout(256, 1, 256, 1, True), temporaries=5e9, **changes):
    memory = Memory({"parameters": 1e9, "optimiser": 2e9, "batch": 1e8}, temporaries, 1e6)
    work = Work(5e12, 4e10, (Message("all-gather", "data", "f32", 24.0, 1e7, 2.55e9),))
    begun = Outcome(layout, changes, compile_seconds=3.0)
    topology = find_topology("v6e:16x16")
    return describe(begun, workload(), memory, work, 256 * 5e12, rates_of(V6E, "bfloat16"), topology)


def record(*outcomes: Outcome, best: int | None = 0, largest: int | None = 512):
    config = pretrain.smoke()
    found = plan.Found(
        "tangerine", "pretrain", "v6e:16x16", f"{V6E.name} ({V6E.source})", 256, config,
        tuple(to_record(one) for one in outcomes), best, largest, True, ASSUMPTIONS, {"jax": "1"}, 12.0,
    )  # fmt: skip
    return json.loads(json.dumps(to_record(found), allow_nan=False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "tangerin", "pretrain"], "plan: expected a system and a stage, found tangerin pretrain; did"),
        (["plan", "tangerine"], "plan: expected a system and a stage, found tangerine"),
        (["plan", "tangerine", "pretrain"], "--topology: expected a machine, such as v5p:4x4x4 or h200x8, found"),
        (["plan", "tangerine", "pretrain", "--topology", "v9:2"], "topology: expected a machine such as"),
        (["plan", "tangerine", "train", "--topology", "cpu:8"], "tangerine train: expected a stage, found an unknown"),
        (["plan", "tangerine", "embed", "--topology", "cpu:8"], "tangerine embed: expected a stage that plans"),
        (["plan", "tangerine", "pretrain", "--topology", "cpu:8", "--limit", "0"], "--limit: expected a whole number"),
        (["plan", "tangerine", "pretrain", "--topology", "cpu:8", "--mdel", "1"], "--mdel"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(words, message, capsys):
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1


def test_help_explains(capsys):
    assert main(["plan", "--help"]) == 0
    assert "--topology" in capsys.readouterr().out


def test_a_tpu_without_the_wheel_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "tangerine", "pretrain", "--preset", "smoke", "--topology", "v5e:4x4"]) == 2
    assert "libtpu: expected the wheel that compiles for TPUs, found none; pip install 'jaxmed[plan]'" in (
        capsys.readouterr().err
    )


def test_the_process_of_its_own_has_the_devices_of_the_machine(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=8")
    found = plan.child_environment(find_topology("h200x8"))["XLA_FLAGS"]
    assert found.split() == ["--xla_dump_to=/tmp/x", "--xla_force_host_platform_device_count=8"]
    assert "count=64" in plan.child_environment(find_topology("cpu:64"))["XLA_FLAGS"]
    assert "count=1" in plan.child_environment(find_topology("v5p:4x4x4"))["XLA_FLAGS"].split()[-1]


def test_a_killed_compiler_is_told(monkeypatch):
    monkeypatch.setattr(plan.subprocess, "run", lambda *arguments, **options: Killed())
    with pytest.raises(InputError, match="plan: expected a compiled step, found a compiler that ended with -9"):
        plan.make_plan("tangerine", "pretrain", pretrain.smoke(), find_topology("cpu:8"))


class Killed:
    returncode = -9


def test_a_compiler_that_takes_too_long_is_killed(monkeypatch):
    def run(command, timeout, **options):
        raise plan.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(plan.subprocess, "run", run)
    with pytest.raises(InputError, match="plan: expected a compiled step within 5 s, found none"):
        plan.make_plan("tangerine", "pretrain", pretrain.smoke(), find_topology("cpu:8"), seconds=5)


# What is shown -------------------------------------------------------------------------------------------------------


def test_an_outcome_adds_up():
    found = outcome()
    assert found.runs and found.total == pytest.approx(8.101e9)
    assert found.capacity == pytest.approx(0.92 * 32e9)
    assert found.rate == pytest.approx(256 / found.seconds)
    assert found.input["megabytes_per_second"] == pytest.approx(found.rate * 2048 / 1e6)
    assert found.input["records_per_second_and_host"] == pytest.approx(found.rate / 32)
    assert found.sent == {"data": 2.55e9}
    assert "8.1 of 29.4 GB" in line(found)


def test_what_does_not_fit_says_by_how_much():
    found = outcome(temporaries=HUNDRED_GB)
    assert not found.runs and found.problem == "needs 103.1 GB of a chip, which has 29.4 GB for a program"


def test_a_plan_says_what_to_change():
    changes = {"train.mesh.data": 64, "train.mesh.model": 4}
    words = {"train.mesh.data": "--mesh.data 64", "train.mesh.model": "--mesh.model 4"}
    tight, loose = outcome(temporaries=HUNDRED_GB), outcome(Layout(64, 4, 256, 1, True), **changes)
    found = verdict(record(tight, loose, best=1), words)
    assert found.startswith("As configured it does not run (needs 103.1 GB")
    assert "It fits with --mesh.data 64 --mesh.model 4. Largest batch that fits: 512 (compiled)." in found
    assert verdict(record(outcome(), best=0, largest=None), {}) == "It fits."
    assert "is quicker with --mesh.data 64" in verdict(record(outcome(), loose, best=1), words)
    assert verdict(record(tight, best=None, largest=None), {}).startswith("Nothing that was tried fits v6e:16x16.")


def test_what_is_printed_and_written_holds_every_part(tmp_path, capsys):
    found = record(outcome(), outcome(temporaries=HUNDRED_GB))
    print_plan(found, {})
    printed = capsys.readouterr().out
    for word in ("parameters", "optimiser", "activations and temporaries", "all-gather along data", "TFLOP", "ms",
                 "utilisation", "megabytes per second", "Largest batch", "Assumptions", "cloud.google"):  # fmt: skip
        assert word in printed
    write_outputs(found, {}, str(tmp_path / "figures.json"), str(tmp_path / "plan"))
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    page = (tmp_path / "plan" / "report.html").read_text()
    assert "Plan: tangerine pretrain" in page and "all-gather along data" in page
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["best"] == 0


# Whole plans ---------------------------------------------------------------------------------------------------------


def planned(system, stage, config, word, limit=1):
    found = plan.make_plan(system, stage, config, find_topology(word), limit, seconds=900)
    return found, read_outcomes(found)


@pytest.mark.multiprocess
def test_a_plan_from_the_command_line(tmp_path, capsys):
    words = ["plan", "tangerine", "pretrain", "--preset", "smoke", "--loader.batch-size", "8", "--topology", "h200x8"]
    assert main([*words, "--limit", "1", "--json", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,) = found["outcomes"]
    assert one["layout"] == {"data": 8, "model": 1, "batch": 8, "accumulation": 1, "remat": False}
    assert one["problem"] == "" and one["seconds"] > 0 and one["flops"] > 0
    assert set(one["sent"]) == {"data"}
    assert one["memory"]["parameters"] > 0 and one["memory"]["activations and temporaries"] > 0
    assert "It fits" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "plan").exists()


def wide(config, batch):
    """Return a shallow model of large leaves, so that what is sent is parameters and not biases."""
    encoder = dataclasses.replace(config.model.encoder, width=1024, hidden=4096, depth=2, heads=16, scan=True)
    model = dataclasses.replace(config.model, encoder=encoder)
    loader = dataclasses.replace(config.train.loader, batch_size=batch)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, loader=loader))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [8, 64, 256])
def test_what_is_sent_does_not_grow_with_the_batch(count):
    """Activations stay on their device: along the axis of the batch go parameters and gradients alone."""
    sent = []
    for batch in (count, 2 * count):
        _, (one,) = planned("tangerine", "pretrain", wide(pretrain.smoke(), batch), f"h200x{count}")
        assert one.runs and set(one.sent) == {"data"}
        assert {message[0] for message in one.messages} <= {"all-gather", "all-reduce", "reduce-scatter"}
        sent.append(one.sent["data"])
    assert sent[1] == pytest.approx(sent[0], rel=0.02)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("count", "model"), [(8, 2), (64, 4), (256, 8)])
def test_tensor_splits_send_along_their_own_axis_too(count, model):
    config = wide(pretrain.smoke(), 2 * count)
    mesh = dataclasses.replace(config.train.mesh, data=count // model, model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=mesh))
    _, (one,) = planned("tangerine", "pretrain", config, f"h200x{count}")
    assert one.runs and {"data", "model"} <= set(one.sent)
    # Two sums of activations for each of two blocks, forward and backward.
    calls = sum(message[3] for message in one.messages if message[:2] == ("all-reduce", "model"))
    assert calls >= 2 * 2 * 2
    # Queries, keys and values stay split by heads: no kernel is gathered along the tensor axis.
    gathered = sum(message[4] for message in one.messages if message[:2] == ("all-gather", "model"))
    assert gathered < 1024 * 3 * 1024 * 4 / model


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize(
    "name",
    ["tangerine adapt", "retfound pretrain", "retfound adapt", "profound pretrain", "profound adapt", "brainfm train",
     "cocolit train-diffusion"],
)  # fmt: skip
def test_the_step_of_every_stage_is_split_over_the_batch(name, count):
    """Tiny networks: gradients are summed, and no activation is exchanged."""
    config = load_stage(*name.split()).smoke()
    asked, _ = asked_layout(config)
    config = arrange(config, dataclasses.replace(asked, data=count, model=1, batch=count, accumulation=1))
    _, (one,) = planned(*name.split(), config, f"h200x{count}")
    assert one.runs, one.problem
    assert set(one.sent) <= {"data"}
    assert not {kind for kind, *_ in one.messages} & {"all-to-all", "collective-permute"}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_dinov2_compares_the_images_of_all_devices():
    """KoLeo and Sinkhorn-Knopp look at a whole batch: class tokens are gathered, images are not."""
    config = dataclasses.replace(retfound_pretrain.smoke(), method="dinov2")
    asked, _ = asked_layout(config)
    config = arrange(config, dataclasses.replace(asked, data=8, model=1, batch=16, accumulation=1))
    _, (one,) = planned("retfound", "pretrain", config, "cpu:8")
    assert one.runs, one.problem
    batch = one.memory["batch"]
    assert sum(payload for kind, _, _, _, payload, _ in one.messages if kind == "all-gather") < batch


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_large_volume_is_split_along_x():
    """Neighbouring planes are exchanged along the axis "model"; on a CPU convolutions split batches alone."""
    config, found = brainfm_train.smoke(), []
    for data, model in ((8, 1), (4, 2)):
        asked, _ = asked_layout(config)
        laid = arrange(config, dataclasses.replace(asked, data=data, model=model, batch=8, accumulation=1))
        _, (one,) = planned("brainfm", "train", laid, "h200x8")
        assert one.runs, one.problem
        found.append(one)
    assert "model" not in found[0].sent and "model" in found[1].sent


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan: the libtpu wheel")
@pytest.mark.parametrize("word", ["v5e:4x4", "v6e:4x4", "v5p:2x2x2"])
def test_a_tpu_is_compiled_for_without_one(word):
    found, (one,) = planned("tangerine", "pretrain", wide(pretrain.smoke(), find_topology(word).count), word)
    assert found["best"] == 0 and one.runs and one.seconds > 0
    assert set(one.sent) == {"data"}
    parts = {name: size for name, size in one.memory.items() if name != "padding of arguments"}
    assert parts["optimiser"] > parts["parameters"] > 0 and parts["activations and temporaries"] > 0
    # A chip computes its share of the traced products, and a TPU compiler adds little.
    assert 0.7 < one.flops * found["count"] / one.traced < 1.3

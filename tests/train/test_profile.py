"""What is read from a trace: shares against counting by hand, on events as CPUs, GPUs and TPUs write them."""

import gzip
import json

import pytest

from jaxmed.errors import InputError
from jaxmed.train.log import Log
from jaxmed.train.profile import WAIT, kind_of, read_trace, summarise, tell_profile, waited

pytestmark = pytest.mark.core


def cpu(name, start, length, tid=1, device="0"):
    args = {"hlo_op": name, "hlo_module": "jit_step", "device_ordinal": device}
    return {"ph": "X", "pid": 7, "tid": tid, "ts": start, "dur": length, "name": name, "args": args}


def plain(name, start, length, pid=7, tid=9):
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": length, "name": name}


def test_shares_add_up_and_a_moment_counts_once():
    events = [
        {"ph": "M", "pid": 7, "name": "process_name", "args": {"name": "/host:CPU"}},
        cpu("dot.1", 0, 40),
        cpu("copy.3", 30, 30, tid=2),  # 10 of it behind the product
        cpu("all-reduce.1", 50, 30, tid=3),  # 10 of it beside the copy, which counts for the collective
        plain(WAIT, 70, 20),  # 10 of it while the collective is at work
        plain("ThreadpoolListener::Record", 85, 5),
        cpu("add_multiply_fusion.2", 95, 5),
    ]
    profile = summarise(events)
    assert profile.seconds == pytest.approx(1e-4) and profile.devices == 1
    assert profile.shares == pytest.approx(
        {"compute": 0.45, "collectives": 0.3, "memory": 0.1, "input wait": 0.1, "other": 0.05}
    )
    assert [one.name for one in profile.operations] == ["dot.1", "copy.3", "all-reduce.1", "add_multiply_fusion.2"]
    assert profile.operations[0].share == pytest.approx(40 / 105) and profile.operations[0].count == 1


def test_a_loop_takes_what_its_body_does_not():
    events = [cpu("while.1", 0, 100), cpu("dot.1", 10, 20), cpu("dot.1", 40, 30), cpu("copy.1", 75, 5)]
    profile = summarise(events)
    own = {one.name: (one.seconds, one.count, one.kind) for one in profile.operations}
    assert own["while.1"] == (pytest.approx(45e-6), 1, "other")
    assert own["dot.1"] == (pytest.approx(50e-6), 2, "compute")
    # The loop itself is no work of a device: what is not in its body is other.
    assert profile.shares == pytest.approx(
        {"compute": 0.5, "collectives": 0.0, "memory": 0.05, "input wait": 0.0, "other": 0.45}
    )


def test_devices_are_averaged_and_lines_that_repeat_operations_left_out():
    events = []
    for pid in (1, 2):
        events += [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"/device:GPU:{pid - 1}"}},
            {"ph": "M", "pid": pid, "tid": 1, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
            {"ph": "M", "pid": pid, "tid": 2, "name": "thread_name", "args": {"name": "XLA Modules"}},
            plain("jit_step", 0, 100, pid, 2),
        ]
    events += [plain("loop_transpose_fusion", 0, 100, 1, 1)]
    named = plain("ncclDevKernel_AllReduce_Sum_f32", 0, 50, 2, 1) | {"args": {"hlo_op": "all-reduce-start.1"}}
    events += [named, plain("gemm_fusion_dot_3", 50, 50, 2, 1)]
    profile = summarise(events)
    assert profile.devices == 2
    assert profile.shares == pytest.approx(
        {"compute": 0.25, "collectives": 0.25, "memory": 0.5, "input wait": 0.0, "other": 0.0}
    )
    # Virtual devices of one CPU are told by their ordinals.
    assert summarise([cpu("dot.1", 0, 10, 1, "0"), cpu("dot.1", 0, 10, 2, "1")]).shares["compute"] == 1.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dot.12", "compute"), ("ynn_fusion.117", "compute"), ("broadcast_subtract_fusion.22", "compute"),
        ("fusion.3", "compute"), ("custom-call.2", "compute"), ("convolution.4", "compute"),
        ("copy_bitcast_fusion.12", "memory"), ("wrapped_broadcast.1", "memory"), ("dynamic-update-slice.7", "memory"),
        ("transpose.4", "memory"), ("MemcpyD2D", "memory"), ("copy-start.1", "memory"), ("pad.9.clone", "memory"),
        ("all-gather-start", "collectives"), ("reduce-scatter.1", "collectives"),
        ("collective-permute.1", "collectives"), ("ncclKernel_AllGather", "collectives"),
        ("while.3", "other"), ("call", "other"),
    ],
)  # fmt: skip
def test_operations_are_told_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_a_trace_is_read_from_its_folder_and_told(tmp_path):
    with pytest.raises(InputError, match="a trace of jax's profiler, found none; run with --profile STEPS"):
        read_trace(tmp_path)
    for number, name in enumerate(("dot.1", "copy.1")):
        place = tmp_path / "plugins" / "profile" / f"2026_0{number}" / "host.trace.json.gz"
        place.parent.mkdir(parents=True)
        with gzip.open(place, "wt") as file:
            json.dump({"traceEvents": [cpu(name, 5, 10)]}, file)
    log = Log(tmp_path, quiet=True)
    tell_profile(tmp_path, log)
    assert "memory 100.0%" in (tmp_path / "log.txt").read_text()
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["operations"][0] == {
        "name": "copy.1", "kind": "memory", "seconds": pytest.approx(1e-5), "share": 1.0, "count": 1,
    }  # fmt: skip
    place.write_bytes(place.read_bytes()[:40])
    with pytest.raises(InputError, match=r"host.trace.json.gz: expected a trace, found a damaged one"):
        read_trace(tmp_path)
    with gzip.open(place, "wt") as file:
        json.dump({"traceEvents": [plain("nothing", 0, 1)]}, file)
    assert read_trace(tmp_path) is None


def test_a_marked_stream_yields_the_same():
    assert list(waited(iter(range(4)))) == [0, 1, 2, 3]

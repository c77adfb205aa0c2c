"""Benchmarks report what the contract says, with figures that are what they claim to be."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

# benchmarks/ is a folder of scripts, not a package: they find each other beside themselves.
sys.path.insert(0, str(BENCHMARKS))
timing = importlib.import_module("timing")
run_all = importlib.import_module("run_all")

# contracts.md, section 6.
KEYS = [
    "name",
    "workload",
    "implementation",
    "unit",
    "median",
    "min",
    "max",
    "n",
    "compile_s",
    "flops",
    "bytes",
    "fraction_of_peak",
    "ratio_to_peer",
    "accuracy",
    "device",
    "load",
    "versions",
]

CONDITIONS = timing.Conditions(cores=(0, 1), load=0.1)
PEAK = timing.Peak(matmul_flops=100.0, copy_bytes_per_s=10.0)


def rows_with(ours, **peers):
    measurements = {"jaxmed": ours, **peers}
    return timing.make_rows("thing", "4 voxels", measurements, CONDITIONS, PEAK)


def script_environment():
    # The suite's eight virtual devices would divide the cores eight ways.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**environment, "PYTHONPATH": str(ROOT)}


def test_row_has_exactly_the_keys_of_the_contract_in_order():
    (row,) = rows_with(timing.Measurement((1.0, 2.0)))
    assert list(json.loads(row.to_json())) == KEYS


def test_alternate_times_calls_in_turn_after_one_warm_up():
    now, order = [0.0], []

    def advance(name, durations):
        remaining = iter(durations)

        def call():
            order.append(name)
            now[0] += next(remaining)

        return call

    functions = {"a": advance("a", [100, 1, 5, 3]), "b": advance("b", [100, 2, 2, 2])}
    seconds = timing.alternate(functions, repeats=3, clock=lambda: now[0])

    assert order == ["a", "b"] * 4
    assert seconds == {"a": (1.0, 5.0, 3.0), "b": (2.0, 2.0, 2.0)}
    (row,) = rows_with(timing.Measurement(seconds["a"]))
    assert (row.median, row.min, row.max, row.n) == (3.0, 1.0, 5.0, 3)


def test_short_calls_are_repeated_within_a_turn_and_told_one_by_one():
    now, calls = [0.0], []

    def short():
        calls.append(1)
        now[0] += 0.03

    seconds = timing.alternate({"a": short}, repeats=2, clock=lambda: now[0])
    # A warm-up, one to learn how long it takes, and two turns of one call that is not timed and four that are.
    assert len(calls) == 2 + 2 * 5
    assert seconds == {"a": pytest.approx((0.03, 0.03))}


def test_ratio_above_one_means_jaxmed_is_faster():
    rows = rows_with(
        timing.Measurement((1.0, 1.0, 9.0)),
        slower=timing.Measurement((4.0,), versions={"slower": "1.2"}),
        faster=timing.Measurement((0.5,)),
    )
    assert [row.implementation for row in rows] == ["jaxmed", "slower", "jaxmed", "faster"]
    assert [row.ratio_to_peer for row in rows] == [4.0, None, 0.5, None]
    assert rows[0].versions["slower"] == "1.2" and "slower" not in rows[2].versions


def test_fraction_of_peak_is_that_of_the_nearer_limit():
    computing = timing.Measurement((2.0,), flops=100.0, bytes=2.0)
    moving = timing.Measurement((2.0,), flops=20.0, bytes=16.0)
    assert timing.fraction_of_peak(2.0, computing, PEAK) == pytest.approx(0.5)
    assert timing.fraction_of_peak(2.0, moving, PEAK) == pytest.approx(0.8)
    assert timing.fraction_of_peak(2.0, timing.Measurement((2.0,)), PEAK) is None


def test_peer_on_another_device_is_not_set_against_this_peak():
    peer = timing.Measurement((4.0,), flops=1.0, device="other")
    _, row = rows_with(timing.Measurement((1.0,)), peer=peer)
    assert row.device == "other" and row.fraction_of_peak is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_refuse_what_strict_json_cannot_hold(bad, tmp_path, capsys):
    rows = rows_with(timing.Measurement((1.0,), accuracy={"ndi": bad}))
    with pytest.raises(ValueError, match="finite"):
        timing.emit(rows, tmp_path / "rows.jsonl")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_emit_prints_and_writes_the_same_lines(tmp_path, capsys):
    rows = rows_with(timing.Measurement((1.0,)), peer=timing.Measurement((2.0,)))
    timing.emit(rows, tmp_path / "deep" / "rows.jsonl")
    written = (tmp_path / "deep" / "rows.jsonl").read_text()
    assert capsys.readouterr().out == written
    assert [json.loads(line)["implementation"] for line in written.splitlines()] == [
        "jaxmed",
        "peer",
    ]


def test_peak_is_positive_and_finite():
    peak = timing.measure_peak(repeats=1)
    assert 1e8 < peak.matmul_flops < 1e17
    assert 1e8 < peak.copy_bytes_per_s < 1e15


def test_compile_apart_counts_a_matmul():
    numpy = pytest.importorskip("numpy")
    matrix = numpy.ones((64, 64), numpy.float32)
    compiled = timing.compile_apart(lambda x: x @ x, matrix)
    assert compiled.flops == pytest.approx(2 * 64**3, rel=0.1)
    assert compiled.seconds > 0
    assert float(compiled.call(matrix)[0, 0]) == 64


def test_pinned_process_has_one_core_and_one_thread_per_library():
    code = (
        "import os, timing; timing.pin(1); "
        "print(len(os.sched_getaffinity(0)), {os.environ[v] for v in timing.THREAD_VARIABLES})"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "{'1'}"]


def test_pin_refuses_more_cores_than_there_are():
    with pytest.raises(ValueError, match="at most"):
        timing.pin(100_000)


@pytest.mark.parametrize("changes", [{"repeats": 0}, {"cores": 0}])
def test_config_refuses_counts_below_one(changes):
    with pytest.raises(ValueError, match="1 or more"):
        timing.BenchmarkConfig(**changes)


def test_command_line_has_the_flags_of_the_contract():
    config = timing.parse_config("x", ["--size", "gpu", "--peer", "--json", "rows.jsonl"])
    expected = timing.BenchmarkConfig(size="gpu", peer=True, json=Path("rows.jsonl"))
    assert config == expected


def test_results_page_keeps_other_sizes_and_marks_high_load(tmp_path):
    (row,) = (dataclasses.asdict(row) for row in rows_with(timing.Measurement((1.0,))))
    run_all.write_results([row], run_all.RunAllConfig(size="gpu"), tmp_path)
    busy = {**row, "load": 3.0, "median": 7.0}
    run_all.write_results([busy], run_all.RunAllConfig(size="cpu", peer=True), tmp_path)
    run_all.write_results([busy], run_all.RunAllConfig(size="cpu", peer=True), tmp_path)

    page = (tmp_path / "RESULTS.md").read_text()
    assert page.index("## cpu") < page.index("## gpu")
    assert page.count("## cpu") == page.count("## gpu") == 1
    assert "run_all.py --size cpu --peer`" in page
    assert "7 s*" in page and "1 s |" in page
    assert json.loads((tmp_path / "results" / "cpu.jsonl").read_text()) == busy


def test_partial_run_keeps_the_rows_of_other_benchmarks(tmp_path):
    (row,) = (dataclasses.asdict(row) for row in rows_with(timing.Measurement((1.0,))))
    other = {**row, "name": "other"}
    run_all.write_results([row, other], run_all.RunAllConfig(), tmp_path)
    run_all.write_results([{**row, "median": 5.0}], run_all.RunAllConfig(only=("thing",)), tmp_path)
    kept = run_all.read_rows(tmp_path / "results" / "smoke.jsonl")
    assert [(row["name"], row["median"]) for row in kept] == [("other", 1.0), ("thing", 5.0)]


def test_noddi_smoke_prints_rows_that_recover_the_parameters(tmp_path):
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "bench_noddi.py"), "--repeats", "1"]
    found = subprocess.run(
        [*command, "--json", str(output)],
        env=script_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == output.read_text()
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(row["name"], row["implementation"]) for row in rows] == [("noddi_fit", "jaxmed")] * 2
    for row in rows:
        assert list(row) == KEYS
        assert 0 < row["fraction_of_peak"] < 1
        # Guessing the mean of a uniform parameter has a root-mean-square error of 0.29.
        assert row["accuracy"]["ndi_tissue"] < 0.12 and row["accuracy"]["fwf"] < 0.12
    least_squares, rician = rows
    # The noise floor biases least squares; the likelihood that knows of it does not suffer.
    assert rician["accuracy"]["ndi_tissue"] < least_squares["accuracy"]["ndi_tissue"]


@pytest.mark.peers
def test_noddi_peer_stands_beside_jaxmed_and_neither_is_lost():
    command = [sys.executable, str(BENCHMARKS / "bench_noddi.py"), "--peer", "--repeats", "1"]
    found = subprocess.run(command, env=script_environment(), capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["implementation"] for row in rows] == ["jaxmed", "AMICO"] * 2
    ours, peer = rows[:2]
    assert ours["ratio_to_peer"] == pytest.approx(peer["median"] / ours["median"])
    assert peer["ratio_to_peer"] is None and peer["compile_s"] > 0
    assert peer["versions"]["dmri-amico"] != "not installed"
    # Both fit the same signals: AMICO's files, axes and units are right only if it recovers them too.
    for name in ("ndi_tissue", "fwf"):
        assert peer["accuracy"][name] < 0.12

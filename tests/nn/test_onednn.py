"""When oneDNN's call is made, and that it is XLA's own convolution."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import doctor
from jaxmed.errors import InputError
from jaxmed.nn import onednn

pytestmark = pytest.mark.core
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Decide anew, without a compilation cache and without this shell's switch; forget it afterwards."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(onednn.SWITCH, raising=False)
    onednn._examine.cache_clear()
    yield
    onednn._examine.cache_clear()
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture
def supported(monkeypatch, tmp_path):
    """A machine that has everything; returns a function that changes the instructions that its processor names."""
    monkeypatch.setattr(onednn.sys, "platform", "linux")
    monkeypatch.setattr(onednn.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn, "JAXLIB", onednn.TESTED[0])
    monkeypatch.setattr(onednn, "_try", lambda dtype: None)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    processor = tmp_path / "cpuinfo"
    monkeypatch.setattr(onednn, "PROCESSOR", processor)

    def name_instructions(flags):
        processor.write_text(f"processor : 0\nflags : fpu {flags}\n\nprocessor : 1\nflags : fpu {flags}\n")

    name_instructions("avx2 avx512f avx512_bf16")
    return name_instructions


def test_the_list_is_what_continuous_integration_installs():
    pinned = {re.search(r"^jaxlib==(.+)$", path.read_text(), re.M)[1] for path in CONSTRAINTS.glob("python*.txt")}
    assert set(onednn.TESTED) == pinned


def test_a_supported_machine_takes_the_call(supported):
    road = onednn.find_road()
    assert road.name == "onednn" and road.dtypes == ("float32", "bfloat16")
    assert road.reason == f"jaxlib {onednn.TESTED[0]} carries it and the processor computes float32 and bfloat16"


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [
        ("sse4_2 avx", ()),
        ("avx avx2", ("float32",)),
        ("avx512f", ("float32",)),
        ("avx2 amx_bf16", ("float32", "bfloat16")),
    ],
)
def test_the_processor_is_asked(supported, flags, dtypes, capsys):
    supported(flags)
    road = onednn.find_road()
    assert road.dtypes == dtypes and (road.name == "onednn") == bool(dtypes)
    assert doctor.examine() == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "convolutions" in line)
    assert (
        told == f"  convolutions on the CPU: {'oneDNN' if dtypes else 'XLA, several times slower in 3D'}; {road.reason}"
    )
    if not dtypes:
        assert road.reason == "the processor has neither AVX2 nor AVX-512"


def test_hidden_instructions_forbid_bfloat16(supported, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert onednn.find_road().dtypes == ("float32",)


def test_other_versions_take_the_old_road_unless_asked(supported, monkeypatch, capsys):
    monkeypatch.setattr(onednn, "JAXLIB", "0.99.0")
    assert onednn.find_road()[:2] == (
        "xla", f"jaxlib 0.99.0 is none of the tested versions {', '.join(onednn.TESTED)}"
    )  # fmt: skip
    assert doctor.examine() == 0 and "jaxlib 0.99.0 is none of the tested versions" in capsys.readouterr().out
    monkeypatch.setenv(onednn.SWITCH, "onednn")
    assert onednn.find_road().name == "onednn"


@pytest.mark.parametrize(
    ("system", "machine", "reason"),
    [("darwin", "arm64", "jaxlib carries no oneDNN on "), ("linux", "aarch64", "tested on x86_64, not on aarch64")],
)
def test_other_machines_take_the_old_road(supported, monkeypatch, system, machine, reason):
    monkeypatch.setattr(onednn.sys, "platform", system)
    monkeypatch.setattr(onednn.platform, "machine", lambda: machine)
    road = onednn.find_road()
    assert road.name == "xla" and reason in road.reason


def test_the_switch(supported, monkeypatch, capsys):
    monkeypatch.setenv(onednn.SWITCH, "xla")
    assert onednn.find_road() == onednn.Road("xla", "JAXMED_CONVOLUTION=xla")
    monkeypatch.setenv(onednn.SWITCH, "fast")
    with pytest.raises(InputError, match="JAXMED_CONVOLUTION: expected auto, onednn or xla, found fast"):
        onednn.find_road()
    assert doctor.examine() == 0 and "expected auto, onednn or xla, found fast" in capsys.readouterr().out
    monkeypatch.setenv(onednn.SWITCH, "onednn")
    supported("sse4_2")
    with pytest.raises(InputError, match="because the processor has neither AVX2 nor AVX-512, found onednn"):
        onednn.find_road()


def test_no_call_where_programs_are_stored(supported, monkeypatch, tmp_path):
    """Looked at every time: the folder may be set after the first convolution."""
    assert onednn.find_road().name == "onednn"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    road = onednn.find_road()
    assert road.name == "xla" and "persistent compilation cache" in road.reason
    monkeypatch.setenv(onednn.SWITCH, "onednn")
    with pytest.raises(InputError, match="persistent compilation cache"):
        onednn.find_road()


def fails(x, kernel, *others):
    raise RuntimeError("Custom call target is not supported\nand more")


def errs(x, kernel, *others):
    return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)


@pytest.mark.parametrize(
    ("call", "reason"),
    [(fails, "oneDNN's call failed: Custom call target is not supported"), (errs, "float32 came out wrong by 1.0e+00")],
)
def test_a_call_that_fails_or_errs_is_not_made(monkeypatch, supported, call, reason):
    monkeypatch.undo()
    onednn._examine.cache_clear()
    monkeypatch.setattr(onednn, "JAXLIB", onednn.TESTED[0])
    monkeypatch.setattr(onednn, "_processor_types", lambda machine: ("float32",))
    monkeypatch.setattr(onednn, "convolve", call)
    road = onednn.find_road()
    assert road.name == "xla" and reason in road.reason


def needs_onednn():
    road = onednn.find_road()
    if road.name == "xla":
        pytest.skip(f"no call of oneDNN's here: {road.reason}")
    return road


def test_the_decision_may_fall_while_a_program_is_traced():
    roads = []
    jax.jit(jax.vmap(lambda x: roads.append(onednn.find_road()) or x))(jnp.ones(3))
    onednn._examine.cache_clear()
    assert roads == [onednn.find_road()]


def test_several_calls_may_be_mapped_over():
    needs_onednn()
    rng = np.random.default_rng(2)
    x, kernel = rng.random((3, 2, 5, 6, 4), np.float32), rng.random((3, 3, 3, 4, 8), np.float32)

    def one(x, kernel):
        return onednn.convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))

    found = jax.jit(jax.vmap(one))(x, kernel)
    np.testing.assert_array_equal(found, [jax.jit(one)(*pair) for pair in zip(x, kernel, strict=True)])


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "edges", "groups"),
    [
        ((2, 7, 6, 5, 3), (3, 3, 3, 3, 20), (1, 1, 1), ((1, 1),) * 3, 1),
        ((1, 9, 8, 16), (3, 5, 16, 8), (2, 1), ((1, 1), (0, 4)), 1),
        ((1, 6, 5, 7, 6), (7, 7, 7, 1, 6), (1, 1, 1), ((3, 3),) * 3, 6),
        ((3, 2, 3, 8), (2, 3, 2, 12), (1, 3), ((5, 0), (0, 7)), 4),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_call_is_xlas_convolution(shape, kernel, strides, edges, groups, dtype):
    if dtype not in needs_onednn().dtypes:
        pytest.skip(f"this processor has no {dtype}")
    rng = np.random.default_rng(0)
    x, k = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=kernel), dtype)
    found = jax.jit(lambda x, k: onednn.convolve(x, k, strides, edges, groups))(x, k)
    axes = "XYZ"[: len(strides)]
    order = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    expected = jax.lax.conv_general_dilated(
        x.astype("float32"), k.astype("float32"), strides, edges, dimension_numbers=order, feature_group_count=groups
    )
    assert found.dtype == dtype and found.shape == expected.shape
    tolerance = (1e-5 if dtype == "float32" else 1e-2) * float(jnp.abs(expected).max())
    np.testing.assert_allclose(found.astype("float32"), expected, atol=tolerance)

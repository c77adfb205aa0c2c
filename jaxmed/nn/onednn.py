"""Convolutions by the oneDNN inside jaxlib, on processors and in versions where that call is known to run.

jaxlib for Linux carries oneDNN and runs it from the custom call `__onednn$convolution`. XLA no longer emits that call
for convolutions and nobody promises it: a configuration it does not like, or a type the processor does not have, ends
the process instead of raising. So it is made in the exact versions whose continuous integration runs
`tests/nn/test_onednn.py`, on processors that name the instructions it needs, and after one small convolution whose
result is compared, once in a process. Everywhere else convolutions stay XLA's.

`JAXMED_CONVOLUTION=xla` forbids the call. `JAXMED_CONVOLUTION=onednn` asks for it in other versions of jaxlib too, at
your own risk, and is an error where there is nothing to call. `jaxmed doctor` tells what was decided, and why.
"""

import functools
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.version import __version__ as JAXLIB
from jaxtyping import Array, Float

from jaxmed.errors import InputError

TESTED = ("0.10.2", "0.12.0.1")  # jaxlib; those of constraints/
SWITCH = "JAXMED_CONVOLUTION"
PROCESSOR = Path("/proc/cpuinfo")


class Road(NamedTuple):
    """Who computes the convolutions of a CPU.

    Attributes:
        name: "onednn" or "xla".
        reason: Why, in words for `jaxmed doctor`.
        dtypes: Types that oneDNN computes; none where XLA computes everything.
    """

    name: Literal["onednn", "xla"]
    reason: str
    dtypes: tuple[str, ...] = ()


def find_road() -> Road:
    """Decide who computes the convolutions of this process's CPU.

    Raises:
        InputError: `JAXMED_CONVOLUTION` is no road, or asks for oneDNN where it cannot run.
    """
    wish = os.environ.get(SWITCH, "auto")
    if wish not in ("auto", "onednn", "xla"):
        raise InputError(SWITCH, "auto, onednn or xla", wish)
    if wish == "xla":
        return Road("xla", f"{SWITCH}=xla")
    # jaxlib mistakes the call's thunk for another kind when it serialises a program, and reads memory that is not
    # the thunk's: std::bad_alloc in 0.10.2, anything elsewhere. Looked at every time: the folder may be set late.
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        road = Road("xla", "JAX's persistent compilation cache is on, and cannot store oneDNN's call")
    else:
        road = _examine(is_forced=wish == "onednn")
    if wish == "onednn" and road.name == "xla":
        raise InputError(SWITCH, f"auto or xla here, because {road.reason}", wish)
    return road


@functools.cache
def _examine(is_forced: bool) -> Road:
    """Decide by platform, version, processor and one small convolution."""
    version, machine = JAXLIB, platform.machine()
    if sys.platform != "linux":
        return Road("xla", f"jaxlib carries no oneDNN on {platform.system()}")
    if machine != "x86_64" and not is_forced:
        return Road("xla", f"oneDNN is tested on x86_64, not on {machine}")
    if version not in TESTED and not is_forced:
        return Road("xla", f"jaxlib {version} is none of the tested versions {', '.join(TESTED)}")
    dtypes = _processor_types(machine)
    if not dtypes:
        return Road("xla", "the processor has neither AVX2 nor AVX-512")
    failure = next(filter(None, map(_try, dtypes)), None)
    if failure:
        return Road("xla", f"oneDNN's call failed: {failure}")
    return Road("onednn", f"jaxlib {version} carries it and the processor computes {' and '.join(dtypes)}", dtypes)


def _processor_types(machine: str) -> tuple[str, ...]:
    """Return the types that oneDNN computes on this processor; bfloat16 without its instructions is fatal."""
    lines = PROCESSOR.read_text().splitlines() if PROCESSOR.exists() else []
    named = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    flags = set(named.partition(":")[2].split())
    if machine == "x86_64" and not flags & {"avx2", "avx512f"}:
        return ()
    # These hide instructions from oneDNN that the processor has.
    is_capped = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    has_bfloat16 = bool(flags & {"avx512_bf16", "amx_bf16"})
    return ("float32", "bfloat16") if has_bfloat16 and not is_capped else ("float32",)


def _try(dtype: str) -> str | None:
    """Compare one small convolution with its sum of products; return what went wrong."""
    rng = np.random.default_rng(0)
    x, kernel = rng.random((2, 4, 4, 8), np.float32), rng.random((3, 3, 8, 16), np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    try:
        given = [np.asarray(array, jnp.dtype(dtype)) for array in (x, kernel)]
        # Compiled apart and given what is no array of JAX's, it runs at once even where a program is being traced.
        with jax.default_device(jax.devices("cpu")[0]):
            program = jax.jit(lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))).lower(*given).compile()
        found = np.asarray(program(*given), np.float32)
    except RuntimeError as error:  # XLA knows no such call, or refuses its configuration
        return str(error).splitlines()[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return None if error < (1e-5 if dtype == "float32" else 2e-2) else f"{dtype} came out wrong by {error:.1e}"


def convolve(
    x: Float[Array, "batch *space channel"],
    kernel: Float[Array, "*window group_channel feature"],
    strides: Sequence[int],
    edges: Sequence[tuple[int, int]],
    groups: int = 1,
) -> Float[Array, "batch *space2 feature"]:
    """Call oneDNN; only where `find_road` says so, on a CPU.

    Args:
        x: Images or volumes, float32 or bfloat16.
        kernel: Of the same type.
        strides: Voxels between windows, along each axis.
        edges: Zeros before and after each axis; none negative.
        groups: Groups of channels, each with features of its own.
    """
    axes, space = x.ndim, x.ndim - 2
    # Everything says how many axes there are, the top level too: without it the process ends.
    tensor = {
        "dims": axes,
        "data": {"batch_dim": 0, "feature_dim": axes - 1, "spatial_dims": list(range(1, axes - 1))},
    }
    filters = {"input_feature_dim": axes - 2, "output_feature_dim": axes - 1, "spatial_dims": list(range(space))}
    window = {
        "size": [],
        "pad_left": [before for before, _ in edges],
        "pad_right": [after for _, after in edges],
        "strides": list(strides),
        "window_dilations": [1] * space,
    }
    config = {
        "dims": axes,
        "input": tensor,
        "output": tensor,
        "kernel": {"dims": axes, "filter": filters},
        "window": window,
        "feature_groups": groups,
    }
    lengths = [
        (length + before + after - edge) // stride + 1
        for length, edge, stride, (before, after) in zip(x.shape[1:-1], kernel.shape, strides, edges, strict=False)
    ]
    return jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct((x.shape[0], *lengths, kernel.shape[-1]), x.dtype),
        custom_call_api_version=2,
        vmap_method="sequential",
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )(x, kernel)

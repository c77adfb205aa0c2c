"""Estimate NODDI by a network: row `noddi_nn`, peers ONNX Runtime and PyTorch.

Two workloads. "signals" starts from signals in host memory and ends with parameters in host memory: the network alone
(3 x 256 ELU, 90 weighted rows, division by the mean unweighted signal included). "files" is a whole brain from NIfTI to
NIfTI, reading, checking, masking and writing included, within a running process; its peer is scripts/noddi_onnx.py,
which needs onnxruntime, numpy and nibabel alone. All run the same parameters, so that accuracy is the largest
difference from jaxmed. PyTorch runs compiled, in inference mode, in the same blocks of voxels.
"""

import functools
import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import (
    Conditions,
    Measurement,
    alternate,
    describe_cpu,
    emit,
    first_call,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.io import onnx
from jaxmed.io.gradient_match import Table
from jaxmed.models.mlp import Mlp, MlpConfig, layers
from jaxmed.models.published.signal_network import Description, Network, export_onnx
from jaxmed.nn.model import make_model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ForwardConfig, simulate
from jaxmed.recipes.diffusion_scan import make_maps, read_signals, write_maps
from jaxmed.synthesis.phantoms.write import DiffusionFiles, write_diffusion_slab
from jaxmed.systems.noddi.network import CHUNK, outputs_of, predict, ranges

VOXELS = {"smoke": 5_000, "cpu": 250_000, "gpu": 4_000_000}
# Of the brain in files; the second has 250,000 voxels inside.
SHAPES = {"smoke": (24, 28, 4), "cpu": (84, 98, 51), "gpu": (84, 98, 51)}
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "noddi_onnx.py"


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    size = "gpu" if config.size == "pod" else config.size
    peak = measure_peak()
    network = make_network()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(folder / "network.onnx", network)
        measured = measure_signals(network, folder, VOXELS[size], conditions, config.repeats, config.peer)
        rows = make_rows("noddi_nn", f"{VOXELS[size]} voxels x 99 rows, signals", measured, conditions, peak)
        files = write_diffusion_slab(folder / "scan", 0, SHAPES[size], 30.0)
        measured, voxels = measure_files(network, folder, files, conditions, config.repeats, config.peer)
        rows += make_rows("noddi_nn", f"{voxels} voxels x 99 rows, files", measured, conditions, peak)
    emit(rows, config.json)


def make_network() -> Network:
    """Draw a network for the two-shell protocol: speed does not depend on what it has learnt."""
    bvals, bvecs = two_shell_protocol()
    table, shape, forward = Table.make(bvals, bvecs, 50.0), MlpConfig(), ForwardConfig()
    outputs = outputs_of(forward.build(bvals))
    inputs = int((~table.is_b0).sum())
    params = make_model(Mlp(shape, len(outputs))).init(jax.random.key(0), jnp.ones((1, inputs)))
    return Network(params, Description(shape, outputs, table, forward, "none", (30.0, 30.0)))


# --- Signals ---------------------------------------------------------------------------------


def measure_signals(
    network: Network, folder: Path, count: int, conditions: Conditions, repeats: int, peer: bool
) -> dict[str, Measurement]:
    """Time the network on signals in memory."""
    signals = draw_signals(network, count)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": functools.partial(predict, network, signals)}
    if peer:
        session = onnx.load(folder / "network.onnx", len(conditions.cores))
        functions["ONNX Runtime"] = functools.partial(session.run, signals)
        functions["PyTorch"] = functools.partial(run_torch, make_torch(network, len(conditions.cores)), signals)
    first = {name: first_call(function) for name, function in functions.items()}
    seconds = alternate(functions, repeats)
    return describe_all(functions, seconds, first, count_flops(network, count), signals.nbytes + 12 * count, conditions)


def draw_signals(network: Network, count: int) -> np.ndarray:
    """Simulate voxels in blocks, SNR 30, S0 = 1000."""
    table = network.description.table
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    model = network.description.forward.build(bvals)
    draw = jax.jit(lambda key: 1000 * simulate(key, model, 10_000, bvals, bvecs, (30.0, 30.0)).signals)
    # A few blocks are repeated: a multiplication takes as long whatever the numbers are.
    blocks = [np.asarray(draw(jax.random.key(seed))) for seed in range(min(25, math.ceil(count / 10_000)))]
    return np.resize(np.concatenate(blocks), (count, len(bvals)))


def count_flops(network: Network, count: int) -> float:
    """Count two operations per weight and voxel, one per activation and per division."""
    shapes = [kernel.shape for kernel, _ in layers(network.params)]
    per_voxel = sum(2 * inputs * outputs + 2 * outputs for inputs, outputs in shapes) + shapes[0][0]
    return float(per_voxel) * count


def make_torch(network: Network, threads: int) -> Any:
    """Build the same network in PyTorch, compiled."""
    import torch

    torch.set_num_threads(threads)
    kernels = layers(network.params)
    modules: list[torch.nn.Module] = []
    for number, (kernel, bias) in enumerate(kernels):
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
        modules += [linear, torch.nn.Sigmoid() if number == len(kernels) - 1 else torch.nn.ELU()]
    body = torch.nn.Sequential(*modules)
    is_b0 = torch.tensor(network.description.table.is_b0)
    low, span = (torch.tensor(end) for end in ranges(network.description.outputs))

    def estimate(signals: torch.Tensor) -> torch.Tensor:
        return low + span * body(signals[:, ~is_b0] / signals[:, is_b0].mean(dim=1, keepdim=True))

    return torch.compile(estimate)


def run_torch(estimate: Any, signals: np.ndarray) -> np.ndarray:
    """Run it in blocks of one size, the last filled up, so that it compiles once."""
    import torch

    size = min(CHUNK, len(signals))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(signals), size):
            block = signals[start : start + size]
            filled = np.pad(block, ((0, size - len(block)), (0, 0)), mode="edge")
            parts.append(estimate(torch.from_numpy(filled)).numpy()[: len(block)])
    return np.concatenate(parts)


def describe_all(
    functions: dict[str, Callable[[], Any]],
    seconds: dict[str, tuple[float, ...]],
    first: dict[str, float],
    flops: float,
    moved: float,
    conditions: Conditions,
) -> dict[str, Measurement]:
    """Turn times into measurements, with the largest difference from jaxmed's answer as accuracy."""
    packages = {"PyTorch": "torch", "ONNX Runtime": "onnxruntime", "noddi_onnx.py": "onnxruntime"}
    expected = functions["jaxmed"]()
    found = {}
    for name, function in functions.items():
        largest = float(np.abs(function() - expected).max())
        is_ours = name == "jaxmed"
        found[name] = Measurement(
            seconds[name],
            compile_s=max(0.0, first[name] - statistics.median(seconds[name])),
            flops=flops,
            bytes=moved,
            accuracy={"largest_difference": largest},
            versions={} if is_ours else versions(packages[name]),
            device=None if is_ours else describe_cpu(conditions.cores),
        )
    return found


# --- Files -----------------------------------------------------------------------------------


def measure_files(
    network: Network, folder: Path, files: DiffusionFiles, conditions: Conditions, repeats: int, peer: bool
) -> tuple[dict[str, Measurement], int]:
    """Time a scan from files to files."""
    functions: dict[str, Callable[[], Any]] = {
        "jaxmed": functools.partial(run_files, network, files, folder / "jaxmed")
    }
    if peer:
        functions["noddi_onnx.py"] = functools.partial(run_script, files, folder, len(conditions.cores))
    first = {name: first_call(function) for name, function in functions.items()}
    seconds = alternate(functions, repeats)
    voxels = len(functions["jaxmed"]())
    moved = files.dwi.stat().st_size + 12 * voxels
    return describe_all(functions, seconds, first, count_flops(network, voxels), moved, conditions), voxels


def run_files(network: Network, files: DiffusionFiles, out: Path) -> np.ndarray:
    """Do what `jaxmed noddi predict` does, without its report."""
    about = network.description
    scan, signals = read_signals(files.dwi, files.bvals, files.bvecs, files.mask, about.table)
    values = predict(network, signals)
    maps = make_maps(values, scan, about.outputs)
    said = {one.name: (maps[one.name].array, one.definition, one.unit) for one in about.outputs}
    write_maps(out, said, scan, about.constants)
    return values


def run_script(files: DiffusionFiles, folder: Path, threads: int) -> np.ndarray:
    """Do what scripts/noddi_onnx.py does, within this process."""
    import contextlib
    import sys

    import nibabel as nib

    script = load_script()
    arguments = SimpleNamespace(
        network=folder / "network.onnx", dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask,
        out=folder / "script", threads=threads,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        script.run(arguments)
    mask = np.asanyarray(nib.load(files.mask).dataobj) > 0
    maps = [
        np.asanyarray(nib.load(folder / "script" / f"{name}.nii.gz").dataobj)[mask] for name in ("ndi", "odi", "fwf")
    ]
    return np.stack(maps, axis=1)


@functools.cache
def load_script() -> Any:
    """Import the script, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("noddi_onnx", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()

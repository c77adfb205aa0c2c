"""Stage `jaxmed noddi export`: a trained network as ONNX, for a scanner."""

import dataclasses
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import Seed, checked
from jaxmed.errors import InputError
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import simulate
from jaxmed.systems.noddi.deployment import export_onnx, load_onnx, run_onnx
from jaxmed.systems.noddi.export_page import write_page
from jaxmed.systems.noddi.network import Network, load, predict, predict_exactly, ranges
from jaxmed.systems.noddi.reading import require_path
from jaxmed.systems.noddi.stages import train as training
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary

LARGEST_DIFFERENCE = 1e-6
"""Allowed between ONNX Runtime and jax in double precision, as a share of each parameter's range."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Write a network as ONNX, and check it against ONNX Runtime.

    Attributes:
        weights: Run folder of `jaxmed noddi train`, or its outputs/model.
        rows: Simulated voxels on which ONNX Runtime and jax must agree.
        embedded: Train a tiny network first where none is given.
        seed: Of the rows, and of the embedded network.
    """

    weights: Path | None = None
    rows: int = 100_000
    embedded: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows: expected 1 or more, found {self.rows}")


def paper() -> Config:
    """Your network, checked on 100,000 rows."""
    return Config()


def smoke() -> Config:
    """Your network, or a tiny one trained for the embedded protocol, in seconds."""
    return Config(rows=5000, embedded=True)


def run(config: Config, folder: RunFolder) -> None:
    """Read the network, write it, compare the two runtimes, write the report."""
    if config.embedded and config.weights is None:
        start(folder)
        log = Log(folder.path, folder.options.quiet)
        key, (bvals, bvecs) = jax.random.key(config.seed), two_shell_protocol()
        network = training.train_in_folder(key, bvals, bvecs, training.smoke().train, folder, log).network
    else:
        network = load(require_path(config.weights, "weights"))
        start(folder)
        log = Log(folder.path, folder.options.quiet)
    path = folder.outputs / "network.onnx"
    export_onnx(path, network)
    rows = draw_rows(network, config.rows, config.seed)
    differences, single, seconds = compare(path, network, rows)
    largest = max(differences.values())
    if not largest < LARGEST_DIFFERENCE:
        raise InputError(path, f"ONNX Runtime within {LARGEST_DIFFERENCE:g} of jax", f"{largest:.3g}", "report this")
    log.say(
        f"ONNX Runtime and jax in double precision differ by at most {largest:.2g} on {config.rows:,} rows, "
        f"jax in single precision by {single:.2g}."
    )
    description = network.description
    summary = {
        "rows": config.rows,
        "bytes": path.stat().st_size,
        "largest_difference": largest,
        "differences": differences,
        "single_precision": single,
        "protocol": description.table.hash,
        "images": len(description.table.bvals),
        "outputs": [dataclasses.asdict(output) for output in description.outputs],
        "rates": {name: config.rows / value for name, value in seconds.items()},
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed noddi export --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": seconds,
    }
    write_summary(folder, summary)
    log.metrics(config.rows, {"largest_difference": largest})
    write_page(folder.path)


report = write_page


def draw_rows(network: Network, count: int, seed: int) -> np.ndarray:
    """Simulate magnitudes as a scanner gives them: S0 of 500, some voxels without signal."""
    table = network.description.table
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    model = network.description.forward.build(bvals)
    draw = jax.jit(lambda key: simulate(key, model, min(count, 8192), bvals, bvecs).signals)
    key = jax.random.key(seed)
    parts = [np.asarray(draw(jax.random.fold_in(key, start))) for start in range(0, count, 8192)]
    rows = 500 * np.concatenate(parts)[:count]
    rows[::1000] = 0
    return rows


def compare(path: Path, network: Network, rows: np.ndarray) -> tuple[dict[str, float], float, dict[str, float]]:
    """Compare two runtimes on the same rows.

    Returns:
        The largest difference of each output between ONNX Runtime and jax in double precision, as a share of its
        range; the same between jax in single precision, as `predict` runs it, and in double, over all outputs; and the
        seconds of both runtimes.
    """
    deployed = load_onnx(path)
    seconds, found = {}, {}
    for name, call in (("ONNX Runtime", lambda: run_onnx(deployed, rows)), ("jax", lambda: predict(network, rows))):
        call()  # compilation and first allocation
        began = time.monotonic()
        found[name] = call()
        seconds[name] = time.monotonic() - began
    exact = predict_exactly(network, rows)
    _, span = ranges(network.description.outputs)
    error = {name: (np.abs(values - exact) / span).max(axis=0) for name, values in found.items()}
    names = network.description.names
    differences = {name: float(value) for name, value in zip(names, error["ONNX Runtime"], strict=True)}
    return differences, float(error["jax"].max()), seconds

"""Stage `jaxmed noddi export`: a trained network as ONNX, for a scanner."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import Count, Seed, checked
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import onnx
from jaxmed.io.maps import Quantity
from jaxmed.models.published.signal_network import Network, export_onnx, load_network
from jaxmed.physics.microstructure import simulate
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.page import Section, Table, Text
from jaxmed.systems.noddi.network import predict, predict_exactly, ranges
from jaxmed.train.run_folder import RunFolder

LARGEST_DIFFERENCE = 1e-6
"""Allowed between ONNX Runtime and jax in double precision, as a share of each parameter's range."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Write a network as ONNX, and check it against ONNX Runtime.

    Attributes:
        weights: Run folder of `jaxmed noddi train`, or its outputs/model.
        rows: Simulated voxels on which ONNX Runtime and jax must agree.
        synthetic: Train a tiny network first where none is given.
        seed: Seed of the rows, and of the tiny network.
    """

    weights: Path | None = None
    rows: Count = 100_000
    synthetic: bool = False
    seed: Seed = 0


def paper() -> Config:
    """Your network, checked on 100,000 rows."""
    return Config()


def smoke() -> Config:
    """Your network, or a tiny one trained for a two-shell protocol, in seconds."""
    return Config(rows=5000, synthetic=True)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an export found.

    Attributes:
        largest_difference: Between ONNX Runtime and jax in double precision, as a share of the range.
        differences: The same of each output.
        single_precision: Between jax in single precision, as predict runs it, and in double.
        protocol: Hash of the table.
    """

    rows: int
    bytes: int
    largest_difference: float
    differences: dict[str, float]
    single_precision: float
    protocol: str
    images: int
    outputs: tuple[Quantity, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read the network, write it, compare the two runtimes, write the report."""
    clock, network = Clock(), None
    if config.weights is not None or not config.synthetic:
        network = load_network(require_given(config.weights, "weights"))
    log = begin(folder)
    if network is None:
        trained = nested_run(folder, "noddi train", {"seed": config.seed}, log, "Training a tiny network.")
        network = load_network(trained.path)
        clock.lap("train a tiny network")
    path = folder.outputs / "network.onnx"
    export_onnx(path, network)
    rows = draw_rows(network, config.rows, config.seed)
    clock.lap("read, write and simulate")
    found = compare(path, network, rows, clock)
    exact = predict_exactly(network, rows)
    description = network.description
    _, span = ranges(description.outputs)
    error = {name: (np.abs(values - exact) / span).max(axis=0) for name, values in found.items()}
    largest, single = (float(error[name].max()) for name in ("ONNX Runtime", "jax"))
    if not largest < LARGEST_DIFFERENCE:
        raise InputError(path, f"ONNX Runtime within {LARGEST_DIFFERENCE:g} of jax", f"{largest:.3g}", "report this")
    log.say(
        f"ONNX Runtime and jax in double precision differ by at most {largest:.2g} on {config.rows:,} rows, "
        f"jax in single precision by {single:.2g}."
    )
    log.metrics(config.rows, {"largest_difference": largest})
    summary = Summary(
        rows=config.rows,
        bytes=path.stat().st_size,
        largest_difference=largest,
        differences=dict(zip(description.names, error["ONNX Runtime"].tolist(), strict=True)),
        single_precision=single,
        protocol=description.table.hash,
        images=len(description.table.bvals),
        outputs=description.outputs,
    )
    finish(folder, config, summary, clock, page)


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


def compare(path: Path, network: Network, rows: np.ndarray, clock: Clock) -> dict[str, np.ndarray]:
    """Return what ONNX Runtime and jax in single precision make of the same rows; both are timed when warm."""
    session, found = onnx.load(path), {}
    for name, call in (("ONNX Runtime", lambda: session.run(rows)), ("jax", lambda: predict(network, rows))):
        call()
        clock.lap("compile, and allocate for the first time")
        found[name] = call()
        clock.lap(name)
    return found


def page(run: Finished[Config, Summary]) -> Page:
    """Show what the file computes, how near the runtimes are, and how to use it."""
    summary = run.summary
    rows = [
        (output.name, output.definition, output.unit, *output.bounds, summary.differences[output.name])
        for output in summary.outputs
    ]
    caption = (
        "Columns of the output. Difference: the largest between ONNX Runtime and jax in double precision, as a share "
        f"of the range; jax in single precision, as predict runs it, is {summary.single_precision:.1e} away."
    )
    columns = ("Quantity", "Definition", "Unit", "Lowest", "Highest", "Difference")
    use = Text(
        [
            f"Input 'signals': float32, voxels x {summary.images} magnitudes in the order of the protocol, "
            "not normalised; the number of voxels is free. The division by the mean unweighted signal happens "
            "inside; voxels without unweighted signal come out as 0. Operators of opset 13.",
            "The metadata holds the gradient table, its hash, names, definitions, units and constants. Check "
            "the table before use: the same numbers in another order give maps that look like maps.",
            "jaxmed noddi predict --runtime onnx --weights network.onnx runs it here; scripts/noddi_onnx.py "
            "runs it with onnxruntime, numpy and nibabel alone.",
            f"Protocol hash: {summary.protocol}",
            "For research only, not for diagnosis.",
        ]
    )
    return Page(
        "A network as ONNX",
        f"outputs/network.onnx, {summary.bytes / 1024:.0f} kB, for scans of {summary.images} images",
        [
            ("Largest difference", float(f"{summary.largest_difference:.2g}"), "to jax, share of each range"),
            ("Rows", summary.rows, "compared"),
            ("ONNX Runtime", round(summary.rows / run.seconds.get("ONNX Runtime", np.inf)), "voxels/s on this machine"),
            ("Protocol", summary.protocol[:8], "start of its hash, in the file's metadata"),
        ],
        [Section("What it computes", [Table(columns, rows, caption)]), Section("How to use it", [use])],
    )

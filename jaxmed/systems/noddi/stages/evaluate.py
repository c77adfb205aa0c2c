"""Stage `jaxmed noddi evaluate`: bias, spread and error of networks and fits against the Cramer-Rao bound."""

import contextlib
import csv
import dataclasses
import io
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import NonNegative, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import write_text
from jaxmed.io.numpy_files import write_npz
from jaxmed.models.mlp import MlpConfig
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.systems.noddi import amico
from jaxmed.systems.noddi.evaluate_page import write_page
from jaxmed.systems.noddi.evaluation import (
    Estimator,
    Scores,
    average_bound,
    correlation,
    estimate,
    fit_estimator,
    make_grid,
    names_of,
    network_estimator,
    score,
    shrinkage,
    summarise,
)
from jaxmed.systems.noddi.network import ForwardConfig, Network, load
from jaxmed.systems.noddi.reading import read_table
from jaxmed.systems.noddi.table import Table, match_table
from jaxmed.systems.noddi.training import TrainConfig, train
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary

BOUND = "Cramer-Rao bound"


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Score networks and the fit on simulated voxels.

    Attributes:
        weights: Runs of `jaxmed noddi train`, all for one protocol and forward model.
        bvals: FSL text file of b-values, where no network says the protocol.
        bvecs: FSL text file of directions, likewise.
        b0_threshold: b-values up to this, in s/mm^2, are unweighted, likewise.
        forward: Forward model, likewise.
        fit: Score the maximum-likelihood fit too.
        amico: Score AMICO too, where it is installed (dmri-amico) and the model is NODDI.
        points: Values of each parameter; the grid holds all combinations.
        repeats: Noise repetitions of each point.
        snr: Signal-to-noise ratios at b = 0.
        embedded: Train two tiny networks, on true and on fitted labels, where neither networks nor files are given.
        seed: Of directions and noise.
    """

    weights: tuple[Path, ...] = ()
    bvals: Path | None = None
    bvecs: Path | None = None
    b0_threshold: NonNegative = 50.0
    forward: ForwardConfig = dataclasses.field(default_factory=ForwardConfig)
    fit: bool = True
    amico: bool = True
    points: Size = 10
    repeats: Size = 500
    snr: tuple[Positive, ...] = (10.0, 15.0, 20.0, 30.0, 50.0)
    embedded: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.points < 2 or self.repeats < 2:
            raise ValueError(f"points, repeats: expected 2 or more, found {self.points} and {self.repeats}")
        if not self.snr or min(self.snr) <= 0:
            raise ValueError(f"snr: expected ratios above 0, found {self.snr}")


def paper() -> Config:
    """The sister study's grid of 1,000 points, 500 repetitions, five noise levels."""
    return Config()


def laptop() -> Config:
    """216 points, 40 repetitions, five noise levels: minutes on a few cores."""
    return Config(points=6, repeats=40)


def smoke() -> Config:
    """Your networks, or two tiny ones, on a coarse grid, in seconds."""
    return Config(embedded=True, points=4, repeats=8, snr=(15.0, 30.0))


def run(config: Config, folder: RunFolder) -> None:
    """Read the networks, score them and the fit, compute the bound, write tables and the report."""
    began = time.monotonic()
    if config.embedded and not config.weights and config.bvals is None and config.bvecs is None:
        start(folder)
        log = Log(folder.path, folder.options.quiet)
        networks = train_embedded(config.seed, log)
        table, forward = networks[0].description.table, networks[0].description.forward
    else:
        networks = [load(path) for path in config.weights]
        table, forward = read_protocol(config, networks)
        start(folder)
        log = Log(folder.path, folder.options.quiet)
    model = forward.build(np.array(table.bvals))
    estimators: dict[str, Estimator] = {}
    if config.fit:
        estimators["MLE"] = fit_estimator(forward, table)
    paths = config.weights or ("weights",) * len(networks)
    for name, one, path in zip(names_of(networks), networks, paths, strict=True):
        estimators[name] = network_estimator(one, table, path)
    grid = make_grid(model, config.points)
    weight = np.asarray(model.relevance(jnp.asarray(grid, jnp.float32)))
    with contextlib.ExitStack() as kept:
        if config.amico and forward.kind == "noddi":
            if amico.is_installed():
                estimators["AMICO"] = kept.enter_context(amico.amico_estimator(table, forward.tissue))
            else:
                log.say("AMICO is not installed (pip install dmri-amico): it is not among the estimators.")
        estimates, bounds = estimate_all(config, model, table, estimators, grid, log)
    scores = {snr: {name: score(one, grid) for name, one in found.items()} for snr, found in estimates.items()}
    rows = tabulate(model, scores, bounds, grid, weight)
    write_rows(folder.outputs / "scores.csv", rows)
    save_scores(folder.outputs / "scores.npz", scores, bounds, grid, weight)
    summary = {
        "rows": rows,
        "estimators": list(estimators),
        "parameters": [
            {"name": parameter.name, "unit": parameter.unit, "range": parameter.draw} for parameter in model.parameters
        ],
        "snr": list(config.snr),
        "agreement": compare(model, estimates, weight) if config.fit else [],
        "points": len(grid),
        "model": model.name,
        "images": len(table.bvals),
        "protocol": table.hash,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed noddi evaluate --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"in all, compilation included": time.monotonic() - began},
    }
    write_summary(folder, summary)
    for number, snr in enumerate(config.snr):
        found = [row for row in rows if row["snr"] == snr and row["estimator"] != BOUND]
        log.metrics(
            number, {"snr": snr} | {f"{row['estimator']}/{row['parameter']}/rmse": row["rmse"] for row in found}
        )
    write_page(folder.path)


report = write_page


def train_embedded(seed: int, log: Log) -> list[Network]:
    """Train two tiny networks that differ in their labels alone."""
    bvals, bvecs = two_shell_protocol()
    shape = MlpConfig(width=48)
    settings = TrainConfig(network=shape, signals=8192, held_out=2048, epochs=20, batch_size=128, restarts=1)
    networks = []
    for labels in ("mle", "gt"):
        log.say(f"Training a tiny network with labels '{labels}'.")
        one = dataclasses.replace(settings, labels=labels)
        networks.append(train(jax.random.key(seed), bvals, bvecs, one).network)
    return networks


def read_protocol(config: Config, networks: list[Network]) -> tuple[Table, ForwardConfig]:
    """Return the one protocol and forward model of a comparison.

    Raises:
        InputError: There is nothing to score, or the networks belong to different protocols or models.
    """
    if not networks:
        if not config.fit:
            raise InputError("weights", "a network to score", "none, and no fit", "give --weights RUN, or --fit")
        needs_two_shells = config.forward.kind == "noddi"
        gradients = read_table(config.bvals, config.bvecs, config.b0_threshold, needs_two_shells=needs_two_shells)
        return Table.make(gradients.bvals, gradients.bvecs, config.b0_threshold), config.forward
    first = networks[0].description
    for path, network in zip(config.weights[1:], networks[1:], strict=True):
        match_table(first.table, *network.description.table.gradients[:2], path)
        if network.description.forward != first.forward:
            expected = f"the forward model of {config.weights[0]}"
            raise InputError(path, expected, network.description.forward, "compare networks of one model")
    return first.table, first.forward


def estimate_all(
    config: Config,
    model: MicrostructureModel,
    table: Table,
    estimators: dict[str, Estimator],
    grid: np.ndarray,
    log: Log,
) -> tuple[dict[float, dict[str, np.ndarray]], dict[float, np.ndarray]]:
    """Apply every estimator at every noise level, and compute the bound."""
    noise_key, direction_key = jax.random.split(jax.random.key(config.seed))
    each = len(grid) * config.repeats
    estimates, bounds = {}, {}
    announce(
        log, f"Scoring {', '.join(estimators)} at {len(config.snr)} levels of noise", count=each * len(config.snr),
        unit="voxels",
    )  # fmt: skip
    with log.progress("Scoring", each * len(config.snr), "voxels") as update:
        for number, snr in enumerate(config.snr):
            estimates[snr] = estimate(
                jax.random.fold_in(noise_key, number),
                model,
                table,
                estimators,
                grid,
                config.repeats,
                snr,
                on_block=lambda done, before=number * each: update(before + done),
            )
            bounds[snr] = average_bound(direction_key, model, table, grid, snr)
    return estimates, bounds


def compare(
    model: MicrostructureModel, estimates: dict[float, dict[str, np.ndarray]], weight: np.ndarray
) -> list[dict[str, Any]]:
    """Return how each network correlates with the fit of the same voxels, by noise level and parameter."""
    return [
        {"snr": snr, "estimator": name, "parameter": parameter, "correlation": value}
        for snr, found in estimates.items()
        for name, one in found.items()
        if name != "MLE"
        for parameter, value in zip(model.names, correlation(one, found["MLE"], weight), strict=True)
    ]


def tabulate(
    model: MicrostructureModel,
    scores: dict[float, dict[str, Scores]],
    bounds: dict[float, np.ndarray],
    grid: np.ndarray,
    weight: np.ndarray,
) -> list[dict[str, Any]]:
    """Return one row per noise level, estimator and parameter; the bound has rows of its own, without bias."""
    rows: list[dict[str, Any]] = []
    for snr, found in scores.items():
        for name, one in found.items():
            slopes = shrinkage(one, grid, weight)
            for parameter, numbers, slope in zip(model.names, summarise(one, weight), slopes, strict=True):
                rows.append({"snr": snr, "estimator": name, "parameter": parameter, **numbers, "slope": slope})
        zero = np.zeros_like(grid)
        for parameter, numbers in zip(
            model.names, summarise(Scores(zero, bounds[snr], bounds[snr]), weight), strict=True
        ):
            rows.append({"snr": snr, "estimator": BOUND, "parameter": parameter, **numbers, "slope": 1.0})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def save_scores(
    path: Path,
    scores: dict[float, dict[str, Scores]],
    bounds: dict[float, np.ndarray],
    grid: np.ndarray,
    weight: np.ndarray,
) -> None:
    """Keep the scores of every point: arrays snr x estimator x point x parameter."""
    stacked = {
        name: np.stack([np.stack([getattr(one, name) for one in found.values()]) for found in scores.values()])
        for name in Scores._fields
    }
    kept = {name: stacked[name] for name in ("bias", "sd", "rmse")}
    write_npz(path, {"grid": grid, "weight": weight, "bound": np.stack(list(bounds.values())), **kept})

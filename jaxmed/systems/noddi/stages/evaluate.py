"""Stage `jaxmed noddi evaluate`: bias, spread and error of networks and fits against the Cramer-Rao bound.

Networks and fits are scored on the same noise (`physics.monte_carlo`). Beside them stands the bound of the Rician
likelihood: no unbiased estimator has a smaller spread, and a biased one may.

Source: the sister study on training labels (a 10 x 10 x 10 grid, 500 repetitions).
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import NonNegative, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.io import amico
from jaxmed.io.gradient_match import Table as Protocol
from jaxmed.io.gradient_match import match_table
from jaxmed.metrics.recovery import make_grid
from jaxmed.models.published.signal_network import Network, load_network
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ForwardConfig
from jaxmed.physics.monte_carlo import Estimator
from jaxmed.recipes.diffusion_scan import read_table
from jaxmed.recipes.recovery_study import recovery_sections, score_levels
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import read_study
from jaxmed.report.page import Section, Text
from jaxmed.systems.noddi.network import predict
from jaxmed.systems.noddi.training import TINY, LabelStart, fit_labels, train
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder


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
        synthetic: Train two tiny networks, on true and on fitted labels, where neither networks nor files are given.
        seed: Seed of directions and noise.
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
    synthetic: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.points < 2 or self.repeats < 2:
            raise ValueError(f"points, repeats: expected 2 or more, found {self.points} and {self.repeats}")
        if not self.snr:
            raise ValueError(f"snr: expected ratios above 0, found {self.snr}")


def paper() -> Config:
    """The sister study's grid of 1,000 points, 500 repetitions, five noise levels."""
    return Config()


def laptop() -> Config:
    """216 points, 40 repetitions, five noise levels: minutes on a few cores."""
    return Config(points=6, repeats=40)


def smoke() -> Config:
    """Your networks, or two tiny ones, on a coarse grid, in seconds."""
    return Config(synthetic=True, points=4, repeats=8, snr=(15.0, 30.0))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was evaluated; outputs/scores.csv has what was found.

    Attributes:
        estimators: Their names, without the bound.
        parameters: Unit of each parameter.
        points: Number of points of the grid.
        protocol: Hash of the table.
    """

    estimators: tuple[str, ...]
    parameters: dict[str, str]
    points: int
    model: str
    images: int
    protocol: str


def run(config: Config, folder: RunFolder) -> int:
    """Read the networks, score them and the fit at every noise level that is not finished, write tables and the report.

    Returns 1 when a noise level failed.
    """
    clock = Clock()
    if config.synthetic and not config.weights and config.bvals is None and config.bvecs is None:
        log = begin(folder)
        networks = train_tiny(config.seed, log)
        table, forward = networks[0].description.table, networks[0].description.forward
    else:
        networks = [load_network(path) for path in config.weights]
        table, forward = read_protocol(config, networks)
        log = begin(folder)
    model = forward.build(np.array(table.bvals))
    estimators: dict[str, Estimator] = {"MLE": fit_estimator(forward, table)} if config.fit else {}
    paths = config.weights or ("weights",) * len(networks)
    for name, one, path in zip(names_of(networks), networks, paths, strict=True):
        estimators[name] = network_estimator(one, table, path)
    grid = make_grid([parameter.draw for parameter in model.parameters], config.points)
    with contextlib.ExitStack() as kept:
        if config.amico and forward.kind == "noddi":
            if amico.is_installed():
                tissue = forward.tissue
                opened = amico.open_amico(table, tissue.parallel_diffusivity, tissue.free_diffusivity)
                by_amico = kept.enter_context(opened)
                estimators["AMICO"] = lambda voxels: by_amico(np.asarray(voxels.signals))
            else:
                log.say("AMICO is not installed (pip install dmri-amico): it is not among the estimators.")
        done = score_levels(
            model, table, estimators, grid, config.snr, config.repeats, config.seed, folder, config, log
        )  # fmt: skip
    clock.lap("in all, compilation included")
    summary = Summary(
        estimators=tuple(estimators),
        parameters={parameter.name: parameter.unit for parameter in model.parameters},
        points=len(grid),
        model=model.name,
        images=len(table.bvals),
        protocol=table.hash,
    )
    finish(folder, config, summary, clock, page)
    return done.exit_code


def train_tiny(seed: int, log: Log) -> list[Network]:
    """Train two tiny networks that differ in their labels alone."""
    networks = []
    for labels in ("mle", "gt"):
        log.say(f"Training a tiny network with labels '{labels}'.")
        settings = dataclasses.replace(TINY, labels=labels)
        networks.append(train(jax.random.key(seed), *two_shell_protocol(), settings).network)
    return networks


def read_protocol(config: Config, networks: list[Network]) -> tuple[Protocol, ForwardConfig]:
    """Return the one protocol and forward model of a comparison.

    Raises:
        InputError: There is nothing to score, or the networks belong to different protocols or models.
    """
    if not networks:
        if not config.fit:
            raise InputError("weights", "a network to score", "none, and no fit", "give --weights RUN, or --fit")
        needs_two_shells = config.forward.kind == "noddi"
        gradients = read_table(config.bvals, config.bvecs, config.b0_threshold, needs_two_shells=needs_two_shells)
        return Protocol.make(gradients.bvals, gradients.bvecs, config.b0_threshold), config.forward
    first = networks[0].description
    for path, network in zip(config.weights[1:], networks[1:], strict=True):
        match_table(first.table, *network.description.table.gradients[:2], path)
        if network.description.forward != first.forward:
            expected = f"the forward model of {config.weights[0]}"
            raise InputError(path, expected, network.description.forward, "compare networks of one model")
    return first.table, first.forward


def network_estimator(network: Network, table: Protocol, where: object = "weights") -> Estimator:
    """Return a network as an estimator of voxels measured by a protocol, in whatever order it has the network's rows.

    Raises:
        InputError: The protocol is not the network's.
    """
    order = match_table(network.description.table, *table.gradients[:2], where).order
    return lambda voxels: predict(network, voxels.signals[:, order])


def fit_estimator(forward: ForwardConfig, table: Protocol, start: LabelStart = "grid") -> Estimator:
    """Return the maximum-likelihood fit, told the true noise level, as an estimator."""
    model = forward.build(np.array(table.bvals))
    return lambda voxels: np.asarray(fit_labels(voxels, model, table, start, forward))


def names_of(networks: Sequence[Network]) -> list[str]:
    """Name networks by their labels, NN_MLE and NN_GT as the paper does; equal ones are numbered."""
    names: list[str] = []
    for network in networks:
        labels = network.description.labels
        name = f"NN_{labels.split()[0].upper()}" + (" (truth start)" if "truth" in labels else "")
        names.append(name)
    return [
        f"{name} {names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def page(run: Finished[Config, Summary]) -> Page:
    """Show scores over the noise and over the truth, and all of them in a table."""
    summary, study = run.summary, read_study(run.path)
    tiles, sections = recovery_sections(run.outputs, study, summary.parameters, summary.estimators)
    reading = Text(
        [
            "All estimators saw the same simulated voxels. MLE is the maximum-likelihood fit, told the true "
            "noise level; NN_MLE are networks trained on such fits, NN_GT networks trained on the true "
            "parameters.",
            "Low spread with a slope below 1 is not precision: such an estimator answers with the middle of "
            "its training range where the signal says little.",
            "After arXiv:2507.12632. For research only, not for diagnosis.",
        ]
    )
    return Page(
        "Networks and fits on known parameters",
        f"{', '.join(summary.estimators)}: {summary.points:,} points of the parameter range x "
        f"{run.config.repeats} repetitions x {len(run.config.snr)} noise levels, {summary.images} images",
        tiles,
        [*sections, Section("How to read this", [reading])],
    )

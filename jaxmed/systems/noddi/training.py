"""Train networks that map the signals of one protocol to microstructure, on signals simulated here.

Any `MicrostructureModel` serves. Signals and labels are made on the device, in blocks, from a key; nothing is read. The
kind of label is what arXiv:2507.12632 compares:

    gt    the parameters that made a signal: low spread, but estimates shrink to the middle of the training range
    mle   maximum-likelihood estimates from the noisy signal: little bias, spread and agreement of a fit
    self  none: the network's parameters must reproduce the signal along the direction of the diffusion tensor

Sources: arXiv:2507.12632 (two networks that differ in their labels alone); the sister study on training labels
(truth-started fits as labels, restarts of which the best is kept, self-supervision).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxmed.arrays.tracing import require_values
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, NonNegative, Positive, Size, checked
from jaxmed.io.gradient_match import Table
from jaxmed.io.gradients import Numbers, check_gradients
from jaxmed.models.mlp import Mlp, MlpConfig, Spread, measure_spread, on_raw_inputs, to_unit
from jaxmed.models.published.signal_network import Description, Network
from jaxmed.nn.model import make_model
from jaxmed.objectives.gradient_signals import Point, make_surface
from jaxmed.physics.acquisition import check_protocol
from jaxmed.physics.microstructure import ForwardConfig, MicrostructureModel, Simulated, simulate, weighted_signal
from jaxmed.physics.rician import SIGMA_FLOOR
from jaxmed.recipes.restarts import State, Step, newest_losses, run_epoch, run_epochs, start_restarts
from jaxmed.solvers.diffusion_tensor import fit_tensor
from jaxmed.solvers.least_squares import LmState, lm_init, lm_run
from jaxmed.systems.noddi.fitting import estimate
from jaxmed.systems.noddi.likelihood import model_forward, noddi_forward
from jaxmed.systems.noddi.network import normalise, outputs_of, ranges
from jaxmed.systems.noddi.protocol import FitConfig, Protocol, prepare
from jaxmed.systems.noddi.voxel_fit import search_model
from jaxmed.train.optimizer import OptimizerConfig

Labels = Literal["gt", "mle", "self"]
LabelStart = Literal["grid", "truth"]
BLOCK = 8192
"""Voxels simulated at once: the forward model holds measurement x degree numbers of each."""
MARGIN = 0.01
"""An ascent from the truth starts this share of the range inside it, where every derivative has a say."""


@dataclasses.dataclass(frozen=True)
@checked
class TrainConfig:
    """How a network is trained; defaults are for an accelerator.

    Attributes:
        forward: Forward model that makes the signals.
        labels: What the network learns: "mle" (fits of the noisy signals), "gt" (the parameters that made them) or
            "self" (no labels: reproduce the signal).
        start: Where the fits of "mle" begin: "grid", as on a scan, or "truth", as in the sister study.
        network: Its shape.
        optimizer: AdamW with a cosine.
        signals: Simulated voxels to train on.
        held_out: Further ones that choose the best restart.
        epochs: Passes over the signals.
        batch_size: Signals per step.
        restarts: Networks trained side by side from different parameters; the best on held-out signals is kept.
        snr: Range of signal-to-noise ratios at b = 0, drawn uniformly.
        b0_threshold: b-values up to this, in s/mm^2, are unweighted.
    """

    forward: ForwardConfig = dataclasses.field(default_factory=ForwardConfig)
    labels: Labels = "mle"
    start: LabelStart = "grid"
    network: MlpConfig = dataclasses.field(default_factory=MlpConfig)
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-3, weight_decay=1e-4)
    signals: Count = 1_000_000
    held_out: Count = 20_000
    epochs: Count = 50
    batch_size: Count = 4096
    restarts: Size = 4
    snr: tuple[Positive, Positive] = (10.0, 50.0)
    b0_threshold: NonNegative = 50.0

    def __post_init__(self) -> None:
        if self.batch_size > self.signals:
            raise ValueError(f"batch_size: expected at most {self.signals} signals, found {self.batch_size}")
        if self.snr[0] > self.snr[1]:
            raise ValueError(f"snr: expected two ratios above 0 in rising order, found {self.snr}")


TINY = TrainConfig(network=MlpConfig(width=48), signals=8192, held_out=2048, epochs=20, batch_size=128, restarts=1)
"""Seconds of training, good for a trial alone."""


class Pool(NamedTuple):
    """Simulated signals, ready for a network.

    Attributes:
        inputs: Weighted signals over the mean unweighted one.
        targets: Labels as positions in each parameter's range; the true ones in self-supervision, which does not see
            them.
        weights: Weight of each label's error: 0 where the signal does not depend on the parameter.
        direction: Fibre direction, as the diffusion tensor tells it; zero unless signals are to be reproduced.
        sigma: Noise relative to the mean unweighted signal.
    """

    inputs: Float[Array, "voxel weighted"]
    targets: Float[Array, "voxel parameter"]
    weights: Float[Array, "voxel parameter"]
    direction: Float[Array, "voxel 3"]
    sigma: Float[Array, " voxel"]


class Trained(NamedTuple):
    """The best restart, training and held-out loss of each epoch and restart, and which one was best."""

    network: Network
    losses: Float[np.ndarray, "epoch 2 restart"]
    best: int


def train(
    key: Key[Array, ""],
    bvals: Numbers,
    bvecs: Numbers,
    config: TrainConfig = TrainConfig(),
    *,
    model: MicrostructureModel | None = None,
    allow_single_shell: bool = False,
    loop: Callable[[State, Step], State] | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Trained:
    """Train a network for one protocol: the driver on the host, which no jax transformation goes through.

    Args:
        key: Consumed: draws signals, parameters of the network and order.
        bvals: b-values in s/mm^2, in the order of the scan; any sequence of numbers.
        bvecs: Unit directions, N x 3 or 3 x N.
        config: Labels, shape, length.
        model: Another forward model than `config.forward`; then only this session knows what it was.
        allow_single_shell: Train NODDI although only one shell is weighted.
        loop: (first state, step) -> the state after the last epoch, given `step(state, _) -> (state, losses of the best
            restart)`; by default all epochs in a row.
        on_block: Called with the number of signals simulated and labelled so far.

    Returns:
        The network that was best on held-out signals, and the learning curves.

    Raises:
        InputError: The table is not one to train for (see `check_gradients` and `check_protocol`), or an argument is
            traced by jax.
        ValueError: A loss is not finite, in the default loop.
    """
    require_values("noddi.train", "noddi.predict", key=key, bvals=bvals, bvecs=bvecs)
    gradients = check_gradients(bvals, bvecs, b0_threshold=config.b0_threshold)
    needs_two_shells = model is None and config.forward.kind == "noddi" and not allow_single_shell
    check_protocol(gradients, "bvals", config.b0_threshold, needs_two_shells=needs_two_shells)
    bvals, bvecs = gradients.bvals, gradients.bvecs
    table = Table.make(bvals, bvecs, config.b0_threshold)
    pool_key, held_out_key, train_key = jax.random.split(key, 3)
    pool = make_pool(pool_key, table, config, config.signals, model, on_block)
    held_out = make_pool(held_out_key, table, config, config.held_out, model)
    model = config.forward.build(np.asarray(bvals)) if model is None else model
    spread = measure_spread(pool.inputs)

    def step(state: State, _: Any) -> tuple[State, dict[str, float]]:
        fixed = model, table, config
        state = run_epoch(_loss, fixed, config.optimizer, config.batch_size, state, pool, held_out, spread)
        return state, newest_losses(state)

    mlp, row = make_model(Mlp(config.network, len(model.parameters))), jnp.zeros((1, pool.inputs.shape[1]))
    length = config.epochs, config.signals // config.batch_size
    state = start_restarts(train_key, lambda key: mlp.init(key, row), config.optimizer, config.restarts, *length)
    state = (loop or run_epochs)(state, step)
    losses = np.asarray(state.losses)
    best = int(losses[-1, 1].argmin())
    params = on_raw_inputs(jax.tree.map(lambda leaf: np.asarray(leaf[best]), state.params), spread)
    description = Description(
        config.network,
        outputs_of(model),
        table,
        config.forward,
        config.labels if config.labels != "mle" else f"mle ({config.start} start)",
        config.snr,
    )
    return Trained(Network(params, description), losses, best)


def make_pool(
    key: KeyArray,
    table: Table,
    config: TrainConfig,
    count: int,
    model: MicrostructureModel | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Pool:
    """Simulate signals and label them, block by block, on the device; see `train`."""
    parts = []
    forward = config.forward if model is None else None
    model = config.forward.build(np.array(table.bvals)) if model is None else model
    # One size for every pool of a run, whatever its count, so that one compiled program makes them all.
    size = min(BLOCK, config.signals)
    for start in range(0, count, size):
        block = _draw(model, table, config.snr, size, jax.random.fold_in(key, start))
        labels = block.parameters
        if config.labels == "mle":
            labels = fit_labels(block, model, table, config.start, forward)
        direction = jnp.zeros_like(block.direction)
        if config.labels == "self":
            # A network cannot say a direction: it would have to jump where mu and -mu, one fibre, change places.
            direction = tensor_direction(block, table)
        parts.append(_prepare(model, table, block, labels, direction))
        if on_block is not None:
            on_block(min(start + size, count))
    return Pool(*(jnp.concatenate(rows)[:count] for rows in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # a block costs milliseconds, its compilation seconds
def _draw(model: MicrostructureModel, table: Table, snr: tuple[float, float], count: int, key: KeyArray) -> Simulated:
    return simulate(key, model, count, np.array(table.bvals), np.array(table.bvecs), snr)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(
    model: MicrostructureModel, table: Table, block: Simulated, labels: jax.Array, direction: jax.Array
) -> Pool:
    inputs, _ = normalise(block.signals, table.is_b0)
    low, span = ranges(model.parameters)
    b0 = jnp.mean(block.signals[:, np.flatnonzero(table.is_b0)], axis=1)
    return Pool(inputs, (labels - low) / span, model.relevance(labels), direction, block.sigma / b0)


def _loss(
    model: MicrostructureModel, table: Table, config: TrainConfig, spread: Spread, params: Params, batch: Pool
) -> jax.Array:
    """Return the mean squared error of one network on a batch, of labels or of signals."""
    inputs = (batch.inputs - spread.centre) / spread.scale
    raw = make_model(Mlp(config.network, len(model.parameters))).apply(params, inputs)
    unit = to_unit(config.network, raw)
    if config.labels != "self":
        # Positions in the range are what errors are compared by: each parameter's scale is its range.
        return jnp.mean(batch.weights * (unit - batch.targets) ** 2)
    low, span = ranges(model.parameters)
    rows = np.array(table.bvals), np.array(table.bvecs), table.is_b0
    predicted = weighted_signal(model, low + span * unit, batch.direction, *rows)
    # A magnitude's mean is near sqrt(s^2 + sigma^2): without it the noise floor would be read as slow diffusion.
    expected = jnp.sqrt(predicted**2 + batch.sigma[:, None] ** 2)
    return jnp.mean((expected - batch.inputs) ** 2)


def fit_labels(
    block: Simulated, model: MicrostructureModel, table: Table, start: LabelStart, forward: ForwardConfig | None
) -> Float[Array, "voxel parameter"]:
    """Estimate the parameters of simulated voxels by maximum likelihood.

    Args:
        block: Signals, with the noise level that the likelihood is told, and the truth for fits that start there.
        model: The forward model.
        table: The protocol.
        start: A grid, as on a scan, or the truth: the nearest maximum, which a perfect search would find too.
        forward: What `model` was built from; None for a model that only its caller knows.
    """
    config = fit_config(forward or ForwardConfig(), table)
    if start == "grid" and forward is not None:
        rows = estimate(
            np.asarray(block.signals),
            table.gradients,
            sigma=np.asarray(block.sigma),
            config=config,
        )
        return jnp.asarray(rows.values)
    is_noddi = forward is not None and forward.kind == "noddi"
    return ascend(model, is_noddi, config, _prepared(table, config), block, start).point.values.T


def fit_config(forward: ForwardConfig, table: Table) -> FitConfig:
    """Return the settings of a fit with a network's forward model and threshold."""
    return FitConfig(
        model=forward.kind,
        tissue=forward.tissue,
        extra_cellular=forward.extra_cellular,
        dot=forward.dot,
        b0_threshold=table.b0_threshold,
    )


@functools.lru_cache(8)
def _prepared(table: Table, config: FitConfig) -> Protocol:
    return prepare(np.array(table.bvals), np.array(table.bvecs), config)


def tensor_direction(block: Simulated, table: Table) -> Float[Array, "voxel 3"]:
    """Return the principal direction of each voxel's diffusion tensor."""
    return _tensor_direction(_prepared(table, FitConfig(b0_threshold=table.b0_threshold)), block.signals)


@jax.jit
def _tensor_direction(protocol: Protocol, signals: jax.Array) -> jax.Array:
    magnitudes = signals.T
    relative = magnitudes / (protocol.is_b0 @ magnitudes)
    return fit_tensor(protocol.tensor_design, protocol.tensor_rows, relative).direction.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))  # a block takes seconds, its compilation longer
def ascend(
    model: MicrostructureModel,
    is_noddi: bool,
    config: FitConfig,
    protocol: Protocol,
    block: Simulated,
    start: LabelStart,
) -> LmState:
    """Ascend the Rician likelihood of every voxel from its start; its point is where it is largest, voxel last.

    Args:
        model: The forward model.
        is_noddi: Whether NODDI's derivatives, written by hand, are those of the model.
        config: Tolerances.
        protocol: From `prepare`.
        block: Signals, noise level, truth.
        start: Where to begin.
    """
    forward = (noddi_forward if is_noddi else model_forward)(protocol, model, config)
    magnitudes = block.signals.T
    s0 = protocol.is_b0 @ magnitudes
    measured = magnitudes / s0
    precision = 1 / jnp.maximum(block.sigma / s0, SIGMA_FLOOR) ** 2
    if start == "truth":
        lower, upper = jnp.asarray(forward.lower), jnp.asarray(forward.upper)
        margin = MARGIN * (upper - lower)
        point = Point(jnp.clip(block.parameters, lower + margin, upper - margin).T, block.direction.T)
    else:
        direction = fit_tensor(protocol.tensor_design, protocol.tensor_rows, measured).direction
        point = search_model(protocol, model, config, measured[protocol.order], direction).best
    surface = make_surface(forward, "rician", measured[forward.rows], precision)
    return lm_run(surface, lm_init(surface, point, config.damping), config.cost_tolerance, config.max_iterations)

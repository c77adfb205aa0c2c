"""Train an image-to-image network: a diffusion prior, or a conditional network, by its loss.

The network is a U-Net; what it learns is the loss's business. Records are prepared on the device, each with its own
key: cuts, flips, drawn contrasts, simulated measurements. Held-out records are scored with keys of their own, the same
in every evaluation, by the moving average of the parameters, which is what a run hands on.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Seed, checked
from jaxmed.data.loader import LoaderConfig, Transform, evaluation_batches, make_loader
from jaxmed.data.records import Source
from jaxmed.errors import InputError
from jaxmed.models.unet_guided import SHARDING_RULES, GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import Model, make_model
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, data_share, layout, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState, create_state
from jaxmed.train.step import make_train_step

# loss(apply, params, keys, batch) -> (scalar, metrics), a mean over examples; apply(params, x, t) is the network.
NetworkLoss: TypeAlias = Callable[..., tuple[Scalar, dict[str, Scalar]]]
# prepare(key, fields of one record) -> fields of one example.
Prepare: TypeAlias = Callable[[KeyArray, Mapping[str, Array]], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
@checked
class DenoiserConfig:
    """A training run.

    Attributes:
        model: The network.
        optimizer: Its optimizer; constant 1e-4 without decay of weights is DynamicDPS's.
        loop: Length and intervals.
        loader: Batch size and reading.
        mesh: The devices.
        ema_decay: Of the moving average of parameters; in the first steps less, (1 + step) / (10 + step), so that a
            short run is not an average with its random start.
        accumulation: Parts in which a batch is processed.
        seed: Of parameters, noise, preparation and the order of records.

    Source: DynamicDPS, arXiv:2503.01075, official code (AdamW 1e-4, batch 8, average 0.9999).
    Deviation: the average's ramp; the code starts with 0.9999, which over 360,000 steps is the same.
    """

    model: GuidedUnetConfig = GuidedUnetConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, decay="constant", weight_decay=0.0)
    loop: LoopConfig = LoopConfig(steps=360_000, log_every=100, save_every=5000, evaluate_every=5000)
    loader: LoaderConfig = LoaderConfig(batch_size=8)
    mesh: MeshConfig = MeshConfig()
    ema_decay: float = 0.9999
    accumulation: int = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), found {self.ema_decay:g}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation: expected 1 or more, found {self.accumulation}")


def train_denoiser(
    config: DenoiserConfig,
    loss: NetworkLoss,
    source: Source,
    held_out: Source | None,
    transform: Transform,
    prepare: Prepare,
    *,
    size: tuple[int, ...],
    folder: RunFolder,
    log: Log,
    start: Params | None = None,
) -> tuple[Model, Params]:
    """Train a network, or continue a run of this folder.

    Args:
        config: The run.
        loss: What is to be small, such as `partial(diffusion.denoiser.denoising_loss, ...)`; see `NetworkLoss`.
        source: Records to train on.
        held_out: Records on which the loss is told; None for none.
        transform: A record's fields to arrays of one shape, on the host.
        prepare: These arrays to one example of the loss's batch, on the device.
        size: Voxels of an example along each axis.
        folder: The run.
        log: Its log.
        start: Parameters to start from instead of random ones.

    Returns:
        The network, and the moving average of its parameters.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh, size)
    model = make_model(GuidedUnet(config.model))
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    given = () if start is None else (start,)
    init = partial(_initialise, config.model, size)
    state = create_state(jax.random.key(config.seed), init, optimizer, mesh, *given, rules=SHARDING_RULES, ema=True)
    step = make_train_step(
        partial(_loss, loss, model, prepare),
        optimizer,
        state=state,
        accumulation=config.accumulation,
        ema_decay=partial(ramped_decay, config.ema_decay),
        schedule=learning_rate(config.optimizer, config.loop.steps),
        frozen=config.optimizer.frozen,
    )
    reading = dataclasses.replace(config.loader, seed=config.seed)
    batches = make_loader(source, transform, reading, *data_share(mesh))
    evaluate = None if held_out is None else _make_evaluation(config, loss, model, mesh, held_out, transform, prepare)
    state = fit(config.loop, state, step, batches, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    assert state.ema_params is not None
    return model, state.ema_params


def ramped_decay(decay: float, step: Any) -> Float[Array, ""]:
    """Return the average's decay after some steps: never an average over more than about the steps done."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def check_fit(config: DenoiserConfig, mesh: Mesh, size: tuple[int, ...]) -> None:
    """Check that the images fit the network, and the batch and the network the devices, before anything is written.

    Raises:
        InputError: They do not.
    """
    if len(size) != config.model.dimensions:
        expected = f"{config.model.dimensions} numbers, as many as model.dimensions"
        raise InputError("size", expected, f"{size}", "change the size, or --model.dimensions")
    if any(length < 1 or length % config.model.divisor for length in size):
        expected = f"multiples of {config.model.divisor} voxels, which the network halves"
        raise InputError("size", expected, f"{size}", "change the size, or --model.multipliers")
    batch, parts, devices = config.loader.batch_size, config.accumulation, mesh.shape["data"]
    if batch % (parts * devices):
        expected = f"a multiple of {parts} parts (accumulation) x {devices} devices (mesh.data)"
        raise InputError("loader.batch_size", expected, batch, "change the batch size, --accumulation or --mesh.data")
    shapes = jax.eval_shape(partial(_initialise, config.model, size), jax.random.key(0))
    try:
        layout(shapes, mesh, SHARDING_RULES)
    except ValueError as error:
        found = f"{mesh.shape['model']} ({error})"
        raise InputError(
            "mesh.model", "a number of devices that divides heads", found, "change --mesh.model"
        ) from error


def _initialise(model: GuidedUnetConfig, size: tuple[int, ...], key: KeyArray, start: Params | None = None) -> Params:
    if start is not None:
        return jax.tree.map(jnp.asarray, start)
    image = jnp.zeros((1, *size, model.channels))
    # A start has as many draws as parameters, and each threefry is a loop of its own to the compiler: with XLA's own
    # generator a small network's start compiles in 2.6 s instead of 7.5 s, and it is as much the same on any mesh.
    key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
    return make_model(GuidedUnet(model)).init(key, image, *((jnp.zeros(1),) if model.with_time else ()))


def _loss(
    loss: NetworkLoss,
    model: Model,
    prepare: Prepare,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    fields = {name: array for name, array in batch.items() if name not in ("record", "weight")}
    pairs = jax.vmap(jax.random.split)(keys)
    examples = jax.vmap(prepare)(pairs[:, 0], fields)
    return loss(model.apply, params, pairs[:, 1], examples)


def _make_evaluation(
    config: DenoiserConfig,
    loss: NetworkLoss,
    model: Model,
    mesh: Mesh,
    held_out: Source,
    transform: Transform,
    prepare: Prepare,
) -> Callable[[TrainState], dict[str, float]]:
    """Return the mean over held-out records of the loss and its metrics; a record's keys are always the same."""
    reading = dataclasses.replace(config.loader, batch_size=config.loader.batch_size // config.accumulation)

    def score_one(params: Params, key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
        one = {name: array[None] for name, array in fields.items()}
        value, metrics = _loss(loss, model, prepare, params, key[None], one)
        return {"loss": value, **metrics}

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def score(params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
        root = jax.random.key(config.seed + 1)
        keys = jax.vmap(partial(jax.random.fold_in, root))(jnp.maximum(batch["record"], 0))
        fields = {name: array for name, array in batch.items() if name not in ("record", "weight")}
        found = jax.vmap(partial(score_one, params))(keys, fields)
        return {"weight": batch["weight"].sum(), **{name: batch["weight"] @ value for name, value in found.items()}}

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in evaluation_batches(held_out, transform, reading, *data_share(mesh)):
            for name, value in score(state.ema_params, shard_batch(batch, mesh)).items():
                totals[name] = totals.get(name, 0.0) + float(np.asarray(value))
        weight = totals.pop("weight")
        return {name: total / weight for name, total in totals.items()}

    return evaluate

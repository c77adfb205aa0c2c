"""The set-up of every training run on records: steps from epochs, mesh, fit, optimizer, state, step, loader, scores.

`run_training` trains one network by the gradient of one loss. What moves its parameters otherwise (a teacher and a
student, two optimizers in turn, a game) makes its own state and step between `in_steps` and `run_steps`:

    config = in_steps(config, len(data.training))
    mesh = make_mesh(config.mesh)
    check_fit(config, network)
    state, step = ...  # a NamedTuple with a field `step`, and step(state, batch) -> (state, metrics)
    state = run_steps(config, state, step, data, mesh=mesh, folder=folder, log=log)

What happens in fewer than a few thousand steps on arrays that fit the device needs none of this: scan over optax.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.trees import named_leaves, replace
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Decay, Epochs, Seed, Size, checked
from jaxmed.data.loader import LoaderConfig, Transform, evaluation_batches, make_loader
from jaxmed.data.records import Source
from jaxmed.errors import InputError
from jaxmed.nn.model import LayerRules, Network
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit, restore_best
from jaxmed.train.mesh import (
    MeshConfig,
    abstract_batch,
    gathered,
    make_mesh,
    param_shardings,
    process_slice,
    shard_batch,
)
from jaxmed.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState, abstract_state, create_state
from jaxmed.train.step import Loss, make_train_step
from jaxmed.train.workload import Workload, training_workload

State = TypeVar("State")
# score(params, keys, batch) -> numbers of each record, [batch]; keys holds one key for each record.
Score: TypeAlias = Callable[[Params, Key[Array, " batch"], Mapping[str, Array]], Mapping[str, Float[Array, " batch"]]]


@dataclasses.dataclass(frozen=True)
@checked
class TrainConfig:
    """A training run.

    Attributes:
        optimizer: How parameters are updated.
        loop: Length, and intervals of lines, saves and evaluations.
        loader: Batch size (over all devices) and reading.
        mesh: The devices.
        epochs: Passes over the training records; 0 leaves the length to loop.steps.
        warmup_epochs: Epochs over which the learning rate rises; with epochs 0, optimizer.warmup_steps counts.
        accumulation: Parts in which a batch is processed: the same numbers with less memory.
        ema_decay: Decay of a moving average of the parameters, which is then what is scored and handed on; 0 keeps
            none. In the first steps it is less, (1 + step) / (10 + step), so that a short run is not an average with
            its random start.
        dtype: Type of the network's matrix products.
        seed: Seed of the parameters, of noise and augmentation, and of the order of the records.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    loader: LoaderConfig = LoaderConfig()
    mesh: MeshConfig = MeshConfig()
    epochs: Epochs = 0
    warmup_epochs: Epochs = 0
    accumulation: Size = 1
    ema_decay: Decay = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0


# In the type of a field that is a record: on the command line its options carry no prefix (--loop.steps, --seed).
NO_PREFIX = tyro.conf.arg(name="")
TrainFlags: TypeAlias = Annotated[TrainConfig, NO_PREFIX]


class TrainData(NamedTuple):
    """The records of a run.

    Attributes:
        training: Those trained on.
        held_out: Those on which the run is scored; None for none.
        transform: A record's fields to arrays of one shape, on the host.
    """

    training: Source
    held_out: Source | None
    transform: Transform


def run_training(
    config: TrainConfig,
    network: Network,
    loss: Loss,
    data: TrainData,
    *,
    folder: RunFolder,
    log: Log,
    layers: LayerRules | None = None,
    start: Params | None = None,
    score: Score | None = None,
    score_seed: int | None = None,
    summarise: Callable[[dict[str, float]], Mapping[str, float]] = dict,
) -> TrainState:
    """Train a network, or continue a run of this folder.

    Args:
        config: The run.
        network: What is trained.
        loss: `loss(params, keys, batch) -> (scalar, metrics)`, a mean over examples with one key each.
        data: The records.
        folder: The run.
        log: Its log.
        layers: The network's layers, where `config.optimizer.layer_decay` is below 1.
        start: Parameters to start from; what is not among them is drawn.
        score: Numbers of held-out records; each evaluation tells their means.
        score_seed: Seed of the records' keys, which are the same in every evaluation; by default the run's plus 1.
        summarise: From these means to what is told.

    Returns:
        The state after the last step; `handed_on` takes the parameters out of it.
    """
    config = in_steps(config, len(data.training))
    mesh = make_mesh(config.mesh)
    announce(log, "Drawing the parameters", params=check_fit(config, network), smaller=folder.smaller)
    # Given parameters are an argument: closed over, they would be constants of the program.
    given = () if start is None else (start,)
    state = create_state(*_state_arguments(config, network, mesh, layers), *given, **_state_options(config, network))
    step = _make_step(config, network, loss, state, layers)
    evaluate = None
    if score is not None and data.held_out is not None:
        seed = config.seed + 1 if score_seed is None else score_seed
        evaluate = make_evaluation(config, mesh, data.held_out, data.transform, score, seed, summarise)
    return run_steps(config, state, step, data, mesh=mesh, folder=folder, log=log, evaluate=evaluate)


def plan_training(
    config: TrainConfig,
    network: Network,
    loss: Loss,
    record: Mapping[str, Any],
    mesh: Mesh,
    *,
    layers: LayerRules | None = None,
    notes: tuple[str, ...] = (),
) -> Workload:
    """Return the step of `run_training` and the shapes of its arguments; epochs have no part in either.

    Args:
        config: The run.
        network: What is trained.
        loss: As of `run_training`.
        record: Shape and type of each array of a transformed record.
        mesh: The devices, which may be those of a topology that is not here.
        layers: The network's layers.
        notes: What was assumed about the inputs.

    Raises:
        InputError: The batch or the network does not divide over the devices.
    """
    check_fit(config, network, mesh)
    state = abstract_state(*_state_arguments(config, network, mesh, layers), **_state_options(config, network))
    step = _make_step(config, network, loss, state, layers)
    return training_workload(step, state, abstract_batch(record, config.loader.batch_size, mesh), record, notes)


def _settings(config: TrainConfig, network: Network) -> OptimizerConfig:
    return dataclasses.replace(config.optimizer, frozen=(*config.optimizer.frozen, *network.frozen))


def _state_arguments(config: TrainConfig, network: Network, mesh: Mesh, layers: LayerRules | None) -> tuple[Any, ...]:
    optimizer = make_optimizer(_settings(config, network), config.loop.steps, layers)
    return jax.random.key(config.seed), partial(initialise, network), optimizer, mesh


def _state_options(config: TrainConfig, network: Network) -> dict[str, Any]:
    return {"rules": network.rules, "ema": config.ema_decay > 0}


def _make_step(
    config: TrainConfig, network: Network, loss: Loss, state: TrainState, layers: LayerRules | None
) -> Callable[..., Any]:
    settings = _settings(config, network)
    return make_train_step(
        loss,
        make_optimizer(settings, config.loop.steps, layers),
        state=state,
        accumulation=config.accumulation,
        ema_decay=partial(ramped_decay, config.ema_decay) if config.ema_decay else None,
        schedule=learning_rate(settings, config.loop.steps),
        frozen=settings.frozen,
    )


def run_steps(
    config: TrainConfig,
    state: State,
    step: Callable[[State, Any], tuple[State, Mapping[str, jax.Array]]],
    data: TrainData,
    *,
    mesh: Mesh,
    folder: RunFolder,
    log: Log,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
) -> State:
    """Read, step, evaluate and save until the last step, whatever the state and the step are; see `train.loop.fit`."""
    reading = dataclasses.replace(config.loader, seed=config.seed)
    batches = make_loader(data.training, data.transform, reading, *process_slice(mesh))
    return fit(config.loop, state, step, batches, mesh=mesh, folder=folder, log=log, evaluate=evaluate)


def in_steps(config: TrainConfig, num_records: int) -> TrainConfig:
    """Return the configuration with epochs turned into steps."""
    if not config.epochs:
        return config
    per_epoch = num_records / config.loader.batch_size
    steps = max(round(config.epochs * per_epoch), 1)
    warmup = min(round(config.warmup_epochs * per_epoch), steps)
    return dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, steps=steps),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
    )


def check_fit(config: TrainConfig, network: Network, mesh: Mesh | AbstractMesh | None = None) -> Params:
    """Check that the batch and the network divide over the devices, before anything is written.

    Args:
        config: The run.
        network: What is trained.
        mesh: The devices; by default those of `config.mesh`.

    Returns:
        Shapes of the parameters.

    Raises:
        InputError: They do not.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    batch, parts, devices = config.loader.batch_size, config.accumulation, mesh.shape["data"]
    if batch % (parts * devices):
        expected = f"a multiple of {parts} parts (accumulation) x {devices} devices (mesh.data)"
        raise InputError("loader.batch_size", expected, batch, "change the batch size, --accumulation or --mesh.data")
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    try:
        param_shardings(shapes, mesh, network.rules)
    except ValueError as error:
        expected = "a number of devices that divides heads and hidden widths"
        raise InputError("mesh.model", expected, f"{mesh.shape['model']} ({error})", "change --mesh.model") from error
    return shapes


def initialise(network: Network, key: KeyArray, start: Params | None = None) -> Params:
    """Draw parameters; those that are given stand in place of theirs."""
    drawn = network.init(key)
    return drawn if start is None else replace(drawn, named_leaves(start))


def handed_on(state: TrainState) -> Params:
    """Return the parameters that a run is scored by and ends with: their moving average where there is one."""
    return state.params if state.ema_params is None else state.ema_params


def selected(config: TrainConfig, data: TrainData, folder: RunFolder, state: TrainState) -> Params:
    """Return what a run ends with: `handed_on`, of its best state where `loop.best` names what it was scored by."""
    is_scored = config.loop.best and data.held_out is not None
    return handed_on(restore_best(folder, state) if is_scored else state)


def ramped_decay(decay: float, step: Any) -> Float[Array, ""]:
    """Return the average's decay after some steps: never an average over more than about the steps done."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def make_evaluation(
    config: TrainConfig,
    mesh: Mesh,
    held_out: Source,
    transform: Transform,
    score: Score,
    seed: int,
    summarise: Callable[[dict[str, float]], Mapping[str, float]] = dict,
) -> Callable[[TrainState], Mapping[str, float]]:
    """Return the function from a state to the means of `score` over held-out records.

    Args:
        config: The run; records are read in batches of one part.
        mesh: Its devices.
        held_out: The records.
        transform: As in training.
        score: Numbers of each record.
        seed: Seed of the records' keys.
        summarise: From these means to what is told.
    """
    reading = dataclasses.replace(config.loader, batch_size=config.loader.batch_size // config.accumulation)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def total(params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
        weight, fields = batch["weight"], {name: batch[name] for name in batch if name not in ("record", "weight")}
        found = score(params, record_keys(seed, jnp.maximum(batch["record"], 0)), fields)
        return {"weight": weight.sum(), **{name: weight @ value for name, value in found.items()}}

    def evaluate(state: TrainState) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        params = gathered(handed_on(state))
        for batch in evaluation_batches(held_out, transform, reading, *process_slice(mesh)):
            for name, value in jax.device_get(total(params, shard_batch(batch, mesh))).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        weight = sums.pop("weight")
        return summarise({name: value / weight for name, value in sums.items()})

    return evaluate


def score_singly(loss: Loss) -> Score:
    """Return the loss and the terms of each record by itself, one after the other.

    A batch of large images at once would need as many times the memory.
    """

    def score(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> dict[str, Array]:
        def one(record: tuple[KeyArray, Mapping[str, Array]]) -> dict[str, Array]:
            key, fields = record
            value, terms = loss(params, key[None], {name: field[None] for name, field in fields.items()})
            return {"loss": value, **terms}

        return jax.lax.map(one, (keys, dict(batch)))

    return score


def record_keys(seed: int, records: Int[Array, " record"]) -> Key[Array, " record"]:
    """Return the keys of held-out records, which depend on the seed and their numbers alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(records)


def whole(params: Params, config: TrainConfig) -> Params:
    """Return parameters that every process holds in full, for what each does with them by itself."""
    if jax.process_count() == 1:
        return params
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(make_mesh(config.mesh), PartitionSpec()))(params)

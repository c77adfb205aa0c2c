"""The compiled program of a run on labels: what it is compiled for, and what it is given.

Many small runs (a study of label fractions, say) share one program. A run is compiled for its `CompileKey`, and
`make_program` keeps the programs of the last few. Learning rate, warm-up, length, class weights and the means of
regression targets are numbers that the program is given, so they, the records, the seed and the start may differ
between runs without compiling anew; model, batch size, kind of task, augmentation and the optimizer's other settings
may not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jaxmed.arrays.masking import draw_noise
from jaxmed.arrays.platform import target_platform
from jaxmed.arrays.task import TaskKind
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.mixing import MixConfig, mix, partners
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import MOMENTS, Head, HeadConfig, fold_moments, init_head
from jaxmed.nn.model import make_model
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.probe_grid import ProbeGrid, grid_logits, init_grid, rate_factors
from jaxmed.train.mesh import abstract, param_shardings
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer, rate_at
from jaxmed.train.state import TrainState
from jaxmed.train.step import make_train_step

# Static and hashable: a function of a module, or a frozen dataclass with a call, is equal to itself in the next run.
Augment: TypeAlias = Callable[[KeyArray, Float[Array, "..."]], Float[Array, "..."]]
ENCODER = (r"^encoder/",)
# timm's list for these models: tables of positions and the class token, which is a vector here, do not decay;
# registers do.
POSITIONS = (r"^encoder/position$",)


@dataclasses.dataclass(frozen=True)
class CompileKey:
    """Everything that a run is compiled for.

    Attributes:
        encoder: The encoder.
        head: The head on its tokens.
        kind: Kind of the task.
        optimizer: Without its rates and its warm-up, which are given at run time.
        accumulation: See `AdaptConfig`.
        token_keep: See `AdaptConfig`.
        smoothing: See `AdaptConfig`.
        mix: See `AdaptConfig`.
        augment: See `adapt`.
        parts: Which parameters there are and which are trained: "all"; "head", with a frozen encoder; "head on pairs",
            where records bring features and there is no encoder.
        grid: Heads that are trained beside one another in place of one; `head` then says of what features.
    """

    encoder: Encoder
    head: HeadConfig
    kind: TaskKind
    optimizer: OptimizerConfig
    accumulation: int
    token_keep: float
    smoothing: float
    mix: MixConfig
    augment: Augment | None
    parts: Literal["all", "head", "head on pairs"]
    grid: ProbeGrid | None = None


class ScheduleState(NamedTuple):
    """A learning rate as numbers that a program is given; the last part of the optimizer's state.

    Attributes:
        step: Steps done.
        peak: Rate after warm-up.
        end: Rate at the last step.
        warmup: Steps of warm-up.
        length: Steps of the run.
    """

    step: Any
    peak: Any
    end: Any
    warmup: Any
    length: Any


class Program(NamedTuple):
    """Compiled functions of a key; they compile on first use and stay.

    Attributes:
        create: `create(key, start, schedule) -> TrainState`.
        step: `step(state, batch) -> (state, metrics)`.
        state: Shapes of what `create` makes, with their shardings.
    """

    create: Callable[..., TrainState]
    step: Callable[..., Any]
    state: TrainState


def make_schedule(peak: float, end: float, warmup: int, length: int) -> ScheduleState:
    """Return a learning rate at its beginning."""
    return ScheduleState(
        jnp.zeros((), jnp.int32), *(jnp.asarray(number, jnp.float32) for number in (peak, end, warmup, length))
    )


@functools.lru_cache(maxsize=4)
def make_program(compiled: CompileKey, mesh: Mesh) -> Program:
    """Return the program that a run is compiled for; the last four are kept."""
    encoder = compiled.encoder
    frozen = frozen_names(compiled)
    settings = dataclasses.replace(
        compiled.optimizer, peak_lr=1.0, warmup_steps=0, decay="constant", frozen=frozen,
        no_decay=(*compiled.optimizer.no_decay, *POSITIONS),
    )  # fmt: skip
    inner = make_optimizer(settings, 1, encoder.layers)
    if compiled.grid is not None:
        inner = optax.chain(inner, rate_factors(compiled.grid))
    optimizer = optax.chain(inner, _scale_by_schedule(compiled.optimizer))

    def build(key: KeyArray, start: Params, schedule: ScheduleState) -> TrainState:
        init_key, root_key = jax.random.split(key)
        params = {**_draw(compiled, init_key), **start}
        return TrainState(jnp.zeros((), jnp.int32), params, None, (inner.init(params), schedule), root_key)

    schedule = make_schedule(0.0, 0.0, 0, 0)
    shapes: Any = jax.eval_shape(build, jax.random.key(0), {}, schedule)
    places: Any = param_shardings(shapes, mesh, encoder.rules)
    placed = abstract(shapes, places)
    update = make_train_step(
        partial(_loss, compiled),
        optimizer,
        state=placed,
        accumulation=compiled.accumulation,
        frozen=frozen,
        donate=False,
    )

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        rate = _rate(state.opt_state[1], compiled.optimizer)
        state, metrics = update(state, batch)
        moments = {name: metrics.pop(f"moments/{name}") for name in ("mean", "var") if f"moments/{name}" in metrics}
        if moments:
            head = state.params["head"]
            head = {**head, "batch_norm": fold_moments(head["batch_norm"], moments)}
            state = state._replace(params={**state.params, "head": head})
        return state, {**metrics, "learning_rate": rate}

    everywhere = NamedSharding(mesh, PartitionSpec())
    donated = () if target_platform() == "cpu" else (0,)
    return Program(
        jax.jit(build, out_shardings=places),
        jax.jit(step, out_shardings=(places, everywhere), donate_argnums=donated),
        placed,
    )


def frozen_names(compiled: CompileKey) -> tuple[str, ...]:
    """Return regular expressions of the parameters that stay as they are."""
    frozen = (*compiled.optimizer.frozen, *compiled.encoder.frozen, *MOMENTS)
    return (*frozen, *ENCODER) if compiled.parts == "head" else frozen


def _rate(schedule: ScheduleState, settings: OptimizerConfig) -> Array:
    numbers = schedule.step, schedule.peak, schedule.end, schedule.warmup, schedule.length
    return rate_at(*numbers, settings.decay, settings.drop_at)


def _scale_by_schedule(settings: OptimizerConfig) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate = _rate(state, settings)
        return jax.tree.map(lambda leaf: (rate * leaf).astype(leaf.dtype), updates), state._replace(step=state.step + 1)

    return optax.GradientTransformation(lambda params: make_schedule(0.0, 0.0, 0, 0), update)


def _draw(compiled: CompileKey, key: KeyArray) -> Params:
    encoder = compiled.encoder
    if compiled.grid is None:
        head = init_head(compiled.head, encoder.width, encoder.prefix, key)
    else:
        head = init_grid(compiled.grid, compiled.head, encoder.width, key)
    if compiled.parts == "head on pairs":
        return {"head": head}
    return {"encoder": encoder.init(key), "head": head}


def _loss(compiled: CompileKey, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
    own, prefix = None, compiled.encoder.prefix
    if compiled.parts == "head on pairs":
        tokens, prefix = batch["tokens"], min(prefix, 1)
    else:
        tokens, own = _encode_training(compiled, params["encoder"], keys, batch["image"])
    head = make_model(Head(compiled.head, prefix))

    if compiled.grid is not None:
        features = head.apply({}, tokens, method="features")

        def losses_of_one(logits: Array) -> Array:
            return task_losses(compiled.kind, logits, batch["target"], batch["weights"], compiled.smoothing)

        losses = jax.vmap(losses_of_one)(grid_logits(compiled.grid, params["head"], features))
        return (losses * batch["importance"]).mean(), {}
    logits, moments = head.apply(params["head"], tokens, training=True)

    def losses_of(target: Array, weights: Array, importance: Array) -> Array:
        return importance * task_losses(compiled.kind, logits, target, weights, compiled.smoothing)

    losses = losses_of(batch["target"], batch["weights"], batch["importance"])
    if own is not None:
        other = losses_of(*(partners(batch[name]) for name in ("target", "weights", "importance")))
        losses = own * losses + (1 - own) * other
    return losses.mean(), {f"moments/{name}": value for name, value in moments.items()}


def _encode_training(
    compiled: CompileKey, params: Params, keys: Key[Array, " batch"], image: Array
) -> tuple[Array, Float[Array, " batch"] | None]:
    """Return tokens of augmented images as the head takes them, with tokens and branches dropped.

    Each image draws from its own key. Where images are mixed, the share of its own in each comes along.
    """
    encoder, own = compiled.encoder, None
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    augment_keys, token_keys, drop_keys = split[:, 0], split[:, 1], split[:, 2]
    if compiled.augment is not None:
        image = jax.vmap(compiled.augment)(augment_keys, image)
    if compiled.mix.is_on:
        image, own = mix(compiled.mix, jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys), image)
    if compiled.head.layers > 1:  # of a probe, for which nothing is dropped
        return encoder.tokens(params, image, compiled.head.layers), own
    kept = None
    if compiled.token_keep < 1:
        count = max(round(compiled.token_keep * encoder.num_places), 1)
        kept = jnp.argsort(draw_noise(token_keys, encoder.num_places), axis=1)[:, :count]
    if not encoder.is_random:
        return encoder.norm(params, encoder.apply(params, image, *(() if kept is None else (kept,)))), own

    def one(key: KeyArray, image: Array, kept: Array | None) -> Array:
        return encoder.apply(params, image[None], *(() if kept is None else (kept[None],)), key=key)[0]

    return encoder.norm(params, jax.vmap(one)(drop_keys, image, kept)), own

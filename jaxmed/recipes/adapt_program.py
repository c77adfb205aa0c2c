"""The compiled program of a run on labels: what it is compiled for, and what it is given.

Many small runs (a study of label fractions, say) share one program. A run is compiled for its `Plan`, and
`make_program` keeps the programs of the last plans. Learning rate, warm-up, length, class weights and the means of
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
from jaxmed.arrays.task import TaskKind
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.mixing import MixConfig, mix, partners
from jaxmed.models.heads import MOMENTS, Classifier, ClassifierConfig, Head, fold_moments
from jaxmed.models.mae import FROZEN
from jaxmed.models.vit import SHARDING_RULES, Vit
from jaxmed.nn.model import make_model
from jaxmed.objectives.supervised import task_losses
from jaxmed.train.mesh import param_shardings
from jaxmed.train.optimizer import LayerRules, OptimizerConfig, make_optimizer, rate_at
from jaxmed.train.state import TrainState
from jaxmed.train.step import make_train_step

# Static and hashable: a function of a module, or a frozen dataclass with a call, is equal to itself in the next run.
Augment: TypeAlias = Callable[[KeyArray, Float[Array, "..."]], Float[Array, "..."]]
ENCODER = (r"^encoder/",)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run is compiled for.

    Attributes:
        model: The classifier.
        kind: Of the task.
        optimizer: Without its rates and its warm-up, which are given at run time.
        accumulation: See `AdaptConfig`.
        token_keep: See `AdaptConfig`.
        smoothing: See `AdaptConfig`.
        mix: See `AdaptConfig`.
        augment: See `adapt`.
        parts: Which parameters there are and which are trained: "all"; "head", with a frozen encoder; "head on pairs",
            where records bring features and there is no encoder.
    """

    model: ClassifierConfig
    kind: TaskKind
    optimizer: OptimizerConfig
    accumulation: int
    token_keep: float
    smoothing: float
    mix: MixConfig
    augment: Augment | None
    parts: Literal["all", "head", "head on pairs"]


class Span(NamedTuple):
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
    """Compiled functions of a plan; they compile on first use and stay.

    Attributes:
        create: `create(key, start, span) -> TrainState`.
        step: `step(state, batch) -> (state, metrics)`.
    """

    create: Callable[..., TrainState]
    step: Callable[..., Any]


def make_span(peak: float, end: float, warmup: int, length: int) -> Span:
    """Return a learning rate at its beginning."""
    return Span(jnp.zeros((), jnp.int32), *(jnp.asarray(number, jnp.float32) for number in (peak, end, warmup, length)))


@functools.lru_cache(maxsize=4)
def make_program(plan: Plan, mesh: Mesh) -> Program:
    """Return the program of a plan; the last four are kept."""
    frozen = (*plan.optimizer.frozen, *FROZEN, *MOMENTS, *(ENCODER if plan.parts == "head" else ()))
    settings = dataclasses.replace(plan.optimizer, peak_lr=1.0, warmup_steps=0, decay="constant", frozen=frozen)
    inner = make_optimizer(settings, 1, layer_rules(plan.model))
    optimizer = optax.chain(inner, _scale_by_span(plan.optimizer.decay))

    def build(key: KeyArray, start: Params, span: Span) -> TrainState:
        init_key, root_key = jax.random.split(key)
        params = {**_initialise(plan, init_key), **start}
        return TrainState(jnp.zeros((), jnp.int32), params, None, (inner.init(params), span), root_key)

    span = make_span(0.0, 0.0, 0, 0)
    shapes: Any = jax.eval_shape(build, jax.random.key(0), {}, span)
    places: Any = param_shardings(shapes, mesh, SHARDING_RULES)
    placed: Any = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
    update = make_train_step(
        partial(_loss, plan), optimizer, state=placed, accumulation=plan.accumulation, frozen=frozen, donate=False
    )

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        rate = _rate(state.opt_state[1], plan.optimizer.decay)
        state, metrics = update(state, batch)
        moments = {name: metrics.pop(f"moments/{name}") for name in ("mean", "var") if f"moments/{name}" in metrics}
        if moments:
            head = state.params["head"]
            head = {**head, "batch_norm": fold_moments(head["batch_norm"], moments)}
            state = state._replace(params={**state.params, "head": head})
        return state, {**metrics, "learning_rate": rate}

    everywhere = NamedSharding(mesh, PartitionSpec())
    donated = () if jax.default_backend() == "cpu" else (0,)
    return Program(
        jax.jit(build, out_shardings=places),
        jax.jit(step, out_shardings=(places, everywhere), donate_argnums=donated),
    )


def layer_rules(config: ClassifierConfig) -> LayerRules:
    """Return the layers of a classifier: embedding 0, block k is k + 1, norm and head depth + 1."""
    return LayerRules(
        config.encoder.depth,
        (r"^encoder/(patch_embed|class_token|position)(/|$)",),
        r"^encoder/blocks/layer_(\d+)/",
    )


def _rate(span: Span, decay: Literal["cosine", "constant"]) -> Array:
    return rate_at(span.step, span.peak, span.end, span.warmup, span.length, decay)


def _scale_by_span(decay: Literal["cosine", "constant"]) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate = _rate(state, decay)
        return jax.tree.map(lambda leaf: (rate * leaf).astype(leaf.dtype), updates), state._replace(step=state.step + 1)

    return optax.GradientTransformation(lambda params: make_span(0.0, 0.0, 0, 0), update)


def _initialise(plan: Plan, key: KeyArray) -> Params:
    encoder = plan.model.encoder
    if plan.parts == "head on pairs":
        return {"head": make_model(Head(plan.model.head)).init(key, jnp.zeros((1, 2, encoder.width)))}
    return make_model(Classifier(plan.model)).init(key, jnp.zeros((1, *encoder.image_size, encoder.channels)))


def _loss(plan: Plan, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
    own = None
    if plan.parts == "head on pairs":
        tokens = batch["tokens"]
    else:
        tokens, own = _encode_training(plan, params["encoder"], keys, batch["image"])
    logits, moments = make_model(Head(plan.model.head)).apply(params["head"], tokens, training=True)

    def losses_of(target: Array, weights: Array) -> Array:
        return task_losses(plan.kind, logits, target, weights, plan.smoothing)

    losses = losses_of(batch["target"], batch["weights"])
    if own is not None:
        other = losses_of(partners(batch["target"]), partners(batch["weights"]))
        losses = own * losses + (1 - own) * other
    return losses.mean(), {f"moments/{name}": value for name, value in moments.items()}


def _encode_training(
    plan: Plan, params: Params, keys: Key[Array, " batch"], image: Array
) -> tuple[Array, Float[Array, " batch"] | None]:
    """Return tokens of augmented images, with tokens and branches dropped; each image draws from its own key.

    Where images are mixed, the share of its own in each comes along.
    """
    encoder, own = plan.model.encoder, None
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    augment_keys, token_keys, drop_keys = split[:, 0], split[:, 1], split[:, 2]
    if plan.augment is not None:
        image = jax.vmap(plan.augment)(augment_keys, image)
    if plan.mix.is_on:
        image, own = mix(plan.mix, jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys), image)
    kept = None
    if plan.token_keep < 1:
        count = max(round(plan.token_keep * encoder.num_tokens), 1)
        kept = jnp.argsort(draw_noise(token_keys, encoder.num_tokens), axis=1)[:, :count]
    apply = make_model(Vit(encoder)).apply
    if not encoder.drop_path_rate:
        return apply(params, image, kept), own

    def one(key: KeyArray, image: Array, kept: Array | None) -> Array:
        return apply(params, image[None], None if kept is None else kept[None], key=key)[0]

    return jax.vmap(one)(drop_keys, image, kept), own

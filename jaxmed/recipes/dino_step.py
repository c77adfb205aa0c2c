"""One step of DINOv2's pre-training: crops, loss, AdamW on the student, and the teacher after it.

Source: DINOv2, arXiv:2304.07193, appendix B, and its official code.
Deviation: schedules count steps done over all steps, where the official tables end one step earlier.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.layers import holding_layers
from jaxmed.arrays.platform import target_platform
from jaxmed.arrays.trees import exponential_average, map_named, matches
from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.data.augment_pictures import Crops
from jaxmed.models.vit import BLOCK
from jaxmed.nn.model import LayerRules
from jaxmed.recipes.dino_loss import Centres, DinoConfig, dino_loss, dino_network
from jaxmed.recipes.training import TrainConfig
from jaxmed.train.mesh import hold_layers, hold_split, hold_whole
from jaxmed.train.optimizer import layer_scales, learning_rate, rate_at

Augment: TypeAlias = Callable[[KeyArray, Float[Array, "..."]], Crops]
Step: TypeAlias = Callable[["DinoState", Mapping[str, Array]], tuple["DinoState", dict[str, Scalar]]]
# What makes tokens of an image has the smallest learning rate; the last layer of a head waits.
EMBEDDING = (r"^encoder/(patch_embed|class_token|position|mask_token|register_tokens)(/|$)",)
LAST_LAYER = (r"head/(prototypes|gain)$",)


class DinoState(NamedTuple):
    """The state of a run.

    Attributes:
        step: Steps done.
        student: Trained parameters: "encoder", "dino_head" and, where it is not shared, "ibot_head".
        teacher: Their moving average, of the same names.
        centres: Zeros where Sinkhorn-Knopp takes their place.
        opt_state: Adam's moments.
        key: Root key of the run.
        anchor: Encoder whose similarity of patches the student keeps to, as it was given; None without it.
    """

    step: Int[Array, ""]
    student: Params
    teacher: Params
    centres: Centres
    opt_state: Any
    key: KeyArray
    anchor: Params | None = None

    @property
    def params(self) -> Params:
        """What is trained."""
        return self.student


class Settings(NamedTuple):
    """What the schedules say at a step.

    Attributes:
        learning_rate: Before the factors of layers.
        weight_decay: Of the parameters that have any.
        teacher_momentum: See `DinoConfig`.
        teacher_temperature: See `DinoConfig`.
        is_thawed: Whether prototypes move.
    """

    learning_rate: Scalar
    weight_decay: Scalar
    teacher_momentum: Scalar
    teacher_temperature: Scalar
    is_thawed: Bool[Array, ""]


def settings_at(step: Any, config: TrainConfig, dino: DinoConfig, per_epoch: float) -> Settings:
    """Return what the schedules say.

    Args:
        step: Steps done.
        config: The run, its length in steps; the peak of the rate is scaled already.
        dino: What is trained and how.
        per_epoch: Number of steps in an epoch.
    """
    steps, optimizer = config.loop.steps, config.optimizer
    first, last = dino.teacher_temperature
    risen = jnp.clip(step / max(dino.temperature_epochs * per_epoch, 1), 0, 1)
    return Settings(
        jnp.asarray(learning_rate(optimizer, steps)(step)),
        jnp.asarray(rate_at(step, optimizer.weight_decay, dino.final_weight_decay, 0, steps)),
        jnp.asarray(rate_at(step, dino.teacher_momentum, 1.0, 0, steps)),
        first + (last - first) * risen,
        jnp.asarray(step >= round(dino.freeze_epochs * per_epoch)),
    )


def make_dino_step(
    config: TrainConfig, dino: DinoConfig, augment: Augment, per_epoch: float, mesh: Mesh, state: DinoState
) -> Step:
    """Compile the step of a run: crops, masks, loss, clipped gradient, AdamW, and the teacher after it.

    Args:
        config: The run, as in `settings_at`.
        dino: What is trained and how.
        augment: One image to its crops.
        per_epoch: Number of steps in an epoch.
        mesh: Its devices.
        state: A state of the run, or its shapes with their shardings; the new one lies on the devices as it does.
    """
    frozen = (*config.optimizer.frozen, *dino_network(dino).frozen)

    def hold(name: str, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if matches(name, frozen) else leaf

    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    layers = hold_layers(placement.student)

    def step(state: DinoState, batch: Mapping[str, Array]) -> tuple[DinoState, dict[str, Scalar]]:
        at = settings_at(state.step, config, dino, per_epoch)
        crop_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        keys = jax.random.split(crop_key, len(batch["image"]))
        crops = jax.vmap(augment)(keys, batch["image"])
        _check_crops(dino, crops)

        teacher = hold_whole(state.teacher, placement.teacher)
        anchor = hold_whole(state.anchor, placement.anchor)

        def objective(student: Params) -> Any:
            held = map_named(hold, hold_whole(student, placement.student))
            given = mesh, held, teacher, state.centres, loss_key, crops, at.teacher_temperature
            with holding_layers(layers):
                return dino_loss(dino, *given, anchor)

        gradient, (centres, metrics) = jax.grad(objective, has_aux=True)(state.student)
        gradient = hold_split(gradient, placement.student)
        student, opt_state, norms = move(config, dino, frozen, at, gradient, state.opt_state, state.student)
        teacher = exponential_average(state.teacher, student, at.teacher_momentum)
        metrics |= norms | {name: value for name, value in at._asdict().items() if name != "is_thawed"}
        return DinoState(state.step + 1, student, teacher, centres, opt_state, state.key, state.anchor), metrics

    donated = () if target_platform() == "cpu" else (0,)
    return jax.jit(step, out_shardings=(placement, NamedSharding(mesh, PartitionSpec())), donate_argnums=donated)


def move(
    config: TrainConfig,
    dino: DinoConfig,
    frozen: tuple[str, ...],
    at: Settings,
    gradient: Params,
    opt_state: Any,
    params: Params,
) -> tuple[Params, Any, dict[str, Scalar]]:
    """Apply AdamW to the gradient, each part of it ("encoder", "dino_head", ...) clipped by its own norm.

    Weight decay leaves out what optimizer.no_decay names, and nothing else: as in the official code, tokens and the
    table of positions are decayed.

    Returns:
        Parameters, moments, and the norm of each part before it was clipped.
    """
    settings = config.optimizer
    norms = {name: optax.tree.norm(part) for name, part in gradient.items()}
    if settings.clip_norm:
        scales = {name: jnp.minimum(1, settings.clip_norm / (norm + 1e-6)) for name, norm in norms.items()}
        gradient = {name: jax.tree.map(lambda g: g * scales[name], part) for name, part in gradient.items()}  # noqa: B023
    moves, opt_state = adam(config).update(gradient, opt_state)
    layers = layer_scales(params, settings.layer_decay, LayerRules(dino.encoder.depth, EMBEDDING, BLOCK))

    def update(name: str, leaf: Array, change: Array, factor: float) -> Array:
        if matches(name, frozen):
            return leaf
        if matches(name, (r"^encoder/patch_embed/",)):
            factor *= dino.embedding_rate
        rate = at.learning_rate * factor
        if matches(name, LAST_LAYER):
            rate = jnp.where(at.is_thawed, rate, 0)
        decay = 0 if matches(name, settings.no_decay) else at.weight_decay
        return leaf - rate * (change + decay * leaf)

    return map_named(update, params, moves, layers), opt_state, {f"grad_norm_{name}": norms[name] for name in norms}


def adam(config: TrainConfig) -> optax.GradientTransformation:
    """Return the moments of a run's optimizer."""
    return optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2, config.optimizer.eps)


def _check_crops(config: DinoConfig, crops: Crops) -> None:
    channels = config.encoder.channels
    expected = ((2, *config.encoder.image_size, channels), (config.local_crops, *config.local_size, channels))
    found = (crops.globals_.shape[1:], crops.locals_.shape[1:])
    if found != expected:
        raise ValueError(f"augment: expected crops of {expected[0]} and {expected[1]}, got {found[0]} and {found[1]}")

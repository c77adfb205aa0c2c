"""Many small fits in one compiled program: runs that differ in records, start and seed are mapped over, not repeated.

For images that fit the device all at once, and encoders of which several do too. A run is a scan over optax; the images
are shared by all runs, each of which draws its batches from rows of its own. An accelerator maps all runs at once; on a
CPU, whose programs of small products keep hardly more than a core busy, each core takes a run after the other (with two
cores 1.2 times as fast as mapping them). Larger models and sets are trained one by one, by `recipes.adapt` and
`recipes.pretrain_mae`.

Source of the recipe: ProFound's fine-tuning code (class-balanced drawing with replacement, AdamW, warm-up and half a
cosine to 0, the parameters of the lowest validation loss).
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from jaxmed.arrays.platform import usable_cores
from jaxmed.arrays.task import TaskKind
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, Length, Size, Whole, checked
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, init_head
from jaxmed.models.mae import MaskedModel
from jaxmed.nn.model import make_model
from jaxmed.objectives.masked import masked_loss
from jaxmed.objectives.supervised import task_losses
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How one run goes.

    Attributes:
        steps: Of every run, whatever the number of its records.
        batch_size: Records of a step, drawn with replacement so that classes are even.
        optimizer: How parameters are updated.
        shift: Largest random shift of an image along its last two axes, in voxels; beside it images are flipped along
            the last one, left to right.
        evaluations: Times, evenly spread and at the last step too, that the loss of validation records is looked at:
            the parameters of the lowest are kept. 0 takes those of the last step, where the rate is 0.
    """

    steps: Count = 400
    batch_size: Size = 32
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=5e-4, warmup_steps=40, weight_decay=0.05)
    shift: Length = 2
    evaluations: Whole = 0

    def __post_init__(self) -> None:
        if self.evaluations > self.steps:
            raise ValueError(f"evaluations: expected at most the {self.steps} steps, found {self.evaluations}")


class HeldOut(NamedTuple):
    """Validation records.

    Attributes:
        images: All of them.
        targets: Their labels, as those of training.
        shares: What each run selects by: 1 for its own records, 0 for others.
    """

    images: Float[Any, "validation *size channel"]
    targets: Float[Any, "validation column"]
    shares: Float[np.ndarray, "run validation"]


def fit_runs(
    config: FitConfig,
    encoder: Encoder,
    head: HeadConfig,
    kind: TaskKind,
    images: Float[Any, "record *size channel"],
    targets: Float[Any, "record column"],
    chances: Float[np.ndarray, "run record"],
    params: Params,
    keys: Key[Array, " run"],
    test_images: Float[Any, "test *size channel"],
    held_out: HeldOut | None = None,
) -> Float[np.ndarray, "run test output"]:
    """Train an encoder with a head once for every run, and return the outputs for test images.

    Args:
        config: The recipe; equal ones share a program, on an accelerator where their numbers of runs are equal.
        encoder: What is trained.
        head: What stands on it.
        kind: Of the task.
        images: All training images.
        targets: Their labels, as `objectives.supervised.task_losses` takes them.
        chances: How often each run draws each record, relatively; 0 for records that are not its own.
        params: Where each run starts, see `start_runs`: the first axis of every leaf is the run.
        keys: One per run.
        test_images: What is predicted.
        held_out: What selects, where `config.evaluations` is above 0.
    """
    program = _program(config, encoder, head, kind)
    others, wanted, shares = (
        [jnp.asarray(part) for part in held_out] if config.evaluations and held_out is not None else [None] * 3
    )
    logs, images, targets, test_images = jnp.log(chances), *map(jnp.asarray, (images, targets, test_images))

    def call(which: slice) -> Float[np.ndarray, "part test output"]:
        own = jax.tree.map(lambda leaf: leaf[which], (logs, params, keys, shares))
        return np.asarray(program(images, targets, *own[:3], test_images, others, wanted, own[3]))

    if jax.default_backend() != "cpu":
        return call(slice(None))
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        return np.concatenate(list(pool.map(call, (slice(run, run + 1) for run in range(len(keys))))))


def start_runs(
    encoder: Encoder, head: HeadConfig, keys: Key[Array, " run"], given: Params | None, is_given: np.ndarray
) -> Params:
    """Draw the parameters of every run; those of the encoder are given in some.

    Args:
        encoder: The encoder.
        head: Its head, which is drawn in all runs: one key gives one head whatever the start.
        keys: One per run.
        given: Pre-trained parameters of the encoder; None where no run takes them.
        is_given: Which runs do.
    """
    drawn = _draw(encoder, head)(keys)
    if given is None:
        return drawn
    taken = jnp.asarray(is_given)

    def choose(own: Array, pretrained: Any) -> Array:
        return jnp.where(taken.reshape(-1, *(1,) * (own.ndim - 1)), jnp.asarray(pretrained, own.dtype), own)

    return {**drawn, "encoder": jax.tree.map(choose, drawn["encoder"], given)}


@functools.lru_cache(maxsize=8)
def _draw(encoder: Encoder, head: HeadConfig) -> Callable[[Key[Array, " run"]], Params]:
    def draw(key: KeyArray) -> Params:
        encoder_key, head_key = jax.random.split(key)
        return {"encoder": encoder.init(encoder_key), "head": init_head(head, encoder.width, encoder.prefix, head_key)}

    return jax.jit(jax.vmap(draw))


@functools.lru_cache(maxsize=8)  # one program for all cells of a study
def _program(config: FitConfig, encoder: Encoder, head: HeadConfig, kind: TaskKind) -> Callable[..., Array]:
    settings = dataclasses.replace(config.optimizer, frozen=(*config.optimizer.frozen, *encoder.frozen))
    optimizer = make_optimizer(settings, config.steps, encoder.layers)
    apply_head = make_model(Head(head, encoder.prefix)).apply

    def predict(params: Params, images: Array, key: KeyArray | None = None) -> Array:
        tokens = encoder.apply(params["encoder"], images, key=key) if encoder.is_random else encoder.apply(
            params["encoder"], images
        )  # fmt: skip
        return apply_head(params["head"], encoder.norm(params["encoder"], tokens))[0]

    def run(
        images: Array, targets: Array, logs: Array, params: Params, key: KeyArray, test_images: Array,
        others: Array | None, wanted: Array | None, shares: Array | None,
    ) -> Array:  # fmt: skip
        def predict_all(params: Params, images: Array) -> Array:
            return jax.lax.map(lambda image: predict(params, image[None])[0], images, batch_size=64)

        def step(carry: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            row_key, vary_key, drop_key = jax.random.split(jax.random.fold_in(key, number), 3)
            rows = jax.random.categorical(row_key, logs, shape=(config.batch_size,))
            batch = jax.vmap(partial(vary, config.shift))(jax.random.split(vary_key, config.batch_size), images[rows])

            def loss(params: Params) -> Array:
                return task_losses(kind, predict(params, batch, drop_key), targets[rows]).mean()

            update, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, update), state), None

        numbers = jnp.arange(config.steps)
        carry = params, optimizer.init(params)
        if others is None or wanted is None or shares is None:
            (params, _), _ = jax.lax.scan(step, carry, numbers)
            return predict_all(params, test_images)

        def stretch(carry: tuple[Any, Any, Any], numbers: Array) -> tuple[tuple[Any, Any, Any], None]:
            now, best, least = carry
            now, _ = jax.lax.scan(step, now, numbers)
            losses = task_losses(kind, predict_all(now[0], others), wanted)
            loss = (shares * losses).sum() / shares.sum()
            best = jax.tree.map(lambda new, old: jnp.where(loss < least, new, old), now[0], best)
            return (now, best, jnp.minimum(loss, least)), None

        before, each = divmod(config.steps, config.evaluations)[::-1]
        carry, _ = jax.lax.scan(step, carry, numbers[:before])
        parts = numbers[before:].reshape(config.evaluations, each)
        (_, best, _), _ = jax.lax.scan(stretch, (carry, carry[0], jnp.float32(jnp.inf)), parts)
        return predict_all(best, test_images)

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0, 0, 0, None, None, None, 0)))


def vary(shift: int, key: KeyArray, image: Float[Array, "*size channel"]) -> Float[Array, "*size channel"]:
    """Flip an image along its last spatial axis, or not, and shift it along the last two; what leaves comes in again.

    Args:
        shift: Largest shift in voxels.
        key: Consumed.
        image: Channels last.
    """
    flip_key, shift_key = jax.random.split(key)
    image = jnp.where(jax.random.bernoulli(flip_key), jnp.flip(image, -2), image)
    moves = jax.random.randint(shift_key, (2,), -shift, shift + 1)
    return jnp.roll(image, moves, (image.ndim - 3, image.ndim - 2))


def pretrain_masked(
    config: FitConfig, model: MaskedModel, images: Float[Any, "record *size channel"], key: KeyArray
) -> tuple[Params, Float[np.ndarray, " step"]]:
    """Train a masked autoencoder on images without labels; return its parameters and the loss of every step.

    Args:
        config: The recipe; batches are drawn evenly, with replacement.
        model: Any encoder of visible patches with its decoder.
        images: All of them.
        key: Draws parameters, batches and masks.
    """
    settings = dataclasses.replace(config.optimizer, frozen=(*config.optimizer.frozen, *model.network.frozen))
    optimizer = make_optimizer(settings, config.steps)
    init_key, run_key = jax.random.split(key)

    @jax.jit
    def train(params: Params, images: Array) -> tuple[Params, Array]:
        def step(carry: tuple[Any, Any], number: Int[Array, ""]) -> tuple[tuple[Any, Any], Array]:
            params, state = carry
            row_key, vary_key, mask_key = jax.random.split(jax.random.fold_in(run_key, number), 3)
            rows = jax.random.randint(row_key, (config.batch_size,), 0, len(images))
            batch = jax.vmap(partial(vary, config.shift))(jax.random.split(vary_key, config.batch_size), images[rows])
            masks = jax.random.split(mask_key, config.batch_size)
            loss = partial(masked_loss, model)
            (value, _), slope = jax.value_and_grad(loss, has_aux=True)(params, masks, {"image": batch})
            update, state = optimizer.update(slope, state, params)
            return (optax.apply_updates(params, update), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(config.steps))
        return params, losses

    params, losses = train(jax.jit(model.network.init)(init_key), jnp.asarray(images))
    return params, np.asarray(losses)

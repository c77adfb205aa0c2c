"""The generator alone, trained on labels by cross-entropy: what System I and System II are compared with.

Either from scratch on the labels there are, or by MAML: from parameters that a few steps on the few labels of any
familiar task turn into a good network for it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import Params
from jaxmed.config import Length, Positive, Size, checked
from jaxmed.data.augment import AugmentConfig
from jaxmed.models.mask_generator import GeneratorConfig, make_generator
from jaxmed.systems.selfplay.data import Cases
from jaxmed.systems.selfplay.system_one import AS_THEY_ARE, make_variants

Loss: TypeAlias = Callable[[Params, Any], Array]
"""(parameters, batch) -> loss."""


def fit_supervised(
    seed: int,
    config: GeneratorConfig,
    images: Float[np.ndarray, "case *space"],
    masks: Bool[np.ndarray, "case *space"],
    *,
    steps: int,
    batch_size: int = 16,
    rate: float = 1e-3,
    variants: AugmentConfig = AS_THEY_ARE,
    few: int = 0,
    variants_of_few: AugmentConfig = AS_THEY_ARE,
) -> Params:
    """Train a generator from scratch on labelled images, as {"generator": ...}.

    Args:
        seed: Seed of parameters and batches.
        config: Sizes.
        images: In [0, 1].
        masks: Their masks.
        steps: Steps of Adam, its rate falling to 0 by half a cosine.
        batch_size: Images of a step, drawn with replacement.
        rate: At the start.
        variants: Variants of the images, fresh in every step.
        few: Last images, which have variants of their own.
        variants_of_few: Variants of those.
    """
    model = make_generator(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:], 1)))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    opt_state = optimizer.init(params)
    generator = np.random.default_rng(seed)
    step = _make_step(lambda params, *batch: mask_loss(config, params, batch), optimizer)
    root = jax.random.fold_in(jax.random.key(seed), 1)
    for number in range(steps):
        chosen = generator.integers(0, len(images), min(batch_size, 2 * len(images)))
        seen, truth = images[chosen], masks[chosen].astype(np.float32)
        drawn = [
            make_variants(jax.random.fold_in(root, number), ranges, jnp.asarray(seen), jnp.asarray(truth))
            for ranges in (variants, variants_of_few)
        ]
        is_few = (chosen >= len(images) - few).reshape(-1, *(1,) * (images.ndim - 1))
        seen, truth = (jnp.where(is_few, theirs, usual) for usual, theirs in zip(*drawn, strict=True))
        params, opt_state = step(params, opt_state, seen, truth)
    return {"generator": params}


def _make_step(loss: Callable[[Params, Array, Array], Array], optimizer: optax.GradientTransformation) -> Any:
    @jax.jit
    def step(params: Params, opt_state: Any, images: Array, masks: Array) -> tuple[Params, Any]:
        update, opt_state = optimizer.update(jax.grad(loss)(params, images, masks), opt_state)
        return jax.tree.map(jnp.add, params, update), opt_state

    return step


def mask_loss(config: GeneratorConfig, params: Params, batch: tuple[Array, Array]) -> Array:
    """Return the cross-entropy of the masks of a batch, (images, masks as 0 and 1)."""
    images, masks = batch
    logits = make_generator(config).apply(params, images[..., None])
    return optax.sigmoid_binary_cross_entropy(logits, masks).mean()


# MAML ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class MamlConfig:
    """Model-agnostic meta-learning of the generator.

    Attributes:
        steps: Tasks seen in meta-training; 0 leaves the arm out.
        inner_steps: Gradient steps on the labelled images of a task, in training and on the new task.
        inner_rate: Learning rate of these plain gradient steps.
        rate: Learning rate of Adam on the start; it falls to 0 by half a cosine.
        queries: Images of the task by which the result of the inner steps is judged.

    Source: Finn et al., arXiv:1703.03400, with second derivatives.
    """

    steps: Length = 400
    inner_steps: Size = 4
    inner_rate: Positive = 0.1
    rate: Positive = 1e-3
    queries: Size = 8


def take_inner_steps(loss: Loss, params: Params, batch: Any, rate: float, steps: int) -> Params:
    """Return parameters after plain gradient steps on a batch; differentiable by the parameters it began with."""
    for _ in range(steps):  # unrolled: on a CPU XLA's weight gradients of convolutions crawl inside loops
        params = jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, jax.grad(loss)(params, batch))
    return params


def maml_loss(loss: Loss, params: Params, support: Any, queries: Any, rate: float, steps: int) -> Array:
    """Return the loss on a task's queries after inner steps on its support (MAML, algorithm 1)."""
    return loss(take_inner_steps(loss, params, support, rate, steps), queries)


def fit_maml(
    seed: int,
    config: GeneratorConfig,
    maml: MamlConfig,
    cases: Cases,
    shots: int,
    variants: AugmentConfig = AS_THEY_ARE,
) -> Params:
    """Learn a start for the generator on familiar tasks, as {"generator": ...}.

    Args:
        seed: The seed of parameters, tasks and images.
        config: Sizes of the network.
        maml: How it is learnt.
        cases: Labelled images of the familiar tasks.
        shots: Labelled images of a task that the inner steps see.
        variants: Fresh variants of the images of every task.
    """
    params = make_generator(config).init(jax.random.key(seed), jnp.zeros((1, *cases.images.shape[1:], 1)))
    optimizer = optax.adam(optax.cosine_decay_schedule(maml.rate, max(maml.steps, 1)))
    opt_state, generator = optimizer.init(params), np.random.default_rng((seed, 13))

    def judge(params: Params, images: Array, masks: Array) -> Array:
        support, queries = (images[:shots], masks[:shots]), (images[shots:], masks[shots:])
        return maml_loss(partial(mask_loss, config), params, support, queries, maml.inner_rate, maml.inner_steps)

    step = _make_step(judge, optimizer)
    root = jax.random.fold_in(jax.random.key(seed), 2)
    places = [np.flatnonzero(cases.tasks == number) for number in range(len(cases.task_names))]
    for number in range(maml.steps):
        place = places[generator.integers(len(places))]
        count = shots + maml.queries
        chosen = generator.choice(place, count, replace=len(place) < count)
        seen, truth = jnp.asarray(cases.images[chosen]), jnp.asarray(cases.masks[chosen], jnp.float32)
        params, opt_state = step(
            params, opt_state, *make_variants(jax.random.fold_in(root, number), variants, seen, truth)
        )
    return {"generator": params}


def adapt_maml(
    config: GeneratorConfig,
    maml: MamlConfig,
    params: Params,
    images: Float[np.ndarray, "case *space"],
    masks: Bool[np.ndarray, "case *space"],
) -> Params:
    """Take the inner steps on the labelled images of a new task, as {"generator": ...}."""
    batch = jnp.asarray(images), jnp.asarray(masks, jnp.float32)
    return {"generator": _inner(config, maml, params["generator"], batch)}


@partial(jax.jit, static_argnums=(0, 1))
def _inner(config: GeneratorConfig, maml: MamlConfig, params: Params, batch: tuple[Array, Array]) -> Params:
    return take_inner_steps(partial(mask_loss, config), params, batch, maml.inner_rate, maml.inner_steps)

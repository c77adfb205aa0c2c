"""Few-shot segmentation by labels alone.

A network is trained from scratch on the labels there are, or by MAML: from parameters that a few steps on the few
labels of any familiar task turn into a good network for it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import Params
from jaxmed.config import Length, Positive, Size, checked
from jaxmed.data.augment import AS_THEY_ARE, AugmentConfig, make_variants
from jaxmed.data.tasks import Cases
from jaxmed.models.mask_generator import GeneratorConfig, make_generator
from jaxmed.objectives.segmentation import voxel_cross_entropy

Loss: TypeAlias = Callable[[Params, Any], Array]
"""(parameters, batch) -> loss."""


def mask_loss(config: GeneratorConfig, params: Params, batch: tuple[Array, Array]) -> Array:
    """Return the cross-entropy of the masks of a batch, (images, masks as 0 and 1)."""
    images, masks = batch
    logits = make_generator(config).apply(params, images[..., None])
    return voxel_cross_entropy(logits[..., None], masks).mean()


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
    """Train a network from scratch on labelled images, by Adam whose rate falls to 0 by half a cosine.

    Images of a step are drawn with replacement, each in a fresh variant; the last `few` have variants of their own.
    """
    params, opt_state, step = _begin(seed, config, images, rate, steps, partial(mask_loss, config))
    generator, root = np.random.default_rng(seed), jax.random.fold_in(jax.random.key(seed), 1)
    for number in range(steps):
        chosen = generator.integers(0, len(images), min(batch_size, 2 * len(images)))
        key, seen, truth = jax.random.fold_in(root, number), *_pair(images[chosen], masks[chosen])
        drawn = [make_variants(key, ranges, seen, truth) for ranges in (variants, variants_of_few)]
        is_few = (chosen >= len(images) - few).reshape(-1, *(1,) * (images.ndim - 1))
        batch = tuple(jnp.where(is_few, theirs, usual) for usual, theirs in zip(*drawn, strict=True))
        params, opt_state = step(params, opt_state, batch)
    return params


def fit_baselines(
    seed: int,
    config: GeneratorConfig,
    shots: Cases,
    training: Cases | None,
    *,
    steps: int,
    maml: "MamlConfig",
    variants: AugmentConfig = AS_THEY_ARE,
    variants_of_shots: AugmentConfig = AS_THEY_ARE,
) -> Iterator[tuple[str, Params]]:
    """Yield networks that learn from labels alone: from a new task's few, from all there are, and by MAML.

    Without familiar tasks (`training`) there is only the first; MAML is left out where it has no steps. Familiar images
    and the few labelled ones have variants of their own.
    """
    labelled = {"supervised, few labels": (shots.images, shots.masks)}
    if training is not None:
        labelled["supervised, all labels"] = (
            np.concatenate([training.images, shots.images]), np.concatenate([training.masks, shots.masks])
        )  # fmt: skip
    for name, (images, masks) in labelled.items():
        yield name, fit_supervised(
            seed, config, images, masks, steps=steps, variants=variants, few=len(shots.images),
            variants_of_few=variants_of_shots,
        )  # fmt: skip
    if training is not None and maml.steps:
        params = fit_maml(seed, config, maml, training, len(shots.images), variants)
        yield "MAML", adapt_maml(config, maml, params, shots.images, shots.masks)


# MAML ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
@checked
class MamlConfig:
    """Model-agnostic meta-learning of a segmenting network.

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
    """Learn a start for a network on familiar tasks, whose inner steps see so many labelled images (`shots`)."""

    def loss(params: Params, batch: tuple[Array, Array]) -> Array:
        support, queries = (tuple(part[which] for part in batch) for which in (slice(shots), slice(shots, None)))
        return maml_loss(partial(mask_loss, config), params, support, queries, maml.inner_rate, maml.inner_steps)

    params, opt_state, step = _begin(seed, config, cases.images, maml.rate, max(maml.steps, 1), loss)
    generator, root = np.random.default_rng((seed, 13)), jax.random.fold_in(jax.random.key(seed), 2)
    for number in range(maml.steps):
        of_task, count = cases.draw_task(generator), shots + maml.queries
        chosen = generator.choice(of_task, count, replace=len(of_task) < count)
        pair = _pair(cases.images[chosen], cases.masks[chosen])
        batch = make_variants(jax.random.fold_in(root, number), variants, *pair)
        params, opt_state = step(params, opt_state, batch)
    return params


@partial(jax.jit, static_argnums=0)
def reptile(epsilon: float, old: Params, new: Params) -> Params:
    """Move parameters a share of the way to where the steps on a task led: old + epsilon (new - old).

    Source: arXiv:1803.02999, equation 1.
    """
    return jax.tree.map(lambda old, new: old + epsilon * (new - old), old, new)


def adapt_maml(
    config: GeneratorConfig,
    maml: MamlConfig,
    params: Params,
    images: Float[np.ndarray, "case *space"],
    masks: Bool[np.ndarray, "case *space"],
) -> Params:
    """Take the inner steps on the labelled images of a new task."""
    return _take_inner_steps(config, maml, params, _pair(images, masks))


@partial(jax.jit, static_argnums=(0, 1))
def _take_inner_steps(config: GeneratorConfig, maml: MamlConfig, params: Params, batch: tuple[Array, Array]) -> Params:
    return take_inner_steps(partial(mask_loss, config), params, batch, maml.inner_rate, maml.inner_steps)


def _begin(
    seed: int, config: GeneratorConfig, images: np.ndarray, rate: float, steps: int, loss: Loss
) -> tuple[Params, Any, Callable[..., tuple[Params, Any]]]:
    """Return fresh parameters, the state of Adam, and the compiled step."""
    params = make_generator(config).init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:], 1)))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params: Params, opt_state: Any, batch: tuple[Array, Array]) -> tuple[Params, Any]:
        update, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state)
        return jax.tree.map(jnp.add, params, update), opt_state

    return params, optimizer.init(params), step


def _pair(images: np.ndarray, masks: np.ndarray) -> tuple[Array, Array]:
    return jnp.asarray(images), jnp.asarray(masks, jnp.float32)

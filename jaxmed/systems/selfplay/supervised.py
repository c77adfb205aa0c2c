"""The generator alone, trained on labels by cross-entropy: what System I and System II are compared with."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import Params
from jaxmed.models.mask_generator import GeneratorConfig, make_generator
from jaxmed.systems.selfplay.augmentation import AugmentConfig, augment


def fit_supervised(
    seed: int,
    config: GeneratorConfig,
    images: Float[np.ndarray, "case *space"],
    masks: Bool[np.ndarray, "case *space"],
    *,
    steps: int,
    batch_size: int = 16,
    rate: float = 1e-3,
    variants: AugmentConfig = AugmentConfig(),
    few: int = 0,
    variants_of_few: AugmentConfig = AugmentConfig(),
) -> Params:
    """Train a generator from scratch on labelled images, as {"generator": ...}.

    Args:
        seed: Of parameters and batches.
        config: Sizes.
        images: In [0, 1].
        masks: Their masks.
        steps: Of Adam, its rate falling to 0 by half a cosine.
        batch_size: Images of a step, drawn with replacement.
        rate: At the start.
        variants: Of the images, fresh in every step.
        few: Last images, which have variants of their own.
        variants_of_few: Of those.
    """
    model = make_generator(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:], 1)))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    opt_state = optimizer.init(params)
    generator = np.random.default_rng(seed)
    step = jax.jit(partial(_step, config, optimizer))
    root = jax.random.fold_in(jax.random.key(seed), 1)
    for number in range(steps):
        chosen = generator.integers(0, len(images), min(batch_size, 2 * len(images)))
        seen, truth = images[chosen], masks[chosen].astype(np.float32)
        drawn = [
            augment(jax.random.fold_in(root, number), ranges, jnp.asarray(seen), jnp.asarray(truth))
            for ranges in (variants, variants_of_few)
        ]
        is_few = (chosen >= len(images) - few).reshape(-1, *(1,) * (images.ndim - 1))
        seen, truth = (jnp.where(is_few, theirs, usual) for usual, theirs in zip(*drawn, strict=True))
        params, opt_state = step(params, opt_state, seen, truth)
    return {"generator": params}


def _step(
    config: GeneratorConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    images: Array,
    masks: Array,
) -> tuple[Params, Any]:
    def loss(params: Params) -> Array:
        logits = make_generator(config).apply(params, images[..., None])
        return optax.sigmoid_binary_cross_entropy(logits, masks).mean()

    update, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    return jax.tree.map(jnp.add, params, update), opt_state

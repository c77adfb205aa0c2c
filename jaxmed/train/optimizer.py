"""Optimizers as records: AdamW for networks, LARS and SGD for probes, with what fine-tuning adds to them.

Everything is an optax chain in this order: clip the gradient, precondition, decay the weights, scale by layer, scale
by the learning rate. Frozen parameters have no optimizer state and take no part in the clipped norm.
"""

import dataclasses
import re
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxmed.arrays.trees import map_named, matches
from jaxmed.arrays.types import Params
from jaxmed.config import Decay, Fraction, NonNegative, Whole, checked
from jaxmed.nn.model import LayerRules


@dataclasses.dataclass(frozen=True)
@checked
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        kind: adamw, lars (linear probes on large batches, arXiv:1708.03888) or sgd (with momentum).
        peak_lr: Learning rate after warm-up.
        end_lr: Learning rate at the last step.
        warmup_steps: Steps over which the rate rises linearly from 0.
        decay: How the rate falls from peak to end after warm-up; "step" falls at once.
        drop_at: When "step" falls, as a share of the run that is counted from the end of warm-up.
        weight_decay: Decoupled from the gradient in adamw, part of it in lars and sgd.
        no_decay: Regular expressions of parameters without weight decay, besides all of fewer than two axes.
        b1: Decay of the first moment (adamw), or momentum (lars, sgd).
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_norm: Largest global norm of the gradient; 0 does not clip.
        layer_decay: Factor between the learning rates of neighbouring layers, at most 1; needs the model's layer rules.
        frozen: Regular expressions of parameters that stay as they are.
        trust_coefficient: Factor of lars between the norms of a parameter and of its update.
    """

    kind: Literal["adamw", "lars", "sgd"] = "adamw"
    peak_lr: NonNegative = 1e-3
    end_lr: NonNegative = 0.0
    warmup_steps: Whole = 0
    decay: Literal["cosine", "constant", "step"] = "cosine"
    drop_at: Fraction = 0.5
    weight_decay: NonNegative = 0.05
    no_decay: tuple[str, ...] = (r"(^|/)(bias|scale)$",)
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: NonNegative = 1e-8
    clip_norm: NonNegative = 0.0
    layer_decay: Fraction = 1.0
    frozen: tuple[str, ...] = ()
    trust_coefficient: NonNegative = 0.001

    def __post_init__(self) -> None:
        for pattern in (*self.no_decay, *self.frozen):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no_decay, frozen: expected regular expressions, found {pattern!r}") from error


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the rate as a function of the steps done.

    Linear warm-up from 0, then half a cosine from `peak_lr` to `end_lr` at `steps`.

    Source: MAE, arXiv:2111.06377, appendix A (its released schedule, with fractional epochs as steps).
    """
    rates = config.peak_lr, config.end_lr, config.warmup_steps
    return lambda step: rate_at(step, *rates, steps, config.decay, config.drop_at)


def rate_at(
    step: Any,
    peak: Any,
    end: Any,
    warmup: Any,
    steps: Any,
    decay: Literal["cosine", "constant", "step"] = "cosine",
    drop_at: Any = 0.5,
) -> Any:
    """Return the rate of `learning_rate` after some steps; all numbers may be arrays, so that one program serves many.

    `optax.warmup_cosine_decay_schedule` decides by its numbers in Python and takes no arrays.

    Args:
        step: Steps done.
        peak: Rate after warm-up.
        end: Rate at the last step.
        warmup: Steps of warm-up.
        steps: Length of the run.
        decay: How the rate falls.
        drop_at: When that of "step" does, as a share of the run after warm-up.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = peak * step / jnp.maximum(warmup, 1)
    if decay == "constant":
        after = jnp.asarray(peak, jnp.float32)
    elif decay == "step":
        after = jnp.where(step < warmup + drop_at * steps, jnp.asarray(peak, jnp.float32), end)
    else:
        progress = (step - warmup) / jnp.maximum(steps - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        after = end + (peak - end) * cosine
    return jnp.where(step < warmup, warm, after)


def decay_mask(params: Params, no_decay: tuple[str, ...], stacked: tuple[str, ...] = ()) -> Any:
    """Mark the parameters that weight decay pulls to zero.

    Those of two axes or more (not counting the axis of stacked blocks) whose name none of `no_decay` finds.
    """
    return map_named(lambda name, leaf: leaf.ndim - matches(name, stacked) >= 2 and not matches(name, no_decay), params)


def layer_scales(params: Params, decay: float, rules: LayerRules) -> Any:
    """Return each parameter's factor on the learning rate, `decay ** (depth + 1 - layer)`.

    Layer 0 is the embedding, block i is layer i + 1, and everything after the blocks is layer depth + 1, whose factor
    is 1. Stacked parameters get one factor for each block, with axes to broadcast.

    Source: BEiT, arXiv:2106.08254, as MAE's fine-tuning code applies it.
    """

    def scale(name: str, leaf: Any) -> Any:
        if matches(name, rules.embedding):
            return decay ** (rules.depth + 1)
        if matches(name, rules.stacked):
            factors = decay ** (rules.depth - jnp.arange(rules.depth, dtype=jnp.float32))
            return factors.reshape(-1, *(1,) * (leaf.ndim - 1))
        match = re.search(rules.block, name)
        return decay ** (rules.depth - int(match[1])) if match else 1.0

    return map_named(scale, params)


def make_optimizer(
    config: OptimizerConfig, steps: int, layers: LayerRules | None = None
) -> optax.GradientTransformation:
    """Compose the optimizer of a run.

    Args:
        config: Its settings.
        steps: Length of the run, for the schedule.
        layers: The model's layers; needed where `layer_decay` is below 1.

    Raises:
        ValueError: `layer_decay` without layers.
    """
    if config.layer_decay < 1 and layers is None:
        raise ValueError(f"layer_decay: expected a model with layer rules for {config.layer_decay}, got none")
    stacked = layers.stacked if layers is not None else ()

    mask = partial(decay_mask, no_decay=config.no_decay, stacked=stacked)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    decayed = optax.add_decayed_weights(config.weight_decay, mask)
    match config.kind:
        case "adamw":
            parts += [optax.scale_by_adam(config.b1, config.b2, config.eps), decayed]
        case "lars":
            trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=config.trust_coefficient), mask)
            parts += [decayed, trust, optax.trace(config.b1)]
        case "sgd":
            parts += [decayed, optax.trace(config.b1)]
    if config.layer_decay < 1 and layers is not None:
        parts.append(_scale_by_layer(config.layer_decay, layers))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    chain = optax.chain(*parts)
    if not config.frozen:
        return chain

    labels = partial(map_named, lambda name, _: "frozen" if matches(name, config.frozen) else "trained")
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def _scale_by_layer(decay: float, layers: LayerRules) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        # The factors depend on names and shapes alone, so they are constants of the compiled step.
        scales = layer_scales(updates, decay, layers)
        return jax.tree.map(lambda scale, update: (scale * update).astype(update.dtype), scales, updates)

    return optax.stateless(scale)

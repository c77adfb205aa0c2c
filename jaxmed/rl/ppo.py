"""Proximal policy optimisation: advantages by a backward scan, clipped losses, epochs of minibatches in one program.

Source: Schulman et al., arXiv:1707.06347; generalised advantages arXiv:1506.02438; constants and details that papers
    leave open (normalised advantages, clipped values, Adam's epsilon) from stable-baselines3 and PureJaxRL.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import NonNegative, Positive, Share, Size, Whole, checked
from jaxmed.rl.distributions import Distribution

Apply = Callable[[Params, Any], tuple[Any, Float[Array, " sample"]]]
"""(parameters, observations) -> (what the distribution takes, values)."""


@dataclasses.dataclass(frozen=True)
@checked
class PpoConfig:
    """Settings; `SB3` has those of stable-baselines3.

    Attributes:
        learning_rate: Learning rate of Adam at the first iteration.
        decay_iterations: Iterations over which the rate falls linearly to 0; 0 keeps it.
        discount: gamma.
        trace_decay: lambda of the advantages.
        clip: epsilon; how far the ratio of new to old probability counts.
        value_loss: clipped: half the larger error of the value and of the value held within `clip` of the old one;
            plain: mean squared error.
        value_weight: Weight of the value's loss.
        entropy_weight: Weight of the entropy, which is made larger.
        max_norm: Largest norm of the gradient of all parameters together.
        epsilon: Adam's.
        epochs: Passes over the data of an iteration.
        minibatches: Updates of a pass; their number divides the samples.
        normalise: Advantages of each minibatch have mean 0 and deviation 1.
    """

    learning_rate: Positive = 3e-4
    decay_iterations: Whole = 0
    discount: Share = 0.99
    trace_decay: Share = 0.95
    clip: Positive = 0.2
    value_loss: Literal["clipped", "plain"] = "clipped"
    value_weight: NonNegative = 0.5
    entropy_weight: NonNegative = 0.01
    max_norm: Positive = 0.5
    epsilon: Positive = 1e-5
    epochs: Size = 4
    minibatches: Size = 4
    normalise: bool = True


class Batch(NamedTuple):
    """Samples to learn from; every leaf has the samples on its first axis.

    Attributes:
        observation: What `apply` takes: an array or a tree of arrays.
        action: What was done.
        log_prob: Its log-probability then.
        value: V of the observation then.
        advantage: A.
        target: A + V.
    """

    observation: Any
    action: Array
    log_prob: Float[Array, " sample"]
    value: Float[Array, " sample"]
    advantage: Float[Array, " sample"]
    target: Float[Array, " sample"]


def make_optimizer(config: PpoConfig) -> optax.GradientTransformation:
    """Return Adam behind a clipped gradient."""
    updates = config.decay_iterations * config.epochs * config.minibatches
    rate = optax.linear_schedule(config.learning_rate, 0.0, updates) if updates else config.learning_rate
    return optax.chain(optax.clip_by_global_norm(config.max_norm), optax.adam(rate, eps=config.epsilon))


def next_values(
    values: Float[Array, "time game"],
    last: Float[Array, " game"],
    final: Float[Array, "time game"],
    is_done: Bool[Array, "time game"],
) -> Float[Array, "time game"]:
    """Return V of the state that each step led to.

    Args:
        values: V of the state of each step.
        last: V of the state after the last step.
        final: Where a game ends: V of the state before the reset if it was cut, 0 if it was over.
        is_done: The game ends with this step.
    """
    following = jnp.concatenate([values[1:], last[None]])
    return jnp.where(is_done, final, following)


def advantages(
    rewards: Float[Array, "time game"],
    values: Float[Array, "time game"],
    following: Float[Array, "time game"],
    is_done: Bool[Array, "time game"],
    discount: float,
    trace_decay: float,
) -> Float[Array, "time game"]:
    """Return generalised advantages A_t = delta_t + gamma lambda (1 - done_t) A_t+1, of the acting player's rewards.

    `following` is V of the state that each step led to, from `next_values`.
    """
    errors = rewards + discount * following - values
    decays = discount * trace_decay * (1.0 - is_done)

    def back(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        error, decay = now
        advantage = error + decay * later
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(values[0]), (errors, decays), reverse=True)[1]


def loss(
    apply: Apply, distribution: Distribution, config: PpoConfig, params: Params, batch: Batch
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the loss of a minibatch and its parts."""
    parameters, value = apply(params, batch.observation)
    log_ratio = distribution.log_prob(parameters, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = batch.advantage
    if config.normalise:
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = jnp.square(value - batch.target)
    if config.value_loss == "clipped":
        near = batch.value + jnp.clip(value - batch.value, -config.clip, config.clip)
        value_loss = 0.5 * jnp.maximum(value_loss, jnp.square(near - batch.target))
    value_loss, entropy = value_loss.mean(), distribution.entropy(parameters).mean()
    total = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
    return total, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": jnp.mean(ratio - 1 - log_ratio),
        "clipped": jnp.mean(jnp.abs(ratio - 1) > config.clip, dtype=jnp.float32),
    }


def update(
    apply: Apply,
    distribution: Distribution,
    config: PpoConfig,
    key: KeyArray,
    params: Params,
    opt_state: optax.OptState,
    batch: Batch,
) -> tuple[Params, optax.OptState, dict[str, Scalar]]:
    """Learn from a batch: every epoch in a new order, minibatch by minibatch.

    Its number of samples is a multiple of `config.minibatches`. Returns parameters and optimizer state after, and the
    losses' means over all minibatches.
    """
    count = len(batch.log_prob)
    if count % config.minibatches:
        raise ValueError(f"minibatches: expected a divisor of {count} samples, found {config.minibatches}")
    optimizer = make_optimizer(config)
    gradient = jax.value_and_grad(lambda params, batch: loss(apply, distribution, config, params, batch), has_aux=True)

    def learn(carry: tuple[Params, optax.OptState], chosen: Array) -> tuple[Any, dict[str, Scalar]]:
        params, opt_state = carry
        (_, metrics), gradients = gradient(params, jax.tree.map(lambda leaf: leaf[chosen], batch))
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return (optax.apply_updates(params, updates), opt_state), metrics

    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(key, config.epochs))
    orders = orders.reshape(config.epochs * config.minibatches, -1)
    (params, opt_state), metrics = jax.lax.scan(learn, (params, opt_state), orders)
    return params, opt_state, {name: values.mean() for name, values in metrics.items()}


SB3 = PpoConfig(value_loss="plain", epochs=10, minibatches=64)
"""stable-baselines3's settings with the reference's 4096 steps an iteration, in minibatches of 64."""

"""A policy for a game: a network and the distribution that its output belongs to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.models.policy import GaussianMlp, GaussianMlpConfig, TopkUnet, TopkUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.rl.distributions import Distribution, make_gaussian, make_plackett_luce
from jaxmed.rl.pixel_game import PixelGame


class Policy(NamedTuple):
    """How to act, and what a state is worth.

    Attributes:
        init: (key) -> parameters.
        apply: (parameters, observation) -> (what the distribution takes, value of each game).
        distribution: Distribution of actions.
    """

    init: Callable[[KeyArray], Params]
    apply: Callable[[Params, Any], tuple[Any, Float[Array, " game"]]]
    distribution: Distribution


@functools.lru_cache(maxsize=32)
def make_policy(config: GaussianMlpConfig | TopkUnetConfig, game: PixelGame, shape: tuple[int, ...]) -> Policy:
    """Make a policy of the pixel game; equal settings give the same one, so that equal programs are recognised.

    Args:
        config: Sizes of the network.
        game: Gives the grid, the number of flips and whether a player may pass.
        shape: Shape of the images.
    """
    blank = jnp.zeros((1, *shape, 2))
    if isinstance(config, GaussianMlpConfig):
        network = make_model(GaussianMlp(config, game.grid(shape)))

        def apply_gaussian(params: Params, observation: Array) -> tuple[Any, Array]:
            (mean, log_std), value = network.apply(params, observation)
            return (mean, jnp.broadcast_to(log_std, mean.shape)), value

        return Policy(lambda key: network.init(key, blank), apply_gaussian, make_gaussian())
    if game.rule == "repo":
        raise ValueError("rule: the repo's percentile ranks desires; expected a Gaussian policy, found one of logits")
    model = make_model(TopkUnet(config, game.grid(shape)))

    def apply(params: Params, observation: Array) -> tuple[Array, Array]:
        logits, value = model.apply(params, observation)
        return logits.reshape(len(logits), -1), value

    distribution = make_plackett_luce(game.num_flips(shape), game.at_most_k)
    return Policy(lambda key: model.init(key, blank), apply, distribution)

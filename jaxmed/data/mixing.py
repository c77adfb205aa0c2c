"""Mixup and CutMix on the device: examples of a batch that are blended in pairs, with the share of each in the loss."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from jaxmed.config import NonNegative, Share, checked


@dataclasses.dataclass(frozen=True)
@checked
class MixConfig:
    """How often and how the examples of a training batch are mixed; off by default, as in TANGERINE's and MAE's code.

    Attributes:
        mixup: Concentration alpha of the Beta(alpha, alpha) from which the weight of a blend is drawn; 0 never blends.
        cutmix: The same for the share of an image that stays when a box of its partner is pasted in; 0 never pastes.
        probability: Probability that a pair is mixed at all.
        switch: Probability that a mixed pair is pasted rather than blended, where both are on.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899; timm's `Mixup` in the mode "pair", which MAE's
        fine-tuning uses in the mode "batch".
    Deviation: every pair draws its own weight, where "batch" has one for the whole batch.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    probability: Share = 1.0
    switch: Share = 0.5

    @property
    def is_on(self) -> bool:
        """Whether anything can happen."""
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        image: Every example with its part of the partner's.
        weight: Share of its own image that is left in each, in [0, 1]: the weight of its own target in the loss.
    """

    image: Float[Array, "batch *space channel"]
    weight: Float[Array, " batch"]


def partners(values: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Return what belongs to the partner of each example: the batch in reverse; the middle one is its own partner."""
    return values[::-1]


def mix(config: MixConfig, keys: Key[Array, " batch"], image: Float[Array, "batch *space channel"]) -> Mixed:
    """Mix each example with its partner; both of a pair draw the same weight and the same box.

    The loss of an example is weight x loss(own target) + (1 - weight) x loss(partner's target): with losses that are
    linear in the target, such as cross-entropies, that is the loss of the mixed target.

    Args:
        config: Static.
        keys: One for each example; a pair takes that of its first.
        image: Two or three spatial axes.
    """
    place = jnp.arange(len(image))
    shared = keys[jnp.minimum(place, place[::-1])]
    weight, share = jax.vmap(lambda key: draw_shares(config, key, image.shape[1:-1]))(shared)
    is_alone = place == place[::-1]
    share = jnp.where(is_alone.reshape(-1, *(1,) * (image.ndim - 2)), 1.0, share)[..., None].astype(image.dtype)
    return Mixed(share * image + (1 - share) * partners(image), jnp.where(is_alone, 1.0, weight))


def draw_shares(
    config: MixConfig, key: Key[Array, ""], shape: tuple[int, ...]
) -> tuple[Float[Array, ""], Float[Array, "*space"]]:
    """Draw the weight of an example's own target, and the share of its own intensity in each voxel; mean = weight."""
    is_due_key, switch_key, blend_key, paste_key = jax.random.split(key, 4)
    is_due = jax.random.bernoulli(is_due_key, float(config.probability))
    blend = paste = jnp.ones(shape)
    if config.mixup:
        blend = jnp.full(shape, jax.random.beta(blend_key, config.mixup, config.mixup))
    if config.cutmix:
        paste = 1.0 - draw_box(paste_key, config.cutmix, shape)
    both = config.mixup > 0 and config.cutmix > 0
    is_pasted = jax.random.bernoulli(switch_key, float(config.switch)) if both else jnp.asarray(config.cutmix > 0)
    share = jnp.where(is_due, jnp.where(is_pasted, paste, blend), 1.0)
    return share.mean(), share


def draw_box(key: Key[Array, ""], alpha: float, shape: tuple[int, ...]) -> Bool[Array, "*space"]:
    """Draw a box of about the share 1 - Beta(alpha, alpha) of an image; what sticks out of the image is cut off.

    Its edges have the image's proportions, its middle lies anywhere in the image.
    """
    size_key, place_key = jax.random.split(key)
    edge = (1 - jax.random.beta(size_key, alpha, alpha)) ** (1 / len(shape))
    middle = jax.random.uniform(place_key, (len(shape),)) * jnp.array(shape)
    box = jnp.ones(shape, bool)
    for axis, length in enumerate(shape):
        half = jnp.floor(edge * length) / 2
        places = jnp.arange(length).reshape([-1 if axis == other else 1 for other in range(len(shape))])
        first = jnp.round(middle[axis] - half)
        box &= (places >= first) & (places < first + 2 * half)
    return box

"""The perceptual distance of volumes through a network of pictures: slices of all three axes.

Source: MONAI, PerceptualLoss with is_fake_3d; CoCoLIT, arXiv:2508.01292, official code (a fifth of the slices).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Scalar
from jaxmed.config import checked
from jaxmed.errors import InputError
from jaxmed.models.published.load import Published
from jaxmed.models.squeezenet import LpipsConfig

# Two batches of pictures [image, row, column, channel] to the distance of each pair.
Distance: TypeAlias = Callable[[Array, Array], Float[Array, " image"]]


@dataclasses.dataclass(frozen=True)
@checked
class PerceptualConfig:
    """Which slices count.

    Attributes:
        share: Share of the slices of each axis that is drawn anew in every step, above 0 and up to 1.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a number above 0, up to 1, found {self.share}")


def make_slice_distance(published: Published, config: PerceptualConfig, where: str) -> Callable[..., Scalar]:
    """Return `distance(keys, found, image)` of volumes by published weights of LPIPS.

    Raises:
        InputError: They are of another network.
    """
    if not isinstance(published.config, LpipsConfig):
        found = f"a {published.report.kind} of {published.report.family}"
        raise InputError(where, "weights of LPIPS by SqueezeNet", found, "leave --perceptual out")
    return partial(slice_distance, partial(published.model.apply, published.params), share=config.share)


def slice_distance(
    distance: Distance,
    keys: Key[Array, " batch"],
    found: Float[Array, "batch x y z channel"],
    image: Float[Array, "batch x y z channel"],
    share: float = 0.2,
) -> Scalar:
    """Return the mean distance over drawn slices across each axis, summed over the three.

    Args:
        distance: Of pictures.
        keys: One for each image.
        found: Volumes.
        image: What they should be.
        share: Share of the slices that is drawn for each image, without replacement; at least one.
    """

    def across(axis: int) -> Scalar:
        both = [jnp.moveaxis(volumes.astype(jnp.float32), axis + 1, 1) for volumes in (found, image)]
        length = both[0].shape[1]
        count = max(int(share * length), 1)

        def draw(key: KeyArray) -> Array:
            return jax.random.permutation(jax.random.fold_in(key, axis), length)[:count]

        rows = jax.vmap(draw)(keys)
        slices = [jax.vmap(lambda volume, own: volume[own])(volumes, rows) for volumes in both]
        return distance(*(one.reshape(-1, *one.shape[2:]) for one in slices)).mean()

    return sum((across(axis) for axis in range(3)), jnp.float32(0))

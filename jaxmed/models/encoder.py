"""An encoder as adaptation, embedding and prediction take it: any network from images to tokens or a map of features.

A ViT in two or three dimensions, a ConvNet and the contracting half of a U-Net are encoders alike: a map of features is
a token for every place, without a class token before them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params, PartitionRules
from jaxmed.nn.model import LayerRules


def identity_norm(params: Params, tokens: Float[Array, "batch token width"]) -> Float[Array, "batch token width"]:
    """Return the tokens of an encoder without a final norm."""
    return tokens


def join_layers(states: list[Any]) -> Float[Array, "batch token width"]:
    """Put the class tokens of the blocks before the last before the tokens of the last."""
    return jnp.concatenate([*(tokens[:, :1] for tokens in states[:-1]), states[-1]], axis=1)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network from images to tokens; frozen and hashable: encoders of equal sizes are equal and share programs.

    Attributes:
        config: Sizes of the network, a frozen dataclass.
        image_size: Voxels of the image along each spatial axis.
        channels: Channels of the image.
        width: Token width.
        grid: Places along each spatial axis, the last axis running fastest among the tokens.
        init: `init(key) -> params`, float32.
        apply: `apply(params, images, kept=None, key=None) -> tokens` [batch, token, width], before any final norm:
            prefix tokens first, then one for each place of the grid, or for those in `kept` [batch, keep]; a key
            switches on what is random.
        norm: `norm(params, tokens) -> tokens`: the final norm.
        before_last: `before_last(params, images) -> (rest, features)`, features [batch, token, width] being what
            Grad-CAM looks at; by default the last tokens.
        from_last: `from_last(params, rest, features) -> tokens` of `apply`.
        hidden_states: `hidden_states(params, images) -> [tokens]`: embedded tokens and the output of every block,
            before any final norm; None where there are no blocks.
        attention: `attention(params, images) -> weights`, [batch, head, token, token] of the last block, or None.
        prefix: Tokens before those of the grid: a class token first, and registers.
        can_drop: Whether `apply` takes `kept`.
        is_random: Whether a key changes anything.
        layers: Layers of the parameters under "encoder/", for rates that fall towards the first of them.
        rules: How the parameters are split over the devices.
        frozen: Regular expressions of parameters that are constants.
    """

    config: Any
    image_size: tuple[int, ...]
    channels: int
    width: int
    grid: tuple[int, ...]
    init: Callable[[KeyArray], Params] = dataclasses.field(compare=False)
    apply: Callable[..., Any] = dataclasses.field(compare=False)
    norm: Callable[[Params, Any], Any] = dataclasses.field(default=identity_norm, compare=False)
    before_last: Callable[[Params, Any], tuple[Any, Any]] | None = dataclasses.field(default=None, compare=False)
    from_last: Callable[[Params, Any, Any], Any] | None = dataclasses.field(default=None, compare=False)
    hidden_states: Callable[[Params, Any], list[Any]] | None = dataclasses.field(default=None, compare=False)
    attention: Callable[[Params, Any], Any] | None = dataclasses.field(default=None, compare=False)
    prefix: int = 0
    can_drop: bool = False
    is_random: bool = False
    layers: LayerRules | None = None
    rules: PartitionRules = ()
    frozen: tuple[str, ...] = ()

    @property
    def num_places(self) -> int:
        """Tokens of an image, without the prefix."""
        return math.prod(self.grid)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (*self.image_size, self.channels)

    def tokens(self, params: Params, images: Any, layers: int = 1) -> Float[Array, "batch token width"]:
        """Return tokens as a head takes them, after the final norm.

        Args:
            params: Of the encoder.
            images: [batch, *image_size, channels].
            layers: Blocks that the head looks at: the class tokens of those before the last one come first.
        """
        if layers == 1:
            return self.norm(params, self.apply(params, images))
        assert self.hidden_states is not None
        return join_layers([self.norm(params, states) for states in self.hidden_states(params, images)[-layers:]])

    def split(self, params: Params, images: Any) -> tuple[Any, Any]:
        """Return what Grad-CAM looks at, [batch, token, width], and what else `join` needs to go on from there."""
        if self.before_last is None:
            return None, self.apply(params, images)
        return self.before_last(params, images)

    def join(self, params: Params, rest: Any, features: Any) -> Float[Array, "batch token width"]:
        """Return the tokens as a head takes them, given what `split` returns."""
        return self.norm(params, features if self.from_last is None else self.from_last(params, rest, features))

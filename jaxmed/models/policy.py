"""Policies of self-play with their values: a multilayer perceptron for parity, a U-Net of logits, and a patch policy.

Source: arXiv:2506.22075 with stable-baselines3's multilayer perceptron; arXiv:2405.16628 for patches.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.config import Size, checked
from jaxmed.nn.convolution import Convolution


@dataclasses.dataclass(frozen=True)
@checked
class GaussianMlpConfig:
    """Separate networks of policy and value on the flattened observation.

    Attributes:
        hidden: Widths of either network's layers, tanh after each.
        log_std: Logarithm of the standard deviation of each pixel's desire, at the start.
    """

    hidden: tuple[Size, ...] = (64, 64)
    log_std: float = 0.0

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ValueError("hidden: expected one width or more, found none")


class GaussianMlp(nn.Module):
    """Observation to ((mean, log_std), value); layers are policy_0, ..., value_0, ..., mean, value and log_std.

    Attributes:
        config: Widths.
        grid: Shape of an action.

    Source: the defaults of stable-baselines3: orthogonal kernels with gain sqrt(2), .01 for means, 1 for the value.
    """

    config: GaussianMlpConfig
    grid: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: Float[Array, "game *shape channel"]):
        flat = observation.reshape(len(observation), -1)
        mean = _orthogonal(math.prod(self.grid), 0.01, "mean")(self._hidden(flat, "policy"))
        value = _orthogonal(1, 1.0, "value")(self._hidden(flat, "value"))
        log_std = self.param("log_std", nn.initializers.constant(self.config.log_std), self.grid, jnp.float32)
        return (mean.reshape(-1, *self.grid), log_std), value[:, 0]

    def _hidden(self, x: jax.Array, name: str) -> jax.Array:
        for number, width in enumerate(self.config.hidden):
            x = jnp.tanh(_orthogonal(width, math.sqrt(2), f"{name}_{number}")(x))
        return x


def _orthogonal(width: int, gain: float, name: str) -> nn.Dense:
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(gain), name=name)


@dataclasses.dataclass(frozen=True)
@checked
class TopkUnetConfig:
    """A small U-Net on the grid of super-pixels.

    Attributes:
        widths: Channels of each level; every level halves the edges.
        value_width: Width of the value's hidden layer.
    """

    widths: tuple[Size, ...] = (32, 64, 128)
    value_width: Size = 64

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths: expected one or more, found none")


class TopkUnet(nn.Module):
    """Observation to (logit of each pixel of the grid, value), for images or volumes.

    The voxels of a super-pixel become channels, so that everything is computed on the grid. Levels go down by means
    of blocks of two, and up by repetition, a product and a sum with the level's own features. The value comes from the
    coarsest level's mean and largest features.

    Attributes:
        config: Widths.
        grid: Shape of an action.
    """

    config: TopkUnetConfig
    grid: tuple[int, ...]

    @nn.compact
    def __call__(
        self, observation: Float[Array, "game *shape channel"]
    ) -> tuple[Float[Array, "game *grid"], Float[Array, " game"]]:
        widths = self.config.widths
        x, levels = _blocks_to_channels(observation, self.grid), []
        for level, width in enumerate(widths):
            x = nn.relu(Convolution(width, kernel_init=_HE, name=f"down_{level}")(x if level == 0 else _halve(x)))
            levels.append(x)
        x = nn.relu(Convolution(widths[-1], kernel_init=_HE, name="middle")(x))
        space = tuple(range(1, x.ndim - 1))
        pooled = jnp.concatenate([x.mean(axis=space), x.max(axis=space)], axis=-1)
        hidden = nn.relu(nn.Dense(self.config.value_width, kernel_init=_HE, name="value_hidden")(pooled))
        value = nn.Dense(1, name="value")(hidden)[:, 0]
        for level in reversed(range(len(widths) - 1)):
            skip = levels[level]
            raised = _double(nn.Dense(widths[level], name=f"raise_{level}")(x), skip.shape)
            x = nn.relu(Convolution(widths[level], kernel_init=_HE, name=f"up_{level}")(raised + skip))
        # Nearly equal logits at the start: a policy begins by proposing at random.
        logits = nn.Dense(1, kernel_init=nn.initializers.normal(0.01), name="logits")(x)
        return logits[..., 0], value


_HE = nn.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
@checked
class PatchMlpConfig:
    """The patch policy of RLSP.

    Attributes:
        hidden: Widths of the layers, rectified.
    """

    hidden: tuple[Size, ...] = (128, 64, 64, 64, 64, 32)

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ValueError("hidden: expected one width or more, found none")


class PatchMlp(nn.Module):
    """Features of patches to (logit of each patch, logits of going on and of stopping); layer_0, ..., patch, stop.

    Source: github.com/s-sd/spurl, wss.
    Deviation: no dropout. The source names some, but calls its network outside of training alone, where none is active.
    """

    config: PatchMlpConfig

    @nn.compact
    def __call__(
        self, features: Float[Array, "game patch feature"]
    ) -> tuple[Float[Array, "game patch"], Float[Array, "game 2"]]:
        x = features.reshape(len(features), -1)
        for number, width in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=_GLOROT, name=f"layer_{number}")(x))
        patch = nn.Dense(features.shape[1], kernel_init=_GLOROT, name="patch")(x)
        return patch, nn.Dense(2, kernel_init=_GLOROT, name="stop")(x)


_GLOROT = nn.initializers.glorot_uniform()


def _blocks_to_channels(x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    batch, *shape, channels = x.shape
    if tuple(shape) == grid:
        return x
    edges = [length // count for length, count in zip(shape, grid, strict=True)]
    x = x.reshape(batch, *(part for pair in zip(grid, edges, strict=True) for part in pair), channels)
    axes = range(1, 2 * len(grid) + 1)
    x = x.transpose(0, *axes[::2], *axes[1::2], x.ndim - 1)
    return x.reshape(batch, *grid, math.prod(edges) * channels)


def _halve(x: jax.Array) -> jax.Array:
    """Average blocks of two along each spatial axis; the last block of an odd edge repeats its end."""
    for axis in range(1, x.ndim - 1):
        if x.shape[axis] % 2:
            x = jnp.concatenate([x, jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)], axis=axis)
        x = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :]).mean(axis=axis + 1)
    return x


def _double(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat along each spatial axis and cut to a shape."""
    for axis in range(1, x.ndim - 1):
        x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis=axis), 0, shape[axis], axis=axis)
    return x

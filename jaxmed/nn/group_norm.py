"""Group normalisation of images and volumes, in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) scale + bias; moments over space and the channels of a group.

    Attributes:
        groups: Number of groups of neighbouring channels; a divisor of their number.
        epsilon: Added to the variance.
    """

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space channel"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - self._by_group(x)
        variance = self._by_group(jnp.square(centred))
        return centred * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias

    def _by_group(self, x: jax.Array) -> jax.Array:
        """Return the mean over space and group, once for each channel: space is summed first, channels in place."""
        if x.shape[-1] % self.groups:
            raise ValueError(f"groups: expected a divisor of {x.shape[-1]} channels, got {self.groups}")
        by_channel = x.mean(axis=range(1, x.ndim - 1))
        by_group = by_channel.reshape(x.shape[0], self.groups, -1).mean(axis=2)
        spread = jnp.repeat(by_group, x.shape[-1] // self.groups, axis=1)
        return spread.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])

"""Diffusion times as vectors: sinusoids, then a small network."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmed.nn.transformer import Linear


def sinusoids(t: Num[Array, " batch"], width: int, longest: float = 10_000.0) -> Float[Array, "batch width"]:
    """Return cosines, then sines, of a time at frequencies from 1 down towards 1 / longest.

    Args:
        t: Times on the scale of the network: steps 0 to 999 of a discrete chain, fractions allowed.
        width: Entries; of an odd width the last one is 0.
        longest: Slowest wavelength over 2 pi.

    Source: guided-diffusion (arXiv:2105.05233), official code: frequencies exp(-ln(longest) k / half), k from 0 to
    half - 1.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    table = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return jnp.pad(table, ((0, 0), (0, width % 2)))


class TimeEmbed(nn.Module):
    """Sinusoids, linear, SiLU, linear; in float32.

    Attributes:
        width: Number of sinusoids.
        features: Width of the result.
    """

    width: int
    features: int

    @nn.compact
    def __call__(self, t: Num[Array, " batch"]) -> Float[Array, "batch feature"]:
        hidden = nn.silu(Linear(self.features, name="fc1")(sinusoids(t, self.width)))
        return Linear(self.features, name="fc2")(hidden)

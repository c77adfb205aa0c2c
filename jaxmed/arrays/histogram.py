"""Joint histograms with soft bins, and what two images tell of each other; on the device, differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BINS = 24


def mutual_information(one: Float[Array, " voxel"], two: Float[Array, " voxel"]) -> Float[Array, ""]:
    """Return mutual information in nats, of a joint histogram with soft bins from each image's least to largest value.

    Args:
        one: Intensities of any unit.
        two: Those of the same voxels in another image.
    """
    soft_one, soft_two = _bins(one), _bins(two)
    joint = jnp.einsum("vi,vj->ij", soft_one, soft_two, precision=jax.lax.Precision.HIGHEST) / len(one)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return (joint * jnp.log((joint + 1e-9) / (independent + 1e-9))).sum()


def _bins(values: Float[Array, " voxel"]) -> Float[Array, "voxel bin"]:
    low, high = jax.lax.stop_gradient((values.min(), values.max()))
    place = (values - low) / jnp.maximum(high - low, 1e-6) * (BINS - 1)
    return jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(BINS)), 0.0)

"""The diffusion tensor of many voxels at once: where fits of richer models take their direction from."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.solvers.least_squares import weighted_linear
from jaxmed.solvers.symmetric import eigh_3x3


class Tensor(NamedTuple):
    """Summary of a diffusion tensor: principal direction, mean diffusivity in um^2/ms, fractional anisotropy."""

    direction: Float[Array, "3 voxel"]
    mean_diffusivity: Float[Array, " voxel"]
    fractional_anisotropy: Float[Array, " voxel"]


def fit_tensor(
    design: Float[Array, "measurement 7"],
    used: Float[Array, " measurement"],
    measured: Float[Array, "measurement voxel"],
) -> Tensor:
    """Fit a diffusion tensor to each voxel by log-linear least squares, weighted by the squared predicted signal.

    Args:
        design: From `physics.acquisition.tensor_design`.
        used: 1 for rows to fit, else 0: `physics.acquisition.tensor_rows`.
        measured: Magnitudes relative to the unweighted signal.

    Source: Basser et al., J. Magn. Reson. B 1994; Veraart et al., NeuroImage 2013 (the two passes).
    """
    log_signal = jnp.log(jnp.maximum(measured, 1e-3))
    rows = used[:, None]
    weights = rows * jnp.maximum(measured, 1e-3) ** 2
    for _ in range(2):
        beta = weighted_linear(design, log_signal, weights, ridge=1e-6)
        weights = rows * jnp.exp(2 * jnp.clip(design @ beta, -7.0, 1.0))
    xx, yy, zz, xy, xz, yz = beta[:6]
    matrix = jnp.stack([jnp.stack([xx, xy, xz]), jnp.stack([xy, yy, yz]), jnp.stack([xz, yz, zz])])
    # A voxel of noise can give a tensor that is not finite; the rotations must not see it.
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix), axis=(0, 1)), matrix, jnp.eye(3)[:, :, None])
    values, vectors = eigh_3x3(matrix)
    values = jnp.maximum(values, 0.0)
    mean = values.mean(axis=0)
    spread = jnp.sum((values - mean) ** 2, axis=0)
    anisotropy = jnp.sqrt(1.5 * spread / jnp.maximum(jnp.sum(values**2, axis=0), 1e-12))
    return Tensor(vectors[:, 2], mean, anisotropy)

"""The Cramer-Rao bound: the smallest standard deviation that an unbiased estimator can have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.physics import rician
from jaxmed.physics.microstructure import MicrostructureModel, turn


class Bound(NamedTuple):
    """Smallest standard deviations.

    Attributes:
        errors: Standard deviation of each parameter.
        direction_error: Root mean square angle of the direction, in degrees.
    """

    errors: Float[np.ndarray, "voxel parameter"]
    direction_error: Float[np.ndarray, " voxel"]


def cramer_rao(
    model: MicrostructureModel,
    parameters: Float[np.ndarray, "voxel parameter"],
    direction: Float[np.ndarray, "voxel 3"],
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    sigma: float,
    *,
    s0_known: bool = True,
) -> Bound:
    """Return the bound of Rician magnitudes, with the fibre direction unknown too.

    Args:
        model: Makes the signals.
        parameters: Truth, inside the bounds.
        direction: Truth, unit length.
        bvals: b-values in s/mm^2.
        bvecs: Unit directions.
        sigma: Noise of each channel, relative to S0.
        s0_known: Whether the unweighted signal need not be estimated.

    Source: Karlsen et al., Magn. Reson. Med. 1999 (Fisher information of Rician magnitudes).
    """
    clean, jacobian = _differentiate(model, bvals, bvecs)(
        jnp.asarray(parameters, jnp.float32), jnp.asarray(direction, jnp.float32)
    )
    rows = np.asarray(jacobian, np.float64)
    if s0_known:
        rows = rows[..., :-1]
    weight = np.asarray(rician.information(clean / sigma), np.float64) / sigma**2
    covariance = np.linalg.inv(np.einsum("vmi,vm,vmj->vij", rows, weight, rows))
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    number = len(model.parameters)
    angle = np.degrees(np.sqrt(variance[:, number] + variance[:, number + 1]))
    return Bound(np.sqrt(variance[:, :number]), angle)


def _differentiate(model, bvals, bvecs):
    number = len(model.parameters)

    def signal(unknown, parameters, direction):
        moved = turn(direction[:, None], unknown[number : number + 2, None])[:, 0]
        return unknown[-1] * model.signal(parameters + unknown[:number], moved, bvals, bvecs)

    # Jitted here: the Jacobian of a series is hundreds of operations, dispatched one by one otherwise.
    @jax.jit
    @jax.vmap
    def differentiate(parameters, direction):
        unknown = jnp.zeros(number + 3).at[-1].set(1.0)
        return signal(unknown, parameters, direction), jax.jacfwd(signal)(unknown, parameters, direction)

    return differentiate

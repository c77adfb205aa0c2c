"""Enhancement on arrays: estimates, measurements and an operator in, refined images and their record out."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.ccdf import Ccdf, ccdf
from jaxmed.diffusion.posterior.daps import Daps, daps
from jaxmed.diffusion.posterior.ddnm import Ddnm, ddnm
from jaxmed.diffusion.posterior.ddrm import Ddrm, ddrm
from jaxmed.diffusion.posterior.diffpir import Diffpir, diffpir
from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps, dynamicdps
from jaxmed.diffusion.posterior.frame import Info
from jaxmed.diffusion.posterior.pigdm import Pigdm, pigdm
from jaxmed.diffusion.posterior.pnp_dpir import PnpDpir, pnp_dpir
from jaxmed.diffusion.posterior.reddiff import Reddiff, reddiff

Method: TypeAlias = DynamicDps | Dps | Ccdf | Ddnm | Ddrm | Diffpir | Pigdm | Reddiff | Daps | PnpDpir
"""The method is told by its settings."""


def enhance(
    key: KeyArray,
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Any,
    initial: Float[Array, "batch ..."],
    config: Method = DynamicDps(),
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch ..."], Info]:
    """Refine the images of any conditional model by a diffusion prior and the measurement.

    Args:
        key: Consumed.
        denoiser: The prior.
        measurement: y.
        operator: From one image to its measurement: any differentiable function (`Ccdf` and `Ddnm` want a
            `LinearOperator`, `Ddrm` a `Spectrum`).
        initial: The conditional model's images. `DynamicDps` and `Ccdf` start from them, the others from noise or from
            an empty image: of these it gives the shape.
        config: Method and its settings.
        indices: Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.

    Returns:
        The images, and the record of the run.

    Raises:
        TypeError: The gradient of `DynamicDps` with searches is taken in reverse. `jit`, `vmap` and forward mode take
            every method, and reverse mode every other one: `DynamicDps(search=None)` too.
    """
    start = initial if isinstance(config, DynamicDps | Ccdf) else jnp.zeros_like(initial)
    return SOLVERS[type(config)](key, denoiser, measurement, operator, start, config, indices)


SOLVERS: dict[type, Callable[..., tuple[Array, Info]]] = {
    DynamicDps: dynamicdps,
    Ccdf: ccdf,
    Dps: dps,
    Ddnm: ddnm,
    Ddrm: ddrm,
    Diffpir: diffpir,
    Pigdm: pigdm,
    Reddiff: reddiff,
    Daps: daps,
    PnpDpir: pnp_dpir,
}

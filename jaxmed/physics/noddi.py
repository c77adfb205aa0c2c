"""The NODDI signal: Watson-dispersed sticks, a tortuous extra-cellular space and free water.

Source: Zhang et al., NeuroImage 2012 (the model); the evaluation is a Funk-Hecke expansion in even Legendre
polynomials P_l of the angle between gradient g and fibre direction mu,

    A_ic(g) = sum_l (2 l + 1) p_l(kappa) h_l(b d) P_l(g . mu),
    p_l = <P_l(x)> under the weight exp(kappa x^2) on [0, 1],   h_l(a) = int_0^1 P_l(x) exp(-a x^2) dx,

with both integrals by Gauss-Legendre quadrature. It has no branches, never overflows and has smooth gradients, unlike
the closed forms in erfi and the recursions of the published toolboxes, which lose all digits near kappa = 0.1 or
small b d in single precision.

Since the mean of (x . mu)^2 is (1 + 2 p_2) / 3, the extra-cellular tensor averaged over the Watson density
(the toolbox's definition) collapses to A_ec = exp(-b d [1 - (2/3) ndi (1 - p_2 P_2(g . mu))]).

Units: b-values in s/mm^2, diffusivities in um^2/ms (= 1e-3 mm^2/s); all fractions in [0, 1]; directions are unit
vectors in the frame of the gradient table. mu and -mu are the same fibre.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.config import Positive, checked

ExtraCellular = Literal["averaged_tensor", "convolved"]
WHERE_TISSUE = ("ndi", "odi")
"""Parameters that mean something only where there is tissue."""
WET = 0.9
"""Free water fraction above which there is too little tissue to describe."""
MAX_KAPPA = 256.0
"""Largest concentration that 64 quadrature nodes resolve to 1e-12."""


@dataclasses.dataclass(frozen=True)
@checked
class Tissue:
    """Diffusivities that NODDI fixes.

    Attributes:
        parallel_diffusivity: Along the fibres, inside and outside, in um^2/ms. 1.7 in vivo; ex vivo about 0.6.
        free_diffusivity: Diffusivity of free water, in um^2/ms. 3.0 at body temperature; about 2.1 at 20 degrees C.
    """

    parallel_diffusivity: Positive = 1.7
    free_diffusivity: Positive = 3.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0.05 <= value <= 10.0:
                raise ValueError(f"tissue.{name}: expected 0.05 to 10 um^2/ms, found {value:g}")

    def constants(self) -> dict[str, float]:
        """Return the diffusivities as sidecars name them."""
        return {f"{name}_um2_per_ms": value for name, value in dataclasses.asdict(self).items()}


def signal(
    ndi: Float[Array, "*batch"],
    odi: Float[Array, "*batch"],
    fwf: Float[Array, "*batch"],
    direction: Float[Array, "*batch 3"],
    bvals: Float[Array | np.ndarray, "*#batch measurement"],
    bvecs: Float[Array | np.ndarray, "*#batch measurement 3"],
    *,
    dot: Float[Array, "*batch"] | None = None,
    tissue: Tissue = Tissue(),
    order: int = 16,
    extra_cellular: ExtraCellular = "averaged_tensor",
) -> Float[Array, "*batch measurement"]:
    """Predict the diffusion signal relative to b = 0.

    Args:
        ndi: Neurite density index, the intra-cellular fraction of what is not free water.
        odi: Orientation dispersion index; 0 is parallel fibres, 1 is isotropic.
        fwf: Free water fraction.
        direction: Mean fibre direction, unit length.
        bvals: b-values in s/mm^2, for all voxels or for each.
        bvecs: Unit gradient directions; any value where b is 0, and zero where b is small and the direction is not
            known, see `cosines`.
        dot: Fraction of all water that does not move at all, as in fixed tissue; None for none.
        tissue: Fixed diffusivities.
        order: Highest Legendre order, even. 16 is exact to 3e-6 up to b = 3000; take 24 or more above b = 5000.
        extra_cellular: "averaged_tensor" puts the dispersed tensor inside one exponential (original toolbox,
            AMICO, cuDIMOT); "convolved" averages the exponentials (dmipy).

    Returns:
        S / S0, in (0, 1].

    Source: Zhang et al. 2012, equations 1 to 8; Alexander et al., NeuroImage 2010 (the dot compartment).
    """
    intra, extra, free = compartments(
        ndi, odi, direction, bvals, bvecs, tissue=tissue, order=order, extra_cellular=extra_cellular
    )
    ndi, fwf = ndi[..., None], fwf[..., None]
    total = (1 - fwf) * (ndi * intra + (1 - ndi) * extra) + fwf * free
    return total if dot is None else total + dot[..., None] * (1 - total)


def compartments(
    ndi: Float[Array, "*batch"],
    odi: Float[Array, "*batch"],
    direction: Float[Array, "*batch 3"],
    bvals: Float[Array | np.ndarray, "*#batch measurement"],
    bvecs: Float[Array | np.ndarray, "*#batch measurement 3"],
    *,
    tissue: Tissue = Tissue(),
    order: int = 16,
    extra_cellular: ExtraCellular = "averaged_tensor",
) -> tuple[
    Float[Array, "*batch measurement"],
    Float[Array, "*batch measurement"],
    Float[Array, "*#batch measurement"],
]:
    """Return the attenuations inside neurites, outside them and in free water; see `signal`."""
    cosine = cosines(bvecs, direction)
    moments = watson_moments(odi_to_kappa(odi), order)
    attenuation = bvals * (1e-3 * tissue.parallel_diffusivity)
    angular = legendre(cosine, order)
    intra = _expand(moments, stick_moments(attenuation, order), angular)
    match extra_cellular:
        case "averaged_tensor":
            kept = 1 - (2 / 3) * ndi[..., None] * (1 - moments[..., 1:2] * angular[..., 1])
            extra = jnp.exp(-attenuation * kept)
        case "convolved":
            along = attenuation * ndi[..., None]
            extra = jnp.exp(along - attenuation) * _expand(moments, stick_moments(along, order), angular)
    return intra, extra, jnp.exp(-jnp.asarray(bvals) * (1e-3 * tissue.free_diffusivity))


def cosines(
    bvecs: Float[Array | np.ndarray, "*#batch measurement 3"], direction: Float[Array, "*batch 3"]
) -> Float[Array, "*batch measurement"]:
    """Return the cosines between gradients and a direction.

    A gradient of length zero is one whose direction is not known, as of images at b = 5. It gets 1 / sqrt(3), at which
    the second Legendre polynomial vanishes as it does over the sphere: the signal is its mean over directions to
    second order in b.
    """
    bvecs = jnp.asarray(bvecs)
    known = jnp.any(bvecs != 0, axis=-1)
    return jnp.where(known, jnp.einsum("...mi,...i->...m", bvecs, direction), 3**-0.5)


def _expand(moments, radial, angular):
    degrees = 2.0 * jnp.arange(0, 2 * angular.shape[-1], 2) + 1
    return jnp.sum(degrees * moments[..., None, :] * radial * angular, axis=-1)


def odi_to_kappa(odi: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the Watson concentration of an orientation dispersion index, kappa = 1 / tan(pi odi / 2).

    Capped at `MAX_KAPPA`, an index of 0.0025, beyond which the quadrature would lose digits.
    """
    return jnp.minimum(1 / jnp.tan(jnp.maximum(odi, 1e-6) * (jnp.pi / 2)), MAX_KAPPA)


def kappa_to_odi(kappa: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the orientation dispersion index of a Watson concentration, (2 / pi) atan(1 / kappa)."""
    return (2 / jnp.pi) * jnp.arctan2(jnp.ones_like(kappa), kappa)


def watson_moments(
    kappa: Float[Array, "*batch"] | float, order: int, num_nodes: int = 64
) -> Float[Array, "*batch degree"]:
    """Return <P_l> under the Watson density for l = 0, 2, ..., order.

    The exponent is shifted by its maximum, so it never overflows, and kappa = 0 needs no branch.
    64 nodes are exact to 5e-12 up to kappa = 256; 48 nodes to 7e-13 up to 128.
    """
    kappa = jnp.asarray(kappa)
    nodes, weights = unit_quadrature(num_nodes)
    density = jnp.asarray(weights) * jnp.exp(kappa[..., None] * jnp.asarray(nodes**2 - 1))
    return (density @ jnp.asarray(legendre(nodes, order))) / jnp.sum(density, axis=-1, keepdims=True)


def stick_moments(
    attenuation: Float[Array | np.ndarray, "*batch"], order: int, num_nodes: int = 32
) -> Float[Array | np.ndarray, "*batch degree"]:
    """Return h_l = int_0^1 P_l(x) exp(-attenuation x^2) dx for l = 0, 2, ..., order.

    Args:
        attenuation: b times the parallel diffusivity, no unit. A NumPy array is integrated in float64 on the
            host, which is how a fit prepares its protocol once.
        order: Highest Legendre order.
        num_nodes: 32 nodes are exact to 1e-13 for attenuations up to 40 and orders up to 32.
    """
    nodes, weights = unit_quadrature(num_nodes)
    polynomials = legendre(nodes, order) * weights[:, None]
    if isinstance(attenuation, np.ndarray):
        return np.exp(-attenuation[..., None] * nodes**2) @ polynomials
    return jnp.exp(-attenuation[..., None] * nodes**2) @ polynomials


def legendre(x: Float[Array | np.ndarray, "*batch"], order: int) -> Float[Array | np.ndarray, "*batch degree"]:
    """Return the even Legendre polynomials P_0, P_2, ..., P_order of x along a new last axis."""
    previous, current = x * 0 + 1, x
    even = [previous]
    for degree in range(1, order):
        following = ((2 * degree + 1) * x * current - degree * previous) / (degree + 1)
        previous, current = current, following
        if degree % 2:
            even.append(current)
    return np.stack(even, -1) if isinstance(x, np.ndarray | np.generic) else jnp.stack(even, -1)


def legendre_to_powers(order: int) -> Float[np.ndarray, "power degree"]:
    """Return the coefficients of P_0(c), P_2(c), ... in powers of u = 2 c^2 - 1, one column each."""
    count = order // 2 + 1
    u = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    chebyshev = np.polynomial.chebyshev
    series = np.linalg.solve(chebyshev.chebvander(u, count - 1), legendre(np.sqrt((u + 1) / 2), order))
    columns = [chebyshev.cheb2poly(column) for column in series.T]
    return np.stack([np.pad(column, (0, count - len(column))) for column in columns], axis=1)


def project_chebyshev(
    u: Float[np.ndarray, " node"], values: Float[np.ndarray, "*batch node"], degree: int
) -> Float[np.ndarray, "*batch degree"]:
    """Project values at Chebyshev nodes u on Chebyshev polynomials."""
    basis = np.polynomial.chebyshev.chebvander(u, degree)
    scale = np.where(np.arange(degree + 1) == 0, 1.0, 2.0) / len(u)
    return values @ basis * scale


def unit_quadrature(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Gauss-Legendre nodes and weights on [0, 1], in float64 on the host."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, weights / 2


def order_for(bvals: np.ndarray) -> int:
    """Return the expansion order a protocol needs: 16, or 24 where b exceeds 5000 s/mm^2."""
    return 24 if np.max(bvals) > 5000 else 16

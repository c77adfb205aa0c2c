"""A slab of brain with known NODDI parameters.

White matter with three fibre systems, a folded cortical ribbon, ventricles and a rim of cerebrospinal fluid, with soft
borders and slow variation inside each tissue. Every map is analytic, so the truth of a fit is known in every voxel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


class DiffusionPhantom(NamedTuple):
    """Truth of a diffusion scan.

    Attributes:
        ndi: Neurite density index.
        odi: Orientation dispersion index.
        fwf: Free water fraction.
        direction: Mean fibre direction along the array axes, unit length.
        s0: Unweighted signal, arbitrary unit, about 1000 in white matter.
        mask: Inside the head.
    """

    ndi: Float[Array, "x y z"]
    odi: Float[Array, "x y z"]
    fwf: Float[Array, "x y z"]
    direction: Float[Array, "x y z 3"]
    s0: Float[Array, "x y z"]
    mask: Bool[Array, "x y z"]


def make_slab(key: Key[Array, ""], shape: tuple[int, int, int]) -> DiffusionPhantom:
    """Make an axial slab of brain.

    Args:
        key: Consumed; draws the slow variation within tissues.
        shape: Voxels along x (left to right), y (back to front) and z.
    """
    axes = [jnp.linspace(-1.0, 1.0, size) if size > 1 else jnp.zeros(1) for size in shape]
    x, y, z = jnp.meshgrid(*axes, indexing="ij")
    z = 0.25 * z  # a slab: a quarter of the head
    white, grey, water, mask = _tissues(x, y, z)
    variation = _slow_fields(key, x, y, z)
    ndi = 0.62 * white + 0.42 * grey + 0.35 * water + 0.08 * variation[0] * (white + grey)
    odi = 0.16 * white + 0.52 * grey + 0.80 * water + 0.06 * variation[1] * (white + grey)
    fwf = 0.04 * white + 0.10 * grey + 0.96 * water + 0.03 * variation[2] * (white + grey)
    return DiffusionPhantom(
        ndi=jnp.clip(ndi, 0.0, 1.0),
        odi=jnp.clip(odi, 0.02, 0.99),
        fwf=jnp.clip(fwf, 0.0, 1.0),
        direction=_fibres(x, y, z),
        s0=jnp.where(mask, 850.0 * white + 1050.0 * grey + 1800.0 * water, 0.0),
        mask=mask,
    )


def _tissues(x, y, z):
    """Return soft shares of white matter, grey matter and water, which sum to 1, and the head mask."""
    radius = jnp.sqrt((x / 0.84) ** 2 + (y / 0.92) ** 2 + z**2)
    angle = jnp.arctan2(y, x)
    folds = 0.05 * jnp.cos(14 * angle + 6 * z) + 0.03 * jnp.cos(23 * angle - 4 * z)
    fissure = 0.22 * jnp.exp(-((x / 0.05) ** 2)) * (jnp.abs(y) > 0.45)

    def inside(distance, width=0.03):
        return jax.nn.sigmoid(-distance / width)

    def ventricle(side):
        return inside((((x - side * 0.13) / 0.09) ** 2 + ((y - 0.02) / 0.30) ** 2 + (z / 0.3) ** 2) ** 0.5 - 1, 0.12)

    ventricles = jnp.maximum(ventricle(-1.0), ventricle(1.0))
    brain = inside(radius + fissure - 0.93) * (1 - ventricles)
    core = inside(radius + folds + 1.6 * fissure - 0.74) * (1 - ventricles)
    return core, jnp.maximum(brain - core, 0.0), 1 - jnp.maximum(brain, core), radius < 1.0


def _fibres(x, y, z):
    """Blend three systems: callosal (left-right), association (back-front), projection (up)."""
    callosal = jnp.exp(-((x / 0.35) ** 2) - (y / 0.5) ** 2)
    projection = 0.8 * jnp.exp(-(((jnp.abs(x) - 0.45) / 0.15) ** 2))
    bend = jnp.stack([1.0 + 0 * x, 0.4 * x, 0.6 * jnp.abs(x)], -1) * callosal[..., None]
    along = jnp.stack([0.5 * x, 1.0 + 0 * x, 0.2 * y], -1) * (1 - callosal)[..., None]
    up = jnp.stack([0.3 * x, 0 * x, 1.0 + 0 * x], -1) * projection[..., None]
    total = bend + along + up
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def _slow_fields(key, x, y, z):
    """Return three smooth random fields of about unit range, from a few long waves."""
    wave_key, phase_key = jax.random.split(key)
    waves = jax.random.uniform(wave_key, (3, 4, 3), minval=-5.0, maxval=5.0)
    phases = jax.random.uniform(phase_key, (3, 4), maxval=2 * jnp.pi)
    points = jnp.stack([x, y, z], -1)
    return jnp.mean(jnp.sin(jnp.einsum("fwi,xyzi->fwxyz", waves, points) + phases[..., None, None, None]), axis=1)

"""Paired MRI and amyloid PET of nested ellipsoids: tissue lost is seen in the MRI, and uptake depends on it.

Atrophy thins the cortex and widens the ventricles. Cortical uptake is a smooth step of atrophy, so that an MRI tells
it; in the negative control it is that of another, independent atrophy, so that nothing tells it. Not anatomy, and not
how amyloid and atrophy go together in patients: a task with known truth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.types import KeyArray
from jaxmed.synthesis.phantoms.shapes import centered_points, ellipsoid, inside

# Semi-axes in mm of brain and ventricles, and place and semi-axes of the cerebellum.
BRAIN, VENTRICLES = (66.0, 82.0, 62.0), (20.0, 30.0, 12.0)
CEREBELLUM, CEREBELLUM_SIZE = (0.0, -44.0, -42.0), (40.0, 26.0, 18.0)
CORTEX = (16.0, 8.0)
"""Thickness in mm without atrophy and with all of it; some voxels of a coarse grid, where a real one has 2 to 4 mm."""
WIDENING = 0.8
"""By how much all atrophy widens the ventricles, relative."""
MRI = {"background": -65.0, "fluid": -40.0, "grey": -14.0, "white": 0.0}
"""T1-weighted intensities by WhiteStripe: deviations of white matter from its mean."""
SUVR = {"background": 0.0, "fluid": 0.5, "cerebellum": 1.0, "white": 1.2, "cortex": (1.0, 0.65)}
"""Uptake relative to the cerebellum's; the cortex has the first number and, at full uptake, the second more."""
REGION_DEPTH = (4.0, 8.0)
MIDPOINT, SLOPE = 0.5, 0.06
MRI_NOISE, SUVR_NOISE = 2.0, 0.05


class Pair(NamedTuple):
    """A subject.

    Attributes:
        mri: T1-weighted, in WhiteStripe's unit.
        suvr: The PET map.
        cortex: Share of each voxel that is cortex.
        atrophy: From 0 to 1.
        uptake: SUVR of the cortex, without noise; above 1.326 amyloid counts as positive.
    """

    mri: Float[Array, "x y z"]
    suvr: Float[Array, "x y z"]
    cortex: Float[Array, "x y z"]
    atrophy: Float[Array, ""]
    uptake: Float[Array, ""]


def cortical_uptake(atrophy: Float[Array, "*subject"]) -> Float[Array, "*subject"]:
    """Return the SUVR of the cortex at some atrophy: half of all uptake, just at positivity, where that is 1/2."""
    base, more = SUVR["cortex"]
    return base + more * jax.nn.sigmoid((atrophy - MIDPOINT) / SLOPE)


def draw_pair(
    key: KeyArray, shape: tuple[int, int, int], spacing: float, *, linked: bool = True, spread: float = 0.04
) -> Pair:
    """Make one subject, its brain in the middle of the volume.

    Args:
        key: Consumed.
        shape: Voxels along x, y (back to front) and z (foot to head).
        spacing: Voxel edge in mm.
        linked: Whether uptake follows the atrophy that the MRI shows; else that of someone else.
        spread: Standard deviation of semi-axes between subjects, relative.
    """
    atrophy_key, other_key, size_key, mri_key, suvr_key = jax.random.split(key, 5)
    atrophy = jax.random.uniform(atrophy_key)
    uptake = cortical_uptake(atrophy if linked else jax.random.uniform(other_key))
    whole = 1 + spread * jax.random.normal(size_key, (3,))
    points = centered_points(shape, [spacing] * 3)

    def share(size: Array, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Array:
        return inside(ellipsoid(points, jnp.array(center) * whole, size * whole), spacing)

    thickness = CORTEX[0] + (CORTEX[1] - CORTEX[0]) * atrophy
    brain, inner = share(jnp.array(BRAIN)), share(jnp.array(BRAIN) - thickness)
    fluid = share(jnp.array(VENTRICLES) * (1 + WIDENING * atrophy))
    cerebellum = share(jnp.array(CEREBELLUM_SIZE), CEREBELLUM) * brain * (1 - fluid)
    cortex = brain * (1 - inner) * (1 - cerebellum)
    white = inner * (1 - fluid) * (1 - cerebellum)

    def mix(background: float, fluid_level: float, *levels: Array | float) -> Array:
        shares = (cortex, white, cerebellum)
        rest = 1 - cortex - white - cerebellum
        ventricle = jnp.clip(jnp.minimum(rest, fluid * inner), 0.0, 1.0)
        filled = sum((level * part for level, part in zip(levels, shares, strict=True)), fluid_level * ventricle)
        return filled + background * (rest - ventricle)

    mri = mix(MRI["background"], MRI["fluid"], MRI["grey"], MRI["white"], MRI["grey"])
    suvr = mix(SUVR["background"], SUVR["fluid"], uptake, SUVR["white"], SUVR["cerebellum"])
    is_brain = brain > 0
    mri = mri + jnp.where(is_brain, MRI_NOISE * jax.random.normal(mri_key, shape), 0.0)
    suvr = suvr + jnp.where(is_brain, SUVR_NOISE * jax.random.normal(suvr_key, shape), 0.0)
    return Pair(jnp.maximum(mri, MRI["background"]), jnp.maximum(suvr, 0.0), cortex, atrophy, uptake)


def cortical_region(shape: tuple[int, int, int], spacing: float) -> Bool[Array, "x y z"]:
    """Return a region that is mostly cortex in every subject, whatever the atrophy: a shell at 4 to 8 mm of depth.

    Deep enough that a brain smaller than the mean still fills it: beyond the brain there is no uptake at all.

    Args:
        shape: Voxels, as of `draw_pair`.
        spacing: Voxel edge in mm; a voxel counts where its centre lies in the shell, and none of the cerebellum does.
    """
    points = centered_points(shape, [spacing] * 3)
    outer, inner = (ellipsoid(points, jnp.zeros(3), jnp.array(BRAIN) - depth) < 0 for depth in REGION_DEPTH)
    return outer & ~inner & (ellipsoid(points, jnp.array(CEREBELLUM), jnp.array(CEREBELLUM_SIZE)) > 0)

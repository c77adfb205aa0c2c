"""Lesions: a shape from smooth noise or from a lesion map, let flow along a random current, and its intensity.

A current without divergence is the curl of three smooth potentials; along it a share of lesion is carried by
dP/dt = -V . grad P, and spreads by div(D grad P) where diffusion is asked for. Differences look upstream, so that no
value appears that was not there; nothing flows through the border.

Source: BrainFM (arXiv:2509.00549) and UNA (CVPR 2025), the paper's equation and the authors' public code, whose flow is
advection only.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxmed.arrays.filters import finite_difference
from jaxmed.config import Count, Fraction, NonNegative, Positive, Range, Share, checked
from jaxmed.solvers.ode import OdeConfig, solve

PERIODS = 2
"""Periods of the noise along each axis."""
STRIDE = 4
"""Every so many voxels along each axis a percentile is taken of: the noise is smooth, and sorting all takes long."""


@dataclasses.dataclass(frozen=True)
@checked
class PathologyConfig:
    """How lesions are drawn.

    Attributes:
        probability: That a subject has one.
        shape: Of smooth noise above a percentile, or the subject's own lesion map.
        percentile: Range of that percentile; 90 to 99.6 in UNA.
        threshold: Share of the largest value from which on a voxel counts as lesion; 0.2 in UNA.
        tolerance: Share of voxels up to which there is no lesion.
        strength: Range of the mean change of intensity, in means inside the lesion; 1 to 2 in UNA.
        spread: Upper end of the standard deviation of the change, in the same unit.
        flow: Whether the shape flows; UNA lets lesion maps be carried, its paper lets them diffuse too.
        speed: Factor of the current, in voxels per unit of time and potential.
        steps: Largest number of steps of 0.1 that it flows, of which the first is none.
        solver: How the flow is solved; the source's tolerances of 1e-6 and 1e-12 are of double precision.
    """

    probability: Share = 0.0
    shape: Literal["perlin", "lesion"] = "perlin"
    percentile: Range = (85.0, 99.9)
    threshold: Fraction = 0.5
    tolerance: Share = 1e-6
    strength: Range = (0.75, 1.0)
    spread: NonNegative = 0.25
    flow: Literal["none", "advection", "advection-diffusion"] = "none"
    speed: Positive = 500.0
    steps: Count = 10
    solver: OdeConfig = OdeConfig("dopri5", rtol=1e-3, atol=1e-4)


class Pathology(NamedTuple):
    """A lesion.

    Attributes:
        share: How much of it a voxel holds, from 0 to 1.
        mask: Where it counts as lesion; nowhere where there is none.
    """

    share: Float[Array, "x y z"]
    mask: Bool[Array, "x y z"]


def draw_pathology(
    key: Key[Array, ""],
    brain: Bool[Array, "x y z"],
    config: PathologyConfig,
    lesion: Float[Array, "x y z"] | None = None,
) -> Pathology:
    """Draw a lesion, or none.

    Args:
        key: Consumed.
        brain: Where lesions may begin.
        config: Static.
        lesion: The subject's lesion map, from 0 to 1; needed where shapes are taken from it.

    Deviation: the noise is confined to the brain and scaled to a maximum of 1, which the source does not say.
    """
    is_on_key, shape_key, percentile_key, flow_key = jax.random.split(key, 4)
    if config.shape == "lesion":
        if lesion is None:
            raise ValueError("pathology.shape: expected a lesion map of the subject, found none")
        share = lesion
    else:
        noise = jnp.where(brain, perlin(shape_key, brain.shape), -jnp.inf)
        low, high = config.percentile
        rank = jax.random.uniform(percentile_key, minval=low, maxval=high)
        thin = noise[::STRIDE, ::STRIDE, ::STRIDE]
        level = jnp.nanpercentile(jnp.where(jnp.isfinite(thin), thin, jnp.nan), rank)
        share = jnp.where(noise >= level, noise, 0.0)
        share = jnp.maximum(share, 0.0) / jnp.maximum(share.max(), 1e-6)
    if config.flow != "none":
        share = jnp.clip(flow(flow_key, share, config), 0.0, 1.0)
    mask = share >= config.threshold * jnp.maximum(share.max(), 1e-6)
    is_on = jax.random.bernoulli(is_on_key, config.probability) & (mask.mean() > config.tolerance)
    return Pathology(jnp.where(is_on, share, 0.0), mask & is_on)


def encode(
    key: Key[Array, ""],
    image: Float[Array, "x y z"],
    pathology: Pathology,
    is_bright: Bool[Array, ""],
    config: PathologyConfig,
) -> Float[Array, "x y z"]:
    """Change the intensities of a lesion: I + share (m + s n), m and s in means of the image inside it.

    Args:
        key: Consumed.
        image: Before it is deformed.
        pathology: From `draw_pathology`.
        is_bright: Whether it is brighter than what was there.
        config: Static.
    """
    strength_key, spread_key, noise_key = jax.random.split(key, 3)
    count = jnp.maximum(pathology.mask.sum(), 1)
    mean = jnp.where(pathology.mask, image, 0.0).sum() / count
    low, high = config.strength
    shift = jax.random.uniform(strength_key, minval=low, maxval=high) * jnp.where(is_bright, mean, -mean)
    std = config.spread * jax.random.uniform(spread_key) * mean
    change = shift + std * jax.random.normal(noise_key, image.shape)
    return jnp.maximum(image + pathology.share * change, 0.0)


def flow(key: Key[Array, ""], share: Float[Array, "x y z"], config: PathologyConfig) -> Float[Array, "x y z"]:
    """Let a shape flow along a random current, for a random time."""
    time_key, *potential_keys = jax.random.split(key, 4)
    potentials = jnp.stack([perlin(one, share.shape) for one in potential_keys])
    velocity = config.speed * curl(potentials)
    diffusivity = potentials[0] ** 2 if config.flow == "advection-diffusion" else None
    time = 0.1 * jax.random.randint(time_key, (), 0, config.steps)
    return transport(share, velocity * time, diffusivity if diffusivity is None else diffusivity * time, config.solver)


def transport(
    share: Float[Array, "x y z"],
    velocity: Float[Array, "3 x y z"],
    diffusivity: Float[Array, "x y z"] | None = None,
    solver: OdeConfig = PathologyConfig().solver,
) -> Float[Array, "x y z"]:
    """Carry, and spread, a quantity over unit time.

    Args:
        share: What is carried.
        velocity: In voxels.
        diffusivity: In square voxels; None for none.
        solver: Steps; in fixed ones no value leaves the range of what was there while a step is shorter than a voxel.
    """

    def rate(_: Array, state: Array, __: object) -> Array:
        change = -upwind(state, velocity)
        return change if diffusivity is None else change + spreading(state, diffusivity)

    return solve(rate, share, jnp.array([0.0, 1.0]), solver).states[-1]


def upwind(share: Float[Array, "x y z"], velocity: Float[Array, "3 x y z"]) -> Float[Array, "x y z"]:
    """Return V . grad P, differences taken upstream; zero across the border."""
    total = jnp.zeros_like(share)
    for axis in range(3):
        behind, ahead = (finite_difference(share, axis, kind) for kind in ("backward", "forward"))
        total = total + velocity[axis] * jnp.where(velocity[axis] > 0, behind, ahead)
    return total


def spreading(share: Float[Array, "x y z"], diffusivity: Float[Array, "x y z"]) -> Float[Array, "x y z"]:
    """Return div(D grad P), with fluxes between voxels and none through the border."""
    total = jnp.zeros_like(share)
    for axis in range(3):
        size = share.shape[axis]
        low, high = (jax.lax.slice_in_dim(diffusivity, one, size - 1 + one, axis=axis) for one in (0, 1))
        flux = 0.5 * (low + high) * jnp.diff(share, axis=axis)
        widths = [(int(one == axis), 0) for one in range(3)]
        total = total + jnp.pad(flux, [(0, after) for after, _ in widths]) - jnp.pad(flux, widths)
    return total


def curl(potentials: Float[Array, "3 x y z"]) -> Float[Array, "3 x y z"]:
    """Return the curl, by central differences: its divergence by the same differences is 0 inside."""

    def slope(of: int, axis: int) -> Array:
        return finite_difference(potentials[of], axis, "central")

    return jnp.stack([slope(2, 1) - slope(1, 2), slope(0, 2) - slope(2, 0), slope(1, 0) - slope(0, 1)])


def perlin(key: Key[Array, ""], shape: tuple[int, ...], periods: int = PERIODS) -> Float[Array, "x y z"]:
    """Draw gradient noise: random slopes at lattice points, faded between them; it repeats along the first axis.

    As a product of one small matrix per axis, of fading weights or of weights times distance.

    Args:
        key: Consumed.
        shape: Of the result.
        periods: Cells of the lattice along each axis.
    """
    angles = jax.random.normal(key, (periods + 1, periods + 1, periods + 1, 3))
    slopes = angles / jnp.maximum(jnp.linalg.norm(angles, axis=-1, keepdims=True), 1e-6)
    slopes = slopes.at[-1].set(slopes[0])
    weights, leans = zip(*(_fade(size, periods) for size in shape), strict=True)
    total: Float[Array, "x y z"] = jnp.zeros(shape)
    for axis in range(3):
        along_x, along_y, along_z = (leans[one] if one == axis else weights[one] for one in range(3))
        total = total + jnp.einsum("xi,yj,zk,ijk->xyz", along_x, along_y, along_z, slopes[..., axis], optimize=True)
    return total


def _fade(size: int, periods: int) -> tuple[Float[np.ndarray, "size point"], Float[np.ndarray, "size point"]]:
    """Return the weights of lattice points along an axis, and the weights times the distance from them, in cells."""
    place = np.arange(size, dtype=np.float32) * np.float32(periods / size)
    distance = place[:, None] - np.arange(periods + 1, dtype=np.float32)
    near = np.clip(1 - np.abs(distance), 0, 1)
    weight = near**3 * (near * (near * 6 - 15) + 10)
    return weight.astype(np.float32), (weight * distance).astype(np.float32)

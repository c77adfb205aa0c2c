"""Models of the diffusion signal under one signature, so that a fit, a network and an export take any of them.

A model maps its parameters and one fibre direction to the signal relative to b = 0. `noddi_model` and
`ball_and_stick_model` return two; a third needs nothing but a function and a row per parameter.

Units: b-values in s/mm^2, diffusivities in um^2/ms; directions are unit vectors in the frame of the gradient table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import add_rician_noise


class Parameter(NamedTuple):
    """One scalar parameter of a model.

    Attributes:
        name: In maps, columns of labels and file names.
        definition: One line for sidecars and reports.
        unit: "1" for a fraction.
        bounds: What a fit and a network's output are confined to.
        draw: Range that simulations draw from, uniformly.
        starts: Values a fit tries before it iterates.
    """

    name: str
    definition: str
    unit: str
    bounds: tuple[float, float]
    draw: tuple[float, float]
    starts: tuple[float, ...]


class MicrostructureModel(NamedTuple):
    """A forward model with one fibre direction.

    Hashable, so that it can be a static argument of jit; models of equal constants are equal.

    Attributes:
        name: For files and reports.
        parameters: In the order of the last axis of every parameter array.
        signal: (parameters, direction, bvals, bvecs) -> S / S0, with shapes `*batch parameter`, `*batch 3`,
            `measurement`, `measurement 3` and `*batch measurement`. b-values may also have a batch, for scans whose
            gradients vary over space; directions of gradients then too.
        relevance: parameters -> weight in [0, 1] of each parameter's error: 0 where the signal does not depend on it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    signal: Callable[..., Float[Array, "*batch measurement"]]
    relevance: Callable[[Float[Array, "*batch parameter"]], Float[Array, "*batch parameter"]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)


NDI = Parameter(
    "ndi",
    "neurite density index: share of tissue water inside neurites; undefined where fwf is near 1",
    "1",
    bounds=(0.0, 1.0),
    draw=(0.0, 1.0),
    starts=tuple(step / 10 for step in range(1, 10)),
)
ODI = Parameter(
    "odi",
    "orientation dispersion index, (2 / pi) atan(1 / kappa); undefined where ndi or 1 - fwf is near 0",
    "1",
    bounds=(0.01, 0.99),
    draw=(0.02, 0.99),
    starts=(0.02, 0.04, 0.08, 0.14, 0.2, 0.3, 0.5, 0.84),
)
FWF = Parameter(
    "fwf",
    "free water fraction",
    "1",
    bounds=(0.0, 1.0),
    draw=(0.0, 1.0),
    starts=(0.03, 0.2, 0.4, 0.6, 0.8, 0.97),
)
DOT = Parameter(
    "dot",
    "fraction of water that does not move (fixed tissue)",
    "1",
    bounds=(0.0, 1.0),
    draw=(0.0, 0.3),
    starts=(0.03, 0.15, 0.3),
)
STICK_FRACTION = Parameter(
    "stick_fraction",
    "share of water that moves along one direction only",
    "1",
    bounds=(0.0, 1.0),
    draw=(0.0, 1.0),
    starts=tuple(step / 10 for step in range(1, 10)),
)
DIFFUSIVITY = Parameter(
    "diffusivity",
    "diffusivity along the stick and of the ball",
    "um^2/ms",
    bounds=(0.05, 4.0),
    draw=(0.5, 3.0),
    starts=(0.3, 0.6, 0.9, 1.2, 1.6, 2.0, 2.5, 3.0),
)


@functools.lru_cache
def noddi_model(
    tissue: noddi.Tissue = noddi.Tissue(),
    order: int = 16,
    extra_cellular: noddi.ExtraCellular = "averaged_tensor",
    dot: bool = False,
) -> MicrostructureModel:
    """Return NODDI with parameters (ndi, odi, fwf), and dot where fixed tissue has water that does not move.

    Source: Zhang et al., NeuroImage 2012; see `jaxmed.physics.noddi` for the arguments.
    """

    def predict(parameters, direction, bvals, bvecs):
        ndi, odi, fwf, *rest = jnp.moveaxis(parameters, -1, 0)
        return noddi.signal(
            ndi,
            odi,
            fwf,
            direction,
            bvals,
            bvecs,
            dot=rest[0] if dot else None,
            tissue=tissue,
            order=order,
            extra_cellular=extra_cellular,
        )

    def relevance(parameters):
        # Tissue that is not there has no neurites, and their absence in free water says nothing.
        tissue_share = 1 - parameters[..., 2:3]
        return jnp.concatenate([tissue_share, jnp.ones_like(parameters[..., 1:])], axis=-1)

    name = "noddi" + ("_convolved" if extra_cellular == "convolved" else "") + ("_dot" if dot else "")
    return MicrostructureModel(name, (NDI, ODI, FWF, *((DOT,) if dot else ())), predict, relevance)


@functools.lru_cache
def ball_and_stick_model() -> MicrostructureModel:
    """Return isotropic diffusion beside diffusion along one direction, at one diffusivity.

    Source: Behrens et al., Magn. Reson. Med. 2003, equation 4.
    """

    def predict(parameters, direction, bvals, bvecs):
        fraction, diffusivity = parameters[..., :1], parameters[..., 1:]
        attenuation = 1e-3 * jnp.asarray(bvals) * diffusivity
        along = noddi.cosines(bvecs, direction)
        return fraction * jnp.exp(-attenuation * along**2) + (1 - fraction) * jnp.exp(-attenuation)

    return MicrostructureModel("ball_and_stick", (STICK_FRACTION, DIFFUSIVITY), predict, jnp.ones_like)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Which forward model makes the signals.

    Attributes:
        kind: NODDI, or one stick in a ball (stick fraction and diffusivity).
        tissue: Diffusivities that NODDI fixes.
        extra_cellular: NODDI's space outside neurites, see `jaxmed.physics.noddi.signal`.
        dot: Add NODDI's compartment of water that does not move, for fixed tissue.
    """

    kind: Literal["noddi", "ball-and-stick"] = "noddi"
    tissue: noddi.Tissue = dataclasses.field(default_factory=noddi.Tissue)
    extra_cellular: Literal["averaged_tensor", "convolved"] = "averaged_tensor"
    dot: bool = False

    def build(self, bvals: np.ndarray) -> MicrostructureModel:
        """Return the model, exact enough for these b-values in s/mm^2."""
        if self.kind == "ball-and-stick":
            return ball_and_stick_model()
        return noddi_model(self.tissue, noddi.order_for(bvals), self.extra_cellular, self.dot)


def weighted_signal(
    model: MicrostructureModel,
    parameters: Float[Array | np.ndarray, "*batch parameter"],
    direction: Float[Array | np.ndarray, "*batch 3"],
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    is_b0: Bool[np.ndarray, " measurement"],
) -> Float[Array, "*batch weighted"]:
    """Return the weighted signals over the mean of those that count as unweighted, as measurements are divided.

    Images that count as unweighted may have b = 60: their own attenuation is part of what divides the others.
    """
    if not np.any(bvals[is_b0]):
        return model.signal(parameters, direction, bvals[~is_b0], bvecs[~is_b0])
    clean = model.signal(parameters, direction, bvals, bvecs)
    return clean[..., np.flatnonzero(~is_b0)] / jnp.mean(clean[..., np.flatnonzero(is_b0)], axis=-1, keepdims=True)


class Simulated(NamedTuple):
    """Voxels with their truth; S0 is 1.

    Attributes:
        signals: Magnitudes with Rician noise, not normalised by their b = 0 rows.
        parameters: True parameters.
        direction: True fibre direction.
        sigma: Noise of each channel.
    """

    signals: Float[Array, "voxel measurement"]
    parameters: Float[Array, "voxel parameter"]
    direction: Float[Array, "voxel 3"]
    sigma: Float[Array, " voxel"]


def simulate(
    key: Key[Array, ""],
    model: MicrostructureModel,
    count: int,
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    snr: tuple[float, float] = (10.0, 50.0),
) -> Simulated:
    """Draw voxels: parameters uniform over their ranges, directions over the sphere.

    Args:
        key: Consumed.
        model: The forward model.
        count: Number of voxels.
        bvals: b-values in s/mm^2.
        bvecs: Unit directions.
        snr: Range of signal-to-noise ratios at b = 0, drawn uniformly; equal ends fix it.
    """
    parameter_key, direction_key, snr_key, noise_key = jax.random.split(key, 4)
    low, high = jnp.asarray([parameter.draw for parameter in model.parameters]).T
    parameters = low + (high - low) * jax.random.uniform(parameter_key, (count, len(model.parameters)))
    direction = draw_directions(direction_key, count)
    sigma = 1 / jax.random.uniform(snr_key, (count,), minval=snr[0], maxval=snr[1])
    clean = model.signal(parameters, direction, bvals, bvecs)
    return Simulated(add_rician_noise(noise_key, clean, sigma[:, None]), parameters, direction, sigma)


def draw_directions(key: Key[Array, ""], count: int) -> Float[Array, "voxel 3"]:
    """Draw unit vectors uniformly over the sphere."""
    direction = jax.random.normal(key, (count, 3))
    return direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)


def turn(direction: Float[Array, "3 voxel"], tilts: Float[Array, "2 voxel"]) -> Float[Array, "3 voxel"]:
    """Turn directions by small angles, in radians, along the two tangents of each."""
    first, second = tangent_frame(direction)
    moved = direction + tilts[0] * first + tilts[1] * second
    return moved / jnp.sqrt(jnp.sum(moved**2, axis=0))


def tangent_frame(direction: Float[Array, "3 voxel"]) -> tuple[Float[Array, "3 voxel"], Float[Array, "3 voxel"]]:
    """Return two unit vectors that complete each direction to a frame, without a branch.

    Source: Duff et al., J. Comput. Graph. Tech. 2017.
    """
    x, y, z = direction
    sign = jnp.where(z >= 0, 1.0, -1.0)
    a = -1 / (sign + z)
    b = x * y * a
    return jnp.stack([1 + sign * x * x * a, sign * b, -sign * x]), jnp.stack([b, sign + y * y * a, -y])

"""Random deformations of a subject: affine, and a smooth displacement on top; the sampling coordinates they give.

A deformation maps OUTPUT voxels to places in the native volume, y = A (x - c + F(x)) + c2: the nonlinear part F acts
first, on output coordinates, then the affine part about the centres c and c2 of the two grids. Compute y once and
sample every volume of the subject at it. 3D as published; 2D by the same rules in the plane.

Source: BrainFM's generator, steps 4 to 6, in its authors' public code.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from jaxmed.arrays.warping import compose, compose_with_itself, identity_grid
from jaxmed.config import Decay, FractionRange, NonNegative, Size, checked
from jaxmed.synthesis.control_grid import PHOTO_AXIS, Photo, draw_field


@dataclasses.dataclass(frozen=True)
@checked
class DeformationConfig:
    """Ranges of the deformation.

    Attributes:
        rotation: Largest angle about each axis, in degrees.
        shear: Largest shear.
        scaling: Largest deviation of each axis's scale from 1.
        control_scale: FractionRange of control points per voxel.
        amplitude: Upper end of the standard deviation of control displacements, in voxels; it is drawn evenly from 0.
        random_shift: Whether the field of view moves at random where the native volume is larger than the output.
        integrate_svf: Whether the field is the velocity of a diffeomorphism; the released generator takes it as the
            displacement itself, which may fold.
        svf_steps: Squarings of that integration.
    """

    rotation: NonNegative = 15.0
    shear: NonNegative = 0.2
    scaling: Decay = 0.2
    control_scale: FractionRange = (0.03, 0.06)
    amplitude: NonNegative = 4.0
    random_shift: bool = False
    integrate_svf: bool = False
    svf_steps: Size = 8


class Affine(NamedTuple):
    """A linear map of output to native coordinates, about the centres.

    Attributes:
        matrix: In voxels.
        distance_scale: Geometric mean of the scalings; distances warped along are divided by it.
        shift: Shift of the native centre, in voxels.
    """

    matrix: Float[Array, "axis axis"]
    distance_scale: Float[Array, ""]
    shift: Float[Array, " axis"]


NativeShape = tuple[int, ...] | Integer[Array, " axis"]
"""Voxels of a volume; an array where volumes of different sizes are padded to one grid."""


def draw_affine(
    key: Key[Array, ""], native_shape: NativeShape, shape: tuple[int, ...], config: DeformationConfig
) -> Affine:
    """Draw rotation, shear, scaling and shift.

    A = SHx SHy SHz Rx Ry Rz with row a then multiplied by the scaling of axis a.

    Args:
        key: Consumed.
        native_shape: Shape of the volume to be sampled.
        shape: Shape of the output.
        config: Ranges.

    Deviation: in 2D, A = SHx SHy R with one angle and two shears; the source has 3D only.
    """
    ndim = len(shape)
    rotation_key, shear_key, scaling_key, shift_key = jax.random.split(key, 4)

    def symmetric(key: Array, count: int) -> Array:
        return jax.random.uniform(key, (count,), minval=-1.0, maxval=1.0)

    angles = jnp.deg2rad(config.rotation * symmetric(rotation_key, 3 if ndim == 3 else 1))
    shears = config.shear * symmetric(shear_key, ndim)
    scalings = 1 + config.scaling * symmetric(scaling_key, ndim)
    room = jnp.maximum((jnp.asarray(native_shape) - jnp.array(shape)) / 2, 0.0)
    shift = symmetric(shift_key, ndim) * room if config.random_shift else jnp.zeros(ndim)
    matrix = scalings[:, None] * (_shear(shears) @ _rotation(angles))
    return Affine(matrix, jnp.prod(scalings) ** (1 / ndim), shift)


def draw_displacement(
    key: Key[Array, ""], shape: tuple[int, ...], config: DeformationConfig, photo: Photo | None = None
) -> Float[Array, "*space axis"]:
    """Draw the nonlinear part, in voxels.

    Args:
        key: Consumed.
        shape: Shape of the output.
        config: Ranges.
        photo: In photo mode slabs do not move along axis 1, and each has its own control points.
    """
    amplitude_key, field_key = jax.random.split(key)
    amplitude = config.amplitude * jax.random.uniform(amplitude_key)
    field = draw_field(field_key, shape, config.control_scale, amplitude, len(shape), photo)
    if photo is not None:
        still = field.at[..., PHOTO_AXIS].set(0.0)
        field = jnp.where(photo.is_on, still, field)
    return integrate(field, config.svf_steps) if config.integrate_svf else field


def integrate(velocity: Float[Array, "*space axis"], num_steps: int = 8) -> Float[Array, "*space axis"]:
    """Integrate a stationary velocity field over unit time, by scaling and squaring; -velocity gives the inverse.

    Deviation: beyond the grid the outer vectors continue, so that a constant field is a translation; the source puts
    zeros there.
    """
    # Components first: whole arrays are blended while displacements are small, which most squarings are.
    start = jnp.moveaxis(velocity, -1, 0) / 2**num_steps

    def square(_: Array, phi: Array) -> Array:
        return jax.lax.cond(jnp.abs(phi).max() <= 1, compose_with_itself, _compose_far, phi)

    return jnp.moveaxis(jax.lax.fori_loop(0, num_steps, square, start), 0, -1)


def _compose_far(phi: Float[Array, "axis *space"]) -> Float[Array, "axis *space"]:
    field = jnp.moveaxis(phi, 0, -1)
    return jnp.moveaxis(compose(field, field), -1, 0)


def native_coordinates(
    native_shape: NativeShape, affine: Affine, displacement: Float[Array, "*space axis"]
) -> Float[Array, "*space axis"]:
    """Return where each output voxel lies in the native volume, or beyond it.

    Args:
        native_shape: Shape of the volume to be sampled.
        affine: Linear part.
        displacement: Nonlinear part, on the output grid.
    """
    shape = displacement.shape[:-1]
    center = jnp.array([(size - 1) / 2 for size in shape])
    native_center = (jnp.asarray(native_shape) - 1) / 2
    moved = identity_grid(shape) - center + displacement
    # Sums, not a matrix product: three numbers are too few for one, and bfloat16 would be off by a voxel.
    parts = [moved[..., axis, None] * affine.matrix[:, axis] for axis in range(len(shape))]
    return sum(parts, native_center + affine.shift)


def sampling_coordinates(
    native_shape: NativeShape, affine: Affine, displacement: Float[Array, "*space axis"]
) -> Float[Array, "*space axis"]:
    """Return where each output voxel is sampled in the native volume: `native_coordinates`, clamped to its voxels."""
    places = native_coordinates(native_shape, affine, displacement)
    return jnp.clip(places, 0.0, jnp.asarray(native_shape) - 1.0)


def draw_deformation(
    key: Key[Array, ""],
    native_shape: tuple[int, ...],
    shape: tuple[int, ...],
    config: DeformationConfig = DeformationConfig(),
    photo: Photo | None = None,
) -> tuple[Float[Array, "*space axis"], Affine]:
    """Draw a whole deformation: sampling coordinates, and the affine part for targets that scale with it.

    Args:
        key: Consumed.
        native_shape: Shape of the volumes to be sampled; 2 or 3 axes.
        shape: Shape of the output.
        config: Ranges.
        photo: Photo mode, or None.
    """
    affine_key, field_key = jax.random.split(key)
    affine = draw_affine(affine_key, native_shape, shape, config)
    displacement = draw_displacement(field_key, shape, config, photo)
    return sampling_coordinates(native_shape, affine, displacement), affine


def _rotation(angles: Float[Array, " angle"]) -> Float[Array, "axis axis"]:
    """Return Rx Ry Rz, right-handed; in the plane the one rotation."""
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    if len(angles) == 1:
        return jnp.array([[cosines[0], -sines[0]], [sines[0], cosines[0]]])
    matrix = jnp.eye(3)
    for axis in range(3):
        second, third = (axis + 1) % 3, (axis + 2) % 3
        turn = jnp.eye(3).at[second, second].set(cosines[axis]).at[third, third].set(cosines[axis])
        turn = turn.at[second, third].set(-sines[axis]).at[third, second].set(sines[axis])
        matrix = matrix @ turn
    return matrix


def _shear(shears: Float[Array, " axis"]) -> Float[Array, "axis axis"]:
    """Return SHx SHy SHz, the three sharing their numbers as in the source; in the plane SHx SHy."""
    ndim = len(shears)
    eye = jnp.eye(ndim)
    if ndim == 2:
        return eye.at[1, 0].set(shears[0]) @ eye.at[0, 1].set(shears[1])
    along_x = eye.at[1, 0].set(shears[1]).at[2, 0].set(shears[2])
    along_y = eye.at[0, 1].set(shears[0]).at[2, 1].set(shears[2])
    along_z = eye.at[0, 2].set(shears[0]).at[1, 2].set(shears[1])
    return along_x @ along_y @ along_z

"""Linear measurements of one image: filters and resizing, axis by axis.

Each is made for one shape of image, (*space, channel), and comes with its adjoint and, where there is an exact one,
its pseudo-inverse. Methods map it over a batch. Filters along the axes are one small matrix per axis: a chain of them
along the same axis multiplies into one, its pseudo-inverse is that of the small matrices, and on a CPU three banded
products beat a convolution by far.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxmed.arrays.filters import along

Map: TypeAlias = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Matrix: TypeAlias = Num[np.ndarray, "_ _"] | Float[Array, "_ _"]


class LinearOperator(NamedTuple):
    """A linear measurement of one image; calling it measures.

    Attributes:
        apply: A.
        adjoint: A^T: <A x, y> = <x, A^T y> for every image and measurement.
        pseudo_inverse: A^+, the image of least norm among those that fit best; None where there is no cheap form.
    """

    apply: Map
    adjoint: Map
    pseudo_inverse: Map | None = None

    def __call__(self, image: Float[Array, "..."]) -> Float[Array, "..."]:
        """Measure an image."""
        return self.apply(image)


def separable(matrices: Sequence[Matrix | None], relative_cutoff: float = 1e-6) -> LinearOperator:
    """Multiply each axis of an image by its own matrix.

    Args:
        matrices: One per axis of space; None leaves that axis as it is. Axes of the image after these are channels.
        relative_cutoff: Singular values below this fraction of an axis's largest count as 0 in the pseudo-inverse.
            Noise along a direction that is kept grows by up to its inverse.
    """
    forward = [None if matrix is None else jnp.asarray(matrix, jnp.float32) for matrix in matrices]
    # In double precision on the host: float32 loses small singular values.
    inverse = [None if m is None else np.linalg.pinv(np.asarray(m, np.float64), relative_cutoff) for m in matrices]

    def multiply(factors: Sequence[Matrix | None], image: Float[Array, "..."]) -> Float[Array, "..."]:
        for axis, factor in enumerate(factors):
            if factor is not None:
                image = along(jnp.asarray(factor, image.dtype), image, axis)
        return image

    return LinearOperator(
        apply=lambda image: multiply(forward, image),
        adjoint=lambda measurement: multiply([None if m is None else m.T for m in forward], measurement),
        pseudo_inverse=lambda measurement: multiply(inverse, measurement),
    )


def resize_matrix(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    """Return the matrix that resizes an axis linearly over the same field of view.

    A new voxel's centre is where it lies on the old axis. With `antialias` the triangle is as wide as the larger of
    both voxels; without it reads the two nearest. Weights outside are dropped and the rest scaled to a sum of 1.

    Source: PIL's and torchvision's bilinear resize, with and without antialias.
    """
    scale = max(old / new, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    if not antialias:
        # Beyond the outer centres the outer voxel is repeated.
        centres = np.clip(centres, 0, old - 1)
    weights = np.maximum(1 - np.abs(centres[:, None] - np.arange(old)) / scale, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def per_axis(value: float | Sequence[float], num_axes: int, name: str) -> list[float]:
    """Return one number for each axis of space, of one for all or one per axis."""
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * num_axes
    if len(values) != num_axes:
        raise ValueError(f"{name}: expected one value or {num_axes}, found {len(values)}")
    return values

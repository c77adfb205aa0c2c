"""Linear measurements that only tests make, with their exact inverses, and the spectra of any of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.filters import Mode, blur_matrix
from jaxmed.diffusion.posterior.ddrm import Spectrum, separable_spectrum
from jaxmed.diffusion.posterior.fidelity import Operator
from jaxmed.physics.operators import LinearOperator, Map, per_axis, separable


def from_function(apply: Map, shape: tuple[int, ...], pseudo_inverse: Map | None = None) -> LinearOperator:
    """Make an operator of any linear function; its adjoint is its transpose by JAX.

    Args:
        apply: Linear in the image, real in and out.
        shape: Shape of the image.
        pseudo_inverse: That of the function, if known.
    """

    def adjoint(measurement: Float[Array, "..."]) -> Float[Array, "..."]:
        (image,) = jax.linear_transpose(apply, jax.ShapeDtypeStruct(shape, measurement.dtype))(measurement)
        return image

    return LinearOperator(apply, adjoint, pseudo_inverse)


def blur(
    shape: tuple[int, ...],
    sigma: float | Sequence[float],
    radius: int | None = None,
    mode: Mode = "reflect",
    relative_cutoff: float = 1e-3,
) -> LinearOperator:
    """Blur by a Gaussian.

    Args:
        shape: Axes of space.
        sigma: Standard deviation in voxels, for all axes or one per axis; 0 leaves an axis alone.
        radius: Last tap to either side; 4 sigma by default.
        mode: What lies outside the image.
        relative_cutoff: See `separable`: the least contrast of a wave that the pseudo-inverse brings back.
    """
    sigmas = per_axis(sigma, len(shape), "sigma")
    matrices = []
    for size, width in zip(shape, sigmas, strict=True):
        reach = int(np.ceil(4 * width)) if radius is None else radius
        matrices.append(blur_matrix(size, width, reach, mode) if width > 0 else None)
    return separable(matrices, relative_cutoff)


def mask(keep: Bool[Array, "..."] | Bool[np.ndarray, "..."]) -> LinearOperator:
    """Measure some voxels; the others read 0.

    Args:
        keep: True where measured; it is broadcast to the image.
    """
    keep = jnp.asarray(keep)

    def apply(image: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(keep, image, 0.0)

    # A projection is its own adjoint and pseudo-inverse.
    return LinearOperator(apply, apply, apply)


def dense_spectrum(operator: Operator, shape: tuple[int, ...], relative_cutoff: float = 1e-6) -> Spectrum:
    """Decompose any linear operator by its matrix: for images of up to a few thousand voxels.

    Args:
        operator: Linear, of one image.
        shape: Shape of the image.
        relative_cutoff: Singular values below this fraction of the largest count as 0.
    """
    matrix = np.asarray(jax.jacfwd(lambda image: operator(image).ravel())(jnp.zeros(shape)), np.float64)
    size = int(np.prod(shape))
    flat = separable_spectrum([matrix.reshape(len(matrix), size)], (size,), relative_cutoff)
    return Spectrum(
        to_coefficients=lambda image: flat.to_coefficients(image.ravel()).reshape(shape),
        to_image=lambda coefficients: flat.to_image(coefficients.ravel()).reshape(shape),
        to_measured=lambda measurement: flat.to_measured(measurement.ravel()).reshape(shape),
        singular=flat.singular.reshape(shape),
    )


def mask_spectrum(keep: Array | np.ndarray) -> Spectrum:
    """Return the spectrum of an operator that keeps some voxels and sets the others to 0."""
    return Spectrum(
        lambda image: image, lambda image: image, lambda y: jnp.where(keep, y, 0.0), jnp.where(keep, 1.0, 0.0)
    )

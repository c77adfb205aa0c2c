"""How far an image is from its measurement, and the gradient of that through a denoiser.

L = |y - A(x)| + edge_weight | S(y) - S(A(x)) | + similarity_weight | 1 - SSIM of patches |, all plain norms over the
whole measurement of one sample. S is the Sobel magnitude. With both weights 0, `PLAIN`, any shape of measurement will
do; the other terms want images.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.filters import along, sobel_magnitude
from jaxmed.arrays.types import Scalar
from jaxmed.config import NonNegative, Positive, Size, checked
from jaxmed.diffusion.denoiser import Denoiser

Operator: TypeAlias = Callable[[Float[Array, "..."]], Float[Array, "..."]]
"""One image to one measurement, differentiable."""

SAFE = 1e-12
"""Added under square roots: at a perfect fit the norm has a gradient, 0, instead of none."""


@dataclasses.dataclass(frozen=True)
@checked
class Fidelity:
    """The terms of L.

    Attributes:
        edge_weight: Weight of the difference of Sobel magnitudes.
        similarity_weight: Weight of the structural dissimilarity of patches.
        halves: Which images of [0, 2] become [0, 1] before they are compared. all: both, for edges and similarity.
            release: for edges each whose largest value exceeds 1; for similarity none, in whose constants the range is
            still taken for 1.
        patch: Edge of a patch in voxels; smaller images are one patch. What is left at the far rims is not compared.
        window: Taps of SSIM's Gaussian window, odd; only windows inside a patch count.
        window_sigma: Its standard deviation in voxels.

    Source: github.com/edshkim98/DynamicDPS of 2026-04-29 (`FIDELITY2026`); July 2025 has similarity_weight 0.5
        (`FIDELITY2025`).
    Deviation: by default all are halved, which makes L smooth where the release has a jump, and gives SSIM's constants
        the range that they are for; single precision with a safe root, where the authors take SSIM in double.
    """

    edge_weight: NonNegative = 0.5
    similarity_weight: NonNegative = 0.1
    halves: Literal["all", "release"] = "all"
    patch: Size = 32
    window: Size = 11
    window_sigma: Positive = 1.5

    def __post_init__(self):
        """Refuse terms that cannot be computed."""
        if self.window % 2 == 0 or self.window > self.patch:
            raise ValueError(f"window: expected an odd number up to the patch of {self.patch}, found {self.window}")


def fidelity(
    image: Float[Array, "..."], measurement: Float[Array, "..."], operator: Operator, config: Fidelity
) -> tuple[Scalar, Scalar]:
    """Compare one image with its measurement.

    Args:
        image: An estimate; what is negative counts as 0 where the terms of images are wanted.
        measurement: y; for edges and similarity (*space, channel).
        operator: A.
        config: The terms.

    Returns:
        L, and the residual |y - A(x)|.
    """
    if config.edge_weight or config.similarity_weight:
        image = jnp.maximum(image, 0.0)
    predicted = operator(image)
    residual = norm(measurement - predicted)
    loss = residual
    if config.edge_weight:
        axes = tuple(range(measurement.ndim - 1))
        theirs, ours = (sobel_magnitude(_halved(image, config), axes) for image in (measurement, predicted))
        loss += config.edge_weight * norm(theirs - ours)
    if config.similarity_weight:
        factor = 0.5 if config.halves == "all" else 1.0
        loss += config.similarity_weight * norm(1 - patch_similarity(factor * measurement, factor * predicted, config))
    return loss, residual


def _halved(image: Float[Array, "..."], config: Fidelity) -> Float[Array, "..."]:
    """Return an image of [0, 2] as one of [0, 1]; in the release that is what exceeds 1 somewhere."""
    if config.halves == "all":
        return 0.5 * image
    return jnp.where(jnp.max(image) > 1, 0.5 * image, image)


def norm(values: Float[Array, "..."]) -> Scalar:
    """Return the Euclidean norm of all entries, with gradient 0 at 0."""
    return jnp.sqrt(jnp.sum(values**2) + SAFE)


def patch_similarity(
    first: Float[Array, "..."], second: Float[Array, "..."], config: Fidelity
) -> Float[Array, " patch"]:
    """Return the mean structural similarity within each patch of two images, whose range is taken for 1.

    Args:
        first: (*space, channel).
        second: The same.
        config: Patch and window.

    Source: Wang et al., IEEE Transactions on Image Processing 13 (2004), 600, equation 13, with K = (0.01, 0.03).
    """
    shape = first.shape[:-1]
    edges = tuple(min(size, config.patch) for size in shape)
    if min(edges) < config.window:
        raise ValueError(f"image for similarity: expected {config.window} voxels or more on every axis, found {shape}")
    first, second = _cut(first, edges), _cut(second, edges)
    matrices = [_window_matrix(edge, config) for edge in edges]

    def smooth(patches: Float[Array, "patch ..."]) -> Float[Array, "patch ..."]:
        for axis, matrix in enumerate(matrices):
            patches = along(jnp.asarray(matrix, patches.dtype), patches, axis + 1)
        return patches

    mean1, mean2 = smooth(first), smooth(second)
    # Of the differences from each patch's mean: moments of the values themselves cancel in single precision.
    inner = tuple(range(1, first.ndim))
    first, second = (x - jnp.mean(x, inner, keepdims=True) for x in (first, second))
    low1, low2 = smooth(first), smooth(second)
    variance1, variance2 = smooth(first**2) - low1**2, smooth(second**2) - low2**2
    covariance = smooth(first * second) - low1 * low2
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    similarity /= (mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2)
    return jnp.mean(similarity, inner)


def _cut(image: Float[Array, "..."], edges: tuple[int, ...]) -> Float[Array, "patch ..."]:
    """Return non-overlapping patches, each (*edges, channel)."""
    counts = [size // edge for size, edge in zip(image.shape, edges, strict=False)]
    image = image[tuple(slice(0, count * edge) for count, edge in zip(counts, edges, strict=True))]
    split = [part for pair in zip(counts, edges, strict=True) for part in pair]
    image = image.reshape(*split, image.shape[-1])
    num = len(edges)
    order = (*range(0, 2 * num, 2), *range(1, 2 * num, 2), 2 * num)
    return image.transpose(order).reshape(-1, *edges, image.shape[-1])


def _window_matrix(size: int, config: Fidelity) -> Float[np.ndarray, "inside size"]:
    """Return the Gaussian window at each place where it lies wholly inside an axis."""
    radius = config.window // 2
    centres = np.arange(radius, size - radius)
    offsets = np.arange(size) - centres[:, None]
    weights = np.where(np.abs(offsets) <= radius, np.exp(-0.5 * (offsets / config.window_sigma) ** 2), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


class Evaluation(NamedTuple):
    """The data term at noisy images.

    Attributes:
        loss: L of the denoised images.
        residual: |y - A(mean)|.
        mean: The denoised images, E[x_0 | x_t].
        gradient: dL / dx_t, through the denoiser.
    """

    loss: Float[Array, " batch"]
    residual: Float[Array, " batch"]
    mean: Float[Array, "batch ..."]
    gradient: Float[Array, "batch ..."]


def evaluate(
    denoiser: Denoiser,
    measurement: Float[Array, "batch ..."],
    operator: Operator,
    config: Fidelity,
    x: Float[Array, "batch ..."],
    t: Float[Array, " batch"],
) -> Evaluation:
    """Denoise, compare with the measurements, and go back through both: one forward and one backward pass."""

    def total(x: Float[Array, "batch ..."]) -> tuple[Scalar, tuple[Array, Array, Array]]:
        mean = denoiser.denoise(x, t)
        loss, residual = jax.vmap(lambda image, y: fidelity(image, y, operator, config))(mean, measurement)
        # Samples do not see each other, so the gradient of the sum holds each one's own.
        return jnp.sum(loss), (loss, residual, mean)

    gradient, (loss, residual, mean) = jax.grad(total, has_aux=True)(x)
    return Evaluation(loss, residual, mean, gradient)


PLAIN = Fidelity(edge_weight=0.0, similarity_weight=0.0)
FIDELITY2025 = Fidelity(similarity_weight=0.5, halves="release")
FIDELITY2026 = Fidelity(halves="release")

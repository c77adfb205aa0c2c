"""A prostate in three MR sequences with a lesion of known grade: a pure function of a key.

An ellipsoidal gland of two zones in muscle and fat, seen as T2-weighted scan, diffusion-weighted scan of a high b-value
and map of the apparent diffusion coefficient. A lesion is dark, bright and dark in them, the more so the higher its
grade; without one the three look like the same gland.

Source: stand-in for biparametric prostate MRI, jaxmed; signs of a lesion as in PI-RADS v2.1, coefficients of tissue in
1e-6 mm^2/s as textbooks give them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.config import NonNegative, Positive, checked
from jaxmed.synthesis.phantoms.shapes import centered_points, ellipsoid, inside

SEQUENCES = ("t2w", "hbv", "adc")
GRADES = 5
# Muscle, fat, outer zone, inner zone: T2w and high-b in arbitrary units, ADC in 1e-6 mm^2/s.
LEVELS = ((180.0, 25.0, 1200.0), (520.0, 8.0, 300.0), (650.0, 45.0, 1700.0), (400.0, 40.0, 1350.0))
# What a voxel of a lesion of the highest grade is.
LESION = (200.0, 150.0, 550.0)


@dataclasses.dataclass(frozen=True)
@checked
class ProstateConfig:
    """Scanner and anatomy of phantom prostates.

    Attributes:
        field_of_view: Length along x, y and z in mm; the voxel size is this divided by the shape.
        noise: Standard deviation of the noise in each of the two channels of a magnitude image, as a share of the
            brightest tissue of its sequence.
        texture: Spread of tissue from place to place, relative.
        gland_radius: Semi-axes of the mean gland along x, y and z, in mm.
        gland_spread: Largest deviation of a subject's semi-axes, relative.
        lesion_radius: Least and largest radius of a lesion, in mm.
    """

    field_of_view: tuple[Positive, Positive, Positive] = (96.0, 96.0, 48.0)
    noise: NonNegative = 0.03
    texture: NonNegative = 0.06
    gland_radius: tuple[Positive, Positive, Positive] = (26.0, 20.0, 19.0)
    gland_spread: NonNegative = 0.15
    lesion_radius: tuple[Positive, Positive] = (6.0, 9.0)


class ProstatePhantom(NamedTuple):
    """A case and its truth; the axes point to the right, the front and the head (RAS+).

    Attributes:
        images: T2w, high-b and ADC, magnitudes from 0 on.
        gland: Inside the gland.
        inner: Inside its inner zone.
        lesion: Inside the lesion; empty for grade 0.
        is_right: Whether the lesion's place is in the patient's right half; drawn without a lesion too.
    """

    images: Float[Array, "x y z 3"]
    gland: Bool[Array, "x y z"]
    inner: Bool[Array, "x y z"]
    lesion: Bool[Array, "x y z"]
    is_right: Bool[Array, ""]


def make_prostate(
    key: Key[Array, ""],
    grade: Int[Array, ""] | int,
    shape: tuple[int, int, int] = (48, 48, 16),
    config: ProstateConfig = ProstateConfig(),
) -> ProstatePhantom:
    """Make one case; `vmap` over keys and grades makes many.

    The same key gives the same anatomy and noise whatever the grade.

    Args:
        key: Consumed.
        grade: 0 for none to 4; contrast of the lesion is a quarter of it.
        shape: Voxels along x (left to right), y (back to front) and z (foot to head); static.
        config: Scanner and anatomy; static.
    """
    size_key, place_key, texture_key, noise_key = jax.random.split(key, 4)
    spacing = [length / size for length, size in zip(config.field_of_view, shape, strict=True)]
    points, width = centered_points(shape, spacing), sum(spacing) / 3
    spread = config.gland_spread
    radius = jnp.array(config.gland_radius) * jax.random.uniform(size_key, (3,), minval=1 - spread, maxval=1 + spread)
    gland = inside(ellipsoid(points, jnp.zeros(3), radius), width)
    # The inner zone lies in front, the body's muscle within a rim of fat.
    inner = inside(ellipsoid(points, radius * jnp.array([0.0, 0.25, 0.1]), 0.62 * radius), width)
    x, y, _ = points
    reach = 0.5 * jnp.array(config.field_of_view[:2])
    body = inside(ellipsoid((x, y), jnp.zeros(2), 0.84 * reach), width)
    skin = inside(ellipsoid((x, y), jnp.zeros(2), 0.97 * reach), width)
    lesion, is_right = _draw_lesion(place_key, points, radius, config, width)
    contrast = jnp.asarray(grade, jnp.float32) / (GRADES - 1)
    images = []
    for number, (texture, noise) in enumerate(
        zip(jax.random.split(texture_key, len(SEQUENCES)), jax.random.split(noise_key, len(SEQUENCES)), strict=True)
    ):
        muscle, fat, outer, central = (level[number] for level in LEVELS)
        level = fat * skin + (muscle - fat) * body
        level = level + gland * (outer + (central - outer) * inner - level)
        level = level + contrast * lesion * (LESION[number] - level)
        coarse = jax.random.normal(texture, tuple(-(-length // 4) + 1 for length in shape))
        level = level * (1 + config.texture * jax.image.resize(coarse, shape, "linear"))
        brightest = max(level[number] for level in LEVELS)
        real, imaginary = config.noise * brightest * jax.random.normal(noise, (2, *shape))
        images.append(jnp.hypot(level + real, imaginary))
    whole = gland > 0.5
    return ProstatePhantom(
        jnp.stack(images, -1), whole, whole & (inner > 0.5), (lesion > 0.5) & (contrast > 0), is_right
    )


def _draw_lesion(
    key: Key[Array, ""],
    points: list[Float[Array, "..."]],
    radius: Float[Array, "3"],
    config: ProstateConfig,
    width: float,
) -> tuple[Float[Array, "x y z"], Bool[Array, ""]]:
    """Return the share of a ball in the outer zone, at the back of either side, and whether it is on the right."""
    side_key, place_key, size_key = jax.random.split(key, 3)
    is_right = jax.random.bernoulli(side_key)
    place = jax.random.uniform(
        place_key, (3,), minval=jnp.array([0.35, -0.6, -0.4]), maxval=jnp.array([0.6, -0.3, 0.4])
    )
    center = radius * place * jnp.where(is_right, 1.0, jnp.array([-1.0, 1.0, 1.0]))
    low, high = config.lesion_radius
    size = jax.random.uniform(size_key, (), minval=low, maxval=high)
    return inside(ellipsoid(points, center, jnp.full(3, size)), width), is_right

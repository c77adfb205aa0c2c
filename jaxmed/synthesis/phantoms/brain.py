"""A brain of ellipsoids with known tissues, in 2D or 3D: a pure function of a key.

Cerebrospinal fluid around a folded cortical ribbon, white matter, lateral ventricles and deep grey matter, all drawn
anew for every subject; a lesion in the white matter, and a bright spot in the cortex beside it (the cue), each there or
not. Shares of voxels are soft at every border, so tissue volumes are known below the size of a voxel. A 2D brain is the
axial plane through the ventricles.

The cue makes a shortcut: it stands where the lesion would be, so a model trained where one always comes with the other
may learn to draw the lesion from the cue, and then draws it where there is none.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.arrays.filters import zoom
from jaxmed.config import Bounds, NonNegative, Positive, PositiveRange, Share, checked
from jaxmed.synthesis.phantoms.shapes import centered_points, ellipsoid, inside

TISSUES = ("background", "csf", "grey", "white", "ventricle", "lesion")
LABELS = {"background": 0, "csf": 24, "grey": 3, "white": 2, "ventricle": 4, "lesion": 77}
"""Value in a label map by tissue, in FreeSurfer's numbering."""


Level = Annotated[float, Bounds(0, 2)]


@dataclasses.dataclass(frozen=True)
@checked
class BrainConfig:
    """Anatomy, contrast and scanner of phantom brains.

    Attributes:
        field_of_view: Length of every axis in mm; the voxel size is this divided by the shape.
        intensity: Intensity of CSF, grey matter, white matter, ventricles and lesion; images lie in [0, 2].
        intensity_spread: Standard deviation of a subject's tissue intensities, relative.
        texture: Standard deviation of slow variation within tissues, relative.
        noise: Standard deviation of the scanner's noise.
        lesion_radius: Range of the lesion's radius in mm.
        lesion_probability: That `draw_brain` makes a lesion.
        cue_intensity: Intensity of the bright spot.
        cue_radius: Radius of the bright spot, in mm.
        cue_probability: That `draw_brain` makes a cue, where cue and lesion are independent.
        lesion_follows_cue: Whether `draw_brain` makes a cue with every lesion and a lesion with every cue.
        anatomy_spread: Largest relative deviation of radii and places between subjects.
    """

    field_of_view: Positive = 192.0
    intensity: tuple[Level, Level, Level, Level, Level] = (0.35, 0.9, 1.3, 0.3, 0.7)
    intensity_spread: NonNegative = 0.03
    texture: NonNegative = 0.03
    noise: NonNegative = 0.01
    lesion_radius: PositiveRange = (7.0, 12.0)
    lesion_probability: Share = 0.2
    cue_intensity: Level = 2.0
    cue_radius: Positive = 5.0
    cue_probability: Share = 0.0
    lesion_follows_cue: bool = False
    anatomy_spread: Annotated[float, Bounds(0, 0.3, below=True)] = 0.08


T2W = BrainConfig(intensity=(1.7, 1.0, 0.7, 1.8, 1.4))
FLAIR = BrainConfig(intensity=(0.25, 1.1, 0.85, 0.2, 1.6))


class BrainPhantom(NamedTuple):
    """A scan and its truth.

    Attributes:
        image: Intensity in [0, 2].
        shares: Shares of each of TISSUES in every voxel; they sum to 1.
        labels: The tissue with the largest share, in the numbering of LABELS.
        lesion: Where the lesion is, or would be were it there: in the white matter, more than half a voxel.
        cue: Where the bright spot is, or would be.
        has_lesion: Whether the lesion is there.
        has_cue: Whether the bright spot is there.
    """

    image: Float[Array, "*space"]
    shares: Float[Array, "*space tissue"]
    labels: Int[Array, "*space"]
    lesion: Bool[Array, "*space"]
    cue: Bool[Array, "*space"]
    has_lesion: Bool[Array, ""]
    has_cue: Bool[Array, ""]


class _Anatomy(NamedTuple):
    """What differs between subjects; lengths in mm, angles in radians."""

    radius: Float[Array, " axis"]
    center: Float[Array, " axis"]
    phases: Float[Array, " 3"]
    ventricle_size: Float[Array, ""]
    lesion_angle: Float[Array, ""]
    lesion_radius: Float[Array, ""]


def draw_brain(key: Key[Array, ""], shape: tuple[int, ...], config: BrainConfig = BrainConfig()) -> BrainPhantom:
    """Make one brain, lesion and cue drawn with the probabilities of the configuration.

    Args:
        key: Consumed.
        shape: Voxels along x (left to right), y (back to front) and, in 3D, z; static.
        config: Static.
    """
    lesion_key, cue_key, brain_key = jax.random.split(key, 3)
    has_lesion = jax.random.bernoulli(lesion_key, config.lesion_probability)
    is_alone = jax.random.bernoulli(cue_key, config.cue_probability)
    has_cue = has_lesion if config.lesion_follows_cue else is_alone
    return make_brain(brain_key, has_lesion, has_cue, shape, config)


def make_brain(
    key: Key[Array, ""],
    has_lesion: Bool[Array, ""] | bool,
    has_cue: Bool[Array, ""] | bool,
    shape: tuple[int, ...],
    config: BrainConfig = BrainConfig(),
) -> BrainPhantom:
    """Make one brain; `vmap` over keys and flags makes many.

    The same key gives the same anatomy, texture and noise whatever the flags, so that two scans of one key differ only
    where lesion or cue are.

    Args:
        key: Consumed; draws anatomy, contrast, texture and noise.
        has_lesion: Whether the lesion is there.
        has_cue: Whether the bright spot is there.
        shape: Voxels along x (left to right), y (back to front) and, in 3D, z (foot to head); static.
        config: Static.
    """
    if len(shape) not in (2, 3):
        raise ValueError(f"shape: expected 2 or 3 axes, found {shape}")
    anatomy_key, contrast_key, texture_key, noise_key = jax.random.split(key, 4)
    spacing = [config.field_of_view / size for size in shape]
    width = sum(spacing) / len(spacing)  # of a soft border: one voxel
    anatomy = _draw_anatomy(anatomy_key, len(shape), config)
    points = [place - anatomy.center[axis] for axis, place in enumerate(centered_points(shape, spacing))]
    healthy = jnp.broadcast_to(_tissues(points, anatomy, width), (*shape, len(TISSUES)))
    spot, cue = _lesion_and_cue(points, anatomy, config, width)
    covered = spot * healthy[..., TISSUES.index("white")]
    lesion = covered * jnp.asarray(has_lesion, jnp.float32)
    shares = healthy.at[..., TISSUES.index("white")].add(-lesion).at[..., TISSUES.index("lesion")].set(lesion)
    spread = 1 + config.intensity_spread * jax.random.normal(contrast_key, (len(TISSUES) - 1,))
    levels = jnp.concatenate([jnp.zeros(1), jnp.array(config.intensity) * spread])
    image = (shares @ levels) * (1 + config.texture * _slow_field(texture_key, shape))
    share = cue * jnp.asarray(has_cue, jnp.float32)
    image = image + share * (config.cue_intensity - image)
    image = jnp.clip(image + config.noise * jax.random.normal(noise_key, shape), 0.0, 2.0)
    labels = jnp.array([LABELS[name] for name in TISSUES])[jnp.argmax(shares, -1)]
    flags = jnp.asarray(has_lesion, bool), jnp.asarray(has_cue, bool)
    return BrainPhantom(image, shares, labels, covered > 0.5, jnp.broadcast_to(cue > 0.5, shape), *flags)


def _draw_anatomy(key, ndim, config):
    radius_key, center_key, phase_key, ventricle_key, angle_key, quadrant_key, lesion_key = jax.random.split(key, 7)
    spread = config.anatomy_spread
    mean = jnp.array([62.0, 76.0, 58.0])[:ndim]
    radius = mean * (1 + spread * jax.random.uniform(radius_key, (ndim,), minval=-1.0))
    center = 50 * spread * jax.random.uniform(center_key, (ndim,), minval=-1.0)
    # Lateral white matter, clear of the ventricles, the deep grey matter and the midline.
    slant = jnp.deg2rad(jax.random.uniform(angle_key, minval=25.0, maxval=60.0))
    quadrant = jax.random.randint(quadrant_key, (), 0, 4)
    angle = jnp.stack([slant, jnp.pi - slant, jnp.pi + slant, -slant])[quadrant]
    low, high = config.lesion_radius
    return _Anatomy(
        radius=radius,
        center=center,
        phases=jax.random.uniform(phase_key, (3,), maxval=2 * jnp.pi),
        ventricle_size=1 + 3 * spread * jax.random.uniform(ventricle_key, minval=-1.0),
        lesion_angle=angle,
        lesion_radius=jax.random.uniform(lesion_key, minval=low, maxval=high),
    )


def _tissues(points, anatomy, width):
    """Return the share of every tissue but the lesion, which is 0."""
    x, y = points[:2]
    z = points[2] if len(points) == 3 else jnp.zeros(())
    origin = jnp.zeros(len(points))
    surface = ellipsoid(points, origin, anatomy.radius)
    angle = jnp.arctan2(y, x)
    first, second, third = anatomy.phases
    folds = jnp.cos(13 * angle + z / 9 + first) + 0.7 * jnp.cos(21 * angle - z / 7 + second)
    folds = folds + 0.4 * jnp.cos(8 * angle + third)
    fissure = 14.0 * jnp.exp(-((x / 3.5) ** 2)) * jnp.clip((jnp.abs(y) - 35) / 8, 0.0, 1.0)
    outer = inside(surface, width)
    cortex = inside(surface + 3.5 + fissure + 0.8 * folds, width)
    white = inside(surface + 13.0 + 1.5 * fissure + 2.6 * folds, width)
    # Both sides in one: the shapes are symmetric about the midline.
    mirrored = [jnp.abs(x), *points[1:]]
    size = anatomy.ventricle_size

    def pair(center, radius):
        return inside(ellipsoid(mirrored, jnp.array(center)[: len(points)], jnp.array(radius)[: len(points)]), width)

    nuclei = pair([25.0, 2.0, 0.0], [8.5, 15.0, 9.0])
    ventricles = inside(
        ellipsoid(
            mirrored, jnp.array([10.0, 3.0, 8.0])[: len(points)], size * jnp.array([6.5, 24.0, 9.0])[: len(points)]
        ),
        width,
    )
    shape = jnp.broadcast_shapes(*(place.shape for place in points))
    shares = {name: jnp.zeros(shape) for name in TISSUES} | {"background": jnp.ones(shape)}
    for name, cover in (
        ("csf", outer),
        ("grey", cortex),
        ("white", white),
        ("grey", nuclei),
        ("ventricle", ventricles),
    ):
        shares = {other: share * (1 - cover) for other, share in shares.items()}
        shares[name] = shares[name] + cover
    return jnp.stack([shares[name] for name in TISSUES], -1)


def _lesion_and_cue(points, anatomy, config, width):
    """Return the shares of two balls in one direction: the lesion in white matter, the cue in the cortex outside it."""
    direction = jnp.stack([jnp.cos(anatomy.lesion_angle), jnp.sin(anatomy.lesion_angle), jnp.zeros(())])
    places = [share * direction[: len(points)] * anatomy.radius for share in (0.58, 0.9)]
    radii = (anatomy.lesion_radius, jnp.float32(config.cue_radius))
    return tuple(
        inside(ellipsoid(points, place, jnp.full(len(points), radius)), width)
        for place, radius in zip(places, radii, strict=True)
    )


def _slow_field(key, shape):
    """Return a random field of unit variance that varies over an eighth of the field of view."""
    coarse = jax.random.normal(key, tuple(max(2, min(8, size // 2)) for size in shape))
    field = zoom(coarse, shape)
    return field / jnp.maximum(jnp.std(field), 1e-6)

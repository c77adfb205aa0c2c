"""A chest CT with known findings: a pure function of a key.

Body, lungs, heart, diaphragm, spine, ribs and branching vessels, drawn anew for every subject, with up to four
findings: a solid nodule, emphysema of the upper lungs, a reticular pattern at the bases, and fluid behind one lung.
Shares of voxels are soft at every border (partial volume), so the shape may be small. Lung size and density vary
between subjects by more than a finding changes the mean, so that a model has to see the finding.

Source: stand-in for low-dose chest CT, jaxmed; mean attenuations of air, lung, soft tissue and bone are textbook
values, and -970 HU lies below the -950 HU that counts as emphysema on inspiratory CT.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Key

from jaxmed.config import Length, NonNegative, Positive, Probability, ShareRange, checked
from jaxmed.errors import InputError

FINDINGS = ("nodule", "emphysema", "reticular", "effusion")
AIR, LUNG, SOFT, BONE = -1000.0, -850.0, 40.0, 350.0  # HU
NODULE, EMPHYSEMA, RETICULUM, FLUID = 30.0, -970.0, -350.0, 10.0  # HU of a voxel that is wholly one of them


@dataclasses.dataclass(frozen=True)
@checked
class ChestConfig:
    """Scanner and anatomy of phantom chests.

    Attributes:
        field_of_view: Length along x, y and z in mm; the voxel size is this divided by the shape.
        noise: Standard deviation of the scanner's noise, in HU.
        num_vessels: Branching vessels per lung.
        lung_density_range: Largest deviation of a subject's lungs from -850 HU, to either side.
        severity: Range of a finding's severity, in [0, 1], drawn evenly.
        nodule_radius: Radius in mm of nodules of severity 0 and 1.
        emphysema_share: Share of the upper lungs that is emphysema at severity 0 and 1.
        reticular_share: Weight of the network at severity 0 and 1.
        effusion_depth: Largest depth of the fluid in mm, at the base, at severity 0 and 1; subjects lie on their backs.
    """

    field_of_view: tuple[Positive, Positive, Positive] = (320.0, 320.0, 320.0)
    noise: NonNegative = 25.0
    num_vessels: Length = 8
    lung_density_range: NonNegative = 25.0
    severity: ShareRange = (0.0, 1.0)
    nodule_radius: tuple[Positive, Positive] = (8.0, 15.0)
    emphysema_share: tuple[Probability, Probability] = (0.15, 0.4)
    reticular_share: tuple[Probability, Probability] = (0.35, 0.8)
    effusion_depth: tuple[Positive, Positive] = (30.0, 70.0)


class ChestPhantom(NamedTuple):
    """A scan and its truth; the axes point to the right, the front and the head (RAS+).

    Attributes:
        array: Attenuation in HU.
        lung: Inside the lungs, vessels and findings included.
        masks: Where each of FINDINGS changes the scan; empty where it is absent.
        flags: Which of FINDINGS are present.
        severity: Severity of each of FINDINGS, in [0, 1]; drawn for absent ones too.
    """

    array: Float[Array, "x y z"]
    lung: Bool[Array, "x y z"]
    masks: Bool[Array, "finding x y z"]
    flags: Bool[Array, " finding"]
    severity: Float[Array, " finding"]


class _Lungs(NamedTuple):
    """Two ellipsoids; index 0 is the patient's left (x below 0 is left in RAS+)."""

    center: Float[Array, "2 3"]  # mm
    radius: Float[Array, "2 3"]  # mm
    rotation: Float[Array, "2 3 3"]  # columns are the ellipsoid's axes


def finding_flags(*names: str) -> Bool[Array, " finding"]:
    """Return the flags of the findings that are named; none for a healthy chest.

    Raises:
        InputError: A name is not one of FINDINGS.
    """
    for name in names:
        if name not in FINDINGS:
            raise InputError("finding", f"one of {', '.join(FINDINGS)}", f"'{name}'")
    return jnp.array([name in names for name in FINDINGS])


def make_chest(
    key: Key[Array, ""],
    flags: Bool[Array, " finding"],
    shape: tuple[int, int, int] = (64, 64, 64),
    config: ChestConfig = ChestConfig(),
) -> ChestPhantom:
    """Make one chest; `vmap` over keys and flags makes many.

    The same key gives the same anatomy and noise whatever the flags, so that two scans of one key differ only where a
    finding is.

    Args:
        key: Consumed; draws anatomy, findings and noise.
        flags: Which of FINDINGS are present, see `finding_flags`.
        shape: Voxels along x (left to right), y (back to front) and z (foot to head); static.
        config: Field of view in mm, noise in HU, ranges; static.

    Returns:
        The scan in HU, and its truth.
    """
    body_key, lung_key, vessel_key, finding_key, noise_key = jax.random.split(key, 5)
    spacing = [length / size for length, size in zip(config.field_of_view, shape, strict=True)]
    places = [(jnp.arange(size) - (size - 1) / 2) * step for size, step in zip(shape, spacing, strict=True)]
    points = jnp.meshgrid(*places, indexing="ij", sparse=True)
    width = sum(spacing) / 3  # of a soft border: one voxel
    lungs, density = _draw_lungs(lung_key, config)
    body, bone, cage, solid, dome = _draw_body(body_key, points, lungs, width)
    lung = jnp.maximum(*cage) * (1 - solid) * (1 - dome)
    vessels = _draw_vessels(vessel_key, points, lungs, config.num_vessels, width)
    array = _blend(AIR, SOFT, body)
    array = _blend(array, BONE, bone * body)
    array = _blend(array, density, lung)
    array = _blend(array, SOFT, vessels * lung)
    shares, severity = _draw_findings(finding_key, points, lungs, lung, shape, config, width)
    shares = shares * flags[:, None, None, None]
    nodule, emphysema, reticular, effusion = shares
    for level, share in (
        (EMPHYSEMA, emphysema), (RETICULUM, reticular), (NODULE, nodule), (FLUID, effusion)
    ):  # fmt: skip
        array = _blend(array, level, share)
    noise = config.noise * _scanner_noise(noise_key, shape)
    return ChestPhantom(array + noise, lung > 0.5, shares > 0, flags, severity)


def _blend(below, above, share):
    return below + share * (above - below)


def _inside(distance, width):
    """Return the share of a voxel on the negative side of a border: a ramp of `width` mm, exactly 0 and 1 beyond."""
    return jnp.clip(0.5 - distance / width, 0.0, 1.0)


def _ellipsoid(points, center, radius):
    """Return the distance in mm to an ellipsoid along the axes; close to its surface, by first-order expansion."""
    scaled = [(p - c) / r for p, c, r in zip(points, center, radius, strict=True)]
    length = jnp.sqrt(sum(s**2 for s in scaled) + 1e-6)
    slope = jnp.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radius, strict=True)) + 1e-9)
    return (length - 1) * length / slope


def _draw_lungs(key, config):
    center_key, radius_key, tilt_key, size_key, density_key = jax.random.split(key, 5)
    scale = jax.random.uniform(size_key, (), minval=0.85, maxval=1.1)
    middle = jnp.array([[-66.0, 5.0, 5.0], [66.0, 5.0, 5.0]])
    center = scale * middle + jax.random.uniform(center_key, (2, 3), minval=-5.0, maxval=5.0)
    radius = scale * jnp.array([50.0, 74.0, 118.0]) * jax.random.uniform(radius_key, (2, 3), minval=0.92, maxval=1.08)
    # The apices lean towards each other.
    lean = jnp.array([0.10, -0.10]) + jax.random.uniform(tilt_key, (2,), minval=-0.06, maxval=0.06)
    cos, sin, zero, one = jnp.cos(lean), jnp.sin(lean), jnp.zeros(2), jnp.ones(2)
    rotation = jnp.stack(
        [jnp.stack([cos, zero, sin], -1), jnp.stack([zero, one, zero], -1), jnp.stack([-sin, zero, cos], -1)], 1
    )
    spread = config.lung_density_range
    density = LUNG + jax.random.uniform(density_key, (), minval=-spread, maxval=spread)
    return _Lungs(center, radius, rotation), density


def _turned(points, lungs, side):
    """Return the points in the frame of one lung, whose centre is the origin."""
    shifted = [p - c for p, c in zip(points, lungs.center[side], strict=True)]
    return [sum(lungs.rotation[side, world, axis] * shifted[world] for world in range(3)) for axis in range(3)]


def _draw_body(key, points, lungs, width):
    """Return shares of body, bone, the two lung ellipsoids, heart or chest wall, and what lies below the diaphragm."""
    shape_key, heart_key, rib_key, dome_key = jax.random.split(key, 4)
    x, y, z = points
    half = jnp.array([148.0, 102.0]) * jax.random.uniform(shape_key, (2,), minval=0.97, maxval=1.05)
    skin = _ellipsoid((x, y), (0.0, 0.0), half)
    body = _inside(skin, width)
    distances = [_ellipsoid(_turned(points, lungs, side), jnp.zeros(3), lungs.radius[side]) for side in (0, 1)]
    cage = [_inside(distance, width) for distance in distances]
    # Ribs: bands of a shell around the lungs, lower at the front.
    nearest = jnp.minimum(*distances)
    phase = jax.random.uniform(rib_key, (), maxval=2 * jnp.pi)
    band = jnp.sin((z + 0.25 * y) * (2 * jnp.pi / 26.0) + phase)
    ribs = _inside(jnp.abs(nearest - 9.0) - 4.0, width) * jnp.clip(2 * band - 0.4, 0.0, 1.0) * (jnp.abs(x) > 45)
    back = -0.74 * half[1]
    spine = _inside(jnp.sqrt(x**2 + (y - back) ** 2) - 16.0, width) * (0.75 + 0.25 * jnp.cos(z * (2 * jnp.pi / 24.0)))
    sternum = _inside(jnp.sqrt((x / 2) ** 2 + (y - 0.82 * half[1]) ** 2) - 7.0, width) * (z > -50)
    bone = jnp.maximum(jnp.maximum(ribs * (1 - jnp.maximum(*cage)), spine), sternum)
    shift = jax.random.uniform(heart_key, (3,), minval=-8.0, maxval=8.0)
    heart = _inside(_ellipsoid(points, shift + jnp.array([-22.0, 22.0, -35.0]), jnp.array([48.0, 42.0, 48.0])), width)
    wall = _inside(-14.0 - skin, width)  # lungs end 14 mm below the skin
    top = jax.random.uniform(dome_key, (2,), minval=-62.0, maxval=-45.0)
    reach = jnp.minimum(*(((x - c[0]) / 60) ** 2 + ((y - c[1] - 10) / 85) ** 2 for c in lungs.center))
    height = jnp.where(x < 0, top[0], top[1]) - 45.0 * reach
    dome = _inside((z - height) * 0.8, width)
    return body, bone, cage, jnp.maximum(heart, wall), dome


def _draw_vessels(key, points, lungs, num_vessels, width):
    """Return the share of vessels: from each hilum to a fork, and from there to two tips."""
    if num_vessels == 0:
        return jnp.zeros(())
    fork_key, tip_key, size_key = jax.random.split(key, 3)
    fork = _random_in_ball(fork_key, (2, num_vessels)) * 0.55
    spread = 0.45 * jax.random.normal(tip_key, (2, num_vessels, 2, 3))
    tip = 1.7 * fork[:, :, None] + spread
    tip = 0.95 * tip / jnp.maximum(1.0, jnp.linalg.norm(tip, axis=-1, keepdims=True))

    def place(unit):
        scaled = (unit * lungs.radius[:, None]).reshape(2, -1, 3)
        return jnp.einsum("swa,sna->snw", lungs.rotation, scaled) + lungs.center[:, None]

    inner = jnp.array([[0.75, -0.1, -0.05], [-0.75, -0.1, -0.05]])
    hilum = jnp.broadcast_to(place(inner[:, None]), (2, num_vessels, 3))
    fork = place(fork)
    tips = place(tip.reshape(2, -1, 3)).reshape(2, num_vessels, 2, 3)
    start = jnp.concatenate([hilum, fork, fork], 1).reshape(-1, 3)
    end = jnp.concatenate([fork, tips[:, :, 0], tips[:, :, 1]], 1).reshape(-1, 3)
    size = jax.random.uniform(size_key, (2, num_vessels), minval=0.7, maxval=1.2)
    first = jnp.concatenate([5.5 * size, 3.2 * size, 3.0 * size], 1).ravel()  # mm
    last = jnp.concatenate([3.2 * size, 1.0 * size, 1.0 * size], 1).ravel()

    def add(share, tube):
        start, end, first, last = tube
        along = end - start
        position = sum((p - s) * a for p, s, a in zip(points, start, along, strict=True)) / jnp.sum(along**2)
        position = jnp.clip(position, 0.0, 1.0)
        gap = sum((p - s - position * a) ** 2 for p, s, a in zip(points, start, along, strict=True))
        radius = first + position * (last - first)
        # A tube thinner than a voxel fills only its cross-section's share of it.
        filling = jnp.minimum(1.0, (2 * radius / width) ** 2)
        return jnp.maximum(share, filling * _inside(jnp.sqrt(gap) - radius, width)), None

    shape = tuple(max(sizes) for sizes in zip(*(p.shape for p in points), strict=True))
    return jax.lax.scan(add, jnp.zeros(shape), (start, end, first, last))[0]


def _draw_findings(key, points, lungs, lung, shape, config, width):
    """Return the share of each of FINDINGS in every voxel, and their severities."""
    severity_key, nodule_key, emphysema_key, reticular_key, effusion_key = jax.random.split(key, 5)
    low, high = config.severity
    severity = jax.random.uniform(severity_key, (len(FINDINGS),), minval=low, maxval=high)
    ranges = (config.nodule_radius, config.emphysema_share, config.reticular_share, config.effusion_depth)
    radius, amount, weight, depth = (
        _blend(mild, severe, level) for (mild, severe), level in zip(ranges, severity, strict=True)
    )
    # The solid lung (no border) is what the textures may fill: they never reach the wall.
    solid = jnp.clip(2 * lung - 1, 0.0, 1.0)
    nodule = _nodule(nodule_key, points, lungs, radius, width) * solid
    field = _smooth_field(emphysema_key, shape, config.field_of_view, 24.0)
    upper = jnp.clip((points[2] + 5) / 30, 0.0, 1.0)
    emphysema = jnp.clip(2 * (field - ndtri(1 - amount)) + 0.5, 0.0, 1.0) * upper * solid
    first, second = jax.random.split(reticular_key)
    # Walls of a network: where either of two fields changes sign.
    nets = [jnp.abs(_smooth_field(k, shape, config.field_of_view, 11.0)) for k in (first, second)]
    walls = jnp.clip(1.3 - 3.0 * jnp.minimum(*nets), 0.0, 1.0)
    lower = jnp.clip((-5 - points[2]) / 25, 0.0, 1.0)
    fluid = _fluid(effusion_key, points, lungs, depth, width) * solid
    return jnp.stack([nodule, emphysema, weight * walls * lower * solid, fluid]), severity


def _nodule(key, points, lungs, radius, width):
    side_key, place_key = jax.random.split(key)
    side = jax.random.bernoulli(side_key).astype(int)
    # Away from heart and diaphragm: the middle and upper thirds, less than 0.65 of the way out.
    unit = _random_in_ball(place_key, ()) * jnp.array([0.6, 0.6, 0.5]) + jnp.array([0.0, -0.1, 0.2])
    center = lungs.rotation[side] @ (unit * lungs.radius[side]) + lungs.center[side]
    gap = sum((p - c) ** 2 for p, c in zip(points, center, strict=True))
    return _inside(jnp.sqrt(gap) - radius, width)


def _fluid(key, points, lungs, depth, width):
    """Return the share of a crescent along the back of one lung, deepest at its base and nothing near its apex."""
    side = jax.random.bernoulli(key).astype(int)
    x, y, z = points
    back = lungs.center[side, 1] - lungs.radius[side, 1]
    top = lungs.center[side, 2] + 0.5 * lungs.radius[side, 2]
    level = depth * jnp.clip((top - z) / (1.2 * lungs.radius[side, 2]), 0.0, 1.0)
    return _inside(y - back - level, width) * jnp.where((x > 0) == (side == 1), 1.0, 0.0)


def _random_in_ball(key, shape):
    direction_key, length_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, (*shape, 3))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    return direction * jax.random.uniform(length_key, (*shape, 1)) ** (1 / 3)


def _smooth_field(key, shape, field_of_view, scale):
    """Return a random field of mean 0 and variance about 1 that varies over `scale` mm, or over 2 voxels."""
    coarse = tuple(
        max(2, min(round(length / scale), size // 2)) for length, size in zip(field_of_view, shape, strict=True)
    )
    field = jax.image.resize(jax.random.normal(key, coarse), shape, "cubic")
    return field / jnp.std(field)


def _scanner_noise(key, shape):
    """Return Gaussian noise of unit variance whose neighbours are correlated, as a reconstruction kernel leaves it."""
    noise = jax.random.normal(key, shape)
    for axis in range(3):
        padded = jnp.pad(noise, [(1, 1) if other == axis else (0, 0) for other in range(3)], mode="wrap")
        size = shape[axis]
        before, middle, after = (jax.lax.slice_in_dim(padded, s, s + size, axis=axis) for s in range(3))
        noise = (before + 2 * middle + after) / 6**0.5  # 1 + 4 + 1 = 6
    return noise

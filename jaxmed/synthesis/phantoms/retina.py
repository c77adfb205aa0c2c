"""A fundus-like photograph with a known grade and a known systemic label: a pure function of a key.

A bright disc in a dark picture, with optic disc, fovea, four arcades of arteries and veins with their branches, and
mottled background. Two labels are drawn into it: the grade, 0 to 4, by the number of dark dots (haemorrhages) and
bright dots (exudates), and hypertension by how much the vessels wind. Pigment and the loss of light towards the rim
differ between subjects by more than a label changes the mean. The two eyes of a subject share pigment, winding and
the load of dots, and are mirrored: the optic disc lies on the nasal side, to the right in a right eye.

Lengths are in radii of the disc. Lines and dots are sums of Gaussians, whose two axes part, so that a picture is a
product of two matrices; what is thinner than a pixel is drawn a pixel wide, and as much fainter.

Source: stand-in for colour fundus photographs, jaxmed; the test of RETFound's claims (specialist above generalist above
random pre-training) needs a generator whose classes are winding and density of dots.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.config import NonNegative, Positive, Share, checked

GRADES = 5
OPTIC_DISC, FOVEA = (0.45, 0.0), (-0.1, -0.03)  # of a right eye, x to the right and y up
RIM = 0.02  # intensity around the disc
ABSORBED = (0.35, 0.9, 0.7)  # of red, green and blue by blood
EXUDATE, NERVE = (1.0, 0.92, 0.6), (0.98, 0.84, 0.58)  # colours
# Control point and end of the four arcades, each an artery and a vein: towards the temple (around the fovea) and the
# nose, upwards; mirrored for those downwards.
ARCADES = (((0.25, 0.8), (-0.8, 0.45)), ((0.55, 0.35), (0.8, 0.6)))
BRANCHES = 3  # of each vessel
LEAST_WIDTH = 0.6  # pixels, as a standard deviation


@dataclasses.dataclass(frozen=True)
@checked
class RetinaConfig:
    """Camera and findings of phantom retinas.

    Attributes:
        field: Radius of the disc as a share of half the picture's edge; above 1 the picture cuts it off.
        tint: Factors on red, green and blue.
        vignette: Loss of light at the rim, of which subjects have half to all.
        blur: Standard deviation of the camera's blur, in radii.
        noise: Standard deviation of the noise, of a range of 0 to 1.
        winding: How far vessels swing to either side, in radii, without and with hypertension.
        dark_dots: Haemorrhages per grade.
        bright_dots: Exudates per grade.
        dot_radius: Smallest and largest radius of dots.
    """

    field: Positive = 0.92
    tint: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)
    vignette: Share = 0.4
    blur: NonNegative = 0.0
    noise: NonNegative = 0.015
    winding: tuple[NonNegative, NonNegative] = (0.015, 0.06)
    dark_dots: NonNegative = 7.0
    bright_dots: NonNegative = 4.0
    dot_radius: tuple[Positive, Positive] = (0.02, 0.04)


OTHER_CAMERA = RetinaConfig(field=0.8, tint=(0.8, 1.05, 1.3), vignette=0.6, blur=0.02, noise=0.03)
"""A second scanner, for external sets: another colour, a smaller disc, more blur and noise."""


class RetinaPhantom(NamedTuple):
    """A photograph and its truth; rows run down, columns to the right.

    Attributes:
        array: Red, green and blue, in [0, 1].
        vessels: How dense the vessels are in each pixel, 0 outside of them.
        dark: The same of haemorrhages.
        bright: Of exudates.
    """

    array: Float[Array, "edge edge 3"]
    vessels: Float[Array, "edge edge"]
    dark: Float[Array, "edge edge"]
    bright: Float[Array, "edge edge"]


def make_retina(
    key: Key[Array, ""],
    grade: Int[Array, ""],
    is_hypertensive: Bool[Array, ""],
    is_right: Bool[Array, ""],
    edge: int = 64,
    config: RetinaConfig = RetinaConfig(),
) -> RetinaPhantom:
    """Make one photograph; `vmap` over keys and labels makes many.

    The same key gives the same subject: its eyes differ by `is_right` alone, and a higher grade adds dots to those of a
    lower one.

    Args:
        key: Consumed; draws subject, eye and noise.
        grade: 0 to 4.
        is_hypertensive: Whether the vessels wind.
        is_right: Which eye.
        edge: Pixels of the picture's edge; static.
        config: Camera and findings; static.
    """
    subject_key, eyes_key = jax.random.split(key)
    eye_key = jax.random.fold_in(eyes_key, is_right.astype(jnp.int32))
    field_key, vessel_key, dark_key, bright_key, noise_key = jax.random.split(eye_key, 5)
    # Numbers are drawn together, in [0, 1): each draw takes the compiler longer than all that is made of it.
    drawn = jax.random.uniform(subject_key, (7,))
    pixel = 2 / (edge * config.field)
    places = (jnp.arange(edge) - (edge - 1) / 2) * pixel
    x, y = places[None, :], -places[:, None]
    axes = (places, -places)

    calm, wound = config.winding
    swing = jnp.where(is_hypertensive, wound, calm) * _within(drawn[0], 0.7, 1.3)
    load = _within(drawn[1], 0.75, 1.25) * grade
    vessels = _draw_vessels(vessel_key, axes, swing, edge, pixel)
    dark = _draw_dots(dark_key, axes, load, config.dark_dots, config.dot_radius, pixel)
    bright = _draw_dots(bright_key, axes, load, config.bright_dots, config.dot_radius, pixel)

    picture = _background(field_key, drawn[2:], x, y, edge, config.vignette)
    blood = vessels + dark
    picture = picture * jnp.exp(-blood[..., None] * jnp.array(ABSORBED))
    picture = _blend(picture, jnp.array(EXUDATE), (1 - jnp.exp(-bright))[..., None])
    inside = jnp.clip((1 - jnp.sqrt(x**2 + y**2)) / pixel + 0.5, 0.0, 1.0)[..., None]
    picture = _blend(RIM, picture * jnp.array(config.tint), inside)
    if config.blur:
        kernel = jnp.exp(-jnp.square((places[:, None] - places[None, :]) / config.blur) / 2)
        kernel = kernel / kernel.sum(axis=1, keepdims=True)
        picture = jnp.einsum("ri,ijc,kj->rkc", kernel, picture, kernel)
    # A left eye is a right one in the mirror.
    picture, vessels, dark, bright = (
        jnp.where(is_right, one, one[:, ::-1]) for one in (picture, vessels, dark, bright)
    )
    noise = config.noise * jax.random.normal(noise_key, picture.shape)
    return RetinaPhantom(jnp.clip(picture + noise, 0.0, 1.0), vessels, dark, bright)


def _blend(below, above, share):
    return below + share * (above - below)


def _within(share, low, high):
    return low + share * (high - low)


def _background(key, drawn, x, y, edge, vignette):
    """Return retina, optic disc and fovea, without vessels; five numbers in [0, 1) make the subject's."""
    light, loss = _within(drawn[0], 0.7, 1.1), _within(drawn[1], 0.5, 1.0)
    hue = jnp.array([0.75, 0.37, 0.18]) + _within(drawn[2:], -0.08, 0.08)
    mottled = jax.image.resize(jax.random.normal(key, (8, 8)), (edge, edge), "cubic")
    fovea = jnp.exp(-((x - FOVEA[0]) ** 2 + (y - FOVEA[1]) ** 2) / (2 * 0.12**2))
    level = light * (1 - vignette * loss * (x**2 + y**2)) * (1 + 0.06 * mottled) * (1 - 0.4 * fovea)
    distance = jnp.sqrt((x - OPTIC_DISC[0]) ** 2 + ((y - OPTIC_DISC[1]) / 1.1) ** 2)
    nerve = 0.55 * jax.nn.sigmoid((0.15 - distance) / 0.015) + 0.35 * jax.nn.sigmoid((0.07 - distance) / 0.015)
    return _blend(level[..., None] * hue, jnp.array(NERVE) * jnp.minimum(light, 1.0), nerve[..., None])


def _splat(axes, points, width, amount):
    """Return the sum of Gaussians at points (x, y), each of its own width and height."""
    across, up = axes
    columns = jnp.exp(-jnp.square((across[:, None] - points[:, 0]) / width) / 2)
    rows = jnp.exp(-jnp.square((up[:, None] - points[:, 1]) / width) / 2) * amount
    return rows @ columns.T


def _draw_vessels(key, axes, swing, edge, pixel):
    """Return how dense vessels are: from the optic disc along the arcades, and from those outwards."""
    # About a point per pixel: Gaussians of LEAST_WIDTH pixels then make an even line.
    number, few = max(8, 4 * edge // 5), max(4, edge // 4)
    shift_key, key = jax.random.split(key)
    twigs, waves = 8 * BRANCHES, 2 * (8 + 8 * BRANCHES)
    sizes, leave, length, phases = jnp.split(
        jax.random.uniform(key, (8 + 2 * twigs + waves,)), (8, 8 + twigs, 8 + 2 * twigs)
    )
    controls, ends = (jnp.array([arcade[part] for arcade in ARCADES]) for part in (0, 1))
    # Up and down, artery and vein: eight vessels.
    mirror = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    controls, ends = (jnp.tile((one[:, None] * mirror).reshape(4, 2), (2, 1)) for one in (controls, ends))
    shift = 0.07 * jax.random.normal(shift_key, (2, 8, 2))
    start = jnp.tile(jnp.array(OPTIC_DISC), (8, 1))
    size = _within(sizes, 0.8, 1.2) * jnp.repeat(jnp.array([0.9, 1.2]), 4)
    main = _curves(start, controls + shift[0], ends + shift[1], number)
    # A branch leaves its vessel at a third to two thirds of the way, to one side and then to the other.
    leave = jnp.array([0.3, 0.5, 0.7]) + _within(leave.reshape(8, BRANCHES), -0.07, 0.07)
    index = jnp.round(leave * (number - 2)).astype(int)
    origin = jnp.take_along_axis(main, index[..., None], 1)
    along = jnp.take_along_axis(main, index[..., None] + 1, 1) - origin
    along = along / (jnp.linalg.norm(along, axis=-1, keepdims=True) + 1e-6)
    aside = jnp.stack([-along[..., 1], along[..., 0]], -1) * jnp.array([1.0, -1.0, 1.0])[:, None]
    length = _within(length.reshape(8, BRANCHES, 1), 0.3, 0.5)
    bend, tip = origin + length * (0.6 * along + 0.1 * aside), origin + length * (0.8 * along + 0.6 * aside)
    origin, bend, tip = (part.reshape(-1, 2) for part in (origin, bend, tip))
    twigs = _curves(origin, bend, tip, few)
    phases = 2 * jnp.pi * phases.reshape(-1, 2)
    main = _wind(main, swing, 4.0, phases[:8])
    twigs = _wind(twigs, 0.6 * swing, 2.0, phases[8:])
    main_width = _taper(0.022 * size, 0.009 * size, number)
    first, last = (jnp.repeat(width * size, BRANCHES) for width in (0.010, 0.005))
    twig_width = _taper(first, last, few)
    return _splat(axes, *_line(main, main_width, pixel)) + _splat(axes, *_line(twigs, twig_width, pixel))


def _curves(start, control, end, number):
    """Return the points of quadratic Bezier curves, [curve, point, 2]."""
    t = jnp.linspace(0.0, 1.0, number)[:, None]
    return (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * control[:, None] + t**2 * end[:, None]


def _wind(curves, swing, waves, phases):
    """Let curves swing to either side, and not at their ends."""
    t = jnp.linspace(0.0, 1.0, curves.shape[1])
    along = jnp.gradient(curves, axis=1)
    along = along / (jnp.linalg.norm(along, axis=-1, keepdims=True) + 1e-6)
    aside = jnp.stack([-along[..., 1], along[..., 0]], -1)
    swings = jnp.sin(2 * jnp.pi * waves * t + phases[:, :1]) + 0.5 * jnp.sin(3.3 * jnp.pi * waves * t + phases[:, 1:])
    return curves + (swing * swings * jnp.sqrt(jnp.sin(jnp.pi * t) + 1e-6))[..., None] * aside


def _taper(first, last, number):
    """Return widths that go evenly from the first to the last along each curve."""
    return _blend(first[:, None], last[:, None], jnp.linspace(0.0, 1.0, number))


def _line(curves, width, pixel):
    """Return points, widths and heights of the Gaussians whose sum along a curve is 1.1 in its middle."""
    step = jnp.linalg.norm(jnp.diff(curves, axis=1), axis=-1)
    step = jnp.concatenate([step, step[:, -1:]], 1)
    drawn = jnp.maximum(width, LEAST_WIDTH * pixel)
    amount = 1.1 * step / (drawn * math.sqrt(2 * math.pi)) * width / drawn
    return curves.reshape(-1, 2), drawn.reshape(-1), amount.reshape(-1)


def _draw_dots(key, axes, load, per_grade, radii, pixel):
    """Return how dense dots are; the first `load * per_grade` of a fixed row of dots are there, the last in part."""
    count = math.ceil(1.25 * (GRADES - 1) * per_grade)
    if count == 0:
        return jnp.zeros((len(axes[1]), len(axes[0])))
    turn, place, size = jax.random.uniform(key, (3, count))
    angle, away = 2 * jnp.pi * turn, 0.85 * jnp.sqrt(place)
    width = _within(size, *radii)
    drawn = jnp.maximum(width, LEAST_WIDTH * pixel)
    present = jnp.clip(load * per_grade - jnp.arange(count), 0.0, 1.0)
    points = jnp.stack([away * jnp.cos(angle), away * jnp.sin(angle)], -1)
    return _splat(axes, points, drawn, 2.0 * present * (width / drawn) ** 2)

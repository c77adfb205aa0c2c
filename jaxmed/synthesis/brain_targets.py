"""Where an image of a subject is sampled, and the targets that are sampled there with it.

A subject is a dictionary of arrays on one grid of 1 mm voxels in RAS+ order, padded at the end of each axis to the size
of the largest subject (`data.subject_store` makes them):

- `labels` uint8 (x, y, z): what images are drawn from, as in `contrast`;
- `segmentation` uint8 (x, y, z): class index, 0 the background;
- `distances` uint8 (x, y, z, surface): signed distance to left pial, left white, right pial and right white surface,
  20 mm + 128;
- `coordinates` int16 (x, y, z, 3): place in MNI space, 100 mm;
- `images` (x, y, z, modality), at most T1, T2, FLAIR and CT (HU), with `present` bool (modality,) and `image_scale`
  float32 (modality,), by which stored values are multiplied;
- `defaced` uint8 (x, y, z): 1 where a face was removed from an image;
- `lesion` uint8 (x, y, z): share of lesion, 255 times;
- `size` int32 (3,): voxels without the padding; `mirror` uint8 (class,): the class that each becomes when left and
  right are exchanged (the paper's 56 without it); `read` float32 (4,): how often its images are taken as they are,
  negative for the configuration's.

Only `labels` and `segmentation` are needed: what a subject lacks is no target either.

Source: BrainFM (arXiv:2509.00549), steps 6 and 7 of its generator, in its authors' public code.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxmed.arrays.warping import sample, sample_stacks
from jaxmed.synthesis.brain_draws import CT, MODALITIES, GeneratorConfig, SubjectDraw
from jaxmed.synthesis.deformation import draw_displacement, native_coordinates

NEUTRAL, SIDED = 20, 18
"""Classes of the paper's table: those of the midline first, then the left ones, then the right ones."""
ZERO, PER_MM = 128, 20.0  # of a stored distance
COORDINATE_UNIT = 10_000.0
"""Stored coordinates hold 100 mm; targets are mm / 100."""
SIDES = (2, 3, 0, 1)
"""Which distance each becomes when left and right are exchanged."""
HU_UNIT = 1000.0


class Places(NamedTuple):
    """Where a subject is sampled.

    Attributes:
        coordinates: In native voxels, within the volume.
        is_outside: Where that is not the place itself, but the nearest voxel of the volume.
    """

    coordinates: Float[Array, "x y z 3"]
    is_outside: Bool[Array, "x y z"]


def find_places(key: Key[Array, ""], size: Integer[Array, "3"], drawn: SubjectDraw, config: GeneratorConfig) -> Places:
    """Draw the nonlinear deformation and return where each output voxel is sampled.

    Left and right are exchanged here: what is sampled along the reversed first axis is reversed.

    Args:
        key: Consumed.
        size: Voxels of the subject's volumes.
        drawn: From `draw_shared`.
        config: Ranges.

    Deviation: outside of the volume on any side there is background; the release repeats the last plane of each axis
    and loses the first.
    """
    displacement = draw_displacement(key, config.shape, config.deformation, drawn.photo)
    wanted = native_coordinates(size, drawn.affine, displacement)
    wanted = jnp.where(drawn.is_flipped, jnp.flip(wanted, 0), wanted)
    found = jnp.clip(wanted, 0.0, size - 1.0)
    is_outside = (found <= 0) if config.match_release else (found != wanted)
    return Places(found, is_outside.any(-1))


def present_of(subject: Mapping[str, Array]) -> Bool[Array, "4"]:
    """Tell which of `MODALITIES` a subject has."""
    if "images" not in subject:
        return jnp.zeros(len(MODALITIES), bool)
    return jnp.pad(subject["present"], (0, len(MODALITIES) - subject["images"].shape[-1]))


def make_targets(
    subject: Mapping[str, Array], places: Places, drawn: SubjectDraw, config: GeneratorConfig
) -> tuple[dict[str, Array], Float[Array, "x y z modality"]]:
    """Sample every target of a subject.

    Args:
        subject: Its arrays.
        places: Where.
        drawn: What was drawn for it.
        config: Of the generator.

    Returns:
        The targets that depend on no image (see `synthesis.brain.generate`), and T1, T2, FLAIR as they are mixed into
        synthetic images, in [0, 1].
    """
    names = [name for name in ("distances", "coordinates", "images") if name in subject]
    found: dict[str, Array] = {}
    if names:
        stacks = written(lambda: sample_stacks([subject[name] for name in names], places.coordinates), drawn)
        found = dict(zip(names, stacks, strict=True))
    outside = places.is_outside[..., None]
    targets = _labels(subject, places, drawn, config)
    if "distances" in found:
        mm = (jnp.where(outside, subject["distances"].max((0, 1, 2)), found["distances"]) - ZERO) / PER_MM
        mm = jnp.where(drawn.is_flipped, mm[..., jnp.array(SIDES)], mm) / drawn.affine.distance_scale
        mm = jnp.clip(mm, -config.max_distance, config.max_distance)
        targets["distance"] = mm[..., :2] if config.hemisphere else mm
    if "coordinates" in found:
        place = found["coordinates"] / COORDINATE_UNIT
        place = jnp.where(outside, 0.0, place) if config.match_release else place
        sign = jnp.where(drawn.is_flipped, -1.0, 1.0)
        targets["registration"] = place * jnp.stack([sign, jnp.ones(()), jnp.ones(())])
    images, present = jnp.zeros((*config.shape, len(MODALITIES))), present_of(subject)
    if "images" in found:
        stored = jnp.where(outside, 0.0, found["images"]) * _scale(subject)
        images = jnp.pad(_unit_range(stored), [(0, 0)] * 3 + [(0, len(MODALITIES) - stored.shape[-1])])
        images = jnp.where(present, images, 0.0)
        if stored.shape[-1] > CT:
            images = images.at[..., CT].set(jnp.where(present[CT], stored[..., CT] / HU_UNIT, 0.0))
    for index, name in enumerate(MODALITIES):
        targets[name] = images[..., index : index + 1]
    targets["present"] = present & jnp.array([True, True, True, not config.hemisphere])
    return targets, images[..., :CT]


def written(make: Callable[[], Any], drawn: SubjectDraw) -> Any:
    """Return what a function makes, written to memory once.

    Left to itself XLA computes it anew for every place that reads it: a third of the generator's time on a CPU. What
    comes out of a condition is written; this one always holds, which the compiler cannot know.
    """
    shapes = jax.eval_shape(make)
    always = drawn.affine.distance_scale > 0
    return jax.lax.cond(always, make, lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes))


def native_image(subject: Mapping[str, Array], source: Int[Array, ""], match_release: bool) -> Float[Array, "x y z"]:
    """Return one of a subject's images before it is warped, CT cut to 0 to 80 HU, on the scale of synthetic ones.

    Args:
        subject: With images.
        source: Number of the modality.
        match_release: Whether it stays on its own scale.
    """
    index = jnp.minimum(source, subject["images"].shape[-1] - 1)
    image = jnp.take(subject["images"], index, -1).astype(jnp.float32) * _scale(subject)[index]
    image = jnp.where(source == CT, jnp.clip(image, 0.0, 80.0), image)
    if match_release:
        return image
    return 255.0 * _unit_range(image[..., None])[..., 0]


def _labels(subject, places, drawn, config):
    """Sample what is not interpolated: classes, and where a face was removed."""
    if config.smooth_labels:
        index = likeliest(subject["segmentation"], places.coordinates)
    else:
        index = sample(subject["segmentation"][..., None], places.coordinates, order=0)[..., 0]
    index = jnp.where(places.is_outside, 0, index).astype(jnp.int32)
    mirror = subject["mirror"] if "mirror" in subject else paper_mirror()
    index = jnp.where(drawn.is_flipped, mirror.astype(jnp.int32)[index], index)
    weights = jnp.ones(config.shape)
    if "defaced" in subject:
        removed = sample(subject["defaced"][..., None], places.coordinates, order=0)[..., 0]
        weights = 1.0 - jnp.where(places.is_outside, 0, removed).astype(jnp.float32)
        if config.match_release:
            weights = jnp.where(drawn.is_flipped, jnp.flip(weights, 0), weights)
    return {"segmentation": index, "background": index == 0, "weights": weights}


def likeliest(labels: Integer[Array, "x y z"], places: Float[Array, "*place 3"]) -> Integer[Array, "*place"]:
    """Return the label whose one-hot map, interpolated linearly, is largest; the first corner's where two are equal.

    Of eight corners, so that no map of any label is made.

    Args:
        labels: Of voxels.
        places: Within the volume.
    """
    low = jnp.floor(places)
    rest = places - low
    corners = jnp.array(list(np.ndindex(2, 2, 2)), jnp.float32)
    found = [sample(labels[..., None], low + corner, order=0)[..., 0] for corner in corners]
    weights = [jnp.prod(jnp.where(corner > 0, rest, 1 - rest), -1) for corner in corners]
    shares = [sum(jnp.where(other == one, w, 0.0) for other, w in zip(found, weights, strict=True)) for one in found]
    best = jnp.argmax(jnp.stack(shares), 0)
    return jnp.take_along_axis(jnp.stack(found), best[None], 0)[0]


def paper_mirror() -> Int[Array, "56"]:
    """Return the class that each of the paper's 56 becomes when left and right are exchanged."""
    neutral, left = jnp.arange(NEUTRAL), NEUTRAL + jnp.arange(SIDED)
    return jnp.concatenate([neutral, left + SIDED, left])


def _scale(subject):
    channels = subject["images"].shape[-1]
    return subject["image_scale"] if "image_scale" in subject else jnp.ones(channels)


def _unit_range(images):
    """Bring every channel to [0, 1]."""
    low, high = images.min((0, 1, 2)), images.max((0, 1, 2))
    return (images - low) / jnp.maximum(high - low, 1e-12)

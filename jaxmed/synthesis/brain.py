"""Brain images for training, drawn on the device: contrast, deformation, resolution, bias, noise, and every target.

One subject's label map, or one of its scans, becomes an image as another scanner, protocol and anatomy would have
made it, together with what a network is to say of it: other contrasts, classes, distances to the cortex, place in MNI
space, bias field, lost detail and lesions. Nothing is read and all shapes are fixed, so that it runs inside a training
step: `jax.vmap(generate, (0, 0, None))` over keys and subjects.

    store = open_store(Path("runs/images/outputs/store"))  # of `jaxmed brainfm generate`
    draw = jax.jit(functools.partial(generate, config=GeneratorConfig((128, 128, 128))))
    image, targets = draw(jax.random.key(0), store[0])

Coordinates are computed once. The image comes from noise at the native resolution, one gather, and small matrices along
each axis; label maps stay whole numbers.

Source: BrainFM (arXiv:2509.00549), its authors' public code; where its defects are left out (`match_release` keeps
them) and what is ours says `GeneratorConfig`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.arrays.warping import jacobian_determinant, sample, sample_stacks
from jaxmed.synthesis.bias_field import draw_log_bias
from jaxmed.synthesis.brain_draws import (
    CT,
    INTENSITY,
    SYNTHETIC,
    GeneratorConfig,
    SampleDraw,
    SubjectDraw,
    draw_sample,
    draw_shared,
)
from jaxmed.synthesis.brain_targets import ZERO, Places, find_places, make_targets, native_image, present_of, written
from jaxmed.synthesis.contrast import apply_gamma, render
from jaxmed.synthesis.deformation import draw_displacement
from jaxmed.synthesis.pathology import Pathology, draw_pathology, encode
from jaxmed.synthesis.resolution import lower_resolution, restore_grid

GREY, WHITE = 3, 2  # of generation labels


def generate(
    key: Key[Array, ""], subject: Mapping[str, Array], config: GeneratorConfig = GeneratorConfig()
) -> tuple[Float[Array, "*sample x y z 1"], dict[str, Array]]:
    """Draw an image of a subject, and its targets.

    Args:
        key: Consumed.
        subject: Arrays on one grid, as `synthesis.brain_targets` lists them; only `labels` and `segmentation` are
            needed.
        config: Static.

    Returns:
        The image, with a maximum of 1 (with `config.samples` above 1 several, along a leading axis), and

        - `T1`, `T2`, `FLAIR` (x, y, z, 1) in [0, 1], `CT` (x, y, z, 1) in HU / 1000, with `present` bool (4,);
        - `segmentation` int32 (x, y, z), class index, and `background` bool (x, y, z) where it is 0;
        - `distance` (x, y, z, 4) in mm, cut off; `registration` (x, y, z, 3), MNI mm / 100; where the subject has them;
        - `bias_field_log` (x, y, z, 1), logarithm of the gain; `high_res_residual` (x, y, z, 1), the image before its
          resolution was lowered less the image; both with a leading axis where the image has one;
        - `pathology` (x, y, z, 1), 1 in lesions; `weights` (x, y, z), 0 where a face was removed.
    """
    _, place_key, lesion_key, sample_key = jax.random.split(key, 4)
    drawn = draw_of(key, subject, config)
    places = written(lambda: find_places(place_key, _size(subject), drawn, config), drawn)
    targets, mixable = make_targets(subject, places, drawn, config)
    lesion = None
    if config.pathology.probability:
        lesion = _lesion(lesion_key, subject, config)
        mask = sample(lesion.mask[..., None], places.coordinates, order=0)
        targets["pathology"] = (mask & ~places.is_outside[..., None]).astype(jnp.float32)
    else:
        targets["pathology"] = jnp.zeros((*config.shape, 1))
    images = [
        _draw_image(jax.random.fold_in(sample_key, number), number, subject, drawn, places, mixable, lesion, config)
        for number in range(config.samples)
    ]
    names = ("image", "bias_field_log", "high_res_residual")
    several = [jnp.stack(parts)[..., None] for parts in zip(*images, strict=True)]
    found = dict(zip(names, several if config.samples > 1 else [part[0] for part in several], strict=True))
    return found.pop("image"), targets | found


def draw_of(key: Key[Array, ""], subject: Mapping[str, Array], config: GeneratorConfig) -> SubjectDraw:
    """Return what `generate` draws for a subject with this key: where its images come from, and how they are taken."""
    shared_key = jax.random.split(key, 4)[0]
    read = subject.get("read", -jnp.ones(len(config.read)))
    return draw_shared(shared_key, present_of(subject), _size(subject), read, config)


def folded_share(key: Key[Array, ""], subject: Mapping[str, Array], config: GeneratorConfig) -> Float[Array, ""]:
    """Return the share of voxels at which the deformation of `generate` with this key turns space inside out.

    A displacement that is drawn as such may fold; one that is integrated from a velocity does not.
    """
    field = draw_displacement(
        jax.random.split(key, 4)[1], config.shape, config.deformation, draw_of(key, subject, config).photo
    )
    return (jacobian_determinant(field) <= 0).mean()


def _size(subject: Mapping[str, Array]) -> Int[Array, "3"]:
    return subject.get("size", jnp.array(subject["labels"].shape, jnp.int32))


def _draw_image(
    key: Key[Array, ""],
    number: int,
    subject: Mapping[str, Array],
    drawn: SubjectDraw,
    places: Places,
    mixable: Float[Array, "x y z modality"],
    lesion: Pathology | None,
    config: GeneratorConfig,
) -> tuple[Float[Array, "x y z"], Float[Array, "x y z"], Float[Array, "x y z"]]:
    """Return an image, its log bias field and what it lost: steps 8 to 13."""
    draw_key, native_key, lesion_key, gamma_key, bias_key, low_key = jax.random.split(key, 6)
    severity = config.severity(number)
    own = draw_sample(draw_key, present_of(subject), drawn, severity, config)
    native = _native(native_key, subject, drawn, own, config)
    if lesion is not None:
        native = encode(lesion_key, native, lesion, _is_bright(drawn.source, own), config.pathology)
    (found,) = sample_stacks([native[..., None]], places.coordinates)
    image = jnp.where(places.is_outside, 0.0, found[..., 0])
    if config.mix:
        image = mix_with_scans(image, mixable, own.shares, drawn.is_flipped, config.match_release)
    image = apply_gamma(gamma_key, jnp.maximum(image, 0.0), severity.gamma)
    photo = drawn.photo if config.acquisitions.photo_probability else None
    log_bias = draw_log_bias(bias_key, config.shape, severity.bias, photo)
    log_bias = jnp.where(drawn.source == CT, 0.0, log_bias)
    image = image * jnp.exp(log_bias)
    low = lower_resolution(low_key, image, drawn.acquisition, config.acquisitions, noise_std=own.noise_std)
    restored = restore_grid(low)
    peak = jnp.maximum(restored.max(), 1e-12)
    # A quotient by itself is not always exactly 1 where a compiler multiplies by the reciprocal.
    return jnp.where(restored == peak, 1.0, restored / peak), log_bias, (image - restored) / peak


def _native(
    key: Key[Array, ""],
    subject: Mapping[str, Array],
    drawn: SubjectDraw,
    own: SampleDraw,
    config: GeneratorConfig,
) -> Float[Array, "x y z"]:
    """Return the image before it is deformed: drawn from labels, or a scan."""
    labels = subject["labels"]
    if "images" not in subject:
        return written(lambda: render(key, labels, own.contrast), drawn)
    return jax.lax.cond(
        drawn.source == SYNTHETIC,
        lambda: render(key, labels, own.contrast),
        lambda: native_image(subject, drawn.source, config.match_release),
    )


def mix_with_scans(
    image: Float[Array, "x y z"],
    scans: Float[Array, "x y z modality"],
    shares: Float[Array, "4"],
    is_flipped: Bool[Array, ""],
    match_release: bool = False,
) -> Float[Array, "x y z"]:
    """Return the convex combination of a synthetic image with a subject's scans, which are warped alike.

    Args:
        image: On a scale of 0 to 255.
        scans: T1, T2 and FLAIR in [0, 1].
        shares: Of the image and of each scan.
        is_flipped: Whether image and scans are.
        match_release: Whether scans keep their scale, and are flipped once more with the mixture.
    """
    if match_release:
        scans = jnp.where(is_flipped, jnp.flip(scans, 0), scans)
    else:
        scans = INTENSITY * scans
    return shares[0] * image + (scans * shares[1:]).sum(-1)


def _lesion(key: Key[Array, ""], subject: Mapping[str, Array], config: GeneratorConfig) -> Pathology:
    """Draw a lesion within the pial surfaces, or in what is not background where those are not known."""
    if "distances" in subject:
        brain = (subject["distances"][..., ::2] < ZERO).any(-1)
    else:
        brain = subject["segmentation"] > 0
    lesion = subject.get("lesion")
    share = None if lesion is None else lesion.astype(jnp.float32) / 255
    return draw_pathology(key, brain, config.pathology, share)


def _is_bright(source: Int[Array, ""], own: SampleDraw) -> Bool[Array, ""]:
    """Tell whether lesions are bright: in T2 and FLAIR, and in synthetic images whose grey matter outshines white."""
    mean = own.contrast.mean
    return jnp.where(source == SYNTHETIC, mean[GREY] > mean[WHITE], (source == 1) | (source == 2))

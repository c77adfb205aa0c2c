"""The four networks of this system: found, read, checked against one another, or made tiny and random."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Seed, checked, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, AutoencoderKlConfig, autoencoder
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import ImportReport, Published, load_published
from jaxmed.models.unet_latent import (
    COCOLIT_CONTROL_NET,
    COCOLIT_UNET,
    ControlNetConfig,
    LatentUnetConfig,
    control_net,
    latent_unet,
)
from jaxmed.systems.cocolit.translation import Models, SamplingConfig
from jaxmed.train.checkpoint import export_parameters

RELEASED = {"mri": "src", "pet": "tgt", "unet": "dif", "controlnet": "cnt"}
"""Names of the released files, without their suffix."""
SUFFIXES = (".pth", ".pt", ".safetensors", "")
KINDS = {
    "mri": ("autoencoder", "the autoencoder of MRI (src.pth)"),
    "pet": ("autoencoder", "the autoencoder of SUVR maps (tgt.pth)"),
    "unet": ("latent-denoiser", "the U-Net of latents (dif.pth)"),
    "controlnet": ("controlnet", "the ControlNet (cnt.pth)"),
}


@dataclasses.dataclass(frozen=True)
@checked
class WeightsConfig:
    """Where the networks are.

    Attributes:
        folder: Folder with all four by their released names: src, tgt, dif and cnt, with or without a suffix.
        mri: Autoencoder of MRI.
        pet: Autoencoder of SUVR maps.
        unet: U-Net of SUVR latents.
        controlnet: ControlNet.
    """

    folder: Path | None = None
    mri: Path | None = None
    pet: Path | None = None
    unet: Path | None = None
    controlnet: Path | None = None

    @property
    def is_given(self) -> bool:
        """Whether any place is named."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))

    def places(self) -> dict[str, Path]:
        """Return where each network is.

        Raises:
            InputError: One is not told, or not in the folder.
        """
        return {name: self._place(name) for name in KINDS}

    def _place(self, name: str) -> Path:
        given, stem = getattr(self, name), RELEASED[name]
        if given is not None:
            return given
        if self.folder is None:
            advice = f"give --weights.{name}, or --weights.folder, or try --preset smoke"
            raise InputError(f"weights.{name}", KINDS[name][1], "nothing", advice)
        found = next((self.folder / (stem + end) for end in SUFFIXES if (self.folder / (stem + end)).exists()), None)
        if found is None:
            there = "no such folder" if not self.folder.is_dir() else f"none named {stem}"
            raise InputError(self.folder, f"{KINDS[name][1]}", there, f"or give --weights.{name}")
        return found


def read_models(weights: WeightsConfig, dtype: Literal["float32", "bfloat16"] = "float32") -> Models:
    """Read the networks and check that they belong together.

    Raises:
        InputError: One cannot be read, is of another kind, or does not fit the others.
    """
    places = weights.places()
    found = {name: _for_sampling(read_network(name, place), dtype) for name, place in places.items()}
    models = Models(**found)
    mri, pet, unet, control = (one.config for one in models)
    needed = (
        (
            "unet",
            "channels in and out, as latents of",
            "pet",
            (pet.latent_channels,) * 2,
            (unet.channels, unet.outputs),
        ),
        (
            "controlnet",
            "channels of the condition, as latents of",
            "mri",
            mri.latent_channels,
            control.condition_channels,
        ),
        ("controlnet", "channels of the skips, as", "unet", unet.skip_widths(), control.unet.skip_widths()),
        ("pet", "voxels for one of the latent, as", "mri", mri.divisor, pet.divisor),
    )
    for name, what, other, expected, actual in needed:
        if expected != actual:
            advice = "give networks of one training"
            raise InputError(places[name], f"{expected} {what} {places[other]}", f"{actual}", advice)
    return models


def read_network(name: str, place: Path | None) -> Published:
    """Read a network of this system: a run, or weights.

    Args:
        name: mri, pet, unet or controlnet.
        place: Where it is.

    Raises:
        InputError: Nothing is given, it is another network, or one of other images.
    """
    kind, title = KINDS[name]
    if place is None:
        raise InputError(f"weights.{name}", title, "nothing", f"give --weights.{name}, or try --preset smoke")
    found = load_published(place)
    if found.report.family != cocolit.NAME or found.report.kind != kind:
        other = f"a {found.report.kind} of {found.report.family}"
        raise InputError(place, title, other, f"check --weights.{name}")
    config = found.config
    unet = config.unet if isinstance(config, ControlNetConfig) else config
    if unet.dimensions != 3 or (
        isinstance(config, AutoencoderKlConfig) and (config.channels, config.outputs) != (1, 1)
    ):
        raise InputError(place, f"{title}, of volumes of one channel", f"one of {unet.dimensions} axes of space")
    if name == "pet" and found.preprocess.intensity == cocolit.MRI.intensity:
        # The released files say nothing of their input: two of one kind are told apart by what they are given for.
        preprocess = dataclasses.replace(found.preprocess, intensity=cocolit.SUVR.intensity)
        return dataclasses.replace(found, preprocess=preprocess)
    return found


def _for_sampling(network: Published, dtype: Literal["float32", "bfloat16"]) -> Published:
    config = network.config
    if isinstance(config, ControlNetConfig):
        return dataclasses.replace(network, config=dataclasses.replace(config, unet=_typed(config.unet, dtype)))
    return dataclasses.replace(network, config=_typed(config, dtype))


def _typed(config: Any, dtype: str) -> Any:
    return dataclasses.replace(config, dtype=dtype, remat=False)


def planned_models(dtype: Literal["float32", "bfloat16"]) -> Models:
    """Return the released networks with shapes in place of their parameters: nothing is read."""
    image, latent, time = (1, *cocolit.MRI.size, 1), (1, *cocolit.LATENT_SIZE, 4), (1,)
    coder, unet = _typed(COCOLIT_AUTOENCODER, dtype), _typed(COCOLIT_UNET, dtype)
    control = dataclasses.replace(COCOLIT_CONTROL_NET, unet=unet)
    made: dict[str, tuple[Any, Preprocess, Any, tuple[tuple[int, ...], ...]]] = {
        "mri": (coder, cocolit.MRI, autoencoder(coder).init, (image,)),
        "pet": (coder, cocolit.SUVR, autoencoder(coder).init, (image,)),
        "unet": (unet, cocolit.MRI, latent_unet(unet).init, (latent, time)),
        "controlnet": (control, cocolit.MRI, control_net(control).init, (latent, time, latent)),
    }
    found = {}
    for name, (config, preprocess, init, inputs) in made.items():
        given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs)
        params: Any = jax.eval_shape(init, jax.random.key(0), *given)
        report = ImportReport(cocolit.NAME, KINDS[name][0], (), (), (), "shapes alone")
        found[name] = Published(cocolit.make_cocolit_model(config, ()), params, preprocess, config, report)
    return Models(**found)


# Tiny networks -------------------------------------------------------------------------------------------------------

# Of the presets smoke, for 16 x 16 x 16 voxels of 12 mm: all stages have one size, and share their compiled programs.
TINY_SIZE, TINY_SPACING = (16, 16, 16), 12.0
TINY_AUTOENCODER = AutoencoderKlConfig(widths=(8, 16), blocks=(1, 1), groups=4)
TINY_UNET = LatentUnetConfig(
    widths=(8, 8), blocks=(1, 1), attention_levels=(False, False), head_channels=8, groups=4
)  # fmt: skip
TINY_SAMPLES, TINY_SAMPLING = 3, SamplingConfig(steps=4, chunk=2)
TINY_CONTROLNET = ControlNetConfig(TINY_UNET, condition_widths=(8,))


def write_tiny_models(folder: Path, seed: Seed, spacing: float = TINY_SPACING) -> Path:
    """Write four tiny random networks under the released names, as own runs leave them; return the folder.

    Args:
        folder: Where to.
        seed: Of the parameters.
        spacing: Voxel size that they are said to be of, in mm.
    """
    latent = (1, 8, 8, 8, 4)
    mri = dataclasses.replace(cocolit.MRI, spacing=(spacing,))
    pet = dataclasses.replace(cocolit.SUVR, spacing=(spacing,))
    made: dict[str, tuple[Any, Preprocess, Any, tuple[tuple[int, ...], ...]]] = {
        "mri": (TINY_AUTOENCODER, mri, autoencoder(TINY_AUTOENCODER).init, ((1, *TINY_SIZE, 1),)),
        "pet": (TINY_AUTOENCODER, pet, autoencoder(TINY_AUTOENCODER).init, ((1, *TINY_SIZE, 1),)),
        "unet": (TINY_UNET, mri, latent_unet(TINY_UNET).init, (latent, (1,))),
        "controlnet": (TINY_CONTROLNET, mri, control_net(TINY_CONTROLNET).init, (latent, (1,), latent)),
    }
    for number, (name, (config, preprocess, init, inputs)) in enumerate(made.items()):
        # Shapes alone are asked for: to draw a network's own start, all of its operations would be compiled.
        shapes = jax.eval_shape(init, jax.random.key(0), *(jnp.zeros(shape) for shape in inputs))
        record = {"family": cocolit.NAME, "kind": KINDS[name][0], "config": to_record(config)}
        record |= {"preprocess": to_record(preprocess), "licence": "random numbers"}
        export_parameters(folder / RELEASED[name], _draw(shapes, seed + number), record)
    return folder


def _draw(shapes: Any, seed: int) -> Any:
    """Return scales of 1, biases of 0, and kernels that keep the variance; none is 0 as in training's start."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) < 2:
            return np.full(leaf.shape, float(path[-1].key == "scale"), np.float32)
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 5 else leaf.shape[0]
        return (generator.standard_normal(leaf.shape) / np.sqrt(inputs)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)

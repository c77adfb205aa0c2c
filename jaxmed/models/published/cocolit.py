"""Weights of CoCoLIT and of other latent diffusion models of MONAI: autoencoder, U-Net and ControlNet.

The four released files are two autoencoders of one kind (`src.pth` of MRI, `tgt.pth` of SUVR), a U-Net (`dif.pth`) and
a ControlNet (`cnt.pth`); names tell the kinds apart. Attention is named in three ways: "" as in GenerativeModels,
whose files hold a linear map `proj_attn` that nothing applies: it is dropped, and an export has an identity in its
place, which changes nothing where a loader does apply it; "core" as in MONAI's core, where `out_proj` is applied if a
file has it; "combined" the same with queries, keys and values in one map.

Source: CoCoLIT, arXiv:2508.01292, and its official code; MONAI GenerativeModels and MONAI.
"""

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig
from jaxmed.models.published.cocolit_names import autoencoder_entries, control_entries, unet_entries
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import Entry, count_parts, shape_of
from jaxmed.models.unet_latent import ControlNet, ControlNetConfig, LatentUnet, LatentUnetConfig
from jaxmed.nn.model import Model, make_model

NAME = "cocolit"
Config: TypeAlias = AutoencoderKlConfig | LatentUnetConfig | ControlNetConfig
KINDS = {
    "autoencoder": Kind(AutoencoderKlConfig, "a KL autoencoder"),
    "latent-denoiser": Kind(LatentUnetConfig, "a U-Net of latents"),
    "controlnet": Kind(ControlNetConfig, "a ControlNet"),
}
AUTOENCODER, CONDITION = "encoder.blocks.0.conv.conv.weight", "controlnet_cond_embedding.conv_in.conv.weight"
STEM, MIDDLE = "conv_in.conv.weight", "middle_block.attention"
RELEASED_WIDTH = 256  # of every level, and of the one attention head
# Parts of networks that are told more than a time.
MORE = ("class_embedding.", "top_region_index_layer.", "bottom_region_index_layer.", "spacing_layer.")

# Preprocessed scans on the MNI152 template at 1 mm, axes as the template's. Zeros are added before values are scaled.
MRI = Preprocess(
    (128, 152, 128), axes="xyz", spacing=(1.5,), interpolation="linear-first", order="cut-then-scale",
    intensity=Intensity("keep", mean=(-49.757356053158766,), std=(24.68868751354585,)),
)  # fmt: skip
SUVR = dataclasses.replace(MRI, intensity=Intensity("keep", mean=(0.370730756043226,), std=(0.667580822498126,)))
LATENT_SIZE = (32, 40, 32)


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family."""
    is_autoencoder = AUTOENCODER in tensors and "quant_conv_mu.conv.weight" in tensors
    return is_autoencoder or (STEM in tensors and "down_blocks.0.resnets.0.conv1.conv.weight" in tensors)


def naming(tensors: Mapping[str, Any]) -> str:
    """Return how a file names attention: as GenerativeModels (""), "core", or "combined"."""
    if f"{MIDDLE}.attn.qkv.weight" in tensors:
        return "combined"
    return "core" if f"{MIDDLE}.attn.to_q.weight" in tensors else ""


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> Config:
    """Return the sizes of a model from the shapes of its tensors; see `family.Family.infer`."""
    is_autoencoder = AUTOENCODER in tensors
    for option in ("heads", "decoder_heads") if is_autoencoder else ("decoder_heads",):
        if (said := getattr(hints, option)) is not None:
            name = option.replace("_", "-")
            raise InputError(name, "none for this model", said, f"leave --{name} out")
    try:
        if is_autoencoder:
            return _infer_autoencoder(where, tensors)
        unet = _infer_unet(where, tensors, hints.heads)
        return _infer_control(where, tensors, unet) if CONDITION in tensors else unet
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible network", str(error)) from error


def facts(config: Config) -> Facts:
    """Return what others ask of a model."""
    kind = next(name for name, one in KINDS.items() if isinstance(config, one.config))
    if isinstance(config, AutoencoderKlConfig):
        return Facts(kind)
    unet = config.unet if isinstance(config, ControlNetConfig) else config
    return Facts(kind, unet.heads_of(unet.widths[-1]))


def entries(config: Config, naming: str = "") -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    match config:
        case AutoencoderKlConfig():
            return autoencoder_entries(config)
        case ControlNetConfig():
            return control_entries(config, naming)
    return unet_entries(config, naming)


def unapplied(config: Config, naming: str = "") -> dict[str, np.ndarray]:
    """Return what an export adds for GenerativeModels: identities for the maps that it holds and never applies."""
    found: dict[str, np.ndarray] = {}
    for entry in entries(config, naming):
        name, _, part = entry.name.rpartition(".to_q.")
        if name and not name.endswith(".attn"):
            fill = np.eye if part == "weight" else np.zeros
            found[f"{name}.proj_attn.{part}"] = fill(entry.shape[0], dtype=np.float32)
    return found


def make_cocolit_model(config: Config, parts: Collection[str]) -> Model:
    """Return the model, which is always whole."""
    match config:
        case AutoencoderKlConfig():
            return make_model(AutoencoderKl(config))
        case ControlNetConfig():
            return make_model(ControlNet(config))
    return make_model(LatentUnet(config))


def preprocess(config: Config) -> Preprocess:
    """Return what the weights expect: a T1-weighted MRI on the template (see `SUVR` for the other one), or latents."""
    if isinstance(config, AutoencoderKlConfig):
        return dataclasses.replace(MRI, size=MRI.size[: config.dimensions], channels=config.channels)
    unet = config.unet if isinstance(config, ControlNetConfig) else config
    return Preprocess(LATENT_SIZE[: unet.dimensions], unet.channels, axes="xyz", intensity=Intensity("keep"))


def notes(config: Config, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what a file does not."""
    if isinstance(config, AutoencoderKlConfig):
        return (
            "the file does not tell MRI (src.pth) from SUVR (tgt.pth): preprocessing is that of MRI",
            "it is taken to double linearly, as released; a transposed convolution would have the same names",
        )
    unet = config.unet if isinstance(config, ControlNetConfig) else config
    if unet.projection:
        return ("attention ends in a linear map (out_proj), as in MONAI's core with include_fc",)
    return ("maps called proj_attn, where the file has them, are never applied by the released code and are left out",)


def describe(config: Config, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    if isinstance(config, AutoencoderKlConfig):
        return [
            ("kind", "KL autoencoder (MAISI)"),
            ("input", f"{config.dimensions}D, {config.channels} channel(s), multiples of {config.divisor} voxels"),
            ("latent", f"{config.latent_channels} channels, {config.divisor} times as coarse"),
            ("levels", _levels(config.widths, config.blocks)),
        ]
    unet = config.unet if isinstance(config, ControlNetConfig) else config
    attends = [str(level) for level, has in enumerate(unet.attention_levels) if has]
    lines = [
        ("kind", "denoiser: a U-Net of latents"),
        ("input", f"{unet.dimensions}D, {unet.channels} channels, multiples of {unet.divisor} voxels"),
        ("outputs", f"{unet.outputs} channels"),
        ("levels", _levels(unet.widths, unet.blocks)),
        ("attention", f"at levels {', '.join(attends) or '(none)'} and in the middle; "
                      f"{unet.heads_of(unet.widths[-1])} head(s) at the last level"),
    ]  # fmt: skip
    if isinstance(config, ControlNetConfig):
        lines[0] = ("kind", "ControlNet: encoder and middle of a U-Net of latents")
        lines[2] = ("condition", f"{config.condition_channels} channels, through {_widths(config.condition_widths)}")
    return lines


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run of CoCoLIT's system says about its parameters."""
    if run.get("system") != NAME:
        return None
    signs = {"autoencoder": "to_mean/kernel", "controlnet": "after_middle/kernel", "latent-denoiser": "head/kernel"}
    kind = next((kind for kind, sign in signs.items() if sign in tensors), None)
    settings = run.get("config") or {}
    return {"kind": kind, "config": settings.get("model"), "preprocess": settings.get("preprocess")}


def _infer_autoencoder(where: str, tensors: Mapping[str, Any]) -> AutoencoderKlConfig:
    stem, last = _shape(where, tensors, AUTOENCODER), count_parts(where, tensors, r"encoder\.blocks") - 1
    widths, blocks = [stem[0]], [0]
    for number in range(1, last - 1):
        name = f"encoder.blocks.{number}"
        if f"{name}.norm1.weight" in tensors:
            widths[-1] = _shape(where, tensors, f"{name}.conv1.conv.conv.weight")[0]
            blocks[-1] += 1
        elif f"{name}.conv.conv.conv.weight" in tensors:
            widths.append(widths[-1])
            blocks.append(0)
        else:
            raise InputError(
                where, "an autoencoder without attention", f"'{name}' is no convolution and no residual block"
            )
    end = count_parts(where, tensors, r"decoder\.blocks") - 1
    return AutoencoderKlConfig(
        dimensions=_dimensions(where, stem),
        channels=stem[1],
        outputs=_shape(where, tensors, f"decoder.blocks.{end}.conv.conv.weight")[0],
        latent_channels=_shape(where, tensors, "quant_conv_mu.conv.weight")[0],
        widths=tuple(widths),
        blocks=tuple(blocks),
    )


def _infer_unet(where: str, tensors: Mapping[str, Any], heads: int | None) -> LatentUnetConfig:
    more = next((name for name in tensors if name.startswith(MORE) or ".transformer_blocks." in name), None)
    if more is not None:
        advice = "such networks are not built"
        raise InputError(where, "a U-Net that is told nothing but a time", f"'{more}'", advice)
    stem, levels = _shape(where, tensors, STEM), range(count_parts(where, tensors, "down_blocks"))
    widths = tuple(_shape(where, tensors, f"down_blocks.{level}.resnets.0.conv1.conv.weight")[0] for level in levels)
    if heads is None and set(widths) != {RELEASED_WIDTH}:
        expected, advice = (
            "the widths of the released network, whose heads are known",
            "jaxmed weights import --heads N",
        )
        raise InputError(where, expected, _widths(widths), f"shapes do not tell heads: {advice}")
    if heads is not None and widths[-1] % heads:
        raise InputError("heads", f"a divisor of {widths[-1]} channels", heads)
    return LatentUnetConfig(
        dimensions=_dimensions(where, stem),
        channels=stem[1],
        outputs=stem[1] if CONDITION in tensors else _shape(where, tensors, "out.2.conv.weight")[0],
        widths=widths,
        blocks=tuple(count_parts(where, tensors, rf"down_blocks\.{level}\.resnets") for level in levels),
        attention_levels=tuple(f"down_blocks.{level}.attentions.0.norm.weight" in tensors for level in levels),
        head_channels=widths[-1] // (heads or 1),
        resblock_updown="down_blocks.0.downsampler.op.conv.weight" not in tensors,
        projection=f"{MIDDLE}.attn.out_proj.weight" in tensors,
    )


def _infer_control(where: str, tensors: Mapping[str, Any], unet: LatentUnetConfig) -> ControlNetConfig:
    first, pairs = _shape(where, tensors, CONDITION), 0
    widths = [first[0]]
    while (name := f"controlnet_cond_embedding.blocks.{2 * pairs + 1}.conv.weight") in tensors:
        widths.append(_shape(where, tensors, name)[0])
        pairs += 1
    return ControlNetConfig(unet, first[1], tuple(widths))


def _dimensions(where: str, stem: tuple[int, ...]) -> Any:
    if len(stem) not in (4, 5):
        raise InputError(where, "a first convolution of images or volumes", f"one of shape {stem}")
    return len(stem) - 2


def _levels(widths: tuple[int, ...], blocks: tuple[int, ...]) -> str:
    return f"{_widths(widths)} channels, {', '.join(map(str, blocks))} blocks"


def _widths(widths: tuple[int, ...]) -> str:
    return " x ".join(map(str, widths))


def _shape(where: str, tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return shape_of(where, NAME, tensors, name)


FAMILY = Family(
    name=NAME,
    title="CoCoLIT, amyloid PET from MRI by latent diffusion (arXiv:2508.01292), and latent models of MONAI",
    licence="CC BY-NC 4.0, for research only (CoCoLIT); weights trained by others: their terms hold",
    where="src.pth, tgt.pth, dif.pth and cnt.pth of lemuelpuglisi/CoCoLIT on the Hugging Face hub",
    keys=(
        "autoencoder: {encoder,decoder}.blocks.N.*, quant_conv_mu.conv.*, quant_conv_log_sigma.conv.*, "
        "post_quant_conv.conv.*; U-Net: conv_in.conv.*, time_embed.{0,2}.*, "
        "{down,up}_blocks.N.{resnets,attentions}.M.*, middle_block.*, out.{0,2}.*; ControlNet: the same without "
        "up_blocks and out, controlnet_cond_embedding.*, controlnet_down_blocks.N.*, controlnet_mid_block.conv.*"
    ),
    kinds=KINDS,
    recognises=recognises,
    infer=infer,
    facts=facts,
    entries=entries,
    make_model=make_cocolit_model,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=own_record,
    naming=naming,
    unapplied=unapplied,
)

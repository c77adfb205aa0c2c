"""Weights of guided-diffusion U-Nets: the key names of the official code, and sizes from the shapes of the tensors.

The names are those of ADM (256x256_diffusion_uncond.pt and the others without classes), of diffusion posterior sampling
(ffhq_10m.pt, imagenet256.pt) and of DynamicDPS, whose codes share the class. Heads of attention leave no trace in
shapes: the released networks have known ones, for others they have to be told, or to stand in the arguments that a file
keeps. Nor does the noise schedule: that of ADM and DPS is linear, that of DynamicDPS a cosine. Volumes keep the first
axis of space whole, as the class does: only the last two are halved.

Source: arXiv:2105.05233, arXiv:2209.14687, arXiv:2503.01075, and their official codes.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.arrays.task import Task
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import Entry, count_parts, layer_norm, linear, reshaped, shape_of, told
from jaxmed.models.unet_guided import GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import Model, make_model

NAME = "guided_diffusion"
COARSEST = 8  # voxels of the last level of every released network
# Channels of the input, width, blocks and levels of the released networks, to their heads and channels of a head: the
# prior of DynamicDPS; ADM (256 pixels without classes, LSUN, ImageNet); FFHQ.
LEVELS = (1, 1, 2, 2, 4, 4)
HEADS: dict[tuple[int, int, int, tuple[int, ...]], tuple[int, int]] = {
    (1, 128, 2, LEVELS): (4, 0),
    (3, 256, 2, LEVELS): (4, 64),
    (3, 128, 1, LEVELS): (4, 64),
}


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family."""
    return "input_blocks.0.0.weight" in tensors and any(name.startswith("middle_block.1.qkv.") for name in tensors)


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> GuidedUnetConfig:
    """Return the sizes of a network from the shapes of its tensors.

    Args:
        where: The file, for messages.
        tensors: By their original names.
        hints: Attention heads, where the network is not a released one; the arguments of the training code.

    Raises:
        InputError: Tensors that tell sizes are missing or contradict each other, heads are unknown, or the network
            wants classes.
    """
    if hints.decoder_heads is not None:
        raise InputError("decoder-heads", "none for this family", hints.decoder_heads, "leave --decoder-heads out")
    if "label_emb.weight" in tensors:
        raise InputError(where, "a network without classes", "'label_emb.weight'", "take an unconditional one")
    stem, head = (_shape(where, tensors, name) for name in ("input_blocks.0.0.weight", "out.2.weight"))
    parts = count_parts(where, tensors, "output_blocks")
    ups = [number for number in range(parts) if _resamples(tensors, number)]
    per_level = ups[0] + 1 if ups else parts
    if parts % per_level or per_level < 2:
        raise InputError(where, "decoder levels of one length", f"{parts} parts, the first level of {per_level}")
    levels = parts // per_level
    starts = [(levels - 1 - level) * per_level for level in range(levels)]
    widths = [_shape(where, tensors, f"output_blocks.{start}.0.out_layers.3.weight")[0] for start in starts]
    with_time = "time_embed.0.weight" in tensors
    width = _shape(where, tensors, "time_embed.0.weight")[1] if with_time else stem[0]
    if any(found % width for found in widths):
        raise InputError(where, f"levels of multiples of {width} channels", f"{widths}", "such networks are not built")
    embed = f"output_blocks.{starts[0]}.0.emb_layers.1.weight"
    learns = head[0] == 2 * stem[1]
    multipliers = tuple(found // width for found in widths)
    num_heads, head_channels = _heads(where, (stem[1], width, per_level - 1, multipliers), hints.heads, hints.settings)
    try:
        return GuidedUnetConfig(
            dimensions=3 if len(stem) == 5 else 2,
            channels=stem[1],
            outputs=stem[1] if learns else head[0],
            width=width,
            multipliers=multipliers,
            blocks=per_level - 1,
            attention_factors=tuple(
                2**level for level, start in enumerate(starts) if f"output_blocks.{start}.1.norm.weight" in tensors
            ),
            heads=num_heads,
            head_channels=head_channels,
            with_time=with_time,
            scale_shift=not with_time or _shape(where, tensors, embed)[0] == 2 * widths[0],
            resblock_updown=bool(ups) and not _has_conv(tensors, ups[0]),
            learn_sigma=learns,
            keeps_depth=len(stem) == 5 and levels > 1,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible network", str(error)) from error


def entries(config: GuidedUnetConfig, naming: str = "") -> list[Entry]:
    """Return every tensor of a network and its parameter."""
    found = [*_conv("input_blocks.0.0", "stem", config, config.channels, config.widths[0])]
    if config.with_time:
        found += linear("time_embed.0", "time/fc1", config.width, config.time_width)
        found += linear("time_embed.2", "time/fc2", config.time_width, config.time_width)
    found += _encoder(config)
    width = config.widths[-1]
    found += _block("middle_block.0", "middle/block_0", config, width, width)
    found += _attention("middle_block.1", "middle/attention_0", config, width)
    found += _block("middle_block.2", "middle/block_1", config, width, width)
    found += _decoder(config)
    found += layer_norm("out.0", "norm", config.widths[0])
    outputs = config.outputs * (2 if config.learn_sigma else 1)
    return [*found, *_conv("out.2", "head", config, config.widths[0], outputs)]


def preprocess(config: GuidedUnetConfig) -> Preprocess:
    """Return what the weights expect of an image.

    Source: official codes. ADM and DPS: shorter side to the size, centre, 8 bits to [-1, 1]. DynamicDPS: the central
    256 x 256 voxels of a slice, [0, 4096] to [0, 2].
    Deviation: ADM shrinks by boxes and cubic interpolation, this by a blur and linear interpolation.
    """
    size = (COARSEST * config.divisor,) * config.dimensions
    if config.channels == 1:
        return Preprocess(size, intensity=Intensity("window", window=(0.0, 4096.0), range=(0.0, 2.0), clip=False))
    intensity = Intensity("window", window=(0.0, 255.0), range=(-1.0, 1.0), clip=False)
    return Preprocess(size, config.channels, axes="xyz", fit="cover", intensity=intensity, padding=-1.0)


def notes(config: GuidedUnetConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what a file does not."""
    found = []
    if _sizes(config) not in HEADS and not {"use_new_attention_order", "num_heads_upsample"} & set(settings):
        found.append(
            "the file does not say how attention is laid out: taken as in the released networks, heads before queries, "
            "keys and values (no use_new_attention_order) and as many heads in the decoder (no num_heads_upsample)"
        )
    found += ["the file does not hold the noise schedule: ADM and DPS use linear betas, DynamicDPS a cosine"]
    if config.channels == 1:
        found.append("its range is taken to be [0, 2], as in DynamicDPS")
    return tuple(found)


def facts(config: GuidedUnetConfig) -> Facts:
    """Return what others ask of a network."""
    return Facts("denoiser" if config.with_time else "enhancer", config.heads)


def make_unet(config: GuidedUnetConfig, parts: Collection[str]) -> Model:
    """Return the network, which is always whole."""
    return make_model(GuidedUnet(config))


def describe(config: GuidedUnetConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    heads = f"of {config.head_channels} channels" if config.head_channels else f"{config.heads}"
    updown = "inside residual blocks" if config.resblock_updown else "by convolutions"
    variance = ", and as many for the variance" if config.learn_sigma else ""
    widths = " x ".join(map(str, config.widths))
    return [
        ("kind", "denoiser: a U-Net of image and time" if config.with_time else "enhancer: a U-Net of an image"),
        ("input", f"{config.dimensions}D, {config.channels} channel(s), multiples of {config.divisor} voxels"
                  + (" along the last two axes" if config.keeps_depth else "")),
        ("outputs", f"{config.outputs} channel(s){variance}"),
        ("levels", f"{widths} channels, {config.blocks} blocks each, resampled {updown}"),
        ("attention", f"at factors {', '.join(map(str, config.attention_factors)) or '(none)'} and in the middle; "
                      f"heads {heads}"),
    ]  # fmt: skip


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run says about a network that it trained."""
    if "stem/kernel" not in tensors:
        return None
    kind = "denoiser" if "time/fc1/kernel" in tensors else "enhancer"
    config = run.get("config") or {}
    settings = config.get("network", config)  # a run's options stand in a record of its network
    return {"kind": kind, "config": settings.get("model"), "preprocess": settings.get("preprocess")}


def _encoder(config: GuidedUnetConfig) -> list[Entry]:
    found: list[Entry] = []
    number, channels = 1, config.widths[0]
    for level, width in enumerate(config.widths):
        for index in range(config.blocks):
            found += _block(f"input_blocks.{number}.0", f"down_{level}/block_{index}", config, channels, width)
            if 2**level in config.attention_factors:
                found += _attention(f"input_blocks.{number}.1", f"down_{level}/attention_{index}", config, width)
            number, channels = number + 1, width
        if level + 1 < len(config.widths):
            name, path = f"input_blocks.{number}.0", f"down_{level}/resample"
            if config.resblock_updown:
                found += _block(name, path, config, width, width)
            else:
                found += _conv(f"{name}.op", path, config, width, width)
            number += 1
    return found


def _decoder(config: GuidedUnetConfig) -> list[Entry]:
    found: list[Entry] = []
    number, channels, skips = 0, config.widths[-1], config.skip_widths()
    for level, width in reversed(list(enumerate(config.widths))):
        attends = 2**level in config.attention_factors
        for index in range(config.blocks + 1):
            name, path = f"output_blocks.{number}", f"up_{level}"
            found += _block(f"{name}.0", f"{path}/block_{index}", config, channels + skips.pop(), width)
            if attends:
                found += _attention(f"{name}.1", f"{path}/attention_{index}", config, width)
            if level and index == config.blocks:
                name = f"{name}.{2 if attends else 1}"
                if config.resblock_updown:
                    found += _block(name, f"{path}/resample", config, width, width)
                else:
                    found += _conv(f"{name}.conv", f"{path}/resample", config, width, width)
            number, channels = number + 1, width
    return found


def _block(name: str, path: str, config: GuidedUnetConfig, inputs: int, outputs: int) -> list[Entry]:
    found = [
        *layer_norm(f"{name}.in_layers.0", f"{path}/norm1", inputs),
        *_conv(f"{name}.in_layers.2", f"{path}/conv1", config, inputs, outputs),
        *layer_norm(f"{name}.out_layers.0", f"{path}/norm2", outputs),
        *_conv(f"{name}.out_layers.3", f"{path}/conv2", config, outputs, outputs),
    ]
    if config.with_time:
        columns = 2 * outputs if config.scale_shift else outputs
        found += linear(f"{name}.emb_layers.1", f"{path}/embed", config.time_width, columns)
    if inputs != outputs:
        found += _conv(f"{name}.skip_connection", f"{path}/skip", config, inputs, outputs, edge=1)
    return found


def _attention(name: str, path: str, config: GuidedUnetConfig, width: int) -> list[Entry]:
    heads = config.heads_of(width)
    split = (heads, 3, width // heads)
    return [
        *layer_norm(f"{name}.norm", f"{path}/norm", width),
        Entry(f"{name}.qkv.weight", f"{path}/qkv/kernel", (3 * width, width, 1), (1, 2, 0), (width, *split)),
        reshaped(f"{name}.qkv.bias", f"{path}/qkv/bias", (3 * width,), split),
        Entry(f"{name}.proj_out.weight", f"{path}/out/kernel", (width, width, 1), (1, 2, 0), (width, width)),
        reshaped(f"{name}.proj_out.bias", f"{path}/out/bias", (width,), (width,)),
    ]


def _conv(name: str, path: str, config: GuidedUnetConfig, inputs: int, outputs: int, edge: int = 3) -> list[Entry]:
    spatial = config.dimensions
    window = (edge,) * spatial
    axes = (*range(2, spatial + 2), 1, 0)
    return [
        Entry(f"{name}.weight", f"{path}/kernel", (outputs, inputs, *window), axes, (*window, inputs, outputs)),
        reshaped(f"{name}.bias", f"{path}/bias", (outputs,), (outputs,)),
    ]


def _sizes(config: GuidedUnetConfig) -> tuple[int, int, int, tuple[int, ...]]:
    return config.channels, config.width, config.blocks, config.multipliers


def _heads(
    where: str, sizes: tuple[int, int, int, tuple[int, ...]], given: int | None, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """Return heads and channels of a head: as told, as the arguments say, or of the released network of these sizes."""
    if settings.get("use_new_attention_order") is True:
        expected = "attention with heads before queries, keys and values"
        advice = "such networks are not built: save it with reordered rows of qkv"
        raise InputError(where, expected, "use_new_attention_order in its arguments", advice)
    in_file, upsample = settings.get("num_heads"), settings.get("num_heads_upsample", -1)
    if upsample not in (-1, None, in_file):
        expected = "as many heads in the decoder as in the encoder"
        raise InputError(
            where, expected, f"num_heads_upsample {str(upsample)[:20]} in its arguments", "such networks are not built"
        )
    channels = settings.get("num_head_channels")
    if type(channels) is int and channels > 0 and given is None:
        return 4, channels
    heads = told(where, "heads", given, settings, ("num_heads",)) if channels in (-1, None) else given
    if heads is not None:
        return heads, 0
    if sizes not in HEADS:
        expected = "the sizes of a released network, whose heads are known"
        found = f"{sizes[0]} channel(s), width {sizes[1]}, levels {' '.join(map(str, sizes[3]))}"
        raise InputError(where, expected, found, "shapes do not tell heads: jaxmed weights import --heads N")
    return HEADS[sizes]


def _resamples(tensors: Mapping[str, Any], number: int) -> bool:
    """Tell whether a part of the decoder ends a level: a convolution alone, or a second block."""
    return _has_conv(tensors, number) or any(
        f"output_blocks.{number}.{place}.in_layers.0.weight" in tensors for place in (1, 2)
    )


def _has_conv(tensors: Mapping[str, Any], number: int) -> bool:
    return any(f"output_blocks.{number}.{place}.conv.weight" in tensors for place in (1, 2))


def _shape(where: str, tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return shape_of(where, NAME, tensors, name)


FAMILY = Family(
    name=NAME,
    title="U-Nets of guided diffusion: ADM (arXiv:2105.05233), DPS (arXiv:2209.14687), DynamicDPS (arXiv:2503.01075)",
    licence="MIT (guided-diffusion); priors trained by others on other images: their terms hold",
    where=(
        "256x256_diffusion_uncond.pt and lsun_*.pt by the links in the README of openai/guided-diffusion; ffhq_10m.pt "
        "and imagenet256.pt by those of DPS2022/diffusion-posterior-sampling; DynamicDPS: ask its authors, "
        "edshkim98/DynamicDPS"
    ),
    keys=(
        "time_embed.{0,2}.*, input_blocks.N.M.{in_layers,emb_layers,out_layers,skip_connection,norm,qkv,proj_out,op}"
        ".*, middle_block.M.*, output_blocks.N.M.*, out.{0,2}.*; no label_emb.weight, which networks of classes have"
    ),
    kinds={"denoiser": Kind(GuidedUnetConfig, "a U-Net"), "enhancer": Kind(GuidedUnetConfig, "a U-Net")},
    recognises=recognises,
    infer=infer,
    facts=facts,
    entries=entries,
    make_model=make_unet,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=own_record,
)

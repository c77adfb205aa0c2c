"""Transformers of DINOv2 and DINOv3 under every name they are published by: what both families share.

A file holds an encoder, or a classifier that was fine-tuned from it. Names are those of the official code, of timm, or
of transformers before and after its classes were rewritten in 2026; blocks may be numbered in chunks. Projection heads
of pre-training (dino_head, ibot_head) have no place in the model.

Source: DINOv2, arXiv:2304.07193; registers, arXiv:2309.16588; DINOv3, arXiv:2508.10104; official codes; RETFound,
arXiv:2509.03421, official code.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig
from jaxmed.models.published import timm_vit
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import (
    TIMM,
    BlockNames,
    Entry,
    blocks,
    count_parts,
    edge_of,
    layer_norm,
    linear,
    patch_embedding,
    reshaped,
    shape_of,
    told,
)
from jaxmed.models.vit import VitConfig, vit_model
from jaxmed.nn.model import Model, make_model

KINDS = {"encoder": Kind(VitConfig, "an encoder"), "classifier": Kind(ClassifierConfig, "a classifier")}
# Width to heads of the published encoders.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24, 4096: 32}
# DINOv3 keeps the constants of its rotations and of its masked keys in the file.
COUNTERS = (r"rope_embed\.periods", r"blocks\.\d+\.attn\.qkv\.bias_mask")
IMAGENET = Intensity("unit", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
Generation = Literal["dinov2", "dinov3"]


class Naming(NamedTuple):
    """One way of naming an encoder.

    Attributes:
        prefix: Of class token, mask token and positions.
        position: Table of positions.
        registers: Tokens without a place.
        patch: The patch embedding.
        blocks: The column of blocks.
        norm: The final norm.
        head: The classifier.
        block: Names in a block.
        gated: Names in a block with a gated MLP.
    """

    prefix: str = ""
    position: str = "pos_embed"
    registers: str = "register_tokens"
    patch: str = "patch_embed.proj"
    blocks: str = "blocks"
    norm: str = "norm"
    head: str = "head"
    block: BlockNames = TIMM
    gated: BlockNames = TIMM


_OLD = BlockNames(
    tuple(f"attention.attention.{part}" for part in ("query", "key", "value")), "attention.output.dense",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)  # fmt: skip
_NEW = _OLD._replace(qkv=tuple(f"attention.{part}_proj" for part in "qkv"), out="attention.o_proj")
_GATES = {"fc1": ("mlp.gate_proj", "mlp.up_proj"), "fc2": "mlp.down_proj"}
_HUGGING = Naming(
    "embeddings.", "embeddings.position_embeddings", "embeddings.register_tokens",
    "embeddings.patch_embeddings.projection", "encoder.layer", "layernorm", "classifier",
)  # fmt: skip
NAMINGS: Mapping[Generation, Mapping[str, Naming]] = {
    "dinov2": {
        "": Naming(gated=TIMM._replace(fc1=("mlp.w12",), fc2="mlp.w3")),
        "timm": Naming(registers="reg_token"),
        "transformers": _HUGGING._replace(
            block=_OLD, gated=_OLD._replace(fc1=("mlp.weights_in",), fc2="mlp.weights_out")
        ),
        "transformers 5": _HUGGING._replace(block=_NEW, gated=_NEW._replace(**_GATES)),
    },
    "dinov3": {
        "": Naming(registers="storage_tokens", gated=TIMM._replace(fc1=("mlp.w1", "mlp.w2"), fc2="mlp.w3")),
        "transformers": _HUGGING._replace(
            patch="embeddings.patch_embeddings", blocks="layer", norm="norm",
            block=_NEW._replace(fc1=("mlp.up_proj",), fc2="mlp.down_proj"), gated=_NEW._replace(**_GATES),
        ),
    },
}  # fmt: skip


def recognises(generation: Generation, tensors: Mapping[str, Any]) -> bool:
    """Tell whether names are those of a generation: both have factors on branches, DINOv3 no table but registers."""
    tensors = _unwrapped(tensors)[1]
    plain = renamed(tensors)
    names = {plain.get(name, name) for name in tensors}
    kernel = next((tensors[f"{n}.weight"] for n in PATCHES if f"{n}.weight" in tensors), None)
    if kernel is None or len(kernel.shape) != 4:
        return False
    has_scale = any(f"{stem}.0.{scale}" in names for stem in STEMS for scale in SCALES)
    has_table = any(name in names for name in ("pos_embed", _HUGGING.position))
    is_turned = not has_table and any(name in names for name in TURNED)
    return has_scale and is_turned == (generation == "dinov3")


STEMS = ("blocks", "encoder.layer", "layer")
TURNED = ("storage_tokens", "embeddings.register_tokens", "rope_embed.periods")  # one of them is in every DINOv3
SCALES = ("ls1.gamma", "layer_scale1.lambda1")
PATCHES = ("patch_embed.proj", "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings")
# Where transformers' classifiers keep the encoder; a naming ends in " in PREFIX".
WRAPPERS = ("dinov2.", "dinov2_with_registers.", "dinov3_vit.")


def _unwrapped(tensors: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the prefix of a wrapped encoder, and the tensors without it."""
    for prefix in WRAPPERS:
        if f"{prefix}embeddings.cls_token" in tensors:
            return prefix, {name.removeprefix(prefix): value for name, value in tensors.items()}
    return "", tensors


def renamed(names: Collection[str]) -> dict[str, str]:
    """Return the names of blocks in chunks, blocks.CHUNK.BLOCK.*, without the chunks."""
    chunked = {name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in names}
    return {name: plain for name, plain in chunked.items() if name != plain}


def naming(generation: Generation, tensors: Mapping[str, Any]) -> str:
    """Return which of `NAMINGS` a file follows, and inside what."""
    prefix, tensors = _unwrapped(tensors)
    inside = f" in {prefix}" if prefix else ""
    if "patch_embed.proj.weight" in tensors:
        is_timm = "reg_token" in tensors or (
            "mask_token" not in tensors and _is_gated(tensors, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
        )
        return "timm" if generation == "dinov2" and is_timm else ""
    if generation == "dinov3" or "encoder.layer.0.attention.attention.query.weight" in tensors:
        return f"transformers{inside}"
    return f"transformers 5{inside}"


def infer(
    generation: Generation, where: str, tensors: Mapping[str, Any], hints: Hints = Hints()
) -> VitConfig | ClassifierConfig:
    """Return the sizes of a model from the shapes of its tensors; see `family.Family.infer`."""
    other: Generation = "dinov3" if generation == "dinov2" else "dinov2"
    if not recognises(generation, tensors) and recognises(other, tensors):
        found = f"weights of {other}: {'no' if other == 'dinov3' else 'a'} table of positions"
        raise InputError(where, f"weights of {generation}", found, f"leave --family out, or say {other}")
    tensors = _unwrapped(tensors)[1]
    style = naming(generation, tensors)
    names = NAMINGS[generation][style]
    kernel = shape_of(where, generation, tensors, f"{names.patch}.weight", 4)
    width, channels, patch = kernel[0], kernel[1], kernel[2:]
    registers = shape_of(where, generation, tensors, names.registers, 3)[1] if names.registers in tensors else 0
    first = f"{names.blocks}.0"
    gated = _is_gated(tensors, f"{first}.{names.gated.fc1[0]}", f"{first}.{names.gated.fc2}", len(names.gated.fc1))
    inner = names.gated if gated else names.block
    hidden = shape_of(where, generation, tensors, f"{first}.{inner.fc2}.weight", 2)[1]
    heads = told(where, "heads", hints.heads, hints.settings, ("num_heads", "heads", "num_attention_heads"))
    heads = heads or HEADS.get(width)
    if heads is None:
        expected = f"a width whose heads are known ({', '.join(map(str, HEADS))})"
        raise InputError(where, expected, width, "say how many heads it has: --heads N")
    if generation == "dinov2":
        rows = shape_of(where, generation, tensors, names.position, 3)[1]
        grid = edge_of(where, names.position, rows - (not _lacks_class(style, registers)), 2)
        size = tuple(edge * grid for edge in patch)
        biases = "all"
    else:
        size = tuple(edge * (224 // edge) for edge in patch)
        biases = "all but keys" if f"{first}.{inner.qkv[0]}.bias" in tensors else "none"
    has_fc_norm = "fc_norm.weight" in tensors
    try:
        encoder = VitConfig(
            size, patch, channels, width, count_parts(where, tensors, re.escape(names.blocks)), heads, hidden,
            final_norm=not has_fc_norm, positions="learned" if generation == "dinov2" else "rope", registers=registers,
            mask_token=f"{names.prefix}mask_token" in tensors, mlp="swiglu" if gated else "gelu", layer_scale=1.0,
            qkv_bias=biases, epsilon=1e-6 if generation == "dinov2" else 1e-5,
        )  # fmt: skip
        if f"{names.head}.weight" not in tensors:
            return encoder
        outputs, features = shape_of(where, generation, tensors, f"{names.head}.weight", 2)
        pool: Literal["mean", "class", "concat"] = "mean" if has_fc_norm else "class"
        if features == 2 * width and not has_fc_norm:
            pool = "concat"
        elif features != width:
            raise InputError(where, f"'{names.head}.weight' on {width} or {2 * width} features", features)
        return ClassifierConfig(encoder, HeadConfig(outputs, pool, norm=pool != "concat"))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible model", str(error)) from error


def _lacks_class(style: str, registers: int) -> bool:
    """Tell whether the table has no row for the class token: timm's with registers."""
    return style == "timm" and registers > 0


def _is_gated(tensors: Mapping[str, Any], first: str, last: str, parts: int = 1) -> bool:
    """Tell whether an MLP has two maps: in one tensor, which is twice as high as the last map is wide, or in two."""
    names = (f"{first}.weight", f"{last}.weight")
    if not all(name in tensors for name in names):
        return False
    rows, columns = tensors[names[0]].shape[0], tensors[names[1]].shape[1]
    return parts == 2 or rows == 2 * columns


def entries(generation: Generation, config: VitConfig | ClassifierConfig, style: str = "") -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    style, _, wrapper = style.partition(" in ")
    names = NAMINGS[generation][style]
    encoder = config.encoder if isinstance(config, ClassifierConfig) else config
    width, tokens, prefix = encoder.width, encoder.num_tokens + 1, names.prefix
    found = [reshaped(f"{prefix}cls_token", "encoder/class_token", (1, 1, width), (width,))]
    if encoder.positions != "rope":
        if _lacks_class(style, encoder.registers):
            shape, target = (1, tokens - 1, width), (tokens - 1, width)
            table = reshaped(names.position, "encoder/position", shape, target)._replace(piece=(0, 1, tokens))
        else:
            table = reshaped(names.position, "encoder/position", (1, tokens, width), (tokens, width))
        found.append(table)
    if encoder.mask_token:
        shape = (1, 1, width) if (generation, style) == ("dinov3", "transformers") else (1, width)
        found.append(reshaped(f"{prefix}mask_token", "encoder/mask_token", shape, (width,)))
    if encoder.registers:
        shape = (encoder.registers, width)
        found.append(reshaped(names.registers, "encoder/register_tokens", (1, *shape), shape))
    found += patch_embedding(names.patch, "encoder/patch_embed", encoder)
    inner = names.gated if encoder.mlp == "swiglu" else names.block
    found += blocks(names.blocks, "encoder/blocks", encoder.depth, encoder.block, inner)
    if encoder.final_norm:
        found += layer_norm(names.norm, "encoder/norm", width)
    found = [entry._replace(name=f"{wrapper}{entry.name}") for entry in found]
    if isinstance(config, ClassifierConfig):
        if names.head == "head" or config.head.neighbours is not None:
            return found + timm_vit.head_entries(config.head, width)
        found += linear(names.head, "head/linear", config.head.num_features(width), config.head.outputs)
    return found


def facts(config: VitConfig | ClassifierConfig) -> Facts:
    """Return what others ask of a model."""
    if isinstance(config, ClassifierConfig):
        return Facts("classifier", config.encoder.heads, None, config.encoder.image_size, config.head.outputs)
    return Facts("encoder", config.heads, None, config.image_size)


def make_dino_model(config: VitConfig | ClassifierConfig, parts: Collection[str]) -> Model:
    """Return the model: image to tokens after the final norm, or to logits."""
    return make_model(Classifier(config)) if isinstance(config, ClassifierConfig) else vit_model(config)


def preprocess(config: VitConfig | ClassifierConfig) -> Preprocess:
    """Return how a picture becomes the input: its shorter side is resized, and the middle is cut out."""
    return picture_preprocess((config.encoder if isinstance(config, ClassifierConfig) else config).image_size)


def picture_preprocess(size: tuple[int, ...]) -> Preprocess:
    """Return the evaluation of RETFound's code: up to 224 pixels a margin of an eighth is cut away, above nothing.

    Source: RETFound, official code (timm's and torchvision's transforms).
    """
    shorter = min(size)
    return Preprocess(
        size, 3, axes="xyz", fit="cover", shorter=int(shorter / 0.875) if shorter <= 224 else shorter,
        interpolation="bicubic", intensity=IMAGENET, order="cut-then-scale",
    )  # fmt: skip


def describe(config: VitConfig | ClassifierConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    encoder = config.encoder if isinstance(config, ClassifierConfig) else config
    extra = f", {encoder.registers} registers" if encoder.registers else ""
    further = [("blocks", f"{encoder.mlp} MLPs, positions {encoder.positions}{extra}")]
    if isinstance(config, ClassifierConfig):
        kind, *lines = timm_vit.describe(config, parts, task)
        return [kind, *lines[:2], *further, *lines[2:]]
    return [("kind", "encoder: for embed, adapt and pretrain"), *timm_vit.describe_encoder(config), *further]


def resize(
    config: VitConfig | ClassifierConfig, params: Params, image_size: tuple[int, ...], how: Interpolation
) -> tuple[VitConfig | ClassifierConfig, Params]:
    """Give a model another image size: a table is interpolated, rotations need nothing."""
    if isinstance(config, ClassifierConfig):
        encoder, encoder_params = timm_vit.resize_encoder(config.encoder, params["encoder"], image_size, how)
        return dataclasses.replace(config, encoder=encoder), {**params, "encoder": encoder_params}
    encoder, encoder_params = timm_vit.resize_encoder(config, params["encoder"], image_size, how)
    return encoder, {**params, "encoder": encoder_params}


def interpolation(config: VitConfig | ClassifierConfig, style: str) -> Interpolation:
    """Return how the code that goes with the names interpolates: three public ones differ."""
    encoder = config.encoder if isinstance(config, ClassifierConfig) else config
    if style == "timm" or encoder.registers:
        return "antialias"
    return "size" if style.startswith("transformers") else "offset"


def own_record(
    generation: Generation, where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a run of a system that trains such encoders says about its parameters."""
    is_ours = "encoder/blocks/layer_0/scale1" in tensors
    if run.get("system") != "retfound" or not is_ours or ("encoder/position" in tensors) != (generation == "dinov2"):
        return None
    config = timm_vit.infer_own(where, tensors, 2)
    kind = "classifier" if isinstance(config, ClassifierConfig) else "encoder"
    return {"kind": kind, "preprocess": None, "config": to_record(config)}


def make_family(
    generation: Generation,
    title: str,
    licence: str,
    where: str,
    keys: str,
    notes: Callable[[Any, Mapping[str, Any]], tuple[str, ...]],
) -> Family:
    """Return the record of a generation; see `family.Family`."""
    return Family(
        generation, title, licence, where, keys, KINDS,
        recognises=functools.partial(recognises, generation),
        infer=functools.partial(infer, generation),
        facts=facts,
        entries=functools.partial(entries, generation),
        make_model=make_dino_model,
        preprocess=preprocess,
        notes=notes,
        describe=describe,
        own_record=functools.partial(own_record, generation),
        resize=resize,
        counters=COUNTERS,
        interpolation=interpolation,
        naming=functools.partial(naming, generation),
        renames=renamed,
    )  # fmt: skip

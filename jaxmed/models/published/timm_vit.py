"""Vision transformers under the key names of timm and MAE: what the families that use them share, in 2D and 3D.

A file holds a masked autoencoder (encoder, and as a rule decoder) or a classifier that was fine-tuned from it. Heads
"head" (linear) and "head.0, head.2, head.3" (linear, leaky ReLU, BatchNorm, linear) are classifiers.

Source: MAE, arXiv:2111.06377, and TANGERINE, arXiv:2507.01881, official codes.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmed.arrays.position import Interpolation, resize_table
from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.published.family import Facts, Hints, Kind
from jaxmed.models.published.names import (
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

KINDS = {"mae": Kind(MaeConfig, "a masked autoencoder"), "classifier": Kind(ClassifierConfig, "a classifier")}
# BatchNorm's count of batches: nothing uses it, but a file that is written again holds it again.
COUNTERS = (r"head\.[25]\.num_batches_tracked",)
HIDDEN = ("head/hidden/bias", "head/hidden_2/bias")


class Released(NamedTuple):
    """What shapes do not tell of a family's released transformers.

    Attributes:
        name: The family's.
        axes: Axes of space, 2 or 3.
        heads: Width to heads of the encoders.
        decoder_heads: Width to heads of the decoders.
        grid: (file, number of patches) -> patches along each axis; a square or cube by default.
    """

    name: str
    axes: int
    heads: Mapping[int, int]
    decoder_heads: Mapping[int, int]
    grid: Callable[[str, int], tuple[int, ...]] | None = None


def is_vit(tensors: Mapping[str, Any], axes: int, *, is_oblong: bool = False) -> bool:
    """Tell whether names are those of a transformer on patches of so many axes, of equal edges or not."""
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != axes + 2 or (len(set(kernel.shape[2:])) > 1) != is_oblong:
        return False
    return any(name.startswith("blocks.") for name in tensors)


def infer(
    released: Released, where: str, tensors: Mapping[str, Any], hints: Hints = Hints()
) -> MaeConfig | ClassifierConfig:
    """Return the sizes of a model from the shapes of its tensors; see `family.Family.infer`."""
    name, axes, settings = released.name, released.axes, hints.settings
    kernel = shape_of(where, name, tensors, "patch_embed.proj.weight", axes + 2)
    rows = shape_of(where, name, tensors, "pos_embed", 3)[1]
    find = released.grid or (lambda where, count: (edge_of(where, "pos_embed", count, axes),) * axes)
    grid = find(where, rows - 1)
    width, channels, patch = kernel[0], kernel[1], kernel[2:]
    # A stray "head." beside a decoder is not a classifier's.
    is_classifier = "decoder_embed.weight" not in tensors and any(
        name.startswith(("head.", "fc_norm.")) for name in tensors
    )
    heads = told(where, "heads", hints.heads, settings, ("num_heads", "heads", "encoder_num_heads", "n_heads"))
    names = ("decoder_num_heads", "decoder_heads", "dec_num_heads")
    decoder_heads = told(where, "decoder-heads", hints.decoder_heads, settings, names)
    with_fc_norm = is_classifier and "fc_norm.weight" in tensors
    try:
        encoder = VitConfig(
            tuple(edge * count for edge, count in zip(patch, grid, strict=True)), patch, channels, width,
            count_parts(where, tensors, "blocks"),
            _heads(where, width, heads, released.heads, "heads"), _hidden(tensors, "blocks", 4 * width),
            final_norm=not with_fc_norm,
        )  # fmt: skip
        if is_classifier:
            return ClassifierConfig(encoder, _infer_head(where, name, tensors, width))
        return _infer_decoder(where, released, tensors, encoder, decoder_heads, settings)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible model", str(error)) from error


def facts(config: MaeConfig | ClassifierConfig) -> Facts:
    """Return what others ask of a model."""
    encoder = config.encoder
    if isinstance(config, ClassifierConfig):
        return Facts("classifier", encoder.heads, None, encoder.image_size, config.head.outputs)
    return Facts("mae", encoder.heads, config.decoder_heads, encoder.image_size)


def entries(config: MaeConfig | ClassifierConfig, naming: str = "") -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    found = _encoder(config.encoder)
    if isinstance(config, ClassifierConfig):
        return found + head_entries(config.head, config.encoder.width)
    return found + _decoder(config)


def make_vit_model(config: MaeConfig | ClassifierConfig, parts: Collection[str]) -> Model:
    """Return the model of some parts: without a decoder, an autoencoder is its encoder, image to tokens."""
    if isinstance(config, ClassifierConfig):
        return make_model(Classifier(config))
    if "decoder" in parts:
        return make_model(Mae(config))
    return vit_model(config.encoder)


def describe(config: MaeConfig | ClassifierConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    fields = describe_encoder(config.encoder)
    if isinstance(config, ClassifierConfig):
        head = config.head
        inner = "".join(f", hidden layer of {width} with BatchNorm" for width in head.hidden_widths)
        if head.layers > 1:
            inner += f" of the last {head.layers} blocks"
        if head.neighbours is not None:
            inner += f", by the {head.neighbours.count} nearest of {head.neighbours.records:,} records"
        fields.append(("head", f"{head.outputs} outputs on '{head.pool}' features{inner}"))
        meaning = (
            f"{task.kind}: {', '.join(task.names)}" if task else "not told: give --task and --names when importing"
        )
        return [("kind", "classifier"), *fields, ("task", meaning)]
    if "decoder" not in parts:
        return [("kind", "mae: its encoder alone, for embed and adapt; pretrain needs the decoder too"), *fields]
    sizes = f"depth {config.decoder_depth}, heads {config.decoder_heads}, hidden {config.decoder_hidden}"
    kind = "mae: masked autoencoder, encoder and decoder"
    return [("kind", kind), *fields, ("decoder", f"width {config.decoder_width}, {sizes}")]


def describe_encoder(encoder: VitConfig) -> list[tuple[str, str]]:
    """Return the lines on an encoder's sizes."""
    size, patch = (" x ".join(map(str, sizes)) for sizes in (encoder.image_size, encoder.patch_size))
    unit = "voxels" if len(encoder.image_size) == 3 else "pixels"
    channels = f"{encoder.channels} channel{'s' * (encoder.channels > 1)}"
    return [
        ("input", f"{size} {unit}, {channels}, in patches of {patch}: {encoder.num_tokens:,} tokens"),
        ("encoder", f"width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}, hidden {encoder.hidden}"),
    ]


def resize(
    config: MaeConfig | ClassifierConfig, params: Params, image_size: tuple[int, ...], how: Interpolation = "linear"
) -> tuple[MaeConfig | ClassifierConfig, Params]:
    """Interpolate the tables of positions to images of another size.

    Raises:
        InputError: The size does not divide into patches.
    """
    encoder, encoder_params = resize_encoder(config.encoder, params["encoder"], image_size, how)
    params = {**params, "encoder": encoder_params}
    if "decoder" in params:
        table = resize_table(jnp.asarray(params["decoder"]["position"]), config.encoder.grid, encoder.grid, how=how)
        params["decoder"] = {**params["decoder"], "position": table}
    return dataclasses.replace(config, encoder=encoder), params


def resize_encoder(
    config: VitConfig, params: Params, image_size: tuple[int, ...], how: Interpolation
) -> tuple[VitConfig, Params]:
    """Interpolate an encoder's table of positions, where it has one, to images of another size.

    Raises:
        InputError: The size does not divide into patches.
    """
    try:
        resized = dataclasses.replace(config, image_size=image_size)
    except ValueError as error:
        advice = f"take multiples of {config.patch_size}"
        raise InputError("image size", "a size that the model can have", str(error), advice) from error
    if config.positions == "rope":
        return resized, params
    return resized, {
        **params,
        "position": resize_table(jnp.asarray(params["position"]), config.grid, resized.grid, how=how),
    }


def own_record(
    released: Released, where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a run of the family's own system says about its parameters."""
    if run.get("system") != released.name:
        return None
    settings = run.get("config") or {}
    if any(name.startswith("head/") for name in tensors):
        config = to_record(infer_own(where, tensors, released.axes))
        return {"kind": "classifier", "preprocess": settings.get("preprocess"), "config": config}
    return {"kind": "mae", "preprocess": settings.get("preprocess"), "config": settings.get("model")}


def infer_own(where: str, tensors: Mapping[str, Any], axes: int) -> VitConfig | ClassifierConfig:
    """Return the sizes of an encoder, or of a classifier, from its parameters.

    What shapes do not tell is taken for what is usual: equal edges, one channel in 3D and three in 2D, 224 pixels for
    rotary positions.
    """
    channels = {2: 3, 3: 1}[axes]
    block = "encoder/blocks/layer_0"
    try:
        layers = {name.split("/")[2] for name in tensors if name.startswith("encoder/blocks/")}
        width, _, heads, _ = tensors[f"{block}/attention/qkv/kernel"].shape
        voxels = len(tensors["encoder/patch_embed/kernel"]) // channels
        patch = edge_of(where, "encoder/patch_embed/kernel", voxels, axes)
        table = tensors.get("encoder/position")
        grid = 224 // patch if table is None else edge_of(where, "encoder/position", len(table) - 1, axes)
        first = tensors[f"{block}/mlp/fc1/kernel"].shape
    except KeyError as error:
        raise InputError(where, "a checkpoint of an encoder", f"no parameter {error}", "check the path") from error
    is_scaled, registers = f"{block}/scale1" in tensors, tensors.get("encoder/register_tokens")
    biases = ("all but keys" if f"{block}/attention/qkv/bias" in tensors else "none") if table is None else "all"
    pool = "class"
    if "head/norm/scale" in tensors:
        pool = "concat" if tensors["head/norm/scale"].size == 2 * width else "mean"
    encoder = VitConfig(
        (grid * patch,) * axes, (patch,) * axes, channels, width, len(layers), heads, first[-1],
        final_norm="encoder/norm/scale" in tensors,
        positions="rope" if table is None else "learned" if is_scaled else "sincos",
        registers=0 if registers is None else len(registers), mask_token="encoder/mask_token" in tensors,
        mlp="swiglu" if len(first) == 3 else "gelu", layer_scale=float(is_scaled), qkv_bias=biases,
        epsilon=1e-5 if table is None else 1e-6,
    )  # fmt: skip
    if "head/linear/bias" not in tensors:
        return encoder
    if pool == "class" and not encoder.final_norm:
        pool = "concat" if len(tensors["head/linear/kernel"]) == 2 * width else "mean"
    inner, second = (tensors[name].size if name in tensors else 0 for name in HIDDEN)
    head = HeadConfig(
        tensors["head/linear/bias"].size, pool, inner, norm="head/norm/scale" in tensors or pool == "class",
        second_hidden=second,
    )  # fmt: skip
    return ClassifierConfig(encoder, head)


def _encoder(config: VitConfig) -> list[Entry]:
    width, tokens = config.width, config.num_tokens + 1
    found = [
        reshaped("cls_token", "encoder/class_token", (1, 1, width), (width,)),
        reshaped("pos_embed", "encoder/position", (1, tokens, width), (tokens, width)),
        *patch_embedding("patch_embed.proj", "encoder/patch_embed", config),
        *blocks("blocks", "encoder/blocks", config.depth, config.block),
    ]
    if config.final_norm:
        found += layer_norm("norm", "encoder/norm", width)
    return found


def _decoder(config: MaeConfig) -> list[Entry]:
    encoder, width, tokens = config.encoder, config.decoder_width, config.encoder.num_tokens + 1
    voxels = patch_embedding("", "", encoder)[0].target[0]
    # The number is the place in a Sequential with the sigmoid.
    prediction = "decoder_pred.0" if config.sigmoid else "decoder_pred"
    return [
        *linear("decoder_embed", "decoder/embed", encoder.width, width),
        reshaped("mask_token", "decoder/mask_token", (1, 1, width), (width,)),
        reshaped("decoder_pos_embed", "decoder/position", (1, tokens, width), (tokens, width)),
        *blocks("decoder_blocks", "decoder/blocks", config.decoder_depth, config.block),
        *layer_norm("decoder_norm", "decoder/norm", width),
        *linear(prediction, "decoder/prediction", width, voxels),
    ]


def head_entries(config: HeadConfig, width: int) -> list[Entry]:
    """Return the tensors of a classifier's head."""
    features = config.num_features(width)
    found = [] if config.pool == "class" or not config.norm else [*layer_norm("fc_norm", "head/norm", features)]
    if config.neighbours is not None:  # nobody's names
        rows, outputs = config.neighbours.records, config.outputs
        sizes = {"bank": (rows, features), "targets": (rows, outputs), "known": (rows, outputs)}
        return found + [reshaped(f"head.{name}", f"head/vote/{name}", size, size) for name, size in sizes.items()]
    if not config.hidden:
        return [*found, *linear("head", "head/linear", features, config.outputs)]
    for number, (ending, hidden) in enumerate(zip(("", "_2"), config.hidden_widths, strict=False)):
        size, first = (hidden,), 3 * number
        found += linear(f"head.{first}", f"head/hidden{ending}", features, hidden)
        found += layer_norm(f"head.{first + 2}", f"head/batch_norm{ending}", hidden)
        found += [
            reshaped(f"head.{first + 2}.running_mean", f"head/batch_norm{ending}/mean", size, size),
            reshaped(f"head.{first + 2}.running_var", f"head/batch_norm{ending}/var", size, size),
        ]
        features = hidden
    last = 3 * len(config.hidden_widths)
    return [*found, *linear(f"head.{last}", "head/linear", features, config.outputs)]


def _infer_decoder(
    where: str, released: Released, tensors: Mapping[str, Any], encoder: VitConfig, decoder_heads: int | None,
    settings: Mapping[str, Any],
) -> MaeConfig:  # fmt: skip
    if "decoder_embed.weight" not in tensors:
        # Only the encoder counts then; the decoder's sizes are the published ones.
        return MaeConfig(encoder)
    sigmoid, ratio = "decoder_pred.weight" not in tensors, settings.get("mask_ratio")
    width = shape_of(where, released.name, tensors, "decoder_embed.weight", 2)[0]
    config = MaeConfig(
        encoder,
        decoder_width=width,
        decoder_depth=count_parts(where, tensors, "decoder_blocks"),
        decoder_heads=_heads(where, width, decoder_heads, released.decoder_heads, "decoder-heads"),
        decoder_hidden=_hidden(tensors, "decoder_blocks", 4 * width),
        # Normalised targets and a sigmoid exclude each other: `notes` says where a file claims both.
        norm_target=settings.get("norm_pix_loss") is True and not sigmoid,
        sigmoid=sigmoid,
    )
    return dataclasses.replace(config, mask_ratio=ratio) if isinstance(ratio, float) and 0 < ratio < 1 else config


def _infer_head(where: str, family: str, tensors: Mapping[str, Any], width: int) -> HeadConfig:
    places = {int(match[1]) for name in tensors if (match := re.match(r"head\.(\d{1,9})\.", name))}
    # Linear, leaky ReLU and BatchNorm, once or twice, then linear.
    odd = places - {0, 2, 3, 5, 6}
    if odd or (5 in places and 6 not in places):
        expected = "a head with at most one hidden layer, or two with leaky ReLU and BatchNorm each"
        raise InputError(where, expected, f"'head.{min(odd, default=5)}'", "such heads are not built")
    if "fc_norm.weight" not in tensors:
        pool = "class"
    else:
        features = shape_of(where, family, tensors, "fc_norm.weight", 1)[0]
        pool = "mean" if features == width else "concat"
    if "head.0.weight" in tensors:
        widths = [shape_of(where, family, tensors, f"head.{place}.weight", 2)[0] for place in sorted(places - {2, 5})]
        return HeadConfig(widths[-1], pool, widths[0], second_hidden=widths[1] if len(widths) > 2 else 0)
    return HeadConfig(shape_of(where, family, tensors, "head.weight", 2)[0], pool)


def _hidden(tensors: Mapping[str, Any], stem: str, otherwise: int) -> int:
    """Return the width inside the MLPs; of a missing one, the usual, since that is told as missing later."""
    pattern = re.compile(rf"{stem}\.\d+\.mlp\.fc1\.bias$")
    return next((len(tensor) for name, tensor in tensors.items() if pattern.match(name)), otherwise)


def _heads(where: str, width: int, heads: int | None, published: Mapping[int, int], option: str) -> int:
    heads = published.get(width) if heads is None else heads
    if heads is None:
        expected = f"a published width ({', '.join(map(str, published))}), whose number of heads is known"
        raise InputError(where, expected, width, f"shapes do not tell heads: jaxmed weights import --{option} N")
    return heads

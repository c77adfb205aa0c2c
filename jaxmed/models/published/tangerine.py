"""TANGERINE's weights: key names of the released 3D-MAE code, and sizes from the shapes of the tensors.

A file holds a masked autoencoder (encoder, and as a rule decoder) or a classifier that was fine-tuned from it. Number
of heads and normalisation of targets leave no trace in shapes: the published widths have known heads, for others they
have to be told.

Source: TANGERINE, arXiv:2507.01881, and the official code. Heads "head" (linear) and "head.0, head.2, head.3" (linear,
leaky ReLU, BatchNorm, linear) are its two classifiers.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.errors import InputError
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.names import (
    Entry,
    blocks,
    count_parts,
    cube_root,
    layer_norm,
    linear,
    patch_embedding,
    reshaped,
    shape_of,
    told,
)
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.vit import VitConfig

NAME = "tangerine"
TITLE = "TANGERINE, a 3D masked autoencoder for low-dose chest CT (arXiv:2507.01881)"
LICENCE = "CC-BY-NC 4.0: no commercial use, name the authors"
WHERE = (
    "mae_pretrained.pth, encoder and decoder, in the public research archive that the model card of the official code "
    "(3D-MAE-MedImaging) names: record 18835750"
)
KEYS = (
    "cls_token, pos_embed, patch_embed.proj.*, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*, norm.*, "
    "decoder_embed.*, mask_token, decoder_pos_embed, decoder_blocks.N.*, decoder_norm.*, decoder_pred.0.*; "
    "fine-tuned: no norm.* and no decoder, but fc_norm.* and head.*"
)

# Width to heads and blocks, of the encoders and of the decoder in the official code.
HEADS = {768: 12, 1024: 16, 1280: 16}
DEPTHS = {768: 12, 1024: 24, 1280: 32}
DECODER_HEADS = {512: 16}
# BatchNorm's count of batches: nothing uses it, but a file that is written again holds it again.
COUNTERS = ("head.2.num_batches_tracked", "head.5.num_batches_tracked")


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family: a transformer on three-dimensional patches."""
    kernel = tensors.get("patch_embed.proj.weight")
    return kernel is not None and kernel.ndim == 5 and any(name.startswith("blocks.") for name in tensors)


def infer(
    where: str,
    tensors: Mapping[str, Any],
    heads: int | None = None,
    decoder_heads: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> MaeConfig | ClassifierConfig:
    """Return the sizes of a model from the shapes of its tensors.

    Args:
        where: The file, for messages.
        tensors: By their original names.
        heads: Of the encoder; needed for widths that were not published.
        decoder_heads: Of the decoder, likewise.
        settings: The arguments of the training code, where the file holds them: heads, mask ratio, target.

    Raises:
        InputError: Tensors that tell sizes are missing or contradict each other, or heads are unknown.
    """
    kernel = _shape(where, tensors, "patch_embed.proj.weight", 5)
    rows = _shape(where, tensors, "pos_embed", 3)[1]
    grid = cube_root(where, "pos_embed", rows - 1)
    width, channels, patch = kernel[0], kernel[1], kernel[2:]
    image_size = (patch[0] * grid, patch[1] * grid, patch[2] * grid)
    # A stray "head." beside a decoder is not a classifier's.
    is_classifier = "decoder_embed.weight" not in tensors and any(
        name.startswith(("head.", "fc_norm.")) for name in tensors
    )
    heads = told(where, "heads", heads, settings, ("num_heads", "heads", "encoder_num_heads", "n_heads"))
    names = ("decoder_num_heads", "decoder_heads", "dec_num_heads")
    decoder_heads = told(where, "decoder-heads", decoder_heads, settings, names)
    with_fc_norm = is_classifier and "fc_norm.weight" in tensors
    try:
        encoder = VitConfig(
            image_size, patch, channels, width, count_parts(where, tensors, "blocks"),
            _heads(where, width, heads, HEADS, "heads"), _hidden(tensors, "blocks", 4 * width),
            final_norm=not with_fc_norm,
        )  # fmt: skip
        if is_classifier:
            return ClassifierConfig(encoder, _infer_head(where, tensors, width))
        return _infer_decoder(where, tensors, encoder, decoder_heads, settings)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible model", str(error)) from error


def entries(config: MaeConfig | ClassifierConfig) -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    encoder = config.encoder
    found = _encoder(encoder)
    if isinstance(config, ClassifierConfig):
        return found + _head(config.head, encoder.width)
    return found + _decoder(config)


def preprocess(config: MaeConfig | ClassifierConfig) -> Preprocess:
    """Return what the weights expect of a scan.

    Source: TANGERINE, official code (see `preprocess.Preprocess`).
    """
    x, y, z = config.encoder.image_size
    return Preprocess(size=(x, y, z))


def notes(config: MaeConfig | ClassifierConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say how the sizes of a file differ from the published ones, and what its arguments contradict."""
    width, depth = config.encoder.width, config.encoder.depth
    published, found = DEPTHS.get(width, depth), []
    if depth != published:
        found.append(f"the encoder has {depth} blocks; the published one of width {width} has {published}")
    if isinstance(config, MaeConfig) and config.sigmoid and settings.get("norm_pix_loss") is True:
        found.append(
            "its arguments say norm_pix_loss, which no sigmoid can predict: its reconstructions are not images"
        )
    return tuple(found)


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


def _head(config: HeadConfig, width: int) -> list[Entry]:
    features = 2 * width if config.pool == "concat" else width
    found = [] if config.pool == "class" or not config.norm else [*layer_norm("fc_norm", "head/norm", features)]
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
    where: str, tensors: Mapping[str, Any], encoder: VitConfig, decoder_heads: int | None, settings: Mapping[str, Any]
) -> MaeConfig:
    if "decoder_embed.weight" not in tensors:
        # Only the encoder counts then; the decoder's sizes are the published ones.
        return MaeConfig(encoder)
    sigmoid, ratio = "decoder_pred.weight" not in tensors, settings.get("mask_ratio")
    width = _shape(where, tensors, "decoder_embed.weight", 2)[0]
    config = MaeConfig(
        encoder,
        decoder_width=width,
        decoder_depth=count_parts(where, tensors, "decoder_blocks"),
        decoder_heads=_heads(where, width, decoder_heads, DECODER_HEADS, "decoder-heads"),
        decoder_hidden=_hidden(tensors, "decoder_blocks", 4 * width),
        # Normalised targets and a sigmoid exclude each other: `notes` says where a file claims both.
        norm_target=settings.get("norm_pix_loss") is True and not sigmoid,
        sigmoid=sigmoid,
    )
    return dataclasses.replace(config, mask_ratio=ratio) if isinstance(ratio, float) and 0 < ratio < 1 else config


def _infer_head(where: str, tensors: Mapping[str, Any], width: int) -> HeadConfig:
    places = {int(match[1]) for name in tensors if (match := re.match(r"head\.(\d{1,9})\.", name))}
    # Linear, leaky ReLU and BatchNorm, once or twice, then linear.
    odd = places - {0, 2, 3, 5, 6}
    if odd or (5 in places and 6 not in places):
        expected = "a head with at most one hidden layer, or two with leaky ReLU and BatchNorm each"
        raise InputError(where, expected, f"'head.{min(odd, default=5)}'", "such heads are not built")
    if "fc_norm.weight" not in tensors:
        pool = "class"
    else:
        features = _shape(where, tensors, "fc_norm.weight", 1)[0]
        pool = "mean" if features == width else "concat"
    if "head.0.weight" in tensors:
        widths = [_shape(where, tensors, f"head.{place}.weight", 2)[0] for place in sorted(places - {2, 5})]
        return HeadConfig(widths[-1], pool, widths[0], second_hidden=widths[1] if len(widths) > 2 else 0)
    return HeadConfig(_shape(where, tensors, "head.weight", 2)[0], pool)


def _shape(where: str, tensors: Mapping[str, Any], name: str, dimensions: int) -> tuple[int, ...]:
    return shape_of(where, NAME, tensors, name, dimensions)


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

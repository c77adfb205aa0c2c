"""Tensors of a 3D ConvNeXt V2, of its decoders, and their parameters: dense kernels, and those of sparse convolutions.

A sparse kernel lists its places with the first axis of space running fastest: place x K^2 + y K + z of K^3 is the dense
kernel's [z, y, x]. That of a single place has no axis of places.

Source: ProFound, arXiv:2603.03961, official code.
"""

from jaxmed.models.convnext import EXPANSION, ConvNextConfig
from jaxmed.models.fcmae import FcmaeConfig
from jaxmed.models.published.names import Entry, layer_norm, linear, reshaped
from jaxmed.models.upernet import UperNetConfig

SPACE = 3


def encoder_entries(config: ConvNextConfig, prefix: str, *, is_sparse: bool = False) -> list[Entry]:
    """Return the tensors of an encoder, without the norm that follows it."""
    found: list[Entry] = []
    number, before = 0, config.channels
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        theirs, ours = f"{prefix}downsample_layers.{stage}", f"encoder/downsample_{number}"
        norm = f"encoder/downsample_norm_{number}"
        if stage == 0:  # the stem is dense in either
            found += [*conv(f"{theirs}.0", ours, before, width, config.stem), *layer_norm(f"{theirs}.1", norm, width)]
        else:
            edge, ending = config.strides[stage - 1], ".ln" if is_sparse else ""
            found += layer_norm(f"{theirs}.0{ending}", norm, before)
            make = sparse_conv if is_sparse else conv
            found += make(f"{theirs}.1", ours, before, width, edge)
        for place in range(depth):
            name, path = f"{prefix}stages.{stage}.{place}", f"encoder/block_{number}"
            found += block_entries(name, path, width, config.kernel_size, is_sparse=is_sparse)
            number += 1
        before = width
    return found


def block_entries(name: str, path: str, width: int, edge: int, *, is_sparse: bool = False) -> list[Entry]:
    """Return the tensors of one block."""
    inner = EXPANSION * width
    shape = (1, inner) if is_sparse else (1, 1, 1, 1, inner)
    ln, lin = (".ln", ".linear") if is_sparse else ("", "")
    return [
        *(sparse_depthwise if is_sparse else depthwise)(f"{name}.dwconv", f"{path}/depthwise", width, edge),
        *layer_norm(f"{name}.norm{ln}", f"{path}/norm", width),
        *linear(f"{name}.pwconv1{lin}", f"{path}/fc1", width, inner),
        reshaped(f"{name}.grn.gamma", f"{path}/response/scale", shape, (inner,)),
        reshaped(f"{name}.grn.beta", f"{path}/response/bias", shape, (inner,)),
        *linear(f"{name}.pwconv2{lin}", f"{path}/fc2", inner, width),
    ]


def decoder_entries(config: FcmaeConfig) -> list[Entry]:
    """Return the tensors of the decoder of a masked autoencoder, which is dense."""
    width, encoder = config.decoder_width, config.encoder
    voxels = encoder.channels
    for edge in encoder.patch_size:
        voxels *= edge
    found = [
        *point("proj", "decoder/embed", encoder.widths[-1], width),
        reshaped("mask_token", "decoder/mask_token", (1, width, 1, 1, 1), (width,)),
    ]
    for number in range(config.decoder_depth):
        found += block_entries(f"decoder.{number}", f"decoder/block_{number}", width, encoder.kernel_size)
    return [*found, *point("pred", "decoder/prediction", width, voxels)]


def upernet_entries(config: UperNetConfig) -> list[Entry]:
    """Return the tensors of a segmenter, without those of its encoder."""
    widths, width, found = config.encoder.widths, config.width, list[Entry]()
    for stage, channels in enumerate(widths):
        found += layer_norm(f"hidden_norm.{stage}", f"hidden_norm/norm_{stage}", channels)
    last = widths[-1]
    for number in range(len(config.pools)):
        found += unit(f"decode_head.psp_modules.{number}.1", f"decoder/pool_{number}", last, width, 1)
    found += unit("decode_head.bottleneck", "decoder/bottleneck", last + len(config.pools) * width, width, 3)
    for stage, channels in enumerate(widths[:-1]):
        found += unit(f"decode_head.lateral_convs.{stage}", f"decoder/lateral_{stage}", channels, width, 1)
        found += unit(f"decode_head.fpn_convs.{stage}", f"decoder/level_{stage}", width, width, 3)
    found += unit("decode_head.fpn_bottleneck", "decoder/fusion", len(widths) * width, width, 3)
    found += conv("decode_head.classifier", "decoder/classifier", width, config.classes, 1)
    if config.auxiliary_width:
        inner = config.auxiliary_width
        found += unit("auxiliary_head.convs.0", "auxiliary/unit", widths[2], inner, 3)
        found += conv("auxiliary_head.classifier", "auxiliary/classifier", inner, config.classes, 1)
    return found


def conv(name: str, path: str, inputs: int, outputs: int, edge: int) -> list[Entry]:
    """Return weight and bias of a dense convolution."""
    window = (edge,) * SPACE
    kernel = Entry(
        f"{name}.weight", f"{path}/kernel", (outputs, inputs, *window), (2, 3, 4, 1, 0), (*window, inputs, outputs)
    )
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (outputs,), (outputs,))]


def point(name: str, path: str, inputs: int, outputs: int) -> list[Entry]:
    """Return a convolution of one place, which is a linear map here."""
    kernel = Entry(f"{name}.weight", f"{path}/kernel", (outputs, inputs, 1, 1, 1), (2, 3, 4, 1, 0), (inputs, outputs))
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (outputs,), (outputs,))]


def unit(name: str, path: str, inputs: int, outputs: int, edge: int) -> list[Entry]:
    """Return a convolution without bias and the norm after it, which the released code calls a batch norm."""
    kernel, _ = conv(f"{name}.conv", f"{path}/conv", inputs, outputs, edge)
    return [kernel, *layer_norm(f"{name}.batch_norm", f"{path}/norm", outputs)]


def depthwise(name: str, path: str, width: int, edge: int) -> list[Entry]:
    """Return weight and bias of a dense depthwise convolution."""
    window = (edge,) * SPACE
    kernel = Entry(f"{name}.weight", f"{path}/kernel", (width, 1, *window), (2, 3, 4, 1, 0), (*window, 1, width))
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (width,), (width,))]


def sparse_depthwise(name: str, path: str, width: int, edge: int) -> list[Entry]:
    """Return kernel [place, channel] and bias [1, channel] of a sparse depthwise convolution."""
    window = (edge,) * SPACE
    kernel = Entry(
        f"{name}.kernel", f"{path}/kernel", (edge**SPACE, width), (2, 1, 0, 3), (*window, 1, width),
        view=(*window, width),
    )  # fmt: skip
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (1, width), (width,))]


def sparse_conv(name: str, path: str, inputs: int, outputs: int, edge: int) -> list[Entry]:
    """Return kernel [place, input, output], without places where there is one, and bias [1, output]."""
    window = (edge,) * SPACE
    places = () if edge == 1 else (edge**SPACE,)
    kernel = Entry(
        f"{name}.kernel", f"{path}/kernel", (*places, inputs, outputs), (2, 1, 0, 3, 4), (*window, inputs, outputs),
        view=(*window, inputs, outputs),
    )  # fmt: skip
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (1, outputs), (outputs,))]

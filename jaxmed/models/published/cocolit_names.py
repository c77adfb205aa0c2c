"""Tensors of CoCoLIT's networks and our parameters: the key names of MONAI GenerativeModels and of MONAI's core."""

from jaxmed.models.autoencoder_kl import AutoencoderKlConfig
from jaxmed.models.published.names import Entry, layer_norm, linear, reshaped
from jaxmed.models.unet_latent import ControlNetConfig, LatentUnetConfig

# Maps of one voxel between encoder, latent and decoder.
MAPS = (("quant_conv_mu", "to_mean"), ("quant_conv_log_sigma", "to_log_variance"), ("post_quant_conv", "from_latent"))


def autoencoder_entries(config: AutoencoderKlConfig) -> list[Entry]:
    """Return every tensor of an autoencoder and its parameter."""
    dims, latent, widths = config.dimensions, config.latent_channels, config.widths
    found = _conv("encoder.blocks.0.conv.conv", "encoder/stem", dims, config.channels, widths[0])
    number, inputs = 1, widths[0]
    for level, (width, count) in enumerate(zip(widths, config.blocks, strict=True)):
        for index in range(count):
            found += _vae_block(f"encoder.blocks.{number}", f"encoder/block_{level}_{index}", dims, inputs, width)
            number, inputs = number + 1, width
        if level + 1 < len(widths):
            found += _conv(f"encoder.blocks.{number}.conv.conv.conv", f"encoder/down_{level}", dims, width, width)
            number += 1
    found += layer_norm(f"encoder.blocks.{number}", "encoder/norm", widths[-1])
    found += _conv(f"encoder.blocks.{number + 1}.conv.conv", "encoder/head", dims, widths[-1], latent)
    maps = (
        ("quant_conv_mu", "to_mean"),
        ("quant_conv_log_sigma", "to_log_variance"),
        ("post_quant_conv", "from_latent"),
    )
    for theirs, ours in maps:
        found += _conv(f"{theirs}.conv", ours, dims, latent, latent, edge=1)
    found += _conv("decoder.blocks.0.conv.conv", "decoder/stem", dims, latent, widths[-1])
    number, inputs = 1, widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        for index in range(config.blocks[level]):
            found += _vae_block(f"decoder.blocks.{number}", f"decoder/block_{level}_{index}", dims, inputs, width)
            number, inputs = number + 1, width
        if level:
            found += _conv(f"decoder.blocks.{number}.conv.conv.conv", f"decoder/up_{level}", dims, width, width)
            number += 1
    found += layer_norm(f"decoder.blocks.{number}", "decoder/norm", widths[0])
    return [*found, *_conv(f"decoder.blocks.{number + 1}.conv.conv", "decoder/head", dims, widths[0], config.outputs)]


def unet_entries(config: LatentUnetConfig, naming: str) -> list[Entry]:
    """Return every tensor of a U-Net and its parameter; decoder levels are numbered from the coarsest in files."""
    found, skips, inputs = _encoder(config, naming), config.skip_widths(), config.widths[-1]
    for number, level in enumerate(reversed(range(len(config.widths)))):
        width, name, path = config.widths[level], f"up_blocks.{number}", f"up_{level}"
        for index in range(config.blocks[level] + 1):
            theirs, ours = f"{name}.resnets.{index}", f"{path}/block_{index}"
            found += _block(theirs, ours, config, inputs + skips.pop(), width)
            inputs = width
            if config.attention_levels[level]:
                found += _attention(f"{name}.attentions.{index}", f"{path}/attention_{index}", config, width, naming)
        if level and config.resblock_updown:
            found += _block(f"{name}.upsampler", f"{path}/resample", config, width, width)
        elif level:
            conv = "postconv.conv" if naming or config.projection else "conv.conv"
            found += _conv(f"{name}.upsampler.{conv}", f"{path}/resample", config.dimensions, width, width)
    found += layer_norm("out.0", "norm", config.widths[0])
    return [*found, *_conv("out.2.conv", "head", config.dimensions, config.widths[0], config.outputs)]


def control_entries(config: ControlNetConfig, naming: str) -> list[Entry]:
    """Return every tensor of a ControlNet and its parameter."""
    unet, dims = config.unet, config.unet.dimensions
    found, name, widths = _encoder(unet, naming), "controlnet_cond_embedding", config.condition_widths
    found += _conv(f"{name}.conv_in.conv", "condition/stem", dims, config.condition_channels, widths[0])
    for pair, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        found += _conv(f"{name}.blocks.{2 * pair}.conv", f"condition/conv_{pair}", dims, inputs, inputs)
        found += _conv(f"{name}.blocks.{2 * pair + 1}.conv", f"condition/down_{pair}", dims, inputs, outputs)
    found += _conv(f"{name}.conv_out.conv", "condition/head", dims, widths[-1], unet.widths[0])
    for number, width in enumerate(unet.skip_widths()):
        theirs = f"controlnet_down_blocks.{number}" + (".conv" if number else "")  # the first one is bare
        found += _conv(theirs, f"skip_{number}", dims, width, width, edge=1)
    return [*found, *_conv("controlnet_mid_block.conv", "after_middle", dims, unet.widths[-1], unet.widths[-1], edge=1)]


def _vae_block(name: str, path: str, dims: int, inputs: int, outputs: int) -> list[Entry]:
    found = [
        *layer_norm(f"{name}.norm1", f"{path}/norm1", inputs),
        *_conv(f"{name}.conv1.conv.conv", f"{path}/conv1", dims, inputs, outputs),
        *layer_norm(f"{name}.norm2", f"{path}/norm2", outputs),
        *_conv(f"{name}.conv2.conv.conv", f"{path}/conv2", dims, outputs, outputs),
    ]
    if inputs != outputs:
        found += _conv(f"{name}.nin_shortcut.conv.conv", f"{path}/skip", dims, inputs, outputs, edge=1)
    return found


def _encoder(config: LatentUnetConfig, naming: str) -> list[Entry]:
    inputs = config.widths[0]
    found = _conv("conv_in.conv", "encoder/stem", config.dimensions, config.channels, inputs)
    found += linear("time_embed.0", "encoder/time/fc1", inputs, config.time_width)
    found += linear("time_embed.2", "encoder/time/fc2", config.time_width, config.time_width)
    for level, width in enumerate(config.widths):
        name, path = f"down_blocks.{level}", f"encoder/down_{level}"
        for index in range(config.blocks[level]):
            found += _block(f"{name}.resnets.{index}", f"{path}/block_{index}", config, inputs, width)
            inputs = width
            if config.attention_levels[level]:
                found += _attention(f"{name}.attentions.{index}", f"{path}/attention_{index}", config, width, naming)
        if level + 1 < len(config.widths) and config.resblock_updown:
            found += _block(f"{name}.downsampler", f"{path}/resample", config, width, width)
        elif level + 1 < len(config.widths):
            found += _conv(f"{name}.downsampler.op.conv", f"{path}/resample", config.dimensions, width, width)
    for index in range(2):
        found += _block(f"middle_block.resnet_{index + 1}", f"encoder/middle/block_{index}", config, inputs, inputs)
    return [*found, *_attention("middle_block.attention", "encoder/middle/attention_0", config, inputs, naming)]


def _block(name: str, path: str, config: LatentUnetConfig, inputs: int, outputs: int) -> list[Entry]:
    dims = config.dimensions
    found = [
        *layer_norm(f"{name}.norm1", f"{path}/norm1", inputs),
        *_conv(f"{name}.conv1.conv", f"{path}/conv1", dims, inputs, outputs),
        *linear(f"{name}.time_emb_proj", f"{path}/embed", config.time_width, outputs),
        *layer_norm(f"{name}.norm2", f"{path}/norm2", outputs),
        *_conv(f"{name}.conv2.conv", f"{path}/conv2", dims, outputs, outputs),
    ]
    if inputs != outputs:
        found += _conv(f"{name}.skip_connection.conv", f"{path}/skip", dims, inputs, outputs, edge=1)
    return found


def _attention(name: str, path: str, config: LatentUnetConfig, width: int, naming: str) -> list[Entry]:
    """Return a norm and the maps of attention; ours are split into heads before queries, keys and values."""
    heads = config.heads_of(width)
    depth, qkv = width // heads, f"{path}/qkv"
    found = list(layer_norm(f"{name}.norm", f"{path}/norm", width))
    inner = f"{name}.attn" if naming or config.projection else name
    if naming == "combined":
        view, split = (3, heads, depth, width), (heads, 3, depth)
        found += [
            Entry(f"{inner}.qkv.weight", f"{qkv}/kernel", (3 * width, width), (3, 1, 0, 2), (width, *split), view=view),
            Entry(f"{inner}.qkv.bias", f"{qkv}/bias", (3 * width,), (1, 0, 2), split, view=view[:3]),
        ]
    else:
        for number, part in enumerate("qkv"):
            kernel, bias = linear(f"{inner}.to_{part}", qkv, width, width, (heads, 1, depth))
            found += [kernel._replace(piece=(2, number, 3)), bias._replace(piece=(1, number, 3))]
    return [*found, *linear(f"{inner}.out_proj", f"{path}/out", width, width)] if config.projection else found


def _conv(name: str, path: str, dims: int, inputs: int, outputs: int, edge: int = 3) -> list[Entry]:
    window, axes = (edge,) * dims, (*range(2, dims + 2), 1, 0)
    return [
        Entry(f"{name}.weight", f"{path}/kernel", (outputs, inputs, *window), axes, (*window, inputs, outputs)),
        reshaped(f"{name}.bias", f"{path}/bias", (outputs,), (outputs,)),
    ]

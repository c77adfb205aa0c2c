"""The guided-diffusion U-Net in plain PyTorch under the official key names; written from the specification."""

import dataclasses
import math

import torch
from drawn_weights import draw
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the official class is told; `attention` by down-sampling factor."""

    channels: int = 1
    outputs: int = 1
    width: int = 32
    multipliers: tuple = (1, 2)
    blocks: int = 1
    attention: tuple = (2,)
    heads: int = 4
    head_channels: int = -1
    scale_shift: bool = True
    updown: bool = False
    dimensions: int = 2


# The plain form with skips of 1 x 1 and attention at two levels; and the form of the released networks.
PLAIN = Sizes(width=32, multipliers=(1, 2, 2), attention=(2, 4))
RELEASED = Sizes(3, 6, 32, (1, 2), 2, (2,), head_channels=16, updown=True)
ADDED = Sizes(width=32, multipliers=(1, 1), attention=(), scale_shift=False)
VOLUME = Sizes(width=32, multipliers=(1, 2), attention=(2,), dimensions=3)
# Resampled inside residual blocks, and small enough to be stored.
THIN = Sizes(width=32, multipliers=(1, 1), attention=(), head_channels=16, updown=True, dimensions=3)


def conv(dimensions, *arguments, **options):
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](*arguments, **options)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-5)


def nearest(x):
    """Double the last two axes: of volumes the first stays, as in the official class."""
    return functional.interpolate(x, scale_factor=(1, 2, 2) if x.ndim == 5 else 2, mode="nearest")


class Block(nn.Module):
    def __init__(self, sizes, inputs, outputs, resample=""):
        super().__init__()
        self.sizes, self.resample = sizes, resample
        n = sizes.dimensions
        self.in_layers = nn.Sequential(norm(inputs), nn.SiLU(), conv(n, inputs, outputs, 3, padding=1))
        columns = 2 * outputs if sizes.scale_shift else outputs
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * sizes.width, columns))
        last = conv(n, outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(norm(outputs), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if inputs == outputs else conv(n, inputs, outputs, 1)

    def resize(self, x):
        if self.resample == "down":
            return functional.avg_pool2d(x, 2) if x.ndim == 4 else functional.avg_pool3d(x, (1, 2, 2))
        return nearest(x) if self.resample == "up" else x

    def forward(self, x, time):
        h = self.in_layers[2](self.resize(self.in_layers[1](self.in_layers[0](x))))
        x = self.resize(x)
        embedded = self.emb_layers(time)[(...,) + (None,) * self.sizes.dimensions]
        if self.sizes.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + embedded)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, sizes, channels):
        super().__init__()
        self.heads = sizes.heads if sizes.head_channels == -1 else channels // sizes.head_channels
        self.norm = norm(channels)
        self.qkv = conv(1, channels, 3 * channels, 1)
        self.proj_out = conv(1, channels, channels, 1)

    def forward(self, x):
        batch, channels, *space = x.shape
        flat = x.reshape(batch, channels, -1)
        depth = channels // self.heads
        split = self.qkv(self.norm(flat)).reshape(batch * self.heads, 3 * depth, -1)  # heads before q, k, v
        query, key, value = split.split(depth, dim=1)
        scale = depth**-0.25
        weights = torch.softmax(torch.einsum("bct,bcs->bts", query * scale, key * scale), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, value).reshape(batch, channels, -1)
        return (flat + self.proj_out(mixed)).reshape(batch, channels, *space)


class Down(nn.Module):
    def __init__(self, sizes, channels):
        super().__init__()
        stride = (1, 2, 2) if sizes.dimensions == 3 else 2
        self.op = conv(sizes.dimensions, channels, channels, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, sizes, channels):
        super().__init__()
        self.conv = conv(sizes.dimensions, channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(nearest(x))


def run(part, h, time):
    for layer in part:
        h = layer(h, time) if isinstance(layer, Block) else layer(h)
    return h


class Unet(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        first = sizes.width * sizes.multipliers[0]
        embedded = 4 * sizes.width
        self.time_embed = nn.Sequential(nn.Linear(sizes.width, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        parts = [nn.Sequential(conv(sizes.dimensions, sizes.channels, first, 3, padding=1))]
        skips, channels, factor = [first], first, 1
        last = len(sizes.multipliers) - 1
        for level, multiplier in enumerate(sizes.multipliers):
            for _ in range(sizes.blocks):
                layers = [Block(sizes, channels, sizes.width * multiplier)]
                channels = sizes.width * multiplier
                if factor in sizes.attention:
                    layers.append(Attention(sizes, channels))
                parts.append(nn.Sequential(*layers))
                skips.append(channels)
            if level < last:
                halved = Block(sizes, channels, channels, "down") if sizes.updown else Down(sizes, channels)
                parts.append(nn.Sequential(halved))
                skips.append(channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(parts)
        middle = [Block(sizes, channels, channels), Attention(sizes, channels), Block(sizes, channels, channels)]
        self.middle_block = nn.Sequential(*middle)
        parts = []
        for level in range(last, -1, -1):
            for number in range(sizes.blocks + 1):
                layers = [Block(sizes, channels + skips.pop(), sizes.width * sizes.multipliers[level])]
                channels = sizes.width * sizes.multipliers[level]
                if factor in sizes.attention:
                    layers.append(Attention(sizes, channels))
                if level and number == sizes.blocks:
                    layers.append(Block(sizes, channels, channels, "up") if sizes.updown else Up(sizes, channels))
                    factor //= 2
                parts.append(nn.Sequential(*layers))
        self.output_blocks = nn.ModuleList(parts)
        last_conv = conv(sizes.dimensions, channels, sizes.outputs, 3, padding=1)
        self.out = nn.Sequential(norm(channels), nn.SiLU(), last_conv)

    def embed(self, t):
        half = self.sizes.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t.float()[:, None] * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))

    def forward(self, x, t):
        """Return the prediction, and what every part handed on."""
        time, h, kept, trace = self.embed(t), x, [], {}
        for number, part in enumerate(self.input_blocks):
            h = run(part, h, time)
            kept.append(h)
            trace[f"input_{number}"] = h
        h = run(self.middle_block, h, time)
        trace["middle"] = h
        for number, part in enumerate(self.output_blocks):
            h = run(part, torch.cat([h, kept.pop()], dim=1), time)
            trace[f"output_{number}"] = h
        return self.out(h), trace


def fill(model):
    """Give every parameter the values of `drawn_weights.draw`."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
    return model.eval()

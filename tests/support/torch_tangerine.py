"""TANGERINE's two models in plain PyTorch, under the key names of the released code; written from the specification."""

import dataclasses
import math

import numpy as np
import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Edges of the image and its patches in voxels, then encoder and decoder."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int = 20
    decoder_depth: int = 1
    decoder_heads: int = 2

    @property
    def grid(self):
        return self.image // self.patch


# Thirds of the widths: 9, 9, 10 and 6, 7, 7; 8, 8, 8 and 5, 5, 6. Odd parts have the extra sine.
MAE_28 = Sizes(16, 4, 28, 2, 4, 20, 1, 2)
MAE_24 = Sizes(8, 4, 24, 1, 2, 16, 2, 4)


def code(width, place):
    """Return the vector of one coordinate, entry by entry, in float32."""
    half = width // 2
    omega = [np.float32(1) / np.float32(10000) ** (np.float32(i) / np.float32(half)) for i in range(half)]
    place = np.float32(place)
    entries = [np.sin(place * w) for w in omega] + [np.cos(place * w) for w in omega]
    return entries + ([np.sin(place / np.float32(10000))] if width % 2 else [])


def table(width, grid):
    """Return the sine-cosine table of a cube, token by token; row 0 is the class token's."""
    third, rest = divmod(width, 3)
    widths = (third, third + (1 if rest > 1 else 0), third + (1 if rest > 0 else 0))
    rows = [np.zeros(width, np.float32)]
    for place in np.ndindex(grid, grid, grid):
        rows.append(np.array(sum((code(w, p) for w, p in zip(widths, place, strict=True)), []), np.float32))
    return np.stack(rows)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        split = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.proj = nn.Conv3d(1, sizes.width, sizes.patch, sizes.patch)

    def forward(self, image):
        return self.proj(image).flatten(2).transpose(1, 2)


def positions(width, grid):
    return nn.Parameter(torch.from_numpy(table(width, grid))[None], requires_grad=False)


class Encoder(nn.Module):
    """What both models share; keys have no prefix, so they inherit."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = positions(sizes.width, sizes.grid)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))

    def encode(self, image, kept=None):
        x = self.patch_embed(image) + self.pos_embed[:, 1:]
        if kept is not None:
            x = torch.stack([row[index] for row, index in zip(x, kept, strict=True)])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


class Mae(Encoder):
    """Masked autoencoder; forward takes one uniform number per patch."""

    def __init__(self, sizes):
        super().__init__(sizes)
        width = sizes.decoder_width
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.decoder_embed = nn.Linear(sizes.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = positions(width, sizes.grid)
        self.decoder_blocks = nn.ModuleList(Block(width, sizes.decoder_heads) for _ in range(sizes.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Sequential(nn.Linear(width, sizes.patch**3), nn.Sigmoid())

    def forward(self, image, noise, mask_ratio=0.75):
        """Return encoder tokens, mask (1 hidden), prediction of every patch in its place, and loss."""
        order = noise.argsort(dim=1)
        kept = order[:, : int(noise.shape[1] * (1 - mask_ratio))]
        mask = torch.ones_like(noise)
        for row, index in zip(mask, kept, strict=True):
            row[index] = 0
        tokens = self.norm(self.encode(image, kept))
        seen = self.decoder_embed(tokens)
        x = self.mask_token.expand(len(image), noise.shape[1], -1).clone()
        for row, index, values in zip(x, kept, seen[:, 1:], strict=True):
            row[index] = values
        x = torch.cat([seen[:, :1], x], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        error = ((prediction - self.patches(image)) ** 2).mean(dim=-1)
        return tokens, mask, prediction, (error * mask).sum() / mask.sum()

    def patches(self, image):
        edge, grid = self.sizes.patch, self.sizes.grid
        parts = image.reshape(len(image), 1, grid, edge, grid, edge, grid, edge).permute(0, 2, 4, 6, 3, 5, 7, 1)
        return parts.reshape(len(image), grid**3, edge**3)


class Classifier(Encoder):
    """Classifier on pooled tokens, or without pooling on the class token; `hidden` gives the head with BatchNorm."""

    def __init__(self, sizes, outputs, hidden=0, pooling=True):
        super().__init__(sizes)
        features = 2 * sizes.width if pooling else sizes.width
        if pooling:
            self.fc_norm = nn.LayerNorm(features, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(features, eps=1e-6)
        if hidden:
            layers = [nn.Linear(features, hidden), nn.LeakyReLU(0.01), nn.BatchNorm1d(hidden)]
            self.head = nn.Sequential(*layers, nn.Linear(hidden, outputs))
        else:
            self.head = nn.Linear(features, outputs)
        self.pooling = pooling

    def forward(self, image):
        """Return what enters the head ("pre_logits"), and logits."""
        x = self.encode(image)
        if self.pooling:
            features = self.fc_norm(torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1))
        else:
            features = self.norm(x)[:, 0]
        return features, self.head(features)

    def embeddings(self, image):
        """Return what the released exporter writes: tokens after the last block, before any norm; and pre_logits."""
        x = self.encode(image)
        first, mean = x[:, 0], x[:, 1:].mean(dim=1)
        concat = torch.cat([first, mean], dim=1)
        last = self.fc_norm(concat) if self.pooling else self.norm(x)[:, 0]
        return {"class": first, "pooled": mean, "concat": concat, "pre_logits": last}


def randomise(model, seed):
    """Give every trained parameter and every stored moment its own random value, and switch to evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value, scale, shift=0.0):
        return shift + scale * torch.randn(value.shape, generator=generator)

    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.requires_grad:
                continue
            is_scale = name.endswith("weight") and value.ndim == 1
            value.copy_(draw(value, 0.2, 1.0) if is_scale else draw(value, 0.5 / math.sqrt(value[0].numel() or 1)))
        for name, value in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                value.fill_(1234)
            else:
                value.copy_(draw(value, 0.3).abs() + 0.2)
    return model.eval()

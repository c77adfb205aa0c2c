"""ProFound's networks in plain PyTorch under the released key names; written from the specification."""

import torch
from drawn_weights import draw
from torch import nn
from torch.nn import functional


class ChannelNorm(nn.LayerNorm):
    """A layer norm over channels that stand first."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResponseNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, 1, width)) for _ in range(2))

    def forward(self, x, seen=None, over_batch=False):
        """Take the norm of x [batch, d, h, w, channel] over what is seen."""
        squares = x.square() if seen is None else x.square() * seen
        axes = (0, 1, 2, 3) if over_batch else (1, 2, 3)
        length = squares.sum(axes, keepdim=True).sqrt()
        share = length / (length.mean(-1, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv3d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.grn = ResponseNorm(4 * width)

    def forward(self, x, seen=None, over_batch=False):
        y = self.dwconv(x if seen is None else x * seen).permute(0, 2, 3, 4, 1)
        last = None if seen is None else seen.permute(0, 2, 3, 4, 1)
        y = self.pwconv2(self.grn(functional.gelu(self.pwconv1(self.norm(y))), last, over_batch))
        y = y.permute(0, 4, 1, 2, 3)
        return x + (y if seen is None else y * seen)


class ConvNext(nn.Module):
    def __init__(self, depths, dims, channels=3):
        super().__init__()
        first = nn.Sequential(nn.Conv3d(channels, dims[0], 4, 4), ChannelNorm(dims[0]))
        others = [
            nn.Sequential(ChannelNorm(dims[i]), nn.Conv3d(dims[i], dims[i + 1], edge, edge))
            for i, edge in enumerate((2, 2, 1))
        ]
        self.downsample_layers = nn.ModuleList([first, *others])
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width) for _ in range(depth)) for depth, width in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)

    def maps(self, x, seen=None, over_batch=False):
        """Return the map of every stage; `seen` is 1 for patches that are, on the grid of the last."""
        found = []
        for stage, (coarsen, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = coarsen(x)
            mask = None
            if seen is not None:
                mask = functional.interpolate(seen, scale_factor=(4, 2, 1, 1)[stage], mode="nearest")
                x = x * mask
            for block in blocks:
                x = block(x, mask, over_batch)
            found.append(x)
        return found

    def forward(self, x):
        return self.norm(self.maps(x)[-1].mean((2, 3, 4)))


class Classifier(nn.Module):
    def __init__(self, encoder, width, outputs):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, outputs))

    def forward(self, x):
        return self.head(self.encoder(x))


class Fcmae(nn.Module):
    """The dense equal of sparse pre-training; its file has the encoder's dense names within "encoder."."""

    def __init__(self, depths, dims, width=16):
        super().__init__()
        self.encoder = ConvNext(depths, dims)
        self.proj, self.mask_token = nn.Conv3d(dims[-1], width, 1), nn.Parameter(torch.zeros(1, width, 1, 1, 1))
        self.decoder, self.pred = nn.Sequential(Block(width)), nn.Conv3d(width, 16**3 * 3, 1)

    def forward(self, x, hidden, over_batch=False):
        """Return loss and prediction [batch, patch, voxel]; `hidden` [batch, 1, d, h, w] is 1 for hidden patches."""
        found = self.proj(self.encoder.maps(x, 1 - hidden, over_batch)[-1])
        prediction = self.pred(self.decoder(found * (1 - hidden) + self.mask_token * hidden)).flatten(2).mT
        batch, channels, *space = x.shape
        parts = [length for edge in space for length in (edge // 16, 16)]
        target = x.reshape(batch, channels, *parts).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(prediction.shape)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        each = (prediction - target).square().mean(-1)
        flat = hidden.flatten(1)
        return (each * flat).sum() / flat.sum(), prediction


class Unit(nn.Module):
    def __init__(self, inputs, outputs, edge):
        super().__init__()
        self.conv, self.batch_norm = (
            nn.Conv3d(inputs, outputs, edge, padding=edge // 2, bias=False),
            ChannelNorm(outputs),
        )

    def forward(self, x):
        return functional.gelu(self.batch_norm(self.conv(x)))


def enlarge(x, size):
    return functional.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


class DecodeHead(nn.Module):
    def __init__(self, dims, width, outputs, pools=(1, 2, 3, 6)):
        super().__init__()
        self.classifier = nn.Conv3d(width, outputs, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool3d(count), Unit(dims[-1], width, 1)) for count in pools
        )
        self.bottleneck = Unit(dims[-1] + len(pools) * width, width, 3)
        self.lateral_convs = nn.ModuleList(Unit(inputs, width, 1) for inputs in dims[:-1])
        self.fpn_convs = nn.ModuleList(Unit(width, width, 3) for _ in dims[:-1])
        self.fpn_bottleneck = Unit(len(dims) * width, width, 3)

    def forward(self, maps):
        last = maps[-1]
        pooled = [last, *(enlarge(module(last), last.shape[2:]) for module in self.psp_modules)]
        levels = [*(conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False))]
        levels.append(self.bottleneck(torch.cat(pooled, 1)))
        for stage in (2, 1, 0):
            levels[stage] = levels[stage] + enlarge(levels[stage + 1], levels[stage].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        size = outputs[0].shape[2:]
        return self.classifier(
            self.fpn_bottleneck(torch.cat([outputs[0], *(enlarge(x, size) for x in outputs[1:])], 1))
        )


class AuxiliaryHead(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.convs, self.classifier = nn.Sequential(Unit(inputs, width, 3)), nn.Conv3d(width, outputs, 1)

    def forward(self, x):
        return self.classifier(self.convs(x))


class UperNet(nn.Module):
    def __init__(self, encoder, dims, outputs, width=24, auxiliary=12):
        super().__init__()
        self.encoder, self.decode_head = encoder, DecodeHead(dims, width, outputs)
        self.auxiliary_head = AuxiliaryHead(dims[2], auxiliary, outputs)
        self.hidden_norm = nn.ModuleList(ChannelNorm(width) for width in dims)

    def forward(self, x):
        maps = [norm(found) for norm, found in zip(self.hidden_norm, self.encoder.maps(x), strict=True)]
        return enlarge(self.decode_head(maps), x.shape[2:]), enlarge(self.auxiliary_head(maps[2]), x.shape[2:])


def fill(module):
    """Give every tensor the values of its name, and return the module in evaluation."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                values = torch.from_numpy(draw(name, tuple(tensor.shape)))
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return module.eval()

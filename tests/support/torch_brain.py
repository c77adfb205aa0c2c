"""BrainFM's U-Net and heads in plain PyTorch under the released key names; written from the specification."""

import torch
from drawn_weights import draw
from torch import nn
from torch.nn import functional

HEADS = {
    "T1": 1, "T2": 1, "FLAIR": 1, "CT": 1, "segmentation": 56, "distance": 4, "bias_field_log": 1, "registration": 3,
}  # fmt: skip


class SingleConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.groupnorm = nn.GroupNorm(8 if inputs >= 8 else 1, inputs)
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x):
        return functional.leaky_relu(self.conv(self.groupnorm(x)), 0.01)


class DoubleConv(nn.Module):
    def __init__(self, inputs, middle, outputs):
        super().__init__()
        self.SingleConv1 = SingleConv(inputs, middle)
        self.SingleConv2 = SingleConv(middle, outputs)

    def forward(self, x):
        return self.SingleConv2(self.SingleConv1(x))


class Stage(nn.Module):
    def __init__(self, *channels):
        super().__init__()
        self.basic_module = DoubleConv(*channels)

    def forward(self, x):
        return self.basic_module(x)


class Backbone(nn.Module):
    def __init__(self, width, levels):
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        inputs = [1, *widths[:-1]]
        stages = [Stage(i, max(o // 2, i), o) for i, o in zip(inputs, widths, strict=True)]
        self.encoders = nn.ModuleList(stages)
        pairs = zip(widths[-2::-1], widths[:0:-1], strict=True)
        self.decoders = nn.ModuleList([Stage(skip + below, skip, skip) for skip, below in pairs])

    def forward(self, x):
        """Return the bottleneck, what every decoder level hands on, and the last once more, of length 1."""
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(functional.max_pool3d(x, 2) if level else x)
            skips.append(x)
        found = [skips.pop()]
        for decoder in self.decoders:
            skip = skips.pop()
            x = functional.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = decoder(torch.cat([skip, x], dim=1))
            found.append(x)
        return [*found, functional.normalize(found[-1], dim=1)]


class Heads(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        for name, channels in heads.items():
            self.add_module(f"final_conv_{name}", nn.Conv3d(width, channels, 1))

    def forward(self, x):
        return {name: getattr(self, f"final_conv_{name}")(x) for name in self.heads}


class BrainNet(nn.Module):
    """`width` and `levels` of the backbone, channels of the heads by name; parameters are drawn from their names."""

    def __init__(self, width, levels, heads=None):
        super().__init__()
        self.backbone = Backbone(width, levels)
        self.head = Heads(width, HEADS if heads is None else heads)
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
        self.eval()

    def forward(self, x):
        """Return maps, and features of every level."""
        features = self.backbone(x)
        return self.head(features[-1]), features


def run(model, image):
    """Return the maps of an image [x, y, z] and its features, channels last, without a batch axis."""
    with torch.no_grad():
        maps, features = model(torch.from_numpy(image)[None, None])
    last = [value[0].movedim(0, -1).numpy() for value in features]
    return {name: value[0].movedim(0, -1).numpy() for name, value in maps.items()}, last

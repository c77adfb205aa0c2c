"""One pre-training step of a 3D ConvNeXt V2 with hidden patches: row `convnextv2_step`, peer PyTorch.

Forward, backward and AdamW on one batch that is on the device already: 60 % of the patches of 16^3 voxels are hidden,
and the squared error of hidden patches, each standardised, is averaged. The peer is the same network in plain PyTorch,
dense, with hidden voxels multiplied by 0 before and after every depthwise convolution, which is what it does without a
library for sparse ones; on the CPU in float32 with one thread per pinned core and channels last, on a GPU under
torch.compile and autocast. Operations are counted by shape for all places, hidden ones too, the backward pass as two
forward ones. The accuracy column holds the loss after the timed steps; volumes are smooth noise, of which both learn
the same.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from timing import (
    Measurement,
    alternate,
    describe_cpu,
    emit,
    first_call,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.models.convnext import EXPANSION, ConvNextConfig
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.objectives.masked import masked_loss
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

SETTINGS = OptimizerConfig(peak_lr=1e-4, b2=0.95, weight_decay=0.05, decay="constant")
TINY = FcmaeConfig(ConvNextConfig((32, 96, 96)))
SMOKE = FcmaeConfig(ConvNextConfig((16, 32, 32), depths=(1, 1, 1, 1), widths=(16, 32, 48, 64)), decoder_width=32)


def full(size: tuple[int, int, int], **options: Any) -> FcmaeConfig:
    """Return ProFound's model at some size, in bfloat16."""
    return FcmaeConfig(ConvNextConfig(size, dtype="bfloat16", **options))


# Per size: name, model, batch.
WORKLOADS: dict[str, list[tuple[str, FcmaeConfig, int]]] = {
    "smoke": [("16 x 32 x 32 x 3, 4 blocks", SMOKE, 2)],
    "cpu": [("32 x 96 x 96 x 3, ConvNeXt V2 tiny, float32", TINY, 2)],
    "gpu": [
        ("32 x 96 x 96 x 3, ConvNeXt V2 tiny, bfloat16", full((32, 96, 96)), 32),
        ("64 x 224 x 224 x 3, ConvNeXt V2 tiny, bfloat16", full((64, 224, 224), remat=True), 4),
    ],
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    rows = []
    for name, model, batch in WORKLOADS[config.size]:
        batch *= jax.device_count() if config.size == "pod" else 1
        volumes = smooth_noise(batch, model.encoder)
        steps: dict[str, Callable[[], Any]] = {"jaxmed": jaxmed_step(model, volumes)}
        if config.peer:
            steps["PyTorch"] = torch_step(model, volumes, len(conditions.cores))
        first = {kind: first_call(step) for kind, step in steps.items()}
        for step in steps.values():
            step()
        seconds = alternate(steps, config.repeats)
        flops = count_flops(model) * batch
        measured = {}
        for kind, times in seconds.items():
            is_peer = kind != "jaxmed"
            measured[kind] = Measurement(
                times,
                compile_s=max(0.0, first[kind] - float(np.median(times))),
                flops=flops,
                accuracy={"loss": float(steps[kind]())},
                versions=versions("torch") if is_peer else {},
                device=describe_cpu(conditions.cores) if is_peer and config.size in ("smoke", "cpu") else None,
            )
        workload = f"{name}, patch 16, mask {model.mask_ratio:.2f}, batch {batch}"
        rows += make_rows("convnextv2_step", workload, measured, conditions, peak)
    emit(rows, config.json)


def smooth_noise(batch: int, encoder: ConvNextConfig) -> np.ndarray:
    """Draw volumes [batch, *space, channel] that a patch's neighbours tell something about."""
    space, channels = encoder.image_size, encoder.channels
    coarse = np.random.default_rng(0).random((batch, *(max(edge // 8, 1) for edge in space), channels), np.float32)
    return np.asarray(jax.image.resize(coarse, (batch, *space, channels), "linear"))


def count_flops(config: FcmaeConfig) -> float:
    """Count a step's operations on one volume: products of all places forward, and twice that backward."""
    encoder = config.encoder
    factors = (encoder.stem, *encoder.strides)
    places, before, forward = math.prod(encoder.image_size), encoder.channels, 0.0
    for depth, width, factor in zip(encoder.depths, encoder.widths, factors, strict=True):
        places //= factor**3
        forward += 2.0 * places * factor**3 * before * width
        forward += depth * block_flops(places, width, encoder.kernel_size)
        before = width
    width, voxels = config.decoder_width, math.prod(encoder.patch_size) * encoder.channels
    forward += 2.0 * places * width * (before + voxels)
    return 3 * (forward + config.decoder_depth * block_flops(places, width, encoder.kernel_size))


def block_flops(places: int, width: int, edge: int) -> float:
    """Count the products of a block forward."""
    return 2.0 * places * width * (edge**3 + 2 * EXPANSION * width)


def jaxmed_step(config: FcmaeConfig, volumes: np.ndarray) -> Callable[[], Any]:
    """Return a call that does one step of the engine and hands back its loss."""
    mesh, model, optimizer = make_mesh(MeshConfig()), fcmae_model(config), make_optimizer(SETTINGS, 1000)
    state = create_state(jax.random.key(0), model.network.init, optimizer, mesh)
    step = make_train_step(partial(masked_loss, model), optimizer, state=state)
    batch = shard_batch({"image": volumes}, mesh)
    held = [state]

    def call() -> Any:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics["loss"]

    return call


def torch_step(config: FcmaeConfig, volumes: np.ndarray, threads: int) -> Callable[[], Any]:
    """Return a call that does one step of AdamW on a plain PyTorch model of the same sizes."""
    import torch

    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    model = plain_fcmae(config).to(device, memory_format=torch.channels_last_3d).train()
    images = torch.from_numpy(np.moveaxis(volumes, -1, 1).copy()).to(device, memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.05, fused=True)
    forward = torch.compile(model) if on_gpu else model

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = forward(images)
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach().float().cpu().numpy()

    return call


def plain_fcmae(config: FcmaeConfig) -> Any:
    """Return the loss of a masked autoencoder as a PyTorch module: dense convolutions, hidden voxels held at 0."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    encoder = config.encoder
    patch, grid = encoder.patch_size[0], encoder.grid

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            edge = encoder.kernel_size
            self.depthwise = nn.Conv3d(width, width, edge, padding=edge // 2, groups=width)
            self.norm = nn.LayerNorm(width, 1e-6)
            self.fc1, self.fc2 = nn.Linear(width, EXPANSION * width), nn.Linear(EXPANSION * width, width)
            self.scale, self.shift = (nn.Parameter(torch.zeros(EXPANSION * width)) for _ in range(2))

        def forward(self, x: Any, seen: Any) -> Any:
            y = self.depthwise(x * seen).permute(0, 2, 3, 4, 1)
            y = functional.gelu(self.fc1(self.norm(y)))
            squares = (y.float().square() * seen.permute(0, 2, 3, 4, 1)).sum((1, 2, 3), keepdim=True)
            length = (squares + 1e-24).sqrt()
            y = self.scale * (y * (length / (length.mean(-1, keepdim=True) + 1e-6))) + self.shift + y
            return x + self.fc2(y).permute(0, 4, 1, 2, 3) * seen

    class PlainFcmae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths, factors = encoder.widths, (encoder.stem, *encoder.strides)
            inputs = (encoder.channels, *widths[:-1])
            self.coarsen = nn.ModuleList(nn.Conv3d(a, b, f, f) for a, b, f in zip(inputs, widths, factors, strict=True))
            self.norms = nn.ModuleList(nn.LayerNorm(width, 1e-6) for width in (widths[0], *widths[:-1]))
            self.stages = nn.ModuleList(
                nn.ModuleList(Block(width) for _ in range(depth))
                for depth, width in zip(encoder.depths, widths, strict=True)
            )
            small = config.decoder_width
            self.embed, self.mask_token = nn.Linear(widths[-1], small), nn.Parameter(torch.zeros(small))
            self.decoder = nn.ModuleList(Block(small) for _ in range(config.decoder_depth))
            self.predict = nn.Linear(small, patch**3 * encoder.channels)

        def normed(self, stage: int, x: Any) -> Any:
            return self.norms[stage](x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

        def block(self, block: Any, x: Any, seen: Any) -> Any:
            return checkpoint(block, x, seen, use_reentrant=False) if encoder.remat else block(x, seen)

        def forward(self, images: Any) -> Any:
            batch, places = len(images), math.prod(grid)
            order = torch.rand(batch, places, device=images.device).argsort(1).argsort(1)
            hidden = (order >= int(places * (1 - config.mask_ratio))).float()
            seen = 1 - hidden.reshape(batch, 1, *grid)
            x = images
            for stage, blocks in enumerate(list(self.stages)):
                x = self.coarsen[stage](self.normed(stage, x)) if stage else self.normed(0, self.coarsen[0](x))
                factor = math.prod(encoder.strides[stage:])
                mask = functional.interpolate(seen, scale_factor=factor, mode="nearest")
                x = x * mask
                for block in blocks:
                    x = self.block(block, x, mask)
            known = self.embed(x.permute(0, 2, 3, 4, 1))
            shown = seen.permute(0, 2, 3, 4, 1)
            x = (known * shown + self.mask_token * (1 - shown)).permute(0, 4, 1, 2, 3)
            for block in self.decoder:
                x = self.block(block, x, torch.ones_like(seen))
            prediction = self.predict(x.permute(0, 2, 3, 4, 1)).reshape(batch, places, -1).float()
            split = [length for count in grid for length in (count, patch)]
            target = images.reshape(batch, -1, *split).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(prediction.shape)
            deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (target - target.mean(-1, keepdim=True)) / deviation
            return ((prediction - target).square().mean(-1) * hidden).sum() / hidden.sum()

    return PlainFcmae()


if __name__ == "__main__":
    main()

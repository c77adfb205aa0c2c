"""One training step of a 3D masked autoencoder: row `mae3d_step`, peers PyTorch and MONAI.

Forward, backward and AdamW on one batch that is on the device already. All hide 75 % of the patches of each volume and
average the squared error over hidden voxels. The peers: a plain PyTorch MAE (fused attention, on a GPU under
torch.compile and autocast) and MONAI's MaskedAutoEncoderViT; on the CPU in float32 with one thread per pinned core.
Operations are counted by shape, the backward pass as two forward ones, and are those of the model: a step that
computes less for the same gradient is not credited with what it left out. The accuracy column holds the loss after the
timed steps; volumes are smooth noise, of which every implementation learns the same.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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

from jaxmed.arrays.patches import patchify
from jaxmed.models.mae import MAE_S_96, MaeConfig, masked_model
from jaxmed.models.vit import VitConfig
from jaxmed.objectives.masked import masked_loss
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

SETTINGS = OptimizerConfig(peak_lr=1e-4, b2=0.95, weight_decay=0.05, decay="constant", frozen=(r"position$",))


def large(edge: int, **options: Any) -> MaeConfig:
    """Return TANGERINE's model at another volume size, in bfloat16."""
    return MaeConfig(VitConfig((edge,) * 3, dtype="bfloat16", **options))


SMOKE = dataclasses.replace(
    MAE_S_96,
    encoder=dataclasses.replace(MAE_S_96.encoder, image_size=(48, 48, 48), width=96, depth=2, heads=3, hidden=384),
    decoder_width=48, decoder_depth=1, decoder_heads=3, decoder_hidden=192,
)  # fmt: skip
# Per size: name, model, batch.
WORKLOADS: dict[str, list[tuple[str, MaeConfig, int]]] = {
    "smoke": [("48^3, 96 x 2", SMOKE, 2)],
    "cpu": [("S: 96^3, 384 x 6, decoder 192 x 4, float32", MAE_S_96, 2)],
    "gpu": [
        ("L: 96^3, 1024 x 24, decoder 512 x 8, bfloat16", large(96), 64),
        ("L: 256^3, 1024 x 24, decoder 512 x 8, bfloat16", large(256, remat=True), 8),
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
        volumes = smooth_noise(batch, model.encoder.image_size)
        steps: dict[str, Callable[[], Any]] = {"jaxmed": jaxmed_step(model, volumes)}
        if config.peer:
            steps |= torch_steps(model, volumes, len(conditions.cores))
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
                versions=versions("torch", "monai") if is_peer else {},
                device=describe_cpu(conditions.cores) if is_peer and config.size in ("smoke", "cpu") else None,
            )
        workload = f"{name}, patch {model.encoder.patch_size[0]}, mask {model.mask_ratio:.2f}, batch {batch}"
        rows += make_rows("mae3d_step", workload, measured, conditions, peak)
    emit(rows, config.json)


def smooth_noise(batch: int, space: tuple[int, ...]) -> np.ndarray:
    """Draw volumes in [0, 1], [batch, *space, 1], that a patch's neighbours tell something about."""
    coarse = np.random.default_rng(0).random((batch, *(max(edge // 8, 1) for edge in space), 1), np.float32)
    return np.asarray(jax.image.resize(coarse, (batch, *space, 1), "linear"))


def count_flops(config: MaeConfig) -> float:
    """Count a step's operations on one volume: matrix products forward, and twice that backward."""
    encoder = config.encoder
    kept = int(encoder.num_tokens * (1 - config.mask_ratio))
    voxels = math.prod(encoder.patch_size) * encoder.channels

    def column(tokens: int, width: int, hidden: int, depth: int) -> float:
        return depth * 2.0 * tokens * (4 * width**2 + 2 * width * hidden + 2 * tokens * width)

    forward = 2.0 * kept * voxels * encoder.width
    forward += column(kept + 1, encoder.width, encoder.hidden, encoder.depth)
    forward += 2.0 * (kept + 1) * encoder.width * config.decoder_width
    forward += column(encoder.num_tokens + 1, config.decoder_width, config.decoder_hidden, config.decoder_depth)
    forward += 2.0 * encoder.num_tokens * config.decoder_width * voxels
    return 3 * forward


def jaxmed_step(config: MaeConfig, volumes: np.ndarray) -> Callable[[], Any]:
    """Return a call that does one step of the engine and hands back its loss."""
    mesh = make_mesh(MeshConfig())
    model = masked_model(config)
    optimizer = make_optimizer(SETTINGS, 1000)
    state = create_state(jax.random.key(0), model.network.init, optimizer, mesh)
    step = make_train_step(partial(masked_loss, model), optimizer, state=state, frozen=SETTINGS.frozen)
    batch = shard_batch({"image": volumes}, mesh)
    held = [state]

    def call() -> Any:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics["loss"]

    return call


def torch_steps(config: MaeConfig, volumes: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    """Return the same for plain PyTorch and for MONAI."""
    import torch
    from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    encoder = config.encoder
    images = torch.from_numpy(np.moveaxis(volumes, -1, 1).copy()).to(device)
    tokens = torch.from_numpy(np.array(patchify(jnp.asarray(volumes), encoder.patch_size))).to(device)
    monai = MaskedAutoEncoderViT(
        1, encoder.image_size, encoder.patch_size, encoder.width, encoder.hidden, encoder.depth, encoder.heads,
        config.mask_ratio, config.decoder_width, config.decoder_hidden, config.decoder_depth, config.decoder_heads,
        proj_type="conv", pos_embed_type="sincos", decoder_pos_embed_type="sincos", qkv_bias=True,
    )  # fmt: skip
    return {
        "PyTorch": torch_step(plain_mae(config), images, tokens, device, encoder.remat),
        "MONAI": torch_step(monai, images, tokens, device, False),
    }


def torch_step(model: Any, images: Any, targets: Any, device: str, remat: bool) -> Callable[[], Any]:
    """Return a call that does one step of AdamW on a module that returns prediction and mask."""
    import torch

    model = model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = device == "cuda"
    optimizer = torch.optim.AdamW(trained, 1e-4, (0.9, 0.95), weight_decay=0.05, fused=True)
    forward = torch.compile(model) if on_gpu and not remat else model

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            prediction, mask = forward(images)
        error = (prediction.float() - targets).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach().cpu().numpy()

    return call


def plain_mae(config: MaeConfig) -> Any:
    """Return a PyTorch MAE of the same sizes, written as its authors' code is: gather, encode, scatter, decode."""
    import torch
    from torch import nn

    encoder = config.encoder

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, hidden: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

        def forward(self, x: Any) -> Any:
            batch, count, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
            return x + self.mlp(self.norm2(x))

    class PlainMae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, small = encoder.width, config.decoder_width
            self.embed = nn.Conv3d(encoder.channels, width, encoder.patch_size, encoder.patch_size)
            self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, small))
            self.register_buffer("position", 0.02 * torch.randn(1, encoder.num_tokens + 1, width))
            self.register_buffer("small_position", 0.02 * torch.randn(1, encoder.num_tokens + 1, small))
            sizes = (width, encoder.heads, encoder.hidden)
            self.blocks = nn.ModuleList(Block(*sizes) for _ in range(encoder.depth))
            self.norm, self.shrink = nn.LayerNorm(width, 1e-6), nn.Linear(width, small)
            sizes = (small, config.decoder_heads, config.decoder_hidden)
            self.small_blocks = nn.ModuleList(Block(*sizes) for _ in range(config.decoder_depth))
            self.small_norm = nn.LayerNorm(small, 1e-6)
            self.predict = nn.Linear(small, math.prod(encoder.patch_size) * encoder.channels)

        def run(self, blocks: Any, x: Any) -> Any:
            for block in blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if encoder.remat else block(x)
            return x

        def forward(self, images: Any) -> Iterator[Any]:
            x = self.embed(images).flatten(2).transpose(1, 2) + self.position[:, 1:]
            batch, count, width = x.shape
            order = torch.rand(batch, count, device=x.device).argsort(1)
            back, keep = order.argsort(1), int(count * (1 - config.mask_ratio))
            x = x.gather(1, order[:, :keep, None].expand(-1, -1, width))
            first = (self.class_token + self.position[:, :1]).expand(batch, -1, -1)
            x = self.shrink(self.norm(self.run(self.blocks, torch.cat([first, x], 1))))
            filled = torch.cat([x[:, 1:], self.mask_token.expand(batch, count - keep, -1)], 1)
            filled = filled.gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))
            x = self.run(self.small_blocks, torch.cat([x[:, :1], filled], 1) + self.small_position)
            prediction = self.predict(self.small_norm(x))[:, 1:].sigmoid()
            return prediction, (back >= keep).float()

    return PlainMae()


if __name__ == "__main__":
    main()

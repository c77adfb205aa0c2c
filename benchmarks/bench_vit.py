"""Transformers of images: rows `vit_b16_infer`, `dinov2_s14_infer` and `vit_finetune_step`.

Peers: timm's ViT (fused attention), transformers' DINOv2, and for the step of fine-tuning timm's ViT under AdamW with
layer-wise rates; on a GPU under torch.compile and autocast. All run the same weights: those that the peer has drawn,
imported by their names. `difference` is the largest deviation of the features, or of the loss of the first step.
Operations are counted by shape, the backward pass as two forward ones.
"""

import dataclasses
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from timing import (
    Conditions,
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

from jaxmed.data.mixing import MixConfig
from jaxmed.io import safetensors
from jaxmed.models.heads import HeadConfig
from jaxmed.models.published.dinov2 import FAMILY
from jaxmed.models.published.load import ImportReport, Published, load_published, resize_positions
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.adapt_program import CompileKey, make_program, make_schedule
from jaxmed.recipes.adapt_start import encoder_of
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig

RATE, DECAY = 1e-4, 0.65


class Sizes(NamedTuple):
    """A workload: image edge, width, depth, heads, and images in a batch."""

    image: int
    width: int
    depth: int
    heads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.image} px, {self.width} x {self.depth}, batch {self.batch}"


# Per size: of the plain transformer (patch 16), of DINOv2 (patch 14), of the step of fine-tuning (patch 16).
WORKLOADS: dict[str, tuple[Sizes, Sizes, Sizes]] = {
    "smoke": (Sizes(32, 96, 2, 3, 2), Sizes(28, 96, 2, 3, 2), Sizes(32, 96, 2, 3, 2)),
    "cpu": (Sizes(224, 768, 12, 12, 4), Sizes(224, 384, 12, 6, 8), Sizes(224, 384, 12, 6, 8)),
    "gpu": (Sizes(224, 1024, 24, 16, 128), Sizes(224, 1024, 24, 16, 128), Sizes(224, 1024, 24, 16, 64)),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    plain, dino, tuned = WORKLOADS[config.size]
    on_gpu = config.size in ("gpu", "pod")
    rows = []
    for name, sizes, make, run in (
        ("vit_b16_infer", plain, make_timm, infer),
        ("dinov2_s14_infer", dino, make_dinov2, infer),
        ("vit_finetune_step", tuned, partial(make_timm, classes=5), tune),
    ):
        rows += measure(name, sizes, make, run, config.peer, config.repeats, conditions, peak, on_gpu)
    emit(rows, config.json)


def measure(
    name: str,
    sizes: Sizes,
    make: Callable[[Sizes], Any],
    run: Callable[..., dict[str, Callable[[], Any]]],
    with_peer: bool,
    repeats: int,
    conditions: Conditions,
    peak: Any,
    on_gpu: bool,
) -> list[dict[str, Any]]:
    """Measure one row and its peer."""
    images = np.random.default_rng(0).standard_normal((sizes.batch, sizes.image, sizes.image, 3)).astype(np.float32)
    dtype = "bfloat16" if on_gpu else "float32"
    theirs = None
    if with_peer:
        import torch

        torch.set_num_threads(len(conditions.cores))
        torch.manual_seed(0)
        theirs = make(sizes)
        published = imported(theirs, sizes)
    else:
        published = drawn(name, sizes)
    calls = run(published, theirs, images, dtype)
    first = {kind: first_call(call) for kind, call in calls.items()}
    found = {kind: np.asarray(call(), np.float32) for kind, call in calls.items()}
    seconds = alternate(calls, repeats)
    encoder = encoder_of(published.config)
    flops = (3 if run is tune else 1) * count_flops(encoder) * sizes.batch
    measured = {}
    for kind, times in seconds.items():
        is_peer = kind != "jaxmed"
        accuracy = {}
        if is_peer:
            scale = float(np.abs(found[kind]).max())
            accuracy = {"difference": float(np.abs(found[kind] - found["jaxmed"]).max()) / scale}
        measured[kind] = Measurement(
            times,
            compile_s=max(0.0, first[kind] - float(np.median(times))),
            flops=flops,
            accuracy=accuracy,
            versions=versions("torch", "timm", "transformers") if is_peer else {},
            device=describe_cpu(conditions.cores) if is_peer and not on_gpu else None,
        )
    workload = f"{sizes}, patch {encoder.patch_size[0]}, {dtype}"
    return make_rows(name, workload, measured, conditions, peak)


def count_flops(config: VitConfig) -> float:
    """Count the operations of the matrix products of one image's forward pass."""
    tokens, width = config.num_tokens + config.prefix, config.width
    patch = config.patch_size[0] * config.patch_size[1] * config.channels
    column = config.depth * 2.0 * tokens * (4 * width**2 + 2 * width * config.hidden + 2 * tokens * width)
    return 2.0 * config.num_tokens * patch * width + column


def imported(model: Any, sizes: Sizes) -> Published:
    """Import a peer's weights by their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.safetensors"
        safetensors.write(path, {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()})
        published = load_published(path, heads=sizes.heads)
    return resize_positions(published, (sizes.image, sizes.image))


def drawn(name: str, sizes: Sizes) -> Published:
    """Draw weights where no peer gives any."""
    is_dino = name.startswith("dinov2")
    patch = 14 if is_dino else 16
    config = VitConfig(
        (sizes.image, sizes.image), (patch, patch), 3, sizes.width, sizes.depth, sizes.heads, 4 * sizes.width,
        positions="learned", layer_scale=1.0 if is_dino else 0.0,
    )  # fmt: skip
    params = {"encoder": jax.jit(vit_encoder(config).init)(jax.random.key(0))}
    report = ImportReport("dinov2", "encoder", (), (), (), "drawn")
    return Published(FAMILY.make_model(config, ("encoder",)), params, FAMILY.preprocess(config), config, report)


def infer(published: Published, theirs: Any, images: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return calls that take images to tokens after the final norm."""
    encoder = vit_encoder(dataclasses.replace(encoder_of(published.config), dtype=dtype, scan=dtype != "float32"))
    device = jax.device_put(images)

    @jax.jit
    def run(params: Any, images: jax.Array) -> jax.Array:
        return encoder.norm(params, encoder.apply(params, images))

    params = jax.device_put(published.params["encoder"])
    calls: dict[str, Callable[[], Any]] = {"jaxmed": lambda: jax.block_until_ready(run(params, device))}
    if theirs is not None:
        calls["PyTorch"] = torch_infer(theirs, images, dtype)
    return calls


def tune(published: Published, theirs: Any, images: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return calls that do one step of fine-tuning and return its loss."""
    found = encoder_of(published.config)
    encoder = vit_encoder(
        dataclasses.replace(found, dtype=dtype, positions="learned", final_norm=True, scan=dtype != "float32")
    )
    settings = OptimizerConfig(
        weight_decay=0.05, layer_decay=DECAY, decay="constant", no_decay=(r"(^|/)(bias|scale)$", r"(^|/)position$")
    )
    head = HeadConfig(5, "class")
    mesh = make_mesh(MeshConfig())
    key = CompileKey(
        encoder, head, "multiclass", dataclasses.replace(settings, peak_lr=0.0), accumulation=1, token_keep=1.0,
        smoothing=0.0, mix=MixConfig(), augment=None, parts="all",
    )  # fmt: skip
    program = make_program(key, mesh)
    labels = np.arange(len(images)) % 5
    start = {"encoder": published.params["encoder"]}
    if "head" in published.params:
        start["head"] = published.params["head"]
    held = [program.create(jax.random.key(0), start, make_schedule(RATE, 0.0, 0, 10_000))]
    fields = {"image": images, "target": labels[:, None].astype(np.float32)}
    ones = np.ones((len(images), 5), np.float32)
    batch = shard_batch(fields | {"weights": ones, "importance": ones[:, 0]}, mesh)

    def call() -> Any:
        held[0], metrics = program.step(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics["loss"]

    calls: dict[str, Callable[[], Any]] = {"jaxmed": call}
    if theirs is not None:
        calls["PyTorch"] = torch_tune(theirs, images, labels, dtype)
    return calls


# Peers ---------------------------------------------------------------------------------------------------------------


def import_timm() -> Any:
    """Import timm's transformers beside empty modules in torchvision's place."""
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
                 "torchvision.transforms.functional", "torchvision.datasets"):  # fmt: skip
        if name not in sys.modules:
            module: Any = types.ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            module.__getattr__ = lambda attribute: mock.MagicMock()
            sys.modules[name] = module
    from timm.models import vision_transformer

    return vision_transformer


def make_timm(sizes: Sizes, classes: int = 0) -> Any:
    """Return timm's ViT, patch 16."""
    return import_timm().VisionTransformer(
        img_size=sizes.image, patch_size=16, embed_dim=sizes.width, depth=sizes.depth, num_heads=sizes.heads,
        num_classes=classes, global_pool="token" if classes else "",
    )  # fmt: skip


def make_dinov2(sizes: Sizes) -> Any:
    """Return transformers' DINOv2, patch 14, at the image size."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=sizes.width, num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads,
        image_size=sizes.image, patch_size=14,
    )  # fmt: skip
    return transformers.Dinov2Model(config)


def torch_infer(model: Any, images: np.ndarray, dtype: str) -> Callable[[], Any]:
    """Return the peer's call."""
    import torch

    on_gpu = dtype == "bfloat16" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = model.to(device).eval()
    run = torch.compile(model) if on_gpu else model
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)

    def call() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            found = run(x)
            found = getattr(found, "last_hidden_state", found)
        if on_gpu:
            torch.cuda.synchronize()
        return found.float().cpu().numpy()

    return call


def torch_tune(model: Any, images: np.ndarray, labels: np.ndarray, dtype: str) -> Callable[[], Any]:
    """Return the peer's step: AdamW with a rate for each layer."""
    import torch

    on_gpu = dtype == "bfloat16" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = model.to(device).train()
    depth = len(model.blocks)
    groups = []
    for name, value in model.named_parameters():
        layer = depth + 1
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decays = value.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups.append(
            {"params": [value], "lr": RATE * DECAY ** (depth + 1 - layer), "weight_decay": 0.05 if decays else 0.0}
        )
    optimizer = torch.optim.AdamW(groups, fused=True)
    forward = torch.compile(model) if on_gpu else model
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    target = torch.from_numpy(labels).to(device)

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            logits = forward(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach().cpu().numpy()

    return call


if __name__ == "__main__":
    main()

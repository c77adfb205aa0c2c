"""One training step of DINOv2: row `dino_step`, peer PyTorch.

Teacher and student forward on two global and eight local crops of each image, with hidden patches, two heads and
Sinkhorn-Knopp, then backward, clipping, AdamW and the teacher's average, on one batch of crops that is on the device
already. The peer is a plain PyTorch step of the same weights, crops and masks (fused attention and AdamW, on a GPU
under torch.compile and autocast); on the CPU in float32 with one thread per pinned core. Operations are counted by
shape over all crops: encoder and heads, the student's backward pass as two forward ones; Sinkhorn-Knopp, losses and
updates are left out. The accuracy column holds the loss of the last timed step, which in float32 is the same for both.
"""

import math
import re
from collections.abc import Callable, Iterator
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

from jaxmed.arrays.trees import named_leaves
from jaxmed.data.augment_pictures import Crops
from jaxmed.data.loader import LoaderConfig
from jaxmed.models.dino import DinoHeadConfig, dinov2
from jaxmed.models.vit import VitConfig
from jaxmed.objectives.block_masks import block_masks
from jaxmed.recipes.dino_loss import DinoConfig
from jaxmed.recipes.dino_step import DinoState, make_dino_step
from jaxmed.recipes.pretrain_dino import create_dino_state
from jaxmed.recipes.training import TrainConfig
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig

TRAIN = TrainConfig(
    OptimizerConfig(
        peak_lr=1e-4, weight_decay=0.04, no_decay=(r"(^|/)(bias|scale\d?)$",), clip_norm=3.0, decay="constant"
    ),
    LoopConfig(steps=1_000_000),
    LoaderConfig(),
)
MOMENTUM, TEMPERATURE = 0.992, 0.05


def workload(
    encoder: VitConfig, local: int, crops: int = 8, prototypes: int = 65_536, hidden: int = 2048
) -> DinoConfig:
    """Return a step of constant settings: what moves along schedules costs nothing."""
    head = DinoHeadConfig(prototypes, hidden)
    return DinoConfig(
        encoder, head, False, head, (local, local), crops, centring="sinkhorn", teacher_momentum=MOMENTUM,
        teacher_temperature=(TEMPERATURE, TEMPERATURE), final_weight_decay=0.04, freeze_epochs=0, embedding_rate=1.0,
    )  # fmt: skip


# At factors of 1e-5 on branches the class tokens of a fresh network differ by rounding alone, and so would KoLeo.
SMOKE = dinov2("S", image_size=(56, 56), width=48, depth=2, heads=3, hidden=96, layer_scale=1.0)
SMALL = dinov2("S", image_size=(98, 98), layer_scale=1.0)
LARGE = dinov2("L", image_size=(224, 224), dtype="bfloat16", scan=True, layer_scale=1.0)
# Per size: name, what is trained, batch.
WORKLOADS: dict[str, list[tuple[str, DinoConfig, int]]] = {
    "smoke": [("48 x 2, global 56, local 28, float32", workload(SMOKE, 28, 2, 256, 64), 2)],
    "cpu": [("ViT-S/14, global 98, local 42, float32", workload(SMALL, 42), 4)],
    "gpu": [("ViT-L/14, global 224, local 98, bfloat16", workload(LARGE, 98), 32)],
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    rows = []
    for name, dino, batch in WORKLOADS[config.size]:
        batch *= jax.device_count() if config.size == "pod" else 1
        crops = draw_crops(dino, batch)
        state = first_state(dino)
        steps: dict[str, Callable[[], Any]] = {"jaxmed": jaxmed_step(dino, state, crops)}
        if config.peer:
            steps["PyTorch"] = torch_step(dino, state, crops, len(conditions.cores))
        first = {kind: first_call(step) for kind, step in steps.items()}
        seconds = alternate(steps, config.repeats)
        measured = {}
        for kind, times in seconds.items():
            is_peer = kind != "jaxmed"
            measured[kind] = Measurement(
                times,
                compile_s=max(0.0, first[kind] - float(np.median(times))),
                flops=count_flops(dino) * batch,
                accuracy={"loss": float(steps[kind]())},
                versions=versions("torch") if is_peer else {},
                device=describe_cpu(conditions.cores) if is_peer and config.size in ("smoke", "cpu") else None,
            )
        text = f"{name}, {dino.local_crops} local crops, {dino.head.prototypes} prototypes, batch {batch}"
        rows += make_rows("dino_step", text, measured, conditions, peak)
    emit(rows, config.json)


def draw_crops(dino: DinoConfig, batch: int) -> Crops:
    """Draw normal numbers in the shape of a batch of crops."""
    generator, encoder = np.random.default_rng(0), dino.encoder
    shapes = ((2, *encoder.image_size), (dino.local_crops, *dino.local_size))
    return Crops(*(generator.standard_normal((batch, *shape, encoder.channels), np.float32) for shape in shapes))


def count_flops(dino: DinoConfig) -> float:
    """Count a step's operations on one image: matrix products forward, and for the student twice that backward."""
    encoder, head = dino.encoder, dino.head

    def view(size: tuple[int, ...]) -> float:
        patches = math.prod(edge // patch for edge, patch in zip(size, encoder.patch_size, strict=True))
        tokens, width = patches + encoder.prefix, encoder.width
        block = 2.0 * tokens * (4 * width**2 + 2 * width * encoder.hidden + 2 * tokens * width)
        return encoder.depth * block + 2.0 * patches * math.prod(encoder.patch_size) * encoder.channels * width

    row = 2.0 * (encoder.width + head.hidden + head.bottleneck) * head.hidden + 2.0 * head.bottleneck * head.prototypes
    hidden = 2 * encoder.num_tokens * dino.masking.images * sum(dino.masking.ratio) / 2
    teacher = 2 * view(encoder.image_size) + (2 + hidden) * row
    return teacher + 3 * (teacher + dino.local_crops * (view(dino.local_size) + row))


def first_state(dino: DinoConfig) -> DinoState:
    """Draw the state that both begin with."""
    return create_dino_state(TRAIN, dino, make_mesh(TRAIN.mesh))


def jaxmed_step(dino: DinoConfig, state: DinoState, crops: Crops) -> Callable[[], Any]:
    """Return a call that does one step of the recipe and hands back its loss."""
    mesh = make_mesh(TRAIN.mesh)
    # A batch has one array of images: crops are packed into it and taken out as their augmentation.
    split, shapes = math.prod(crops.globals_.shape[1:]), [part.shape[1:] for part in crops]
    packed = np.concatenate([part.reshape(len(part), -1) for part in crops], axis=1)

    def unpack(key: Any, image: Any) -> Crops:
        return Crops(image[:split].reshape(shapes[0]), image[split:].reshape(shapes[1]))

    step, batch = make_dino_step(TRAIN, dino, unpack, 1.0, mesh, state), shard_batch({"image": packed}, mesh)
    held = [jax.tree.map(jnp.copy, state)]  # donated, where the peer still reads the first

    def call() -> Any:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics["loss"]

    return call


def draw_masks(dino: DinoConfig, state: DinoState, views: int) -> Iterator[np.ndarray]:
    """Yield the masks that the recipe draws, step after step."""
    draw = jax.jit(lambda key: block_masks(key, views, dino.encoder.grid, dino.masking))
    number = 0
    while True:
        loss_key = jax.random.split(jax.random.fold_in(state.key, number))[1]
        yield np.asarray(draw(jax.random.split(loss_key, 3)[0]))
        number += 1


def torch_step(dino: DinoConfig, state: DinoState, crops: Crops, threads: int) -> Callable[[], Any]:
    """Return the same for plain PyTorch."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    on_gpu, batch = device == "cuda", len(crops.globals_)
    globals_, locals_ = (
        torch.from_numpy(np.moveaxis(part.reshape(-1, *part.shape[2:]), -1, 1).copy()).to(device) for part in crops
    )
    student, teacher = (plain_network(dino, state.student).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in student.named_parameters():
        groups[not re.search(r"(bias|norm\d?\.weight|scale\d)$", name)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        TRAIN.optimizer.peak_lr, weight_decay=TRAIN.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    masks = draw_masks(dino, state, 2 * batch)
    encode = [torch.compile(part.encoder, dynamic=False) if on_gpu else part.encoder for part in (student, teacher)]

    def call() -> Any:
        mask = torch.from_numpy(next(masks).copy()).to(device)
        place = mask.flatten().nonzero().flatten()
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            with torch.no_grad():
                tokens = encode[1](globals_)
                scores = teacher.dino_head(tokens[:, 0]).float()
                patch_scores = teacher.ibot_head(tokens[:, 1:].flatten(0, 1)[place]).float()
            seen = encode[0](globals_, mask)
            small = encode[0](locals_)[:, 0]
            guess = student.dino_head(torch.cat([seen[:, 0], small])).float()
            patch_guess = student.ibot_head(seen[:, 1:].flatten(0, 1)[place]).float()
        targets, patch_targets = (sinkhorn(part) for part in (scores, patch_scores))
        pairs = 2 + 2 * dino.local_crops
        spoken = torch.log_softmax(guess / 0.1, -1)
        swapped = targets.reshape(batch, 2, -1).flip(1)
        of_globals = -(spoken[: 2 * batch].reshape(batch, 2, -1) * swapped).sum() / batch / pairs
        of_locals = spoken[2 * batch :].reshape(batch, dino.local_crops, -1).sum(1)
        of_locals = -(of_locals * swapped.sum(1)).sum() / batch / pairs
        each = (1 / mask.sum(-1).clamp(min=1))[place // mask.shape[1]]
        patches = -((patch_targets * torch.log_softmax(patch_guess / 0.1, -1)).sum(-1) * each).sum() / len(mask)
        spread = sum(koleo(seen[:, 0].float().reshape(batch, 2, -1)[:, crop]) for crop in range(2))
        loss = of_locals + of_globals + patches + dino.koleo_weight * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in student.children():
            torch.nn.utils.clip_grad_norm_(part.parameters(), TRAIN.optimizer.clip_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - MOMENTUM)
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach().cpu().numpy()

    def sinkhorn(scores: Any) -> Any:
        shares = torch.exp(scores / TEMPERATURE).T
        prototypes, count = shares.shape
        shares = shares / shares.sum()
        for _ in range(3):
            shares = shares / (shares.sum(1, keepdim=True) * prototypes)
            shares = shares / (shares.sum(0, keepdim=True) * count)
        return (shares * count).T

    def koleo(tokens: Any) -> Any:
        directions = torch.nn.functional.normalize(tokens, eps=1e-8, dim=-1)
        with torch.no_grad():
            nearest = (directions @ directions.T).fill_diagonal_(-1).argmax(1)
        distance = torch.nn.functional.pairwise_distance(directions, directions[nearest], 2, 1e-8)
        return -torch.log(distance + 1e-8).mean()

    return call


def plain_network(dino: DinoConfig, params: Any) -> Any:
    """Return encoder and heads in PyTorch, written as their authors' code is, with the given weights."""
    import torch
    from torch import nn
    from torch.nn import functional

    config = dino.encoder

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = config.width
            self.norm1, self.norm2 = nn.LayerNorm(width, config.epsilon), nn.LayerNorm(width, config.epsilon)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)
            self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

        def forward(self, x: Any) -> Any:
            batch, count, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.scale1 * self.out(mixed.transpose(1, 2).reshape(batch, count, width))
            return x + self.scale2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)
            self.class_token = nn.Parameter(torch.zeros(config.width))
            self.mask_token = nn.Parameter(torch.zeros(config.width))
            self.position = nn.Parameter(torch.zeros(1 + config.num_tokens, config.width))
            self.blocks = nn.ModuleList(Block() for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width, config.epsilon)

        def forward(self, images: Any, mask: Any = None) -> Any:
            x = self.patch_embed(images)
            grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
            if mask is not None:
                x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
            table = self.position[1:]
            if tuple(grid) != config.grid:
                table = table.reshape(1, *config.grid, -1).permute(0, 3, 1, 2)
                factors = tuple((new + 0.1) / old for new, old in zip(grid, config.grid, strict=True))
                table = functional.interpolate(table, scale_factor=factors, mode="bicubic").flatten(2)[0].T
            first = (self.class_token + self.position[0]).expand(len(x), 1, -1)
            x = torch.cat([first, x + table], 1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            head = dino.head
            self.fc1, self.fc2 = nn.Linear(config.width, head.hidden), nn.Linear(head.hidden, head.hidden)
            self.fc3 = nn.Linear(head.hidden, head.bottleneck)
            self.prototypes = nn.Parameter(torch.zeros(head.prototypes, head.bottleneck))

        def forward(self, x: Any) -> Any:
            x = self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(x)))))
            x = functional.normalize(x.float(), eps=1e-12, dim=-1)
            return functional.linear(x, functional.normalize(self.prototypes, dim=-1))

    network = nn.ModuleDict({"encoder": Encoder(), "dino_head": Head(), "ibot_head": Head()})
    given = {}
    for name, leaf in named_leaves(jax.device_get(params)).items():
        value = np.array(leaf)
        if name.endswith("gain"):
            continue
        if name == "encoder/patch_embed/kernel":
            value = value.reshape(*config.patch_size, config.channels, -1).transpose(3, 2, 0, 1)
        elif name.endswith("kernel"):
            value = value.reshape(len(value), -1).T
        elif name.endswith("prototypes"):
            value = value.T
        elif name.endswith("qkv/bias"):
            value = value.reshape(-1)
        name = re.sub(r"blocks/layer_(\d+)", r"blocks/\1", name).replace("attention/", "").replace("mlp/", "")
        name = re.sub(r"/(kernel|scale)$", "/weight", name)
        given[name.replace("/", ".")] = torch.from_numpy(np.ascontiguousarray(value))
    network.load_state_dict(given)
    return network


if __name__ == "__main__":
    main()

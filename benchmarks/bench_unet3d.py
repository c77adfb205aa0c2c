"""A training step of a 3D U-Net: rows `unet3d_step`, peer PyTorch.

"plain": levels of two convolutions each, group norms and ReLU, halved by convolutions of stride 2 and doubled by
transposed convolutions of 2 x 2 x 2, skips joined along channels. "BrainFM": its network (`models.unet_brain`) with one
head. Mean squared error, AdamW. The same weights on both sides; the peer is the same network in PyTorch, in the faster
of its memory formats. `difference` is the largest deviation of the losses of the first two steps, relative to the loss.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import (
    Conditions,
    Measurement,
    Peak,
    Row,
    alternate,
    compile_apart,
    describe_cpu,
    emit,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.arrays.trees import named_leaves
from jaxmed.models.unet_brain import BrainUnet, BrainUnetConfig
from jaxmed.nn.convolution import Convolution, conv_transposed
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import Model, make_model
from jaxmed.train.announce import count_operations

LEARNING_RATE, DECAY = 1e-3, 1e-2


class Workload(NamedTuple):
    """One size.

    Attributes:
        widths: Channels of each level.
        edge: Voxels along each axis.
        batch: Volumes.
        groups: Of the norms.
        kind: Which network.
    """

    widths: tuple[int, ...]
    edge: int
    batch: int
    groups: int = 8
    kind: Literal["plain", "BrainFM"] = "plain"

    def describe(self) -> str:
        """Say it in words."""
        kind = "" if self.kind == "plain" else f"{self.kind}, "
        return f"{kind}{'-'.join(map(str, self.widths))} channels, {self.edge}^3, batch {self.batch}, float32, AdamW"


WORKLOADS = {
    "smoke": (Workload((4, 8), 8, 1, 4), Workload((8, 16), 8, 1, kind="BrainFM")),
    "cpu": (Workload((16, 32, 64), 64, 1), Workload((16, 32, 64, 128), 64, 1, kind="BrainFM")),
    "gpu": (
        Workload((32, 64, 128), 128, 4),
        Workload((64, 128, 256, 512, 1024, 2048), 128, 1, kind="BrainFM"),
    ),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


class Unet(nn.Module):
    """One channel in, one out."""

    work: Workload

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths, skips = self.work.widths, []
        for level, width in enumerate(widths):
            if level:
                x = Convolution(width, stride=2, name=f"halve_{level}")(x)
            x = self._block(x, width, f"down_{level}")
            skips.append(x)
        for level in reversed(range(len(widths) - 1)):
            shape = (2, 2, 2, widths[level + 1], widths[level])
            kernel = self.param(f"double_{level}", nn.initializers.he_normal(), shape)
            x = jnp.concatenate([conv_transposed(x, kernel, 2), skips[level]], axis=-1)
            x = self._block(x, widths[level], f"up_{level}")
        return Convolution(1, size=1, name="head")(x)

    def _block(self, x: jax.Array, width: int, name: str) -> jax.Array:
        for number in range(2):
            x = Convolution(width, name=f"{name}_conv_{number}")(x)
            x = nn.relu(GroupNorm(self.work.groups, name=f"{name}_norm_{number}")(x))
        return x


def main() -> None:
    """Measure and print the row."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    works = WORKLOADS[config.size]
    rows = [row for work in works for row in measure(work, config.peer, config.repeats, conditions, peak)]
    emit(rows, config.json)


def make_network(work: Workload) -> Model:
    """Return the network of a workload: one volume to one."""
    if work.kind == "plain":
        return make_model(Unet(work))
    config = BrainUnetConfig(width=work.widths[0], levels=len(work.widths), groups=work.groups, tasks=("T1",))
    model = make_model(BrainUnet(config))
    return Model(model.init, lambda params, x: model.apply(params, x)["T1"])


def measure(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure a step on both sides, each on a state of its own that goes on from step to step."""
    rng = np.random.default_rng(0)
    shape = (work.batch, *(work.edge,) * 3, 1)
    x, target = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    model, optimizer = make_network(work), optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    params = jax.jit(model.init)(jax.random.key(0), x)

    def step(params: Any, moments: Any, x: jax.Array, target: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - target) ** 2))(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    arrays = jax.device_put((x, target))
    state = [params, optimizer.init(params)]
    ours = compile_apart(step, *state, *arrays)
    flops = count_operations(jax.make_jaxpr(step)(*state, *arrays).jaxpr)

    def run() -> jax.Array:
        state[0], state[1], loss = ours.call(*state, *arrays)
        return loss

    functions: dict[str, Callable[[], Any]] = {"jaxmed": run}
    peers: dict[str, TorchUnet] = {}
    accuracy = {}
    if with_peer:
        peer = TorchUnet if work.kind == "plain" else TorchBrain
        peers = {form: peer(work, params, x, target, form, len(conditions.cores)) for form in FORMS}
        losses = np.array([[float(run()) for _ in range(2)], [float(peers["contiguous"].step()) for _ in range(2)]])
        accuracy["difference"] = float(np.abs(losses[0] / losses[1] - 1).max())
        functions |= {form: partial(peer.step) for form, peer in peers.items()}
    seconds = alternate(functions, repeats)
    measured = {"jaxmed": Measurement(seconds["jaxmed"], ours.seconds, flops, accuracy=accuracy)}
    if peers:
        best = min(peers, key=lambda form: float(np.median(seconds[form])))
        device = describe_cpu(conditions.cores) if jax.default_backend() == "cpu" else None
        measured["PyTorch"] = Measurement(seconds[best], versions=versions("torch"), device=device)
    return make_rows("unet3d_step", work.describe(), measured, conditions, peak)


# --- The peer --------------------------------------------------------------------------------

FORMS = ("contiguous", "channels last")


class TorchUnet:
    """The same network and optimizer in PyTorch, with our weights."""

    def __init__(self, work: Workload, params: Any, x: np.ndarray, target: np.ndarray, form: str, threads: int):
        """Build it in one memory format."""
        import torch

        torch.set_num_threads(threads)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        layout = torch.contiguous_format if form == "contiguous" else torch.channels_last_3d
        self.weights = self.collect(jax.device_get(params), layout)
        leaves = [weight.requires_grad_() for pair in self.weights.values() for weight in pair]
        self.optimizer = torch.optim.AdamW(leaves, LEARNING_RATE, weight_decay=DECAY, foreach=True)
        volumes = (self.tensor(np.moveaxis(array, -1, 1)) for array in (x, target))
        self.arrays = [volume.contiguous(memory_format=layout) for volume in volumes]
        self.work = copy.copy(work)

    def tensor(self, array: np.ndarray) -> Any:
        """Put an array onto the device."""
        import torch

        return torch.from_numpy(array.copy()).to(self.device)

    def collect(self, params: Any, layout: Any) -> dict[str, tuple[Any, ...]]:
        """Return our parameters in the peer's layout."""
        weights: dict[str, tuple[Any, ...]] = {}
        for name, value in params.items():
            if isinstance(value, dict) and "kernel" in value:
                kernel = self.tensor(np.transpose(value["kernel"], (4, 3, 0, 1, 2))).contiguous(memory_format=layout)
                weights[name] = (kernel, self.tensor(value["bias"]))
            elif isinstance(value, dict):
                weights[name] = (self.tensor(value["scale"]), self.tensor(value["bias"]))
            else:
                kernel = self.tensor(np.transpose(value, (3, 4, 0, 1, 2)))
                weights[name] = (kernel.contiguous(memory_format=layout),)
        return weights

    def apply(self, x: Any) -> Any:
        """Run the network."""
        import torch
        import torch.nn.functional as F

        def block(x: Any, name: str) -> Any:
            for number in range(2):
                x = F.conv3d(x, *self.weights[f"{name}_conv_{number}"], padding=1)
                x = F.relu(F.group_norm(x, self.work.groups, *self.weights[f"{name}_norm_{number}"]))
            return x

        skips = []
        for level in range(len(self.work.widths)):
            if level:
                x = F.conv3d(x, *self.weights[f"halve_{level}"], stride=2, padding=1)
            x = block(x, f"down_{level}")
            skips.append(x)
        for level in reversed(range(len(self.work.widths) - 1)):
            x = F.conv_transpose3d(x, *self.weights[f"double_{level}"], stride=2)
            x = block(torch.cat([x, skips[level]], 1), f"up_{level}")
        return F.conv3d(x, *self.weights["head"])

    def step(self) -> Any:
        """Take a step; return the loss before it."""
        import torch

        self.optimizer.zero_grad()
        loss = ((self.apply(self.arrays[0]) - self.arrays[1]) ** 2).mean()
        loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


class TorchBrain(TorchUnet):
    """The network of BrainFM with one head."""

    def collect(self, params: Any, layout: Any) -> dict[str, tuple[Any, ...]]:
        """Return our parameters in the peer's layout, by path."""
        weights: dict[str, tuple[Any, ...]] = {}
        for name, value in named_leaves(params).items():
            array = np.asarray(value)
            if array.ndim == 2:
                array = array[None, None, None]
            if array.ndim == 1:
                weights[name] = (self.tensor(array),)
                continue
            kernel = self.tensor(np.transpose(array, (4, 3, 0, 1, 2)))
            weights[name] = (kernel.contiguous(memory_format=layout),)
        return weights

    def apply(self, x: Any) -> Any:
        """Run the network."""
        import torch
        import torch.nn.functional as F

        def weight(name: str) -> Any:
            return self.weights[name][0]

        def level(x: Any, name: str) -> Any:
            for number in range(2):
                groups = 1 if x.shape[1] < self.work.groups else self.work.groups
                norm = f"backbone/{name}/norm_{number}"
                x = F.group_norm(x, groups, weight(f"{norm}/scale"), weight(f"{norm}/bias"))
                x = F.leaky_relu(F.conv3d(x, weight(f"backbone/{name}/conv_{number}/kernel"), padding=1), 0.01)
            return x

        skips = []
        for number in range(len(self.work.widths)):
            x = level(F.max_pool3d(x, 2) if number else x, f"encoder_{number}")
            skips.append(x)
        x = skips.pop()
        for number in reversed(range(len(self.work.widths) - 1)):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = level(torch.cat([skip, x], 1), f"decoder_{number}")
        return F.conv3d(F.normalize(x, dim=1), weight("heads/T1/kernel"), weight("heads/T1/bias"))


if __name__ == "__main__":
    main()

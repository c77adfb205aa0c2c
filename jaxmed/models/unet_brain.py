"""The multi-task U-Net of BrainFM: one volume of any contrast to dense maps of many kinds, from one feature per voxel.

Encoder levels of two convolutions, halved between levels by the largest of 2 x 2 x 2; decoder levels of two, on the
skip and the nearest-neighbour enlargement of the level below, in that order along channels. Every convolution follows
the norm of its input and is followed by a leaky ReLU. The feature has length 1 in every voxel, and every dense task is
a linear map of it. Sizes are free: halving drops an odd last plane, enlarging goes to the size of the skip.

Source: BrainFM, arXiv:2509.00549, official code (UNet3D and its heads).
Deviation: biases start at 0, PyTorch draws them; the heads, which see the same feature, are one matrix product.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Positive, Size, Whole, checked
from jaxmed.errors import InputError
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.group_norm import GroupNorm
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.transformer import Linear
from jaxmed.nn.unet_blocks import double

Task: TypeAlias = Literal[
    "T1", "T2", "FLAIR", "CT", "segmentation", "distance", "bias_field_log", "registration", "high_res_residual",
    "pathology", "age",
]  # fmt: skip
RELEASED: tuple[Task, ...] = ("T1", "T2", "FLAIR", "CT", "segmentation", "distance", "bias_field_log", "registration")
NO_SCALE = ("segmentation", "pathology", "age")  # tasks without an uncertainty of their own
SLOPE, HEAD_SLOPE = 0.01, 0.2  # of the leaky ReLU in the backbone and in further layers of heads
LEAST_NORM = 1e-12
AGE_POOL, AGE_WIDTHS, AGE_HIDDEN = 4, (16, 4), (160, 10)
# Label of each class of the released networks: neutral ones, those of the left side, those of the right in their order.
NEUTRAL = (0, 11, 12, 13, 16, *range(31, 45), 46)
LEFT = (*range(1, 11), 14, 15, 17, 47, 49, 51, 53, 55)
RIGHT = (*range(18, 31), 48, 50, 52, 54, 56)
LABELS = (*NEUTRAL, *LEFT, *RIGHT)
LEFT_LABELS = (0, 1, 2, 3, 4, 7, 8, 9, 10, 14, 15, 17, 31, 34, 36, 38, 40, 42)


@dataclasses.dataclass(frozen=True)
@checked
class BrainUnetConfig:
    """A multi-task U-Net of brain volumes with one channel.

    Attributes:
        width: Channels of the finest level; each further level has twice as many.
        levels: Levels of resolution.
        groups: Groups of the norms; where a convolution has fewer input channels, there is one group.
        tasks: What is predicted, in the order of the joint product.
        labels: The label of each class of the segmentation, in the order of its channels.
        surfaces: Distances: pial and white surface of the left side and of the right ("lp lw rp rw"), or 2 of the left.
        largest_distance: Where processed distances are cut off, in mm.
        uncertainty: Distribution whose logarithm of scale every regression head predicts beside its mean; "none" gives
            the mean alone.
        head_widths: Channels of further 3 x 3 x 3 convolutions of each dense head before its last product.
        age_size: Voxels along each axis of the volumes of which ages are told; other tasks take any size.
        unit_features: Whether the feature of a voxel is divided by its length.
        dtype: Type of activations and products of the backbone; norms, features, heads and results are float32.
        remat: Recompute levels in the backward pass: less memory, a third more work.
    """

    width: Size = 64
    levels: Size = 6
    groups: Size = 8
    tasks: tuple[Task, ...] = RELEASED
    labels: tuple[Whole, ...] = LABELS
    surfaces: Size = 4
    largest_distance: Positive = 3.0
    uncertainty: Literal["none", "gaussian", "laplace"] = "none"
    head_widths: tuple[Size, ...] = ()
    age_size: tuple[Size, Size, Size] = (160, 160, 160)
    unit_features: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: expected one or more, each once, found {' '.join(self.tasks) or 'none'}")
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: expected two or more, each once, found {self.labels}")
        if self.levels > 12:
            raise ValueError(f"levels: expected at most 12, found {self.levels}")
        if "age" in self.tasks and min(self.age_size) < AGE_POOL ** len(AGE_WIDTHS):
            raise ValueError(f"age_size: expected {AGE_POOL ** len(AGE_WIDTHS)} voxels or more, found {self.age_size}")
        if self.width % 2 or any(width % self.norm_groups(width) for width in self.convolved):
            raise ValueError(f"groups: expected a divisor of all of {self.convolved} channels, found {self.groups}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.width * 2**level for level in range(self.levels))

    @property
    def convolved(self) -> tuple[int, ...]:
        """Every number of channels that a convolution sees."""
        pairs = [pair for level in range(self.levels) for pair in self.encoder_pair(level)]
        pairs += [pair for level in range(self.levels - 1) for pair in self.decoder_pair(level)]
        return tuple(sorted({inputs for inputs, _ in pairs}))

    @property
    def dense(self) -> tuple[Task, ...]:
        """Tasks with a value in every voxel."""
        return tuple(task for task in self.tasks if task != "age")

    def channels(self, task: Task) -> int:
        """Channels of a task's map, without logarithms of scale."""
        return {"segmentation": len(self.labels), "distance": self.surfaces, "registration": 3}.get(task, 1)

    def columns(self, task: Task) -> int:
        """Channels of a task's head."""
        has_scale = self.uncertainty != "none" and task not in NO_SCALE
        return self.channels(task) * (2 if has_scale else 1)

    def norm_groups(self, width: int) -> int:
        """Groups of a norm of so many channels."""
        return 1 if width < self.groups else self.groups

    def encoder_pair(self, level: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Input and output channels of both convolutions of an encoder level."""
        inputs, outputs = self.widths[level - 1] if level else 1, self.widths[level]
        middle = max(outputs // 2, inputs)
        return (inputs, middle), (middle, outputs)

    def decoder_pair(self, level: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Input and output channels of both convolutions of the decoder level whose skip has this level."""
        skip, below = self.widths[level], self.widths[level + 1]
        return (skip + below, skip), (skip, skip)


class BrainUnet(nn.Module):
    """A volume to its maps; parts are backbone (encoder_N, decoder_N, N the level) and heads, by task."""

    config: BrainUnetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch x y z 1"], *, feature: bool = False
    ) -> dict[str, Float[Array, "batch *map"]]:
        """Return what the heads give, float32, by task.

        Distances are in mm, coordinates in mm / 100, CT in HU / 1000, the bias field is a logarithm; segmentation and
        pathology are logits (see `process`). With uncertainty "TASK_log_scale" stands beside a task.

        Args:
            x: Volumes in [0, 1].
            feature: Return "feature" too, the vector of every voxel.

        Raises:
            ValueError: An axis is too short to be halved as often as there are levels.
        """
        least = 2 ** (self.config.levels - 1)
        if min(x.shape[1:4]) < least:
            raise ValueError(f"x: expected at least {least} voxels along each axis, got {x.shape[1:4]}")
        found = Backbone(self.config, name="backbone")(x)
        maps = Heads(self.config, name="heads")(found)
        return {**maps, "feature": found} if feature else maps


class Backbone(nn.Module):
    """A volume to one feature vector per voxel."""

    config: BrainUnetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch x y z 1"]) -> Float[Array, "batch x y z width"]:
        """Return features, float32, of length 1 where the configuration says so."""
        config = self.config
        level_of = nn.remat(Level) if config.remat else Level
        skips = []
        for level in range(config.levels):
            if level:
                x = largest_of_cubes(x, 2)
            x = level_of(config, config.encoder_pair(level), name=f"encoder_{level}")(x)
            skips.append(x)
        for level in reversed(range(config.levels - 1)):
            skip = skips[level]
            joined = jnp.concatenate([skip, enlarge(x, skip.shape[1:4])], axis=-1)
            x = level_of(config, config.decoder_pair(level), name=f"decoder_{level}")(joined)
        x = x.astype(jnp.float32)
        if not config.unit_features:
            return x
        squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squared, LEAST_NORM**2))


class Level(nn.Module):
    """Twice norm, 3 x 3 x 3 convolution without bias, leaky ReLU."""

    config: BrainUnetConfig
    pair: tuple[tuple[int, int], tuple[int, int]]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the activations of the second convolution."""
        for number, (inputs, outputs) in enumerate(self.pair):
            x = GroupNorm(self.config.norm_groups(inputs), name=f"norm_{number}")(x)
            x = Convolution(outputs, dtype=self.config.dtype, use_bias=False, name=f"conv_{number}")(x)
            x = nn.leaky_relu(x, SLOPE)
        return x


class Heads(nn.Module):
    """Features to the maps of all tasks."""

    config: BrainUnetConfig

    @nn.compact
    def __call__(self, feature: Float[Array, "batch x y z width"]) -> dict[str, Float[Array, "batch *map"]]:
        """Return raw maps by task; without further layers from one product."""
        config = self.config
        heads = {task: Head(config.columns(task), config.head_widths, name=task)(feature) for task in config.dense}
        if config.head_widths:
            maps = {task: inputs @ kernel + bias for task, (inputs, kernel, bias) in heads.items()}
        else:
            _, kernels, biases = zip(*heads.values(), strict=True)
            product = feature @ jnp.concatenate(kernels, axis=1) + jnp.concatenate(biases)
            ends = list(itertools.accumulate(config.columns(task) for task in config.dense))
            maps = dict(zip(heads, jnp.split(product, ends[:-1], axis=-1), strict=True))
        if "age" in config.tasks:
            maps["age"] = AgeHead(name="age")(feature)
        return {name: part for task, value in maps.items() for name, part in self._parts(task, value).items()}

    def _parts(self, task: Any, value: jax.Array) -> dict[str, jax.Array]:
        count = self.config.channels(task)
        if task == "age" or value.shape[-1] == count:
            return {task: value}
        return {task: value[..., :count], f"{task}_log_scale": value[..., count:]}


class Head(nn.Module):
    """What a task has of its own: convolutions of the feature, where there are any, and the last linear map."""

    columns: int
    widths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, feature: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what the last map is applied to, its kernel [width, columns] and its bias."""
        for number, width in enumerate(self.widths):
            feature = nn.leaky_relu(Convolution(width, name=f"conv_{number}")(feature), HEAD_SLOPE)
        draw = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", draw, (feature.shape[-1], self.columns), jnp.float32)
        return feature, jnp.asarray(kernel), self.param("bias", nn.initializers.zeros, (self.columns,), jnp.float32)


class AgeHead(nn.Module):
    """Features to an age in years, of volumes of one size: twice pooled and convolved, then three linear maps."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch x y z width"]) -> Float[Array, " batch"]:
        """Return one number per volume; `process` takes its absolute value."""
        for number, width in enumerate(AGE_WIDTHS):
            x = Convolution(width, name=f"conv_{number}")(largest_of_cubes(x, AGE_POOL))
            x = nn.leaky_relu(x, HEAD_SLOPE)
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(AGE_HIDDEN):
            x = nn.relu(Linear(width, name=f"linear_{number}")(x))
        return Linear(1, name=f"linear_{len(AGE_HIDDEN)}")(x)[:, 0]


def process(config: BrainUnetConfig, maps: dict[str, Float[Array, "batch *map"]]) -> dict[str, Array]:
    """Return what a user reads of raw maps: probabilities, distances within their limits, ages above 0."""
    limit = config.largest_distance
    functions = {
        "segmentation": jax.nn.softmax,
        "distance": lambda value: jnp.clip(value, -limit, limit),
        "pathology": jax.nn.sigmoid,
        "age": jnp.abs,
    }
    return {name: functions[name](value) if name in functions else value for name, value in maps.items()}


def largest_of_cubes(x: Float[Array, "batch x y z channel"], edge: int) -> Float[Array, "batch x2 y2 z2 channel"]:
    """Return the largest value of every cube; planes that fill no cube are left out."""
    space = [length // edge for length in x.shape[1:4]]
    x = x[:, : edge * space[0], : edge * space[1], : edge * space[2]]
    cut = x.reshape(x.shape[0], space[0], edge, space[1], edge, space[2], edge, x.shape[-1])
    return cut.max(axis=(2, 4, 6))


def enlarge(x: Float[Array, "batch x y z channel"], space: tuple[int, ...]) -> Float[Array, "batch x2 y2 z2 channel"]:
    """Return the nearest neighbours on a grid that halving, rounded down, makes this one of.

    Voxel i of n is taken from floor(i m / n) of m voxels (PyTorch's "nearest"). Where n = 2 m that is i // 2; where
    n = 2 m + 1 the first voxel stands three times and every other twice.
    """
    x = double(x)
    for axis, (length, wanted) in enumerate(zip(x.shape[1:4], space, strict=True), start=1):
        if wanted - length not in (0, 1):
            raise ValueError(f"space: expected {length} or {length + 1} voxels along axis {axis}, got {wanted}")
        if wanted > length:
            x = jnp.concatenate([jax.lax.slice_in_dim(x, 0, 1, axis=axis), x], axis=axis)
    return x


def brain_unet(config: BrainUnetConfig, size: tuple[int, int, int]) -> Network:
    """Return the network for volumes of one size.

    Args:
        config: Its sizes.
        size: Voxels along each axis.

    Raises:
        InputError: The volumes are too small to be halved so often, or of another size than the head of ages takes.
    """
    least = 2 ** (config.levels - 1)
    if min(size) < least:
        expected = f"at least {least} voxels along each axis, which {config.levels} levels need"
        raise InputError("size", expected, f"{size}", "change the size, or --model.levels")
    if "age" in config.tasks and size != config.age_size:
        raise InputError("model.age_size", f"{size}, the size of the volumes", f"{config.age_size}")
    model = make_model(BrainUnet(config))

    def init(key: KeyArray) -> Params:
        # A start has as many draws as parameters, and each threefry is a loop of its own to the compiler; XLA's own
        # generator compiles in a third of the time.
        key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
        return model.init(key, jnp.zeros((1, *size, 1)))

    return Network(init, model.apply, SHARDING_RULES)


def largest_activation(config: BrainUnetConfig, size: tuple[int, ...]) -> int:
    """Return the bytes of the largest array of a forward pass: the joined channels of the finest decoder level."""
    channels = config.width + (config.widths[1] if config.levels > 1 else 0)
    return math.prod(size) * channels * 4


# Parameters are split by their size alone, as `train.mesh.param_shardings` does without rules. One large volume is
# split along x over the axis "model" of the mesh; the compiler then exchanges the neighbouring planes.
SHARDING_RULES = ()
VOLUME_SHARDING = PartitionSpec(None, "model")

BRAINFM = BrainUnetConfig()
HEMISPHERE = BrainUnetConfig(tasks=tuple(task for task in RELEASED if task != "CT"), labels=LEFT_LABELS, surfaces=2)

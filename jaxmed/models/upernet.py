"""UPerNet (arXiv:1807.10221) in 2D and 3D: the maps of all stages of a ConvNeXt to logits of every voxel.

Source: ProFound, official code: layer norms and exact GELU in place of BatchNorm and ReLU, a layer norm on the map of
every stage, and a convolutional head on the third stage whose logits only training uses.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxmed.arrays.position import resize_matrix
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Length, Size, checked
from jaxmed.models.convnext import ConvNext, ConvNextConfig
from jaxmed.nn.convolution import Convolution
from jaxmed.nn.model import Network, make_model
from jaxmed.nn.transformer import LayerNorm

INIT = nn.initializers.normal(0.02)
AUXILIARY_STAGE = 2


@dataclasses.dataclass(frozen=True)
@checked
class UperNetConfig:
    """A segmenter; the defaults are ProFound's.

    Attributes:
        encoder: The network whose stages are read.
        classes: Logits of a voxel: one for a mask, else one per class, the background included.
        width: Channels of the head.
        auxiliary_width: Channels of the head on the third stage; 0 for none.
        pools: Places along each axis to which the last stage is averaged.
    """

    encoder: ConvNextConfig = ConvNextConfig(drop_path_rate=0.1)
    classes: Size = 2
    width: Size = 512
    auxiliary_width: Length = 256
    pools: tuple[Size, ...] = (1, 2, 3, 6)

    def __post_init__(self) -> None:
        if self.auxiliary_width and len(self.encoder.depths) <= AUXILIARY_STAGE:
            found = f"{len(self.encoder.depths)} stages"
            raise ValueError(f"auxiliary_width: expected 0 for an encoder without a third stage, found {found}")


class UperNet(nn.Module):
    """Parameters are {"encoder": ..., "hidden_norm": ..., "decoder": ..., "auxiliary": ...}."""

    config: UperNetConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = ConvNext(config.encoder)
        self.hidden_norm = StageNorms(len(config.encoder.depths))
        self.decoder = UperHead(config)
        if config.auxiliary_width:
            self.auxiliary = AuxiliaryHead(config)

    def __call__(
        self, image: Float[Array, "batch ..."], *, key: KeyArray | None = None, training: bool = False
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."] | None]:
        """Return logits [batch, *space, classes] of the decoder, and in training those of the auxiliary head.

        Args:
            image: [batch, *image_size, channels].
            key: Switches stochastic depth on.
            training: Whether the auxiliary head is asked.
        """
        maps = self.hidden_norm(self.encoder.maps(image, key=key))
        size = image.shape[1:-1]
        logits = resize_map(self.decoder(maps), size)
        if not (training and self.config.auxiliary_width):
            return logits, None
        return logits, resize_map(self.auxiliary(maps[AUXILIARY_STAGE]), size)


def upernet_network(config: UperNetConfig) -> Network:
    """Return UPerNet as training takes it, its auxiliary head drawn too."""
    model, encoder = make_model(UperNet(config)), config.encoder

    def init(key: KeyArray) -> Params:
        return model.init(key, jnp.zeros((1, *encoder.image_size, encoder.channels)), training=True)

    return Network(init, model.apply)


class StageNorms(nn.Module):
    """A layer norm over the channels of every stage's map."""

    stages: int

    @nn.compact
    def __call__(self, maps: list[Any]) -> list[Any]:
        return [LayerNorm(name=f"norm_{stage}")(found) for stage, found in enumerate(maps)]


class UperHead(nn.Module):
    """Pyramid pooling of the last stage, then a path from coarse to fine stages; logits on the finest map."""

    config: UperNetConfig

    @nn.compact
    def __call__(self, maps: list[Any]) -> Float[Array, "batch *space classes"]:
        config, dtype = self.config, self.config.encoder.dtype
        *finer, last = maps

        def unit(name: str, size: int = 1) -> "ConvUnit":
            return ConvUnit(config.width, size, dtype, name=name)

        pooled = [last]
        for number, count in enumerate(config.pools):
            pooled.append(resize_map(unit(f"pool_{number}")(average_map(last, count)), last.shape[1:-1]))
        above = unit("bottleneck", 3)(jnp.concatenate(pooled, axis=-1))
        levels = [above]
        for stage in reversed(range(len(finer))):
            lateral = unit(f"lateral_{stage}")(finer[stage])
            above = lateral + resize_map(above, lateral.shape[1:-1])
            levels.insert(0, above)
        outputs = [unit(f"level_{stage}", 3)(level) for stage, level in enumerate(levels[:-1])] + levels[-1:]
        size = outputs[0].shape[1:-1]
        fused = jnp.concatenate([outputs[0], *(resize_map(one, size) for one in outputs[1:])], axis=-1)
        fused = unit("fusion", 3)(fused)
        classify = Convolution(config.classes, 1, dtype=dtype, kernel_init=INIT, name="classifier")
        return classify(fused).astype(jnp.float32)


class AuxiliaryHead(nn.Module):
    """A 3 x 3 x 3 convolution and a map to logits."""

    config: UperNetConfig

    @nn.compact
    def __call__(self, found: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space classes"]:
        config, dtype = self.config, self.config.encoder.dtype
        hidden = ConvUnit(config.auxiliary_width, 3, dtype, name="unit")(found)
        classify = Convolution(config.classes, 1, dtype=dtype, kernel_init=INIT, name="classifier")
        return classify(hidden).astype(jnp.float32)


class ConvUnit(nn.Module):
    """Convolution without bias, layer norm over channels, exact GELU; float32."""

    width: int
    size: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space width"]:
        conv = Convolution(self.width, self.size, dtype=self.dtype, kernel_init=INIT, use_bias=False, name="conv")
        return nn.gelu(LayerNorm(name="norm")(conv(x)), approximate=False)


def resize_map(found: Float[Array, "batch *space channel"], size: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Interpolate a map linearly: PyTorch's `interpolate(mode="trilinear", align_corners=False)`."""
    return _by_axes(
        found, [resize_matrix(old, new, "linear") for old, new in zip(found.shape[1:-1], size, strict=True)]
    )


def average_map(found: Float[Array, "batch *space channel"], count: int) -> Float[Array, "batch *place channel"]:
    """Average a map to so many places along each axis: PyTorch's adaptive average pooling, whose windows overlap."""
    return _by_axes(found, [_average_matrix(old, count) for old in found.shape[1:-1]])


def _average_matrix(old: int, new: int) -> Float32[np.ndarray, "new old"]:
    places, starts = np.arange(old), np.arange(new)[:, None] * old // new
    ends = -(-(np.arange(new)[:, None] + 1) * old // new)
    inside = (places >= starts) & (places < ends)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _by_axes(found: Array, matrices: list[np.ndarray]) -> Array:
    for axis, matrix in enumerate(matrices, start=1):
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix))):
            found = jnp.moveaxis(jnp.tensordot(matrix, found, (1, axis), precision="highest"), 0, axis)
    return found

"""DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104): the published sizes, and the head of their pre-training.

A head turns a token into scores of prototypes, [token, prototype]; student and teacher are compared by them. It has no
place in what is exported.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmed.config import Count, Size, checked
from jaxmed.models.vit import VitConfig
from jaxmed.nn.transformer import Linear, MlpKind

Dinov2Size: TypeAlias = Literal["S", "B", "L", "g"]
Dinov3Size: TypeAlias = Literal["S", "S+", "B", "L", "H+", "7B"]


class _Sizes(NamedTuple):
    width: int
    depth: int
    heads: int
    hidden: int
    mlp: MlpKind = "gelu"


_DINOV2: dict[Dinov2Size, _Sizes] = {
    "S": _Sizes(384, 12, 6, 1536),
    "B": _Sizes(768, 12, 12, 3072),
    "L": _Sizes(1024, 24, 16, 4096),
    "g": _Sizes(1536, 40, 24, 4096, "swiglu"),
}
_DINOV3: dict[Dinov3Size, _Sizes] = {
    "S": _Sizes(384, 12, 6, 1536),
    "S+": _Sizes(384, 12, 6, 1536, "swiglu"),
    "B": _Sizes(768, 12, 12, 3072),
    "L": _Sizes(1024, 24, 16, 4096),
    "H+": _Sizes(1280, 32, 20, 5120, "swiglu"),
    "7B": _Sizes(4096, 40, 32, 8192, "swiglu"),
}


def dinov2(
    size: Dinov2Size = "L",
    *,
    registers: int = 0,
    image_size: tuple[int, int] = (518, 518),
    patch_size: tuple[int, int] = (14, 14),
    **settings: Any,
) -> VitConfig:
    """Return a transformer of DINOv2 for RGB images; its factors on branches begin at 1e-5, as in training.

    Args:
        size: One of the published.
        registers: Tokens without a place; 4 in the models published with them.
        image_size: In pixels; the published tables of positions are those of 518.
        patch_size: In pixels.
        settings: Further fields of `VitConfig`, or others in place of these.

    Source: official code of DINOv2.
    """
    sizes: dict[str, Any] = _DINOV2[size]._asdict()
    fixed = {"channels": 3, "positions": "learned", "registers": registers, "mask_token": True, "layer_scale": 1e-5}
    return VitConfig(image_size, patch_size, **{**sizes, **fixed, **settings})


def dinov3(size: Dinov3Size = "L", *, image_size: tuple[int, int] = (224, 224), **settings: Any) -> VitConfig:
    """Return a transformer of DINOv3 for RGB images, with 4 registers; see `dinov2`.

    Source: official code of DINOv3; its largest model has no constants in queries, keys and values.
    """
    sizes: dict[str, Any] = _DINOV3[size]._asdict()
    fixed = {
        "channels": 3, "positions": "rope", "registers": 4, "mask_token": True, "layer_scale": 1e-5,
        "qkv_bias": "none" if size == "7B" else "all but keys", "epsilon": 1e-5,
    }  # fmt: skip
    return VitConfig(image_size, (16, 16), **{**sizes, **fixed, **settings})


@dataclasses.dataclass(frozen=True)
@checked
class DinoHeadConfig:
    """A projection head.

    Attributes:
        prototypes: Scores of a token.
        hidden: Width of the two hidden layers.
        bottleneck: Width of the code that is compared with prototypes.
    """

    prototypes: Count = 65_536
    hidden: Size = 2048
    bottleneck: Size = 256


class DinoHead(nn.Module):
    """Three linear maps with GELU between them, then the cosine with every prototype times the prototype's gain.

    Source: DINO, arXiv:2104.14294, appendix C, without batch norm; DINOv2, official code.
    """

    config: DinoHeadConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: Float[Array, "*batch width"]) -> Float[Array, "*batch prototype"]:
        config, init, x = self.config, nn.initializers.normal(0.02), tokens
        for name in ("fc1", "fc2"):
            x = nn.gelu(Linear(config.hidden, self.dtype, init, name=name)(x), approximate=False)
        code = unit(Linear(config.bottleneck, self.dtype, init, name="fc3")(x).astype(jnp.float32), 1e-12)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        prototypes = jnp.asarray(self.param("prototypes", uniform, (config.bottleneck, config.prototypes)))
        gain = self.param("gain", nn.initializers.ones, (config.prototypes,))
        # The products are scaled in place of the prototypes: on the few tokens of a step that is less to compute.
        product = jnp.dot(code.astype(self.dtype), prototypes.astype(self.dtype), preferred_element_type=jnp.float32)
        # As a product, for XLA sums columns on a CPU at a twentieth of the memory's speed: half of a step's time.
        squares = jnp.dot(jnp.ones(config.bottleneck), jnp.square(prototypes), precision="highest")
        return product * (gain * jax.lax.rsqrt(squares))


def unit(x: Float[Array, "*batch width"], epsilon: float) -> Float[Array, "*batch width"]:
    """Return vectors of length 1; those shorter than epsilon are divided by it."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), epsilon**2))


# Layouts over the mesh axis "model": prototypes are split, and the hidden layers like those of a transformer.
SHARDING_RULES = (
    (r"head/fc1/kernel$", PartitionSpec(None, "model")),
    (r"head/fc1/bias$", PartitionSpec("model")),
    (r"head/fc2/kernel$", PartitionSpec("model", None)),
    (r"head/prototypes$", PartitionSpec(None, "model")),
    (r"head/gain$", PartitionSpec("model")),
)

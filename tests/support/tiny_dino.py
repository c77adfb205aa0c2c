"""A small DINOv2 as its official files hold one, of drawn weights; its width tells how many heads it has."""

import dataclasses

from drawn_weights import draw

from jaxmed.io import safetensors
from jaxmed.models.published import dino
from jaxmed.models.vit import VitConfig

TINY_DINO = VitConfig(
    (28, 28), (14, 14), 3, 384, 1, 6, 64, positions="learned", mask_token=True, layer_scale=1.0
)  # fmt: skip
WITH_REGISTERS = dataclasses.replace(TINY_DINO, registers=4)
TINY_DINO3 = dataclasses.replace(
    TINY_DINO, image_size=(32, 32), patch_size=(16, 16), positions="rope", registers=4, qkv_bias="all but keys",
    epsilon=1e-5,
)  # fmt: skip


def write_dino(path, config=TINY_DINO, prefix="", generation="dinov2"):
    """Write drawn weights under the official names behind a prefix, and return the path."""
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in dino.entries(generation, config)}
    safetensors.write(path, {f"{prefix}{name}": value for name, value in tensors.items()})
    return path

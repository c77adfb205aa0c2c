"""A linear denoising autoencoder: the smallest problem that needs keys, a layout and several parameters."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

EDGE, WIDTH, BATCH = 4, 16, 16
RULES = (
    ("encoder/kernel", PartitionSpec("data", "model")),
    ("decoder/kernel", PartitionSpec("model", "data")),
)


def init(key, width: int = WIDTH):
    encoder, decoder = jax.random.split(key)
    voxels = EDGE**3
    return {
        "encoder": {"kernel": 0.1 * jax.random.normal(encoder, (voxels, width)), "bias": jnp.zeros(width)},
        "decoder": {"kernel": 0.1 * jax.random.normal(decoder, (width, voxels)), "bias": jnp.zeros(voxels)},
    }


def loss(params, keys, batch, dtype=jnp.float32):
    clean = batch["image"].reshape(len(batch["image"]), -1)
    noise = jax.vmap(lambda key, row: jax.random.normal(key, row.shape))(keys, clean)
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    code = (clean + 0.1 * noise).astype(dtype) @ weights["encoder"]["kernel"] + weights["encoder"]["bias"]
    output = code @ weights["decoder"]["kernel"] + weights["decoder"]["bias"]
    error = jnp.mean(jnp.square(output.astype(jnp.float32) - clean))
    return error, {"root": jnp.sqrt(error)}


def batches(share: tuple[int, int] = (0, 1), seed: int = 0, batch: int = BATCH) -> Callable[[int], Iterator[dict]]:
    """Return this process's share of a stream that is a function of the step alone."""
    index, count = share
    size = batch // count

    def stream(start: int):
        step = start
        while True:
            factors = np.random.default_rng([seed, step]).standard_normal((batch, 3)).astype(np.float32)
            axes = np.linspace(-1, 1, EDGE**3, dtype=np.float32)
            images = factors @ np.stack([axes, axes**2, np.sin(3 * axes)])
            yield {"image": images.reshape(batch, EDGE, EDGE, EDGE)[index * size : (index + 1) * size]}
            step += 1

    return stream

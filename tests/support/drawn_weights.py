"""Values for the tensors of published models, from their names alone: PyTorch and the tests draw the same."""

import zlib

import numpy as np


def draw(name, shape):
    """Return values of which none is a start value, so that the zero convolutions count."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) * 2 - 1
    if len(shape) == 1:
        return np.float32(1.0 if name.endswith("weight") else 0.0) + np.float32(0.3) * noise
    return noise * np.float32((3 / np.prod(shape[1:])) ** 0.5)


def draw_image(size):
    """Return one image [1, row, column, 3]."""
    return np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32)


def draw_volume(size):
    """Return one volume [x, y, z] in [0, 1]."""
    return np.random.default_rng(1).random(size, np.float32)


def draw_latent(space, channels, seed=0):
    """Return two latents [2, *space, channel]."""
    return np.random.default_rng(seed).standard_normal((2, *space, channels)).astype(np.float32)

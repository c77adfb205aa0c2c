"""A stand-in for a multimodal model that knows nothing: fixed random sums over picture and words.

Its logits are W_I z_I + W_T z_T + W_X (z_I z_T), of a coarse picture z_I and of counted words z_T, so that its answers
change smoothly with both. Whatever it says about a patient is chance.
"""

import re
import zlib

import numpy as np
from jaxtyping import Float, Float64

EDGE = 4
FEATURES = EDGE * EDGE
IMAGE, TEXT, BOTH = 1.5, 1.5, 0.75
"""How much the three parts of the logits weigh."""


def stand_in_probabilities(
    image: Float[np.ndarray, "row column"], text: str, options: int
) -> Float64[np.ndarray, " option"]:
    """Return the probabilities of so many options, at most 26.

    Args:
        image: Intensities from 0 to 1.
        text: Of the question; words count, their order does not.
        options: How many there are.
    """
    picture, words = _coarse(image), _counted(text)
    by_image, by_text, by_both = np.random.default_rng(0).standard_normal((3, 26, FEATURES))[:, :options]
    logits = IMAGE * by_image @ picture + TEXT * by_text @ words + BOTH * by_both @ (picture * words)
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def _coarse(image: np.ndarray) -> np.ndarray:
    """Return means over a grid of cells, about 0."""
    rows = np.array_split(np.asarray(image, np.float64), EDGE, axis=0)
    cells = [part.mean() if part.size else 0.0 for row in rows for part in np.array_split(row, EDGE, axis=1)]
    found = np.array(cells)
    return found - found.mean()


def _counted(text: str) -> np.ndarray:
    found = np.zeros(FEATURES)
    words = re.findall(r"\w+", text.lower())
    for word in words:
        number = zlib.crc32(word.encode())
        found[number % FEATURES] += 1 if number & 0x10000 else -1
    return found / np.sqrt(max(len(words), 1))

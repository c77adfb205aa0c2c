"""What features of many scans look like together: their plane of largest spread, and who is next to whom."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

# Distances are told in units of the typical one. Scans this close are the same scan, stored or resampled twice.
DUPLICATE = 0.02
BLOCK = 1024


class Plane(NamedTuple):
    """The first two principal components.

    Attributes:
        places: Coordinates of every scan.
        explained: Shares of the variance along both.
    """

    places: Float64[np.ndarray, "scan 2"]
    explained: tuple[float, float]


class Neighbours(NamedTuple):
    """The nearest other scan of each.

    Attributes:
        index: Which.
        distance: Euclidean, in units of the root mean squared distance between two scans: near 1 when they are
            unrelated, 0 when they are the same.
    """

    index: Int[np.ndarray, " scan"]
    distance: Float64[np.ndarray, " scan"]


def principal_plane(features: Float[np.ndarray, "scan feature"]) -> Plane:
    """Project centred features onto their two directions of largest variance; the farthest scan is on the right.

    Raises:
        ValueError: There are fewer than two scans.
    """
    _require_two(features)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    wide = centred.shape[1] > centred.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = np.maximum(values[::-1][:2], 0), vectors[:, ::-1][:, :2]
    if vectors.shape[1] < 2:  # a single feature
        values, vectors = np.append(values, 0.0), np.pad(vectors, ((0, 0), (0, 1)))
    places = vectors * np.sqrt(values) if wide else centred @ vectors
    largest = np.abs(places).argmax(axis=0)
    places = places * np.where(places[largest, [0, 1]] < 0, -1.0, 1.0)
    total = float((centred**2).sum()) or 1.0
    return Plane(places, (float(values[0] / total), float(values[1] / total)))


def find_neighbours(features: Float[np.ndarray, "scan feature"]) -> Neighbours:
    """Find the nearest other scan of each, by all distances.

    Raises:
        ValueError: There are fewer than two scans.
    """
    _require_two(features)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    lengths = (centred**2).sum(axis=1)
    typical = np.sqrt(2 * lengths.sum() / (len(features) - 1)) or 1.0
    index = np.empty(len(features), np.int64)
    for start in range(0, len(features), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(features)))
        squares = lengths[rows, None] + lengths[None] - 2 * centred[rows] @ centred.T
        squares[np.arange(len(rows)), rows] = np.inf
        index[rows] = squares.argmin(axis=1)
    # Of the chosen pairs alone, by differences: the form above loses the digits of small distances.
    distance = np.sqrt(((centred - centred[index]) ** 2).sum(axis=1))
    return Neighbours(index, distance / typical)


def effective_rank(features: Float[np.ndarray, "scan feature"]) -> float:
    """Return in how many directions centred features spread: the exponential of the entropy of singular values.

    It is 1 where they lie on a line, or in one point, and at most the smaller number of scans and of features.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007; as RankMe, arXiv:2210.02885, on features.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False)
    shares = values[values > 1e-12 * max(float(values[0]), 1e-300)] / max(float(values.sum()), 1e-300)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _require_two(features: Float[np.ndarray, "scan feature"]) -> None:
    if len(features) < 2:
        raise ValueError(f"features: expected two or more scans, got {len(features)}")

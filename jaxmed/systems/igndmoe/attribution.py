"""Which mechanism drives which stage, with its uncertainty: a bootstrap over subjects, and mechanisms left out."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.systems.igndmoe.fitting import Fit, bootstrap_weights

LOW, HIGH = 5.0, 95.0
"""Percentiles of the bands."""


class Bands(NamedTuple):
    """Percentiles over bootstrap draws.

    Attributes:
        middle: Median.
        low: 5th percentile.
        high: 95th percentile.
    """

    middle: Float[np.ndarray, "*row column"]
    low: Float[np.ndarray, "*row column"]
    high: Float[np.ndarray, "*row column"]


def draw_weights(key: Array, train: Float[np.ndarray, " subject"], draws: int) -> Float[np.ndarray, "run subject"]:
    """Return weights of runs: the cohort itself, then draws of its training subjects with replacement."""
    inside = np.flatnonzero(train > 0)
    weights = np.zeros((draws + 1, len(train)), np.float32)
    weights[0] = train
    weights[1:, inside] = bootstrap_weights(key, len(inside), draws)
    return weights


def bands(values: Float[np.ndarray, "draw *row column"]) -> Bands:
    """Return the median and the ends of the 90% band over draws."""
    low, middle, high = np.percentile(values, [LOW, 50.0, HIGH], axis=0)
    return Bands(middle, low, high)


def contributions(fit: Fit) -> Float[np.ndarray, "run time expert"]:
    """Return each mechanism's share of what moves an average region: weight x size of its rate, summing to 1.

    A weight alone says little, since a network can grow while its weight shrinks; their product is what counts.
    """
    size = np.sqrt(np.mean(np.square(np.asarray(fit.experts, float)), axis=-1)) * np.asarray(fit.weights, float)
    return size / np.maximum(size.sum(axis=-1, keepdims=True), 1e-12)


def ablations(model: ProgressionConfig) -> dict[str, ProgressionConfig]:
    """Return the mixture, and what is left when a part is taken out."""
    change = dataclasses.replace
    found = {
        "complete": model,
        "weights that do not change with stage": change(model, gate="constant"),
        "mechanistic alone": change(model, equation="fkpp"),
        "mechanistic without growth": change(model, reaction=False),
    }
    if not model.quirks:
        found["without graph diffusion"] = change(model, structure="none")
        found["without local reaction"] = change(model, local="none")
    return found


def take_run(fit: Fit, index: int) -> Fit:
    """Return one run of many."""
    return jax.tree.map(lambda leaf: leaf[index], fit)

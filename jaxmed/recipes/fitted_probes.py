"""Features that are computed once, and the probes that need no steps on them: logistic regression and neighbours."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.data.loader import Fields, Transform
from jaxmed.data.records import ArraySource, Source
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, Neighbours, unit_length
from jaxmed.nn.model import make_model
from jaxmed.recipes.adapt_scoring import Select, best_of, collect, feature_maker, head_scorer, measure, read_batches
from jaxmed.recipes.probe import fit_probe
from jaxmed.recipes.training import TrainConfig, TrainData
from jaxmed.train.mesh import make_mesh


class Fitted(NamedTuple):
    """A probe that was fitted.

    Attributes:
        head: The head that gives its logits.
        params: Of that head.
        values: What `measure` tells of the validation records.
        choices: What was tried, one row each, and whether it was chosen.
    """

    head: HeadConfig
    params: Params
    values: dict[str, float]
    choices: list[dict[str, Any]]


def compute_features(
    config: TrainConfig, encoder: Encoder, layers: int, params: Params, source: Source, transform: Transform
) -> ArraySource:
    """Encode every record once.

    Args:
        config: Its reading and devices.
        encoder: The encoder.
        layers: Blocks that the head looks at.
        params: Of the encoder.
        source: Records.
        transform: To "image", "target", "weights" and "importance"; the last three come along.

    Returns:
        Records of "tokens" [layers + 1, width], the class tokens of the last blocks and the mean of the patch tokens
        (the mean alone where there is no class token): a head makes of these what it makes of all.
    """
    mesh = make_mesh(config.mesh)
    targets: list[np.ndarray] = []
    batches = read_batches(config, source, transform, mesh)
    importance = np.ones(len(source), np.float32)
    tokens = collect(feature_maker(encoder, layers, mesh), params, batches, len(source), targets, importance)
    weights = np.asarray(transform(source[0], np.random.default_rng(0))["weights"])
    return ArraySource(
        {"tokens": tokens, "target": targets[0], "weights": np.repeat(weights[None], len(source), axis=0),
         "importance": importance}, "features",
    )  # fmt: skip


def identity(fields: Fields, generator: object = None) -> Fields:
    """Return the fields of a record that is ready."""
    return fields


def fit_logistic(prefix: int, head: HeadConfig, task: Task, weights: tuple[float, ...], once: TrainData) -> Fitted:
    """Fit a logistic regression or ridge, see `recipes.probe`.

    Args:
        prefix: Of the encoder.
        head: A linear head on features as they are.
        task: The task.
        weights: Of positives or classes.
        once: Records of `compute_features`.
    """
    training, held_out = _arrays(once)
    features, others = (_pool(head, prefix, arrays["tokens"]) for arrays in (training, held_out))
    wanted = held_out["target"]
    probe = fit_probe(task.kind, features, training["target"], others, wanted, np.array(weights, np.float32),
                      training["importance"])  # fmt: skip
    names = ("all classes",) if task.kind == "multiclass" else task.names
    choices = [
        {"label": name, "strength": strength, "validation_loss": float(probe.losses[row, column]),
         "chosen": int(strength == probe.chosen[column])}
        for column, name in enumerate(names) for row, strength in enumerate(probe.strengths)
    ]  # fmt: skip
    values = measure(task, others @ probe.kernel + probe.bias, wanted, weights)
    return Fitted(head, {"linear": {"kernel": probe.kernel, "bias": probe.bias}}, values, choices)


def fit_neighbours(
    config: TrainConfig,
    prefix: int,
    head: HeadConfig,
    task: Task,
    weights: tuple[float, ...],
    once: TrainData,
    counts: tuple[int, ...],
    temperature: float,
    select: Select,
) -> Fitted:
    """Keep the training records' features, and choose how many neighbours vote.

    Args:
        config: Its reading and devices.
        prefix: Of the encoder.
        head: A head on features as they are.
        task: The task.
        weights: Of positives or classes, in the validation loss.
        once: Records of `compute_features`.
        counts: Numbers of neighbours that are tried; those above the number of records stand for it.
        temperature: See `models.heads.Neighbours`.
        select: What chooses on the validation records.

    Source: DINO, arXiv:2104.14294, released code, with its numbers of neighbours and its temperature.
    Deviation: the number is chosen on validation records, where the code tells the results of all.
    """
    training, held_out = _arrays(once)
    targets = training["target"]
    if task.kind == "multiclass":
        targets = np.eye(head.outputs, dtype=np.float32)[targets[:, 0].astype(int)]
    known = np.isfinite(targets)
    bank = np.asarray(unit_length(jnp.asarray(_pool(head, prefix, training["tokens"]))))
    params = {
        "vote": {
            "bank": bank, "targets": np.where(known, targets, 0).astype(np.float32), "known": known.astype(np.float32),
        }
    }  # fmt: skip
    mesh, votes, found = make_mesh(config.mesh), [], []
    assert once.held_out is not None
    for count in sorted({min(number, len(bank)) for number in counts}):
        votes.append(Neighbours(count, len(bank), task.kind, temperature))
        run = head_scorer(dataclasses.replace(head, neighbours=votes[-1]), None, prefix, mesh)
        batches = read_batches(config, once.held_out, identity, mesh)
        logits = collect(run, {"head": params}, batches, len(once.held_out))
        found.append(measure(task, logits, held_out["target"], weights))
    best = best_of(found, select)
    choices = [
        {"neighbours": vote.count, **values, "chosen": int(place == best)}
        for place, (vote, values) in enumerate(zip(votes, found, strict=True))
    ]
    return Fitted(dataclasses.replace(head, neighbours=votes[best]), params, found[best], choices)


def _arrays(once: TrainData) -> tuple[Any, Any]:
    sources: Any = (once.training, once.held_out)
    return sources[0].arrays, sources[1].arrays


def _pool(head: HeadConfig, prefix: int, tokens: np.ndarray) -> np.ndarray:
    """Return what enters the head."""
    apply = make_model(Head(head, min(prefix, 1))).apply
    return np.asarray(apply({}, jnp.asarray(tokens), method="features"))

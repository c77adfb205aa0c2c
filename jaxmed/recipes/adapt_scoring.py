"""What a model says of every record, and what an evaluation makes of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.data.loader import Transform, evaluation_batches
from jaxmed.data.records import Source
from jaxmed.errors import InputError
from jaxmed.metrics import weighted
from jaxmed.metrics.classification import auroc, confusion_matrix
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig
from jaxmed.nn.model import make_model
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.probe_grid import ProbeGrid, grid_logits
from jaxmed.recipes.training import TrainConfig
from jaxmed.train.mesh import process_slice, shard_batch

Select: TypeAlias = Literal["loss", "auroc", "score"]


def measure(
    task: Task,
    logits: Float[np.ndarray, "record output"],
    targets: Float[np.ndarray, "record column"],
    weights: tuple[float, ...],
) -> dict[str, float]:
    """Return what an evaluation tells: the loss (weighted, without smoothing), and "auroc" and "score" where defined.

    The AUROC of several classes or labels is the mean of each one's against the rest. The score is the mean of macro F1
    (over both classes of a binary label), that AUROC and Cohen's kappa; of several labels the mean of theirs.

    Args:
        task: The task.
        logits: Of the records.
        targets: As the loss takes them: standardised, NaN where missing.
        weights: From `loss_weights`.

    Source: RETFound's official fine-tuning code selects by the score.
    """
    losses = task_losses(task.kind, jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    found = {"loss": float(np.mean(np.asarray(losses), dtype=np.float64))}
    if task.kind == "regression":
        return found
    if task.kind == "multiclass":
        truth = targets[:, 0].astype(int)
        if len(set(truth)) < logits.shape[1]:
            return found
        scores = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=1))
        areas = [auroc((truth == number).astype(int), scores[:, number]) for number in range(len(scores.T))]
        area = float(np.mean(areas))
        return {**found, "auroc": area, "score": _score(area, truth, scores.argmax(axis=1), len(scores.T))}
    areas, marks = [], []
    for column, values in zip(targets.T, logits.T, strict=True):
        known = np.isfinite(column)
        truth = column[known].astype(int)
        if len(set(truth)) < 2:
            return found
        areas.append(auroc(truth, values[known]))
        marks.append(_score(areas[-1], truth, (values[known] >= 0).astype(int), 2))
    return {**found, "auroc": float(np.mean(areas)), "score": float(np.mean(marks))}


def _score(area: float, truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    counts = confusion_matrix(truth, predicted, classes)[None].astype(np.float64)
    found = weighted.from_confusion(counts)
    return float((found["f1_macro"][0] + area + found["kappa_unweighted"][0]) / 3)


def best_of(found: Sequence[Mapping[str, float]], select: Select) -> int:
    """Return the place of the best of several evaluations; the first among equals.

    Raises:
        InputError: What selects is not defined on the records.
    """
    if select not in found[0]:
        raise InputError("select", f"a metric of the evaluation ({', '.join(found[0])})", select)
    sign = 1 if select == "loss" else -1
    return min(range(len(found)), key=lambda place: sign * found[place][select])


def read_batches(config: TrainConfig, source: Source, transform: Transform, mesh: Mesh) -> Any:
    """Yield batches of all records once, in their order, as large as one part of a training batch."""
    rows, devices = max(config.loader.batch_size // config.accumulation, 1), mesh.shape["data"]
    reading = dataclasses.replace(config.loader, batch_size=-(-rows // devices) * devices, seed=config.seed)
    for batch in evaluation_batches(source, transform, reading, *process_slice(mesh)):
        yield shard_batch(batch, mesh)


def collect(
    run: Callable[..., Any],
    params: Params,
    batches: Any,
    count: int,
    targets: list[np.ndarray] | None = None,
    importance: Float[np.ndarray, " record"] | None = None,
) -> np.ndarray:
    """Return one row per record of what `run` gives for a batch.

    Args:
        run: Params, inputs and what comes along to values and the same.
        params: Of the model.
        batches: Of `read_batches`.
        count: Records.
        targets: The records' targets are appended to it.
        importance: The records' own are written into it.
    """
    rows: np.ndarray | None = None
    wanted: np.ndarray | None = None
    for batch in batches:
        told = {name: batch[name] for name in ("record", "target", "importance") if name in batch}
        values, told = jax.device_get(
            run(params, {name: batch[name] for name in ("image", "tokens") if name in batch}, told)
        )
        real = told["record"] >= 0
        if rows is None:
            rows = np.full((count, *values.shape[1:]), np.nan, np.float32)
        rows[told["record"][real]] = values[real]
        if importance is not None:
            importance[told["record"][real]] = told["importance"][real]
        if targets is not None:
            wanted = np.full((count, told["target"].shape[1]), np.nan, np.float32) if wanted is None else wanted
            wanted[told["record"][real]] = told["target"][real]
    assert rows is not None
    if targets is not None and wanted is not None:
        targets.append(wanted)
    return rows


def _on_all(function: Callable[..., Array], mesh: Mesh) -> Callable[..., Any]:
    """Compile `function(params, inputs)` so that every process gets all rows, and what belongs to them."""
    return jax.jit(
        lambda params, inputs, told: (function(params, inputs), told),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


@functools.lru_cache(maxsize=4)
def scorer(encoder: Encoder, head: HeadConfig, grid: ProbeGrid | None, mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled way from images to logits; of a grid [batch, head, output]."""
    logits = functools.partial(_logits, head, grid, encoder.prefix)
    return _on_all(
        lambda params, inputs: logits(
            params["head"], encoder.tokens(params["encoder"], inputs["image"], head.layers)
        ),
        mesh,
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def head_scorer(head: HeadConfig, grid: ProbeGrid | None, prefix: int, mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled way from features of `feature_maker` to logits; of a grid [batch, head, output]."""
    logits = functools.partial(_logits, head, grid, min(prefix, 1))
    return _on_all(lambda params, inputs: logits(params["head"], inputs["tokens"]), mesh)


def _logits(head: HeadConfig, grid: ProbeGrid | None, prefix: int, params: Params, tokens: Array) -> Array:
    apply = make_model(Head(head, prefix)).apply
    if grid is None:
        return apply(params, tokens)[0]
    return jnp.moveaxis(grid_logits(grid, params, apply({}, tokens, method="features")), 0, 1)


@functools.lru_cache(maxsize=4)
def feature_maker(encoder: Encoder, layers: int, mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled way from images to the class tokens of the last blocks and the mean of the patch tokens.

    A head makes of these what it makes of all tokens; without a class token there is the mean alone.
    """

    def features(params: Params, inputs: Mapping[str, Array]) -> Array:
        tokens = encoder.tokens(params, inputs["image"], layers)
        mean = tokens[:, encoder.prefix + layers - 1 :].mean(axis=1, keepdims=True)
        return jnp.concatenate([tokens[:, :layers], mean][not encoder.prefix :], axis=1)

    return _on_all(features, mesh)

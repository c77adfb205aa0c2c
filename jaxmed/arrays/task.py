"""What is learnt from labels: the kind of a task, the names of its outputs, and the units of its targets."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TaskKind: TypeAlias = Literal["binary", "multiclass", "multilabel", "regression"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What the outputs of a head mean; travels with adapted weights.

    Attributes:
        kind: "binary": one logit; "multiclass": one logit per class, softmax; "multilabel": one logit per label,
            each its own sigmoid; "regression": values, in units of the training labels' standard deviation.
        names: Names of the outputs: classes, labels or targets; of a binary task the positive class.
        mean: Mean of a regression's training targets, one per output; empty elsewhere.
        deviation: Their standard deviation, likewise.
    """

    kind: TaskKind = "binary"
    names: tuple[str, ...] = ("label",)
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.names or (self.kind == "binary" and len(self.names) != 1):
            raise ValueError(f"names: expected one name per output of a {self.kind} task, found {self.names}")
        if self.kind == "regression" and not len(self.mean) == len(self.deviation) == len(self.names):
            raise ValueError(f"mean, deviation: expected one per target, found {self.mean, self.deviation}")


def standardise(targets: Float[np.ndarray, "*record column"], task: Task) -> Float[np.ndarray, "*record column"]:
    """Return regression targets in units of the training labels' spread, and others as they are."""
    if task.kind != "regression":
        return targets
    return ((targets - np.array(task.mean)) / np.array(task.deviation)).astype(np.float32)


def predict_values(logits: Float[Array, "batch output"], task: Task) -> Float[Array, "batch output"]:
    """Turn a head's outputs into probabilities, or into values in the unit of the labels."""
    match task.kind:
        case "multiclass":
            return jax.nn.softmax(logits, axis=-1)
        case "regression":
            return logits * jnp.asarray(task.deviation) + jnp.asarray(task.mean)
    return jax.nn.sigmoid(logits)

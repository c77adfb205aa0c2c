"""What an adaptation took: parameters, operations, seconds and memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxmed.arrays.trees import matches, named_leaves
from jaxmed.arrays.types import Params
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, init_head
from jaxmed.nn.model import make_model
from jaxmed.train.announce import count_operations


@dataclasses.dataclass(frozen=True)
class Effort:
    """What an adaptation took.

    Attributes:
        trained_parameters: Parameters that changed; of a grid of heads those of all heads.
        operations: Floating-point operations of one record's prediction by the adapted model; a step of fine-tuning
            takes about three times as many for each of its records.
        seconds_per_epoch: Of training, evaluations and saves included; None where nothing is learnt step by step.
        seconds_to_best: Until the parameters that were kept, compilation not included.
        peak_memory: Most bytes that this process has held so far on its first device; None where the platform does not
            tell, as on a CPU.
    """

    trained_parameters: int = 0
    operations: float = 0.0
    seconds_per_epoch: float | None = None
    seconds_to_best: float | None = None
    peak_memory: int | None = None


def count_trained(params: Params, frozen: tuple[str, ...]) -> int:
    """Count the parameters whose names none of the regular expressions finds."""
    return sum(int(leaf.size) for name, leaf in named_leaves(params).items() if not matches(name, frozen))


@functools.lru_cache(maxsize=16)
def operations_per_record(encoder: Encoder, head: HeadConfig) -> float:
    """Count the operations of one record's prediction, from shapes alone."""
    apply = make_model(Head(head, encoder.prefix)).apply

    def predict(params: Params, own: Params, image: Any) -> Any:
        return apply(own, encoder.tokens(params, image, head.layers))[0]

    key = jax.random.key(0)
    params = jax.eval_shape(encoder.init, key)
    own = jax.eval_shape(functools.partial(init_head, head, encoder.width, encoder.prefix), key)
    image = jax.ShapeDtypeStruct((1, *encoder.image_shape), "float32")
    return count_operations(jax.make_jaxpr(predict)(params, own, image).jaxpr)


def peak_memory() -> int | None:
    """Return the most bytes that this process has held on its first device, where the platform tells."""
    found = jax.local_devices()[0].memory_stats()
    return None if not found or "peak_bytes_in_use" not in found else int(found["peak_bytes_in_use"])


def training_seconds(history: Sequence[dict[str, float]], step: int, per_epoch: float) -> tuple[float, float] | None:
    """Return the seconds of an epoch, and those until a step, from the rates among the lines of metrics.jsonl.

    Args:
        history: The lines.
        step: Of the parameters that were kept.
        per_epoch: Steps of an epoch.
    """
    rates = [(line["step"], line["steps_per_second"]) for line in history if line.get("steps_per_second")]
    if not rates:
        return None
    until = [rate for number, rate in rates if number <= step] or [rates[0][1]]
    return per_epoch / rates[-1][1], step / until[-1]

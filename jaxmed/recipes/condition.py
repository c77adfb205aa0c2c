"""Whether a conditional network listens: what it does with the condition of another record."""

import jax
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.recipes.training import Score, TrainData

MOST = 8
"""Records that are looked at."""


def compare_condition(
    score: Score, params: Params, data: TrainData, field: str, seed: int
) -> tuple[float, float | None]:
    """Return the mean loss of some records with their own condition and, with the same randomness, with another's.

    Another's is that of the next record. Equal losses say that the condition tells the network nothing.

    Args:
        score: Returns "loss" of each record.
        params: Of the network.
        data: The records; held-out ones are taken where there are any.
        field: The condition.
        seed: Of the records' keys.

    Returns:
        Both losses; the second is None where there is but one record.
    """
    source = data.training if data.held_out is None else data.held_out
    records = [source[number] for number in range(min(len(source), MOST))]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    keys = jax.random.split(jax.random.key(seed), len(records))
    run = jax.jit(score)
    own = float(np.mean(run(params, keys, batch)["loss"]))
    if len(records) < 2:
        return own, None
    return own, float(np.mean(run(params, keys, batch | {field: np.roll(batch[field], 1, axis=0)})["loss"]))

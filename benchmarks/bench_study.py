"""A quality study: row `study_cells`, the runs of several seeds together against one after another.

Small vision transformers are fine-tuned on images of noise and scored, as a cell of `jaxmed profound quality-study` is,
without its reading and writing. "one after another" calls the compiled program for one run as often as there are seeds:
the cache is warm, so that what differs is that runs are mapped over, or on a CPU that each core takes one. `difference`
is the largest of the outputs. `cells_per_hour` is told beside the seconds of all seeds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import Measurement, alternate, emit, first_call, make_rows, measure_peak, parse_config, prepare, versions

from jaxmed.models.heads import HeadConfig
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.vmapped_fits import FitConfig, fit_runs, start_runs
from jaxmed.train.optimizer import OptimizerConfig


class Workload(NamedTuple):
    """One size.

    Attributes:
        seeds: Runs of one program.
        steps: Of each.
        records: To train on, and to score.
        encoder: What is fine-tuned.
    """

    seeds: int
    steps: int
    records: int
    encoder: VitConfig


def vit(patch: int, width: int, depth: int, edge: int = 28) -> VitConfig:
    """Return a small vision transformer of pictures."""
    return VitConfig(
        (edge, edge), (patch, patch), 3, width=width, depth=depth, heads=width // 16, hidden=4 * width, final_norm=False
    )


WORKLOADS = {
    "smoke": Workload(3, 10, 64, vit(7, 32, 2)),
    "cpu": Workload(5, 100, 400, vit(7, 48, 3)),
    "gpu": Workload(20, 400, 2000, vit(4, 192, 6)),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Time both, in turn."""
    config = parse_config(__doc__)
    conditions, peak = prepare(config), measure_peak()
    seeds, steps, records, sizes = WORKLOADS[config.size]
    encoder, head = vit_encoder(sizes), HeadConfig(1, "mean")
    fit = FitConfig(steps, 32, OptimizerConfig(peak_lr=5e-4, warmup_steps=steps // 10))
    rng = np.random.default_rng(0)
    images, tests = (jnp.asarray(rng.normal(size=(records, 28, 28, 3)), jnp.float32) for _ in range(2))
    targets = jnp.asarray(np.arange(records)[:, None] % 2, jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    params = start_runs(encoder, head, keys, None, np.zeros(seeds, bool))
    chances = np.ones((seeds, records), np.float32)

    def run(first: int, last: int) -> np.ndarray:
        part = jax.tree.map(lambda leaf: leaf[first:last], params)
        return fit_runs(
            fit, encoder, head, "binary", images, targets, chances[first:last], part, keys[first:last], tests
        )

    def together() -> np.ndarray:
        return run(0, seeds)

    def one_by_one() -> np.ndarray:
        return np.concatenate([run(number, number + 1) for number in range(seeds)])

    compile_s = {"jaxmed": first_call(together), "one after another": first_call(one_by_one)}
    difference = float(np.abs(together() - one_by_one()).max())
    seconds = alternate({"jaxmed": together, "one after another": one_by_one}, config.repeats)
    measured = {
        name: Measurement(
            seconds[name], compile_s[name], versions=versions("jax"),
            accuracy={"difference": difference, "cells_per_hour": 3600 * seeds / float(np.median(seconds[name]))},
        )
        for name in seconds
    }  # fmt: skip
    workload = f"{seeds} seeds, {steps} steps of 32, {records} images of 28 x 28, width {sizes.width}"
    emit(make_rows("study_cells", workload, measured, conditions, peak), config.json)


if __name__ == "__main__":
    main()

"""Posterior samples of many images by one compiled program, whatever the method, the prior and the operator."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxmed.arrays.batches import apply_in_batches, padded_rows
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.frame import Info, residual_norms

Solve: TypeAlias = Callable[..., tuple[Array, Info]]
"""(key, denoiser, measurement, estimate, numbers of the samples) -> image and record of the run."""
STATUS = ("converged", "at the largest step", "decrease only", "no decrease", "not downhill", "below precision")
"""What `solvers.line_search` calls 0 to 5."""


class Samples(NamedTuple):
    """Posterior samples of many images, reduced.

    Attributes:
        mean: Over the samples of each image.
        std: Standard deviation over them; 0 for a single one.
        residual: |y - A(x)| of the mean.
        initial_residual: |y - A(x)| of the estimate.
        start_time: Where each sample entered the chain.
        evaluations: Forward and backward passes of the network per sample.
        curve: Residual of the denoised image at each number of steps left, 0 first, averaged over the samples that
            were there; NaN where none was.
        step_sizes: Mean of the step sizes there.
        flags: Verdicts of all line searches: how often each status came.
        seconds: Per sample, without compilation.
    """

    mean: Float32[np.ndarray, "image ..."]
    std: Float32[np.ndarray, "image ..."]
    residual: Float32[np.ndarray, " image"]
    initial_residual: Float32[np.ndarray, " image"]
    start_time: Int[np.ndarray, "image sample"]
    evaluations: Int[np.ndarray, "image sample"]
    curve: Float32[np.ndarray, " step"]
    step_sizes: Float32[np.ndarray, " step"]
    flags: Int[np.ndarray, " status"]
    seconds: float


class Program(NamedTuple):
    """What is compiled once and called for every batch.

    Attributes:
        run: (params, key, measurement, initial, indices) -> ((image, Info), seconds).
        residual: (image, measurement) -> |y - A(x)| of each.
        batch_size: Samples of a call.
    """

    run: Callable[..., tuple[tuple[Array, Info], float]]
    residual: Callable[..., Array]
    batch_size: int


def make_program(
    prior: Callable[[Params], Denoiser], operator: Callable[..., Array], solve: Solve, batch_size: int
) -> Program:
    """Compile once what solves batch after batch: parameters are no constants of the program."""

    @jax.jit
    def refine(params: Params, key: KeyArray, measurement: Array, initial: Array, indices: Array) -> tuple[Array, Info]:
        return solve(key, prior(params), measurement, initial, indices)

    compiled = []

    def run(params: Params, *inputs: Any) -> tuple[tuple[Array, Info], float]:
        arrays = [jnp.asarray(part) for part in inputs]
        if not compiled:  # apart from what is timed
            compiled.append(refine.lower(params, *arrays).compile())
        began = time.monotonic()
        found = jax.block_until_ready(compiled[0](params, *arrays))
        return found, time.monotonic() - began

    return Program(run, jax.jit(partial(residual_norms, operator)), batch_size)


def draw_samples(
    program: Program,
    params: Params,
    key: KeyArray,
    measurement: Float32[np.ndarray, "image ..."],
    initial: Float32[np.ndarray, "image ..."],
    num_samples: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Draw posterior samples of many images, a batch at a time.

    Sample k of image i has the random numbers of i num_samples + k, whatever the batch; `progress` is told how many
    samples are done.
    """
    total, seconds = len(measurement) * num_samples, 0.0
    images: list[Any] = []
    infos: list[dict[str, Any]] = []
    for indices, count in padded_rows(total, program.batch_size):
        places = indices // num_samples
        found, spent = program.run(params, key, measurement[places], initial[places], indices)
        seconds += spent
        image, info = jax.device_get(found)
        images.append(image[:count])
        infos.append({name: part[..., :count] for name, part in info._asdict().items()})
        if progress is not None:
            progress(int(indices[0]) + count)
    grouped = np.concatenate(images).reshape(len(initial), num_samples, *initial.shape[1:])
    mean = grouped.mean(1, dtype=np.float64).astype(np.float32)
    info = {name: np.concatenate([one[name] for one in infos], axis=-1) for name in infos[0]}
    was_there = np.isfinite(info["residuals"])
    return Samples(
        mean=mean,
        std=grouped.std(1, dtype=np.float64).astype(np.float32),
        residual=apply_in_batches(program.residual, program.batch_size, mean, measurement),
        initial_residual=apply_in_batches(program.residual, program.batch_size, initial, measurement),
        start_time=info["start_time"].reshape(-1, num_samples),
        evaluations=info["evaluations"].reshape(-1, num_samples),
        curve=_mean_over(info["residuals"], was_there)[::-1],
        step_sizes=_mean_over(info["step_sizes"], was_there)[::-1],
        flags=np.bincount(info["flags"][was_there], minlength=len(STATUS)),
        seconds=seconds / total,
    )


def _mean_over(values: np.ndarray, counts: np.ndarray) -> Float32[np.ndarray, " step"]:
    """Average each row over the samples that count."""
    number = counts.sum(axis=1)
    total = np.where(counts, values, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan).astype(np.float32)

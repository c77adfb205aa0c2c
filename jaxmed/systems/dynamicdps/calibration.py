"""A bank of residuals of full runs on reference images, and the acquisition that joins two scans."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.start_time import Calibration, StartTime, bin_means, calibrate
from jaxmed.errors import InputError
from jaxmed.files import make_folder
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.physics.lowfield import Fit, FitConfig, LowField, fit, make_operator, simulate


def record_bank(
    prior: Callable[[Params], Denoiser],
    params: Params,
    key: KeyArray,
    measurement: Float32[np.ndarray, "run ..."],
    operator: Callable[[Array], Array],
    config: Dps,
    batch_size: int,
    parts: Path,
    progress: Callable[[int], None] | None = None,
) -> Float32[np.ndarray, "run step"]:
    """Run DPS from pure noise on every measurement, and return the residual at each number of steps left, 0 first.

    Batches that are done stay in a folder: an interrupted bank goes on after its last whole one.

    Args:
        prior: Denoiser of given parameters.
        params: Of the prior.
        key: Consumed.
        measurement: y of each run.
        operator: Of one image.
        config: Of DPS.
        batch_size: Runs at a time.
        parts: That folder.
        progress: Told how many runs are done.
    """

    @jax.jit
    def run(params: Params, key: KeyArray, measurement: Array, indices: Array) -> Array:
        start = jnp.zeros_like(measurement)
        return dps(key, prior(params), measurement, operator, start, config, indices)[1].residuals

    make_folder(parts)
    rows = []
    for first in range(0, len(measurement), batch_size):
        count = min(batch_size, len(measurement) - first)
        path = parts / f"{first:06d}.npz"
        stored = restore_npz(path)
        if stored is None:
            indices = np.minimum(np.arange(first, first + batch_size), len(measurement) - 1)
            residuals = np.asarray(run(params, key, measurement[indices], indices))[::-1, :count].T
            write_npz(path, stored := {"residuals": residuals})
        rows.append(stored["residuals"])
        if progress is not None:
            progress(first + count)
    return np.concatenate(rows)


def make_start(
    bank: Float32[np.ndarray, "run step"],
    residuals: Float32[np.ndarray, " image"] | None,
    num_bins: int,
    share: float,
) -> StartTime:
    """Turn a bank and the residuals of familiar estimates into a rule.

    Args:
        bank: Of `record_bank`.
        residuals: |y - A(initial)| of estimates of which a share is to start in the first bin. Without any the authors'
            power is taken in units of the first bin's mean.
        num_bins: Of the bank.
        share: That share.

    Raises:
        InputError: The runs did not stay finite, or fitted perfectly.
    """
    if not np.isfinite(bank).all():
        bad = int((~np.isfinite(bank).all(axis=1)).sum())
        raise InputError(
            "scale", "a step with which DPS stays finite", f"{bad} runs that did not", "give a smaller one"
        )
    means = bin_means(bank, num_bins)
    found = Calibration(0.4, float(means[0])) if residuals is None else calibrate(residuals, means, share)
    return StartTime(
        means=tuple(float(mean) for mean in means),
        tau=found.tau,
        scale=found.scale,
        steps_per_bin=bank.shape[1] // num_bins,
    )


def measure(
    key: KeyArray, images: Float32[np.ndarray, "image ..."], acquisition: LowField
) -> Float32[np.ndarray, "image ..."]:
    """Simulate low-field measurements of images (image, *space, 1), one key each."""
    keys = jax.random.split(key, len(images))
    run = jax.jit(jax.vmap(partial(simulate, shape=images.shape[1:-1], config=acquisition)))
    return np.asarray(run(keys, images))


def residuals_of(
    measurement: Float32[np.ndarray, "image ..."], images: Float32[np.ndarray, "image ..."], acquisition: LowField
) -> Float32[np.ndarray, " image"]:
    """Return |y - A(x)| of each image."""
    operator = make_operator(images.shape[1:-1], acquisition)
    measured = np.asarray(jax.jit(jax.vmap(operator))(images))
    return np.linalg.norm((measurement - measured).reshape(len(images), -1), axis=1).astype(np.float32)


def fit_acquisition(
    high: Float32[np.ndarray, "image ..."],
    low: Float32[np.ndarray, "image ..."],
    acquisition: LowField,
    options: FitConfig,
) -> Fit:
    """Fit gamma and sigma to pairs of images (image, *space, 1)."""
    run: Any = jax.jit(partial(fit, shape=high.shape[1:-1], config=acquisition, options=options))
    return jax.device_get(run(high, low))


def digest_of(params: Params) -> str:
    """Return a short name of parameters, by their values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(named_leaves(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()

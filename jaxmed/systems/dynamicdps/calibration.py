"""A bank of residuals of full runs on reference images, and the acquisition that joins two scans."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxmed.arrays.batches import padded_rows
from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import from_record
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.frame import residual_norms
from jaxmed.diffusion.posterior.start_time import Calibration, StartTime, bin_means, calibrate
from jaxmed.errors import InputError
from jaxmed.files import make_folder, read_record
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.physics.lowfield import Fit, FitConfig, LowField, fit, make_operator, simulate

CALIBRATION = "calibration.json"


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found for one prior and one acquisition.

    Attributes:
        start: Bank and compression for `start_time.choose_start`.
        acquisition: From high field to low field, gamma and sigma as fitted where there were pairs.
        steps: Steps of the chain that the bank was recorded on.
        prior: Digest of the prior's parameters: a bank is that of one prior.
    """

    start: StartTime
    acquisition: LowField
    steps: int
    prior: str


def read_calibration(place: Path, prior: Params | None = None) -> Calibrated:
    """Read what a run of calibrate left, given the run or its file.

    Raises:
        InputError: There is none, it is damaged, or it is of another prior.
    """
    path = next((p for p in (place / "outputs" / CALIBRATION, place / CALIBRATION, place) if p.is_file()), None)
    if path is None:
        raise InputError(place, f"a run of calibrate, with outputs/{CALIBRATION}", "none", "check the path")
    found = from_record(Calibrated, read_record(path), str(path))
    if prior is not None and found.prior != digest_of(prior):
        raise InputError("calibration", "one of this prior", "one of another", "calibrate again")
    return found


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

    Batches that are done stay in the folder `parts`: an interrupted bank goes on after its last whole one.
    """

    @jax.jit
    def run(params: Params, key: KeyArray, measurement: Array, indices: Array) -> Array:
        start = jnp.zeros_like(measurement)
        return dps(key, prior(params), measurement, operator, start, config, indices)[1].residuals

    make_folder(parts)
    rows = []
    for indices, count in padded_rows(len(measurement), batch_size):
        first = int(indices[0])
        path = parts / f"{first:06d}.npz"
        stored = restore_npz(path)
        if stored is None:
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
        bank: What `record_bank` returns.
        residuals: |y - A(initial)| of estimates of which a share is to start in the first bin. Without any the authors'
            power is taken in units of the first bin's mean.
        num_bins: Bins into which the bank is cut.
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
    return np.asarray(jax.jit(partial(residual_norms, operator))(images, measurement))


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

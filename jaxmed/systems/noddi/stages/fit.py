"""Stage `jaxmed noddi fit`: NODDI maps of a diffusion scan by maximum likelihood."""

import dataclasses
import hashlib
import shlex
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxmed.arrays.foreground import find_foreground
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, write_json
from jaxmed.io import nifti
from jaxmed.io.gradients import GradientTable, read_gradients, to_world
from jaxmed.physics.acquisition import estimate_sigma, find_shells
from jaxmed.synthesis.phantoms.write import write_diffusion_slab
from jaxmed.systems.noddi.fitting import FitConfig, Maps, fit
from jaxmed.systems.noddi.page import write_page
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume

SECONDS_BETWEEN_SAVES = 20.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Fit NODDI to a diffusion scan.

    Attributes:
        dwi: Diffusion scan, a 4D NIfTI file; magnitudes in any unit, images of one scan in one scaling.
        bvals: FSL text file of b-values in s/mm^2, one per image.
        bvecs: FSL text file of unit gradient directions, 3 x N or N x 3.
        mask: NIfTI file on the grid of the scan, fitted where it is not 0. Without it: the largest connected region
            whose mean unweighted signal exceeds a tenth of its 98th percentile.
        sigma: Noise of each receiver channel, in the unit of the scan. Without it: estimated from the unweighted images
            where there are three or more.
        noise: Likelihood. "auto" is Rician where sigma is known or can be estimated, else Gaussian. Gaussian fits put
            the noise floor into the maps: ndi comes out too high.
        allow_single_shell: Fit although only one shell is weighted. Its maps are not NODDI: see the error message.
        fit: Model constants and tolerances.
        embedded_shape: Voxels (x, y, z) of the embedded brain slab to simulate and fit in place of files.
        embedded_snr: Signal-to-noise ratio of the embedded slab, white matter, unweighted.
        seed: Of the embedded slab; a fit itself draws nothing.
    """

    dwi: Path | None = None
    bvals: Path | None = None
    bvecs: Path | None = None
    mask: Path | None = None
    sigma: float | None = None
    noise: Literal["auto", "rician", "gaussian"] = "auto"
    allow_single_shell: bool = False
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    embedded_shape: tuple[int, int, int] | None = None
    embedded_snr: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma: expected a positive number, found {self.sigma:g}")
        if self.embedded_shape is not None and min(self.embedded_shape) < 1:
            raise ValueError(f"embedded_shape: expected three positive sizes, found {self.embedded_shape}")
        if not self.embedded_snr > 0:
            raise ValueError(f"embedded_snr: expected a positive number, found {self.embedded_snr:g}")


def paper() -> Config:
    """Constants of Zhang et al. 2012, on your files."""
    return Config()


def smoke() -> Config:
    """A small embedded slab, in seconds."""
    return Config(embedded_shape=(32, 38, 2))


def laptop() -> Config:
    """An embedded slab large enough to look at."""
    return Config(embedded_shape=(96, 112, 8))


class Scan(NamedTuple):
    """A checked diffusion scan, ready to fit."""

    dwi: Volume
    gradients: GradientTable
    mask: np.ndarray
    sigma: float | None
    notes: list[str]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check a scan, fit it, write maps and the report."""
    began = time.monotonic()
    truth = None
    if config.embedded_shape is not None:
        if config.dwi is not None:
            raise InputError("dwi", "no file beside embedded data", config.dwi, "drop --preset, or --dwi")
        start(folder)
        files = write_diffusion_slab(folder.path / "inputs", config.seed, config.embedded_shape, config.embedded_snr)
        truth = files.truth
        config = dataclasses.replace(config, dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask)
        scan = read_scan(config)
    else:
        scan = read_scan(config)
        start(folder)
    log = Log(folder.path, folder.options.quiet)
    for note in scan.notes:
        log.say(f"Note: {note}")
    read_seconds = time.monotonic() - began
    maps, fit_seconds = _fit(config, scan, folder, log)
    notes = scan.notes + describe_maps(maps, scan, config)
    for note in notes[len(scan.notes) :]:
        log.say(f"Note: {note}")
    write_maps(folder.outputs, maps, scan, config)
    summary = summarise(maps, scan, config, notes, truth) | {
        "command": f"jaxmed noddi fit --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "device": jax.devices()[0].device_kind,
        "seconds": {"read and check": read_seconds, "fit, compilation included": fit_seconds},
    }
    write_json(folder.outputs / "summary.json", summary)
    log.metrics(int(summary["voxels"]), summary["medians"] | {"converged": summary["converged"]})
    write_page(folder.path)


report = write_page


def read_scan(config: Config) -> Scan:
    """Read and check everything a fit needs.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    dwi_path, bvals_path, bvecs_path = (_require(getattr(config, name), name) for name in ("dwi", "bvals", "bvecs"))
    threshold = config.fit.b0_threshold
    shape = nifti.describe(dwi_path)["shape"]
    num_images = shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None
    gradients = read_gradients(bvals_path, bvecs_path, b0_threshold=threshold, num_images=num_images)
    _check_protocol(gradients, bvals_path, config)
    dwi = nifti.read(dwi_path, dimensions=(4,), allow_constant=False)
    notes = list(gradients.notes)
    is_b0 = gradients.bvals <= threshold
    b0 = dwi.array[..., is_b0].mean(axis=-1)
    mask = _read_mask(config, dwi, b0, notes)
    empty = int((mask & (b0 <= 0)).sum())
    if empty == mask.sum():
        raise InputError(dwi_path, "unweighted signal inside the mask", "none above 0", "check the mask")
    if empty:
        notes.append(f"{empty:,} voxels inside the mask have no unweighted signal; their maps are 0.")
    if (dwi.array[mask] < 0).any():
        notes.append("The scan holds negative values: magnitudes are expected. They were fitted as they are.")
    sigma = _choose_sigma(config, dwi.array[mask][:, is_b0], notes)
    return Scan(dwi, gradients, mask, sigma, notes)


def _require(path: Path | None, name: str) -> Path:
    if path is None:
        raise InputError(name, "a file", "nothing", f"give --{name} FILE, or try --preset smoke")
    return path


def _check_protocol(gradients: GradientTable, path: Path, config: Config) -> None:
    threshold = config.fit.b0_threshold
    shells = find_shells(gradients.bvals, threshold)
    if shells[0].bval > threshold:
        raise InputError(
            path,
            f"an unweighted image (b <= {threshold:g} s/mm^2)",
            f"a smallest b-value of {gradients.bvals.min():g}",
            "raise --fit.b0-threshold if these images are meant as b = 0",
        )
    weighted = shells[1:]
    directions = gradients.bvecs[gradients.bvals > threshold]
    if len(weighted) < 2 and not config.allow_single_shell:
        raise InputError(
            path,
            "two or more weighted shells",
            f"one at b = {weighted[0].bval:.0f} s/mm^2",
            "one shell cannot tell neurite density from free water, so its maps mean nothing; "
            "--allow-single-shell fits it anyway",
        )
    if np.linalg.matrix_rank(directions.T @ directions, tol=1e-3) < 3 or len(directions) < 6:
        raise InputError(
            path, "six or more weighted images in different directions", f"{len(directions)} on a plane or line"
        )


def _read_mask(config: Config, dwi: Volume, b0: np.ndarray, notes: list[str]) -> np.ndarray:
    if config.mask is None:
        mask = find_foreground(b0)
        notes.append(f"No mask was given: {int(mask.sum()):,} voxels of bright unweighted signal were fitted.")
        return mask
    volume = nifti.read(config.mask, dimensions=(3,))
    nifti.require_same_grid(volume, dwi, str(config.mask), str(config.dwi))
    mask = volume.array != 0
    if not mask.any():
        raise InputError(config.mask, "a mask with voxels inside", "zeros only", "check the mask")
    return mask


def _choose_sigma(config: Config, b0: np.ndarray, notes: list[str]) -> float | None:
    if config.noise == "gaussian":
        return None
    if config.sigma is not None:
        return config.sigma
    if b0.shape[1] >= 3:
        sigma = estimate_sigma(b0)
        if sigma > 0:
            notes.append(f"Noise was estimated from {b0.shape[1]} unweighted images: sigma = {sigma:.4g}.")
            return sigma
    if config.noise == "rician":
        raise InputError(
            "sigma", "a noise level for the Rician likelihood", f"{b0.shape[1]} unweighted image(s)", "give --sigma"
        )
    notes.append(
        f"With {b0.shape[1]} unweighted image(s) the noise is not known: squares were minimised. "
        "Give --sigma for the Rician likelihood."
    )
    return None


def _fit(config: Config, scan: Scan, folder: RunFolder, log: Log) -> tuple[Maps, float]:
    """Fit all voxels, continuing from and saving to RUN/checkpoints."""
    saved = folder.checkpoints / "fit.npz"
    digest = hashlib.sha256(np.ascontiguousarray(scan.dwi.array[scan.mask]).data).hexdigest()
    finished = _restore(saved, digest)
    total, done = int(scan.mask.sum()), 0 if finished is None else len(finished.ndi)
    if done:
        log.say(f"Continuing after {done:,} voxels of an interrupted run.")
    last_save = began = time.monotonic()
    chunks = 0
    with log.progress("Fitting", total, "voxels", done) as update:

        def on_chunk(count: int, total: int, rows: Maps) -> None:
            nonlocal last_save, chunks
            chunks += 1
            if chunks == folder.options.profile:
                jax.profiler.stop_trace()
            update(count)
            if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES and count < total:
                _save(saved, digest, rows)
                last_save = time.monotonic()

        if folder.options.profile:
            jax.profiler.start_trace(folder.path / "profile")
        maps = fit(
            scan.dwi.array,
            scan.gradients.bvals,
            scan.gradients.bvecs,
            scan.mask,
            sigma=scan.sigma,
            config=config.fit,
            finished=finished,
            on_chunk=on_chunk,
        )
        if chunks < folder.options.profile:
            jax.profiler.stop_trace()
    return maps, time.monotonic() - began


def _save(path: Path, digest: str, rows: Maps) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, digest=np.array(digest), **rows._asdict())


def _restore(path: Path, digest: str) -> Maps | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if str(stored["digest"]) != digest:
            raise InputError(path, "rows of this scan", "rows of another", "start anew with --no-resume")
        return Maps(*(stored[name] for name in Maps._fields))


def describe_maps(maps: Maps, scan: Scan, config: Config) -> list[str]:
    """Say what a reader of the maps must know and could not see in them."""
    notes = []
    fitted = maps.fitted
    if len(find_shells(scan.gradients.bvals, config.fit.b0_threshold)) < 3:
        notes.append("Only one shell is weighted: neurite density and free water cannot be told apart.")
    diffusivity = float(np.median(maps.mean_diffusivity[fitted]))
    anisotropy = float(np.median(maps.fractional_anisotropy[fitted]))
    free = config.fit.tissue.free_diffusivity
    if anisotropy < 0.1 and diffusivity > 1.5:
        text = f"This is free water: diffusion is isotropic (median anisotropy {anisotropy:.3f}) and fast "
        text += f"(median diffusivity {diffusivity:.2f} um^2/ms). "
        if abs(diffusivity - free) > 0.15 * free:
            text += f"The model's free water has {free:g} um^2/ms, as at body temperature, so the free water fraction "
            text += f"cannot reach 1; give --fit.tissue.free-diffusivity {diffusivity:.2f} if this is a phantom."
        notes.append(text.strip())
    wet = float(np.mean(maps.fwf[fitted] > 0.9))
    if wet > 0.005:
        notes.append(f"{wet:.0%} of voxels are nearly pure free water (fwf above 0.9): their ndi and odi mean nothing.")
    unfinished = int((fitted & ~maps.converged).sum())
    if unfinished:
        notes.append(
            f"{unfinished:,} of {int(fitted.sum()):,} voxels did not meet the tolerance in "
            f"{config.fit.max_iterations} iterations; map 'converged' shows them."
        )
    for shell in find_shells(scan.gradients.bvals, config.fit.b0_threshold)[1:]:
        level = _mean_attenuation(scan, maps, shell.rows)
        if level > 1.0:
            notes.append(
                f"At b = {shell.bval:.0f} the mean signal is {level:.2f} of the unweighted one, "
                "more than diffusion allows: "
                "were the images scaled apart?"
            )
    return notes


def _mean_attenuation(scan: Scan, maps: Maps, rows: tuple[int, ...]) -> float:
    inside = scan.dwi.array[maps.fitted]
    return float(np.mean(inside[:, list(rows)].mean(axis=1) / maps.s0[maps.fitted]))


MAP_DEFINITIONS = {
    "ndi": ("neurite density index: share of tissue water inside neurites; undefined where fwf is near 1", "1"),
    "odi": ("orientation dispersion index, (2 / pi) atan(1 / kappa)", "1"),
    "fwf": ("free water fraction", "1"),
    "direction": ("mean fibre direction, unit vector in RAS+ world axes, sign arbitrary", "1"),
    "s0": ("mean unweighted signal", "unit of the scan"),
    "residual": ("root mean squared residual over all images divided by s0", "1"),
    "mean_diffusivity": ("mean diffusivity of the tensor that starts the fit", "um^2/ms"),
    "fractional_anisotropy": ("fractional anisotropy of the tensor that starts the fit", "1"),
    "converged": ("1 where the fit met its tolerance", "1"),
}


def write_maps(folder: Path, maps: Maps, scan: Scan, config: Config) -> None:
    """Write every map as NIfTI on the grid of the scan, each with a JSON sidecar."""
    constants = {
        "parallel_diffusivity_um2_per_ms": config.fit.tissue.parallel_diffusivity,
        "free_diffusivity_um2_per_ms": config.fit.tissue.free_diffusivity,
        "likelihood": "gaussian" if scan.sigma is None else "rician",
        "sigma": scan.sigma,
    }
    for name, (definition, unit) in MAP_DEFINITIONS.items():
        array = getattr(maps, name)
        if name == "direction":
            array = to_world(array, scan.dwi.affine)
        array = array.astype(np.uint8 if array.dtype == bool else np.float32)
        nifti.write(folder / f"{name}.nii.gz", Volume.make(array, scan.dwi.affine), reference=config.dwi)
        write_json(
            folder / f"{name}.json",
            {"definition": definition, "unit": unit, "constants": constants, "software": _software()},
        )


def _software() -> str:
    from jaxmed.versions import software_versions

    return f"jaxmed {software_versions().get('jaxmed', 'unknown')}"


def summarise(maps: Maps, scan: Scan, config: Config, notes: list[str], truth: Path | None) -> dict:
    """Collect the numbers of the report."""
    fitted = maps.fitted
    defined = fitted & (maps.fwf < 0.9)
    medians = {
        "ndi": _median(maps.ndi[defined]),
        "odi": _median(maps.odi[defined]),
        "fwf": _median(maps.fwf[fitted]),
        "residual": _median(maps.residual[fitted]),
        "mean_diffusivity": _median(maps.mean_diffusivity[fitted]),
        "fractional_anisotropy": _median(maps.fractional_anisotropy[fitted]),
    }
    shells = [
        {"bval": shell.bval, "images": len(shell.rows), "signal": _mean_attenuation(scan, maps, shell.rows)}
        for shell in find_shells(scan.gradients.bvals, config.fit.b0_threshold)
    ]
    return {
        "voxels": int(fitted.sum()),
        "images": len(scan.gradients.bvals),
        "converged": float(np.mean(maps.converged[fitted])),
        "likelihood": "Gaussian" if scan.sigma is None else "Rician",
        "sigma": scan.sigma,
        "medians": {name: value for name, value in medians.items() if value is not None},
        "shells": shells,
        "notes": notes,
        "truth": None if truth is None else str(truth.relative_to(truth.parents[1])),
        "mask": None if config.mask is None else str(config.mask),
    }


def _median(values: np.ndarray | jax.Array) -> float | None:
    return float(np.median(values)) if values.size else None

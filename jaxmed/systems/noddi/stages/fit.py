"""Stage `jaxmed noddi fit`: maps of a diffusion scan by maximum likelihood."""

import dataclasses
import hashlib
import shlex
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxmed.config import Number, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.physics.acquisition import find_shells, has_two_shells
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.synthesis.phantoms.write import write_diffusion_slab
from jaxmed.systems.noddi import reading
from jaxmed.systems.noddi.estimates import FLAGS, Estimates
from jaxmed.systems.noddi.fitting import estimate
from jaxmed.systems.noddi.options import FitConfig, check_shape
from jaxmed.systems.noddi.page import write_page
from jaxmed.systems.noddi.posterior import Posterior, PosteriorConfig, require_blackjax, sample_posterior
from jaxmed.systems.noddi.reading import Scan
from jaxmed.systems.noddi.writing import write_maps
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary
from jaxmed.volume import Volume

SECONDS_BETWEEN_SAVES = 20.0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit NODDI, or a stick in a ball, to a diffusion scan.

    Attributes:
        dwi: Diffusion scan: a 4D NIfTI file, or a folder of DICOM files whose headers hold the gradients. Magnitudes in
            any unit, images of one scan in one scaling.
        bvals: FSL text file of b-values in s/mm^2, one per image; not with DICOM.
        bvecs: FSL text file of unit gradient directions, 3 x N or N x 3; not with DICOM.
        mask: NIfTI file on the grid of the scan, fitted where it is not 0. Without it: the largest connected region
            whose mean unweighted signal exceeds a tenth of its 98th percentile.
        grad_dev: Gradient nonlinearity as the Human Connectome Project stores it: a NIfTI file of nine images on the
            grid of the scan, the deviations of each voxel's gradients column by column.
        series: SeriesInstanceUID to read from a DICOM folder of several series.
        sigma: Noise of each receiver channel, in the unit of the scan. Without it: estimated from the unweighted images
            where there are three or more.
        noise: Likelihood. "auto" is Rician where sigma is known or can be estimated, else Gaussian. Gaussian fits put
            the noise floor into the maps: ndi comes out too high.
        allow_single_shell: Fit although only one shell is weighted. Its maps are not NODDI: see the error message.
        scale_series: Divide every run of images by the brightness of its own unweighted images, where series that were
            scaled apart have been joined.
        modulated: Write ndi (1 - fwf) and odi (1 - fwf) too.
        posterior_samples: Steps of a Markov chain in every voxel, for maps of the posterior's mean and standard
            deviation beside those of the fit; 0 for none. 300 take hundreds of times as long as the fit. Needs the
            noise level, and the extra "posterior".
        fit: Model, its constants and tolerances.
        embedded_shape: Voxels (x, y, z) of the brain slab to simulate and fit where no --dwi is given.
        embedded_snr: Signal-to-noise ratio of the embedded slab, white matter, unweighted.
        seed: Of the embedded slab and of Markov chains; a fit itself draws nothing.
    """

    dwi: Path | None = None
    bvals: Path | None = None
    bvecs: Path | None = None
    mask: Path | None = None
    grad_dev: Path | None = None
    series: str | None = None
    sigma: Positive | None = None
    noise: Literal["auto", "rician", "gaussian"] = "auto"
    allow_single_shell: bool = False
    scale_series: bool = False
    modulated: bool = False
    posterior_samples: Number = 0
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    embedded_shape: tuple[Size, Size, Size] | None = None
    embedded_snr: Positive = 30.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma: expected a positive number, found {self.sigma:g}")
        if self.embedded_shape is not None:
            check_shape("embedded_shape", self.embedded_shape)
        if self.posterior_samples < 0:
            raise ValueError(f"posterior_samples: expected 0 or more, found {self.posterior_samples}")
        if not self.embedded_snr > 0:
            raise ValueError(f"embedded_snr: expected a positive number, found {self.embedded_snr:g}")


def paper() -> Config:
    """Constants of Zhang et al. 2012, on your files."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan, or a small simulated slab."""
    return Config(embedded_shape=(32, 38, 2))


def laptop() -> Config:
    """Your scan, or a simulated slab large enough to look at."""
    return Config(embedded_shape=(96, 112, 8))


def run(config: Config, folder: RunFolder) -> None:
    """Read and check a scan, fit it, write maps and the report."""
    began = time.monotonic()
    truth = None
    if config.embedded_shape is not None and config.dwi is None:
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
    model = config.fit.build_model()
    rows, fit_seconds = _fit(config, scan, folder, log)
    notes = scan.notes + describe_maps(rows, model, scan, config)
    for note in notes[len(scan.notes) :]:
        log.say(f"Note: {note}")
    posterior = _sample(config, scan, model, rows, log)
    write_maps(folder.outputs, rows, model, scan, config.fit, modulated=config.modulated, posterior=posterior)
    summary = summarise(rows, model, scan, config, notes, truth) | {
        "command": f"jaxmed noddi fit --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "device": jax.devices()[0].device_kind,
        "seconds": {"read and check": read_seconds, "fit, compilation included": fit_seconds},
    }
    write_summary(folder, summary)
    log.metrics(int(summary["voxels"]), summary["medians"] | {"converged": summary["converged"]})
    write_page(folder.path)


report = write_page


def read_scan(config: Config) -> Scan:
    """Read and check everything a fit needs.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    if config.dwi is None:
        raise InputError("dwi", "a file", "nothing", "give --dwi FILE, or try --preset smoke")
    if config.posterior_samples:
        require_blackjax()
    path, threshold = config.dwi, config.fit.b0_threshold
    needs_two_shells = config.fit.model == "noddi" and not config.allow_single_shell
    dwi, gradients = reading.read_dwi(
        path, config.bvals, config.bvecs, threshold, needs_two_shells=needs_two_shells, series=config.series
    )
    notes = list(gradients.notes)
    is_b0 = gradients.bvals <= threshold
    mask = reading.read_mask(config.mask, dwi, path, dwi.array[..., is_b0].mean(axis=-1), notes)
    signals = dwi.array[mask]
    reading.check_voxels(signals, is_b0, path, notes)
    scales = reading.check_series(signals, is_b0, config.scale_series, notes)
    if scales is not None:
        dwi = Volume.make(dwi.array / scales.astype(np.float32), dwi.affine)
        signals = dwi.array[mask]
    sigma = reading.choose_sigma(config.noise, config.sigma, signals[:, is_b0], notes)
    if config.posterior_samples and (sigma is None or config.grad_dev is not None or config.fit.s0 == "free"):
        expected = "a Rician noise level, gradients that do not vary, and s0 as the mean, for a posterior"
        raise InputError("posterior_samples", expected, "something else", "give --sigma, or leave the posterior out")
    gradient_map = None
    if config.grad_dev is not None:
        gradient_map = reading.read_gradient_map(config.grad_dev, dwi, path)
        length = np.linalg.norm(gradient_map[mask], axis=-2)
        notes.append(
            f"Gradients vary over space: lengths from {length.min():.3f} to {length.max():.3f} of the table's."
        )
    return Scan(path, dwi, gradients, mask, sigma, gradient_map, notes)


def _fit(config: Config, scan: Scan, folder: RunFolder, log: Log) -> tuple[Estimates, float]:
    """Fit all voxels, continuing from and saving to RUN/checkpoints."""
    saved = folder.checkpoints / "fit.npz"
    digest = hashlib.sha256(np.ascontiguousarray(scan.dwi.array[scan.mask]).data).hexdigest()
    finished = _restore(saved, digest)
    total, done = int(scan.mask.sum()), 0 if finished is None else len(finished.fitted)
    if done:
        log.say(f"Continuing after {done:,} voxels of an interrupted run.")
    size = f"{len(scan.gradients.bvals)} images of {' x '.join(map(str, scan.mask.shape))} voxels"
    announce(log, f"Fitting a '{config.fit.model}' model to {size}", count=total - done, unit="voxels")
    last_save = began = time.monotonic()
    blocks = 0
    with log.progress("Fitting", total, "voxels", done) as update:

        def on_block(count: int, total: int, rows: Estimates) -> None:
            nonlocal last_save, blocks
            blocks += 1
            if blocks == folder.options.profile:
                jax.profiler.stop_trace()
            update(count)
            if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES and count < total:
                _save(saved, digest, rows)
                last_save = time.monotonic()

        if folder.options.profile:
            jax.profiler.start_trace(folder.path / "profile")
        rows = estimate(
            scan.dwi.array,
            scan.gradients,
            scan.mask,
            sigma=scan.sigma,
            gradient_map=scan.gradient_map,
            config=config.fit,
            finished=finished,
            on_block=on_block,
        )
        if blocks < folder.options.profile:
            jax.profiler.stop_trace()
    return rows, time.monotonic() - began


def _sample(config: Config, scan: Scan, model: MicrostructureModel, rows: Estimates, log: Log) -> Posterior | None:
    """Sample the posterior of fitted voxels, where it was asked for."""
    if not config.posterior_samples:
        return None
    assert scan.sigma is not None  # read_scan refuses
    fitted = rows.fitted
    steps = max(50, config.posterior_samples // 2) + config.posterior_samples
    announce(log, f"Sampling the posterior by chains of {steps:,} steps", count=int(fitted.sum()), unit="voxels")
    return sample_posterior(
        jax.random.key(config.seed),
        model,
        scan.dwi.array[fitted],
        scan.gradients.bvals,
        scan.gradients.bvecs,
        scan.sigma,
        rows.values[fitted],
        rows.direction[fitted],
        b0_threshold=config.fit.b0_threshold,
        config=PosteriorConfig(num_warmup=max(50, config.posterior_samples // 2), num_samples=config.posterior_samples),
    )


def _save(path: Path, digest: str, rows: Estimates) -> None:
    write_npz(path, {"digest": np.array(digest), **rows._asdict()})


def _restore(path: Path, digest: str) -> Estimates | None:
    stored = restore_npz(path)
    if stored is None:
        return None
    if str(stored["digest"]) != digest:
        raise InputError(path, "rows of this scan", "rows of another", "start anew with --no-resume")
    return Estimates(*(stored[name] for name in Estimates._fields))


def describe_maps(rows: Estimates, model: MicrostructureModel, scan: Scan, config: Config) -> list[str]:
    """Say what a reader of the maps must know and could not see in them."""
    notes = []
    fitted, threshold, tissue = rows.fitted, config.fit.b0_threshold, config.fit.tissue
    is_noddi = config.fit.model == "noddi"
    weighted = scan.gradients.bvals > threshold
    if is_noddi and not has_two_shells(scan.gradients.bvals[weighted], scan.gradients.bvecs[weighted]):
        notes.append("Only one shell is weighted: neurite density and free water cannot be told apart.")
    diffusivity = float(np.median(rows.mean_diffusivity[fitted]))
    anisotropy = float(np.median(rows.fractional_anisotropy[fitted]))
    free = tissue.free_diffusivity
    if is_noddi and anisotropy < 0.1 and diffusivity > 1.5:
        text = f"This is free water: diffusion is isotropic (median anisotropy {anisotropy:.3f}) and fast "
        text += f"(median diffusivity {diffusivity:.2f} um^2/ms). "
        if abs(diffusivity - free) > 0.15 * free:
            text += f"The model's free water has {free:g} um^2/ms, as at body temperature, so the free water fraction "
            text += f"cannot reach 1; give --fit.tissue.free-diffusivity {diffusivity:.2f} if this is a phantom."
        notes.append(text.strip())
    notes += _flag_notes(rows, config)
    refused = int((scan.mask & (rows.flags == FLAGS["no_signal"])).sum())
    if refused:
        notes.append(f"{refused:,} voxels hold no diffusion signal and were not fitted; map 'flags' shows them.")
    signals, s0 = scan.dwi.array[fitted], rows.s0[fitted]
    return notes + reading.attenuation_notes(signals, s0, scan.gradients.bvals, threshold, max(free, diffusivity))


def _flag_notes(rows: Estimates, config: Config) -> list[str]:
    count = int(rows.fitted.sum())
    said = {
        "ndi_undefined": "ndi means nothing (nearly pure free water, or a standard error as wide as not knowing it)",
        "odi_undefined": "odi means nothing (few neurites, or too much noise)",
        "direction_undefined": "the direction means nothing (a cone of uncertainty above 45 degrees, or no neurites)",
        "not_converged": f"the tolerance was not met in {config.fit.max_iterations} iterations",
        "misfit": "the model does not make this signal (a residual above three times the noise): its maps mean nothing",
    }
    notes = []
    for flag, meaning in said.items():
        flagged = int((rows.fitted & (rows.flags & FLAGS[flag] > 0)).sum())
        if flagged > 0.005 * count:
            notes.append(f"In {flagged:,} of {count:,} voxels {meaning}; map 'flags' shows them.")
    return notes


def summarise(
    rows: Estimates, model: MicrostructureModel, scan: Scan, config: Config, notes: list[str], truth: Path | None
) -> dict:
    """Collect the numbers of the report."""
    fitted = rows.fitted
    values = {name: rows.values[..., index] for index, name in enumerate(model.names)}
    errors = {name: rows.errors[..., index] for index, name in enumerate(model.names)}
    defined = fitted & (values["fwf"] < 0.9) if "fwf" in values else fitted
    where = {name: defined if name in ("ndi", "odi") else fitted for name in values}
    medians = {name: _median(value[where[name]]) for name, value in values.items()}
    medians |= {f"{name}_error": _median(error[where[name]]) for name, error in errors.items()}
    for name in ("residual", "mean_diffusivity", "fractional_anisotropy"):
        medians[name] = _median(getattr(rows, name)[fitted])
    signals, s0 = scan.dwi.array[fitted], rows.s0[fitted]
    shells = [
        {
            "bval": shell.bval,
            "images": len(shell.rows),
            "signal": reading.mean_attenuation(signals, s0, shell.rows),
        }
        for shell in find_shells(scan.gradients.bvals, config.fit.b0_threshold)
    ]
    return {
        "model": config.fit.model,
        "parameters": {parameter.name: parameter.unit for parameter in model.parameters},
        "voxels": int(fitted.sum()),
        "images": len(scan.gradients.bvals),
        "converged": float(np.mean(rows.flags[fitted] & FLAGS["not_converged"] == 0)),
        "flags": {name: int((rows.flags[scan.mask] & bit > 0).sum()) for name, bit in FLAGS.items()},
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

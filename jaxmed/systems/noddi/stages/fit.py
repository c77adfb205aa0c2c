"""Stage `jaxmed noddi fit`: maps of a diffusion scan by maximum likelihood."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxmed.config import Number, Positive, checked
from jaxmed.data import diffusion
from jaxmed.data.diffusion import DiffusionScan
from jaxmed.errors import InputError
from jaxmed.physics.acquisition import ShellSignal, check_series, check_table, choose_sigma, shell_signals
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.noddi import WET, WHERE_TISSUE
from jaxmed.physics.posterior import require_blackjax
from jaxmed.recipes.diffusion_scan import MapsByName, ScanConfig, sample_scan, write_maps
from jaxmed.recipes.kept_rows import run_in_folder
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.parameter_maps import errors_section, estimate_sections, median_tiles, read_map
from jaxmed.systems.noddi.fitting import collect_maps, describe_maps, estimate
from jaxmed.systems.noddi.protocol import FitConfig
from jaxmed.systems.noddi.voxel_fit import FLAG_DEFINITIONS, FLAGS, Estimates
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit NODDI, or a stick in a ball, to a diffusion scan.

    Attributes:
        scan: The scan, or a synthetic brain slab.
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
    """

    scan: Annotated[ScanConfig, NO_PREFIX] = ScanConfig()
    grad_dev: Path | None = None
    series: str | None = None
    sigma: Positive | None = None
    noise: Literal["auto", "rician", "gaussian"] = "auto"
    allow_single_shell: bool = False
    scale_series: bool = False
    modulated: bool = False
    posterior_samples: Number = 0
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)


def paper() -> Config:
    """Constants of Zhang et al. 2012, on your files."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan, or a small simulated slab."""
    return Config(ScanConfig(synthetic_shape=(32, 38, 2)))


def laptop() -> Config:
    """Your scan, or a simulated slab large enough to look at."""
    return Config(ScanConfig(synthetic_shape=(96, 112, 8)))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a fit found.

    Attributes:
        parameters: Unit of each parameter.
        voxels: Number of fitted voxels.
        converged: Share of them that met the tolerance.
        flags: Voxels inside the mask with each flag.
        sigma: Noise of each channel; None where not known.
        medians: Medians of maps and standard errors, over the voxels where they mean something.
        truth: Folder of the true maps in the run, of a simulated scan.
    """

    model: str
    parameters: dict[str, str]
    voxels: int
    images: int
    converged: float
    flags: dict[str, int]
    likelihood: str
    sigma: float | None
    medians: dict[str, float]
    shells: tuple[ShellSignal, ...]
    notes: tuple[str, ...]
    truth: str | None


def run(config: Config, folder: RunFolder) -> None:
    """Read and check a scan, fit it, write maps and the report."""
    clock, given = Clock(), config
    files, truth = config.scan.simulate(folder)
    config = dataclasses.replace(config, scan=files)
    scan = read_scan(config)
    log = begin(folder, scan.notes)
    clock.lap("read and check")
    model = config.fit.build_model()
    rows = _fit(config, scan, folder, log)
    clock.lap("fit, compilation included")
    notes = describe_maps(rows, scan.dwi.array, scan.gradients, scan.mask, config.fit)
    for note in notes:
        log.say(f"Note: {note}")
    posterior = None
    if config.posterior_samples:
        chains = config.posterior_samples, files.seed, config.fit.b0_threshold
        posterior = sample_scan(scan, model, rows.fitted, rows.values, rows.direction, *chains, log)
    maps = collect_maps(rows, model, config.modulated, posterior)
    bits = {str(bit): f"{flag}: {FLAG_DEFINITIONS[flag]}" for flag, bit in FLAGS.items()}
    write_maps(folder.outputs, maps, scan, constants(model, scan, config.fit), {"flags": {"bits": bits}})
    summary = summarise(rows, maps, model, scan, config, (*scan.notes, *notes), truth)
    log.metrics(summary.voxels, summary.medians | {"converged": summary.converged})
    clock.lap("sample and write" if posterior else "write")
    finish(folder, given, summary, clock, page)


def read_scan(config: Config) -> DiffusionScan:
    """Read and check everything a fit needs.

    Raises:
        InputError: For whatever a user can have wrong in these files and options.
    """
    if config.posterior_samples:
        require_blackjax()
    files, threshold = config.scan, config.fit.b0_threshold
    needs_two_shells = config.fit.model == "noddi" and not config.allow_single_shell
    check = functools.partial(check_table, b0_threshold=threshold, needs_two_shells=needs_two_shells)
    scan = diffusion.read_scan(files.dwi, files.bvals, files.bvecs, files.mask, threshold, check, series=config.series)
    is_b0, signals = scan.gradients.bvals <= threshold, scan.dwi.array[scan.mask]
    diffusion.check_voxels(signals, is_b0, scan.path, scan.notes)
    scales = check_series(signals, is_b0, config.scale_series, scan.notes)
    if scales is not None:
        scan = scan._replace(dwi=Volume.make(scan.dwi.array / scales.astype(np.float32), scan.dwi.affine))
        signals = scan.dwi.array[scan.mask]
    sigma = choose_sigma(config.noise, config.sigma, signals[:, is_b0], scan.notes)
    if config.posterior_samples and (sigma is None or config.grad_dev is not None or config.fit.s0 == "free"):
        expected = "a Rician noise level, gradients that do not vary, and s0 as the mean, for a posterior"
        raise InputError("posterior_samples", expected, "something else", "give --sigma, or leave the posterior out")
    if config.grad_dev is None:
        return scan._replace(sigma=sigma)
    gradient_map = diffusion.read_gradient_map(config.grad_dev, scan)
    length = np.linalg.norm(gradient_map[scan.mask], axis=-2)
    said = f"lengths from {length.min():.3f} to {length.max():.3f} of the table's"
    scan.notes.append(f"Gradients vary over space: {said}.")
    return scan._replace(sigma=sigma, gradient_map=gradient_map)


def _fit(config: Config, scan: DiffusionScan, folder: RunFolder, log: Log) -> Estimates:
    """Fit all voxels, continuing from and saving to RUN/checkpoints."""
    size = f"{len(scan.gradients.bvals)} images of {' x '.join(map(str, scan.mask.shape))} voxels"
    fit = functools.partial(
        estimate,
        scan.dwi.array,
        scan.gradients,
        scan.mask,
        sigma=scan.sigma,
        gradient_map=scan.gradient_map,
        config=config.fit,
    )
    said = f"Fitting a '{config.fit.model}' model to {size}"
    return run_in_folder(fit, Estimates, scan.dwi.array[scan.mask], folder, log, said)


def constants(model: MicrostructureModel, scan: DiffusionScan, fit: FitConfig) -> dict[str, Any]:
    """Return what the maps rest on."""
    found: dict[str, Any] = {"model": model.name, "likelihood": "gaussian" if scan.sigma is None else "rician"}
    found |= {"sigma": scan.sigma, "s0": fit.s0, "gradients_vary": scan.gradient_map is not None}
    if fit.model == "noddi":
        found |= fit.tissue.constants() | {"extra_cellular": fit.extra_cellular}
    return found


def summarise(
    rows: Estimates, maps: MapsByName, model: MicrostructureModel, scan: DiffusionScan, config: Config,
    notes: tuple[str, ...], truth: str | None,
) -> Summary:  # fmt: skip
    """Collect the numbers of the report."""
    fitted, medians = rows.fitted, {}
    tissue = fitted & (maps["fwf"][0] < WET) if "fwf" in maps else fitted
    errors = [f"{name}_error" for name in model.names]
    for name in (*model.names, *errors, "residual", "mean_diffusivity", "fractional_anisotropy"):
        values = maps[name][0][tissue if name.removesuffix("_error") in WHERE_TISSUE else fitted]
        if values.size:
            medians[name] = float(np.median(values))
    return Summary(
        model=config.fit.model,
        parameters={parameter.name: parameter.unit for parameter in model.parameters},
        voxels=int(fitted.sum()),
        images=len(scan.gradients.bvals),
        converged=float(np.mean(rows.flags[fitted] & FLAGS["not_converged"] == 0)),
        flags={name: int((rows.flags[scan.mask] & bit > 0).sum()) for name, bit in FLAGS.items()},
        likelihood="Gaussian" if scan.sigma is None else "Rician",
        sigma=scan.sigma,
        medians=medians,
        shells=shell_signals(scan.dwi.array[fitted], rows.s0[fitted], scan.gradients.bvals, config.fit.b0_threshold),
        notes=notes,
        truth=truth,
    )


def page(run: Finished[Config, Summary]) -> Page:
    """Show the maps, their errors against the truth where it is known, and how sure they are."""
    summary, outputs, dwi = run.summary, run.outputs, run.config.scan.dwi
    mask, is_noddi = read_map(outputs / "s0.nii.gz").array > 0, summary.model == "noddi"
    sections = estimate_sections(
        outputs, summary.parameters, mask, [Note(text, _kind(text)) for text in summary.notes],
        caption="Fitted parameters, and root mean squared residual relative to the unweighted signal.",
        truth=None if summary.truth is None else run.path / summary.truth,
        further={"residual": MapStyle(colormap="magma", unit="of S0")},
    )  # fmt: skip
    shells = [(round(shell.bval), shell.images, shell.signal) for shell in summary.shells]
    caption = "Shells found in the gradient table, within 50 s/mm^2; the fit uses every image's own b-value."
    data = Section("Data", [Table(("b (s/mm^2)", "Images", "Mean signal / S0"), shells, caption)])
    source = "a synthetic brain slab with known truth" if dwi is None else dwi.name
    how = f"by {summary.likelihood} likelihood, sigma {summary.sigma:.3g}" if summary.sigma else "by least squares"
    known = "the given or estimated noise" if summary.sigma else "the residuals"
    flagged = [(FLAG_DEFINITIONS[name], count) for name, count in summary.flags.items() if count]
    return Page(
        "NODDI maps" if is_noddi else "Ball and stick maps",
        f"{summary.images} diffusion images of {source}, fitted in {summary.voxels:,} voxels {how}",
        [
            ("Voxels", summary.voxels, f"{summary.converged:.1%} converged"),
            *median_tiles(summary.parameters, summary.medians),
            ("Residual", round(summary.medians["residual"], 3), "median NRMSE, relative to S0"),
        ],
        [
            *sections,
            errors_section(outputs, summary.parameters, mask, known, flagged),
            data,
            _reading_section(is_noddi),
        ],
    )


def _kind(note: str) -> Literal["info", "warning"]:
    is_warning = any(word in note for word in ("cannot", "more than diffusion allows", "negative"))
    return "warning" if is_warning else "info"


def _reading_section(is_noddi: bool) -> Section:
    meaning = (
        "Stick fraction is the share of water that moves along one direction only, diffusivity its speed along it "
        "and that of the rest in every direction. Model: Behrens et al., Magn. Reson. Med. 2003."
    )
    if is_noddi:
        meaning = (
            "NDI is the share of tissue water inside neurites, ODI how far their directions spread (0 parallel, 1 "
            "isotropic), FWF the share of free water. All three rest on fixed diffusivities (see the configuration): "
            "another choice changes all maps. Where FWF is near 1, NDI and ODI mean nothing; where NDI is near 0, ODI "
            "means nothing. Model: Zhang et al., NeuroImage 2012."
        )
    residual = (
        "A high residual marks voxels that the model does not describe: motion, artefacts, crossing tissue types, or "
        "pathology. For research only, not for diagnosis."
    )
    return Section("How to read this", [Text([meaning, residual])])

"""Stage `jaxmed noddi fit`: maps of a diffusion scan by maximum likelihood."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxmed.config import Number, Positive, checked
from jaxmed.data import diffusion
from jaxmed.data.diffusion import DiffusionScan
from jaxmed.errors import InputError
from jaxmed.io.gradients import to_world
from jaxmed.io.maps import write_map
from jaxmed.physics.acquisition import (
    check_series,
    check_table,
    choose_sigma,
    find_shells,
    mean_attenuation,
)
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.noddi import WET, WHERE_TISSUE
from jaxmed.physics.posterior import Posterior, PosteriorConfig, require_blackjax, sample_posterior
from jaxmed.recipes.diffusion_scan import ScanConfig
from jaxmed.recipes.kept_rows import run_in_folder
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.parameter_maps import estimate_sections, map_label, read_map
from jaxmed.systems.noddi.fitting import MapsByName, collect_maps, describe_maps, estimate
from jaxmed.systems.noddi.protocol import FitConfig
from jaxmed.systems.noddi.voxel_fit import FLAG_DEFINITIONS, FLAGS, Estimates
from jaxmed.train.announce import announce
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
class Shell:
    """A shell: mean b-value in s/mm^2, number of images, and mean signal relative to the unweighted one."""

    bval: float
    images: int
    signal: float


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
    shells: tuple[Shell, ...]
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
    posterior = _sample(config, scan, model, rows, log)
    maps = collect_maps(rows, model, config.modulated, posterior)
    write_maps(folder.outputs, maps, scan, constants(model, scan, config.fit))
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


def _sample(
    config: Config, scan: DiffusionScan, model: MicrostructureModel, rows: Estimates, log: Log
) -> Posterior | None:
    """Sample the posterior of fitted voxels, where it was asked for."""
    if not config.posterior_samples:
        return None
    assert scan.sigma is not None  # read_scan refuses
    fitted, warmup = rows.fitted, max(50, config.posterior_samples // 2)
    steps = warmup + config.posterior_samples
    announce(log, f"Sampling the posterior by chains of {steps:,} steps", count=int(fitted.sum()), unit="voxels")
    return sample_posterior(
        jax.random.key(config.scan.seed),
        model,
        scan.dwi.array[fitted],
        scan.gradients.bvals,
        scan.gradients.bvecs,
        scan.sigma,
        rows.values[fitted],
        rows.direction[fitted],
        b0_threshold=config.fit.b0_threshold,
        config=PosteriorConfig(num_warmup=warmup, num_samples=config.posterior_samples),
    )


def write_maps(folder: Path, maps: MapsByName, scan: DiffusionScan, constants: dict) -> None:
    """Write every map on the grid of the scan, with its sidecar."""
    bits = {str(bit): f"{flag}: {FLAG_DEFINITIONS[flag]}" for flag, bit in FLAGS.items()}
    for name, (array, definition, unit) in maps.items():
        array = to_world(array, scan.dwi.affine) if name == "direction" else array
        array = array if array.dtype == np.uint8 else array.astype(np.float32)
        further = {"bits": bits} if name == "flags" else {}
        volume = Volume.make(array, scan.dwi.affine)
        write_map(folder, name, volume, definition, unit, constants, reference=scan.reference, **further)


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
    signals, s0 = scan.dwi.array[fitted], rows.s0[fitted]
    shells = find_shells(scan.gradients.bvals, config.fit.b0_threshold)
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
        shells=tuple(Shell(s.bval, len(s.rows), mean_attenuation(signals, s0, s.rows)) for s in shells),
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
    return Page(
        "NODDI maps" if is_noddi else "Ball and stick maps",
        f"{summary.images} diffusion images of {source}, fitted in {summary.voxels:,} voxels {how}",
        _tiles(summary),
        [*sections, _errors_section(run, mask), data, _reading_section(is_noddi)],
    )


def _kind(note: str) -> Literal["info", "warning"]:
    is_warning = any(word in note for word in ("cannot", "more than diffusion allows", "negative"))
    return "warning" if is_warning else "info"


def _tiles(summary: Summary) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Voxels", summary.voxels, f"{summary.converged:.1%} converged")]
    for name, unit in summary.parameters.items():
        if name in summary.medians:
            said = "median" if unit == "1" else f"median, {unit}"
            said += ", where FWF < 0.9" if name in WHERE_TISSUE else ""
            error = summary.medians[f"{name}_error"]
            tiles.append((map_label(name), round(summary.medians[name], 3), f"{said}; standard error {error:.3f}"))
    return [*tiles, ("Residual", round(summary.medians["residual"], 3), "median NRMSE, relative to S0")]


def _errors_section(run: Finished[Config, Summary], mask: np.ndarray) -> Section:
    units = run.summary.parameters
    errors = {map_label(name): read_map(run.outputs / f"{name}_error.nii.gz") for name in [*units, "direction"]}
    styles = {map_label(n): MapStyle(unit="" if unit == "1" else unit, colormap="magma") for n, unit in units.items()}
    styles["Direction"] = MapStyle(colormap="magma", unit="degrees", limits=(0.0, 60.0))
    known = "the given or estimated noise" if run.summary.sigma else "the residuals"
    text = (
        f"Standard errors from the curvature of the likelihood at its maximum and {known}: how far another "
        "scan of the same voxel would move each value. Where one is as wide as the range, the data say "
        "nothing about it."
    )
    figure = slice_maps(
        {label: volume.array for label, volume in errors.items()},
        errors["Direction"].spacing,
        caption="Standard error of each parameter, and of the direction as the angle of its cone of uncertainty.",
        styles=styles,
        mask=mask,
    )
    flagged = [(FLAG_DEFINITIONS[name], count) for name, count in run.summary.flags.items() if count]
    table = Table(("Flag", "Voxels"), flagged, "Bits of map 'flags' that are set somewhere in the mask.")
    return Section("How sure the maps are", [Text([text]), figure, *([table] if flagged else [])])


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

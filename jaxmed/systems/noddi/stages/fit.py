"""Stage `jaxmed noddi fit`: maps of a diffusion scan by maximum likelihood."""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32

from jaxmed.config import Number, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io.diffusion import read_dwi, read_gradient_map
from jaxmed.io.gradients import GradientTable, to_world
from jaxmed.io.maps import write_map
from jaxmed.io.numpy_files import restore_npz, write_npz
from jaxmed.physics.acquisition import (
    check_series,
    check_table,
    check_voxels,
    choose_sigma,
    find_shells,
    mean_attenuation,
)
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.posterior import Posterior, PosteriorConfig, require_blackjax, sample_posterior
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.parameter_maps import map_label, maps_section, read_map, truth_section
from jaxmed.synthesis.phantoms.write import check_shape, write_diffusion_slab
from jaxmed.systems.noddi.fitting import WHERE_TISSUE, collect_maps, describe_maps, estimate
from jaxmed.systems.noddi.protocol import FitConfig, read_mask
from jaxmed.systems.noddi.voxel_fit import FLAG_DEFINITIONS, FLAGS, WET, Estimates
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start
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
        synthetic_shape: Voxels (x, y, z) of the brain slab to simulate and fit where no --dwi is given.
        synthetic_snr: Signal-to-noise ratio of the synthetic slab, white matter, unweighted.
        seed: Seed of the synthetic slab and of Markov chains; a fit itself draws nothing.
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
    synthetic_shape: tuple[Size, Size, Size] | None = None
    synthetic_snr: Positive = 30.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.synthetic_shape is not None:
            check_shape("synthetic_shape", self.synthetic_shape)


def paper() -> Config:
    """Constants of Zhang et al. 2012, on your files."""
    return Config()


def smoke() -> Config:
    """In seconds: your scan, or a small simulated slab."""
    return Config(synthetic_shape=(32, 38, 2))


def laptop() -> Config:
    """Your scan, or a simulated slab large enough to look at."""
    return Config(synthetic_shape=(96, 112, 8))


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
        mask: File of the mask, where one was given.
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
    mask: str | None


class Scan(NamedTuple):
    """A checked diffusion scan, ready to fit.

    Attributes:
        path: File or folder that it came from.
        dwi: Magnitudes, 4D; NaN and Inf may be among them.
        gradients: b-values and directions in FSL's frame.
        mask: Voxels to fit.
        sigma: Noise of each channel; None where not known.
        gradient_map: What gradients are multiplied by, voxel by voxel; None where they do not vary.
        notes: What a reader of the maps should know.
    """

    path: Path
    dwi: Volume
    gradients: GradientTable
    mask: Bool[np.ndarray, "x y z"]
    sigma: float | None
    gradient_map: Float32[np.ndarray, "x y z 3 3"] | None
    notes: list[str]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check a scan, fit it, write maps and the report."""
    clock, given, truth = Clock(), config, None
    if config.synthetic_shape is not None and config.dwi is None:
        start(folder)
        files = write_diffusion_slab(folder.path / "inputs", config.seed, config.synthetic_shape, config.synthetic_snr)
        truth = str(files.truth.relative_to(folder.path))
        config = dataclasses.replace(config, dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask)
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
    summary = summarise(rows, model, scan, config, (*scan.notes, *notes), truth)
    log.metrics(summary.voxels, summary.medians | {"converged": summary.converged})
    clock.lap("sample and write" if posterior else "write")
    finish(folder, given, summary, clock, page)


def read_scan(config: Config) -> Scan:
    """Read and check everything a fit needs.

    Raises:
        InputError: For whatever a user can have wrong in these files and options.
    """
    if config.posterior_samples:
        require_blackjax()
    path, threshold = require_given(config.dwi, "dwi"), config.fit.b0_threshold
    needs_two_shells = config.fit.model == "noddi" and not config.allow_single_shell
    check = functools.partial(check_table, b0_threshold=threshold, needs_two_shells=needs_two_shells)
    dwi, gradients = read_dwi(path, config.bvals, config.bvecs, threshold, check, series=config.series)
    notes = list(gradients.notes)
    is_b0 = gradients.bvals <= threshold
    mask = read_mask(config.mask, dwi, path, dwi.array[..., is_b0].mean(axis=-1), notes)
    signals = dwi.array[mask]
    check_voxels(signals, is_b0, path, notes)
    scales = check_series(signals, is_b0, config.scale_series, notes)
    if scales is not None:
        dwi = Volume.make(dwi.array / scales.astype(np.float32), dwi.affine)
        signals = dwi.array[mask]
    sigma = choose_sigma(config.noise, config.sigma, signals[:, is_b0], notes)
    if config.posterior_samples and (sigma is None or config.grad_dev is not None or config.fit.s0 == "free"):
        expected = "a Rician noise level, gradients that do not vary, and s0 as the mean, for a posterior"
        raise InputError("posterior_samples", expected, "something else", "give --sigma, or leave the posterior out")
    gradient_map = None
    if config.grad_dev is not None:
        gradient_map = read_gradient_map(config.grad_dev, dwi, path)
        length = np.linalg.norm(gradient_map[mask], axis=-2)
        notes.append(
            f"Gradients vary over space: lengths from {length.min():.3f} to {length.max():.3f} of the table's."
        )
    return Scan(path, dwi, gradients, mask, sigma, gradient_map, notes)


def _fit(config: Config, scan: Scan, folder: RunFolder, log: Log) -> Estimates:
    """Fit all voxels, continuing from and saving to RUN/checkpoints."""
    saved = folder.checkpoints / "fit.npz"
    digest = hashlib.sha256(np.ascontiguousarray(scan.dwi.array[scan.mask]).data).hexdigest()
    finished = _restore(saved, digest)
    total, done = int(scan.mask.sum()), 0 if finished is None else len(finished.fitted)
    if done:
        log.say(f"Continuing after {done:,} voxels of an interrupted run.")
    size = f"{len(scan.gradients.bvals)} images of {' x '.join(map(str, scan.mask.shape))} voxels"
    announce(log, f"Fitting a '{config.fit.model}' model to {size}", count=total - done, unit="voxels")
    last_save = time.monotonic()
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
    return rows


def _save(path: Path, digest: str, rows: Estimates) -> None:
    write_npz(path, {"digest": np.array(digest), **rows._asdict()})


def _restore(path: Path, digest: str) -> Estimates | None:
    stored = restore_npz(path)
    if stored is None:
        return None
    if str(stored["digest"]) != digest:
        raise InputError(path, "rows of this scan", "rows of another", "start anew with --no-resume")
    return Estimates(*(stored[name] for name in Estimates._fields))


def _sample(config: Config, scan: Scan, model: MicrostructureModel, rows: Estimates, log: Log) -> Posterior | None:
    """Sample the posterior of fitted voxels, where it was asked for."""
    if not config.posterior_samples:
        return None
    assert scan.sigma is not None  # read_scan refuses
    fitted, warmup = rows.fitted, max(50, config.posterior_samples // 2)
    steps = warmup + config.posterior_samples
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
        config=PosteriorConfig(num_warmup=warmup, num_samples=config.posterior_samples),
    )


def write_maps(folder: Path, maps: dict[str, tuple[np.ndarray, str, str]], scan: Scan, constants: dict) -> None:
    """Write every map on the grid of the scan, with its sidecar."""
    reference = scan.path if scan.path.is_file() else None
    bits = {str(bit): f"{flag}: {FLAG_DEFINITIONS[flag]}" for flag, bit in FLAGS.items()}
    for name, (array, definition, unit) in maps.items():
        array = to_world(array, scan.dwi.affine) if name == "direction" else array
        array = array if array.dtype == np.uint8 else array.astype(np.float32)
        further = {"bits": bits} if name == "flags" else {}
        volume = Volume.make(array, scan.dwi.affine)
        write_map(folder, name, volume, definition, unit, constants, reference=reference, **further)


def constants(model: MicrostructureModel, scan: Scan, fit: FitConfig) -> dict[str, Any]:
    """Return what the maps rest on."""
    found: dict[str, Any] = {"model": model.name, "likelihood": "gaussian" if scan.sigma is None else "rician"}
    found |= {"sigma": scan.sigma, "s0": fit.s0, "gradients_vary": scan.gradient_map is not None}
    if fit.model == "noddi":
        found |= fit.tissue.constants() | {"extra_cellular": fit.extra_cellular}
    return found


def summarise(
    rows: Estimates, model: MicrostructureModel, scan: Scan, config: Config, notes: tuple[str, ...], truth: str | None
) -> Summary:
    """Collect the numbers of the report."""
    fitted = rows.fitted
    measures = {}
    for index, name in enumerate(model.names):
        measures |= {name: rows.values[..., index], f"{name}_error": rows.errors[..., index]}
    for name in ("residual", "mean_diffusivity", "fractional_anisotropy"):
        measures[name] = getattr(rows, name)
    defined = fitted & (measures["fwf"] < WET) if "fwf" in measures else fitted
    where = {name: defined for tissue in WHERE_TISSUE for name in (tissue, f"{tissue}_error")}
    inside = {name: measure[where.get(name, fitted)] for name, measure in measures.items()}
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
        medians={name: float(np.median(values)) for name, values in inside.items() if values.size},
        shells=tuple(Shell(s.bval, len(s.rows), mean_attenuation(signals, s0, s.rows)) for s in shells),
        notes=notes,
        truth=truth,
        mask=None if config.mask is None else str(config.mask),
    )


def page(run: Finished[Config, Summary]) -> Page:
    """Show the maps, their errors against the truth where it is known, and how sure they are."""
    summary, outputs = run.summary, run.outputs
    is_noddi = summary.model == "noddi"
    maps = {map_label(name): read_map(outputs / f"{name}.nii.gz") for name in [*summary.parameters, "residual"]}
    mask = read_map(outputs / "s0.nii.gz").array > 0
    defined = mask & (maps["FWF"].array < WET) if is_noddi else mask
    where = {map_label(name): defined for name in WHERE_TISSUE}
    units = {map_label(name): "" if unit == "1" else unit for name, unit in summary.parameters.items()}
    styles = {
        label: MapStyle(unit=unit, limits=None if unit else (0.0, 1.0), colormap="viridis")
        for label, unit in units.items()
    } | {"Residual": MapStyle(colormap="magma", unit="of S0")}
    notes = [Note(text, "warning" if _is_warning(text) else "info") for text in summary.notes]
    distribution = "Distribution over fitted voxels"
    if is_noddi:
        distribution += (
            "; NDI and ODI where the free water fraction is below 0.9, because tissue that is not there has "
        )
        distribution += "no neurites"
    caption = "Fitted parameters, and root mean squared residual relative to the unweighted signal."
    sections = [maps_section(maps, styles, mask, where, notes, caption=caption, distribution=f"{distribution}.")]
    if summary.truth is not None:
        truth = {map_label(name): read_map(run.path / summary.truth / f"{name}.nii.gz") for name in summary.parameters}
        caption = "Error of the estimate; NDI and ODI where the estimated FWF is below 0.9."
        sections.append(truth_section(truth, maps, styles, mask, where, caption))
    shells = [(round(shell.bval), shell.images, shell.signal) for shell in summary.shells]
    caption = "Shells found in the gradient table, within 50 s/mm^2; the fit uses every image's own b-value."
    data = Section("Data", [Table(("b (s/mm^2)", "Images", "Mean signal / S0"), shells, caption)])
    source = "a synthetic brain slab with known truth" if run.config.dwi is None else run.config.dwi.name
    how = f"by {summary.likelihood} likelihood, sigma {summary.sigma:.3g}" if summary.sigma else "by least squares"
    return Page(
        "NODDI maps" if is_noddi else "Ball and stick maps",
        f"{summary.images} diffusion images of {source}, fitted in {summary.voxels:,} voxels {how}",
        _tiles(summary),
        [*sections, _errors_section(run, mask, units), data, _reading_section(is_noddi)],
    )


def _is_warning(text: str) -> bool:
    return any(word in text for word in ("cannot", "more than diffusion allows", "negative"))


def _tiles(summary: Summary) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Voxels", summary.voxels, f"{summary.converged:.1%} converged")]
    for name, unit in summary.parameters.items():
        if name in summary.medians:
            said = "median" if unit == "1" else f"median, {unit}"
            said += ", where FWF < 0.9" if name in WHERE_TISSUE else ""
            error = summary.medians[f"{name}_error"]
            tiles.append((map_label(name), round(summary.medians[name], 3), f"{said}; standard error {error:.3f}"))
    return [*tiles, ("Residual", round(summary.medians["residual"], 3), "median NRMSE, relative to S0")]


def _errors_section(run: Finished[Config, Summary], mask: np.ndarray, units: dict[str, str]) -> Section:
    names = [*run.summary.parameters, "direction"]
    errors = {map_label(name): read_map(run.outputs / f"{name}_error.nii.gz") for name in names}
    styles = {label: MapStyle(colormap="magma", unit=unit) for label, unit in units.items()}
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

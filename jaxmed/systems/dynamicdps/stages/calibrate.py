"""DynamicDPS calibrate: the bank that chooses starts, its compression, and the acquisition, for one prior."""

import dataclasses
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jaxmed.config import Length, NonNegative, Number, Seed, Size, checked, to_record
from jaxmed.data.scans import find_scans, partner_of
from jaxmed.diffusion.posterior.dps import Dps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io.tables import write_table
from jaxmed.physics.lowfield import LOWFIELD2026, FitConfig, LowField, make_operator
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.calibrate_page import write_page
from jaxmed.systems.dynamicdps.calibration import (
    digest_of,
    fit_acquisition,
    make_start,
    measure,
    record_bank,
    residuals_of,
)
from jaxmed.systems.dynamicdps.networks import Network, load_initial, load_prior, make_prior, trace_pass
from jaxmed.systems.dynamicdps.options import CALIBRATION, Calibrated
from jaxmed.systems.dynamicdps.reading import KINDS, FrameConfig, cut_images, head_of, read_scan
from jaxmed.systems.dynamicdps.stages import train_prior
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary
from jaxmed.volume import require_same_grid

LEAST_HEAD = 0.1
"""Share of head that a reference image needs."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Calibration of DynamicDPS for one prior and one kind of acquisition.

    Attributes:
        input: High-field reference scans: a file, or a folder of files. Subjects of their own, as the prior's.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        low: Their low-field scans, on the same grids: a file, or a folder with the same file names. Contrast and blur
            are fitted to the pairs; without them the acquisition stands as it is given.
        weights: The prior: a run of train-prior, or published weights.
        initial: A run of train-initial, whose estimates are to start in the first bin; without it the authors'
            compression stands.
        acquisition: From high field to low field; where pairs are fitted all but its gamma and sigma.
        fit: How they are fitted.
        runs: Reference images, each one full run of DPS.
        batch_size: Runs at a time.
        scale: Step of DPS.
        steps: Of the chain; 0 for all 1000. Another number is another sampler: enhance takes the bank's.
        bins: Of the bank.
        share: Share of familiar estimates that is to start in the first bin.
        embedded: Make so many phantom brains where no scans are given, and a tiny prior where no weights are.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of noise and runs.
    """

    input: Path | None = None
    series: str = ""
    low: Path | None = None
    weights: Path | None = None
    initial: Path | None = None
    acquisition: LowField = LOWFIELD2026
    fit: FitConfig = FitConfig()
    runs: Size = 16
    batch_size: Size = 8
    scale: NonNegative = 0.3
    steps: Length = 0
    bins: Size = 20
    share: float = 0.95
    embedded: Number = 0
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.runs < 1 or self.batch_size < 1 or self.embedded < 0:
            found = self.runs, self.batch_size, self.embedded
            raise ValueError(f"runs, batch_size, embedded: expected 1, 1 and 0 or more, found {found}")
        if not self.scale > 0 or not 0 < self.share <= 1:
            raise ValueError(f"scale, share: expected above 0, and in (0, 1], found {self.scale:g}, {self.share:g}")
        steps = self.steps or VpDiscrete().num_steps
        if not 2 <= steps <= VpDiscrete().num_steps or self.bins < 1 or steps % self.bins:
            raise ValueError(f"steps, bins: expected up to 1000, and a divisor of it, found {steps}, {self.bins}")


def paper() -> Config:
    """135 runs of 1000 steps, as the bank that the authors ship."""
    return Config(runs=135)


def laptop() -> Config:
    """12 runs of 1000 steps: minutes with a prior of train-prior's preset laptop."""
    return Config(runs=12, batch_size=6, acquisition=LowField(gamma=0.8, scale=2.0, sigma=1.0, radius=4, noise=0.02))


def smoke() -> Config:
    """A chain of 100 steps, in seconds: your scans or phantom brains, your prior or a tiny one made on the spot."""
    acquisition = LowField(gamma=0.8, scale=2.0, sigma=1.0, radius=4, noise=0.02)
    return Config(acquisition=acquisition, runs=6, batch_size=6, steps=100, embedded=6)


class References(NamedTuple):
    """Reference images, and their low-field partners where there are any.

    Attributes:
        images: In [0, 2], (image, *size, 1).
        low: Of the same places; None without pairs.
        names: File, and slice.
    """

    images: Float32[np.ndarray, "image ..."]
    low: Float32[np.ndarray, "image ..."] | None
    names: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read references, fit the acquisition, record the bank, choose the compression, write the report."""
    began = time.monotonic()
    if config.embedded and (config.input is None or config.weights is None):
        config = make_embedded(config, folder)
    if config.weights is None or config.input is None:
        missing = "weights" if config.weights is None else "input"
        raise InputError(missing, "a prior and reference scans", "nothing", f"give --{missing}, or try --preset smoke")
    network = load_prior(config.weights)
    initial = None if config.initial is None else load_initial(config.initial)
    references = read_references(config, network.frame)
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    for remark in (*network.remarks, *(initial.remarks if initial else ())):
        log.say(f"Note: {remark}")
    log.say(
        f"{len(references.images)} reference images of {len(set(n.split(',')[0] for n in references.names))} scans."
    )
    ready = time.monotonic()
    acquisition, fitted = _fit(config, references, log)
    measurement = measure(jax.random.key(config.seed), references.images, acquisition)
    estimate = _estimate(initial, measurement)
    familiar = residuals_of(measurement, estimate, acquisition)
    bank = _record(config, network, measurement, acquisition, folder, log)
    rule = make_start(bank, familiar if initial else None, config.bins, config.share)
    calibrated = Calibrated(rule, acquisition, config.steps, digest_of(network.params))
    computed = time.monotonic()
    write_json(folder.outputs / CALIBRATION, to_record(calibrated))
    quantiles = np.quantile(bank, [0.0, 0.5, 1.0], axis=0)
    columns = ("steps_left", "mean", "lowest", "median", "highest")
    rows: list[dict[str, Any]] = [
        dict(zip(columns, (left, *(float(f"{v:.6g}") for v in values)), strict=True))
        for left, values in enumerate(zip(bank.mean(0), *quantiles, strict=True))
    ]
    write_table(folder.outputs / "bank.csv", columns, rows)
    own = residuals_of(measurement, references.images, acquisition)
    summary: dict[str, Any] = {
        "references": list(references.names),
        "prior": str(config.weights),
        "fit": fitted,
        "familiar": [float(value) for value in familiar],
        "truth": [float(value) for value in own],
        "estimates": "a conditional network's" if initial else "the measurements themselves",
        "monotone": bool(np.all(np.diff(rule.means) >= 0)),
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed dynamicdps calibrate --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read": ready - began, "fit and run, compilation included": computed - ready},
    }
    write_summary(folder, summary)
    log.say(f"Compression: tau {rule.tau:.3g} at scale {rule.scale:.3g}; the first bin ends at {rule.means[0]:.3g}.")
    write_page(folder.path)


report = write_page


def make_embedded(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains where no scans are given, and train a tiny prior on others where none is given."""
    if config.input is not None:
        find_scans(config.input, KINDS, config.series)  # a mistake there costs no training
    start(folder)
    weights = config.weights or train_tiny_prior(folder, config.seed)
    if config.input is not None:
        return dataclasses.replace(config, weights=weights)
    size = load_prior(weights).frame.size
    # Another seed than that of the prior's own phantoms.
    manifest = write_brain_cohort(folder.path / "inputs" / "brains", config.seed + 1, config.embedded, size)
    return dataclasses.replace(config, weights=weights, input=manifest.parent / "scans")


def train_tiny_prior(folder: RunFolder, seed: int) -> Path:
    """Train the smoke preset's prior inside a run, once; return its run."""
    settings = dataclasses.replace(train_prior.smoke(), seed=seed)
    nested = open_run("dynamicdps", "train-prior", settings, RunOptions(folder.path / "inputs" / "prior", quiet=True))
    if nested.status != "complete":
        Log(folder.path, folder.options.quiet).say("Training a tiny prior on embedded brains first.")
        train_prior.run(settings, nested)
    return nested.path


def read_references(config: Config, frame: FrameConfig) -> References:
    """Read the scans, and choose images evenly over all that show enough of a head.

    Raises:
        InputError: A file cannot be read, a pair is incomplete or on two grids, or no image shows a head.
    """
    assert config.input is not None
    scans = find_scans(config.input, KINDS, config.series, apart=(config.low,)).scans
    paths = tuple(scan.path for scan in scans)
    partners = None if config.low is None else pair_files(paths, config.input, config.low)
    images, low, names = [], [], []
    for number, path in enumerate(paths):
        scan = read_scan(scans[number], frame, config.fill)
        head = head_of(scan.volume.array)
        cut, _ = cut_images(scan.volume.array, frame, head)
        share = cut_images(head, frame, head)[0].reshape(len(cut), -1).mean(1)
        kept = np.flatnonzero(share >= LEAST_HEAD)
        images += [cut[index] for index in kept]
        names += [f"{path.name}, {index}" for index in kept]
        if partners is not None:
            other = read_scan(partners[number], frame, config.fill)
            require_same_grid(other.volume, scan.volume, str(partners[number]), str(path))
            other_cut, _ = cut_images(other.volume.array, frame, head)
            low += [other_cut[index] for index in kept]
    if not images:
        advice = "check the scans, or the size of the prior's images"
        raise InputError(config.input, f"images of which {LEAST_HEAD:.0%} is head", "none", advice)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(config.runs, len(images))).round().astype(int))
    return References(
        np.stack([images[i] for i in chosen])[..., None].astype(np.float32),
        np.stack([low[i] for i in chosen])[..., None].astype(np.float32) if low else None,
        tuple(names[i] for i in chosen),
    )


def pair_files(paths: tuple[Path, ...], place: Path, other: Path) -> list[Path]:
    """Return the file of the same name below another folder for each file; or the one other file.

    Raises:
        InputError: One has no partner.
    """
    if other.is_file():
        if len(paths) > 1:
            raise InputError(other, f"a folder with {len(paths)} files", "one file", "give a folder")
        return [other]
    root = place if place.is_dir() and paths != (place,) else place.parent
    found = [partner_of(other, path.relative_to(root)) for path in paths]
    for path in found:
        if not path.exists():
            raise InputError(path, "a file for every input, by the same name", "none", "check the names")
    return found


def _fit(config: Config, references: References, log: Log) -> tuple[LowField, dict[str, float] | None]:
    if references.low is None:
        return config.acquisition, None
    found = fit_acquisition(references.images, references.low, config.acquisition, config.fit)
    gamma, sigma = float(found.gamma), float(found.sigma)
    log.say(f"Fitted to pairs: gamma {gamma:.3g}, blur {sigma:.3g} voxels, error {float(found.loss) ** 0.5:.3g}.")
    blurred = config.acquisition.sigma
    sigmas = tuple(sigma if s > 0 else 0.0 for s in blurred) if isinstance(blurred, tuple) else sigma
    # What the fit leaves over is noise, and whatever the model cannot say.
    noise = float(found.loss) ** 0.5
    acquisition = dataclasses.replace(config.acquisition, gamma=gamma, sigma=sigmas, noise=noise)
    return acquisition, {"gamma": gamma, "sigma": sigma, "rms": noise, "steps": int(found.steps)}


def _estimate(initial: Network | None, measurement: np.ndarray) -> Float32[np.ndarray, "image ..."]:
    if initial is None:
        return np.clip(measurement, 0.0, 2.0)
    apply = jax.jit(partial(initial.model.apply, initial.params))
    return np.clip(np.concatenate([np.asarray(apply(one[None])) for one in measurement]), 0.0, 2.0)


def _record(
    config: Config, network: Network, measurement: np.ndarray, acquisition: LowField, folder: RunFolder, log: Log
) -> Float32[np.ndarray, "run step"]:
    operator = make_operator(measurement.shape[1:-1], acquisition)
    settings = Dps(config.scale, Ancestral(num_steps=config.steps or None), PLAIN)
    program, images = trace_pass(network, config.batch_size, operator)
    announce(
        log, f"Recording {len(measurement)} runs, {config.batch_size} at a time", params=network.params, batch=images,
        program=program, count=(config.steps or VpDiscrete().num_steps) * -(-len(measurement) // config.batch_size),
        unit="steps", smaller=folder.smaller,
    )  # fmt: skip
    with log.progress("Recording", len(measurement), "runs") as update:
        return record_bank(
            partial(make_prior, network), network.params, jax.random.key(config.seed + 1), measurement, operator,
            settings, config.batch_size, folder.checkpoints / "bank", update,
        )  # fmt: skip

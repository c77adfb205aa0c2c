"""DynamicDPS calibrate: the bank that chooses starts, its compression, and the acquisition, for one prior."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.batches import apply_in_batches
from jaxmed.config import Length, Number, Positive, Seed, Size, checked, to_record
from jaxmed.data.scans import ANY_KIND, find_scans
from jaxmed.data.subject_images import PairedImages, read_pairs
from jaxmed.diffusion.posterior.dps import Dps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.start_time import choose_start
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.files import require_given, write_json
from jaxmed.io.tables import read_table, write_table
from jaxmed.physics.lowfield import LOWFIELD2026, FitConfig, LowField, make_operator
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import Band, curves
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.calibration import (
    CALIBRATION,
    Calibrated,
    digest_of,
    fit_acquisition,
    make_start,
    measure,
    read_calibration,
    record_bank,
    residuals_of,
)
from jaxmed.systems.dynamicdps.networks import (
    announce_passes,
    apply_initial,
    load_initial,
    load_prior,
    make_prior,
    tiny_network,
)
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder


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
        steps: Steps of the chain; 0 for all 1000. Another number is another sampler: enhance takes the bank's.
        bins: Bins into which the bank is cut.
        share: Share of familiar estimates that is to start in the first bin.
        synthetic: Make so many phantom brains where no scans are given, and a tiny prior where no weights are.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the noise and of the runs.
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
    scale: Positive = 0.3
    steps: Length = 0
    bins: Size = 20
    share: float = 0.95
    synthetic: Number = 0
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a number in (0, 1], found {self.share:g}")
        steps = self.steps or VpDiscrete().num_steps
        if not 2 <= steps <= VpDiscrete().num_steps or steps % self.bins:
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
    return Config(acquisition=acquisition, runs=6, batch_size=6, steps=100, synthetic=6)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """How the acquisition was fitted to pairs: the error left over, which is taken for noise, and steps taken."""

    rms: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was calibrated on what.

    Attributes:
        references: File and slice of every reference image.
        prior: Where the prior was read.
        fit: None without pairs.
        familiar: |y - A(x)| of each image's estimate.
        truth: |y - A(x)| of the images themselves.
        estimates: What the estimates are, in words.
        monotone: Whether the means of the bins rise throughout.
    """

    references: tuple[str, ...]
    prior: str
    fit: Fitted | None
    familiar: tuple[float, ...]
    truth: tuple[float, ...]
    estimates: str
    monotone: bool


def run(config: Config, folder: RunFolder) -> None:
    """Read references, fit the acquisition, record the bank, choose the compression, write the report."""
    clock, asked = Clock(), config
    if config.synthetic and (config.input is None or config.weights is None):
        config = synthetic_inputs(config, folder)
    place = require_given(config.input, "input", "reference scans")
    weights = require_given(config.weights, "weights", "the weights of a prior")
    network = load_prior(weights)
    initial = None if config.initial is None else load_initial(config.initial)
    references = read_pairs(place, config.low, network.preprocess, config.runs, config.series, config.fill)
    log = begin(folder, (*network.report.remarks, *(initial.report.remarks if initial else ())))
    scans = {name.split(",")[0] for name in references.names}
    log.say(f"{len(references.images)} reference images of {len(scans)} scans.")
    clock.lap("read")
    acquisition, fitted = _fit(config, references, log)
    measurement = measure(jax.random.key(config.seed), references.images, acquisition)
    estimate = np.clip(measurement, 0.0, 2.0)
    if initial is not None:
        estimate = apply_in_batches(apply_initial(initial), 1, measurement)
    familiar = residuals_of(measurement, estimate, acquisition)
    announce_passes(
        log, f"Recording {len(measurement)} runs, {config.batch_size} at a time", network, config.batch_size,
        acquisition, (config.steps or VpDiscrete().num_steps) * -(-len(measurement) // config.batch_size), "steps",
        folder.smaller,
    )  # fmt: skip
    with log.progress("Recording", len(measurement), "runs") as update:
        bank = record_bank(
            partial(make_prior, network), network.params, jax.random.key(config.seed + 1), measurement,
            make_operator(measurement.shape[1:-1], acquisition),
            Dps(config.scale, Ancestral(num_steps=config.steps or None), PLAIN), config.batch_size,
            folder.checkpoints / "bank", update,
        )  # fmt: skip
    rule = make_start(bank, familiar if initial else None, config.bins, config.share)
    clock.lap("fit and run, compilation included")
    calibrated = Calibrated(rule, acquisition, config.steps, digest_of(network.params))
    write_json(folder.outputs / CALIBRATION, to_record(calibrated))
    columns = ("steps_left", "mean", "lowest", "median", "highest")
    values = np.concatenate([bank.mean(0)[None], np.quantile(bank, [0.0, 0.5, 1.0], axis=0)])
    rows: list[dict[str, Any]] = [
        dict(zip(columns, (left, *(float(f"{v:.6g}") for v in line)), strict=True))
        for left, line in enumerate(values.T)
    ]
    write_table(folder.outputs / "bank.csv", columns, rows)
    log.say(f"Compression: tau {rule.tau:.3g} at scale {rule.scale:.3g}; the first bin ends at {rule.means[0]:.3g}.")
    summary = Summary(
        references.names, str(config.weights), fitted, tuple(familiar.tolist()),
        tuple(residuals_of(measurement, references.images, acquisition).tolist()),
        "a conditional network's" if initial else "the measurements themselves",
        bool(np.all(np.diff(rule.means) >= 0)),
    )  # fmt: skip
    finish(folder, asked, summary, clock, page)


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains where no scans are given, and train a tiny prior on others where none is given."""
    if config.input is not None:
        find_scans(config.input, ANY_KIND, config.series)  # a mistake there costs no training
    weights = config.weights or tiny_network(folder, "train-prior", {"train.seed": config.seed}, begin(folder))
    begin(folder)
    if config.input is not None:
        return dataclasses.replace(config, weights=weights)
    size = load_prior(weights).preprocess.size
    # Another seed than that of the prior's own phantoms.
    manifest = write_brain_cohort(folder.path / "inputs" / "brains", config.seed + 1, config.synthetic, size)
    return dataclasses.replace(config, weights=weights, input=manifest.parent / "scans")


def _fit(config: Config, references: PairedImages, log: Log) -> tuple[LowField, Fitted | None]:
    if references.partners is None:
        return config.acquisition, None
    found = fit_acquisition(references.images, references.partners, config.acquisition, config.fit)
    # What the fit leaves over is noise, and whatever the model cannot say.
    gamma, sigma, noise = float(found.gamma), float(found.sigma), float(found.loss) ** 0.5
    log.say(f"Fitted to pairs: gamma {gamma:.3g}, blur {sigma:.3g} voxels, error {noise:.3g}.")
    blurred = config.acquisition.sigma
    sigmas = tuple(sigma if s > 0 else 0.0 for s in blurred) if isinstance(blurred, tuple) else sigma
    acquisition = dataclasses.replace(config.acquisition, gamma=gamma, sigma=sigmas, noise=noise)
    return acquisition, Fitted(noise, int(found.steps))


# The page -----------------------------------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show the bank, the rule that follows from it, and the acquisition."""
    summary, calibrated = run.summary, read_calibration(run.path)
    rule = calibrated.start
    tiles = [
        ("Runs", len(summary.references), "of DPS, one per reference image"),
        ("First bin", round(rule.means[0], 3), "mean residual |y - A(x)|"),
        ("Tau", round(rule.tau, 3), f"compression, at a scale of {rule.scale:.3g}"),
        ("Familiar", round(float(np.median(summary.familiar)), 3), "median residual of estimates"),
    ]
    reading = [
        f"outputs/{CALIBRATION} is what jaxmed dynamicdps enhance --calibration RUN reads. It belongs to one prior, "
        "one acquisition and one size of images: residuals are norms over whole images.",
        "Residuals of estimates below the first bin's mean start as late as there is; tau compresses those above, so "
        "that estimates unlike anything in the bank do not begin in pure noise.",
        "Source: DynamicDPS, arXiv:2503.01075, and its code. The choice of tau and scale is ours.",
    ]
    return Page(
        "Calibration of DynamicDPS",
        f"{len(summary.references)} full runs of DPS on reference images",
        tiles,
        [_bank(run, calibrated), _acquisition(calibrated, summary), Section("How to read this", [Text(reading)])],
    )


def _bank(run: Finished[Config, Summary], calibrated: Calibrated) -> Section:
    table = read_table(run.outputs / "bank.csv")
    bank = {name: np.array(table.floats(name)) for name in table.columns}
    rule, blocks = calibrated.start, []
    if not run.summary.monotone:
        text = "The means of the bins do not rise throughout; the rule reads their running maximum."
        blocks.append(Note(text, "warning"))
    band = Band(bank["steps_left"], bank["mean"], bank["lowest"], bank["highest"])
    residual = np.geomspace(max(min(run.summary.familiar) / 4, 1e-6), max(bank["highest"].max(), 1e-5), 200)
    started = np.asarray(choose_start(jnp.asarray(residual), rule), float)
    rows = [
        (index, rule.steps_per_bin * (index + 1) - 1, mean, rule.scale * (mean / rule.scale) ** (1 / rule.tau))
        for index, mean in enumerate(rule.means)
    ]
    columns = ("bin", "start (steps left)", "mean residual", "residual of an estimate that passes it")
    blocks += [
        curves(
            {"residual": band}, xlabel="steps left", ylabel="residual |y - A(x)|",
            caption="Residual of the denoised image during full runs: mean, lowest and highest over the runs.",
        ),
        curves(
            {"start": (residual, started)}, xlabel="residual of an estimate", ylabel="start (steps left)",
            caption="Where an estimate enters the chain: the more it contradicts the measurement, the further back.",
        ),
        Table(columns, rows, "The bins of the bank."),
    ]  # fmt: skip
    return Section("Bank", blocks)


def _acquisition(calibrated: Calibrated, summary: Summary) -> Section:
    acquisition, fit = calibrated.acquisition, summary.fit
    said = "given" if fit is None else f"fitted to pairs in {fit.steps} steps, error {fit.rms:.3g}"
    rows = [
        ("gamma (power of contrast)", acquisition.gamma, said),
        ("blur (voxels)", str(acquisition.sigma), said),
        ("ratio of voxel sizes", str(acquisition.scale), "given"),
        ("noise (in [0, 2])", acquisition.noise, "given" if fit is None else "what the fit leaves over"),
    ]
    quantities = [("estimates", summary.familiar), ("truth", summary.truth)]
    residuals = [(name, *(float(v) for v in np.quantile(values, [0, 0.5, 1]))) for name, values in quantities]
    caption = f"Residuals |y - A(x)| of the reference images' estimates ({summary.estimates}) and of the truth."
    tables = [
        Table(("quantity", "value", "how"), rows, "From the reference images to low field."),
        Table(("of", "lowest", "median", "highest"), residuals, caption),
    ]
    return Section("Acquisition", tables)

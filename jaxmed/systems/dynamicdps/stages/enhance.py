"""DynamicDPS enhance: refine scans, slice by slice or in 3D, with uncertainty, residuals and tissue volumes."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import jax

from jaxmed.config import Number, Seed, Size, checked, to_record
from jaxmed.data.scans import find_scans
from jaxmed.data.windows import TilingConfig
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io import nifti
from jaxmed.models.published.load import Published
from jaxmed.physics.lowfield import LOWFIELD2026, LowField, make_operator
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, list_inputs, map_images
from jaxmed.recipes.posterior_samples import make_program
from jaxmed.recipes.refinement import MAPS, Plan, Refinement, process, refinement_sections, write_tables
from jaxmed.recipes.restoration import read_case
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.page import Note, Section, Text
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.calibration import Calibrated, measure, read_calibration
from jaxmed.systems.dynamicdps.methods import ARMS, ArmConfig, MethodConfig, expected_passes, make_solver
from jaxmed.systems.dynamicdps.networks import (
    SOURCE,
    announce_passes,
    apply_initial,
    load_initial,
    load_prior,
    make_prior,
    tiny_network,
)
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

TRIES_FAILED_AGAIN = True
Solver: TypeAlias = Literal[
    "dynamicdps", "dps", "dps-warm", "ddrm", "ddnm", "diffpir", "pigdm", "reddiff", "daps", "pnp-dpir", "ccdf"
]


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Refine scans.

    Attributes:
        input: A scan (NIfTI, or a grey picture), or a folder of scans.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        initial: What is refined: a run of train-initial; or the image of any other tool (such as SynthSR) for the scan;
            or a folder of such images, by the same file names. Without it, the scan itself.
        weights: The prior: a run of train-prior, or published weights.
        calibration: A run of calibrate for this prior: bank and acquisition.
        acquisition: From high field to low field, where there is no calibration.
        method: How estimates are refined.
        solver: DynamicDPS, or another method of compare's. Those but dps-warm and ccdf do not look at the estimate.
        budget: Evaluations and step of these others.
        samples: Posterior samples per image: with two or more there is a map of uncertainty.
        axis: Slices of a 2D prior; as trained by default.
        tiling: How images larger than the prior's are cut.
        mask: Brain mask, or a folder of masks by the same file names: nothing outside changes, and tissue is measured
            inside. Without it the head is found.
        labels: Label map of the scan, or a folder of them: its volumes stand beside the measured ones.
        tissue: Measure CSF, grey and white matter of input, estimate and result (T1-weighted scans).
        batch_size: Images at a time.
        synthetic: Refine so many phantom brains where no scans are given; make a tiny prior where none is given.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the samples.
    """

    input: Path | None = None
    series: str = ""
    initial: Path | None = None
    weights: Path | None = None
    calibration: Path | None = None
    acquisition: LowField = LOWFIELD2026
    method: MethodConfig = MethodConfig()
    solver: Solver = "dynamicdps"
    budget: ArmConfig = ArmConfig()
    samples: Size = 1
    axis: Literal["", "axial", "coronal", "sagittal"] = ""
    tiling: TilingConfig = TilingConfig()
    mask: Path | None = None
    labels: Path | None = None
    tissue: bool = True
    batch_size: Size = 8
    synthetic: Number = 0
    fill: float | None = None
    seed: Seed = 0


def paper() -> Config:
    """The authors' code of April 2026 (method.preset repo2026): its starts, data term and search; one sample."""
    return Config(method=MethodConfig("repo2026"), batch_size=4)


def laptop() -> Config:
    """Four samples, searches of at most six trials."""
    return Config(samples=4)


def smoke() -> Config:
    """Phantom brains, a tiny prior and its calibration made on the spot, in seconds."""
    return Config(samples=2, synthetic=2)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was refined, how many scans were not, and the steps of the whole chain, of which a start is a part."""

    scans: tuple[Refinement, ...]
    failed: int
    chain: int
    prior: str
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, refine every scan, write maps, tables and the report. Returns 1 when scans failed."""
    clock, asked = Clock(), config
    if config.synthetic and (config.input is None or config.weights is None):
        config = synthetic_inputs(config, folder)
    require_given(config.input, "input", "scans, or a folder of them")
    weights = require_given(config.weights, "weights", "the weights of a prior")
    prior = load_prior(weights)
    calibrated = None if config.calibration is None else read_calibration(config.calibration, prior.params)
    acquisition = config.acquisition if calibrated is None else calibrated.acquisition
    # Only DynamicDPS asks the bank where to start; any other solver walks its chain.
    is_dynamic = config.solver == "dynamicdps"
    asked_for = config.method if is_dynamic else dataclasses.replace(config.method, start="fixed", fixed_start=0)
    method = asked_for.build(calibrated)
    plan = make_plan(config, prior, method, acquisition)
    inputs, passed = list_scans(config)
    if len(inputs) == 1:
        read_case(inputs[0], plan.preprocess, config.fill)  # a mistake, not a failure among many
    notes = (*passed, *make_notes(config, prior, calibrated))
    log = begin(folder, notes)
    announce_passes(
        log, f"Refining {len(inputs):,} scans; for every batch", prior, config.batch_size, acquisition,
        expected_passes(config.solver, method, config.budget), "passes", folder.smaller,
    )  # fmt: skip
    clock.lap("read and check")

    def work(number: int, one: Inputs, tell: Tell) -> Refinement:
        return process(plan, one, jax.random.fold_in(jax.random.key(config.seed), number), folder.outputs, tell)

    scans, failed = map_images(
        inputs, work, Refinement, folder.outputs, log, "Refining",
        lambda row: {"residual": row.residual["enhanced"], "initial_residual": row.residual["initial"]},
    )  # fmt: skip
    clock.lap("refine, compilation included")
    write_tables(folder.outputs, scans)
    chain = config.method.steps or (calibrated.steps if calibrated else 0) or 1000
    finish(folder, asked, Summary(scans, failed, chain, str(config.weights), notes), clock, page)
    return 1 if failed else 0


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains as low-field scans where none are given; so with a tiny prior and its calibration."""
    if config.input is not None:
        list_scans(config)  # a mistake there costs no training
    log = begin(folder)
    if config.calibration is None:
        weights = config.weights or tiny_network(folder, "train-prior", {"train.seed": config.seed}, log)
        changes = {"weights": weights, "seed": config.seed}
        config = dataclasses.replace(
            config, weights=weights, calibration=tiny_network(folder, "calibrate", changes, log)
        )
    if config.weights is None or config.calibration is None:
        raise InputError("weights", "a prior beside the calibration", "nothing", "give both, or neither")
    if config.input is not None:
        return config
    acquisition, size = read_calibration(config.calibration).acquisition, load_prior(config.weights).preprocess.size
    place = folder.path / "inputs" / "scans"
    manifest = write_brain_cohort(folder.path / "inputs" / "truth", config.seed + 2, config.synthetic, size)
    for number, path in enumerate(find_scans(manifest.parent / "scans", ("nifti",)).paths):
        if not (place / path.name).exists():
            volume = nifti.read(path)
            image = volume.array.reshape(1, *size, 1)
            measured = measure(jax.random.key(config.seed + number), image, acquisition)
            nifti.write(place / path.name, Volume.make(measured.reshape(volume.array.shape), volume.affine))
    return dataclasses.replace(config, input=place)


def make_plan(config: Config, prior: Published, method: DynamicDps, acquisition: LowField) -> Plan:
    """Check the settings against the networks, and prepare the program.

    Raises:
        InputError: They do not belong together.
    """
    preprocess = prior.preprocess
    if config.axis:
        if not preprocess.is_sliced:
            raise InputError("axis", "none for a prior in 3D", config.axis, "leave --axis out")
        preprocess = dataclasses.replace(preprocess, axis=config.axis)
    estimate = None
    if config.initial is not None and is_run(config.initial):
        estimate = apply_initial(load_initial(config.initial, prior))
    try:
        operator = make_operator(preprocess.size, acquisition)
    except ValueError as error:
        raise InputError("acquisition", f"one for {len(preprocess.size)} axes", str(error)) from error
    solver = make_solver(config.solver, preprocess.size, acquisition, method, config.budget)
    constants = {
        "method": {"solver": config.solver} | to_record(method if config.solver == "dynamicdps" else config.budget),
        "acquisition": to_record(acquisition),
        "samples": config.samples,
        "prior": str(config.weights),
        "licence": prior.report.licence,
    }
    return Plan(
        prior.params, preprocess, make_program(partial(make_prior, prior), operator, solver, config.batch_size),
        estimate, config.tiling, config.samples, config.tissue, config.fill, constants,
    )  # fmt: skip


def is_run(place: Path) -> bool:
    """Tell a run of train-initial from images."""
    return any((folder / "record.json").exists() for folder in (place, place / "outputs" / "model"))


def list_scans(config: Config) -> tuple[list[Inputs], tuple[str, ...]]:
    """Find the scans, and what belongs to each by its name; return them, and notes on what was passed over.

    Raises:
        InputError: There are none, or one has no partner.
    """
    assert config.input is not None
    initial = None if config.initial is None or is_run(config.initial) else config.initial
    beside = {"initial": initial, "mask": config.mask, "labels": config.labels}
    return list_inputs(config.input, beside, tuple(MAPS), config.series)


def make_notes(config: Config, prior: Published, calibrated: Calibrated | None) -> list[str]:
    """Say what a user should know about this run."""
    report = prior.report
    method = config.method.describe() if config.solver == "dynamicdps" else ARMS[config.solver].description
    notes = [f"Method: {method}.", f"Weights: {report.licence}.", *report.remarks]
    if prior.preprocess.spacing:
        size = prior.preprocess.told_spacing
        notes.append(f"The prior's images have voxels of {size}: what a scan shows below that is lost in the result.")
    if config.initial is None:
        notes.append("No estimate is given: the scan itself is refined.")
    if calibrated is None:
        notes.append("No calibration is given: the acquisition is the one of the settings, not of this scanner.")
    if config.tissue and config.mask is None:
        notes.append(
            "Tissue is measured within the largest bright region; unless skulls are stripped, give a brain mask."
        )
    if config.samples == 1:
        notes.append("One sample: there is no uncertainty to show.")
    return notes


# The page -----------------------------------------------------------------------------------------------------------

READING = (
    "A lower residual says that the image explains the measurement better, not that it is true: what the scanner "
    "cannot see comes from the prior. The uncertainty map shows where samples disagree; what all samples invent alike "
    "it does not show.",
    "Intensities are in the unit of the scan by its own scale; contrast is that of the prior.",
    SOURCE,
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show scans and maps, residuals, line searches and tissue volumes."""
    summary, scans = run.summary, run.summary.scans
    tiles, shown = refinement_sections(run.outputs, scans, summary.chain)
    sections = [Section("Notes", [Note(text) for text in summary.notes]), *shown]
    if summary.failed:
        text = f"{summary.failed} scans failed: see outputs/failed.csv for the reasons."
        sections.insert(0, Section("Failed scans", [Note(text, "warning")]))
    sections.append(Section("How to read this", [Text(READING)]))
    first = ("Scans", len(scans), f"{summary.failed} failed")
    return Page("Enhanced scans", f"DynamicDPS on {len(scans)} scans", [first, *tiles], sections)

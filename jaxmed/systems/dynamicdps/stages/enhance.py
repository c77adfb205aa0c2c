"""DynamicDPS enhance: refine scans, slice by slice or in 3D, with uncertainty, residuals and tissue volumes."""

import dataclasses
import os
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Number, Seed, Size, checked, to_record
from jaxmed.data.scans import find_scans
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps
from jaxmed.errors import InputError
from jaxmed.files import unique_names
from jaxmed.io import nifti
from jaxmed.io.scans import NAME_ENDINGS
from jaxmed.io.tables import write_table
from jaxmed.metrics.tissue import TISSUES
from jaxmed.physics.lowfield import LOWFIELD2026, LowField, make_operator
from jaxmed.recipes.map_files import TABLES, Tell, map_files, write_failed
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.arms import ARMS, STARTS_FROM_ESTIMATE, ArmConfig, expected_passes, make_solver
from jaxmed.systems.dynamicdps.calibration import digest_of
from jaxmed.systems.dynamicdps.enhance_page import write_page
from jaxmed.systems.dynamicdps.enhancement import make_program
from jaxmed.systems.dynamicdps.networks import Network, load_initial, load_prior, make_prior, trace_pass
from jaxmed.systems.dynamicdps.options import Calibrated, MethodConfig, read_calibration
from jaxmed.systems.dynamicdps.reading import KINDS, TOP
from jaxmed.systems.dynamicdps.scans import MAPS, Inputs, Plan, load, process
from jaxmed.systems.dynamicdps.stages import calibrate
from jaxmed.systems.dynamicdps.stages.calibrate import pair_files
from jaxmed.systems.dynamicdps.volumes import TilingConfig
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary
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
        embedded: Refine so many phantom brains where no scans are given; make a tiny prior where none is given.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of the samples.
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
    embedded: Number = 0
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1 or self.embedded < 0:
            found = self.samples, self.batch_size, self.embedded
            raise ValueError(f"samples, batch_size, embedded: expected 1, 1 and 0 or more, found {found}")


def paper() -> Config:
    """The authors' code of April 2026 (method.preset repo2026): its starts, data term and search; one sample."""
    return Config(method=MethodConfig("repo2026"), batch_size=4)


def laptop() -> Config:
    """Four samples, searches of at most six trials."""
    return Config(samples=4)


def smoke() -> Config:
    """Embedded phantom brains, a tiny prior and its calibration made on the spot, in seconds."""
    return Config(samples=2, embedded=2)


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, refine every scan, write maps, tables and the report. Returns 1 when scans failed."""
    began = time.monotonic()
    if config.embedded and (config.input is None or config.weights is None):
        config = make_embedded(config, folder)
    if config.input is None or config.weights is None:
        missing = "input" if config.input is None else "weights"
        raise InputError(missing, "scans and a prior", "nothing", f"give --{missing}, or try --preset smoke")
    network = load_prior(config.weights)
    calibrated = None if config.calibration is None else read_calibration(config.calibration)
    plan = make_plan(config, network, calibrated)
    inputs, passed = list_inputs(config)
    if len(inputs) == 1:
        load(inputs[0], plan.frame, plan.fill)  # a single broken file is a mistake, not a failure among many
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    for note in (notes := [*passed, *make_notes(config, plan, calibrated)]):
        log.say(f"Note: {note}")
    operator = make_operator(plan.frame.size, plan.acquisition)
    program, images = trace_pass(network, config.batch_size, operator)
    announce(
        log, f"Refining {len(inputs):,} scans; for every batch", params=network.params, batch=images, program=program,
        count=expected_passes(config.solver, plan.method, config.budget), unit="passes", smaller=folder.smaller,
    )  # fmt: skip
    ready = time.monotonic()

    def work(number: int, one: Inputs, tell: Tell) -> dict[str, Any]:
        return process(plan, one, jax.random.fold_in(jax.random.key(config.seed), number), folder.outputs, tell)

    rows, failed, _ = map_files(
        inputs, work, folder.outputs, log, "Refining", "scans",
        lambda row: {"residual": row["residual"]["enhanced"], "initial_residual": row["residual"]["initial"]},
    )  # fmt: skip
    computed = time.monotonic()
    for row in rows:
        for note in row.get("notes", ()):
            log.say(f"Note: {row['name']}: {note}")
    write_tables(folder.outputs, rows)
    write_failed(folder.outputs, failed)
    summary: dict[str, Any] = {
        "scans": rows,
        "failed": len(failed),
        "chain": plan_steps(config, calibrated),
        "prior": str(config.weights),
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed dynamicdps enhance --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "refine, compilation included": computed - ready},
    }
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def make_embedded(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains as low-field scans where none are given; so with a tiny prior and its calibration."""
    if config.input is not None:
        list_inputs(config)  # a mistake there costs no training
    start(folder)
    place = folder.path / "inputs"
    if config.calibration is None:
        weights = config.weights or calibrate.train_tiny_prior(folder, config.seed)
        settings = dataclasses.replace(calibrate.smoke(), weights=weights, seed=config.seed)
        nested = open_run("dynamicdps", "calibrate", settings, RunOptions(place / "calibration", quiet=True))
        if nested.status != "complete":
            Log(folder.path, folder.options.quiet).say("Calibrating it on embedded brains.")
            calibrate.run(settings, nested)
        config = dataclasses.replace(config, weights=weights, calibration=nested.path)
    if config.weights is None or config.calibration is None:
        raise InputError("weights", "a prior beside the calibration", "nothing", "give both, or neither")
    if config.input is not None:
        return config
    acquisition = read_calibration(config.calibration).acquisition
    size = load_prior(config.weights).frame.size
    manifest = write_brain_cohort(place / "truth", config.seed + 2, config.embedded, size)
    make_lowfield(manifest.parent / "scans", place / "scans", acquisition, config.seed, size)
    return dataclasses.replace(config, input=place / "scans")


def make_lowfield(truth: Path, place: Path, acquisition: LowField, seed: int, size: tuple[int, ...]) -> None:
    """Write the low-field measurement of every phantom, once."""
    for number, path in enumerate(find_scans(truth, ("nifti",)).paths):
        if not (place / path.name).exists():
            volume = nifti.read(path)
            image = volume.array.reshape(1, *size, 1)
            measured = calibrate.measure(jax.random.key(seed + number), image, acquisition)
            nifti.write(place / path.name, Volume.make(measured.reshape(volume.array.shape), volume.affine))


def make_plan(config: Config, network: Network, calibrated: Calibrated | None) -> Plan:
    """Check the settings against the networks, and prepare the program.

    Raises:
        InputError: They do not belong together.
    """
    frame = network.frame
    if config.axis:
        if not frame.is_sliced:
            raise InputError("axis", "none for a prior in 3D", config.axis, "leave --axis out")
        frame = dataclasses.replace(frame, axis=config.axis)
    if calibrated is not None and calibrated.prior != digest_of(network.params):
        raise InputError("calibration", "one of this prior", "one of another", "calibrate again")
    acquisition = config.acquisition if calibrated is None else calibrated.acquisition
    is_dynamic = config.solver == "dynamicdps"
    # Only DynamicDPS asks the bank where to start.
    asked = config.method if is_dynamic else dataclasses.replace(config.method, start="fixed", fixed_start=0)
    method = asked.build(calibrated)
    initial = None
    if config.initial is not None and is_run(config.initial):
        initial = load_initial(config.initial)
        if initial.frame.size != frame.size or initial.frame.spacing != frame.spacing:
            found = f"{initial.frame.size} at {initial.frame.spacing:g} mm"
            expected = f"a network of the prior's frame, {frame.size} at {frame.spacing:g} mm"
            raise InputError(config.initial, expected, found, "train it on the prior's frame")
    try:
        operator = make_operator(frame.size, acquisition)
    except ValueError as error:
        raise InputError("acquisition", f"one for {len(frame.size)} axes", str(error)) from error
    solver = None if is_dynamic else _other_solver(config, frame.size, acquisition, method)
    program = make_program(partial(make_prior, network), operator, method, config.batch_size, solver)
    settings = {"solver": config.solver} | to_record(method if is_dynamic else config.budget)
    return Plan(
        network, program, initial, frame, config.tiling, method, settings, acquisition, config.samples, config.tissue,
        config.fill,
    )  # fmt: skip


def _other_solver(config: Config, size: tuple[int, ...], acquisition: LowField, method: DynamicDps) -> Any:
    """Return a method of compare's; its images are held in [0, 2], as those of DynamicDPS are."""
    solve = make_solver(config.solver, size, acquisition, method, config.budget)

    def solver(key: KeyArray, denoiser: Denoiser, measurement: Array, initial: Array, indices: Array) -> Any:
        begin = initial if config.solver in STARTS_FROM_ESTIMATE else jnp.zeros_like(initial)
        image, info = solve(key, denoiser, measurement, begin, indices)
        return jnp.clip(image, 0.0, TOP), info

    return solver


def is_run(place: Path) -> bool:
    """Tell a run of train-initial from images."""
    return any((folder / "record.json").exists() for folder in (place, place / "outputs" / "model"))


def list_inputs(config: Config) -> tuple[list[Inputs], tuple[str, ...]]:
    """Find the scans, and what belongs to each by its name; return them, and notes on what was passed over.

    Raises:
        InputError: There are none, or one has no partner.
    """
    assert config.input is not None
    apart = [place for place in (config.initial, config.mask, config.labels) if place is None or not is_run(place)]
    scans, passed = find_scans(config.input, KINDS, config.series, apart=apart)
    paths = tuple(scan.path for scan in scans)

    def partners(place: Path | None) -> list[Path | None]:
        if place is None or is_run(place):
            return [None] * len(paths)
        if not place.exists():
            raise InputError(place, "a file or folder", "nothing", "check the path")
        assert config.input is not None
        return [*pair_files(paths, config.input, place)]

    places = [partners(place) for place in (config.initial, config.mask, config.labels)]
    root = config.input if config.input.is_dir() and paths != (config.input,) else config.input.parent
    names = unique_names([os.path.relpath(path, root) for path in paths], NAME_ENDINGS, tuple(MAPS), TABLES)
    return [Inputs(name, scan, *others) for name, scan, *others in zip(names, scans, *places, strict=True)], passed


def make_notes(config: Config, plan: Plan, calibrated: Calibrated | None) -> list[str]:
    """Say what a user should know about this run."""
    method = config.method.describe() if config.solver == "dynamicdps" else ARMS[config.solver]
    notes = [f"Method: {method}.", f"Weights: {plan.network.licence}.", *plan.network.remarks]
    if plan.frame.spacing:
        size = f"{plan.frame.spacing:g} mm"
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


def plan_steps(config: Config, calibrated: Calibrated | None) -> int:
    """Return the steps of the whole chain, which the start is a part of."""
    return config.method.steps or (calibrated.steps if calibrated else 0) or 1000


def write_tables(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write scans.csv, and volumes.csv where tissue was measured."""
    columns = ("id", "images", "initial_residual", "residual", "improved", "start", "evaluations")
    table = [
        {
            "id": row["name"],
            "images": row["images"],
            "initial_residual": f"{row['residual']['initial']:.6g}",
            "residual": f"{row['residual']['enhanced']:.6g}",
            "improved": f"{row['improved']:.6g}",
            "start": row["start"]["median"],
            "evaluations": f"{row['evaluations']:.6g}",
        }
        for row in rows
    ]
    write_table(folder / "scans.csv", columns, table)
    volumes = [
        {"id": row["name"], "image": image, **{f"{name}_ml": f"{values[name]:.6g}" for name in TISSUES}}
        for row in rows
        for image, values in row.get("volumes_ml", {}).items()
    ]
    if volumes:
        write_table(folder / "volumes.csv", ("id", "image", *(f"{name}_ml" for name in TISSUES)), volumes)

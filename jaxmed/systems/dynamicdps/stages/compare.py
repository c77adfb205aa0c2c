"""DynamicDPS compare: conditional models alone, and every solver, on the same scans, conditions and prior."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jaxmed.arrays.batches import apply_in_batches
from jaxmed.config import NonNegative, Number, Seed, Size, Whole, checked
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.data.subject_images import SubjectImages, list_subjects, read_subjects
from jaxmed.errors import InputError
from jaxmed.metrics.restoration import MEASURES, ScoreConfig, make_split, score_images
from jaxmed.models.published.load import Published
from jaxmed.physics.lowfield import LowField, contrast, linear_part, make_operator
from jaxmed.recipes.image_network import STYLE
from jaxmed.recipes.posterior_samples import Program, draw_samples, make_program
from jaxmed.recipes.restoration_study import AXES, NOISE, Scorer, method_sections, score_subjects, tabulate
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, read_study, run_study
from jaxmed.recipes.study_sections import failed_cells, keep_examples
from jaxmed.recipes.study_tables import write_tables
from jaxmed.report.page import Note, Section, Text
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.calibration import measure, read_calibration
from jaxmed.systems.dynamicdps.methods import ARMS, ArmConfig, MethodConfig, expected_passes, make_solver
from jaxmed.systems.dynamicdps.networks import (
    announce_passes,
    apply_initial,
    load_initial,
    load_prior,
    make_prior,
    tiny_network,
)
from jaxmed.train.run_folder import RunFolder

BASELINE = ("conditional", "the conditional model alone")
IN_DISTRIBUTION, OTHER_CONTRAST = "in-distribution", "other contrast"
TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """A comparison of methods that see the same prior, the same measurements and the same estimates.

    Attributes:
        manifest: CSV of high-field test scans with the column path; optionally subject, labels (a label map in
            FreeSurfer's numbering: the brain, and 77 a lesion) and split (then only test is used).
        input: A scan, or a folder of scans, instead of a table.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: The prior: a run of train-prior, or published weights.
        initial: Conditional models: runs of train-initial, two or more to see whether it matters which.
        calibration: A run of calibrate for this prior, whose bank chooses DynamicDPS's starts.
        acquisition: From high field to low field, as the conditional models know it.
        other_gamma: Contrast that they do not know: the second condition. 0 leaves it out.
        arms: The methods.
        budget: Evaluations and step of the methods that have no rule of their own.
        method: DynamicDPS.
        slices: Images per subject, evenly over those that show a tenth of head or more.
        subjects: At most so many; 0 for all.
        score: What counts as hallucination.
        batch_size: Images at a time.
        synthetic: Compare on so many phantom brains where no scans are given, and with networks trained on the spot
            where none are given.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the noise and of the samples.
    """

    manifest: Path | None = None
    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    initial: tuple[Path, ...] = ()
    calibration: Path | None = None
    acquisition: LowField = LowField(gamma=1.0)
    other_gamma: NonNegative = 0.4
    arms: tuple[str, ...] = tuple(ARMS)
    budget: ArmConfig = ArmConfig()
    method: MethodConfig = MethodConfig()
    slices: Size = 10
    subjects: Whole = 0
    score: ScoreConfig = ScoreConfig()
    batch_size: Size = 8
    synthetic: Number = 0
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: expected some of {', '.join(ARMS)}, each once, found {self.arms}")


def paper() -> Config:
    """20 subjects of 10 slices, DPS of 1000 steps, DynamicDPS as in the authors' code of April 2026, two contrasts."""
    return Config(method=MethodConfig("repo2026"), subjects=20)


def laptop() -> Config:
    """Eight subjects, and for every method the evaluations that DynamicDPS takes on average."""
    acquisition = LowField(gamma=1.0, scale=2.0, sigma=0.7, radius=3, noise=0.01)
    return Config(acquisition=acquisition, subjects=8, slices=4, budget=ArmConfig(evaluations=100))


def smoke() -> Config:
    """Four methods on a chain of 100 steps, in seconds: your scans and networks, or phantoms and tiny networks."""
    return Config(
        acquisition=LowField(gamma=1.0, scale=2.0, sigma=0.7, radius=3, noise=0.01),
        arms=("conditional", "dps", "ddnm", "dynamicdps"),
        method=MethodConfig(plain=True),
        slices=1,
        synthetic=6,
    )


class Condition(NamedTuple):
    """A contrast: its acquisition, and the measurements of all subjects' images."""

    acquisition: LowField
    measurement: Float32[np.ndarray, "image ..."]


class Study(NamedTuple):
    """All that cells share; estimates are those of (conditional model, condition), (image, *size, 1)."""

    prior: Published
    initials: dict[str, Published]
    conditions: dict[str, Condition]
    subjects: list[SubjectImages]
    estimates: dict[tuple[str, str], Float32[np.ndarray, "image ..."]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was compared: how much of it, the conditional models, and each condition's power of contrast."""

    subjects: int
    images: int
    initials: tuple[str, ...]
    conditions: dict[str, float]
    cells: int
    failed: int
    prior: str


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed."""
    clock, asked = Clock(), config
    has_scans = config.manifest is not None or config.input is not None
    if config.synthetic and (not has_scans or config.weights is None or not config.initial):
        config = synthetic_inputs(config, folder)
    study = prepare(config)
    place = config.calibration
    method = config.method.build(None if place is None else read_calibration(place, study.prior.params))
    images = sum(len(subject.images) for subject in study.subjects)
    networks = (study.prior, *study.initials.values())
    log = begin(folder, dict.fromkeys(remark for network in networks for remark in network.report.remarks))
    log.say(f"{images} images of {len(study.subjects)} subjects, {len(study.initials)} conditional models.")
    cells = plan_cells(config.arms, tuple(study.initials), tuple(study.conditions))
    size = study.prior.preprocess.size
    scorers = {name: make_scorer(size, one.acquisition, config.score) for name, one in study.conditions.items()}
    passes = sum(expected_passes(str(cell["arm"]), method, config.budget) for cell in cells)
    announce_passes(
        log, f"Comparing in {len(cells)} cells of {images} images", study.prior, config.batch_size, config.acquisition,
        passes * -(-images // config.batch_size), "passes of the prior", folder.smaller,
    )  # fmt: skip
    programs: dict[tuple[str, str], Program] = {}
    clock.lap("read and estimate")

    def run_cell(cell: Cell) -> Outcome:
        arm, name = str(cell["arm"]), str(cell["condition"])
        if (arm, name) not in programs:
            acquisition = study.conditions[name].acquisition
            solver = make_solver(arm, size, acquisition, method, config.budget)
            programs[arm, name] = make_program(
                partial(make_prior, study.prior), make_operator(size, acquisition), solver, config.batch_size
            )
        return _run_cell(cell, study, programs[arm, name], scorers[name], config.seed, folder)

    done = run_study(cells, run_cell, folder.path, asked, log=log)
    clock.lap("run the cells, compilation included")
    write_tables(folder.outputs, done.results, *tabulate(done.results, BASELINE[0], config.seed))
    keep_examples(folder.outputs, "truth", np.concatenate([subject.images for subject in study.subjects]))
    for name, condition in study.conditions.items():
        keep_examples(folder.outputs, f"measurement, {name}", condition.measurement[..., 0])
    conditions = {name: condition.acquisition.gamma for name, condition in study.conditions.items()}
    summary = Summary(
        len(study.subjects), images, tuple(study.initials), conditions, len(cells), len(done.failures),
        str(config.weights),
    )  # fmt: skip
    finish(folder, asked, summary, clock, page)
    return done.exit_code


def plan_cells(arms: Sequence[str], initials: Sequence[str], conditions: Sequence[str]) -> tuple[Cell, ...]:
    """Return one cell per condition, conditional model and method; methods that begin in noise once per condition.

    Raises:
        InputError: A list is empty or names something twice, or an arm is unknown.
    """
    for name, names in (("arms", arms), ("initial", initials), ("conditions", conditions)):
        if not names or len(set(names)) < len(names):
            raise InputError(name, "one or more, each once", ", ".join(names) or "none")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise InputError("arms", f"some of {', '.join(ARMS)}", f"'{unknown[0]}'")
    return tuple(
        Cell(tuple(zip(AXES, (condition, initial, arm), strict=True)))
        for condition in conditions
        for arm in arms
        for initial in (initials if ARMS[arm].starts_from_estimate else (NOISE,))
    )


def _run_cell(cell: Cell, study: Study, program: Program, scorer: Scorer, seed: int, folder: RunFolder) -> Outcome:
    name, initial = str(cell["condition"]), str(cell["initial"])
    measurement = study.conditions[name].measurement
    estimate = np.zeros_like(measurement) if initial == NOISE else study.estimates[initial, name]
    found = draw_samples(program, study.prior.params, jax.random.key(seed), measurement, estimate)
    image = found.mean
    if not np.isfinite(image).all():
        raise InputError(str(cell), "finite images", "NaN or Inf", "give a smaller --budget.scale")
    steps = np.minimum(found.start_time[:, 0] + 1, len(found.curve))
    further = {"residual": found.residual, "evaluations": found.evaluations[:, 0], "steps": steps}
    rows = score_subjects(scorer, study.subjects, image[..., 0], further)
    keep_examples(folder.outputs, cell.slug, image[..., 0])
    means = {name: float(np.mean([row[name] for row in rows])) for name in (*MEASURES, "evaluations")}
    return Outcome(means | {"seconds": found.seconds, "steps": float(steps.mean())}, rows)


def make_scorer(size: tuple[int, ...], acquisition: LowField, config: ScoreConfig = ScoreConfig()) -> Scorer:
    """Prepare the scores for a condition: what its linear part passes less than a hundredth of is unseen."""
    linear = linear_part(size, acquisition)
    assert linear.pseudo_inverse is not None
    before = partial(contrast, gamma=acquisition.gamma, floor=acquisition.floor)
    split = make_split(linear.apply, linear.pseudo_inverse, before)
    return partial(score_images, split=split, data_range=MAX_INTENSITY, config=config)


# Reading ------------------------------------------------------------------------------------------------------------


def prepare(config: Config) -> Study:
    """Load the networks, read the scans, simulate the measurements and estimate from them.

    Raises:
        InputError: Something is missing, cannot be read, or does not fit.
    """
    if config.weights is None or not config.initial:
        missing = "weights" if config.weights is None else "initial"
        raise InputError(missing, "a prior, and conditional models", "none", "train them, or try --preset smoke")
    prior = load_prior(config.weights)
    names = [path.name or str(path) for path in config.initial]
    names = [name if names.count(name) == 1 else f"{name} {index + 1}" for index, name in enumerate(names)]
    initials = {n: load_initial(p, prior, f"initial {n}") for n, p in zip(names, config.initial, strict=True)}
    scans = list_subjects(config.manifest, config.input, config.series, config.fill)
    subjects = read_subjects(scans, prior.preprocess, config.slices, config.subjects)
    truth = np.concatenate([subject.images for subject in subjects])[..., None]
    gammas = {IN_DISTRIBUTION: config.acquisition.gamma}
    if config.other_gamma and config.other_gamma != config.acquisition.gamma:
        gammas[OTHER_CONTRAST] = config.other_gamma
    conditions = {}
    for number, (name, gamma) in enumerate(gammas.items()):
        acquisition = dataclasses.replace(config.acquisition, gamma=gamma)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        conditions[name] = Condition(acquisition, measure(key, truth, acquisition))
    estimates = {}
    for name, network in initials.items():
        apply = apply_initial(network)
        for where, condition in conditions.items():
            estimates[name, where] = apply_in_batches(apply, config.batch_size, condition.measurement)
    return Study(prior, initials, conditions, subjects, estimates)


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains, and train a tiny prior, its calibration and a conditional model, where none is given."""
    has_scans = config.manifest is not None or config.input is not None
    if has_scans:
        list_subjects(config.manifest, config.input, config.series)  # a mistake there costs no training
    log = begin(folder)
    weights = config.weights or tiny_network(folder, "train-prior", {"train.seed": config.seed}, log)
    calibration = config.calibration
    if calibration is None and config.method.start == "bank":
        changes = {"weights": weights, "acquisition": config.acquisition, "seed": config.seed}
        calibration = tiny_network(folder, "calibrate", changes, log)
    changes = {"acquisition": config.acquisition, "gamma": (1.0, 1.0)}
    initial = config.initial or (tiny_network(folder, "train-initial", changes, log),)
    config = dataclasses.replace(config, weights=weights, initial=initial, calibration=calibration)
    if has_scans:
        return config
    # Another seed than those of the networks' own phantoms.
    cohort = write_brain_cohort(
        folder.path / "inputs" / "truth", config.seed + 4, config.synthetic, load_prior(weights).preprocess.size,
        BrainConfig(lesion_probability=0.0), fractions=(0.0, 0.0, 1.0),
    )  # fmt: skip
    return dataclasses.replace(config, manifest=cohort)


# The page -----------------------------------------------------------------------------------------------------------

READING = (
    "All methods see the same prior and the same measurements; those that start from an estimate get it from the "
    "conditional model that is named. Scores have a fixed range of intensities, 2. Volumes are measured by one "
    "estimator on truth and estimate.",
    "The published measure of hallucination is not known. Three stand in: the share of the error that the measurement "
    "contradicts and the share that it cannot see; false lesions; and a perceptual score that looks at the worst "
    "places.",
    "DDRM, DDNM and CCDF are made for linear operators: they see the measurement with its contrast undone, which is "
    "exact for gamma 1 only. Their steps, and DPS's, are not tuned to this data.",
    "Source: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis.",
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show images of every method, their means, and what each changes against the conditional model."""
    summary, study = run.summary, read_study(run.path)
    tiles: list[tuple[str, object, str]] = [("Cells", summary.cells, f"{summary.failed} failed")]
    for arm in ("conditional", "dynamicdps"):
        first = next(iter(summary.conditions))
        found = [r.metrics["psnr"] for r in study.results if (r.cell["arm"], r.cell["condition"]) == (arm, first)]
        if found:
            tiles.append(("PSNR", round(float(np.mean(found)), 2), f"dB, {arm}, {first}"))
    conditions = "; ".join(f"{name}: gamma {gamma:g}" for name, gamma in summary.conditions.items())
    note = Note(f"Conditions: {conditions}. The conditional models were trained for the first.")
    budget = run.config.budget.evaluations
    told = f"{budget} evaluations" if budget else "the number of evaluations of their authors"
    sections = method_sections(
        run.outputs, study.results, BASELINE, run.config.seed, STYLE, f"Fixed methods had {told}."
    )
    return Page(
        "Comparison of methods that enhance low-field scans",
        f"{summary.images} images of {_count(summary.subjects, 'subject')}, one prior, "
        f"{_count(len(summary.initials), 'conditional model')}",
        tiles,
        [*sections, *failed_cells(study.failures), Section("How to read this", [note, Text(READING)])],
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

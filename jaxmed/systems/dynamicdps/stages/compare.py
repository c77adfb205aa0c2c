"""DynamicDPS compare: conditional models alone, and every solver, on the same scans, conditions and prior."""

import dataclasses
import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxmed.arrays.types import Params
from jaxmed.config import NonNegative, Number, Seed, Size, checked
from jaxmed.data.cohort import stated_splits, subjects_of
from jaxmed.data.scans import find_scans
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, make_folder, unique_names
from jaxmed.io.scans import NAME_ENDINGS, ScanFiles
from jaxmed.io.tables import read_table, resolve_paths, write_table
from jaxmed.physics.lowfield import LowField, make_operator
from jaxmed.recipes.study import Cell, Result, run_study
from jaxmed.recipes.study import Outcome as CellOutcome
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps import scoring
from jaxmed.systems.dynamicdps.arms import ARMS, ArmConfig, expected_passes, make_arm
from jaxmed.systems.dynamicdps.calibration import digest_of, measure
from jaxmed.systems.dynamicdps.compare_page import write_page
from jaxmed.systems.dynamicdps.comparison import NOISE, Difference, Mean, average, compare, plan_cells
from jaxmed.systems.dynamicdps.networks import Network, load_initial, load_prior, make_prior, trace_pass
from jaxmed.systems.dynamicdps.options import MethodConfig, read_calibration
from jaxmed.systems.dynamicdps.reading import (
    KINDS,
    FrameConfig,
    cut_images,
    head_of,
    read_labels,
    read_scan,
    simplify_labels,
)
from jaxmed.systems.dynamicdps.scoring import (
    ScoreConfig,
    Scorer,
    Subject,
    examples,
    make_scorer,
    make_subject,
    score_subject,
)
from jaxmed.systems.dynamicdps.stages import calibrate, train_initial
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary

IN_DISTRIBUTION, OTHER_CONTRAST = "in-distribution", "other contrast"
TRIES_FAILED_AGAIN = True
LEAST_HEAD = 0.1
"""Share of head that an image needs."""
Program: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, float]]
"""Measurements and estimates -> images, evaluations and steps of each, and seconds per image."""


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
        embedded: Compare on so many phantom brains where no scans are given, and with networks trained on the spot
            where none are given.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of noise and samples.
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
    subjects: int = 0
    score: ScoreConfig = ScoreConfig()
    batch_size: Size = 8
    embedded: Number = 0
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: expected some of {', '.join(ARMS)}, each once, found {self.arms}")
        if self.slices < 1 or self.subjects < 0 or self.batch_size < 1 or self.embedded < 0:
            found = self.slices, self.subjects, self.batch_size, self.embedded
            raise ValueError(f"slices, subjects, batch_size, embedded: expected 1, 0, 1 and 0 or more, found {found}")
        if self.other_gamma < 0:
            raise ValueError(f"other_gamma: expected a positive power, or 0, found {self.other_gamma:g}")

    @property
    def has_scans(self) -> bool:
        """Whether scans to compare on are given: they take the place of phantoms, whatever the preset."""
        return self.manifest is not None or self.input is not None


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
        embedded=6,
    )


class Condition(NamedTuple):
    """A contrast: its acquisition, and the measurements of all subjects' images."""

    acquisition: LowField
    measurement: Float32[np.ndarray, "image ..."]


class Study(NamedTuple):
    """All that cells share.

    Attributes:
        prior: Its network.
        initials: Conditional models by name.
        conditions: By name.
        subjects: Truth.
        estimates: (conditional model, condition) -> images, (image, *size, 1).
    """

    prior: Network
    initials: dict[str, Network]
    conditions: dict[str, Condition]
    subjects: list[Subject]
    estimates: dict[tuple[str, str], Float32[np.ndarray, "image ..."]]


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed."""
    began = time.monotonic()
    asked = config
    if config.embedded and (not config.has_scans or config.weights is None or not config.initial):
        config = make_embedded(config, folder)
    study = read_study(config)
    method = config.method.build(_read_bank(config, study.prior))
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    images = sum(len(subject.images) for subject in study.subjects)
    for remark in dict.fromkeys(note for n in (study.prior, *study.initials.values()) for note in n.remarks):
        log.say(f"Note: {remark}")
    log.say(f"{images} images of {len(study.subjects)} subjects, {len(study.initials)} conditional models.")
    cells = plan_cells(config.arms, tuple(study.initials), tuple(study.conditions))
    scorers = {
        name: make_scorer(study.prior.frame.size, condition.acquisition, config.score)
        for name, condition in study.conditions.items()
    }
    passes = sum(expected_passes(str(cell["arm"]), method, config.budget) for cell in cells)
    operator = make_operator(study.prior.frame.size, config.acquisition)
    program, batch = trace_pass(study.prior, config.batch_size, operator)
    announce(
        log, f"Comparing in {len(cells)} cells of {images} images", params=study.prior.params, batch=batch,
        program=program, count=passes * -(-images // config.batch_size), unit="passes of the prior",
        smaller=folder.smaller,
    )  # fmt: skip
    programs: dict[tuple[str, str], Program] = {}
    ready = time.monotonic()

    def run_cell(cell: Cell) -> CellOutcome:
        arm, name = str(cell["arm"]), str(cell["condition"])
        if (arm, name) not in programs:
            acquisition = study.conditions[name].acquisition
            raw = make_arm(arm, partial(make_prior, study.prior), study.prior.frame.size, acquisition, method,
                           config.budget)  # fmt: skip
            programs[arm, name] = make_program(raw, study.prior.params, config.batch_size, config.seed)
        return _run_cell(cell, study, programs[arm, name], scorers[name], folder)

    done = run_study(cells, run_cell, folder.path, asked, log=log)
    finished = time.monotonic()
    means, differences = average(done.results, config.seed), compare(done.results, config.seed)
    write_results(folder.outputs, means, differences, done.results)
    summary = {
        "subjects": len(study.subjects), "images": images, "initials": list(study.initials),
        "conditions": {name: condition.acquisition.gamma for name, condition in study.conditions.items()},
        "arms": list(config.arms), "cells": len(cells), "failed": len(done.failures),
        "budget": config.budget.evaluations, "prior": str(config.weights),
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed dynamicdps compare --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and estimate": ready - began, "run the cells, compilation included": finished - ready},
    }  # fmt: skip
    write_summary(folder, summary)
    keep_examples(folder.outputs, study)
    write_page(folder.path)
    return done.exit_code


report = write_page


def make_program(arm: Callable[..., Any], params: Any, batch_size: int, seed: int) -> Program:
    """Return a method that is compiled once, and whose calls are timed without compilation.

    Args:
        arm: Of `arms.make_arm`.
        params: Of the prior.
        batch_size: Images at a time.
        seed: Of the samples.
    """
    jitted, key, compiled = jax.jit(arm), jax.random.key(seed), []

    def run(measurement: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        total, parts, seconds = len(measurement), [], 0.0
        for first in range(0, total, batch_size):
            # The last batch repeats its last image: one shape is one compilation.
            places = np.minimum(np.arange(first, first + batch_size), total - 1)
            inputs = params, key, *(jnp.asarray(part) for part in (measurement[places], estimate[places], places))
            if not compiled:
                compiled.append(jitted.lower(*inputs).compile())
            began = time.monotonic()
            found = jax.block_until_ready(compiled[0](*inputs))
            seconds += time.monotonic() - began
            parts.append([np.asarray(part)[: total - first] for part in found])
        image, evaluations, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
        return image, evaluations, steps, seconds / total

    return run


def _run_cell(cell: Cell, study: Study, program: Program, scorer: Scorer, folder: RunFolder) -> CellOutcome:
    name, initial = str(cell["condition"]), str(cell["initial"])
    measurement = study.conditions[name].measurement
    estimate = np.zeros_like(measurement) if initial == NOISE else study.estimates[initial, name]
    image, evaluations, steps, seconds = program(measurement, estimate)
    if not np.isfinite(image).all():
        raise InputError(str(cell), "finite images", "NaN or Inf", "give a smaller --budget.scale")
    rows, first = [], 0
    for subject in study.subjects:
        own = slice(first, first + len(subject.images))
        scores = score_subject(scorer, subject, measurement[own], image[own, ..., 0], evaluations[own])
        rows.append({"subject": subject.name, **scores, "steps": float(steps[own].mean())})
        first = own.stop
    with atomic_path(make_folder(folder.outputs / "examples") / f"{cell.slug}.npy") as temporary:
        np.save(temporary, examples(image[..., 0]))
    measures = (*scoring.MEASURES, "evaluations")
    means = {measure: float(np.mean([row[measure] for row in rows])) for measure in measures}
    return CellOutcome(means | {"seconds": seconds, "steps": float(steps.mean())}, rows)


def read_study(config: Config) -> Study:
    """Load the networks, read the scans, simulate the measurements and estimate from them.

    Raises:
        InputError: Something is missing, cannot be read, or does not fit.
    """
    if config.weights is None or not config.initial:
        missing = "weights" if config.weights is None else "initial"
        raise InputError(missing, "a prior, and conditional models", "none", "train them, or try --preset smoke")
    prior = load_prior(config.weights)
    initials = dict(zip(_names(config.initial), map(load_initial, config.initial), strict=True))
    for name, network in initials.items():
        if network.frame.size != prior.frame.size or network.frame.spacing != prior.frame.spacing:
            expected = f"a network of the prior's frame, {prior.frame.size} at {prior.frame.spacing:g} mm"
            found = f"{network.frame.size} at {network.frame.spacing:g} mm"
            raise InputError(f"initial {name}", expected, found, "train it on the prior's frame")
    subjects = read_subjects(config, prior.frame)
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
        apply = jax.jit(network.model.apply)
        for where, condition in conditions.items():
            estimates[name, where] = estimate(apply, network.params, condition.measurement, config.batch_size)
    return Study(prior, initials, conditions, subjects, estimates)


def estimate(
    apply: Callable[..., Any], params: Params, measurement: Float32[np.ndarray, "image ..."], batch_size: int
) -> Float32[np.ndarray, "image ..."]:
    """Apply a conditional model, compiled, to measurements; its images are held in [0, 2]."""
    parts = []
    for first in range(0, len(measurement), batch_size):
        places = np.minimum(np.arange(first, first + batch_size), len(measurement) - 1)
        parts.append(np.asarray(apply(params, measurement[places]))[: len(measurement) - first])
    return np.clip(np.concatenate(parts), 0.0, 2.0)


def read_subjects(config: Config, frame: FrameConfig) -> list[Subject]:
    """Read every test subject's images.

    Raises:
        InputError: A file cannot be read, a label map has another grid, or no image shows a head.
    """
    if (config.manifest is None) == (config.input is None):
        found = "neither" if config.manifest is None else "both"
        raise InputError("manifest, input", "one of them", found, "or try --preset smoke")
    if config.manifest is None:
        assert config.input is not None
        scans = find_scans(config.input, KINDS, config.series).scans
        root = config.input if config.input.is_dir() and scans[0].path != config.input else config.input.parent
        # Every scan is a subject of its own, whatever its folder's files are called.
        names = unique_names([os.path.relpath(scan.path, root) for scan in scans], NAME_ENDINGS)
        files = [(name, scan, None) for name, scan in zip(names, scans, strict=True)]
    else:
        files = _listed(config.manifest, config.series)
    grouped: dict[str, list[tuple[np.ndarray, np.ndarray | None]]] = {}
    for name, path, labels in files:
        if name not in grouped and config.subjects and len(grouped) == config.subjects:
            continue
        grouped.setdefault(name, []).append(_read_images(path, labels, frame, config))
    subjects = []
    for name, parts in grouped.items():
        images = np.concatenate([images for images, _ in parts])
        maps = [found for _, found in parts if found is not None]
        subjects.append(make_subject(name, images, np.concatenate(maps) if len(maps) == len(parts) else None))
    return subjects


def _listed(manifest: Path, series: str) -> list[tuple[str, ScanFiles, Path | None]]:
    table = read_table(manifest, required=("path",), optional=("subject", "labels", "split"))
    paths = resolve_paths(table)
    labels = resolve_paths(table, "labels") if "labels" in table.columns else [None] * len(paths)
    splits = stated_splits(table) or ["test"] * len(paths)
    rows = list(zip(subjects_of(table), paths, labels, splits, strict=True))
    if "test" not in splits:
        raise InputError(manifest, "rows with split 'test'", "none", "leave the column out to use all")
    return [(subject, ScanFiles(path, series), place) for subject, path, place, split in rows if split == "test"]


def _read_images(
    scanned: ScanFiles, labels: Path | None, frame: FrameConfig, config: Config
) -> tuple[Float32[np.ndarray, "image ..."], np.ndarray | None]:
    path = scanned.path
    scan = read_scan(scanned, frame, config.fill)
    head = head_of(scan.volume.array)
    images, _ = cut_images(scan.volume.array, frame, head)
    share = cut_images(head, frame, head)[0].reshape(len(images), -1).mean(1)
    kept = np.flatnonzero(share >= LEAST_HEAD)
    if not kept.size:
        advice = "check the scan, or the size of the prior's images"
        raise InputError(path, f"an image of which {LEAST_HEAD:.0%} is head", "none", advice)
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, min(config.slices, len(kept))).round().astype(int))]
    found = None
    if labels is not None:
        volume = read_labels(labels, frame)
        if volume.array.shape != scan.volume.array.shape:
            raise InputError(labels, f"the grid of {path}", f"shape {volume.array.shape}", "resample it")
        found = cut_images(simplify_labels(volume.array), frame, head)[0][chosen]
    return images[chosen].astype(np.float32), found


def make_embedded(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains, and train a tiny prior, its calibration and a conditional model, where none is given."""
    if config.manifest is not None:
        _listed(config.manifest, config.series)  # a mistake there costs no training
    if config.input is not None:
        find_scans(config.input, KINDS, config.series)
    start(folder)
    place, log = folder.path / "inputs", Log(folder.path, folder.options.quiet)
    weights = config.weights or calibrate.train_tiny_prior(folder, config.seed)
    calibration = config.calibration
    if calibration is None and config.method.start == "bank":
        settings = dataclasses.replace(
            calibrate.smoke(), weights=weights, acquisition=config.acquisition, seed=config.seed
        )
        calibration = _nested("calibrate", calibrate, settings, place / "calibration", log)
    initial = config.initial
    if not initial:
        settings = dataclasses.replace(train_initial.smoke(), acquisition=config.acquisition, gamma=(1.0, 1.0))
        initial = (_nested("train-initial", train_initial, settings, place / "initial", log),)
    if config.has_scans:
        return dataclasses.replace(config, weights=weights, initial=initial, calibration=calibration)
    size = load_prior(weights).frame.size
    brain = BrainConfig(lesion_probability=0.0)
    # Another seed than those of the networks' own phantoms.
    manifest = write_brain_cohort(
        place / "truth", config.seed + 4, config.embedded, size, brain, fractions=(0.0, 0.0, 1.0)
    )
    return dataclasses.replace(config, weights=weights, initial=initial, calibration=calibration, manifest=manifest)


def _nested(stage: str, module: Any, settings: Any, place: Path, log: Log) -> Path:
    nested = open_run("dynamicdps", stage, settings, RunOptions(place, quiet=True))
    if nested.status != "complete":
        log.say(f"Running {stage} on embedded brains first.")
        module.run(settings, nested)
    return nested.path


def _read_bank(config: Config, prior: Network) -> Any:
    if config.calibration is None:
        return None
    calibrated = read_calibration(config.calibration)
    if calibrated.prior != digest_of(prior.params):
        raise InputError("calibration", "one of this prior", "one of another", "calibrate again")
    return calibrated


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Name conditional models by their folders, made different where two are called the same."""
    names = [path.name or str(path) for path in paths]
    return [name if names.count(name) == 1 else f"{name} {index + 1}" for index, name in enumerate(names)]


def write_results(
    folder: Path, means: tuple[Mean, ...], differences: tuple[Difference, ...], results: tuple[Result, ...]
) -> None:
    """Write means.csv, differences.csv and subjects.csv."""
    for name, rows in (("means", means), ("differences", differences)):
        if rows:
            columns = [field.name for field in dataclasses.fields(rows[0])]
            write_table(folder / f"{name}.csv", columns, [dataclasses.asdict(row) for row in rows])
    subjects = [dict(result.cell.key) | row for result in results for row in result.subjects]
    if subjects:
        write_table(folder / "subjects.csv", list(subjects[0]), subjects)


def keep_examples(folder: Path, study: Study) -> None:
    """Keep truth and measurements of some images, for the report."""
    images = {"truth": examples(np.concatenate([subject.images for subject in study.subjects]))}
    images |= {f"measurement, {name}": examples(found.measurement[..., 0]) for name, found in study.conditions.items()}
    for name, image in images.items():
        with atomic_path(make_folder(folder / "examples") / f"{name}.npy") as temporary:
            np.save(temporary, image)

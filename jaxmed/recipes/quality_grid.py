"""What image quality does to label efficiency: a grid of fine-tuning sets and test sets of known shares of good images.

A cell is one arm (pre-trained or from scratch), one share of high quality among the fine-tuning records, one number of
labels and one seed. It is scored on test sets of every share of high quality, which are the same for all cells. Sizes
and the balance of labels are the same everywhere, whole subjects are on one side, and sets are nested: fewer labels, or
more good ones, change as few records as they can.

Source: protocol of arXiv:2508.11864, with a grid of our own (its numbers are not public).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.arrays.task import predict_values, standardise
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Count, Fraction, Length, Share, checked
from jaxmed.data.cohort import LabelledSets
from jaxmed.data.inputs import require_whole, try_each
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.metrics.cohort import HEADLINE
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import HeadConfig
from jaxmed.recipes.encoder_study import score_values
from jaxmed.recipes.quality_records import QualityConfig, draw_mixture, largest_size
from jaxmed.recipes.study import Cell, Outcome, Result, StudyRun, make_cells, run_groups
from jaxmed.recipes.study_sections import MOST_EXAMPLES
from jaxmed.recipes.vmapped_fits import FitConfig, HeldOut, fit_runs, start_runs
from jaxmed.synthesis.degradation import PICTURE_KINDS, Kind, degrade
from jaxmed.train.log import Log

ARMS = ("pretrained", "scratch")
AT = " at "
"""Between a measure and the test set's share of high quality, in the name of a cell's metric."""


@dataclasses.dataclass(frozen=True)
@checked
class GridConfig:
    """What is varied.

    Attributes:
        shares: Shares of high quality in the fine-tuning sets.
        test_shares: Shares of high quality in the test sets.
        labels: Numbers of labels, as shares of the largest fine-tuning set.
        seeds: Repetitions of every cell: which records, parameters, order, augmentation.
        size: Records of the largest fine-tuning set; 0 takes as many as every share allows.
        test_size: Records of every test set; 0 likewise.
        together: Runs in one compiled program: cells that differ in seed, then share, then labels. More of them need
            more memory.
        processes: Parts into which the cells are dealt, for as many commands with `process` 0, 1, ... on one folder.
        process: Which part is this command's.
    """

    shares: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    test_shares: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    labels: tuple[Fraction, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    seeds: Count = 5
    size: Length = 0
    test_size: Length = 0
    together: Count = 5
    processes: Count = 1
    process: int = 0

    def __post_init__(self) -> None:
        for name in ("shares", "test_shares", "labels"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected one or more, found none")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process: expected 0 to {self.processes - 1}, found {self.process}")


class GradedImages(NamedTuple):
    """Records as the study takes them.

    Attributes:
        sets: The manifest, read and checked.
        is_high: Whether each record is of high quality.
        images: As the network takes them.
        shown: Some as they were before their intensities were standardised, the good ones first.
    """

    sets: LabelledSets
    is_high: Bool[np.ndarray, " record"]
    images: Float[np.ndarray, "record *size channel"]
    shown: Float[np.ndarray, "image *size channel"]


class Plan(NamedTuple):
    """Which records the cells take.

    Attributes:
        pool: Records of fine-tuning sets; those of validation belong to them where nothing is selected.
        size: Records of the largest fine-tuning set.
        counts: Records by share of labels.
        tests: Records of the test set of each share of high quality.
        validation: Records by which cells of each share select; empty where nothing is selected.
    """

    pool: Int[np.ndarray, " record"]
    size: int
    counts: dict[float, int]
    tests: dict[float, Int[np.ndarray, " record"]]
    validation: dict[float, Int[np.ndarray, " record"]]


class TuningSet(NamedTuple):
    """What one run is fine-tuned on.

    Attributes:
        is_pretrained: Whether it starts from given parameters.
        seed: Of the head, the order and the augmentation.
        rows: Records.
        validation: Records that select; empty where nothing is selected.
        importance: How often each is drawn, beside that classes are even; None for all alike.
    """

    is_pretrained: bool
    seed: int
    rows: Int[np.ndarray, " record"]
    validation: Int[np.ndarray, " record"]
    importance: Float[np.ndarray, " record"] | None = None


Fitter: TypeAlias = Callable[[Sequence[TuningSet]], Float[np.ndarray, "set test output"]]
"""From as many sets as one program takes, or fewer, to values of all records of the split test."""


def read_images(
    sets: LabelledSets,
    is_high: Bool[np.ndarray, " record"],
    preprocess: Preprocess,
    quality: QualityConfig | None,
    seed: int,
    threads: int = 2,
) -> GradedImages:
    """Read all images into memory, and make those of low quality worse where that is asked for.

    Args:
        sets: The records.
        is_high: Which are of high quality.
        preprocess: What each file goes through.
        quality: How images are made worse; None leaves them.
        seed: Seed of that.
        threads: Files that are read at once.

    Raises:
        InputError: A file is broken, or its intensities are not those of a magnitude image or a picture.
    """
    intensity = preprocess.intensity
    is_picture = intensity.kind == "unit"
    if quality is not None:
        if intensity.kind not in ("unit", "zscore"):
            raise InputError("preprocess.intensity.kind", "unit or zscore, of images to make worse", intensity.kind)
        raw = Intensity("unit") if is_picture else Intensity("keep")
        preprocess = dataclasses.replace(preprocess, intensity=raw)
    found = require_whole(try_each(preprocess, sets.cohort.scans, threads), str(sets.table.path))
    images = np.stack(found).astype(np.float32)
    if quality is not None:
        kind: Kind = quality.kind
        if is_picture and kind not in (*PICTURE_KINDS, "low-quality"):
            raise InputError("quality.kind", f"{', '.join(PICTURE_KINDS)} or low-quality, of pictures", kind)
        spacing = preprocess.spacing if len(preprocess.size) == 3 and len(preprocess.spacing) == 3 else ()
        low = np.flatnonzero(~is_high)
        worsen = partial(degrade_channels, kind=kind, spacing=spacing, is_magnitude=not is_picture)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(low))
        worse = jax.jit(
            lambda keys, images: jax.lax.map(lambda pair: worsen(pair[0], pair[1], quality.strength), (keys, images))
        )
        images[low] = np.asarray(worse(keys, jnp.asarray(images[low])))
    few = [np.flatnonzero(is_high == flag)[:MOST_EXAMPLES] for flag in (True, False)]
    shown = images[np.concatenate(few)]
    if quality is not None:
        images = np.stack([_standardised(image, intensity) for image in images])
    return GradedImages(sets, is_high, images, shown)


def degrade_channels(
    key: KeyArray,
    image: Float[Array, "*size channel"],
    strength: Float[Array, ""] | float,
    *,
    kind: Kind,
    spacing: Sequence[float],
    is_magnitude: bool,
) -> Float[Array, "*size channel"]:
    """Make every channel worse by itself; see `synthesis.degradation.degrade`."""
    parts = [
        degrade(part, image[..., number], kind, strength, spacing, is_magnitude=is_magnitude)
        for number, part in enumerate(jax.random.split(key, image.shape[-1]))
    ]
    return jnp.stack(parts, -1)


def plan_grid(config: GridConfig, data: GradedImages, seed: int, *, selects: bool = False) -> Plan:
    """Choose sizes and test sets, and check that every set can be drawn.

    Validation records follow the share of the cell that selects on them, as many as there are, without a balance of
    labels; where nothing is selected they join those of training.

    Raises:
        InputError: There are too few records of a quality or class; the message gives the largest possible.
    """
    cohort, where = data.sets.cohort, data.sets.table.path
    pool = cohort.rows("train") if selects else cohort.rows("train", "validation")
    validation, test = cohort.rows("validation"), cohort.rows("test")
    if not len(test):
        raise InputError(where, "records with split 'test', on which every cell is scored", "none")
    labels = balance_labels(data)
    even = np.full(len(labels), "")
    sides = [
        (pool, config.shares, config.size, labels),
        (test, config.test_shares, config.test_size, labels),
        *([(validation, config.shares, 0, even)] if selects else []),
    ]
    sizes, sets = [], []
    for rows, shares, asked, names in sides:
        flags, subjects, those = data.is_high[rows], cohort.subjects[rows].astype(str).tolist(), names[rows].tolist()
        size = asked or largest_size(flags, shares, seed, subjects, those)
        if rows is validation and not size:
            expected = "validation records of high and of low quality, to select on"
            raise InputError(where, expected, "those of one kind", "or --fit.evaluations 0")
        sets.append({s: rows[draw_mixture(where, flags, s, max(size, 1), seed, subjects, those)] for s in shares})
        sizes.append(size)
    size, (_, tests, *selecting) = sizes[0], sets
    counts = {share: max(int(share * size + 0.5), 1) for share in config.labels}
    least = 1 if data.sets.meaning.task.kind == "regression" else len(set(labels[pool].tolist()))
    if min(counts.values()) < least:
        expected = f"{least / size:.3g} or more, so that a set holds a record of every class"
        raise InputError("study.labels", expected, f"{min(config.labels):g} of {size} records")
    return Plan(pool, size, counts, tests, selecting[0] if selecting else {})


def balance_labels(data: GradedImages) -> np.ndarray:
    """Return the label of every record by which sets are balanced; one and the same for a regression."""
    is_many = data.sets.meaning.task.kind == "regression"
    return np.array(["" if is_many else "/".join(cells) for cells in data.sets.cohort.cells])


def draw_rows(plan: Plan, data: GradedImages, share: float, count: int, seed: int) -> Int[np.ndarray, " record"]:
    """Return the fine-tuning records of a cell."""
    cohort, labels = data.sets.cohort, balance_labels(data)[plan.pool].tolist()
    subjects = cohort.subjects[plan.pool].astype(str).tolist()
    return plan.pool[draw_mixture(data.sets.table.path, data.is_high[plan.pool], share, count, seed, subjects, labels)]


def make_fitter(
    config: GridConfig,
    fit: FitConfig,
    encoder: Encoder,
    head: HeadConfig,
    given: Params | None,
    data: GradedImages,
    plan: Plan,
) -> Fitter:
    """Return what fine-tunes on sets of the plan's pool, several in one program.

    Args:
        config: How many together.
        fit: How a run goes.
        encoder: What is trained.
        head: What stands on it.
        given: Pre-trained parameters of the encoder, for sets that start from them.
        data: The images.
        plan: Pool and validation records.
    """
    task, cohort = data.sets.meaning.task, data.sets.cohort
    all_targets = standardise(cohort.targets, task).astype(np.float32)
    targets, images = all_targets[plan.pool], jnp.asarray(data.images[plan.pool])
    test_images = jnp.asarray(data.images[cohort.rows("test")])
    others = cohort.rows("validation")
    places, other_places = ({int(row): place for place, row in enumerate(rows)} for rows in (plan.pool, others))
    held_out = None
    if fit.evaluations:
        held_out = HeldOut(jnp.asarray(data.images[others]), jnp.asarray(all_targets[others]), np.zeros((1, 1)))

    def run(sets: Sequence[TuningSet]) -> Float[np.ndarray, "set test output"]:
        # A part of a group that is left runs in the program of whole ones, and so gives the same numbers.
        padded = [*sets, *[sets[-1]] * (config.together - len(sets))]
        chances = np.zeros((len(padded), len(plan.pool)), np.float32)
        shares = np.zeros((len(padded), len(others)), np.float32)
        for number, one in enumerate(padded):
            own = [places[int(row)] for row in one.rows]
            chances[number, own] = even_chances(targets[own], task.kind)
            if one.importance is not None:
                chances[number, own] *= one.importance
            shares[number, [other_places[int(row)] for row in one.validation]] = 1
        keys = jax.vmap(jax.random.key)(jnp.array([one.seed for one in padded]))
        pairs = jax.vmap(jax.random.split)(keys)
        starts = start_runs(encoder, head, pairs[:, 0], given, np.array([one.is_pretrained for one in padded]))
        logits = fit_runs(
            fit, encoder, head, task.kind, images, targets, chances, starts, pairs[:, 1], test_images,
            None if held_out is None else held_out._replace(shares=shares),
        )  # fmt: skip
        return np.stack([np.asarray(predict_values(jnp.asarray(one), task)) for one in logits[: len(sets)]])

    return run


def run_grid(
    config: GridConfig,
    fitter: Fitter,
    arms: Sequence[str],
    data: GradedImages,
    plan: Plan,
    seed: int,
    place: Path,
    record: object,
    log: Log | None = None,
) -> StudyRun:
    """Run every cell that is not finished, several in one program.

    What a cell predicts for the records of the split test, in their order, is kept in outputs/scores.

    Args:
        config: What is varied.
        fitter: Of `make_fitter`.
        arms: Of `ARMS`, those there are.
        data: The images.
        plan: Which of them the cells take.
        seed: Of the first repetition.
        place: The run folder.
        record: What all cells share, as `study.run_groups` keeps it.
        log: Where to say how far it is.
    """
    cells = make_cells(
        {"arm": tuple(arms), "labels": config.labels, "tuned_high": config.shares,
         "seed": range(seed, seed + config.seeds)}
    )  # fmt: skip
    none = np.zeros(0, np.int64)

    def run_group(group: Sequence[Cell]) -> list[Outcome]:
        sets = []
        for cell in group:
            share, size = float(cell["tuned_high"]), plan.counts[float(cell["labels"])]
            rows = draw_rows(plan, data, share, size, int(cell["seed"]))
            sets.append(
                TuningSet(cell["arm"] == ARMS[0], int(cell["seed"]), rows, plan.validation.get(share, none))
            )  # fmt: skip
        values = fitter(sets)
        for cell, own in zip(group, values, strict=True):
            write_npz(scores_of(place, cell), {"values": own})
        return [
            Outcome({"records": plan.counts[float(cell["labels"])], **score_tests(data, plan, own)})
            for cell, own in zip(group, values, strict=True)
        ]

    return run_groups(
        cells, run_group, place, record, size=config.together, process_index=config.process,
        process_count=config.processes, log=log,
    )  # fmt: skip


def scores_of(place: Path, cell: Cell) -> Path:
    """Return the file with what a cell predicts for the records of the split test."""
    return place / "outputs" / "scores" / f"{cell.slug}.npz"


def places_in_test(data: GradedImages, rows: Int[np.ndarray, " record"]) -> Int[np.ndarray, " record"]:
    """Return where records stand among those of the split test."""
    position = {int(row): number for number, row in enumerate(data.sets.cohort.rows("test"))}
    return np.array([position[int(row)] for row in rows], np.int64)


def score_tests(data: GradedImages, plan: Plan, values: Float[np.ndarray, "test output"]) -> dict[str, float]:
    """Return every measure on every test set, named "auroc at 0.5"."""
    found: dict[str, float] = {}
    for share, rows in plan.tests.items():
        scores = score_values(data.sets.meaning.task, data.sets.cohort.take(rows), values[places_in_test(data, rows)])
        found |= {f"{name}{AT}{share:g}": value for name, value in scores.items()}
    return found


def even_chances(targets: Float[np.ndarray, "record column"], kind: str) -> Float[np.ndarray, " record"]:
    """Return how often each record is drawn so that classes are even: 1 over the number of its class."""
    if kind == "regression":
        return np.ones(len(targets), np.float32)
    _, member, counts = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
    return (1 / counts[member.reshape(-1)]).astype(np.float32)


def by_test_set(results: Sequence[Result]) -> tuple[Result, ...]:
    """Return one result per test set of every cell: its share of high quality is an axis, "tested_high"."""
    found = []
    for result in results:
        measures: dict[str, dict[str, float]] = {}
        for name, value in result.metrics.items():
            measure, mark, share = name.rpartition(AT)
            if mark:
                measures.setdefault(share, {})[measure] = value
        for share, metrics in measures.items():
            key = (*result.cell.key, ("tested_high", float(share)))
            found.append(Result(Cell(key), {**metrics, "records": result.metrics["records"]}, []))
    return tuple(found)


def headline(data: GradedImages) -> str:
    """Return the measure by which cells are compared."""
    return HEADLINE[data.sets.meaning.task.kind]


def _standardised(image: Float[np.ndarray, "*size channel"], intensity: Intensity) -> Float[np.ndarray, "..."]:
    """Do to an image of memory what the preprocessing would have done to its file, last."""
    if intensity.kind == "unit":
        if not intensity.mean:
            return image
        return ((image - np.array(intensity.mean)) / np.array(intensity.std)).astype(np.float32)
    out = np.zeros_like(image)
    for channel in range(image.shape[-1]):
        values = image[..., channel]
        counted = values != 0 if intensity.inside == "nonzero" else np.ones(values.shape, bool)
        if counted.any():
            inside = values[counted]
            out[..., channel][counted] = (inside - inside.mean()) / (inside.std() or 1.0)
    return out

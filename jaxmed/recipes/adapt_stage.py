"""The road from a table of labels to a model and its scores: what an adapt stage does, whatever the encoder.

A system says how its weights become a `Start`, which synthetic data it has, and what a page says of it. The page's
sections are in `adapt_sections`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmed.arrays.task import Task, predict_values, standardise
from jaxmed.arrays.types import Params
from jaxmed.config import Length, Number, Probability, Share, Whole, checked, to_record
from jaxmed.data.class_folders import Subjects
from jaxmed.data.cohort import Cohort, LabelledSets, read_labelled_sets
from jaxmed.data.inputs import PreparedField, check_scans, input_source
from jaxmed.data.labels import LabelConfig, balanced_weights
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import ForgivingSource, LabelledSource, SubsetSource
from jaxmed.data.splits import write_split_table
from jaxmed.data.store import StoredSource, find_store
from jaxmed.errors import InputError
from jaxmed.files import expand_home
from jaxmed.io.tables import write_table
from jaxmed.metrics.cohort import Score, score_set
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import HeadConfig
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.adapt import (
    FITTED,
    AdaptConfig,
    Adapted,
    AdaptFlags,
    Mode,
    adapt,
    check_run,
    final_heads,
    plan_adaptation,
    score,
)
from jaxmed.recipes.adapt_program import Augment
from jaxmed.recipes.effort import Effort
from jaxmed.recipes.quality_range import Scorer, write_tuned
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.subject_scores import Predicted, by_subject, merge_images, score_covariates
from jaxmed.recipes.training import NO_PREFIX, TrainData
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.loop import length_notes
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

FAILED_COLUMNS = ("path", "set", "reason")
METRIC_COLUMNS = ("set", "group", "label", "measure", "estimate", "low", "high", "undefined", "records", "subjects")


@dataclasses.dataclass(frozen=True)
@checked
class LabelledData:
    """Which scans are learnt from, and which are scored.

    Attributes:
        manifest: CSV with the columns path (a file that the weights' preprocessing reads, a DICOM folder, or prepared
            inputs as .npz), the label columns, and optionally subject and split (train, validation, test). Or a folder
            of pictures by split and class: train/CLASS/a.png, val/CLASS/b.png, test/CLASS/c.png.
        fractions: Shares of subjects in train, validation and test, where there is no column split.
        group: Whether pre-training saw scans of this distribution, without labels: "seen" or "unseen".
        external: Further sets, scored and never trained on, as NAME=CSV or NAME:GROUP=CSV; GROUP is "seen", "unseen"
            or "other" (another centre, in neither stage), which is the default. CSV may be a folder of classes, of
            which all pictures are scored.
        subject_pattern: Of folders of classes: a regular expression whose first group, in a picture's name without
            suffix, is its subject, such as "^(.*)_(left|right)$". Empty makes every picture a subject of its own.
        subjects: Of a folder of classes, instead: CSV with path (below the folder, or the bare name), subject where it
            tells them, and covariates.
        covariates: Columns with what is known of subjects beside the scan: numbers, or two words. The model does not
            see them; they are scored as a baseline, and beside the model's output.
        weight: Column with how much each record counts in training, such as "weight" or "chosen" of the proposal of
            `jaxmed profound quality-study`, which is a manifest. Weights are divided by their mean over the split
            train; records of 0 are left out, an empty cell is 1. Empty counts all alike.
        cache: Folder in which prepared scans of the manifest are kept (float16, 34 MB each at 256^3). Empty prepares
            them anew in every epoch.
        store: Records prepared by `jaxmed data pack`, read instead of the manifest's files; without a manifest its own
            table counts. A manifest may name it in a column "store".
        check: Training and validation scans (of a study all, since every cell scores all) that are read from end to
            end before the run, evenly spread; of the others only the headers are.
        synthetic: Generate this many scans, and a set of another scanner, where no manifest is given.
    """

    manifest: Path | None = None
    fractions: tuple[Share, Share, Share] = (0.7, 0.15, 0.15)
    group: Literal["seen", "unseen"] = "unseen"
    external: tuple[str, ...] = ()
    subject_pattern: str = ""
    subjects: Path | None = None
    covariates: tuple[str, ...] = ()
    weight: str = ""
    cache: Path | None = None
    store: Path | None = None
    check: Whole = 16
    synthetic: Number = 0

    def __post_init__(self) -> None:
        # The tables' places are part of words, so nobody else makes them absolute.
        words = [word.partition("=") for word in self.external]
        whole = tuple(f"{name}{mark}{expand_home(path).absolute() if path else ''}" for name, mark, path in words)
        object.__setattr__(self, "external", whole)


@dataclasses.dataclass(frozen=True)
@checked
class LabelledConfig:
    """What every system asks for to adapt an encoder to labels.

    Attributes:
        data: Labelled scans.
        label: What is learnt.
        weights: Published or own weights to start from: a masked autoencoder, or a classifier, whose encoder is taken.
            Empty trains from scratch.
        pool: What the head stands on: "concat" (class token and mean of the patch tokens) or "mean", each under a layer
            norm, or "class" (the class token after the encoder's final norm). "auto" is "mean" for a masked
            autoencoder, whose class token nothing has trained, and "class" for other encoders.
        hidden: Width of a hidden layer with leaky ReLU and BatchNorm in the head; 0 for none.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38), in HU for CT; without it they
            are refused.
        adapt: How the encoder is adapted.
        balance: Find the class weights from the training labels instead, so that classes count alike.
        threshold: Probability from which a binary label counts as predicted, in accuracy, F1 and their like.
        average: What is scored: every image, or every subject, by the mean of its images' probabilities.
    """

    data: LabelledData = LabelledData()
    label: LabelConfig = LabelConfig()
    weights: Path | None = None
    pool: Literal["auto", "concat", "mean", "class"] = "concat"
    hidden: Length = 0
    series: str = ""
    fill: float | None = None
    adapt: AdaptFlags = AdaptConfig()
    balance: bool = False
    threshold: Probability = 0.5
    average: Literal["image", "subject"] = "image"

    def __post_init__(self) -> None:
        if self.balance and self.adapt.class_weights:
            raise ValueError("class_weights: expected none beside balance, found some")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        given = (self.data.manifest, self.data.store)
        return self.data.synthetic > 0 and given == (None, None) and not self.data.external


# The type of a stage's field `labelled`: on the command line its options carry no prefix.
LabelledFlags: TypeAlias = Annotated[LabelledConfig, NO_PREFIX]


class Start(NamedTuple):
    """Where training starts.

    Attributes:
        encoder: What is adapted.
        head: What is put on it.
        params: {"encoder": ...}; None from scratch.
        preprocess: A file to the encoder's input.
        family: Whose weights the adapted model's are, for `load_published`.
        classifier: Head to the sizes of the whole model, as the family keeps them.
        licence: Licence of the weights.
        notes: What a user should know about them.
        training: A file to what an augmentation takes that crops training images to the encoder's input: larger, and
            with what an evaluation cuts away. None where it takes the input; not used without an augmentation.
        augment: What happens to training images, where that depends on the encoder; in place of the stage's.
        kind: Of the adapted model, among the family's.
    """

    encoder: Encoder
    head: HeadConfig
    params: Params | None
    preprocess: Preprocess
    family: str
    classifier: Callable[[HeadConfig], Any]
    licence: str
    notes: list[str]
    training: Preprocess | None = None
    augment: Augment | None = None
    kind: str = "classifier"


class Scored(NamedTuple):
    """A set that was scored.

    Attributes:
        name: "validation", "test" or an external set's.
        group: One of `data.cohort.GROUPS`.
        cohort: Its scans that could be read.
        logits: Of these.
        scores: How well it went.
        failed: Files that could not be read, and why.
    """

    name: str
    group: str
    cohort: Cohort
    logits: Float[np.ndarray, "record output"]
    scores: list[Score]
    failed: list[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class SetSummary:
    """Name and group of a scored set, how many records were scored, and how many failed."""

    name: str
    group: str
    records: int
    failed: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an adaptation found; scores are in outputs/metrics.csv.

    Attributes:
        task: What was learnt.
        mode: As of `AdaptConfig`.
        start: What training started from, in words.
        records: Scans of each split.
        sets: What was scored.
        parameters: Their number.
        step: Step of the kept parameters.
        select: What they were chosen by.
        class_weights: Factors on the loss.
        threshold: From which a label counts as predicted.
        notes: What a user should know.
        effort: What it took.
    """

    task: Task
    mode: str
    start: str
    records: dict[str, int]
    sets: tuple[SetSummary, ...]
    parameters: int
    step: int
    select: str
    class_weights: tuple[float, ...]
    threshold: float
    notes: tuple[str, ...]
    effort: Effort = Effort()


def run_adapt(
    config: Any,
    labelled: LabelledConfig,
    find_start: Callable[[Task], Start],
    page: Callable[[Finished[Any, Summary]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
    augment: Augment | None = None,
    scorer: tuple[Scorer, int] | None = None,
) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when scans failed.

    Args:
        config: Configuration of the stage.
        labelled: Its part that all systems share, synthetic data written where they were asked for.
        find_start: The system's: from a task to weights, encoder and preprocessing.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
        augment: What happens to training images.
        scorer: Measures the quality of a scan, and of how many training scans: their scores are kept beside the model,
            see `quality_range`. None leaves that out.
    """
    clock = Clock()
    sets = read_sets(labelled)
    task = sets.meaning.task
    first = find_start(task)
    recipe = labelled.adapt
    recipe = balanced(recipe, labelled, sets.cohort.targets[sets.cohort.rows("train")], task)
    check_run(recipe, first.encoder, first.head, task)
    check_heads(recipe, first)
    augment = first.augment or augment
    # Broken scans of the test split are left out when it is scored; nothing can be learnt from a broken one.
    learnt = sets.cohort.take(sets.cohort.rows("train", "validation"))
    # Refused before anything is written, where the store holds something else.
    sources = labelled_sources(learnt, first, augment is not None, recipe.mode, None, sets.store)
    threads = recipe.train.loader.num_threads
    unexpected = check_scans(learnt.scans, first.preprocess, labelled.data.check, threads, sets.store)
    loop = recipe.train.loop
    told = [*notes, *sets.notes, *first.notes, *unexpected, *length_notes(loop, recipe.train.epochs)]
    log = begin(folder, told, tensorboard=loop.tensorboard)
    if "subject" in sets.table.columns:
        write_split_table(folder.outputs / "splits.csv", sets.table, sets.cohort.splits.tolist())
    clock.lap("read and check")
    # Packing reads every scan once: those of the test split may be broken, and are read later.
    if labelled.data.cache is not None:
        sources = labelled_sources(learnt, first, augment is not None, recipe.mode, labelled.data.cache, sets.store)
    data = training_data(learnt, *sources, first.preprocess)
    log.say(f"{len(data.training):,} scans to train on, {len(data.held_out or ()):,} to select on.")
    adapted = adapt(
        recipe, first.encoder, first.head, task, data, folder=folder, log=log, augment=augment,
        start=first.params,
    )  # fmt: skip
    clock.lap("adapt, compilation included")
    write_model(folder.outputs / "model", adapted, first, task)
    if scorer is not None and scorer[1]:
        tuned = sets.cohort.take(sets.cohort.rows("train"))
        names = tuned.subjects.astype(str).tolist()
        told += write_tuned(folder.outputs / "model", tuned.scans, names, scorer[1], scorer[0], log)
        clock.lap("measure quality")
    scored = [
        score_cohort(recipe, first, adapted, task, *named, labelled.threshold, log, labelled.average, sets.store)
        for named in named_sets(labelled.data.group, sets)
    ]
    if labelled.data.covariates:
        scored, further = add_covariates(task, scored, labelled.average, recipe.train.seed)
        told += further
    clock.lap("score, with intervals")
    told += [f"{one.name}: {note}" for one, further in scored for note in further]
    write_tables(folder.outputs, [one for one, _ in scored], adapted, task)
    summary = Summary(
        task, recipe.mode, "random weights" if first.params is None else "pre-trained weights",
        {split: len(sets.cohort.rows(split)) for split in ("train", "validation", "test")},
        tuple(SetSummary(one.name, one.group, len(one.logits), len(one.failed)) for one, _ in scored),
        sum(int(np.size(leaf)) for leaf in jax.tree.leaves(adapted.params)), adapted.step, recipe.select,
        recipe.class_weights, labelled.threshold, tuple(told), adapted.effort,
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return int(any(one.failed for one, _ in scored))


def plan_adapt(
    labelled: LabelledConfig, first: Start, mesh: Mesh, task: Task, augment: Augment | None = None
) -> Workload:
    """Return the step of `run_adapt` and the shapes of its arguments, without weights or labels.

    Args:
        labelled: What is learnt and how.
        first: The system's start from scratch, of the same sizes as the weights'.
        mesh: The devices, which may be those of a topology that is not here.
        task: What stands for the labels: their number is all that counts.
        augment: As of `run_adapt`.
    """
    augment = first.augment or augment
    image = (first.training if augment is not None and first.training is not None else first.preprocess).size
    shape = (*image, first.encoder.channels)
    return plan_adaptation(labelled.adapt, first.encoder, first.head, task, shape, mesh, augment)


def read_sets(labelled: LabelledConfig) -> LabelledSets:
    """Read and check the tables.

    Raises:
        InputError: For whatever a user can have wrong in them.
    """
    data, adaptation = labelled.data, labelled.adapt
    store, manifest = find_store(data.store, data.manifest)
    if manifest is None:
        raise InputError("data.manifest", "a table of labelled scans", "nothing", "or try --preset smoke")
    sets = read_labelled_sets(
        manifest, data.external, labelled.label, data.fractions, adaptation.train.seed,
        needs_auroc=adaptation.select != "loss", series=labelled.series, fill=labelled.fill,
        naming=Subjects(data.subject_pattern, data.subjects), covariates=data.covariates, weight=data.weight,
        store=store,
    )  # fmt: skip
    if data.weight and adaptation.mode == "knn":
        raise InputError("data.weight", "none, for nearest neighbours", data.weight)
    if data.covariates and sets.meaning.task.kind == "regression":
        raise InputError("data.covariates", "none, for a regression", ", ".join(data.covariates))
    if labelled.average == "subject":
        for where, cohort in ((str(manifest), sets.cohort), *((name, one) for name, _, one in sets.externals)):
            merge_images(cohort, where)  # refuses labels that do not agree
    if adaptation.select != "loss" and sets.meaning.task.kind == "regression":
        raise InputError("select", "loss, for a regression", adaptation.select)
    return sets


def check_heads(recipe: AdaptConfig, first: Start) -> None:
    """Check that the model can be written with any head that the run may end with.

    Raises:
        InputError: It cannot: the encoder has a final norm, or lacks it.
    """
    for head in final_heads(recipe, first.head):
        try:
            first.classifier(head)
        except ValueError as error:
            raise InputError("mode", f"an encoder for the heads of {recipe.mode}", str(error), "set --pool") from error


def balanced(recipe: AdaptConfig, labelled: LabelledConfig, targets: np.ndarray, task: Task) -> AdaptConfig:
    """Return the recipe with class weights of the training labels, where they are to be found."""
    if not labelled.balance:
        return recipe
    return dataclasses.replace(recipe, class_weights=balanced_weights(targets, task))


def labelled_sources(
    cohort: Cohort,
    first: Start,
    is_augmented: bool,
    mode: Mode,
    cache: Path | None,
    store: StoredSource | None = None,
) -> tuple[LabelledSource, LabelledSource]:
    """Return the records of a cohort as training takes them, and as the encoder does, which may be the same.

    Raises:
        InputError: There is a store, and not of these records as training takes them.
    """
    has_own = is_augmented and first.training is not None and mode not in FITTED
    wanted = first.training if has_own and first.training is not None else first.preprocess
    if store is not None:
        store.require(cohort.scans, wanted)
    images = input_source(cohort.scans, first.preprocess, cache, store=store)
    source = LabelledSource(images, cohort.targets, cohort.importance)
    if not has_own:
        return source, source
    own = None if cache is None else cache / "training"
    scans = input_source(cohort.scans, wanted, own, store=store)
    return LabelledSource(scans, cohort.targets, cohort.importance), source


def training_data(
    cohort: Cohort, training: LabelledSource, source: LabelledSource, preprocess: Preprocess
) -> TrainData:
    """Return the training and validation records of a cohort, of what `labelled_sources` returns."""
    rows = cohort.rows("train"), cohort.rows("validation")
    return TrainData(SubsetSource(training, rows[0]), SubsetSource(source, rows[1]), PreparedField(preprocess))


def named_sets(group: str, sets: LabelledSets) -> list[tuple[str, str, Cohort]]:
    """Return name, group and scans of everything that is scored."""
    rows = {split: sets.cohort.rows(split) for split in ("validation", "test")}
    own = [(split, group, sets.cohort.take(found)) for split, found in rows.items() if len(found)]
    return own + sets.externals


def score_cohort(
    recipe: AdaptConfig,
    first: Start,
    adapted: Adapted,
    task: Task,
    name: str,
    group: str,
    cohort: Cohort,
    threshold: float,
    log: Log,
    average: Literal["image", "subject"] = "image",
    store: StoredSource | None = None,
) -> tuple[Scored, list[str]]:
    """Predict a set and score it, by image or by subject; files that cannot be read are left out and told.

    Returns:
        The set, and in words what could not be scored.
    """
    log.say(f"Scoring {len(cohort.scans):,} scans of {name}.")
    images = input_source(cohort.scans, first.preprocess, store=store)
    source = ForgivingSource(images, first.encoder.image_shape)
    # Reasons are noted where records are read, which has to be this process.
    loader = dataclasses.replace(recipe.train.loader, num_workers=0)
    reading = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loader=loader))
    logits = score(reading, first.encoder, adapted.head, adapted.params, source, PreparedField(first.preprocess))
    failed = [(cohort.paths[row], reason) for row, reason in sorted(source.reasons.items())]
    for _, reason in failed:
        log.say(f"Failed: {reason}")
    kept = np.array([row for row in range(len(cohort.scans)) if row not in source.reasons], np.int64)
    read, logits = cohort.take(kept), logits[kept]
    if not len(kept):
        return Scored(name, group, read, logits, [], failed), []
    one = Predicted(name, read, logits)
    given = by_subject(task, one) if average == "subject" else one
    outputs = jnp.asarray(given.logits, jnp.float32)
    losses = task_losses(task.kind, outputs, jnp.asarray(standardise(given.cohort.targets, task)))
    scores, notes = score_set(
        task, given.cohort.targets, np.asarray(predict_values(outputs, task)), given.cohort.subjects,
        seed=recipe.train.seed, threshold=threshold, losses=np.asarray(losses),
    )  # fmt: skip
    if average == "subject" and len(given.logits) < len(logits):
        told = f"the probabilities of {len(logits):,} images were averaged over {len(given.logits):,} subjects"
        notes = [f"{told} before scoring; curves show the images", *notes]
    return Scored(name, group, read, logits, scores, failed), notes


def add_covariates(
    task: Task, scored: Sequence[tuple[Scored, list[str]]], average: Literal["image", "subject"], seed: int
) -> tuple[list[tuple[Scored, list[str]]], list[str]]:
    """Add what covariates tell, alone and beside the model, to the scores of every set; return notes on it too."""
    given = [Predicted(one.name, one.cohort, one.logits) for one, _ in scored if len(one.logits)]
    given = [by_subject(task, one) for one in given] if average == "subject" else given
    found, notes = score_covariates(task, given, seed)
    return [(one._replace(scores=[*one.scores, *found.get(one.name, [])]), told) for one, told in scored], notes


def write_model(folder: Path, adapted: Adapted, first: Start, task: Task) -> None:
    """Export the adapted model, for `load_published`."""
    record = {
        "family": first.family,
        "kind": first.kind,
        "config": to_record(first.classifier(adapted.head)),
        "preprocess": to_record(first.preprocess),
        "licence": first.licence,
        "task": to_record(task),
    }
    export_parameters(folder, adapted.params, record)


def output_names(task: Task) -> list[str]:
    """Return the columns of a task's outputs in a table."""
    return [f"{'value' if task.kind == 'regression' else 'probability'}_{name}" for name in task.names]


def write_tables(folder: Path, sets: Sequence[Scored], adapted: Adapted, task: Task) -> None:
    """Write predictions, metrics, choices of a probe, and what failed."""
    is_single = len(task.names) == 1 or task.kind == "multiclass"
    labels, outputs = ["label"] if is_single else [f"label_{name}" for name in task.names], output_names(task)
    rows: list[dict[str, Any]] = []
    for one in sets:
        values = np.asarray(predict_values(jnp.asarray(one.logits), task))
        for number, path in enumerate(one.cohort.paths):
            row = {"path": path, "subject": one.cohort.subjects[number], "set": one.name, "group": one.group}
            row |= dict(zip(labels, one.cohort.cells[number], strict=True))
            rows.append(row | {name: f"{value:.9g}" for name, value in zip(outputs, values[number], strict=True)})
    write_table(folder / "predictions.csv", ["path", "subject", "set", "group", *labels, *outputs], rows)
    metrics = [
        {"set": one.name, "group": one.group, "label": found.label, "measure": found.measure,
         "estimate": found.interval.estimate, "low": finite(found.interval.low), "high": finite(found.interval.high),
         "undefined": found.interval.num_undefined, "records": found.records, "subjects": found.subjects}
        for one in sets for found in one.scores
    ]  # fmt: skip
    write_table(folder / "metrics.csv", METRIC_COLUMNS, metrics)
    if adapted.choices:
        write_table(folder / "probe.csv", list(adapted.choices[0]), adapted.choices)
    failed = [{"path": path, "set": one.name, "reason": reason} for one in sets for path, reason in one.failed]
    if failed:
        write_table(folder / "failed.csv", FAILED_COLUMNS, failed)


def finite(value: float) -> float | None:
    """Return an end of an interval, None where there is none."""
    return value if math.isfinite(value) else None

"""Encoders compared: encoder x way of adapting x share of labels x seed, scored here and on sets never trained on.

A cell is one adaptation. All cells of one encoder and way share a compiled program (`adapt_program`), every finished
cell is stored, and cells may be dealt to several processes.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.task import Task, predict_values
from jaxmed.config import checked, to_record
from jaxmed.data.cohort import Cohort
from jaxmed.data.inputs import PreparedField, input_source
from jaxmed.data.records import LabelledSource, Source, SubsetSource
from jaxmed.errors import InputError
from jaxmed.files import expand_home
from jaxmed.io.tables import write_table
from jaxmed.metrics import classification
from jaxmed.metrics.cohort import HEADLINE, error_statistics, spell
from jaxmed.recipes.adapt import FITTED, Mode, adapt, check_run, score
from jaxmed.recipes.adapt_program import Augment
from jaxmed.recipes.adapt_stage import LabelledConfig, Start, balanced, check_heads, labelled_sources, read_sets
from jaxmed.recipes.efficiency import StudyConfig, check_all, draw_fractions, recipe_of, refuse_covariates
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, Result, make_cells, read_study, run_study
from jaxmed.recipes.study_sections import difference_table, failed_cells, mean_curves, mean_table
from jaxmed.recipes.study_tables import Mean, compare, summarise, write_tables
from jaxmed.recipes.subject_scores import Predicted, by_subject
from jaxmed.recipes.training import NO_PREFIX, TrainData
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, remove, start

COST_COLUMNS = ("encoder", "mode", "parameters", "trained_parameters", "input", "tokens")


@dataclasses.dataclass(frozen=True)
@checked
class EncodersConfig:
    """What is compared, beside shares of labels and seeds.

    Attributes:
        encoders: NAME=PLACE of weights, or NAME=random for the encoder's sizes with random weights; differences are
            from the first one.
        modes: Ways of adapting; see --mode of adapt.
    """

    encoders: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("full", "logistic")

    def __post_init__(self) -> None:
        names = [word.partition("=")[0] for word in self.encoders]
        for word in self.encoders:
            name, mark, place = word.partition("=")
            if not (name and mark and place):
                raise ValueError(f"encoders: expected NAME=PLACE or NAME=random, found '{word}'")
        if len(set(names)) < len(names):
            raise ValueError(f"encoders: expected each name once, found {' '.join(names)}")
        # The places are part of words, so nobody else makes them absolute.
        words = [word.partition("=") for word in self.encoders]
        whole = (f"{name}={place if place == 'random' else expand_home(place).absolute()}" for name, _, place in words)
        object.__setattr__(self, "encoders", tuple(whole))
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes: expected one or more, each once, found {' '.join(self.modes) or 'none'}")

    @property
    def places(self) -> dict[str, Path | None]:
        """Weights of each encoder by name; None for random ones."""
        words = [word.partition("=") for word in self.encoders]
        return {name: None if place == "random" else Path(place) for name, _, place in words}


# The type of a stage's field: on the command line its options carry no prefix.
EncodersFlags: TypeAlias = Annotated[EncodersConfig, NO_PREFIX]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a comparison found; every cell is in outputs/cells.csv.

    Attributes:
        task: What was learnt.
        metric: By which cells are compared.
        encoders: Names, the reference first.
        modes: Ways of adapting.
        sets: What was scored: "test" and external sets.
        records: Scans of each split.
        cells: Their number.
        failed: Of them.
        seeds: Seeds of the cells.
        fractions: Shares of labels.
        notes: What a user should know.
    """

    task: Task
    metric: str
    encoders: tuple[str, ...]
    modes: tuple[str, ...]
    sets: tuple[str, ...]
    records: dict[str, int]
    cells: int
    failed: int
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    notes: tuple[str, ...]


class _Data(NamedTuple):
    """Records prepared for one encoder, to be augmented and as they are, and the sets to score with whose they are."""

    training: Source
    source: Source
    scored: dict[str, tuple[Source, Cohort]]
    transform: PreparedField


def run_encoder_study(
    config: Any,
    labelled: LabelledConfig,
    encoders: EncodersConfig,
    study: StudyConfig,
    find_start: Callable[[LabelledConfig, str, Task], Start],
    page: Callable[[Finished[Any, Summary]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
    augment: Augment | None = None,
) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed.

    Args:
        config: Configuration of the stage, with a field `study`.
        labelled: What all cells share, synthetic data written where they were asked for.
        encoders: What is compared.
        study: Shares of labels and repetitions.
        find_start: The system's: from labels with the weights of an encoder, its name and the task to where it starts.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
        augment: What happens to training images.
    """
    clock = Clock()
    record = to_record(config)
    record["study"] |= {"processes": None, "process": None}
    refuse_covariates(labelled)
    sets = read_sets(labelled)
    if len(encoders.encoders) < 2:
        found = len(encoders.encoders) or "none"
        raise InputError("encoders", "two or more to compare, NAME=PLACE", found, "or try --preset smoke")
    task, cohort = sets.meaning.task, sets.cohort
    rows = {split: cohort.rows(split) for split in ("train", "validation", "test")}
    if not len(rows["test"]):
        raise InputError(sets.table.path, "scans with split 'test', on which every cell is scored", "none")
    test = cohort.take(rows["test"])
    score_values(task, test, _even(task, len(test.scans)))  # refuses a test split without one of the classes
    scorable = [name for name, _, other in sets.externals if _can_score(task, other)]
    unscored = [f"{name}: not scored, it lacks a class" for name, *_ in sets.externals if name not in scorable]
    firsts = {
        (name, mode): find_start(_adapting(labelled, place, mode), name, task)
        for name, place in encoders.places.items() for mode in encoders.modes
    }  # fmt: skip
    for (_, mode), first in firsts.items():
        recipe = dataclasses.replace(labelled.adapt, mode=mode)
        check_run(recipe, first.encoder, first.head, task)
        check_heads(recipe, first)
    unexpected = check_all(labelled, sets, firsts.values())
    train = labelled.adapt.train
    seeds = tuple(range(train.seed, train.seed + study.seeds))
    draws = draw_fractions(sets, rows["train"], study.fractions, seeds)
    start(folder, is_shared=study.processes > 1)
    told = [*notes, *sets.notes, *unscored, *(f"{name}: {note}" for (name, mode), first in firsts.items()
                                   if mode == encoders.modes[0] for note in first.notes), *unexpected]  # fmt: skip
    log = begin(folder, told)
    cells = make_cells(
        {"mode": encoders.modes, "arm": tuple(encoders.places), "fraction": study.fractions, "seed": seeds}
    )
    prepared: dict[Any, _Data] = {}
    for first in firsts.values():
        if first.preprocess not in prepared:
            is_augmented = (first.augment or augment) is not None
            place = labelled.data.cache or folder.path / "inputs" / "prepared"
            pair = labelled_sources(cohort, first, is_augmented, "full", place, sets.store)
            prepared[first.preprocess] = _prepare(*pair, cohort, rows["test"], sets.externals, first, place)
    largest = max(firsts.values(), key=lambda first: first.encoder.width)
    shapes = check_run(labelled.adapt, largest.encoder, largest.head, task)
    announce(log, "Adapting", params=shapes, count=len(cells), unit="cells", smaller=folder.smaller)
    clock.lap("read and check")

    def run_cell(cell: Cell) -> Outcome:
        mode: Any = cell["mode"]
        first = firsts[str(cell["arm"]), mode]
        data, seed = prepared[first.preprocess], int(cell["seed"])
        own = rows["train"][draws[seed][float(cell["fraction"])]]
        taught = data.source if mode in FITTED else data.training
        base = balanced(dataclasses.replace(labelled.adapt, mode=mode), labelled, cohort.targets[own], task)
        recipe = recipe_of(base, study.budget, seed, len(own), len(rows["train"]))
        training, validation = SubsetSource(taught, own), SubsetSource(data.source, rows["validation"])
        nested = open_run(
            folder.record["system"], "compare cell", recipe, RunOptions(folder.checkpoints / cell.slug, quiet=True)
        )
        start(nested)
        began = time.monotonic()
        adapted = adapt(
            recipe, first.encoder, first.head, task, TrainData(training, validation, data.transform), folder=nested,
            log=Log(nested.path, quiet=True), augment=first.augment or augment, start=first.params,
        )  # fmt: skip
        found: dict[str, float] = {"records": len(own), "step": adapted.step, "seconds": time.monotonic() - began}
        effort = adapted.effort
        found |= {"trained_parameters": effort.trained_parameters, "operations": effort.operations}
        if effort.seconds_to_best is not None:
            found["seconds_to_best"] = effort.seconds_to_best
        subjects: list[dict[str, Any]] = []
        for name, (source, those) in data.scored.items():
            logits = score(recipe, first.encoder, adapted.head, adapted.params, source, data.transform)
            given = Predicted(name, those, logits)
            given = by_subject(task, given) if labelled.average == "subject" else given
            values = np.asarray(predict_values(jnp.asarray(given.logits, jnp.float32), task))
            if name == "test" or name in scorable:
                scores = score_values(task, given.cohort, values, labelled.threshold)
                found |= {
                    f"{'' if name == 'test' else f'{name} '}{measure}": score for measure, score in scores.items()
                }
            if name == "test":
                subjects = [
                    {"subject": subject, "label": "/".join(cells),
                     **{f"output {label}": float(value) for label, value in zip(task.names, row, strict=True)}}
                    for subject, cells, row in zip(given.cohort.subjects, given.cohort.cells, values, strict=True)
                ]  # fmt: skip
        remove(nested)  # checkpoints of a finished cell serve nobody
        return Outcome(found, subjects)

    done = run_study(
        cells, run_cell, folder.path, record, process_index=study.process, process_count=study.processes, log=log
    )
    clock.lap("run the cells of this part")
    if len(done.results) + len(done.failures) < len(cells):
        log.say("Other parts of this study are not finished yet: the last one to end writes the report.")
        return done.exit_code
    metric = HEADLINE[task.kind]
    if done.results:
        means = summarise(done.results, ("mode", "arm", "fraction"), metric)
        tests = compare_encoders(done.results, metric, next(iter(encoders.places)))
        write_tables(folder.outputs, done.results, means, tests)
        write_table(folder.outputs / "costs.csv", COST_COLUMNS, _costs(firsts, done.results))
        for line in _words(means, metric, study.seeds):
            log.say(line)
    names = ("test", *scorable)
    summary = Summary(
        task, metric, tuple(encoders.places), encoders.modes, names,
        {split: len(index) for split, index in rows.items()}, len(cells), len(done.failures), seeds, study.fractions,
        tuple(told),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return done.exit_code


def _adapting(labelled: LabelledConfig, weights: Path | None, mode: Any) -> LabelledConfig:
    return dataclasses.replace(labelled, weights=weights, adapt=dataclasses.replace(labelled.adapt, mode=mode))


def _prepare(
    training: Source,
    source: Source,
    cohort: Cohort,
    test: np.ndarray,
    externals: Sequence[tuple[str, str, Cohort]],
    first: Start,
    cache: Path,
) -> _Data:
    scored: dict[str, tuple[Source, Cohort]] = {"test": (SubsetSource(source, test), cohort.take(test))}
    for name, _, other in externals:
        scored[name] = (LabelledSource(input_source(other.scans, first.preprocess, cache), other.targets), other)
    return _Data(training, source, scored, PreparedField(first.preprocess))


def score_values(
    task: Task, cohort: Cohort, values: Float[np.ndarray, "record output"], threshold: float = 0.5
) -> dict[str, float]:
    """Return the measures of one set, without intervals: the spread over seeds is the study's.

    Args:
        task: What the outputs mean.
        cohort: Whose they are.
        values: Probabilities, or values in the unit of the labels.
        threshold: Probability from which a binary label counts as predicted.

    Raises:
        InputError: The set lacks a class, or a label.
    """
    if task.kind == "regression":
        ones = np.ones((1, len(values)))
        found = error_statistics(cohort.targets[:, 0], values[:, 0])
        return {name: float(statistic(ones)[0]) for name, statistic in found.items()}
    if not np.isfinite(cohort.targets).all():
        raise InputError("labels", "one for every output of each scored scan", "empty ones", "adapt scores such sets")
    labels = cohort.targets if task.kind == "multilabel" else cohort.targets[:, 0]
    scores = values[:, 0] if task.kind == "binary" else values
    return classification.score(labels.astype(int), scores.astype(np.float64), task.kind, threshold=threshold)


def _even(task: Task, count: int) -> np.ndarray:
    return np.full((count, len(task.names)), 1 / max(len(task.names), 2))


def _can_score(task: Task, cohort: Cohort) -> bool:
    try:
        score_values(task, cohort, _even(task, len(cohort.scans)))
    except InputError:
        return False
    return True


def compare_encoders(results: Sequence[Result], metric: str, reference: str) -> tuple[Any, ...]:
    """Compare every encoder with the reference, at each way of adapting and share of labels, over seeds."""
    return compare(results, ("mode", "fraction"), reference, metric, correction="holm")


def _costs(firsts: Mapping[tuple[str, Any], Start], results: Sequence[Result]) -> list[dict[str, object]]:
    """Return what adapting costs: parameters that are trained, and the size of the input."""
    trained = {
        (str(result.cell["arm"]), str(result.cell["mode"])): int(result.metrics["trained_parameters"])
        for result in results
    }
    found = []
    for (name, mode), first in firsts.items():
        shapes = jax.eval_shape(first.encoder.init, jax.random.key(0))
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        size = " x ".join(map(str, first.encoder.image_size))
        tokens = first.encoder.num_places + first.encoder.prefix
        row = (name, mode, count, trained.get((name, mode)), size, tokens)
        found.append(dict(zip(COST_COLUMNS, row, strict=True)))
    return found


def _words(means: Sequence[Mean], metric: str, seeds: int) -> list[str]:
    lines = [f"{spell(metric)} on test scans, mean of {seeds} seeds"]
    for row in means:
        group = dict(row.group)
        lines.append(f"{group['mode']:>12} {group['fraction']:>6.0%}  {group['arm']}: {row.mean:.3f}")
    return lines


# The page ------------------------------------------------------------------------------------------------------------


def encoder_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show a comparison of encoders.

    Args:
        run: The run.
        title: System and stage.
        source: Whose models they are, and what they are not for.
    """
    summary = run.summary
    study = read_study(run.path)
    results = study.results
    sections: list[Section] = []
    if results:
        sections += [_curves_section(results, summary), _tests_section(results, summary)]
        sections += _external_sections(results, summary)
        sections.append(_costs_section(run.outputs, results, summary))
    sections.append(Section("What was done", [Note(text) for text in summary.notes]))
    subtitle = f"{', '.join(summary.encoders)} on {', '.join(summary.task.names)} ({summary.task.kind})"
    return Page(
        title, f"{subtitle}, {summary.records['train']:,} training images", _tiles(results, summary),
        [*sections, *failed_cells(study.failures), _reading_section(summary, source)],
    )  # fmt: skip


def _tiles(results: Sequence[Result], summary: Summary) -> list[Tile]:
    tiles: list[Tile] = []
    if results:
        most = max(summary.fractions)
        means = [row for row in summarise(results, ("mode", "arm", "fraction"), summary.metric)
                 if dict(row.group)["fraction"] == most]  # fmt: skip
        for row in sorted(means, key=lambda row: -row.mean)[:4]:
            group = dict(row.group)
            tiles.append((spell(summary.metric), round(row.mean, 3), f"{group['arm']}, {group['mode']}, {most:.0%}"))
    return [*tiles, ("Cells", summary.cells, f"{summary.failed} failed")]


def _of_mode(results: Sequence[Result], mode: str) -> list[Result]:
    return [result for result in results if result.cell["mode"] == mode]


def _curves_section(results: Sequence[Result], summary: Summary) -> Section:
    name, blocks = spell(summary.metric), []
    for mode in summary.modes:
        means = summarise(_of_mode(results, mode), ("arm", "fraction"), summary.metric)
        caption = f"{mode}: {name} on test images by share of labelled training subjects; mean of seeds, 95 % interval."
        if len(summary.fractions) > 1:
            blocks.append(
                mean_curves(means, x="fraction", ylabel=name, xlabel="share of labels", log_x=True, caption=caption)
            )
        blocks.append(mean_table(means, f"{mode}: mean of seeds with Student's 95 % interval."))
    return Section("Labels", blocks)


def _tests_section(results: Sequence[Result], summary: Summary) -> Section:
    tests = compare_encoders(results, summary.metric, summary.encoders[0])
    caption = f"Against {summary.encoders[0]}: paired two-sided t-tests over seeds, corrected by Holm."
    return Section("Which is better", [difference_table(tests, caption)])


def _external_sections(results: Sequence[Result], summary: Summary) -> list[Section]:
    blocks = []
    for name in summary.sets[1:]:
        means = summarise(results, ("mode", "arm", "fraction"), f"{name} {summary.metric}")
        blocks.append(mean_table(means, f"{name}: never trained on, scored by what was fitted to the training images."))
    return [Section("Elsewhere", blocks)] if blocks else []


def _costs_section(outputs: Path, results: Sequence[Result], summary: Summary) -> Section:
    most = max(summary.fractions)
    full = [result for result in results if result.cell["fraction"] == most]
    rows = []
    for mode in summary.modes:
        for row in summarise(_of_mode(full, mode), ("arm",), "seconds"):
            arm = str(dict(row.group)["arm"])
            own = [r for r in _of_mode(full, mode) if r.cell["arm"] == arm]
            mean = float(np.mean([r.metrics[summary.metric] for r in own]))
            rows.append((arm, mode, int(own[0].metrics["trained_parameters"]), round(row.mean, 2), round(mean, 4)))
    columns = ("Encoder", "Adapted by", "Trained parameters", "Seconds", spell(summary.metric))
    caption = f"With {most:.0%} of the labels, mean of seeds; seconds hold compilation in the first cell of a kind."
    return Section("What adapting costs", [Table(columns, rows, caption)])


def _reading_section(summary: Summary, source: str) -> Section:
    return Section(
        "How to read this",
        [
            Text(
                [
                    "Every cell is the same recipe with the same labels, order and seed for all encoders; validation "
                    "images select, test images and external sets are only scored. Fractions are nested and drawn by "
                    "subject.",
                    "An interval over seeds tells how much a repetition differs, not how other patients would. "
                    + source,
                ]
            )
        ],
    )

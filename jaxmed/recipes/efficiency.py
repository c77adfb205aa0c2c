"""A study of label and training efficiency: pre-trained against from scratch, by share of labels and seed."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxmed.arrays.task import Task, predict_values, standardise
from jaxmed.config import Count, Fraction, checked, to_record
from jaxmed.data.cohort import LabelledSets
from jaxmed.data.inputs import PreparedField, check_scans
from jaxmed.data.records import SubsetSource
from jaxmed.data.splits import label_fractions
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.cohort import spell
from jaxmed.metrics.convergence import Curve, reach_table, read_curve, smallest_matching
from jaxmed.recipes.adapt import FITTED, AdaptConfig, adapt, check_run, loss_weights, score
from jaxmed.recipes.adapt_program import Augment
from jaxmed.recipes.adapt_scoring import measure
from jaxmed.recipes.adapt_stage import LabelledConfig, Start, balanced, labelled_sources, read_sets
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.study import Cell, Outcome, Result, make_cells, read_study, run_study
from jaxmed.recipes.study_sections import difference_table, failed_cells, mean_curves, mean_table
from jaxmed.recipes.study_tables import compare, summarise, write_tables
from jaxmed.recipes.subject_scores import Predicted, by_subject
from jaxmed.recipes.training import NO_PREFIX, TrainData
from jaxmed.report.figures import Band, curves
from jaxmed.report.page import Figure, Note, Section, Table, Text, Tile
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, remove, start

ARMS = ("pretrained", "scratch")
CURVE_COLUMNS = ("epoch", "seconds", "value")


@dataclasses.dataclass(frozen=True)
@checked
class StudyConfig:
    """What is varied.

    Attributes:
        fractions: Shares of the training subjects whose labels are used: nested, every class at its own share. All
            validation scans select, whatever the fraction.
        seeds: Repetitions of every cell, from `seed` on: which subjects, parameters, order, augmentation.
        budget: "epochs" passes as often over few scans as over all, so that few labels mean few steps, as in
            TANGERINE's recipe; "steps" gives every fraction the steps that all scans have.
        processes: Parts into which the cells are dealt, for as many commands with `process` 0, 1, ... on one folder.
        process: Which part is this command's.
    """

    fractions: tuple[Fraction, ...] = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    seeds: Count = 5
    budget: Literal["epochs", "steps"] = "epochs"
    processes: Count = 1
    process: int = 0

    def __post_init__(self) -> None:
        if not self.fractions:
            raise ValueError("fractions: expected one or more, found none")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process: expected 0 to {self.processes - 1}, found {self.process}")


# The type of a stage's field `study`: on the command line its options carry no prefix.
StudyFlags: TypeAlias = Annotated[StudyConfig, NO_PREFIX]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a study found; every cell is in outputs/cells.csv.

    Attributes:
        task: What was learnt.
        metric: By which cells are compared.
        records: Scans of each split.
        cells: Their number.
        failed: Of them.
        seeds: Seeds of the cells.
        fractions: Shares of labels.
        budget: As of `StudyConfig`.
        smallest_matching_fraction: Share of labels with which pre-trained is as good as from scratch with all; None
            where there is none.
        notes: What a user should know.
    """

    task: Task
    metric: str
    records: dict[str, int]
    cells: int
    failed: int
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    budget: str
    smallest_matching_fraction: float | None
    notes: tuple[str, ...]


def require_steps(labelled: LabelledConfig) -> None:
    """Refuse a probe, which has no steps to compare.

    Raises:
        ValueError: It is one.
    """
    if labelled.adapt.mode in FITTED:
        raise ValueError(f"mode: expected full or frozen, which learn step by step, found {labelled.adapt.mode}")


def run_efficiency(
    config: Any,
    labelled: LabelledConfig,
    study: StudyConfig,
    find_start: Callable[[Task], Start],
    page: Callable[[Finished[Any, Summary]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
    augment: Augment | None = None,
) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed.

    Args:
        config: Configuration of the stage, with a field `study`.
        labelled: Its part that all systems share, synthetic data written where they were asked for.
        study: What is varied.
        find_start: The system's: from a task to weights, encoder and preprocessing.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
        augment: What happens to training images.
    """
    clock = Clock()
    record = to_record(config)
    record["study"] |= {"processes": None, "process": None}
    sets = read_sets(labelled)
    task, cohort = sets.meaning.task, sets.cohort
    metric, kind = ("loss", "value") if task.kind == "regression" else ("auroc", "probability")
    refuse_covariates(labelled)
    if labelled.weights is None:
        raise InputError("weights", "pre-trained weights to compare with random ones", "none", "or --preset smoke")
    first = find_start(task)
    rows = {split: cohort.rows(split) for split in ("train", "validation", "test")}
    if not len(rows["test"]):
        raise InputError(sets.table.path, "scans with split 'test', on which every cell is scored", "none")
    unexpected = check_all(labelled, sets, [first])
    train = labelled.adapt.train
    seeds = tuple(range(train.seed, train.seed + study.seeds))
    draws = draw_fractions(sets, rows["train"], study.fractions, seeds)
    start(folder, is_shared=study.processes > 1)
    told = [*notes, *sets.notes, *first.notes, *unexpected]
    log = begin(folder, told)
    cells = make_cells({"arm": ARMS, "fraction": study.fractions, "seed": seeds})
    cache = labelled.data.cache or folder.path / "inputs" / "volumes"
    whole, source = labelled_sources(cohort, first, augment is not None, labelled.adapt.mode, cache, sets.store)
    validation, test = (SubsetSource(source, rows[split]) for split in ("validation", "test"))
    transform = PreparedField(first.preprocess)
    shapes = check_run(labelled.adapt, first.encoder, first.head, task)
    announce(log, "Training", params=shapes, count=len(cells), unit="cells", smaller=folder.smaller)
    clock.lap("read and check")

    def run_cell(cell: Cell) -> Outcome:
        fraction, seed = float(cell["fraction"]), int(cell["seed"])
        training = SubsetSource(whole, rows["train"][draws[seed][fraction]])
        own = rows["train"][draws[seed][fraction]]
        recipe = balanced(labelled.adapt, labelled, cohort.targets[own], task)
        recipe = recipe_of(recipe, study.budget, seed, len(training), len(rows["train"]))
        nested = open_run(
            folder.record["system"], "efficiency cell", recipe, RunOptions(folder.checkpoints / cell.slug, quiet=True)
        )
        start(nested)
        adapted = adapt(
            recipe, first.encoder, first.head, task, TrainData(training, validation, transform), folder=nested,
            log=Log(nested.path, quiet=True), augment=augment,
            start=first.params if cell["arm"] == "pretrained" else None,
        )  # fmt: skip
        logits = score(recipe, first.encoder, adapted.head, adapted.params, test, transform)
        tested = Predicted("test", cohort.take(rows["test"]), logits)
        tested = by_subject(task, tested) if labelled.average == "subject" else tested
        targets = standardise(tested.cohort.targets, task)
        found = measure(task, tested.logits, targets, loss_weights(recipe, task))
        curve = read_curve(adapted.history, metric, len(training) / train.loader.batch_size)
        curve_rows: list[dict[str, object]] = [
            dict(zip(CURVE_COLUMNS, row, strict=True)) for row in zip(*curve, strict=True)
        ]
        write_table(folder.outputs / "curves" / f"{cell.slug}.csv", CURVE_COLUMNS, curve_rows)
        values = np.asarray(predict_values(jnp.asarray(tested.logits, jnp.float32), task))
        subjects = [
            {"subject": subject, "label": "/".join(cells),
             **{f"{kind} of {name}": float(value) for name, value in zip(task.names, row, strict=True)}}
            for subject, cells, row in zip(tested.cohort.subjects, tested.cohort.cells, values, strict=True)
        ]  # fmt: skip
        remove(nested)  # checkpoints of a finished cell serve nobody
        best = -curve.best if metric == "loss" else curve.best
        return Outcome({**found, "validation": best, "records": len(training), "step": adapted.step}, subjects)

    done = run_study(
        cells, run_cell, folder.path, record, process_index=study.process, process_count=study.processes, log=log
    )
    clock.lap("run the cells of this part")
    if len(done.results) + len(done.failures) < len(cells):
        log.say("Other parts of this study are not finished yet: the last one to end writes the report.")
        return done.exit_code
    enough = None
    if done.results:
        enough, words = write_results(folder.outputs, done.results, metric, study.fractions, study.seeds)
        for line in words:
            log.say(line)
    summary = Summary(
        task, metric, {split: len(index) for split, index in rows.items()}, len(cells), len(done.failures), seeds,
        study.fractions, study.budget, enough, tuple(told),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return done.exit_code


def refuse_covariates(labelled: LabelledConfig) -> None:
    """Refuse columns that a study does not score.

    Raises:
        InputError: There are some.
    """
    if labelled.data.covariates:
        found = ", ".join(labelled.data.covariates)
        raise InputError("data.covariates", "none in a study of labels", found, "adapt scores them")


def write_results(
    folder: Path, results: Sequence[Result], metric: str, fractions: Sequence[float], seeds: int
) -> tuple[float | None, list[str]]:
    """Write the study's tables; return the smallest matching fraction, and the findings in words."""
    means = summarise(results, ("arm", "fraction"), metric)
    tests = compare(results, ("fraction",), "scratch", metric, correction="bonferroni")
    write_tables(folder, results, means, tests)
    curves = {
        (str(r.cell["arm"]), float(r.cell["fraction"]), int(r.cell["seed"])): _read_curve(folder, r.cell)
        for r in results
    }
    if metric == "auroc" and (reached := reach_table(curves, "scratch")):
        write_table(folder / "convergence.csv", list(reached[0]), reached)
    table = {(str(dict(m.group)["arm"]), float(dict(m.group)["fraction"])): m.mean for m in means}
    sign, enough = (-1 if metric == "loss" else 1), None
    if {arm for arm, _ in table} == set(ARMS) and 1.0 in fractions:
        enough = smallest_matching({key: sign * mean for key, mean in table.items()}, *ARMS)
    words = [f"{spell(metric)} on test scans, mean of {seeds} seeds", f"{'labels':>10}  {'pretrained':>10}  scratch"]
    for fraction in fractions:
        found = [table.get((arm, fraction)) for arm in ARMS]
        shown = ["-" if value is None else f"{value:.3f}" for value in found]
        words.append(f"{fraction:>10.0%}  {shown[0]:>10}  {shown[1]}")
    if enough is not None:
        words.append(f"Pre-trained with {enough:.0%} of the labels is as good as from scratch with all.")
    return enough, words


def check_all(labelled: LabelledConfig, sets: LabelledSets, firsts: Collection[Start]) -> list[str]:
    """Look at the scans of a study before it starts, external ones too; return what is unexpected about them.

    Raises:
        InputError: One is broken.
    """
    threads = labelled.adapt.train.loader.num_threads
    ways = dict.fromkeys(first.preprocess for first in firsts)
    others = [scan for *_, other in sets.externals for scan in other.scans]
    # What is in a store was looked at when it was packed.
    is_stored = {way: sets.store is not None and sets.store.rows(sets.cohort.scans, way) is not None for way in ways}
    scans = {way: [*(() if is_stored[way] else sets.cohort.scans), *others] for way in ways}
    notes = (check_scans(found, way, labelled.data.check, threads) for way, found in scans.items() if found)
    return list(dict.fromkeys(note for found in notes for note in found))


def draw_fractions(
    sets: LabelledSets, train: np.ndarray, fractions: Sequence[float], seeds: Sequence[int]
) -> dict[int, Mapping[float, Any]]:
    """Return, per seed and fraction, places among the training scans."""
    subjects = [str(sets.cohort.subjects[row]) for row in train]
    is_many = sets.meaning.task.kind == "regression"
    labels = ["" if is_many else "/".join(sets.cohort.cells[row]) for row in train]
    return {seed: label_fractions(subjects, labels, fractions, seed) for seed in seeds}


def recipe_of(config: AdaptConfig, budget: str, seed: int, records: int, all_records: int) -> AdaptConfig:
    """Return the recipe of a cell; with a budget of steps, epochs are stretched to as many steps as all scans have."""
    train = dataclasses.replace(config.train, seed=seed)
    if budget == "epochs" or records == all_records:
        return dataclasses.replace(config, train=train)
    factor = all_records / records
    train = dataclasses.replace(train, epochs=train.epochs * factor, warmup_epochs=train.warmup_epochs * factor)
    return dataclasses.replace(config, train=train, evaluate_epochs=config.evaluate_epochs * factor)


def _read_curve(folder: Path, cell: Cell) -> Curve:
    table = read_table(folder / "curves" / f"{cell.slug}.csv", required=CURVE_COLUMNS)
    return Curve(*(np.array(table.floats(name), np.float64) for name in CURVE_COLUMNS))


# The page ------------------------------------------------------------------------------------------------------------


def efficiency_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show a study.

    Args:
        run: The run.
        title: System and stage.
        source: Whose model it is, and what it is not for.
    """
    summary = run.summary
    study = read_study(run.path)
    results = study.results
    sections = [Section("What was done", [Note(text) for text in summary.notes])]
    if results:
        sections = [_scores_section(results, summary), *_convergence_section(run.outputs, results, summary), *sections]
    subtitle = f"Pre-trained against from scratch: {', '.join(summary.task.names)} ({summary.task.kind})"
    return Page(
        title, f"{subtitle}, {summary.records['train']:,} training scans", _tiles(results, summary),
        [*sections, *failed_cells(study.failures), _reading_section(source, summary)],
    )  # fmt: skip


def _tiles(results: Any, summary: Summary) -> list[Tile]:
    tiles: list[Tile] = []
    if results:
        means = {
            tuple(dict(row.group).values()): row for row in summarise(results, ("arm", "fraction"), summary.metric)
        }
        smallest = min(summary.fractions)
        for arm in ARMS:
            row = means.get((arm, smallest))
            if row is not None:
                words = f"{arm}, {smallest:.0%} of the labels, mean of {row.count} seeds"
                tiles.append((spell(summary.metric), round(row.mean, 3), words))
        if summary.smallest_matching_fraction is not None:
            share = summary.smallest_matching_fraction
            tiles.append(("Labels", f"{share:.0%}", "that pre-trained needs to match scratch with all"))
    tiles.append(("Cells", summary.cells, f"{summary.failed} failed"))
    return tiles


def _scores_section(results: Any, summary: Summary) -> Section:
    metric, name = summary.metric, spell(summary.metric)
    means = summarise(results, ("arm", "fraction"), metric)
    caption = f"{name} on test scans against the share of labelled training subjects: mean of seeds, 95 % interval."
    blocks: list[Any] = []
    if len(summary.fractions) > 1:
        blocks.append(
            mean_curves(means, x="fraction", ylabel=name, xlabel="share of labels", log_x=True, caption=caption)
        )
    blocks.append(mean_table(means, f"{name}: mean of seeds with Student's 95 % interval."))
    if {result.cell["arm"] for result in results} == set(ARMS):
        tests = compare(results, ("fraction",), "scratch", metric, correction="bonferroni")
        blocks.append(difference_table(tests, "Paired two-sided t-tests over seeds, corrected by Bonferroni."))
    return Section("Labels", blocks)


def _convergence_section(outputs: Path, results: Any, summary: Summary) -> list[Section]:
    blocks: list[Any] = []
    for fraction in sorted({min(summary.fractions), max(summary.fractions)}):
        figure = _curves_of(outputs, results, summary, fraction)
        if figure is not None:
            blocks.append(figure)
    path = outputs / "convergence.csv"
    if path.exists():
        table = read_table(path)
        columns = [name for name in table.columns if name != "seed"]
        rows = _averaged(table, columns)
        headings = [name.replace("_", " ") for name in columns] + ["seeds that reach 99%"]
        blocks.append(
            Table(headings, rows, "Until 95 % and 99 % of the best validation AUROC of the model from scratch with the "
                  "same labels and seed: mean over the seeds that reach it. Seconds are those of training.")
        )  # fmt: skip
    return [Section("Convergence", blocks)] if blocks else []


def _averaged(table: Any, columns: list[str]) -> list[list[object]]:
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in table.rows:
        groups.setdefault((row["arm"], row["fraction"]), []).append(row)
    found = []
    for (arm, fraction), rows in groups.items():
        means: list[object] = []
        for name in columns[2:]:
            values = [float(row[name]) for row in rows if row[name]]
            means.append(float(np.mean(values)) if values else None)
        reached = sum(bool(row["epochs_to_99%"]) for row in rows)
        found.append([arm, float(fraction), *means, f"{reached} of {len(rows)}"])
    return found


def _curves_of(outputs: Path, results: Any, summary: Summary, fraction: float) -> Figure | None:
    bands = {}
    for arm in ARMS:
        cells = [r.cell for r in results if r.cell["arm"] == arm and r.cell["fraction"] == fraction]
        columns = [(curve.epochs, curve.values) for curve in (_read_curve(outputs, cell) for cell in cells)]
        if not columns or len({len(x) for x, _ in columns}) > 1 or len(columns[0][0]) < 2:
            continue
        values = np.stack([y for _, y in columns])
        bands[arm] = Band(columns[0][0], values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    if not bands:
        return None
    name = spell(summary.metric)
    caption = f"{name} on validation scans while training with {fraction:.0%} of the labels: mean and range of seeds."
    return curves(bands, xlabel="epochs", ylabel=name, caption=caption)


def _reading_section(source: str, summary: Summary) -> Section:
    budget = (
        "Every fraction had as many steps as all scans have."
        if summary.budget == "steps"
        else "Every fraction had as many epochs: few labels mean few steps."
    )
    return Section(
        "How to read this",
        [
            Text(
                [
                    "Both arms are the same model with the same recipe, labels, order and augmentation; one starts "
                    "from pre-trained weights, the other from random ones. Fractions are nested and drawn by subject, "
                    f"and all validation scans select the parameters. {budget}",
                    "An interval over seeds tells how much a repetition differs, not how other patients would. "
                    + source,
                ]
            )
        ],
    )

"""TANGERINE efficiency: how many labels and epochs a pre-trained model needs, against one from scratch."""

import dataclasses
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmed.arrays.task import predict_values
from jaxmed.config import Count, Number, checked, to_record
from jaxmed.data.cohort import LabelledSets
from jaxmed.data.inputs import PreparedField, input_source
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import LabelledSource, SubsetSource
from jaxmed.data.splits import label_fractions
from jaxmed.errors import InputError
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.adapt import AdaptConfig, Labelled, adapt, check_run, loss_weights, measure, score
from jaxmed.recipes.study import Cell, Outcome, make_cells, run_study
from jaxmed.recipes.study_tables import compare, summarise, write_tables
from jaxmed.systems.tangerine.convergence import Curve, reach_table, read_curve, smallest_matching
from jaxmed.systems.tangerine.efficiency_page import write_page
from jaxmed.systems.tangerine.stages import adapt as adapt_stage
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, remove, start, write_summary

ARMS = ("pretrained", "scratch")
CURVE_COLUMNS = ("epoch", "seconds", "value")
TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config(adapt_stage.Config):
    """A study of label and training efficiency; fields are those of adapt, and what follows.

    Attributes:
        fractions: Shares of the training subjects whose labels are used: nested, every class at its own share. All
            validation scans select, whatever the fraction.
        seeds: Repetitions of every cell, from `seed` on: which subjects, parameters, order, augmentation.
        budget: "epochs" passes as often over few scans as over all, so that few labels mean few steps, as in the
            paper's recipe; "steps" gives every fraction the steps that all scans have.
        processes: Parts into which the cells are dealt, for as many commands with `process` 0, 1, ... on one folder.
        process: Which part is this command's.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    seeds: Number = 5
    budget: Literal["epochs", "steps"] = "epochs"
    processes: Count = 1
    process: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions: expected shares above 0 and up to 1, found {self.fractions}")
        if self.mode == "logistic":
            raise ValueError("mode: expected full or frozen, which learn step by step, found logistic")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected 1 or more, found {self.seeds}")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process: expected 0 to {self.processes - 1}, found {self.process}")


def paper() -> Config:
    """ViT-L at 256^3, six fractions, five seeds: 60 fine-tunings of the published weights, on accelerators."""
    return Config(encoder=dataclasses.replace(VitConfig(), remat=True, scan=True), dtype="bfloat16")


def laptop() -> Config:
    """A small model at 32^3, 10 % and all labels, three seeds, in minutes: on your scans, or on phantom chests."""
    return Config(
        data=adapt_stage.DataConfig(embedded=1000),
        image_size=(32, 32, 32),
        optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, weight_decay=0.05, layer_decay=0.75),
        epochs=8,
        warmup_epochs=0.5,
        evaluate_epochs=1,
        loader=LoaderConfig(batch_size=16),
        loop=LoopConfig(log_every=10, save_every=0),
        accumulation=1,
        select="auroc",
        fractions=(0.1, 1.0),
        seeds=3,
        budget="steps",
    )


def smoke() -> Config:
    """A tiny model at 32^3, two fractions, two seeds, in seconds: on your scans, or on phantom chests."""
    return dataclasses.replace(
        laptop(), data=adapt_stage.DataConfig(embedded=60), epochs=4, warmup_epochs=1, evaluate_epochs=2,
        loader=LoaderConfig(batch_size=12), fractions=(0.25, 1.0), seeds=2,
    )  # fmt: skip


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run every cell that is not finished, write tables and report. Returns 1 when cells failed."""
    began = time.monotonic()
    study = {**to_record(config), "processes": None, "process": None}
    is_embedded, notes = config.is_synthetic, []
    if is_embedded:
        config, notes = _make_embedded(config, folder)
    scans = adapt_stage.read_scans(config)
    task = scans.meaning.task
    metric, kind = ("loss", "value") if task.kind == "regression" else ("auroc", "probability")
    if config.weights is None:
        raise InputError("weights", "pre-trained weights to compare with random ones", "none", "or --preset smoke")
    first = adapt_stage.read_start(config, task)
    splits = scans.cohort.splits
    if "test" not in splits:
        raise InputError(scans.table.path, "scans with split 'test', on which every cell is scored", "none")
    rows = {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}
    draws = _draw_fractions(config, scans, rows["train"])
    start(folder, is_shared=config.processes > 1)
    log = Log(folder.path, folder.options.quiet, is_writer=jax.process_index() == 0)
    notes += [*scans.notes, *first.notes]
    for note in notes:
        log.say(f"Note: {note}")
    cells = make_cells({
        "arm": ARMS, "fraction": config.fractions, "seed": tuple(range(config.seed, config.seed + config.seeds)),
    })  # fmt: skip
    cache = config.data.cache or folder.path / "inputs" / "volumes"
    source = LabelledSource(input_source(scans.cohort.scans, first.preprocess, cache), scans.cohort.targets)
    transform = PreparedField(first.preprocess)
    shapes = check_run(config.recipe(config.class_weights), first.model, task)
    announce(log, "Training", params=shapes, count=len(cells), unit="cells", smaller=folder.smaller)
    ready = time.monotonic()

    def run_cell(cell: Cell) -> Outcome:
        fraction, seed = float(cell["fraction"]), int(cell["seed"])
        train = SubsetSource(source, rows["train"][draws[seed][fraction]])
        recipe = _recipe(config, seed, len(train), len(rows["train"]))
        nested = _nested(folder, cell, recipe)
        adapted = adapt(
            recipe, first.model, task, train, SubsetSource(source, rows["validation"]), transform, folder=nested,
            log=Log(nested.path, quiet=True), augment=config.augmentation if config.augmentation.active else None,
            start=first.params if cell["arm"] == "pretrained" else None,
        )  # fmt: skip
        test = SubsetSource(source, rows["test"])
        logits = score(recipe, adapted.config, adapted.params, test, transform)
        labelled = Labelled(transform, task, loss_weights(recipe, task))
        targets = np.stack([labelled({**test[row]}, np.random.default_rng(0))["target"] for row in range(len(test))])
        found = measure(task, logits, targets, loss_weights(recipe, task))
        curve = read_curve(adapted.history, metric, len(train) / config.loader.batch_size)
        _write_curve(folder.outputs / "curves" / f"{cell.slug}.csv", curve)
        values = np.asarray(predict_values(jax.numpy.asarray(logits), task))
        subjects = [
            {"subject": scans.cohort.subjects[row], "label": "/".join(scans.cohort.cells[row]),
             **{f"{kind} of {name}": float(value) for name, value in zip(task.names, values[place], strict=True)}}
            for place, row in enumerate(rows["test"])
        ]  # fmt: skip
        remove(nested)  # checkpoints of a finished cell serve nobody
        best = -curve.best if metric == "loss" else curve.best
        return Outcome({**found, "validation": best, "records": len(train), "step": adapted.step}, subjects)

    done = run_study(
        cells, run_cell, folder.path, study, process_index=config.process, process_count=config.processes, log=log
    )
    trained = time.monotonic()
    if len(done.results) + len(done.failures) < len(cells):
        log.say("Other parts of this study are not finished yet: the last one to end writes the report.")
        return done.exit_code
    summary = {
        "task": to_record(task), "metric": metric, "arms": list(ARMS), "notes": notes, "budget": config.budget,
        "records": {split: len(index) for split, index in rows.items()}, "failed": len(done.failures),
        "cells": len(cells), "seeds": config.seeds, "fractions": list(config.fractions),
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine efficiency --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "run the cells of this part": trained - ready},
    }  # fmt: skip
    if done.results:
        for line in write_results(folder.outputs, done.results, metric, summary):
            log.say(line)
    write_summary(folder, summary)
    write_page(folder.path)
    return done.exit_code


report = write_page


def write_results(folder: Path, results: Any, metric: str, summary: dict[str, Any]) -> list[str]:
    """Write the study's tables, add its findings to the summary, and return them in words."""
    means = summarise(results, ("arm", "fraction"), metric)
    tests = compare(results, "scratch", metric, correction="bonferroni")
    write_tables(folder, results, means, tests)
    curves = {
        (str(r.cell["arm"]), float(r.cell["fraction"]), int(r.cell["seed"])): _read_curve(
            folder / "curves" / f"{r.cell.slug}.csv"
        )
        for r in results
    }
    if metric == "auroc":
        reached = reach_table(curves, "scratch")
        if reached:
            write_table(folder / "convergence.csv", list(reached[0]), reached)
    table = {(str(dict(m.group)["arm"]), float(dict(m.group)["fraction"])): m.mean for m in means}
    sign = -1 if metric == "loss" else 1
    known = {arm for arm, _ in table}
    enough = None
    if known == set(ARMS) and 1.0 in summary["fractions"]:
        enough = smallest_matching({key: sign * mean for key, mean in table.items()}, *ARMS)
    summary["smallest_matching_fraction"] = enough
    name = "AUROC" if metric == "auroc" else "Loss"
    words = [f"{name} on test scans, mean of {summary['seeds']} seeds", f"{'labels':>10}  {'pretrained':>10}  scratch"]
    for fraction in summary["fractions"]:
        found = [table.get((arm, fraction)) for arm in ARMS]
        shown = ["-" if value is None else f"{value:.3f}" for value in found]
        words.append(f"{fraction:>10.0%}  {shown[0]:>10}  {shown[1]}")
    if enough is not None:
        words.append(f"Pre-trained with {enough:.0%} of the labels is as good as from scratch with all.")
    return words


def _make_embedded(config: Config, folder: RunFolder) -> tuple[Config, list[str]]:
    changed, notes = adapt_stage.make_embedded(config, folder, is_shared=config.processes > 1)
    data = dataclasses.replace(changed.data, external=())
    return dataclasses.replace(config, data=data, weights=changed.weights), notes


def _draw_fractions(config: Config, scans: LabelledSets, train: np.ndarray) -> dict[int, Mapping[float, Any]]:
    """Return, per seed and fraction, places among the training scans."""
    cohort = scans.cohort
    subjects = [str(cohort.subjects[row]) for row in train]
    is_many = scans.meaning.task.kind == "regression"
    labels = ["" if is_many else "/".join(cohort.cells[row]) for row in train]
    return {
        seed: label_fractions(subjects, labels, config.fractions, seed)
        for seed in range(config.seed, config.seed + config.seeds)
    }


def _recipe(config: Config, seed: int, records: int, all_records: int) -> AdaptConfig:
    """Return the recipe of a cell; with a budget of steps, epochs are stretched to as many steps as all scans have."""
    recipe = dataclasses.replace(config.recipe(config.class_weights), seed=seed)
    if config.budget == "epochs" or records == all_records:
        return recipe
    factor = all_records / records
    return dataclasses.replace(
        recipe, epochs=recipe.epochs * factor, warmup_epochs=recipe.warmup_epochs * factor,
        evaluate_epochs=recipe.evaluate_epochs * factor,
    )  # fmt: skip


def _nested(folder: RunFolder, cell: Cell, recipe: AdaptConfig) -> RunFolder:
    nested = open_run("tangerine", "efficiency cell", recipe, RunOptions(folder.checkpoints / cell.slug, quiet=True))
    start(nested)
    return nested


def _write_curve(path: Path, curve: Curve) -> None:
    rows: list[dict[str, object]] = [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in zip(*curve, strict=True)]
    write_table(path, CURVE_COLUMNS, rows)


def _read_curve(path: Path) -> Curve:
    table = read_table(path, required=CURVE_COLUMNS)
    return Curve(*(np.array(table.floats(name), np.float64) for name in CURVE_COLUMNS))

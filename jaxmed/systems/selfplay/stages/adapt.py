"""Self-play adapt: fit System I to a new task by a few labelled images, and see whether to trust its verifier."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Length, checked, to_record
from jaxmed.data.augment import AS_THEY_ARE
from jaxmed.data.tasks import Cases, TaskData, draw_shots
from jaxmed.io.tables import write_table
from jaxmed.recipes.few_shot_stage import (
    CaseScore,
    TaskFlags,
    TaskInputs,
    example_figure,
    read_new_task,
    score_cases,
    write_examples,
)
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import curves
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.scatter import scatter
from jaxmed.systems.selfplay.inputs import SHOTS, TASK, Trained, open_inputs, write_system_one
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, adapt, generate, overlap
from jaxmed.systems.selfplay.verifier import calibrate, judge_masks
from jaxmed.train.announce import announce
from jaxmed.train.log import read_metrics, series
from jaxmed.train.run_folder import RunFolder

TRUSTED = 0.5
"""Correlation of the verifier's scores with Dice below which its advice is not worth much."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Adaptation of System I.

    Attributes:
        inputs: Labelled images of the new task, split support; images of split test are only scored.
        task: The new task, where the manifest has several.
        shots: Labelled images to adapt by, drawn from the support; 0 takes all.
        adapt: Steps and rate.
    """

    inputs: TaskFlags = TaskInputs()
    task: str = ""
    shots: Length = 8
    adapt: AdaptConfig = AdaptConfig()


def paper() -> Config:
    """The reference implementation: four labelled images, 16 steps at 1e-5."""
    return Config(shots=4, adapt=AdaptConfig(rate=1e-5))


def laptop() -> Config:
    """Eight labelled images and their moved variants: seconds."""
    return Config(adapt=AdaptConfig(augment=dataclasses.replace(AS_THEY_ARE, shift=2)))


def smoke() -> Config:
    """In seconds: your images or puzzles, your System I or a tiny one that is meta-trained on the spot."""
    return Config(
        inputs=TaskInputs(TaskData(synthetic=24)), task=TASK, shots=SHOTS, adapt=AdaptConfig(steps=8, rate=1e-3)
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of an adaptation.

    Attributes:
        rank: Spearman's correlation of the verifier's scores with Dice; None where it is constant.
        overlaps: Dice of each labelled image's corrupted masks.
        scores: What the verifier says of them.
    """

    task: str
    shots: tuple[str, ...]
    failed: int
    warnings: tuple[str, ...]
    temperature: float
    rank: float | None
    overlaps: tuple[tuple[float, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    cases: tuple[CaseScore, ...]


def run(config: Config, folder: RunFolder) -> int:
    """Read, adapt, calibrate, score, export and report. Returns 1 when records failed."""
    clock = Clock()
    inputs, trained, preprocess = open_inputs(config.inputs, folder)
    task, support, test, _, failed = read_new_task(inputs, preprocess, config.task, ("support",), ("test",))
    shots = draw_shots(support, config.shots, inputs.seed)
    log = begin(folder)
    log.say(f"Adapting to '{task}' by {len(shots.images)} labelled images of {len(set(shots.subjects))} subjects.")
    announce(log, "Adapting", params=trained.system.params, batch=shots.images, count=config.adapt.steps)
    clock.lap("read and cut")
    adapt_key, probe_key = jax.random.split(jax.random.key(inputs.seed))
    images, masks = jnp.asarray(shots.images), jnp.asarray(shots.masks)
    system, losses = adapt(adapt_key, trained.system, images, masks, config.adapt)
    for number in range(config.adapt.steps):
        log.metrics(number + 1, {name: float(values[number]) for name, values in losses.items()})
    calibration = calibrate(probe_key, system, images, masks)
    system = system._replace(temperature=calibration.temperature)
    warnings = []
    if calibration.is_constant:
        warnings.append("The verifier gives every mask the same score: there is nothing to think with.")
    elif not calibration.rank >= TRUSTED:
        warnings.append(
            f"The verifier's scores hardly follow Dice on corrupted masks (Spearman {calibration.rank:.2f}): "
            "thinking may make masks worse. Train it longer, or give more labels."
        )
    for warning in warnings:
        log.say(f"Warning: {warning}")
    scores = () if test is None else score(trained, system, test)
    clock.lap("adapt and score, compilation included")
    rank = calibration.rank if np.isfinite(calibration.rank) else None
    write_system_one(
        folder.outputs / "system1", system, preprocess, task, rank=rank, shots=list(shots.names),
        subjects=sorted(set(shots.subjects)),
    )  # fmt: skip
    shown = shots if test is None else test
    write_examples(folder.outputs / "examples.npz", shown, partial(generate, system.config, system.params))
    if scores:
        rows = to_record(scores)
        write_table(folder.outputs / "cases.csv", tuple(rows[0]), rows)
    write_failed(folder.outputs, failed)
    summary = Summary(
        task, shots.names, len(failed), tuple(warnings), calibration.temperature, rank,
        tuple(map(tuple, calibration.overlaps.tolist())), tuple(map(tuple, calibration.scores.tolist())), scores,
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def score(before: Trained, after: SystemOne, cases: Cases) -> tuple[CaseScore, ...]:
    """Return Dice of each case before and after adaptation, and the verifier's score."""
    images, masks = jnp.asarray(cases.images), jnp.asarray(cases.masks, jnp.float32)

    def segment(system: SystemOne) -> jax.Array:
        return (generate(system.config, system.params, images) > system.config.threshold).astype(jnp.float32)

    last = segment(after)
    dices = overlap(masks, segment(before.system)), overlap(masks, last)
    return score_cases(cases, *dices, judge_masks(after, images, last))


def page(run: Finished[Config, Summary]) -> Page:
    """Show whether to trust the verifier, and what the generator makes of the task."""
    summary, lines = run.summary, read_metrics(run.path)
    losses = {name: series(lines, name) for name in ("generator", "verifier") if lines}
    pairs = np.stack([np.ravel(summary.overlaps), np.ravel(summary.scores)], 1)
    trust = scatter(
        {"corrupted masks": pairs}, xlabel="Dice with the true mask", ylabel="verifier's score",
        caption="Corrupted masks of the labelled images: the verifier's score, at its temperature, against their Dice.",
    )  # fmt: skip
    rank = "constant" if summary.rank is None else f"{summary.rank:.2f}"
    tiles: list[tuple[str, object, str]] = [
        ("Verifier", rank, "Spearman of score and Dice, labelled images"),
        ("Temperature", f"{summary.temperature:.2f}", "of the verifier's logits"),
    ]
    if summary.cases:
        before, after = (
            100 * np.mean([getattr(case, name) for case in summary.cases]) for name in ("dice_before", "dice")
        )
        tiles.append(("Dice", f"{after:.1f} %", f"of {len(summary.cases)} test images; {before:.1f} % before"))
    return Page(
        "System I, adapted",
        f"Self-play reasoning on '{summary.task}' by {len(summary.shots)} labelled images",
        tiles,
        [
            *([Section("Warnings", [Note(text, "warning") for text in summary.warnings])] if summary.warnings else []),
            *trouble_sections(run.outputs, (), summary.failed),
            Section("Can the verifier be trusted?", [trust]),
            Section("What the generator makes of the task", [example_figure(run.outputs / "examples.npz")]),
            Section("Adaptation", [
                curves(losses, xlabel="step", ylabel="loss", caption="Losses on the labelled images."),
                Table(("labelled image",), [[name] for name in summary.shots], "What the task was learnt from."),
            ]),
            Section("How to read this", [Text([
                "Labelled masks, and the generator's of the same images, are corrupted: shifted, grown, shrunk, with "
                "holes and blobs, pixels flipped. A verifier that is good enough to think with gives the higher score "
                "to the mask that overlaps more with the true one. This is looked at on the labelled images; on others "
                "it is worse.",
                "The temperature brings the scores close to Dice; it does not change which mask is preferred.",
            ])]),
        ],
    )  # fmt: skip

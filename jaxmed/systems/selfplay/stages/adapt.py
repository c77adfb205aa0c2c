"""Self-play adapt: fit System I to a new task by a few labelled images, and see whether to trust its verifier."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Length, Seed, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.systems.selfplay.adapt_page import write_page
from jaxmed.systems.selfplay.calibration import calibrate
from jaxmed.systems.selfplay.data import Cases, DataConfig, read_cases, read_manifest
from jaxmed.systems.selfplay.frames import FrameConfig
from jaxmed.systems.selfplay.networks import Trained, load_for, load_system_one, write_system_one
from jaxmed.systems.selfplay.stages import meta_train
from jaxmed.systems.selfplay.stages.meta_train import prepare_data, write_examples, write_failed
from jaxmed.systems.selfplay.system_one import AS_THEY_ARE, AdaptConfig, SystemOne, adapt, generate, overlap
from jaxmed.systems.selfplay.thinking import judge_masks
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary

TRUSTED = 0.5
"""Correlation of the verifier's scores with Dice below which its advice is not worth much."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Adaptation of System I.

    Attributes:
        data: Labelled images of the new task, split support; images of split test are only scored.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: A run of meta-train.
        frame: How files become images; read from the weights where it is left alone.
        task: The new task, where the manifest has several.
        shots: Labelled images to adapt by, drawn from the support; 0 takes all.
        adapt: Steps and rate.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of the draw of labelled images, and of training.
    """

    data: DataConfig = DataConfig()
    series: str = ""
    weights: Path | None = None
    frame: FrameConfig | None = None
    task: str = ""
    shots: Length = 8
    adapt: AdaptConfig = AdaptConfig()
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots: expected 0 or more, found {self.shots}")


def paper() -> Config:
    """The reference implementation: four labelled images, 16 steps at 1e-5."""
    return Config(shots=4, adapt=AdaptConfig(rate=1e-5))


def laptop() -> Config:
    """Eight labelled images and their moved variants: seconds."""
    return Config(adapt=AdaptConfig(augment=dataclasses.replace(AS_THEY_ARE, shift=2)))


def smoke() -> Config:
    """In seconds: your images or puzzles, your System I or a tiny one that is meta-trained on the spot."""
    return Config(data=DataConfig(embedded=24), task="star", shots=4, adapt=AdaptConfig(steps=8, rate=1e-3))


def run(config: Config, folder: RunFolder) -> int:
    """Read, adapt, calibrate, score, export and report. Returns 1 when records failed."""
    began = time.monotonic()
    if config.data.embedded:
        config = make_embedded(config, folder)
    trained, frame = load_for(config.weights, config.frame)
    support, failed = read_cases(config.data, frame, "support", config.seed, series=config.series, fill=config.fill)
    support, task = choose_task(support, config.task)
    shots = draw_shots(support, config.shots, config.seed)
    test = None
    if any(record.split == "test" for record in read_manifest(config.data, config.seed)):
        test, further = read_cases(config.data, frame, "test", config.seed, series=config.series, fill=config.fill)
        test, failed = choose_task(test, task)[0], failed + further
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    log.say(f"Adapting to '{task}' by {len(shots.images)} labelled images of {len(set(shots.subjects))} subjects.")
    announce(log, "Adapting", params=trained.system.params, batch=shots.images, count=config.adapt.steps)
    ready = time.monotonic()
    adapt_key, probe_key = jax.random.split(jax.random.key(config.seed))
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
            f"The verifier's scores hardly follow Dice on spoilt masks (Spearman {calibration.rank:.2f}): "
            "thinking may make masks worse. Train it longer, or give more labels."
        )
    for warning in warnings:
        log.say(f"Warning: {warning}")
    rows = [] if test is None else score(trained, system, test)
    adapted = time.monotonic()
    write_system_one(
        folder.outputs / "system1", system, frame, task, rank=_finite(calibration.rank),
        shots=list(shots.names), subjects=sorted(set(shots.subjects)),
    )  # fmt: skip
    write_examples(folder.outputs / "examples.npz", system, shots if test is None else test)
    if rows:
        write_table(folder.outputs / "cases.csv", tuple(rows[0]), rows)
    write_failed(folder.outputs, failed)
    summary = {
        "task": task,
        "shots": list(shots.names),
        "failed": len(failed),
        "warnings": warnings,
        "temperature": calibration.temperature,
        "rank": _finite(calibration.rank),
        "overlaps": calibration.overlaps.tolist(),
        "scores": calibration.scores.tolist(),
        "cases": rows,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed selfplay adapt --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and cut": ready - began, "adapt and score, compilation included": adapted - ready},
    }
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def make_embedded(config: Any, folder: RunFolder) -> Any:
    """Write puzzles where there is no manifest, and meta-train a tiny System I on puzzles where there are no weights.

    Args:
        config: Of a stage with `data`, `frame`, `weights` and `seed`.
        folder: The run, begun here.
    """
    if config.data.manifest is not None:
        if config.weights is not None:
            return config
        read_manifest(config.data, config.seed)  # a mistake there costs no training
        start(folder)
        puzzles = DataConfig(embedded=config.data.embedded)
        return dataclasses.replace(config, weights=train_tiny(puzzles, folder, config.seed))
    frame = config.frame or (meta_train.smoke().frame if config.weights is None else None)
    if frame is None:
        assert config.weights is not None
        frame = load_system_one(config.weights).frame
    config = prepare_data(dataclasses.replace(config, frame=frame), folder)
    if config.weights is None:
        config = dataclasses.replace(config, weights=train_tiny(config.data, folder, config.seed))
    return config


def train_tiny(data: DataConfig, folder: RunFolder, seed: int) -> Path:
    """Meta-train a tiny System I inside a run folder, once."""
    settings = dataclasses.replace(meta_train.smoke(), data=data, seed=seed)
    nested = open_run("selfplay", "meta-train", settings, RunOptions(folder.path / "inputs" / "meta", quiet=True))
    if nested.status != "complete":
        Log(folder.path, folder.options.quiet).say("Meta-training a tiny System I on puzzles.")
        meta_train.run(settings, nested)
    return nested.path


def choose_task(cases: Cases, name: str) -> tuple[Cases, str]:
    """Return the cases of one task, and its name.

    Raises:
        InputError: There is no such task, or there are several and none is named.
    """
    known = ", ".join(f"'{task}'" for task in cases.task_names)
    if not name and len(cases.task_names) > 1:
        raise InputError("task", f"one of {known}", "none", "set --task")
    name = name or next(iter(cases.task_names))
    if name not in cases.task_names:
        raise InputError("task", f"one of {known}", f"'{name}'")
    return cases.select(np.flatnonzero(cases.tasks == cases.task_names.index(name))), name


def draw_shots(cases: Cases, count: int, seed: int) -> Cases:
    """Draw some labelled images; all where `count` is 0.

    Raises:
        InputError: There are not as many.
    """
    if count == 0:
        return cases
    if count > len(cases.images):
        raise InputError("shots", f"at most the {len(cases.images)} labelled images that there are", count)
    return cases.select(np.sort(np.random.default_rng(seed).choice(len(cases.images), count, replace=False)))


def score(before: Trained, after: SystemOne, cases: Cases) -> list[dict[str, object]]:
    """Return Dice of each case before and after adaptation, and the verifier's score."""
    images, masks = jnp.asarray(cases.images), jnp.asarray(cases.masks, jnp.float32)

    def segment(system: SystemOne) -> jax.Array:
        return (generate(system.config, system.params, images) > system.config.threshold).astype(jnp.float32)

    last = segment(after)
    dice = {"before": np.asarray(overlap(masks, segment(before.system))), "after": np.asarray(overlap(masks, last))}
    value = np.asarray(judge_masks(after, images, last))
    return [
        {
            "case": case,
            "subject": subject,
            "dice_before": round(float(dice["before"][place]), 6),
            "dice": round(float(dice["after"][place]), 6),
            "score": round(float(value[place]), 6),
        }
        for place, (case, subject) in enumerate(zip(cases.names, cases.subjects, strict=True))
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

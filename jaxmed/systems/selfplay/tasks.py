"""What the stages share: cases of a task, puzzles and a tiny System I where none is given, pictures of masks."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.stage import begin, nested_run
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Figure, Note, Section
from jaxmed.systems.selfplay.data import Cases, DataConfig, Failure, read_cases, read_manifest, write_synthetic
from jaxmed.systems.selfplay.frames import FrameConfig
from jaxmed.systems.selfplay.networks import load_system_one
from jaxmed.systems.selfplay.system_one import SystemOne, generate
from jaxmed.train.run_folder import RunFolder

SHOWN = 8
TINY = FrameConfig((16, 16))
"""The images of smoke runs."""
TASK, SHOTS = "star", 4
"""What smoke runs adapt to, and by how many labelled images."""


def read_splits(
    config: Any, frame: FrameConfig, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, Cases], tuple[Failure, ...]]:
    """Read the cases of some splits.

    Args:
        config: A stage's, with `data`, `series`, `fill` and `seed`.
        frame: How files become images.
        required: Splits that the manifest has to have.
        optional: Splits that are left out where it has not.

    Returns:
        The cases by split, and the records that could not be used.
    """
    known = {record.split for record in read_manifest(config.data, config.seed)}
    cases, failed = {}, ()
    for split in (*required, *(name for name in optional if name in known)):
        cases[split], further = read_cases(
            config.data, frame, split, config.seed, series=config.series, fill=config.fill
        )
        failed += further
    return cases, failed


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


def write_puzzles(data: DataConfig, frame: FrameConfig, seed: int, folder: RunFolder) -> DataConfig:
    """Write the puzzles of a run that has no manifest, and begin it; other runs keep their settings."""
    if not data.synthetic or data.manifest is not None:
        return data
    begin(folder)
    return write_synthetic(data, frame, seed, folder.path / "inputs" / "puzzles")


class Inputs(NamedTuple):
    """What a stage begins with.

    Attributes:
        data: The cases.
        frame: How files become images; None as the weights say.
        weights: System I.
    """

    data: DataConfig
    frame: FrameConfig | None
    weights: Path | None


def make_inputs(given: Inputs, seed: int, folder: RunFolder) -> Inputs:
    """Write puzzles where there is no manifest, and meta-train a tiny System I on puzzles where there are no weights.

    Args:
        given: What the user gave.
        seed: Seed of the puzzles and of the networks.
        folder: The run, begun here when something is made.
    """
    data, frame, weights = given
    if not data.synthetic or (data.manifest is not None and weights is not None):
        return given
    if data.manifest is not None:
        read_manifest(data, seed)  # a mistake there costs no training
        puzzles = DataConfig(synthetic=data.synthetic)
    else:
        frame = frame or (TINY if weights is None else load_system_one(weights).frame)
        data = puzzles = write_puzzles(data, frame, seed, folder)
    if weights is None:
        why = "Meta-training a tiny System I on puzzles."
        changes = {"data": puzzles, "seed": seed}
        weights = nested_run(folder, "selfplay meta-train", changes, begin(folder), why).path
    return Inputs(data, frame, weights)


def with_inputs(config: Any, folder: RunFolder) -> Any:
    """Return a stage's settings with what `make_inputs` makes of its `data`, `frame`, `weights` and `seed`."""
    made = make_inputs(Inputs(config.data, config.frame, config.weights), config.seed, folder)
    return dataclasses.replace(config, **made._asdict())


def write_failed(folder: Path, failed: tuple[Failure, ...]) -> None:
    """Write failed.csv where records could not be used."""
    if failed:
        write_table(folder / "failed.csv", Failure._fields, [failure._asdict() for failure in failed])


def failed_sections(failed: int) -> list[Section]:
    """Say on a page that records could not be used."""
    text = f"Records that could not be used: {failed}; see outputs/failed.csv."
    return [Section("Failed records", [Note(text, "warning")])] if failed else []


def write_examples(path: Path, system: SystemOne, cases: Cases) -> None:
    """Write a few images, their masks and the generator's, for the report."""
    some = np.linspace(0, len(cases.images) - 1, min(SHOWN, len(cases.images))).round().astype(int)
    images = cases.images[some]
    soft = np.asarray(jax.jit(partial(generate, system.config))(system.params, jnp.asarray(images)))
    write_npz(path, {"images": images, "masks": cases.masks[some], "generated": soft}, is_compressed=True)


def example_figure(path: Path) -> Figure:
    """Show images with true and generated outlines."""
    with np.load(path) as stored:
        images, masks, generated = (stored[name] for name in ("images", "masks", "generated"))
    panels = []
    for image, mask, soft in zip(images, masks, generated, strict=True):
        outlines = {"true": plane(mask, mask), "generated": plane(soft > 0.5, mask)}
        panels.append(Panel(plane(image, mask), f"Dice {100 * dice(mask, soft > 0.5):.0f} %", outlines))
    return mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption="Images with the outlines of the true mask and of the generator's; of volumes, the slice with most of "
        "the mask.",
        alt=f"{len(panels)} images with outlines of true and generated masks.",
    )  # fmt: skip


def plane(
    array: Shaped[np.ndarray, "..."], mask: Shaped[np.ndarray, "..."] | None = None
) -> Shaped[np.ndarray, "row column"]:
    """Return an image as it is looked at, x to the right and y up; of a volume the slice with most of a mask."""
    if array.ndim == 3:
        sizes = np.zeros(array.shape[2]) if mask is None else mask.sum(axis=(0, 1))
        array = array[..., int(np.argmax(sizes)) if sizes.any() else array.shape[2] // 2]
    return np.flip(array.T, 0)

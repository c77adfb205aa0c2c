"""What stages begin with and hand on: cases of a task, System I and a policy, synthetic ones where none are given."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.io.weights_files import load_parameters
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.stage import begin, nested_run
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Figure, Note, Section
from jaxmed.systems.selfplay.data import Cases, DataConfig, Failure, read_cases, read_manifest, write_synthetic
from jaxmed.systems.selfplay.system_one import SystemOne, SystemOneConfig, generate
from jaxmed.systems.selfplay.thinking import ThinkConfig
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.run_folder import RunFolder

FAMILY = "selfplay"
POLICY = "selfplay-policy"
SNAPSHOT = "visit_"
SHOWN = 8
TINY = Preprocess((16, 16))
"""The images of smoke runs."""
TASK, SHOTS = "star", 4
"""What smoke runs adapt to, and by how many labelled images."""


def read_splits(
    config: Any, preprocess: Preprocess, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, Cases], tuple[Failure, ...]]:
    """Read the cases of some splits.

    Args:
        config: A stage's, with `data`, `series`, `fill` and `seed`.
        preprocess: How files become images.
        required: Splits that the manifest has to have.
        optional: Splits that are left out where it has not.

    Returns:
        The cases by split, and the records that could not be used.
    """
    known = {record.split for record in read_manifest(config.data, config.seed)}
    cases, failed = {}, ()
    for split in (*required, *(name for name in optional if name in known)):
        cases[split], further = read_cases(
            config.data, preprocess, split, config.seed, series=config.series, fill=config.fill
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


def write_puzzles(data: DataConfig, preprocess: Preprocess, seed: int, folder: RunFolder) -> DataConfig:
    """Write the puzzles of a run that has no manifest, and begin it; other runs keep their settings."""
    if not data.synthetic or data.manifest is not None:
        return data
    begin(folder)
    return write_synthetic(data, preprocess, seed, folder.path / "inputs" / "puzzles")


class Inputs(NamedTuple):
    """What a stage begins with.

    Attributes:
        data: The cases.
        preprocess: How files become images; None as the weights say.
        weights: System I.
    """

    data: DataConfig
    preprocess: Preprocess | None
    weights: Path | None


def make_inputs(given: Inputs, seed: int, folder: RunFolder) -> Inputs:
    """Write puzzles where there is no manifest, and meta-train a tiny System I on puzzles where there are no weights.

    Args:
        given: What the user gave.
        seed: Seed of the puzzles and of the networks.
        folder: The run, begun here when something is made.
    """
    data, preprocess, weights = given
    if not data.synthetic or (data.manifest is not None and weights is not None):
        return given
    if data.manifest is not None:
        read_manifest(data, seed)  # a mistake there costs no training
        puzzles = DataConfig(synthetic=data.synthetic)
    else:
        preprocess = preprocess or (TINY if weights is None else load_system_one(weights).preprocess)
        data = puzzles = write_puzzles(data, preprocess, seed, folder)
    if weights is None:
        why = "Meta-training a tiny System I on puzzles."
        changes = {"data": puzzles, "seed": seed}
        weights = nested_run(folder, "selfplay meta-train", changes, begin(folder), why).path
    return Inputs(data, preprocess, weights)


def with_inputs(config: Any, folder: RunFolder) -> Any:
    """Return a stage's settings with what `make_inputs` makes of its `data`, `preprocess`, `weights` and `seed`."""
    made = make_inputs(Inputs(config.data, config.preprocess, config.weights), config.seed, folder)
    return dataclasses.replace(config, **made._asdict())


class Trained(NamedTuple):
    """What a run of meta-train or adapt handed on.

    Attributes:
        system: Both networks.
        preprocess: How files become their images.
        task: What it was adapted to; empty where it was not.
        path: Where it was read.
    """

    system: SystemOne
    preprocess: Preprocess
    task: str
    path: Path


def write_system_one(folder: Path, system: SystemOne, preprocess: Preprocess, task: str = "", **further: Any) -> None:
    """Write System I for other stages, with what else its record shall hold, to outputs/system1 of a run."""
    record = {
        "family": FAMILY,
        "config": to_record(system.config),
        "preprocess": to_record(preprocess),
        "temperature": float(system.temperature),
        "task": task,
    }
    export_parameters(folder, system.params, record | further)


def load_for(weights: Path | None, preprocess: Preprocess | None) -> tuple[Trained, Preprocess]:
    """Read System I, and return how files become its images: as its own, or as a user wants it.

    Raises:
        InputError: There are no weights, or images would have another size.
    """
    if weights is None:
        raise InputError("weights", "a run of meta-train", "nothing", "give --weights, or try --preset smoke")
    trained = load_system_one(weights)
    preprocess = preprocess or trained.preprocess
    if preprocess.size != trained.preprocess.size:
        raise InputError("preprocess.size", f"that of the weights, {trained.preprocess.size}", preprocess.size)
    return trained, preprocess


def load_exported(
    path: Path, name: str, family: str, expected: str, advice: str
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read what a run exported to outputs/NAME, or such a folder itself: parameters, record, and the record's place.

    Raises:
        InputError: The place holds nothing of the kind, or weights of another family.
    """
    places = [place for place in (path / "outputs" / name, path) if (place / "record.json").exists()]
    if not places:
        raise InputError(path, expected, "nothing of the kind" if path.exists() else "nothing", advice)
    params, record = load_parameters(places[0])
    if record.get("family") != family:
        raise InputError(path, expected, f"weights of {record.get('family')}", advice)
    return params, record, str(places[0] / "record.json")


def load_system_one(path: Path) -> Trained:
    """Read System I from a run of meta-train or adapt.

    Raises:
        InputError: The place holds no such run, or weights of something else.
    """
    params, record, where = load_exported(path, "system1", FAMILY, "a run of meta-train or adapt", "check --weights")
    config = from_record(SystemOneConfig, record["config"], where)
    preprocess = from_record(Preprocess, record["preprocess"], where)
    missing = {"generator", "verifier"} - set(params)
    if missing:
        raise InputError(where, "parameters of generator and verifier", f"no {' and no '.join(sorted(missing))}")
    return Trained(SystemOne(config, params, float(record["temperature"])), preprocess, record["task"], path)


def write_policy(folder: Path, params: Params, config: ThinkConfig, size: tuple[int, ...]) -> None:
    """Write a policy for think and compare, as outputs/policy of a run."""
    export_parameters(folder, params, {"family": POLICY, "think": to_record(config), "size": list(size)})


def read_snapshots(folder: Path, last: int) -> tuple[tuple[int, ...], list[Params]]:
    """Read the policies that a run kept on its way: after how many visits, and their parameters."""
    found = {int(place.name.removeprefix(SNAPSHOT)): place for place in folder.glob(f"{SNAPSHOT}*")}
    numbers = tuple(sorted(number for number in found if number <= last))
    return numbers, [load_parameters(found[number])[0] for number in numbers]


def load_policy(path: Path, config: ThinkConfig, size: tuple[int, ...]) -> tuple[ThinkConfig, Params]:
    """Read a policy, and return settings of thought with its network in them.

    Args:
        path: A run of train-policy.
        config: How to think; the network is the policy's.
        size: Size of the images that will be thought about.

    Raises:
        InputError: The place holds no policy, or one for other images or rules of flips.
    """
    params, record, where = load_exported(path, "policy", POLICY, "a run of train-policy", "check --policy-weights")
    trained = from_record(ThinkConfig, record["think"], where)
    if tuple(record["size"]) != size:
        raise InputError(path, f"a policy for images of {size}", f"one for {tuple(record['size'])}")
    if trained.play.game.blocks(size) != config.play.game.blocks(size):
        raise InputError(
            "think.play.game.super-pixel", f"that of the policy, {trained.play.game.super_pixel}",
            config.play.game.super_pixel,
        )  # fmt: skip
    may_pass = trained.play.game.at_most_k
    if may_pass != config.play.game.at_most_k:
        # The sign of what it says decides who flips under one rule, and means nothing under the other.
        raise InputError("think.play.game.at-most-k", f"that of the policy, {may_pass}", not may_pass)
    return dataclasses.replace(config, policy=trained.policy), params


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

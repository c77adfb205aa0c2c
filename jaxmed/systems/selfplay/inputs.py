"""What stages hand on: System I and a policy; and tiny ones, with synthetic tasks, where none are given."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io.weights_files import load_exported
from jaxmed.recipes.few_shot_stage import TaskInputs, synthetic_inputs
from jaxmed.systems.selfplay.system_one import SystemOne, SystemOneConfig
from jaxmed.systems.selfplay.thinking import ThinkConfig
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.run_folder import RunFolder

FAMILY = "selfplay"
POLICY = "selfplay-policy"
TINY = Preprocess((16, 16))
"""The images of smoke runs."""
TASK, SHOTS = "star", 4
"""What smoke runs adapt to, and by how many labelled images."""


def make_inputs(inputs: TaskInputs, folder: RunFolder) -> TaskInputs:
    """Write puzzles where there is no manifest, and meta-train a tiny System I where there are no weights."""
    why = "Meta-training a tiny System I on puzzles."
    return synthetic_inputs(
        inputs, folder, "selfplay meta-train", why, TINY, lambda path: load_system_one(path).preprocess
    )


def open_inputs(inputs: TaskInputs, folder: RunFolder) -> tuple[TaskInputs, "Trained", Preprocess]:
    """Make what is missing, read System I, and tell how files become its images: as its own, or as a user wants it.

    Raises:
        InputError: There are no weights, or images would have another size.
    """
    inputs = make_inputs(inputs, folder)
    if inputs.weights is None:
        raise InputError("weights", "a run of meta-train", "nothing", "give --weights, or try --preset smoke")
    trained = load_system_one(inputs.weights)
    preprocess = inputs.preprocess or trained.preprocess
    if preprocess.size != trained.preprocess.size:
        raise InputError("preprocess.size", f"that of the weights, {trained.preprocess.size}", preprocess.size)
    return inputs, trained, preprocess


class Trained(NamedTuple):
    """What a run of meta-train or adapt handed on; the task is empty where the networks were not adapted."""

    system: SystemOne
    preprocess: Preprocess
    task: str


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
    return Trained(SystemOne(config, params, float(record["temperature"])), preprocess, record["task"])


def write_policy(folder: Path, params: Params, config: ThinkConfig, size: tuple[int, ...]) -> None:
    """Write a policy for think and compare, as outputs/policy of a run."""
    export_parameters(folder, params, {"family": POLICY, "think": to_record(config), "size": list(size)})


def load_policy(path: Path, config: ThinkConfig, size: tuple[int, ...]) -> tuple[ThinkConfig, Params]:
    """Read a policy for images of a size, and return settings of thought with its network in them.

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

"""The networks of this system, a diffusion prior and conditional networks: read, applied, announced."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmed.arrays.types import Params
from jaxmed.data.images import MAX_INTENSITY, PREPROCESS
from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.posterior.fidelity import PLAIN, evaluate
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.unet_guided import GuidedUnetConfig
from jaxmed.physics.lowfield import LowField, make_operator
from jaxmed.recipes.stage import nested_run
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder

SOURCE = "Method: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis."


def load_prior(path: Path) -> Published:
    """Read a diffusion prior: a run of train-prior, or published weights.

    Raises:
        InputError: The place cannot be read, or holds another network.
    """
    return _load(path, "denoiser", "a diffusion prior", "give a run of train-prior")


def load_initial(path: Path, prior: Published | None = None, name: object = None) -> Published:
    """Read a conditional network, a run of train-initial, which must have the prior's preprocessing.

    Raises:
        InputError: The place cannot be read, holds another network, or one of another preprocessing.
    """
    network = _load(path, "enhancer", "a conditional network", "give a run of train-initial")
    if prior is not None:
        own, theirs = (f"{one.size} at {one.told_spacing}" for one in (network.preprocess, prior.preprocess))
        if own != theirs:
            expected = f"a network of the prior's preprocessing, {theirs}"
            raise InputError(name or path, expected, own, "train it on the prior's preprocessing")
    return network


def _load(path: Path, kind: str, expected: str, advice: str) -> Published:
    found = load_published(path)
    config = found.config
    if found.report.kind != kind or not isinstance(config, GuidedUnetConfig):
        raise InputError(path, expected, f"a {found.report.kind} of {found.report.family}", advice)
    if config.channels != 1 or config.outputs != 1 or config.learn_sigma:
        channels = f"{config.channels} in and {config.outputs * (1 + config.learn_sigma)} out"
        raise InputError(path, f"{expected} of one channel", channels, advice)
    told = found.preprocess
    if told.intensity.kind == "background":
        return found
    # Published weights are fed as their authors fed them, within the head.
    intensity = dataclasses.replace(PREPROCESS.intensity, high=told.intensity.window[1])
    return dataclasses.replace(found, preprocess=dataclasses.replace(PREPROCESS, size=told.size, intensity=intensity))


def apply_initial(network: Published) -> Callable[[Array], Array]:
    """Return the compiled function from a batch of measurements to a conditional network's images, in [0, 2]."""
    apply = jax.jit(lambda params, x: jnp.clip(network.model.apply(params, x), 0.0, MAX_INTENSITY))
    return partial(apply, network.params)


def make_prior(network: Published, params: Params) -> Denoiser:
    """Return the denoiser of a prior, its images held in [0, 2]; parameters may be traced."""
    return make_denoiser(partial(network.model.apply, params), VpDiscrete(), "epsilon", clip=(0.0, MAX_INTENSITY))


def announce_passes(
    log: Log,
    label: str,
    network: Published,
    batch_size: int,
    acquisition: LowField,
    count: int,
    unit: str,
    smaller: str,
) -> None:
    """Say how large a prior and its batches are, and how long `count` passes forward and backward may take."""
    operator = make_operator(network.preprocess.size, acquisition)

    def meet(params: Params, images: Array, times: Array) -> Any:
        return evaluate(make_prior(network, params), images, operator, PLAIN, images, times)

    images = jax.ShapeDtypeStruct((batch_size, *network.preprocess.size, 1), jnp.float32)
    program = jax.make_jaxpr(meet)(network.params, images, jax.ShapeDtypeStruct((batch_size,), jnp.float32))
    announce(log, label, params=network.params, batch=images, program=program, count=count, unit=unit, smaller=smaller)


def tiny_network(folder: RunFolder, stage: str, changes: Mapping[str, Any], log: Log) -> Path:
    """Run a stage's preset smoke inside a run, on phantom brains, once; return its run."""
    why = "Calibrating it on" if stage == "calibrate" else f"Running {stage} on"
    return nested_run(folder, f"dynamicdps {stage}", changes, log, f"{why} synthetic brains first.").path

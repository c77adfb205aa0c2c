"""Trained networks of this system on disk: parameters, and the preprocessing by which they see scans."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.posterior.fidelity import PLAIN, evaluate
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.models.published import guided_diffusion
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.unet_guided import GuidedUnetConfig
from jaxmed.nn.model import Model
from jaxmed.physics.lowfield import LowField, make_operator
from jaxmed.recipes.stage import nested_run
from jaxmed.systems.dynamicdps.enhancement import MAX_INTENSITY
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder

PREPROCESS = Preprocess(
    (256, 256), intensity=Intensity("background", percentiles=(0.0, 99.5), reference=1.6, range=(0.0, MAX_INTENSITY))
)
"""Scans are turned to RAS+ and scaled: the background, also of scans in [-1, 1] or with a mean of 0, becomes 0, and a
percentile of the intensities inside the head a fixed value, so that scans of any unit look alike."""


class Network(NamedTuple):
    """A trained network.

    Attributes:
        model: `model.apply(params, x, t)` for a prior, without t for an enhancer.
        params: Its parameters.
        preprocess: How scans become its images.
        config: Its sizes.
        path: Where it was read.
        licence: What may be done with it.
        remarks: What a stage says of how it was read, in sentences.
    """

    model: Model
    params: Params
    preprocess: Preprocess
    config: GuidedUnetConfig
    path: Path
    licence: str
    remarks: tuple[str, ...] = ()


def write_network(
    folder: Path, params: Params, config: GuidedUnetConfig, preprocess: Preprocess, **further: Any
) -> None:
    """Write a network for other stages and for `load_published`.

    Args:
        folder: outputs/model of a run.
        params: The network's parameters.
        config: Its sizes.
        preprocess: How scans become its images.
        **further: What else stands in the record.
    """
    record = {
        "family": guided_diffusion.FAMILY.name,
        "kind": "denoiser" if config.with_time else "enhancer",
        "config": to_record(config),
        "preprocess": to_record(preprocess),
    }
    export_parameters(folder, params, record | further)


def load_prior(path: Path) -> Network:
    """Read a diffusion prior: a run of train-prior, or published weights.

    Raises:
        InputError: The place cannot be read, or holds another network.
    """
    return _load(path, "denoiser", "a diffusion prior", "give a run of train-prior")


def load_initial(path: Path, prior: Network | None = None, name: object = None) -> Network:
    """Read a conditional network: a run of train-initial.

    Args:
        path: The run.
        prior: Whose preprocessing it must have.
        name: What a message calls it; the path by default.

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


def apply_initial(network: Network) -> Callable[[Array], Array]:
    """Return the compiled function from a batch of measurements to a conditional network's images, in [0, 2]."""
    apply = jax.jit(lambda params, x: jnp.clip(network.model.apply(params, x), 0.0, MAX_INTENSITY))
    return partial(apply, network.params)


def make_prior(network: Network, params: Params) -> Denoiser:
    """Return the denoiser of a prior, its images held in [0, 2].

    Args:
        network: Model and sizes.
        params: Its parameters, or what stands for them while a program is traced.
    """
    return make_denoiser(partial(network.model.apply, params), VpDiscrete(), "epsilon", clip=(0.0, MAX_INTENSITY))


def _load(path: Path, kind: str, expected: str, advice: str) -> Network:
    published = load_published(path)
    config = published.config
    if published.report.kind != kind or not isinstance(config, GuidedUnetConfig):
        raise InputError(path, expected, f"a {published.report.kind} of {published.report.family}", advice)
    if config.channels != 1 or config.outputs != 1 or config.learn_sigma:
        found = f"{config.channels} in and {config.outputs * (1 + config.learn_sigma)} out"
        raise InputError(path, f"{expected} of one channel", found, advice)
    report, preprocess = published.report, _preprocess(published)
    return Network(published.model, published.params, preprocess, config, path, report.licence, report.remarks)


def _preprocess(published: Published) -> Preprocess:
    """Return the preprocessing of own weights; published ones are fed as their authors fed them, within the head."""
    told = published.preprocess
    if told.intensity.kind == "background":
        return told
    intensity = dataclasses.replace(PREPROCESS.intensity, high=told.intensity.window[1])
    return dataclasses.replace(PREPROCESS, size=told.size, intensity=intensity)


def announce_passes(
    log: Log, label: str, network: Network, batch_size: int, acquisition: LowField, count: int, unit: str, smaller: str
) -> None:
    """Say how large a prior and its batches are, and how long it may take to meet them forward and backward.

    Args:
        log: Where.
        label: What is about to be done.
        network: The prior.
        batch_size: Images at a time.
        acquisition: From image to measurement.
        count: How often it meets a batch.
        unit: What these are called.
        smaller: The preset that fits a CPU, as the run folder names it.
    """
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

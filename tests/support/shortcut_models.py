"""Conditional models that learn the shortcut of the phantom task, and its prior, trained in minutes on a processor."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.diffusion.denoiser import Denoiser, denoising_loss, make_denoiser
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.unet_guided import GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.physics.lowfield import simulate
from jaxmed.recipes.denoiser import train_denoiser
from jaxmed.recipes.training import TrainConfig, TrainData
from jaxmed.synthesis.phantoms.brain import draw_brain, make_brain
from jaxmed.synthesis.phantoms.shortcut import Case, ShortcutConfig, make_case
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder

RECORDS = 4096
"""Length of an epoch; images are drawn anew whenever a record comes, so it only paces the loop."""


def draw_prior_image(key: KeyArray, config: ShortcutConfig) -> Float[Array, "x y 1"]:
    """Draw an image of the diverse set: lesions and cues, independent of each other."""
    return draw_brain(key, config.size, config.brain).image[..., None]


def draw_pair(key: KeyArray, config: ShortcutConfig) -> tuple[Float[Array, "x y 1"], Float[Array, "x y 1"]]:
    """Draw image and measurement of the conditional model's set: half with cue and lesion, half with neither.

    The measurement does not show the lesion, as where the contrast of a low field hides it: the cue is all that there
    is to learn it from.
    """
    flag_key, image_key, noise_key = jax.random.split(key, 3)
    is_ill = jax.random.bernoulli(flag_key)
    image, hidden = (
        make_brain(image_key, lesion, is_ill, config.size, config.brain).image[..., None] for lesion in (is_ill, False)
    )
    return image, simulate(noise_key, hidden, config.size, config.acquisition)


def draw_case(key: KeyArray, config: ShortcutConfig) -> Case:
    """Draw a test case."""
    image_key, noise_key = jax.random.split(key)
    brain = make_brain(image_key, False, True, config.size, config.brain)
    return make_case(noise_key, brain, brain.image, config)


def train_prior(config: ShortcutConfig, recipe: TrainConfig, folder: RunFolder, log: Log) -> tuple[Denoiser, Params]:
    """Train the diffusion prior on images drawn as it goes, or continue."""
    schedule = VpDiscrete()

    def prepare(key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": draw_prior_image(key, config)}

    def loss(apply: Any, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
        return denoising_loss(apply, schedule, params, keys, batch)

    network = small_network(config)
    params = _train(network, recipe, loss, prepare, folder, log)
    return prior_of(network, params), params


def prior_of(network: Network, params: Params) -> Denoiser:
    """Return the prior of trained parameters, its images held in [0, 2]."""
    return make_denoiser(partial(network.apply, params), VpDiscrete(), "epsilon", clip=(0.0, 2.0))


def train_conditional(
    config: ShortcutConfig, recipe: TrainConfig, folder: RunFolder, log: Log
) -> tuple[Callable[[Float[Array, "batch x y 1"]], Float[Array, "batch x y 1"]], Params]:
    """Train the model that learns the shortcut by L1, or continue; it maps a batch of measurements to images."""

    def prepare(key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
        image, measurement = draw_pair(key, config)
        return {"image": image, "measurement": measurement}

    def loss(apply: Any, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
        error = jnp.abs(apply(params, batch["measurement"]) - batch["image"]).mean()
        return error, {}

    network = small_network(config, with_time=False)
    params = _train(network, recipe, loss, prepare, folder, log)
    return partial(network.apply, params), params


def fit_linear(
    key: KeyArray, config: ShortcutConfig, num_pairs: int = 4096, ridge: float = 0.003
) -> Callable[[Float[Array, "batch x y 1"]], Float[Array, "batch x y 1"]]:
    """Fit a linear map from measurement to image to drawn pairs: a conditional model of another kind, in seconds.

    Args:
        key: Consumed.
        config: The task.
        num_pairs: Drawn.
        ridge: Added to the variance of every voxel of the measurement.
    """
    draw = jax.jit(jax.vmap(partial(draw_pair, config=config)))
    image, measurement = (np.asarray(part, np.float64) for part in draw(jax.random.split(key, num_pairs)))
    inputs, targets = measurement.reshape(num_pairs, -1), image.reshape(num_pairs, -1)
    center, target = inputs.mean(0), targets.mean(0)
    covariance = (inputs - center).T @ (inputs - center) / num_pairs + ridge * np.eye(inputs.shape[1])
    matrix = np.linalg.solve(covariance, (inputs - center).T @ (targets - target) / num_pairs)
    offset = jnp.asarray(target - center @ matrix, jnp.float32)
    weights = jnp.asarray(matrix, jnp.float32)

    def apply(measurement: Float[Array, "batch x y 1"]) -> Float[Array, "batch x y 1"]:
        flat = measurement.reshape(len(measurement), -1)
        return (jnp.dot(flat, weights, precision=jax.lax.Precision.HIGHEST) + offset).reshape(measurement.shape)

    return apply


def small_recipe(steps: int, seed: int = 0, *, batch_size: int = 8) -> TrainConfig:
    """Return a recipe whose networks train on a processor in minutes."""
    return TrainConfig(
        OptimizerConfig(peak_lr=1e-3, weight_decay=0.0),
        LoopConfig(steps=steps, log_every=50, save_every=0),
        LoaderConfig(batch_size=batch_size),
        MeshConfig(data=1),
        ema_decay=0.995,
        seed=seed,
    )


def small_network(config: ShortcutConfig, *, with_time: bool = True) -> Network:
    """Return the network of that recipe."""
    model = GuidedUnetConfig(
        width=16, multipliers=(1, 2, 2), blocks=1, attention_factors=(4,), groups=8, with_time=with_time
    )
    return guided_unet(model, config.size)


def _train(network: Network, recipe: TrainConfig, loss: Any, prepare: Any, folder: RunFolder, log: Log) -> Params:
    source = ArraySource({"number": np.arange(RECORDS, dtype=np.int32)})
    data = TrainData(source, None, lambda fields, _: fields)
    return train_denoiser(recipe, network, loss, data, prepare, folder=folder, log=log)

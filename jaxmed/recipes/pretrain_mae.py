"""Pre-train a masked autoencoder on records without labels: any encoder of visible patches, in two or three dimensions.

Deviation: the class token and the mask token of our transformers are vectors, so weight decay leaves them alone; in
MAE's released code they carry two axes of length 1 and are decayed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jaxmed.arrays.masking import Masking, draw_noise, restore_order, take_tokens
from jaxmed.arrays.patches import patchify, unpatchify
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.models.mae import MaskedModel
from jaxmed.objectives.masked import masked_loss, masked_targets
from jaxmed.recipes.training import (
    TrainConfig,
    TrainData,
    handed_on,
    plan_training,
    record_keys,
    run_training,
    whole,
)
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

Augment = Callable[[KeyArray, Float[Array, "..."]], Float[Array, "..."]]
NUM_PICTURES = 3


class Reconstruction(NamedTuple):
    """One image as the model completes it.

    Attributes:
        image: The image, [*space, channel].
        seen: The same with hidden patches 0.
        completed: The same with hidden patches as predicted; where targets are normalised, each with the mean and
            deviation of the patch that it stands for, which the model does not predict.
        error: Mean squared error over hidden targets.
        variance: Variance of hidden targets: the error of the best constant.
    """

    image: Float[np.ndarray, "..."]
    seen: Float[np.ndarray, "..."]
    completed: Float[np.ndarray, "..."]
    error: float
    variance: float


def pretrain(
    config: TrainConfig,
    model: MaskedModel,
    data: TrainData,
    *,
    folder: RunFolder,
    log: Log,
    augment: Augment | None = None,
    start: Params | None = None,
) -> tuple[Params, list[Reconstruction]]:
    """Train a masked autoencoder.

    Args:
        config: The run.
        model: What is trained, such as `models.mae.masked_model`.
        data: The records; transformed, they are {"image": [*image_size, channels]}.
        folder: The run.
        log: Its log.
        augment: `augment(key, image) -> image`, on the device, one image at a time.
        start: Parameters to start from; what is not among them is drawn.

    Returns:
        The parameters, and the first held-out images (at most three) as the model completes them.
    """
    state = run_training(
        config, model.network, partial(_loss, model, augment), data, folder=folder, log=log, start=start,
        score=partial(_score, model), score_seed=config.seed, summarise=_with_explained,
    )  # fmt: skip
    params, held_out, pictures = handed_on(state), data.held_out, []
    if held_out is not None:
        # Pictures are looked at by every process, which may hold only a part of the parameters.
        held = whole(params, config)
        numbers = range(min(NUM_PICTURES, len(held_out)))
        for number, key in zip(numbers, record_keys(config.seed, jnp.arange(len(numbers))), strict=True):
            image = data.transform(held_out[number], np.random.default_rng(0))["image"]
            pictures.append(reconstruct(model, held, key, image))
    return params, pictures


def plan_pretraining(config: TrainConfig, model: MaskedModel, mesh: Mesh, augment: Augment | None = None) -> Workload:
    """Return the step of `pretrain` and the shapes of its arguments, of which nothing is made."""
    record = {"image": jax.ShapeDtypeStruct((*model.image_size, model.channels), jnp.float32)}
    return plan_training(config, model.network, partial(_loss, model, augment), record, mesh)


def _loss(
    model: MaskedModel,
    augment: Augment | None,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> Any:
    pairs = jax.vmap(jax.random.split)(keys)
    images = batch["image"] if augment is None else jax.vmap(augment)(pairs[:, 0], batch["image"])
    return masked_loss(model, params, pairs[:, 1], {"image": images})


def _score(
    model: MaskedModel, params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]
) -> dict[str, Float[Array, " batch"]]:
    """Return the error of hidden patches and the variance of the targets, of each image."""
    image = batch["image"]
    output = model.network.apply(params, image, draw_noise(keys, model.num_tokens))
    target = masked_targets(model, image, output.masking)
    error = jnp.mean(jnp.square(output.prediction - target), axis=(1, 2))
    return {"error": error, "variance": jnp.var(target, axis=(1, 2))}


def _with_explained(means: dict[str, float]) -> dict[str, float]:
    """Add the share of the variance that is explained."""
    return {**means, "explained": 1 - means["error"] / means["variance"]}


def reconstruct(model: MaskedModel, params: Params, key: KeyArray, image: Float[np.ndarray, "..."]) -> Reconstruction:
    """Hide patches of one image and complete it.

    Args:
        model: What completes it.
        params: Its parameters.
        key: Draws the mask.
        image: [*image_size, channels].
    """
    seen, completed, error, variance = _complete(model, params, key, jnp.asarray(image))
    return Reconstruction(np.asarray(image), np.asarray(seen), np.asarray(completed), float(error), float(variance))


# Compiled here, because a recipe shows several pictures, and operation by operation each takes seconds.
@partial(jax.jit, static_argnums=0)
def _complete(model: MaskedModel, params: Params, key: KeyArray, image: Array) -> tuple[Array, ...]:
    output = model.network.apply(params, image[None], draw_noise(key[None], model.num_tokens))
    patches = patchify(image[None], model.patch_size)
    masking: Masking = output.masking
    kept, hidden = take_tokens(patches, masking.kept), take_tokens(patches, masking.hidden)
    target, guess = masked_targets(model, image[None], masking), output.prediction
    error, variance = jnp.mean(jnp.square(guess - target)), jnp.var(target)
    if model.norm_target:
        guess = guess * jnp.sqrt(hidden.var(-1, keepdims=True, ddof=1) + 1e-6) + hidden.mean(-1, keepdims=True)

    def picture(unseen: Array) -> Array:
        tokens = restore_order(jnp.concatenate([kept, unseen], axis=1), masking)
        return unpatchify(tokens, model.grid, model.patch_size)[0]

    return picture(jnp.zeros_like(hidden)), picture(guess), error, variance

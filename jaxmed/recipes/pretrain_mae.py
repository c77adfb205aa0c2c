"""Pre-train a masked autoencoder on records without labels, in two or three dimensions."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jaxmed.arrays.masking import Masking, draw_noise, restore_order, take_tokens
from jaxmed.arrays.patches import patchify, unpatchify
from jaxmed.arrays.trees import named_leaves, replace
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Epochs, Seed, checked
from jaxmed.data.loader import LoaderConfig, Transform, evaluation_batches, make_loader
from jaxmed.data.records import Source
from jaxmed.errors import InputError
from jaxmed.models.mae import FROZEN, SHARDING_RULES, Mae, MaeConfig
from jaxmed.nn.model import Model, make_model
from jaxmed.objectives.masked import masked_loss, masked_targets
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, data_share, layout, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState, create_state
from jaxmed.train.step import make_train_step

Augment = Callable[[KeyArray, Float[Array, "..."]], Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
@checked
class PretrainConfig:
    """A pre-training run.

    Deviation: the class token and the mask token are vectors here, so weight decay leaves them alone; in the released
    code they carry two axes of length 1 and are decayed.

    Attributes:
        model: The masked autoencoder.
        optimizer: Its optimizer.
        loop: Length and intervals; `epochs` decides the steps.
        loader: Batch size and reading.
        mesh: The devices.
        epochs: Passes over the records; 0 leaves the length to loop.steps.
        warmup_epochs: Of them, those over which the learning rate rises; with epochs 0, optimizer.warmup_steps counts.
        accumulation: Parts in which a batch is processed.
        seed: Of parameters, masks, augmentation and the order of records.
    """

    model: MaeConfig = MaeConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.05)
    loop: LoopConfig = LoopConfig()
    loader: LoaderConfig = LoaderConfig()
    mesh: MeshConfig = MeshConfig()
    epochs: Epochs = 0
    warmup_epochs: Epochs = 0
    accumulation: int = 1
    seed: Seed = 0


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


def in_steps(config: PretrainConfig, num_records: int) -> PretrainConfig:
    """Return the configuration with epochs turned into steps."""
    if not config.epochs:
        return config
    per_epoch = num_records / config.loader.batch_size
    steps = max(round(config.epochs * per_epoch), 1)
    warmup = min(round(config.warmup_epochs * per_epoch), steps)
    return dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, steps=steps),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
    )


def pretrain(
    config: PretrainConfig,
    source: Source,
    held_out: Source | None,
    transform: Transform,
    *,
    folder: RunFolder,
    log: Log,
    augment: Augment | None = None,
    start: Params | None = None,
) -> tuple[Params, list[Reconstruction]]:
    """Train a masked autoencoder.

    Args:
        config: The run.
        source: Records to train on.
        held_out: Records on which the reconstruction error is told; None for none.
        transform: A record's fields to {"image": [*image_size, channels]}.
        folder: The run.
        log: Its log.
        augment: `augment(key, image) -> image`, on the device, one image at a time.
        start: Parameters to start from; what is not among them is drawn.

    Returns:
        The parameters, and the first held-out images (at most three) as the model completes them.
    """
    config = in_steps(config, len(source))
    mesh = make_mesh(config.mesh)
    shapes = check_fit(config, mesh)
    announce(log, "Drawing the parameters", params=shapes, smaller=folder.smaller)
    model = make_model(Mae(config.model))
    settings = dataclasses.replace(config.optimizer, frozen=(*config.optimizer.frozen, *FROZEN))
    optimizer = make_optimizer(settings, config.loop.steps)
    # Given parameters are an argument: closed over, they would be constants of the program.
    given = () if start is None else (start,)
    init = partial(_initialise, model, config.model)
    state = create_state(jax.random.key(config.seed), init, optimizer, mesh, *given, rules=SHARDING_RULES)
    step = make_train_step(
        partial(_loss, model, config.model, augment),
        optimizer,
        state=state,
        accumulation=config.accumulation,
        schedule=learning_rate(settings, config.loop.steps),
        frozen=settings.frozen,
    )
    reading = dataclasses.replace(config.loader, seed=config.seed)
    batches = make_loader(source, transform, reading, *data_share(mesh))
    evaluate = None if held_out is None else _make_evaluation(config, model, mesh, held_out, transform)
    state = fit(config.loop, state, step, batches, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    # Pictures are looked at by every process, which may hold only a part of the parameters.
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    params = whole(state.params) if held_out is not None and jax.process_count() > 1 else state.params
    pictures = []
    for number in range(0 if held_out is None else min(3, len(held_out))):
        fields = transform(held_out[number], np.random.default_rng(0))  # pyright: ignore[reportOptionalSubscript]
        key = _mask_key(config.seed, number)
        pictures.append(reconstruct(model, config.model, params, key, fields["image"]))
    return state.params, pictures


def check_fit(config: PretrainConfig, mesh: Mesh) -> Params:
    """Check that the batch and the model divide over the devices, before anything is written.

    Returns:
        Shapes of the parameters.

    Raises:
        InputError: They do not.
    """
    size, parts, devices = config.loader.batch_size, config.accumulation, mesh.shape["data"]
    if parts < 1 or size % (parts * devices):
        expected = f"a multiple of {max(parts, 1)} parts (accumulation) x {devices} devices (mesh.data)"
        raise InputError("loader.batch_size", expected, size, "change the batch size, --accumulation or --mesh.data")
    shapes = jax.eval_shape(partial(_initialise, make_model(Mae(config.model)), config.model), jax.random.key(0))
    try:
        layout(shapes, mesh, SHARDING_RULES)
    except ValueError as error:
        expected = "a number of devices that divides heads and hidden widths"
        raise InputError("mesh.model", expected, f"{mesh.shape['model']} ({error})", "change --mesh.model") from error
    return shapes


def _initialise(model: Model, config: MaeConfig, key: KeyArray, start: Params | None = None) -> Params:
    encoder = config.encoder
    image = jnp.zeros((1, *encoder.image_size, encoder.channels))
    drawn = model.init(key, image, jnp.zeros((1, encoder.num_tokens)))
    return drawn if start is None else replace(drawn, named_leaves(start))


def _make_evaluation(
    config: PretrainConfig, model: Model, mesh: Mesh, held_out: Source, transform: Transform
) -> Callable[[TrainState], dict[str, float]]:
    """Return the error on held-out records, the variance of the targets, and the share of it that is explained."""
    size = config.loader.batch_size // config.accumulation
    reading = dataclasses.replace(config.loader, batch_size=size)
    everywhere = NamedSharding(mesh, PartitionSpec())
    score = jax.jit(partial(score_batch, model, config.model, config.seed), out_shardings=everywhere)

    def evaluate(state: TrainState) -> dict[str, float]:
        total = np.zeros(3)
        for batch in evaluation_batches(held_out, transform, reading, *data_share(mesh)):
            total += np.asarray(score(state.params, shard_batch(batch, mesh)))
        error, variance = total[:2] / total[2]
        return {"error": error, "variance": variance, "explained": 1 - error / variance}

    return evaluate


def _mask_key(seed: int, record: Any) -> KeyArray:
    """Return the key of a held-out record's mask, which is the same in every evaluation and in its picture."""
    return jax.random.fold_in(jax.random.key(seed), record)


def _loss(
    model: Model,
    config: MaeConfig,
    augment: Augment | None,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> Any:
    pairs = jax.vmap(jax.random.split)(keys)
    images = batch["image"] if augment is None else jax.vmap(augment)(pairs[:, 0], batch["image"])
    return masked_loss(model, config, params, pairs[:, 1], {"image": images})


def score_batch(
    model: Model, config: MaeConfig, seed: int, params: Params, batch: Mapping[str, Array]
) -> Float[Array, " 3"]:
    """Return sums over the records of a batch: error, variance of the targets, and weight.

    Args:
        model: Of `models.mae.Mae`.
        config: Its configuration.
        seed: Of the masks; each record's depends on the seed and its number alone.
        params: Its parameters.
        batch: "image", "record" and "weight" of `data.loader.evaluation_batches`.
    """
    keys = jax.vmap(partial(_mask_key, seed))(jnp.maximum(batch["record"], 0))
    image, weight = batch["image"], batch["weight"]
    output = model.apply(params, image, draw_noise(keys, config.encoder.num_tokens))
    target = masked_targets(image, output.masking, config)
    error = jnp.mean(jnp.square(output.prediction - target), axis=(1, 2))
    return jnp.stack([weight @ error, weight @ jnp.var(target, axis=(1, 2)), weight.sum()])


def reconstruct(
    model: Model, config: MaeConfig, params: Params, key: KeyArray, image: Float[np.ndarray, "..."]
) -> Reconstruction:
    """Hide patches of one image and complete it.

    Args:
        model: Of `models.mae.Mae`.
        config: Its configuration.
        params: Its parameters.
        key: Of the mask.
        image: [*image_size, channels].
    """
    seen, completed, error, variance = _complete(model, config, params, key, jnp.asarray(image))
    return Reconstruction(np.asarray(image), np.asarray(seen), np.asarray(completed), float(error), float(variance))


# Compiled here, because a recipe shows several pictures, and operation by operation each takes seconds.
@partial(jax.jit, static_argnums=(0, 1))
def _complete(model: Model, config: MaeConfig, params: Params, key: KeyArray, image: Array) -> tuple[Array, ...]:
    encoder = config.encoder
    output = model.apply(params, image[None], draw_noise(key[None], encoder.num_tokens))
    patches = patchify(image[None], encoder.patch_size)
    masking: Masking = output.masking
    kept, hidden = take_tokens(patches, masking.kept), take_tokens(patches, masking.hidden)
    target, guess = masked_targets(image[None], masking, config), output.prediction
    error, variance = jnp.mean(jnp.square(guess - target)), jnp.var(target)
    if config.norm_target:
        guess = guess * jnp.sqrt(hidden.var(-1, keepdims=True, ddof=1) + 1e-6) + hidden.mean(-1, keepdims=True)

    def picture(unseen: Array) -> Array:
        tokens = restore_order(jnp.concatenate([kept, unseen], axis=1), masking)
        return unpatchify(tokens, encoder.grid, encoder.patch_size)[0]

    return picture(jnp.zeros_like(hidden)), picture(guess), error, variance

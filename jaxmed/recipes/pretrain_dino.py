"""Pre-train an encoder of images without labels by DINOv2: a student, its teacher, many crops.

What is exported is the teacher's encoder. The loss does not tell whether training collapses, for a teacher that says
the same of everything is easy to follow; held-out images do, by how far their class tokens are spread.

Source: DINOv2, arXiv:2304.07193, and its official code.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.loader import LoaderConfig, Transform, evaluation_batches
from jaxmed.data.records import Source
from jaxmed.errors import InputError
from jaxmed.metrics.feature_space import effective_rank, find_neighbours
from jaxmed.models.dino import DinoHeadConfig, dinov2, unit
from jaxmed.recipes.dino_loss import Centres, DinoConfig, dino_network, encode
from jaxmed.recipes.dino_step import Augment, DinoState, adam, make_dino_step
from jaxmed.recipes.training import (
    TrainConfig,
    TrainData,
    check_fit,
    in_steps,
    initialise,
    record_keys,
    run_steps,
)
from jaxmed.train.announce import announce
from jaxmed.train.log import Log, at_work, series
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import (
    abstract,
    abstract_batch,
    gathered,
    make_mesh,
    param_shardings,
    process_slice,
    shard_batch,
)
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload, training_workload


def released() -> tuple[DinoConfig, TrainConfig]:
    """Return DINOv2's default configuration: ViT-L/16, one head, a centre; 64 images for each device.

    Its epochs are of 1,250 steps whatever the data; ours are passes over the records.
    """
    optimizer = OptimizerConfig(
        peak_lr=4e-3, end_lr=1e-6, weight_decay=0.04, no_decay=(r"(^|/)(bias|scale\d?)$",), clip_norm=3.0,
        layer_decay=0.9,
    )  # fmt: skip
    loop, loader = LoopConfig(log_every=10, save_every=500, evaluate_every=500), LoaderConfig(batch_size=64)
    return DinoConfig(), TrainConfig(optimizer, loop, loader, epochs=100, warmup_epochs=10)


def released_22k() -> tuple[DinoConfig, TrainConfig]:
    """Return DINOv2's configuration for 22 thousand classes: ViT-L/14 with gated MLPs, two heads, Sinkhorn-Knopp."""
    config, train = released()
    config = dataclasses.replace(
        config,
        encoder=dinov2(
            "L", image_size=(224, 224), hidden=2736, mlp="swiglu", drop_path_rate=0.4, drop_path_uniform=True
        ),
        head=DinoHeadConfig(131_072, bottleneck=384),
        shared_head=False,
        patch_head=DinoHeadConfig(131_072),
        local_size=(98, 98),
        centring="sinkhorn",
        teacher_momentum=0.994,
        final_weight_decay=0.2,
    )
    optimizer = dataclasses.replace(train.optimizer, peak_lr=2e-4, layer_decay=1.0)
    loader = LoaderConfig(batch_size=32)
    return config, dataclasses.replace(train, optimizer=optimizer, loader=loader, epochs=500, warmup_epochs=80)


def pretrain_dino(
    config: TrainConfig,
    dino: DinoConfig,
    data: TrainData,
    augment: Augment,
    *,
    folder: RunFolder,
    log: Log,
    start: Params | None = None,
    anchor: Params | None = None,
) -> tuple[Params, DinoState]:
    """Train student and teacher, or continue a run of this folder.

    Args:
        config: The run; its optimizer is AdamW, whose weight decay is that of the first step.
        dino: What is trained and how.
        data: The records; transformed, they are {"image": [x, y, channels]}, all of one size.
        augment: `augment(key, image)`, the crops of one image, on the device.
        folder: The run.
        log: Its log.
        start: Parameters to start from, such as {"encoder": ...}; what is not among them is drawn.
        anchor: All parameters of the encoder whose similarity of patches the student keeps to, where
            `dino.gram_weight` is above 0.

    Returns:
        The teacher's encoder, as `models.vit.Vit` takes it, and the last state.

    Raises:
        InputError: The run asks for what this recipe does not do, or the batch does not divide over the devices.
    """
    _check(config, dino)
    check_anchor(dino, anchor is not None)
    config = with_scaled_rate(in_steps(config, len(data.training)), dino)
    network, mesh = dino_network(dino), make_mesh(config.mesh)
    announce(log, "Drawing the parameters", params=check_fit(config, network), smaller=folder.smaller)
    state = create_dino_state(config, dino, mesh, start, anchor)
    step = make_dino_step(config, dino, augment, len(data.training) / config.loader.batch_size, mesh, state)
    evaluate = None
    if data.held_out is not None:
        evaluate = make_view_evaluation(config, dino, mesh, data.held_out, data.transform, augment)
    state = run_steps(config, state, step, data, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    return state.teacher["encoder"], state


def plan_dino(config: TrainConfig, dino: DinoConfig, augment: Augment, image: tuple[int, ...], mesh: Mesh) -> Workload:
    """Return the step of `pretrain_dino` and the shapes of its arguments, of which nothing is made.

    Args:
        config: The run.
        dino: What is trained and how; with a weight of an anchor there is one.
        augment: As of `pretrain_dino`.
        image: Shape of a transformed record's image.
        mesh: The devices, which may be those of a topology that is not here.
    """
    _check(config, dino)
    network = dino_network(dino)
    shapes = check_fit(config, network, mesh)
    given = jax.random.key(config.seed), None, shapes["encoder"] if dino.gram_weight else None
    created = jax.eval_shape(_creator(config, dino), *given)
    state = abstract(created, param_shardings(created, mesh, network.rules))
    # How many steps an epoch has is a constant of the schedules alone.
    step = make_dino_step(with_scaled_rate(config, dino), dino, augment, 1000.0, mesh, state)
    record = {"image": jax.ShapeDtypeStruct(image, jnp.float32)}
    return training_workload(step, state, abstract_batch(record, config.loader.batch_size, mesh), record)


def with_scaled_rate(config: TrainConfig, dino: DinoConfig) -> TrainConfig:
    """Return the configuration with its learning rate scaled by the root of the batch."""
    if not dino.reference_batch:
        return config
    rate = config.optimizer.peak_lr * (config.loader.batch_size / dino.reference_batch) ** 0.5
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_lr=rate))


def check_anchor(dino: DinoConfig, is_given: bool) -> None:
    """Check that there is an anchor where its loss counts, and only there.

    Raises:
        InputError: Only one of the two is there.
    """
    if is_given and not dino.gram_weight:
        raise InputError("dino.gram_weight", "a number above 0 beside an anchor", "0", "the paper has 2")
    if dino.gram_weight and not is_given:
        raise InputError("anchor", "weights to keep to, for --dino.gram-weight", "none", "give --anchor")


def create_dino_state(
    config: TrainConfig, dino: DinoConfig, mesh: Mesh, start: Params | None = None, anchor: Params | None = None
) -> DinoState:
    """Make the first state in its place; the teacher begins as a copy of the student, and the anchor stays."""
    given = jax.random.key(config.seed), start, anchor
    create = _creator(config, dino)
    places = param_shardings(jax.eval_shape(create, *given), mesh, dino_network(dino).rules)
    with at_work("Drawing the parameters"):
        return jax.jit(create, out_shardings=places)(*given)


def _creator(config: TrainConfig, dino: DinoConfig) -> Callable[..., DinoState]:
    network = dino_network(dino)

    def create(key: KeyArray, given: Params | None, anchor: Params | None) -> DinoState:
        init_key, root_key = jax.random.split(key)
        student = initialise(network, init_key, given)
        patch_head = dino.head if dino.shared_head else dino.patch_head
        centres = Centres(jnp.zeros(dino.head.prototypes), jnp.zeros(patch_head.prototypes))
        teacher = jax.tree.map(jnp.copy, student)
        moments = adam(config).init(student)
        return DinoState(jnp.zeros((), jnp.int32), student, teacher, centres, moments, root_key, anchor)

    return create


def make_view_evaluation(
    config: TrainConfig, dino: DinoConfig, mesh: Mesh, held_out: Source, transform: Transform, augment: Augment
) -> Callable[[DinoState], Mapping[str, float]]:
    """Return the function from a state to what the teacher makes of held-out images; see `spread_of_views`.

    The two global crops of each image are the same in every evaluation.
    """

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def look(encoder: Params, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        keys = record_keys(config.seed, jnp.maximum(batch["record"], 0))
        crops = jax.vmap(augment)(keys, batch["image"])
        return unit(encode(dino, encoder, crops.globals_)[0], 1e-12), batch["weight"]

    def evaluate(state: DinoState) -> Mapping[str, float]:
        found, encoder = [], gathered(state.teacher["encoder"])
        for batch in evaluation_batches(held_out, transform, config.loader, *process_slice(mesh)):
            tokens, weight = jax.device_get(look(encoder, shard_batch(batch, mesh)))
            found.append(tokens[weight > 0])
        return spread_of_views(np.concatenate(found))

    return evaluate


def spread_of_views(tokens: Float[np.ndarray, "image 2 width"]) -> dict[str, float]:
    """Tell by class tokens of length 1 whether an encoder has collapsed.

    Args:
        tokens: Of two crops of each image.

    Returns:
        "spread": root of the total variance, 0 where all tokens are the same and 1 where their mean is 0;
        "effective_rank": see `metrics.feature_space.effective_rank`; "matched": share of crops whose nearest other crop
        is the other one of the same image.
    """
    views = tokens.reshape(-1, tokens.shape[-1])
    partner = np.arange(len(views)) ^ 1
    return {
        "spread": float(np.sqrt(views.var(axis=0, dtype=np.float64).sum())),
        "effective_rank": effective_rank(views),
        "matched": float(np.mean(find_neighbours(views).index == partner)),
    }


def collapse_notes(lines: Sequence[Mapping[str, float]], prototypes: int) -> tuple[str, ...]:
    """Tell whether a run ended with a teacher that says the same of everything.

    Args:
        lines: Metrics of the run, with "teacher_entropy" in nats.
        prototypes: Of the head of class tokens; the entropy is at most the logarithm of their number.

    Returns:
        A warning where the entropy of the last tenth of the lines is within 3 % of that, else nothing.
    """
    _, entropy = series(lines, "teacher_entropy")
    if not len(entropy):
        return ()
    last, most = float(entropy[-max(len(entropy) // 10, 1) :].mean()), math.log(prototypes)
    if last < 0.97 * most:
        return ()
    return (
        f"The teacher's entropy ended at {last:.2f} of at most {most:.2f}: it says nearly the same of every picture, "
        "so the encoder has learned little. Train longer, keep --dino.teacher-temperature low, let the teacher follow "
        "more slowly (--dino.teacher-momentum), or change colours less (--dino-crops).",
    )


def _check(config: TrainConfig, dino: DinoConfig) -> None:
    if config.optimizer.kind != "adamw":
        raise InputError("optimizer.kind", "adamw, for DINO", config.optimizer.kind)
    if config.accumulation != 1:
        advice = "take more devices, or a smaller loader.batch_size"
        expected = "1, for DINO compares all images of a batch with one another"
        raise InputError("accumulation", expected, config.accumulation, advice)
    if config.ema_decay:
        raise InputError("ema_decay", "0, for the teacher is an average already", config.ema_decay)
    if config.loader.batch_size < 2 and dino.koleo_weight:
        expected = "2 images or more, for KoLeo looks for the nearest other one"
        raise InputError("loader.batch_size", expected, config.loader.batch_size)

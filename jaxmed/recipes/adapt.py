"""Adapt an encoder to labels: fine-tune it all, train a head on it, or put a logistic probe on its features.

Runs that differ in records, seed, start, rates, length or class weights alone compile once: see `adapt_program`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.task import Task, standardise
from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import Params
from jaxmed.config import Decay, Epochs, Fraction, Positive, checked
from jaxmed.data.loader import Fields, Transform, evaluation_batches
from jaxmed.data.mixing import MixConfig
from jaxmed.data.records import ArraySource, Source
from jaxmed.errors import InputError
from jaxmed.metrics.classification import auroc
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig, init_head, pool_tokens
from jaxmed.nn.model import Network, make_model
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes import training
from jaxmed.recipes.adapt_program import Augment, CompileKey, make_program, make_schedule
from jaxmed.recipes.probe import fit_probe
from jaxmed.recipes.training import NO_PREFIX, TrainConfig, TrainData, TrainFlags, check_fit, run_steps
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import compare_arrays
from jaxmed.train.log import Log, at_work
from jaxmed.train.loop import restore_best
from jaxmed.train.mesh import make_mesh, process_slice, shard_batch
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState

Mode: TypeAlias = Literal["full", "frozen", "logistic"]
FINE_TUNING = OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, weight_decay=0.05, layer_decay=0.75)


@dataclasses.dataclass(frozen=True)
@checked
class AdaptConfig:
    """A run on labels; the optimizer's defaults are TANGERINE's for fine-tuning.

    Attributes:
        train: Optimizer (of full and frozen), length, reading, devices and seed. Evaluations and the choice of the
            best follow from the fields below.
        mode: "full" trains everything; "frozen" the head alone; "logistic" fits an L2 logistic regression (ridge for
            regression) to standardised features, its strength chosen on validation records.
        evaluate_epochs: Epochs between evaluations on validation records; 0 leaves them to loop.evaluate_every.
        select: Which evaluation's parameters are kept: those of lowest validation loss, or of highest AUROC.
        token_keep: Share of the patch tokens that a training step looks at, drawn anew for every image: less memory and
            time. Scoring sees all.
        smoothing: Label smoothing of a multi-class task.
        mix: Mixup and CutMix of training images, in pairs within a part; not for a regression or a logistic probe.
        class_weights: Factors on the loss of each label's positives (binary, multi-label), or of each class, in the
            order of the report; empty for ones.
    """

    train: TrainFlags = TrainConfig(optimizer=FINE_TUNING)
    mode: Mode = "full"
    evaluate_epochs: Epochs = 1
    select: Literal["loss", "auroc"] = "loss"
    token_keep: Fraction = 1.0
    smoothing: Decay = 0.1
    mix: MixConfig = MixConfig()
    class_weights: tuple[Positive, ...] = ()


# The type of a stage's field `adapt`: on the command line its options carry no prefix.
AdaptFlags: TypeAlias = Annotated[AdaptConfig, NO_PREFIX]


class Adapted(NamedTuple):
    """What a run ends with.

    Attributes:
        params: {"encoder": ..., "head": ...}, of the selected evaluation.
        head: The head that they belong to; a logistic probe changes it.
        step: Steps after which they were selected; 0 for a logistic probe.
        history: The lines of metrics.jsonl.
        choices: Of a logistic probe: factor and validation loss, one row per factor and label; otherwise empty.
    """

    params: Params
    head: HeadConfig
    step: int
    history: list[dict[str, float]]
    choices: list[dict[str, Any]]


def in_steps(config: AdaptConfig, num_records: int) -> AdaptConfig:
    """Return the configuration with epochs turned into steps, and the choice of the best set."""
    train = training.in_steps(config.train, num_records)
    loop = dataclasses.replace(
        train.loop, best=config.select, best_is="smallest" if config.select == "loss" else "largest"
    )
    if config.evaluate_epochs:
        every = round(config.evaluate_epochs * num_records / train.loader.batch_size)
        loop = dataclasses.replace(loop, evaluate_every=max(every, 1))
    return dataclasses.replace(config, train=dataclasses.replace(train, loop=loop))


def adapt(
    config: AdaptConfig,
    encoder: Encoder,
    head: HeadConfig,
    task: Task,
    data: TrainData,
    *,
    folder: RunFolder,
    log: Log,
    augment: Augment | None = None,
    start: Params | None = None,
) -> Adapted:
    """Train a classifier or regressor and return it as it was at its best on validation records.

    Args:
        config: The run.
        encoder: What makes tokens of an image.
        head: What stands on it; as many outputs as the task has names.
        task: What the outputs mean.
        data: Records to train on, and those held out, which select; the transform makes of a record's fields
            {"image": [*image_size, channels], "target": [column]}: 0, 1 or NaN per label, one class number, or values
            in their unit.
        folder: The run.
        log: Its log.
        augment: `augment(key, image) -> image`, on the device, one image at a time; not used by a logistic probe.
        start: {"encoder": ...}, from `take_encoder` or an earlier run, and optionally {"head": ...}; what is not there
            is drawn.
    """
    shapes = check_run(config, encoder, head, task)
    announce(log, "Drawing and reading the parameters", params=shapes, smaller=folder.smaller)
    config = in_steps(config, len(data.training))
    data = data._replace(transform=Labelled(data.transform, task, loss_weights(config, task)))
    has_variants = augment is not None or config.token_keep < 1 or config.mix.is_on
    if config.mode == "full" or (config.mode == "frozen" and has_variants):
        return _train(config, encoder, head, task, data, folder, log, augment, start or {})
    # Without augmentation an image has the same features every time: they are computed once.
    start = start or {}
    given = start.get("encoder")
    if given is None:
        given = jax.jit(encoder.init)(jax.random.key(config.train.seed))
    assert data.held_out is not None
    count, others = len(data.training), len(data.held_out)
    log.say(f"Computing the features of {count:,} training and {others:,} validation records, once.")
    pairs = TrainData(
        token_pairs(config, encoder, given, data.training, data.transform),
        token_pairs(config, encoder, given, data.held_out, data.transform),
        identity,
    )
    if config.mode == "logistic":
        return _fit_logistic(config, encoder, head, task, given, pairs, log)
    found = _train(config, encoder, head, task, pairs, folder, log, None, {n: start[n] for n in start if n == "head"})
    return found._replace(params={"encoder": given, **found.params})


def check_run(config: AdaptConfig, encoder: Encoder, head: HeadConfig, task: Task) -> Params:
    """Check that head and weights fit the task, and batch and model the devices, before anything is written.

    Returns:
        Shapes of the parameters.

    Raises:
        InputError: They do not.
    """
    if head.outputs != len(task.names):
        raise InputError("model.head.outputs", f"one per name of the task, {len(task.names)}", head.outputs)
    loss_weights(config, task)
    if config.mix.is_on and (task.kind == "regression" or config.mode == "logistic"):
        found = "a regression" if task.kind == "regression" else "a logistic probe"
        raise InputError("mix", "a classification by full or frozen", found, "leave --mix.mixup and --mix.cutmix at 0")
    if not encoder.prefix and head.pool != "mean":
        raise InputError("pool", "mean, of an encoder without a class token", head.pool)
    if config.token_keep < 1 and not encoder.can_drop:
        raise InputError("token_keep", "1, of an encoder that takes whole images", f"{config.token_keep:g}")
    if config.train.optimizer.layer_decay < 1 and encoder.layers is None:
        found = f"{config.train.optimizer.layer_decay:g}"
        raise InputError("optimizer.layer_decay", "1, of an encoder without layers", found)

    def draw(key: Any) -> Params:
        return {"encoder": encoder.init(key), "head": init_head(head, encoder.width, encoder.prefix, key)}

    train = config.train
    if config.mode == "logistic":  # nothing is divided
        loader = dataclasses.replace(train.loader, batch_size=make_mesh(train.mesh).shape["data"])
        train = dataclasses.replace(train, loader=loader, accumulation=1)
    return check_fit(train, Network(draw, encoder.apply, encoder.rules))


def score(
    config: AdaptConfig, encoder: Encoder, head: HeadConfig, params: Params, source: Source, transform: Transform
) -> Float[np.ndarray, "record output"]:
    """Return the logits of every record, in the order of the source.

    Args:
        config: Its loader, mesh and accumulation count: records are read in batches of one part.
        encoder: The encoder of the parameters.
        head: Their head.
        params: {"encoder": ..., "head": ...}.
        source: Records.
        transform: As for `adapt`; "target" is not looked at.
    """
    mesh = make_mesh(config.train.mesh)
    return _collect(_scorer(encoder, head, mesh), params, _evaluation(config, source, transform, mesh), len(source))


# Labels and selection ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A transform whose records bring what the loss needs besides; picklable.

    Attributes:
        transform: To "image" and "target".
        task: Standardises the targets of a regression.
        weights: Of positives or classes.
    """

    transform: Transform
    task: Task
    weights: tuple[float, ...]

    def __call__(self, fields: Fields, generator: np.random.Generator) -> Fields:
        """Return image, target [column] and weights [output], float32."""
        found = dict(self.transform(fields, generator))
        target = np.atleast_1d(np.asarray(found["target"], np.float32))
        return {**found, "target": standardise(target, self.task), "weights": np.array(self.weights, np.float32)}


def identity(fields: Fields, generator: object = None) -> Fields:
    """Return the fields of a record that is ready."""
    return fields


def loss_weights(config: AdaptConfig, task: Task) -> tuple[float, ...]:
    """Return one weight per output.

    Raises:
        InputError: When there are weights, but not one per output.
    """
    weights = config.class_weights or (1.0,) * len(task.names)
    if len(weights) != len(task.names):
        expected = f"one per output, {len(task.names)} ({', '.join(task.names)})"
        raise InputError("class_weights", expected, len(weights))
    return weights


def measure(
    task: Task,
    logits: Float[np.ndarray, "record output"],
    targets: Float[np.ndarray, "record column"],
    weights: tuple[float, ...],
) -> dict[str, float]:
    """Return what an evaluation tells: the loss (weighted, without smoothing), and the AUROC where it is defined.

    The AUROC of several classes or labels is the mean of each one's against the rest.

    Args:
        task: The task.
        logits: Of the records.
        targets: As the loss takes them: standardised, NaN where missing.
        weights: From `loss_weights`.
    """
    losses = task_losses(task.kind, jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    found = {"loss": float(np.mean(np.asarray(losses), dtype=np.float64))}
    if task.kind == "regression":
        return found
    columns = np.eye(logits.shape[1])[targets[:, 0].astype(int)] if task.kind == "multiclass" else targets
    scores = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=1)) if task.kind == "multiclass" else logits
    areas = []
    for column, values in zip(columns.T, scores.T, strict=True):
        known = np.isfinite(column)
        if len(set(column[known])) < 2:
            return found
        areas.append(auroc(column[known].astype(np.int64), values[known]))
    return {**found, "auroc": float(np.mean(areas))}


# Training ------------------------------------------------------------------------------------------------------------


def _train(
    config: AdaptConfig,
    encoder: Encoder,
    head: HeadConfig,
    task: Task,
    data: TrainData,
    folder: RunFolder,
    log: Log,
    augment: Augment | None,
    start: Params,
) -> Adapted:
    mesh, train = make_mesh(config.train.mesh), config.train
    is_pairs = isinstance(data.training, ArraySource) and "tokens" in data.training.arrays
    rate = train.optimizer
    key = CompileKey(
        encoder, head, task.kind, dataclasses.replace(rate, peak_lr=0.0, end_lr=0.0, warmup_steps=0),
        train.accumulation, config.token_keep, config.smoothing, config.mix, augment,
        "head on pairs" if is_pairs else "all" if config.mode == "full" else "head",
    )  # fmt: skip
    program = make_program(key, mesh)
    with at_work("Drawing the parameters"):
        schedule = make_schedule(rate.peak_lr, rate.end_lr, rate.warmup_steps, train.loop.steps)
        state = program.create(jax.random.key(train.seed), start, schedule)
    run = _head_scorer(head, encoder.prefix, mesh) if is_pairs else _scorer(encoder, head, mesh)
    weights, validation = loss_weights(config, task), data.held_out
    assert validation is not None

    def evaluate(state: TrainState) -> dict[str, float]:
        stream = _evaluation(config, validation, data.transform, mesh)
        targets: list[np.ndarray] = []
        logits = _collect(run, state.params, stream, len(validation), targets)
        return measure(task, logits, targets[0], weights)

    state = run_steps(train, state, program.step, data, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    best = restore_best(folder, state)
    return Adapted(best.params, head, int(best.step), log.read_metrics(), [])


def _evaluation(config: AdaptConfig, source: Source, transform: Transform, mesh: Mesh) -> Any:
    train, devices = config.train, mesh.shape["data"]
    rows = max(train.loader.batch_size // train.accumulation, 1)
    reading = dataclasses.replace(train.loader, batch_size=-(-rows // devices) * devices, seed=train.seed)
    for batch in evaluation_batches(source, transform, reading, *process_slice(mesh)):
        yield shard_batch(batch, mesh)


def _collect(
    run: Callable[..., Any], params: Params, batches: Any, count: int, targets: list[np.ndarray] | None = None
) -> np.ndarray:
    """Return one row per record of what `run` gives for a batch, and append the records' targets where asked."""
    rows: np.ndarray | None = None
    wanted: np.ndarray | None = None
    for batch in batches:
        told = {name: batch[name] for name in ("record", "target") if name in batch}
        values, told = jax.device_get(
            run(params, {name: batch[name] for name in ("image", "tokens") if name in batch}, told)
        )
        real = told["record"] >= 0
        if rows is None:
            rows = np.full((count, *values.shape[1:]), np.nan, np.float32)
        rows[told["record"][real]] = values[real]
        if targets is not None:
            wanted = np.full((count, told["target"].shape[1]), np.nan, np.float32) if wanted is None else wanted
            wanted[told["record"][real]] = told["target"][real]
    assert rows is not None
    if targets is not None and wanted is not None:
        targets.append(wanted)
    return rows


def _on_all(function: Callable[..., Array], mesh: Mesh) -> Callable[..., Any]:
    """Compile `function(params, inputs)` so that every process gets all rows, and what belongs to them."""
    return jax.jit(
        lambda params, inputs, told: (function(params, inputs), told),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


@functools.lru_cache(maxsize=4)
def _scorer(encoder: Encoder, head: HeadConfig, mesh: Mesh) -> Callable[..., Any]:
    apply = make_model(Head(head, encoder.prefix)).apply

    def logits(params: Params, inputs: Mapping[str, Array]) -> Array:
        tokens = encoder.norm(params["encoder"], encoder.apply(params["encoder"], inputs["image"]))
        return apply(params["head"], tokens)[0]

    return _on_all(logits, mesh)


@functools.lru_cache(maxsize=4)
def _head_scorer(head: HeadConfig, prefix: int, mesh: Mesh) -> Callable[..., Any]:
    apply = make_model(Head(head, min(prefix, 1))).apply
    return _on_all(lambda params, inputs: apply(params["head"], inputs["tokens"])[0], mesh)


@functools.lru_cache(maxsize=4)
def _pair_maker(encoder: Encoder, mesh: Mesh) -> Callable[..., Any]:
    def pair(params: Params, inputs: Mapping[str, Array]) -> Array:
        pooled = pool_tokens(encoder.norm(params, encoder.apply(params, inputs["image"])), encoder.prefix)
        return jnp.stack([pooled.class_token, pooled.pooled][not encoder.prefix :], axis=1)

    return _on_all(pair, mesh)


# Frozen encoders -----------------------------------------------------------------------------------------------------


def take_encoder(params: Params, encoder: Encoder, where: str) -> Params:
    """Return the {"encoder": ...} of a classifier's start out of other parameters, such as a masked autoencoder's.

    Args:
        params: Hold "encoder", with positions of this grid; a final norm is left behind where the classifier has none.
        encoder: What the classifier wants.
        where: The file, for messages.

    Raises:
        InputError: The encoder lacks a part, or a size differs.
    """
    given = params.get("encoder")
    if given is None:
        raise InputError(where, "parameters with an encoder", f"only {', '.join(params) or 'none'}")
    wanted: Any = jax.eval_shape(encoder.init, jax.random.key(0))
    kept = {name: given[name] for name in wanted if name in given}
    compare_arrays(_shapes(wanted), _shapes(kept), where)
    return {"encoder": kept}


def _shapes(tree: Any) -> dict[str, Any]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}


def token_pairs(
    config: AdaptConfig, encoder: Encoder, params: Params, source: Source, transform: Transform
) -> ArraySource:
    """Encode every record once.

    Returns:
        Records of "tokens" [2, width], the class token and the mean of the patch tokens (the mean alone where there is
        no class token): a head makes of these what it makes of all. "target" and "weights" come along.
    """
    mesh = make_mesh(config.train.mesh)
    targets: list[np.ndarray] = []
    stream = _evaluation(config, source, transform, mesh)
    tokens = _collect(_pair_maker(encoder, mesh), params, stream, len(source), targets)
    weights = np.asarray(transform(source[0], np.random.default_rng(0))["weights"])
    return ArraySource(
        {"tokens": tokens, "target": targets[0], "weights": np.repeat(weights[None], len(source), axis=0)}, "features"
    )


def _fit_logistic(
    config: AdaptConfig, encoder: Encoder, head: HeadConfig, task: Task, given: Params, pairs: TrainData, log: Log
) -> Adapted:
    head = dataclasses.replace(head, hidden=0, norm=False)
    apply = make_model(Head(head, min(encoder.prefix, 1))).apply
    sources: Any = (pairs.training, pairs.held_out)
    features, others = (
        np.asarray(apply({}, jnp.asarray(source.arrays["tokens"]), method="features")) for source in sources
    )
    targets, wanted = (source.arrays["target"] for source in sources)
    weights = loss_weights(config, task)
    probe = fit_probe(task.kind, features, targets, others, wanted, np.array(weights, np.float32))
    params = {"encoder": given, "head": {"linear": {"kernel": probe.kernel, "bias": probe.bias}}}
    found = measure(task, others @ probe.kernel + probe.bias, wanted, weights)
    log.metrics(0, {f"evaluation/{name}": value for name, value in found.items()})
    log.say("Probe: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    names = ("all classes",) if task.kind == "multiclass" else task.names
    choices = [
        {"label": name, "strength": strength, "validation_loss": float(probe.losses[row, column]),
         "chosen": int(strength == probe.chosen[column])}
        for column, name in enumerate(names) for row, strength in enumerate(probe.strengths)
    ]  # fmt: skip
    return Adapted(params, head, 0, log.read_metrics(), choices)

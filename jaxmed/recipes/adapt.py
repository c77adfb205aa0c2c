"""Adapt an encoder to labels: fine-tune it all, train a head on it, or put a logistic probe on its features.

Runs that differ in records, seed, start, rates, length or class weights alone compile once: see `adapt_program`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmed.arrays.task import Task, standardise
from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import Params
from jaxmed.config import Epochs, Seed, checked
from jaxmed.data.loader import Fields, LoaderConfig, Transform, evaluation_batches, make_loader
from jaxmed.data.mixing import MixConfig
from jaxmed.data.records import ArraySource, Source
from jaxmed.errors import InputError
from jaxmed.metrics.classification import auroc
from jaxmed.models.heads import Classifier, ClassifierConfig, Head, HeadConfig, pool_tokens
from jaxmed.models.vit import SHARDING_RULES, Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.objectives.supervised import task_losses
from jaxmed.recipes.adapt_program import Augment, Plan, make_program, make_span
from jaxmed.recipes.probe import fit_probe
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import compare_arrays
from jaxmed.train.log import Log, at_work
from jaxmed.train.loop import LoopConfig, fit, restore_best
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings, process_slice, shard_batch
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState


@dataclasses.dataclass(frozen=True)
@checked
class AdaptConfig:
    """A run on labels; the optimizer's defaults are TANGERINE's for fine-tuning.

    Attributes:
        mode: "full" trains everything; "frozen" the head alone; "logistic" fits an L2 logistic regression (ridge for
            regression) to standardised features, its strength chosen on validation records.
        optimizer: Of full and frozen.
        loop: Intervals; its length, evaluations and choice of the best follow from the fields below.
        loader: Batch size (over all devices) and reading.
        mesh: The devices.
        epochs: Passes over the training records; 0 leaves the length to loop.steps.
        warmup_epochs: Of them, those over which the learning rate rises; with epochs 0, optimizer.warmup_steps counts.
        evaluate_epochs: Epochs between evaluations; 0 leaves them to loop.evaluate_every.
        select: Which evaluation's parameters are returned: those of lowest validation loss or of highest AUROC.
        accumulation: Parts in which a batch is processed.
        token_keep: Share of the patch tokens that a training step looks at, drawn anew for every image; evaluation
            sees all. Memory and time fall with it.
        smoothing: Of the classes of a multi-class task.
        mix: Mixup and CutMix of training images, in pairs within a part; not for a regression or a logistic probe.
        weights: Factor on the loss of each label's positives (binary, multi-label) or of each class (multi-class);
            empty for ones.
        seed: Of parameters, tokens, augmentation and the order of records.
    """

    mode: Literal["full", "frozen", "logistic"] = "full"
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, weight_decay=0.05, layer_decay=0.75)
    loop: LoopConfig = LoopConfig()
    loader: LoaderConfig = LoaderConfig()
    mesh: MeshConfig = MeshConfig()
    epochs: Epochs = 0
    warmup_epochs: Epochs = 0
    evaluate_epochs: Epochs = 1
    select: Literal["loss", "auroc"] = "loss"
    accumulation: int = 1
    token_keep: float = 1.0
    smoothing: float = 0.1
    mix: MixConfig = MixConfig()
    weights: tuple[float, ...] = ()
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.token_keep <= 1:
            raise ValueError(f"token_keep: expected a share above 0 and up to 1, found {self.token_keep:g}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a share in [0, 1), found {self.smoothing:g}")
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights: expected numbers above 0, found {self.weights}")
        if min(self.epochs, self.warmup_epochs, self.evaluate_epochs) < 0 or self.accumulation < 1:
            raise ValueError(
                "epochs, warmup_epochs, evaluate_epochs, accumulation: expected 0 or more (1 or more parts)"
            )


class Adapted(NamedTuple):
    """What a run ends with.

    Attributes:
        params: {"encoder": ..., "head": ...}, of the selected evaluation.
        config: Of the classifier that they belong to; a logistic probe changes the head's.
        step: Steps after which they were selected; 0 for a logistic probe.
        history: The lines of metrics.jsonl.
        choices: Of a logistic probe: factor and validation loss, one row per factor and label; otherwise empty.
    """

    params: Params
    config: ClassifierConfig
    step: int
    history: list[dict[str, float]]
    choices: list[dict[str, Any]]


def in_steps(config: AdaptConfig, num_records: int) -> AdaptConfig:
    """Return the configuration with epochs turned into steps, and the choice of the best set."""
    per_epoch = num_records / config.loader.batch_size
    loop = dataclasses.replace(
        config.loop, best=config.select, best_is="smallest" if config.select == "loss" else "largest"
    )
    optimizer = config.optimizer
    if config.evaluate_epochs:
        loop = dataclasses.replace(loop, evaluate_every=max(round(config.evaluate_epochs * per_epoch), 1))
    if config.epochs:
        steps = max(round(config.epochs * per_epoch), 1)
        loop = dataclasses.replace(loop, steps=steps)
        optimizer = dataclasses.replace(optimizer, warmup_steps=min(round(config.warmup_epochs * per_epoch), steps))
    return dataclasses.replace(config, loop=loop, optimizer=optimizer)


def adapt(
    config: AdaptConfig,
    model: ClassifierConfig,
    task: Task,
    train: Source,
    validation: Source,
    transform: Transform,
    *,
    folder: RunFolder,
    log: Log,
    augment: Augment | None = None,
    start: Params | None = None,
) -> Adapted:
    """Train a classifier or regressor and return it as it was at its best on validation records.

    Args:
        config: The run.
        model: Encoder and head; as many outputs as the task has names.
        task: What the outputs mean.
        train: Records to train on.
        validation: Records that select.
        transform: A record's fields to {"image": [*image_size, channels], "target": [column]}: 0, 1 or NaN per label,
            one class number, or values in their unit.
        folder: The run.
        log: Its log.
        augment: `augment(key, image) -> image`, on the device, one image at a time; not used by a logistic probe.
        start: {"encoder": ...}, from `take_encoder` or an earlier run, and optionally {"head": ...}; what is not there
            is drawn.
    """
    shapes = check_run(config, model, task)
    announce(log, "Drawing and reading the parameters", params=shapes, smaller=folder.smaller)
    config = in_steps(config, len(train))
    labelled = Labelled(transform, task, loss_weights(config, task))
    has_variants = augment is not None or config.token_keep < 1 or config.mix.is_on
    if config.mode == "full" or (config.mode == "frozen" and has_variants):
        return _train(config, model, task, train, validation, labelled, folder, log, augment, start or {})
    # Without augmentation an image has the same features every time: they are computed once.
    encoder = _frozen_encoder(model, config, start)
    log.say(f"Computing the features of {len(train):,} training and {len(validation):,} validation records, once.")
    pairs, others = (token_pairs(config, model, encoder, source, labelled) for source in (train, validation))
    if config.mode == "logistic":
        return _fit_logistic(config, model, task, encoder, pairs, others, log)
    head = {} if start is None or "head" not in start else {"head": start["head"]}
    found = _train(config, model, task, pairs, others, pass_on, folder, log, None, head)
    return found._replace(params={"encoder": encoder, **found.params})


def check_run(config: AdaptConfig, model: ClassifierConfig, task: Task) -> Params:
    """Check that head and weights fit the task, and batch and model the devices, before anything is written.

    Returns:
        Shapes of the parameters.

    Raises:
        InputError: They do not.
    """
    if model.head.outputs != len(task.names):
        raise InputError("model.head.outputs", f"one per name of the task, {len(task.names)}", model.head.outputs)
    loss_weights(config, task)
    if config.mix.is_on and (task.kind == "regression" or config.mode == "logistic"):
        found = "a regression" if task.kind == "regression" else "a logistic probe"
        raise InputError("mix", "a classification by full or frozen", found, "leave --mix.mixup and --mix.cutmix at 0")
    mesh = make_mesh(config.mesh)
    size, parts, devices = config.loader.batch_size, config.accumulation, mesh.shape["data"]
    if config.mode != "logistic" and size % (parts * devices):
        expected = f"a multiple of {parts} parts (accumulation) x {devices} devices (mesh.data)"
        raise InputError("loader.batch_size", expected, size, "change the batch size, --accumulation or --mesh.data")
    image = jax.ShapeDtypeStruct((1, *model.encoder.image_size, model.encoder.channels), np.float32)
    try:
        shapes = jax.eval_shape(make_model(Classifier(model)).init, jax.random.key(0), image)
        param_shardings(shapes, mesh, SHARDING_RULES)
    except ValueError as error:
        expected = "a number of devices that divides heads and hidden widths"
        raise InputError("mesh.model", expected, f"{mesh.shape['model']} ({error})", "change --mesh.model") from error
    return shapes


def score(
    config: AdaptConfig, model: ClassifierConfig, params: Params, source: Source, transform: Transform
) -> Float[np.ndarray, "record output"]:
    """Return the logits of every record, in the order of the source.

    Args:
        config: Its loader, mesh and accumulation count: records are read in batches of one part.
        model: Of the parameters.
        params: {"encoder": ..., "head": ...}.
        source: Records.
        transform: As for `adapt`; "target" is not looked at.
    """
    mesh = make_mesh(config.mesh)
    run = _scorer(model, mesh)
    return _collect(run, params, _evaluation(config, source, transform, mesh), len(source))


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


def pass_on(fields: Fields, generator: object = None) -> Fields:
    """Return the fields of a record that is ready."""
    return fields


def loss_weights(config: AdaptConfig, task: Task) -> tuple[float, ...]:
    """Return one weight per output.

    Raises:
        InputError: When there are weights, but not one per output.
    """
    weights = config.weights or (1.0,) * len(task.names)
    if len(weights) != len(task.names):
        expected = f"one per output, {len(task.names)} ({', '.join(task.names)})"
        raise InputError("weights", expected, len(weights))
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
    model: ClassifierConfig,
    task: Task,
    train: Source,
    validation: Source,
    transform: Transform,
    folder: RunFolder,
    log: Log,
    augment: Augment | None,
    start: Params,
) -> Adapted:
    mesh = make_mesh(config.mesh)
    is_pairs = isinstance(train, ArraySource) and "tokens" in train.arrays
    parts = "head on pairs" if is_pairs else "all" if config.mode == "full" else "head"
    rate = config.optimizer
    neutral = dataclasses.replace(rate, peak_lr=0.0, end_lr=0.0, warmup_steps=0)
    plan = Plan(
        model, task.kind, neutral, config.accumulation, config.token_keep, config.smoothing, config.mix, augment, parts
    )
    program = make_program(plan, mesh)
    span = make_span(rate.peak_lr, rate.end_lr, rate.warmup_steps, config.loop.steps)
    with at_work("Drawing the parameters"):
        state = program.create(jax.random.key(config.seed), start, span)
    reading = dataclasses.replace(config.loader, seed=config.seed)
    batches = make_loader(train, transform, reading, *process_slice(mesh))
    run = _head_scorer(model.head, mesh) if is_pairs else _scorer(model, mesh)
    weights = loss_weights(config, task)

    def evaluate(state: TrainState) -> dict[str, float]:
        stream = _evaluation(config, validation, transform, mesh)
        targets: list[np.ndarray] = []
        logits = _collect(run, state.params, stream, len(validation), targets)
        return measure(task, logits, targets[0], weights)

    state = fit(config.loop, state, program.step, batches, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    best = restore_best(folder, state)
    return Adapted(best.params, model, int(best.step), log.read_metrics(), [])


def _evaluation(config: AdaptConfig, source: Source, transform: Transform, mesh: Mesh) -> Any:
    rows = max(config.loader.batch_size // config.accumulation, 1)
    devices = mesh.shape["data"]
    reading = dataclasses.replace(config.loader, batch_size=-(-rows // devices) * devices, seed=config.seed)
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
def _scorer(model: ClassifierConfig, mesh: Mesh) -> Callable[..., Any]:
    apply = make_model(Classifier(model)).apply
    return _on_all(lambda params, inputs: apply(params, inputs["image"])[0], mesh)


@functools.lru_cache(maxsize=4)
def _head_scorer(head: HeadConfig, mesh: Mesh) -> Callable[..., Any]:
    apply = make_model(Head(head)).apply
    return _on_all(lambda params, inputs: apply(params["head"], inputs["tokens"])[0], mesh)


@functools.lru_cache(maxsize=4)
def _pair_maker(encoder: VitConfig, mesh: Mesh) -> Callable[..., Any]:
    apply = make_model(Vit(encoder)).apply

    def pair(params: Params, inputs: Mapping[str, Array]) -> Array:
        pooled = pool_tokens(apply(params, inputs["image"]))
        return jnp.stack([pooled.class_token, pooled.pooled], axis=1)

    return _on_all(pair, mesh)


# Frozen encoders -----------------------------------------------------------------------------------------------------


def take_encoder(params: Params, encoder: VitConfig, where: str) -> Params:
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
    image = jax.ShapeDtypeStruct((1, *encoder.image_size, encoder.channels), np.float32)
    wanted: Any = jax.eval_shape(make_model(Vit(encoder)).init, jax.random.key(0), image)
    kept = {name: given[name] for name in wanted if name in given}
    compare_arrays(_shapes(wanted), _shapes(kept), where)
    return {"encoder": kept}


def _shapes(tree: Any) -> dict[str, Any]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}


def _frozen_encoder(model: ClassifierConfig, config: AdaptConfig, start: Params | None) -> Params:
    if start is not None and "encoder" in start:
        return start["encoder"]
    encoder = model.encoder
    image = jnp.zeros((1, *encoder.image_size, encoder.channels))
    return jax.jit(make_model(Vit(encoder)).init)(jax.random.key(config.seed), image)


def token_pairs(
    config: AdaptConfig, model: ClassifierConfig, encoder: Params, source: Source, transform: Transform
) -> ArraySource:
    """Encode every record once.

    Returns:
        Records of "tokens" [2, width], the class token and the mean of the patch tokens: a head makes of these two what
        it makes of all. "target" and "weights" come along.
    """
    mesh = make_mesh(config.mesh)
    targets: list[np.ndarray] = []
    stream = _evaluation(config, source, transform, mesh)
    tokens = _collect(_pair_maker(model.encoder, mesh), encoder, stream, len(source), targets)
    weights = np.asarray(transform(source[0], np.random.default_rng(0))["weights"])
    return ArraySource(
        {"tokens": tokens, "target": targets[0], "weights": np.repeat(weights[None], len(source), axis=0)}, "features"
    )


def _fit_logistic(
    config: AdaptConfig,
    model: ClassifierConfig,
    task: Task,
    encoder: Params,
    train: ArraySource,
    validation: ArraySource,
    log: Log,
) -> Adapted:
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, hidden=0, norm=False))
    head = make_model(Head(model.head))
    features, others = (
        np.asarray(head.apply({}, jnp.asarray(source.arrays["tokens"]), method="features"))
        for source in (train, validation)
    )
    weights = loss_weights(config, task)
    wanted = validation.arrays["target"]
    probe = fit_probe(
        task.kind, features, train.arrays["target"], others, wanted, np.array(weights, np.float32)
    )  # fmt: skip
    params = {"encoder": encoder, "head": {"linear": {"kernel": probe.kernel, "bias": probe.bias}}}
    found = measure(task, others @ probe.kernel + probe.bias, wanted, weights)
    log.metrics(0, {f"evaluation/{name}": value for name, value in found.items()})
    log.say("Probe: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    names = ("all classes",) if task.kind == "multiclass" else task.names
    choices = [
        {"label": name, "strength": strength, "validation_loss": float(probe.losses[row, column]),
         "chosen": int(strength == probe.chosen[column])}
        for column, name in enumerate(names) for row, strength in enumerate(probe.strengths)
    ]  # fmt: skip
    return Adapted(params, model, 0, log.read_metrics(), choices)

"""Adapt an encoder to labels: fine-tune it all, train a head on it, or probe its features, in five published ways.

Runs that differ in records, seed, start, rates, length or class weights alone compile once: see `adapt_program`.
"""

import dataclasses
import time
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmed.arrays.task import Task, standardise
from jaxmed.arrays.types import Params
from jaxmed.config import Decay, Epochs, Fraction, Positive, Size, checked
from jaxmed.data.loader import Fields, Transform
from jaxmed.data.mixing import MixConfig
from jaxmed.data.records import ArraySource, Source
from jaxmed.errors import InputError
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import HeadConfig, fold_standardise, init_head
from jaxmed.nn.model import Network
from jaxmed.recipes import training
from jaxmed.recipes.adapt_program import Augment, CompileKey, frozen_names, make_program, make_schedule
from jaxmed.recipes.adapt_scoring import Select, best_of, collect, head_scorer, measure, read_batches, scorer
from jaxmed.recipes.effort import Effort, count_trained, operations_per_record, peak_memory, training_seconds
from jaxmed.recipes.fitted_probes import compute_features, fit_logistic, fit_neighbours, identity
from jaxmed.recipes.probe_grid import INIT_STD, ProbeGrid, take_cell
from jaxmed.recipes.training import NO_PREFIX, TrainConfig, TrainData, TrainFlags, check_fit, run_steps, whole
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import compare_arrays, describe
from jaxmed.train.log import Log, at_work
from jaxmed.train.loop import restore_best
from jaxmed.train.mesh import abstract_batch, gathered, make_mesh
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.state import TrainState
from jaxmed.train.workload import Workload, training_workload

FINE_TUNING = OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, weight_decay=0.05, layer_decay=0.75)
# Of the probes whose recipe says everything but the length and the batch; rates are per 256 records of a batch.
LARS_PROBE = OptimizerConfig("lars", peak_lr=0.1, weight_decay=0.0, b1=0.9, trust_coefficient=0.001)
SGD_PROBE = OptimizerConfig("sgd", peak_lr=1.0, weight_decay=0.0, b1=0.9)
RATE_BATCH = 256
Mode: TypeAlias = Literal["full", "frozen", "logistic", "mae-probe", "dinov2-probe", "knn"]
FITTED = ("logistic", "knn")  # in one go, not step by step


@dataclasses.dataclass(frozen=True)
@checked
class ProbeConfig:
    """What the probes try.

    Attributes:
        lars_rate: Learning rate of "mae-probe", per 256 records of a batch.
        grid: The heads of "dinov2-probe".
        neighbours: Numbers of neighbours of "knn".
        temperature: A neighbour's vote counts exp(cosine similarity / temperature).
    """

    lars_rate: Positive = LARS_PROBE.peak_lr
    grid: ProbeGrid = ProbeGrid()
    neighbours: tuple[Size, ...] = (10, 20, 100, 200)
    temperature: Positive = 0.07

    def __post_init__(self) -> None:
        if not self.neighbours:
            raise ValueError("neighbours: expected at least one number, found none")


@dataclasses.dataclass(frozen=True)
@checked
class AdaptConfig:
    """A run on labels; the optimizer's defaults are TANGERINE's for fine-tuning.

    Attributes:
        train: Optimizer (of full and frozen), length, reading, devices and seed. Evaluations and the choice of the
            best follow from the fields below.
        mode: "full" trains everything. "frozen" trains the head alone, with augmentation and skipped branches as in
            "full": the linear probe of RETFound's code, where `--optimizer.frozen ^head/norm/` keeps the head's layer
            norm as it is too. "mae-probe" is MAE's (arXiv:2111.06377, appendix A.1): a linear head under BatchNorm
            without factors, by LARS. "dinov2-probe" is DINOv2's (arXiv:2304.07193): a grid of linear heads on the last
            blocks, of which validation records choose one. "logistic" fits an L2 logistic regression (ridge for
            regression) to standardised features, its strength chosen on validation records. "knn" is DINO's vote of
            the nearest training records (arXiv:2104.14294), their number chosen on validation records.
        evaluate_epochs: Epochs between evaluations on validation records; 0 leaves them to loop.evaluate_every.
        select: Which evaluation's parameters, or which probe's, are kept: those of lowest validation loss, of highest
            AUROC, or of highest score, the mean of macro F1, AUROC and Cohen's kappa.
        token_keep: Share of the patch tokens that a training step looks at, drawn anew for every image: less memory and
            time. Scoring sees all.
        smoothing: Label smoothing of a multi-class task.
        mix: Mixup and CutMix of training images, in pairs within a part; not for a regression or a probe.
        class_weights: Factors on the loss of each label's positives (binary, multi-label), or of each class, in the
            order of the report; empty for ones. They have no part in "knn" but in its choice by loss.
        probe: What the probes try.
    """

    train: TrainFlags = TrainConfig(optimizer=FINE_TUNING)
    mode: Mode = "full"
    evaluate_epochs: Epochs = 1
    select: Select = "loss"
    token_keep: Fraction = 1.0
    smoothing: Decay = 0.1
    mix: MixConfig = MixConfig()
    class_weights: tuple[Positive, ...] = ()
    probe: ProbeConfig = ProbeConfig()


# The type of a stage's field `adapt`: on the command line its options carry no prefix.
AdaptFlags: TypeAlias = Annotated[AdaptConfig, NO_PREFIX]


class Adapted(NamedTuple):
    """What a run ends with.

    Attributes:
        params: {"encoder": ..., "head": ...}, of the selected evaluation.
        head: The head that they belong to: of a probe another than that which was given, without BatchNorm.
        step: Steps after which they were selected; 0 for what is fitted in one go.
        history: The lines of metrics.jsonl.
        choices: What a probe has tried, one row for each (logistic: and label), and whether it was chosen; else empty.
        effort: What it took.
    """

    params: Params
    head: HeadConfig
    step: int
    history: list[dict[str, float]]
    choices: list[dict[str, Any]]
    effort: Effort


def in_steps(config: AdaptConfig, num_records: int) -> AdaptConfig:
    """Return the configuration with epochs turned into steps, the choice of the best, and a probe's optimizer, set."""
    train, per = config.train, config.train.loader.batch_size / RATE_BATCH
    if config.mode == "mae-probe":
        kept = {"warmup_steps": train.optimizer.warmup_steps, "peak_lr": per * config.probe.lars_rate}
        train = dataclasses.replace(train, optimizer=dataclasses.replace(LARS_PROBE, **kept))
    if config.mode == "dinov2-probe":
        optimizer = dataclasses.replace(SGD_PROBE, peak_lr=per)
        train = dataclasses.replace(train, optimizer=optimizer, warmup_epochs=0)
    train = training.in_steps(train, num_records)
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
        augment: `augment(key, image) -> image`, on the device, one image at a time; not used by what is fitted in one
            go.
        start: {"encoder": ...}, from `take_encoder` or an earlier run, and optionally {"head": ...}; what is not there
            is drawn.
    """
    shapes = check_run(config, encoder, head, task)
    announce(log, "Drawing and reading the parameters", params=shapes, smaller=folder.smaller)
    config, start = in_steps(config, len(data.training)), start or {}
    data = data._replace(transform=Labelled(data.transform, task, loss_weights(config, task)))
    if config.mode not in ("full", "frozen"):
        encoder, head = dataclasses.replace(encoder, is_random=False), probe_head(config, head)
        start = {name: start[name] for name in start if name == "encoder"}
    is_varied = augment is not None or config.token_keep < 1 or config.mix.is_on or encoder.is_random
    if config.mode == "full" or (is_varied and config.mode not in FITTED):
        return _train(config, encoder, head, task, data, folder, log, augment, start)
    # Without augmentation an image has the same features every time: they are computed once.
    given, began = start.get("encoder"), time.monotonic()
    if given is None:
        given = jax.jit(encoder.init)(jax.random.key(config.train.seed))
    assert data.held_out is not None
    count, others = len(data.training), len(data.held_out)
    log.say(f"Computing the features of {count:,} training and {others:,} validation records, once.")
    training, held_out = (
        compute_features(config.train, encoder, head.layers, given, source, data.transform)
        for source in (data.training, data.held_out)
    )
    once = TrainData(training, held_out, identity)
    if config.mode in FITTED:
        found = _fit(config, encoder, head, task, once, log)
        extra = time.monotonic() - began
    else:
        extra = time.monotonic() - began
        own = {name: start[name] for name in start if name != "encoder"}
        found = _train(config, encoder, head, task, once, folder, log, None, own)
    until = extra + (found.effort.seconds_to_best or 0)
    effort = dataclasses.replace(found.effort, seconds_to_best=until)
    return found._replace(params={"encoder": given, **found.params}, effort=effort)


def probe_head(config: AdaptConfig, head: HeadConfig) -> HeadConfig:
    """Return the head that a probe fits, on the features that another pools, as they are."""
    plain = dataclasses.replace(head, hidden=0, second_hidden=0, norm=False, layers=1, neighbours=None)
    match config.mode:
        case "mae-probe":
            return dataclasses.replace(plain, standardise=True, init_std=INIT_STD)
        case "dinov2-probe":
            return config.probe.grid.head(head.outputs)
    return plain


def final_heads(config: AdaptConfig, head: HeadConfig) -> list[HeadConfig]:
    """Return the heads with which a run may end, as far as they can be told before it."""
    if config.mode in ("full", "frozen"):
        return [head]
    found = dataclasses.replace(probe_head(config, head), standardise=False)
    if config.mode != "dinov2-probe":
        return [found]
    blocks, pools = config.probe.grid.blocks, ("class", "concat")
    return [dataclasses.replace(found, layers=number, pool=pool) for number in blocks for pool in pools]


def check_run(config: AdaptConfig, encoder: Encoder, head: HeadConfig, task: Task, mesh: Mesh | None = None) -> Params:
    """Check that head and weights fit the task, and batch and model the devices, before anything is written.

    Args:
        config: The run.
        encoder: What is adapted.
        head: What stands on it.
        task: What the outputs mean.
        mesh: The devices; by default those of the run's configuration.

    Returns:
        Shapes of the parameters.

    Raises:
        InputError: They do not.
    """
    if head.outputs != len(task.names):
        raise InputError("model.head.outputs", f"one per name of the task, {len(task.names)}", head.outputs)
    loss_weights(config, task)
    is_probe = config.mode not in ("full", "frozen")
    if config.mix.is_on and (task.kind == "regression" or is_probe):
        found = "a regression" if task.kind == "regression" else f"a probe, {config.mode}"
        raise InputError("mix", "a classification by full or frozen", found, "leave --mix.mixup and --mix.cutmix at 0")
    if config.token_keep < 1 and is_probe:
        raise InputError("token_keep", f"1 for a probe, {config.mode}", f"{config.token_keep:g}")
    if config.select != "loss" and task.kind == "regression":
        raise InputError("select", "loss, for a regression", config.select)
    if not encoder.prefix and head.pool != "mean":
        raise InputError("pool", "mean, of an encoder without a class token", head.pool)
    if config.mode == "dinov2-probe":
        _check_grid(config.probe.grid, encoder, task)
    if config.token_keep < 1 and not encoder.can_drop:
        raise InputError("token_keep", "1, of an encoder that takes whole images", f"{config.token_keep:g}")
    if config.train.optimizer.layer_decay < 1 and encoder.layers is None:
        found = f"{config.train.optimizer.layer_decay:g}"
        raise InputError("optimizer.layer_decay", "1, of an encoder without layers", found)

    def draw(key: Any) -> Params:
        return {"encoder": encoder.init(key), "head": init_head(head, encoder.width, encoder.prefix, key)}

    train = config.train
    if config.mode in FITTED:  # nothing is divided
        loader = dataclasses.replace(train.loader, batch_size=make_mesh(train.mesh).shape["data"])
        train = dataclasses.replace(train, loader=loader, accumulation=1)
    return check_fit(train, Network(draw, encoder.apply, encoder.rules), mesh)


def _check_grid(grid: ProbeGrid, encoder: Encoder, task: Task) -> None:
    if task.kind == "regression":
        raise InputError("mode", "another than dinov2-probe for a regression", "dinov2-probe", "take logistic or knn")
    if not encoder.prefix:
        raise InputError("mode", "another than dinov2-probe, of an encoder without a class token", "dinov2-probe")
    blocks = 1 if encoder.hidden_states is None or encoder.layers is None else encoder.layers.depth
    if max(grid.blocks) > blocks:
        expected = f"at most the {blocks} blocks of the encoder"
        raise InputError("probe.grid.blocks", expected, max(grid.blocks), f"set --probe.grid.blocks 1 {blocks}")


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
    batches = read_batches(config.train, source, transform, mesh)
    return collect(scorer(encoder, head, None, mesh), gathered(params), batches, len(source))


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
        """Return image, target [column], weights [output] and importance, float32."""
        found = dict(self.transform(fields, generator))
        target = np.atleast_1d(np.asarray(found["target"], np.float32))
        own = np.float32(found.get("importance", 1.0)), np.array(self.weights, np.float32)
        return {**found, "target": standardise(target, self.task), "importance": own[0], "weights": own[1]}


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
    is_once = isinstance(data.training, ArraySource) and "tokens" in data.training.arrays
    rate = train.optimizer
    key = _compile_key(config, encoder, head, task, augment, is_once=is_once)
    grid, program = key.grid, make_program(key, mesh)
    with at_work("Drawing the parameters"):
        schedule = make_schedule(rate.peak_lr, rate.end_lr, rate.warmup_steps, train.loop.steps)
        state = program.create(jax.random.key(train.seed), start, schedule)
    run = head_scorer(head, grid, encoder.prefix, mesh) if is_once else scorer(encoder, head, grid, mesh)
    weights, validation = loss_weights(config, task), data.held_out
    assert validation is not None

    def look(params: Params) -> list[dict[str, float]]:
        targets: list[np.ndarray] = []
        batches = read_batches(train, validation, data.transform, mesh)
        logits = collect(run, gathered(params), batches, len(validation), targets)
        several = [logits] if grid is None else np.moveaxis(logits, 1, 0)
        return [measure(task, one, targets[0], weights) for one in several]

    def evaluate(state: TrainState) -> dict[str, float]:
        found = look(state.params)
        return found[0] if grid is None else found[best_of(found, config.select)]

    state = run_steps(train, state, program.step, data, mesh=mesh, folder=folder, log=log, evaluate=evaluate)
    best = restore_best(folder, state)
    step, params, history, choices = int(best.step), best.params, log.read_metrics(), []
    trained = count_trained(params, frozen_names(key))
    if grid is not None:
        found = look(params)
        chosen = best_of(found, config.select)
        head, own = take_cell(grid, whole(params["head"], train), chosen, encoder.width)
        params = {**params, "head": own}
        choices = [
            {"rate": cell.rate, "blocks": cell.blocks, "features": "class + mean" if cell.has_mean else "class",
             **values, "chosen": int(place == chosen)}
            for place, (cell, values) in enumerate(zip(grid.cells, found, strict=True))
        ]  # fmt: skip
    if head.standardise:
        head, own = fold_standardise(head, whole(params["head"], train))
        params = {**params, "head": own}
    seconds = training_seconds(history, step, len(data.training) / train.loader.batch_size) or (None, None)
    effort = Effort(trained, operations_per_record(encoder, head), *seconds, peak_memory())
    return Adapted(params, head, step, history, choices, effort)


def _compile_key(
    config: AdaptConfig, encoder: Encoder, head: HeadConfig, task: Task, augment: Augment | None, *, is_once: bool
) -> CompileKey:
    """Return what a run is compiled for; `is_once` where records bring features in place of images."""
    rate, train = config.train.optimizer, config.train
    return CompileKey(
        encoder, head, task.kind, dataclasses.replace(rate, peak_lr=0.0, end_lr=0.0, warmup_steps=0),
        train.accumulation, config.token_keep, config.smoothing, config.mix, augment,
        "head on pairs" if is_once else "all" if config.mode == "full" else "head",
        config.probe.grid if config.mode == "dinov2-probe" else None,
    )  # fmt: skip


def plan_adaptation(
    config: AdaptConfig,
    encoder: Encoder,
    head: HeadConfig,
    task: Task,
    image: tuple[int, ...],
    mesh: Mesh,
    augment: Augment | None = None,
) -> Workload:
    """Return the step of `adapt` with an encoder in it, and the shapes of its arguments, of which nothing is made.

    Args:
        config: The run.
        encoder: What makes tokens of an image.
        head: What stands on it.
        task: What the outputs mean.
        image: Shape of a training image as the loader delivers it, before the augmentation.
        mesh: The devices, which may be those of a topology that is not here.
        augment: As of `adapt`.

    Raises:
        InputError: The run trains a head on features that are computed once, or does not divide over the devices.
    """
    is_varied = augment is not None or config.token_keep < 1 or config.mix.is_on or encoder.is_random
    if config.mode in FITTED or not (config.mode == "full" or is_varied):
        advice = "take --mode full, or frozen with an augmentation"
        raise InputError("mode", "steps that run the encoder, to plan", f"{config.mode}, of features made once", advice)
    check_run(config, encoder, head, task, mesh)
    if config.mode not in ("full", "frozen"):
        encoder, head = dataclasses.replace(encoder, is_random=False), probe_head(config, head)
    program = make_program(_compile_key(config, encoder, head, task, augment, is_once=False), mesh)
    outputs = len(task.names)
    shapes = {"image": image, "target": (1 if task.kind == "multiclass" else outputs,), "importance": ()}
    shapes["weights"] = (outputs,)
    record = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    batch = abstract_batch(record, config.train.loader.batch_size, mesh)
    return training_workload(program.step, program.state, batch, record)


def _fit(config: AdaptConfig, encoder: Encoder, head: HeadConfig, task: Task, once: TrainData, log: Log) -> Adapted:
    """Fit what needs no steps to features that were computed once."""
    weights, probe = loss_weights(config, task), config.probe
    if config.mode == "logistic":
        found = fit_logistic(encoder.prefix, head, task, weights, once)
    else:
        votes = probe.neighbours, probe.temperature, config.select
        found = fit_neighbours(config.train, encoder.prefix, head, task, weights, once, *votes)
    log.metrics(0, {f"evaluation/{name}": value for name, value in found.values.items()})
    log.say("Probe: " + ", ".join(f"{name} {value:.4g}" for name, value in found.values.items()))
    trained = 0 if config.mode == "knn" else count_trained(found.params, ())
    effort = Effort(trained, operations_per_record(encoder, found.head), peak_memory=peak_memory())
    return Adapted({"head": found.params}, found.head, 0, log.read_metrics(), found.choices, effort)


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
    compare_arrays(describe(wanted), describe(kept), where)
    return {"encoder": kept}

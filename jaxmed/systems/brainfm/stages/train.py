"""BrainFM train: the multi-task network, on images that the generator draws inside the step."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from jaxmed.arrays.trees import fitting
from jaxmed.arrays.types import Params
from jaxmed.config import Size, checked, to_record
from jaxmed.data.label_table import LabelTable, find_table
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.subject_files import list_subjects
from jaxmed.data.subject_store import WHOLE_HEAD, SubjectStore, example_record, open_store
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.models.published.brainfm import KIND, NAME, PREPROCESS
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.unet_brain import BRAINFM, BrainUnetConfig, brain_unet, process
from jaxmed.nn.model import Network
from jaxmed.objectives.brain import BrainLossConfig
from jaxmed.objectives.supervised import class_dice
from jaxmed.recipes.mni_space import make_locate
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only, nested_run
from jaxmed.recipes.subject_stores import check_subjects, require_known, split_store
from jaxmed.recipes.training import TrainConfig, TrainData, TrainFlags, handed_on, plan_training, run_training, whole
from jaxmed.report.figures import curves
from jaxmed.report.page import Block, Note, Section, Table, Text
from jaxmed.synthesis.bias_field import BiasFieldConfig
from jaxmed.synthesis.brain_draws import MODALITIES, GeneratorConfig, Severity
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.resolution import ResolutionConfig
from jaxmed.systems.brainfm.pages import example_figure
from jaxmed.systems.brainfm.training import (
    Grid,
    Subjects,
    Variant,
    apply_variant,
    draw,
    loss_of_images,
    make_loss,
    measures,
    teachable,
)
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log, read_metrics, series
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload

DRAWS = 1_000_003  # added to the seed of the images that a network is scored on: contrasts that were never trained on


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of the network of brain scans.

    Attributes:
        data: Who is trained on.
        input: A label map, or a folder of them, of which a store is made, instead of a table.
        variant: All tasks (joint), or one of them; low-resolution and shift change the images, hemisphere the head.
        model: The network; its labels are those of the store.
        generator: How images are drawn.
        loss: What counts how much.
        grid: Voxels that are trained on.
        weights: Published or own weights to start from; what does not fit is drawn.
        draws: Images that each held-out subject is scored on at the end.
        train: The run.
    """

    data: Subjects = Subjects()
    input: Path | None = None
    variant: Variant = "joint"
    model: BrainUnetConfig = BRAINFM
    generator: GeneratorConfig = GeneratorConfig()
    loss: BrainLossConfig = BrainLossConfig()
    grid: Grid = Grid()
    weights: Path | None = None
    draws: Size = 4
    train: TrainFlags = TrainConfig()

    def __post_init__(self) -> None:
        if self.model.dtype != "float32":
            raise ValueError(f"model.dtype: expected to be left to --dtype, found {self.model.dtype}")
        if self.loss.contrastive and self.generator.samples < 2:
            raise ValueError("generator.samples: expected 2 or more for --loss.contrastive, found 1")
        if self.generator.resolution.voxel != self.grid.step:
            found = f"{self.generator.resolution.voxel:g}"
            raise ValueError(f"generator.resolution.voxel: expected {self.grid.step}, as --grid.step, found {found}")
        if sum(place is not None for place in (self.data.store, self.data.manifest, self.input)) > 1:
            raise ValueError("input: expected one of input, data.manifest and data.store, found several")


def paper() -> Config:
    """264 million parameters at 160^3 and 1 mm, 5000 passes over the subjects, one at a time: an accelerator."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=1e-4, end_lr=1e-5, decay="step", weight_decay=0.0),
        LoopConfig(log_every=100, save_every=2000, evaluate_every=20_000),
        LoaderConfig(batch_size=1, num_threads=4),
        MeshConfig(data=1),
        epochs=5000,
        warmup_epochs=1,
        dtype="bfloat16",
    )
    return Config(model=dataclasses.replace(BRAINFM, remat=True), train=train)


def laptop() -> Config:
    """1 million parameters at 64^3 and 2 mm, heads upright and centred, 2,800 steps: an hour on two cores."""
    # The released positions, sheared and flipped ones among them, took three times as many steps (at 4 mm).
    generator = GeneratorConfig(
        shape=(64, 64, 64),
        flip=0.0,
        deformation=DeformationConfig(rotation=10.0, shear=0.02, scaling=0.1, amplitude=1.0),  # in voxels
        resolution=ResolutionConfig(photo_probability=0.0, voxel=2.0),
        severe=Severity(BiasFieldConfig(std=(0.1, 0.4))),
    )
    train = TrainConfig(
        OptimizerConfig(peak_lr=1.5e-3, warmup_steps=50, weight_decay=0.0, clip_norm=1.0),
        LoopConfig(steps=2800, log_every=20, save_every=100, evaluate_every=500),
        LoaderConfig(batch_size=1),
        MeshConfig(data=1),
        ema_decay=0.99,
    )
    # In so few steps features of length 1 hold every logit down: heads would have to grow by themselves. And a
    # cross-entropy that is a mean over 35 classes weighs nothing beside distances in mm.
    model = dataclasses.replace(BRAINFM, width=16, levels=4, unit_features=False)
    loss = BrainLossConfig(cross_entropy=35.0, distance=0.02, bias_field=0.3, registration=0.03, clamp_distance=False)
    return Config(model=model, generator=generator, loss=loss, grid=Grid(2, 80), train=train)


def smoke() -> Config:
    """A tiny network at 24^3, in seconds: on your label maps, or on phantom heads."""
    generator = GeneratorConfig(
        shape=(24, 24, 24),
        deformation=DeformationConfig(rotation=5.0, shear=0.0, scaling=0.05, amplitude=1.0),
        resolution=ResolutionConfig(photo_probability=0.0, voxel=2.0),
    )
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, warmup_steps=5, weight_decay=0.0),
        LoopConfig(steps=20, log_every=2, save_every=20),
        LoaderConfig(batch_size=1),
        MeshConfig(data=1),
    )
    model = dataclasses.replace(BRAINFM, width=8, levels=2)
    settings = BrainLossConfig(clamp_distance=False)
    return Config(
        Subjects(synthetic=3), None, "joint", model, generator, settings, Grid(2, 24), draws=1, train=train
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained, and how good it is on held-out subjects in contrasts that were never trained on.

    Attributes:
        subjects: Trained on and held out.
        parameters: Number of the network's parameters.
        tasks: What it predicts.
        scores: Mean over subjects and draws, see `training.measures`.
        dice: Of each structure.
        notes: What a user should know.
    """

    subjects: dict[str, int]
    parameters: int
    tasks: tuple[str, ...]
    scores: dict[str, float | None]
    dice: dict[str, float]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Open or make the store, train, export the network, score it on subjects that were held out."""
    clock = Clock()
    model, generator, train = apply_variant(config.variant, config.model, config.generator, config.train)
    brain_unet(model, generator.shape)  # sizes and weights that do not fit cost no store
    published = read_weights(config.weights)
    store = dataclasses.replace(find_store(config, folder), step=config.grid.step)
    model, classes, names = with_labels(model, store.table, is_left=config.variant == "hemisphere")
    model, notes = teachable(model, generator, store[0], store.channels)
    network, loss = make_program(config, model, generator, classes, make_mesh(train.mesh))
    start, origin, further = fit_start(published, config.weights, network)
    training, held_out = split_store(store, config.data.held_out, config.data.validation, config.train.seed)
    log = begin(folder, (*notes, *further), tensorboard=train.loop.tensorboard)
    subjects = {"train": len(training), "held out": 0 if held_out is None else len(held_out)}
    log.say(f"{subjects['train']} subjects to train on, {subjects['held out']} held out; {len(classes)} classes.")
    clock.lap("read")

    def score(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> dict[str, Array]:
        def one(key: Key[Array, ""], subject: Mapping[str, Array]) -> dict[str, Array]:
            images, targets = draw(key, subject, generator, classes)
            grouped = {name: value[None] for name, value in targets.items()}
            value, _ = loss_of_images(network.apply, model, config.loss, params, images[None], grouped)
            return {"loss": value}

        return jax.vmap(one)(keys, batch)

    is_scored = held_out is not None and train.loop.evaluate_every > 0
    state = run_training(
        train, network, loss, TrainData(training, held_out, config.grid), folder=folder, log=log, start=start,
        score=score if is_scored else None,
    )  # fmt: skip
    clock.lap("train, compilation included")
    params = whole(handed_on(state), train)
    first_only(lambda: write_network(folder, params, model, config, names, origin), "network")
    source = training if held_out is None else held_out
    scores, dice = evaluate(config, network, model, generator, params, source, classes, folder, log)
    clock.lap("score")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    structures = {names[label]: dice[number] for number, label in enumerate(model.labels) if number in dice}
    summary = Summary(subjects, size, model.tasks, scores, structures, (*notes, *further))
    finish(folder, config, summary, clock, page)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run on whole heads and the shapes of its arguments; nothing is read or drawn."""
    model, generator, train = apply_variant(config.variant, config.model, config.generator, config.train)
    table, window, step = find_table(config.data.table), config.grid.window, config.grid.step
    x, y, z = (window,) * 3 if window else (-(-length // step) for length in WHOLE_HEAD)
    record = example_record(table, (x, y, z))
    model, classes, _ = with_labels(model, table, is_left=config.variant == "hemisphere")
    model, _ = teachable(model, generator, record, record["images"].shape[-1])
    network, loss = make_program(config, model, generator, classes, mesh)
    notes = (f"Subjects are of {x} x {y} x {z} voxels, with images of all four modalities.",)
    return plan_training(train, network, loss, record, mesh, notes=notes)


def make_program(
    config: Config, model: BrainUnetConfig, generator: GeneratorConfig, classes: tuple[int, ...], mesh: Mesh
) -> tuple[Network, Any]:
    """Return the network and the loss of a run; large volumes are split along x over the axis "model" of the mesh."""
    network = brain_unet(dataclasses.replace(model, dtype=config.train.dtype), generator.shape)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model")) if mesh.shape["model"] > 1 else None
    return network, make_loss(network.apply, model, generator, config.loss, classes, sharding)


def find_store(config: Config, folder: RunFolder) -> SubjectStore:
    """Open the store that is given; make one of label maps, or of phantom heads.

    Raises:
        InputError: There is nothing to train on.
    """
    data, given = config.data, config.input is not None or config.data.manifest is not None
    if data.store is not None:
        inner = data.store / "outputs" / "store"
        return open_store(inner if inner.exists() else data.store)
    if not given and not data.synthetic:
        advice = "give --input LABELMAPS or --data.store, or try --preset smoke"
        raise InputError("input", "label maps, or a store of subjects", "nothing", advice)
    if given:  # a mistake there leaves nothing behind
        table, files = find_table(data.table), list_subjects(data.manifest, config.input)
        require_known(data.held_out, [one.name for one in files])
        place = data.manifest or config.input
        assert place is not None
        check_subjects(files, table, place, config.train.loader.num_threads)
        if data.template:
            make_locate(data.template)
    changes: dict[str, Any] = {"store": True, "input": config.input, "table": data.table, "template": data.template}
    changes |= {"data.manifest": data.manifest, "data.synthetic": 0 if given else data.synthetic}
    why = "Subjects are made into a store." if given else "No subjects are given: phantom heads are drawn."
    preset = "paper" if given else "smoke"
    nested = nested_run(folder, "brainfm generate", changes, begin(folder), why, preset=preset)
    return open_store(nested.outputs / "store")


def with_labels(
    model: BrainUnetConfig, table: LabelTable, *, is_left: bool
) -> tuple[BrainUnetConfig, tuple[int, ...], dict[int, str]]:
    """Return the network with a table's labels, its class for each class of the table, and names of labels."""
    rows = table.classes
    kept = [row for row in rows if not (is_left and row.side == "right")]
    places = {row.label: number for number, row in enumerate(kept)}
    classes = tuple(places.get(row.label, 0) for row in rows)
    labels = tuple(row.label for row in kept)
    return dataclasses.replace(model, labels=labels), classes, {row.label: row.name for row in kept}


def read_weights(path: Path | None) -> Published | None:
    """Read weights to start from, where there are any.

    Raises:
        InputError: They are of another kind of network.
    """
    published = None if path is None else load_published(path)
    if published is not None and not isinstance(published.config, BrainUnetConfig):
        raise InputError(path, "a multi-task network of brains", f"a {published.report.kind}")
    return published


def fit_start(
    published: Published | None, path: Path | None, network: Network
) -> tuple[Params | None, dict[str, Any], tuple[str, ...]]:
    """Return the parameters to start from that fit, what a record says of them, and notes.

    Raises:
        InputError: None fits.
    """
    if published is None:
        return None, {}, ()
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    fits, others = fitting(published.params, shapes)
    if not any(name.startswith("backbone") for name in fits):
        raise InputError(path, "a backbone of the sizes of --model", "none of its tensors", "set --model.width, levels")
    notes = published.report.lines
    if others:
        notes = (*notes, f"{len(others)} tensors do not fit and are drawn: {', '.join(others[:4])}.")
    return fits, {"licence": published.report.licence}, notes


def write_network(
    folder: RunFolder, params: Params, model: BrainUnetConfig, config: Config, names: Mapping[int, str],
    origin: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the network for predict and `load_published`, and the names of its labels."""
    preprocess = dataclasses.replace(PREPROCESS, size=config.generator.shape, spacing=(float(config.grid.step),))
    record = {"family": NAME, "kind": KIND, "config": to_record(model), "preprocess": to_record(preprocess)}
    export_parameters(folder.outputs / "model", params, record | dict(origin))
    rows = [{"label": label, "name": name} for label, name in names.items()]
    write_table(folder.outputs / "structures.csv", ("label", "name"), rows)


def evaluate(
    config: Config, network: Network, model: BrainUnetConfig, generator: GeneratorConfig, params: Params, source: Any,
    classes: tuple[int, ...], folder: RunFolder, log: Log,
) -> tuple[dict[str, float | None], dict[int, float]]:  # fmt: skip
    """Score the network on images of contrasts that were not trained on; keep the first as an example."""

    @jax.jit
    def score(params: Params, key: Array, subject: Mapping[str, Array]) -> Any:
        images, targets = draw(key, subject, generator, classes)
        maps = {name: value[0] for name, value in network.apply(params, images[:1]).items()}
        targets |= {name: targets[name][0] for name in ("bias_field_log", "high_res_residual")}
        dice = None
        if "segmentation" in maps:
            dice = class_dice(maps["segmentation"].argmax(-1), targets["segmentation"], len(model.labels))
        return measures(model, maps, targets), dice, images[0], process(model, maps), targets

    found, tables = [], []
    with log.progress("Scoring", len(source) * config.draws, "images") as update:
        for number in range(len(source) * config.draws):
            fields = config.grid(source[number // config.draws], np.random.default_rng(0))
            key = jax.random.fold_in(jax.random.key(config.train.seed + DRAWS), number)
            values, dice, image, maps, targets = jax.device_get(score(params, key, fields))
            found.append(values)
            tables.append(dice)
            if number == 0:
                first_only(lambda: write_example(folder, model, image, maps, targets), "example")  # noqa: B023
            update(number + 1)
    scores = {name: _mean([values[name] for values in found]) for name in found[0]}
    dice: dict[int, float] = {}
    for number in range(1, len(model.labels)) if tables[0] is not None else ():
        known = [float(scores[number]) for scores, counts in tables if counts[number] > 0]
        dice |= {number: float(np.mean(known))} if known else {}
    return scores, dice


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def write_example(folder: RunFolder, model: BrainUnetConfig, image: Any, maps: Any, targets: Any) -> None:
    """Write an image, its targets and its maps; classes in place of probabilities, of several channels the first."""
    arrays = {"image": image[..., 0]}
    for task in model.dense:
        if task in MODALITIES and not targets["present"][MODALITIES.index(task)]:
            arrays[f"{task}/found"] = maps[task][..., 0]
            continue
        is_class = task == "segmentation"
        arrays[f"{task}/truth"] = targets[task] if is_class else targets[task][..., 0]
        arrays[f"{task}/found"] = maps[task].argmax(-1) if is_class else maps[task][..., 0]
    write_npz(folder.outputs / "example.npz", {name: np.asarray(value, np.float32) for name, value in arrays.items()})


# The page -----------------------------------------------------------------------------------------------------------

UNITS = {"dice": "mean over structures", "distance_mm": "mm, mean absolute error", "coordinate_mm": "mm, mean error"}
READING = (
    "Scores are of subjects that were not trained on (where any were held out), on images drawn with other random "
    "numbers: their contrasts were never seen.",
    "The network is in outputs/model, the names of its labels in outputs/structures.csv; jaxmed brainfm predict takes "
    "the run as --weights.",
    "Maps of a modality that no subject has are not learnt.",
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, the scores, and one image with its targets and maps."""
    summary, lines = run.summary, read_metrics(run.path)
    names = {"all, training": "loss", "all, held out": "evaluation/loss"} | {task: task for task in summary.tasks}
    found = {label: series(lines, name) for label, name in names.items()}
    found = {label: line for label, line in found.items() if len(line[0])}
    blocks: list[Block] = [curves(found, xlabel="step", ylabel="loss", log=True, caption="Losses by task.")]
    rows = [(name, value, UNITS.get(name, "mean absolute error")) for name, value in summary.scores.items()]
    score_blocks: list[Block] = [Table(("score", "value", "what"), rows, "Means over held-out subjects and images.")]
    if summary.dice:
        score_blocks.append(Table(("structure", "Dice"), list(summary.dice.items()), "Mean over the same images."))
    sections = [
        Section("Notes", [Note(text) for text in summary.notes]),
        Section("Training", blocks),
        Section("Scores", score_blocks),
        Section("An image, its targets and its maps", [example_figure(run.outputs / "example.npz")]),
        Section("How to read this", [Text(READING)]),
    ]
    tiles: list[Any] = [
        ("Subjects", summary.subjects["train"], f"{summary.subjects['held out']} held out"),
        ("Parameters", f"{summary.parameters:,}", f"{len(summary.tasks)} tasks"),
    ]
    if summary.scores.get("dice") is not None:
        tiles.append(("Dice", f"{summary.scores['dice']:.3f}", "mean over structures, held out"))
    return Page("Network of brain scans", f"BrainFM, {', '.join(summary.tasks)}", tiles, sections)

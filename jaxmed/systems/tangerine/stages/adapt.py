"""TANGERINE adapt: fine-tune or probe a pre-trained model on labelled scans, and score it here and elsewhere."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.config import Epochs, Length, Number, Positive, Seed, Share, Size, Whole, checked, to_record
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.cohort import Cohort, LabelledSets, read_labelled_sets
from jaxmed.data.inputs import PreparedField, check_scans, input_source
from jaxmed.data.labels import LabelConfig, balanced_weights
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.mixing import MixConfig
from jaxmed.data.preprocess import FileAxes, Preprocess
from jaxmed.data.records import LabelledSource, SubsetSource
from jaxmed.data.splits import write_split_table
from jaxmed.errors import InputError
from jaxmed.files import expand_home
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.published.load import OWN_LICENCE, Published, load_published, resize_positions
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.adapt import AdaptConfig, Adapted, adapt, check_run, take_encoder
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.adapt_page import write_page
from jaxmed.systems.tangerine.adapt_results import score_cohort, write_tables
from jaxmed.systems.tangerine.stages import pretrain
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary

FINE_TUNING = AugmentConfig(
    order=("noise", "blur", "gamma"),
    noise_probability=0.1,
    noise_sigma=(0.0, 0.1),
    blur_probability=0.2,
    blur_sigma=(0.5, 1.0),
    blur_is_isotropic=False,
    blur_is_integrated=True,
    gamma_probability=0.15,
    gamma=(0.75, 1.25),
    gamma_is_log=False,
)
"""What happens to training volumes; values are not clipped to [0, 1] afterwards.

Source: TANGERINE, arXiv:2507.01881, released code (MONAI's transforms with these numbers).
Deviation: smoothing repeats the edge outwards, where the original takes 0 there.
"""


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """Which scans are learnt from, and which are scored.

    Attributes:
        manifest: CSV with the columns path (NIfTI in HU, a DICOM folder, or .npz with an array "volume" in [0, 1]),
            the label columns, and optionally subject and split (train, validation, test).
        fractions: Shares of subjects in train, validation and test, where there is no column split.
        group: Whether pre-training saw scans of this distribution, without labels: "seen" or "unseen".
        external: Further sets, scored and never trained on, as NAME=CSV or NAME:GROUP=CSV; GROUP is "seen", "unseen"
            or "other" (another centre, in neither stage), which is the default.
        cache: Folder in which prepared volumes of the manifest are kept (float16, 34 MB each at 256^3). Empty prepares
            them anew in every epoch.
        check: Training and validation scans that are read from end to end before the run, evenly spread; of the
            others only the headers are.
        embedded: Generate this many phantom chests, and a set of another scanner, where no manifest is given.
    """

    manifest: Path | None = None
    fractions: tuple[Share, Share, Share] = (0.7, 0.15, 0.15)
    group: Literal["seen", "unseen"] = "unseen"
    external: tuple[str, ...] = ()
    cache: Path | None = None
    check: Whole = 16
    embedded: Number = 0

    def __post_init__(self) -> None:
        # The tables' places are part of words, so nobody else makes them absolute.
        words = [word.partition("=") for word in self.external]
        whole = tuple(f"{name}{mark}{expand_home(path).absolute() if path else ''}" for name, mark, path in words)
        object.__setattr__(self, "external", whole)


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Adaptation of TANGERINE to labels; defaults are the released code's fine-tuning.

    Attributes:
        data: Labelled scans.
        label: What is learnt.
        weights: Published or own weights to start from: a masked autoencoder, or a classifier, whose encoder is taken.
            Empty trains from scratch.
        image_size: Voxels of the cube along slices, rows and columns; 0 0 0 takes the weights' (256 from scratch).
            Positions are interpolated to another size.
        encoder: Sizes from scratch; of the weights' encoder otherwise, of which only drop_path_rate, remat, scan and
            attention are taken from here.
        pool: What the head stands on: "concat" (class token and mean of the patch tokens) or "mean", each under a layer
            norm, or "class" (the class token after the encoder's final norm).
        hidden: Width of a hidden layer with leaky ReLU and BatchNorm in the head, 64 in the released code; 0 for none.
        preprocess: How the files' axes lie, where it is not as the weights expect.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity in HU of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are
            refused.
        mode: "full" trains everything; "frozen" the head alone; "logistic" fits an L2 logistic regression (ridge for
            regression) to standardised features.
        optimizer: AdamW with a cosine, and rates that fall towards the first layers.
        epochs: Passes over the training scans; 0 leaves the length to loop.steps.
        warmup_epochs: Epochs over which the learning rate rises from 0.
        evaluate_epochs: Epochs between evaluations on validation scans.
        select: Which evaluation's parameters are kept: of lowest validation loss, or of highest AUROC.
        accumulation: Parts in which a batch is processed: the same numbers with less memory.
        token_keep: Share of the patch tokens that a training step looks at: less memory and time. Scoring sees all.
        smoothing: Label smoothing of a multi-class task.
        mix: Mixup and CutMix of training volumes; off, as in the released code.
        class_weights: Factors on the loss of each label's positives, or of each class, in the order of the report;
            empty for ones.
        balance: Find these factors from the training labels instead, so that classes count alike.
        augmentation: What happens to training volumes.
        threshold: Probability from which a binary label counts as predicted, in accuracy, F1 and their like.
        loader: Batch size (over all devices, all parts) and reading.
        loop: Intervals of lines and saves; patience.
        mesh: The devices.
        dtype: Of the matrix products.
        seed: Of splits, parameters, augmentation, order and intervals.
    """

    data: DataConfig = DataConfig()
    label: LabelConfig = LabelConfig()
    weights: Path | None = None
    image_size: tuple[Length, Length, Length] = (0, 0, 0)
    encoder: VitConfig = VitConfig()
    pool: Literal["concat", "mean", "class"] = "concat"
    hidden: Length = 0
    preprocess: FileAxes = FileAxes()
    series: str = ""
    fill: float | None = None
    mode: Literal["full", "frozen", "logistic"] = "full"
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, end_lr=1e-6, weight_decay=0.05, layer_decay=0.75)
    epochs: Epochs = 200
    warmup_epochs: Epochs = 5
    evaluate_epochs: Epochs = 1
    select: Literal["loss", "auroc"] = "loss"
    accumulation: Size = 4
    token_keep: float = 1.0
    smoothing: float = 0.1
    mix: MixConfig = MixConfig()
    class_weights: tuple[Positive, ...] = ()
    balance: bool = False
    augmentation: AugmentConfig = FINE_TUNING
    threshold: float = 0.5
    loader: LoaderConfig = LoaderConfig(batch_size=12, num_threads=4)
    loop: LoopConfig = LoopConfig(log_every=10, save_every=100)
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 5

    def __post_init__(self) -> None:
        if len(self.encoder.image_size) != 3:
            raise ValueError(f"encoder.image_size: expected 3 axes, found {self.encoder.image_size}")
        if min(self.image_size) < 0 or (any(self.image_size) and not all(self.image_size)):
            raise ValueError(f"image_size: expected three sizes above 0, or 0 0 0, found {self.image_size}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a probability between 0 and 1, found {self.threshold:g}")
        if self.balance and self.class_weights:
            raise ValueError("class_weights: expected none beside balance, found some")
        self.recipe(())  # refuses what the recipe does

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded > 0 and self.data.manifest is None and not self.data.external

    def recipe(self, weights: tuple[float, ...]) -> AdaptConfig:
        """Return what the recipe needs to know."""
        return AdaptConfig(
            self.mode, self.optimizer, self.loop, self.loader, self.mesh, self.epochs, self.warmup_epochs,
            self.evaluate_epochs, self.select, self.accumulation, self.token_keep, self.smoothing, self.mix, weights,
            self.seed,
        )  # fmt: skip


def paper() -> Config:
    """ViT-L at 256^3, batch 3 x 4, 200 epochs, bfloat16: for your scans and the published weights."""
    return Config(encoder=dataclasses.replace(VitConfig(), remat=True, scan=True), dtype="bfloat16")


def laptop() -> Config:
    """A small model at 32^3, in minutes: on your scans, or pre-trained and adapted on 1,000 phantom chests."""
    return Config(
        data=DataConfig(embedded=1000),
        image_size=(32, 32, 32),
        encoder=pretrain.laptop().model.encoder,
        optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, weight_decay=0.05, layer_decay=0.75),
        epochs=8,
        warmup_epochs=0.5,
        loader=LoaderConfig(batch_size=16),
        accumulation=1,
        select="auroc",
    )


def smoke() -> Config:
    """A tiny model at 32^3, in seconds: on your scans, or pre-trained and adapted on phantom chests."""
    # A hundred steps: the head with BatchNorm learns in these, a linear one would need many more.
    return Config(
        data=DataConfig(embedded=150),
        image_size=(32, 32, 32),
        encoder=pretrain.smoke().model.encoder,
        hidden=16,
        optimizer=OptimizerConfig(peak_lr=2e-3, end_lr=1e-5, weight_decay=0.05, layer_decay=0.75),
        epochs=32,
        warmup_epochs=1,
        evaluate_epochs=4,
        loader=LoaderConfig(batch_size=15),
        accumulation=1,
    )


class Start(NamedTuple):
    """Where training starts.

    Attributes:
        model: The classifier to train.
        params: {"encoder": ...}; None from scratch.
        preprocess: A file to a cube.
        licence: Of the weights.
        notes: What a user should know about them.
    """

    model: ClassifierConfig
    params: Params | None
    preprocess: Preprocess
    licence: str
    notes: list[str]


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when scans failed."""
    began = time.monotonic()
    is_embedded, notes = config.is_synthetic, []
    if is_embedded:
        config, notes = make_embedded(config, folder)
    scans = read_scans(config)
    first = read_start(config, scans.meaning.task)
    weights = config.class_weights
    if config.balance:
        weights = balanced_weights(scans.cohort.targets[scans.cohort.splits == "train"], scans.meaning.task)
    recipe = config.recipe(weights)
    check_run(recipe, first.model, scans.meaning.task)
    # Broken scans of the test split are left out when it is scored; nothing can be learnt from a broken one.
    learnt = scans.cohort.take(scans.cohort.rows("train", "validation"))
    unexpected = check_scans(learnt.scans, first.preprocess, config.data.check, config.loader.num_threads)
    if not is_embedded:
        start(folder)
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard, jax.process_index() == 0)
    notes += [*scans.notes, *first.notes, *unexpected, *length_notes(config.loop, config.epochs)]
    for note in notes:
        log.say(f"Note: {note}")
    if "subject" in scans.table.columns:
        write_split_table(folder.outputs / "splits.csv", scans.table, scans.cohort.splits.tolist())
    ready = time.monotonic()
    adapted = train_model(config, recipe, scans, first, folder, log)
    trained = time.monotonic()
    write_model(folder.outputs / "model", adapted, first, scans.meaning.task)
    sets = [
        score_cohort(recipe, adapted, first.preprocess, scans.meaning.task, *named, config.threshold, log)
        for named in named_sets(config, scans)
    ]
    scored = time.monotonic()
    notes += [f"{one.name}: {note}" for one, further in sets for note in further]
    failed = write_tables(folder.outputs, [one for one, _ in sets], adapted, scans.meaning.task)
    splits = scans.cohort.splits
    summary = {
        "task": to_record(scans.meaning.task),
        "mode": config.mode,
        "start": "random weights" if first.params is None else "pre-trained weights",
        "records": {split: int((splits == split).sum()) for split in ("train", "validation", "test")},
        "sets": [{"name": one.name, "group": one.group, "records": len(one.logits), "failed": len(one.failed)}
                 for one, _ in sets],
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(adapted.params)),
        "step": adapted.step,
        "select": config.select,
        "class_weights": list(weights),
        "threshold": config.threshold,
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine adapt --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "adapt, compilation included": trained - ready,
                    "score, with intervals": scored - trained},
    }  # fmt: skip
    write_summary(folder, summary)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


# Before training -----------------------------------------------------------------------------------------------------


def read_scans(config: Config) -> LabelledSets:
    """Read and check the tables.

    Raises:
        InputError: For whatever a user can have wrong in them.
    """
    data = config.data
    if data.manifest is None:
        raise InputError("data.manifest", "a table of labelled scans", "nothing", "or try --preset smoke")
    scans = read_labelled_sets(
        data.manifest, data.external, config.label, data.fractions, config.seed, needs_auroc=config.select == "auroc",
        series=config.series, fill=config.fill,
    )  # fmt: skip
    if config.select == "auroc" and scans.meaning.task.kind == "regression":
        raise InputError("select", "loss, for a regression", "auroc")
    return scans


def read_start(config: Config, task: Task) -> Start:
    """Read the weights, at the size that is wanted, and decide the classifier.

    Raises:
        InputError: They are of another model.
    """
    head = HeadConfig(len(task.names), config.pool, config.hidden)
    size = config.image_size if any(config.image_size) else None
    if config.weights is None:
        encoder = dataclasses.replace(
            config.encoder, image_size=size or config.encoder.image_size, final_norm=config.pool == "class",
            dtype=config.dtype,
        )  # fmt: skip
        x, y, z = encoder.image_size
        preprocess = config.preprocess.apply(dataclasses.replace(PREPROCESS, size=(x, y, z)))
        note = "No weights were given: the model starts from random ones, as the baseline from scratch."
        return Start(ClassifierConfig(encoder, head), None, preprocess, OWN_LICENCE, [note])
    published = load_published(config.weights, "tangerine")
    notes = [*published.report.lines]
    if len(published.config.encoder.image_size) != 3:
        raise InputError(config.weights, "an encoder of volumes", "one of images")
    if size is not None and size != published.config.encoder.image_size:
        old = " x ".join(map(str, published.config.encoder.image_size))
        published = resize_positions(published, size)
        notes.append(f"The weights are for {old}: positions were interpolated to {' x '.join(map(str, size))}.")
    if published.report.kind == "classifier":
        notes.append("The weights are a classifier's: its encoder is taken, its head is drawn anew.")
    model = ClassifierConfig(_encoder_of(config, published), head)
    params = take_encoder(published.params, model.encoder, str(config.weights))
    return Start(model, params, config.preprocess.apply(published.preprocess), published.report.licence, notes)


def _encoder_of(config: Config, published: Published) -> VitConfig:
    ours = config.encoder
    return dataclasses.replace(
        published.config.encoder, final_norm=config.pool == "class", dtype=config.dtype, remat=ours.remat,
        scan=ours.scan, attention=ours.attention, drop_path_rate=ours.drop_path_rate,
    )  # fmt: skip


def make_embedded(config: Config, folder: RunFolder, *, is_shared: bool = False) -> tuple[Config, list[str]]:
    """Write phantom chests and those of another scanner and, without weights, pre-train a small model on the first.

    Args:
        config: Of adapt, or of a stage with the same data.
        folder: The run, begun here.
        is_shared: As for `run_folder.start`.
    """
    published = None if config.weights is None else load_published(config.weights, "tangerine")
    size = config.image_size if any(config.image_size) else (32, 32, 32)
    if published is not None:
        size = published.preprocess.volume_size
    start(folder, is_shared=is_shared)
    log = Log(folder.path, folder.options.quiet)
    finding: Literal["effusion"] = "effusion"
    chests = ChestConfig(severity=(0.7, 1.0))
    manifest = write_chest_cohort(
        folder.path / "inputs", config.seed, config.data.embedded, size, chests, finding=finding,
        fractions=(0.5, 0.2, 0.3),
    )  # fmt: skip
    scanner = dataclasses.replace(chests, noise=40.0, field_of_view=(350.0, 350.0, 330.0))
    elsewhere = folder.path / "inputs" / "elsewhere"
    cohort = write_chest_cohort(
        elsewhere, config.seed + 1, max(config.data.embedded // 4, 8), size, scanner,
        finding=finding, fractions=(0.0, 0.0, 1.0),
    )  # fmt: skip
    # A table of its own: what is written over its source is another after every start.
    rows = [{**row, "subject": f"elsewhere_{row['subject']}"} for row in read_table(cohort).rows]
    other = elsewhere / "renamed.csv"
    write_table(other, list(rows[0]), rows)
    data = DataConfig(manifest, group="seen", external=(f"elsewhere:other={other}",))
    config = dataclasses.replace(config, data=data)
    if published is not None:
        return config, ["Chests are phantoms; the label is effusion."]
    # Few chests are for seconds: a tiny model then learns the anatomy and not much more.
    small = pretrain.laptop() if config.data.embedded >= 500 else dataclasses.replace(pretrain.smoke(), epochs=6)
    cache = folder.path / "inputs" / "volumes"
    # By the manifest: its test scans are not even seen without labels.
    settings = dataclasses.replace(small, data=pretrain.DataConfig(manifest, cache=cache), seed=config.seed)
    nested = open_run("tangerine", "pretrain", settings, RunOptions(folder.path / "inputs" / "pretrain", quiet=True))
    if nested.status != "complete":
        log.say("Pre-training a small model on the embedded chests first, without their labels.")
        pretrain.run(settings, nested)
    note = "Chests are phantoms, the label is effusion, and the model was pre-trained on these chests without labels."
    return dataclasses.replace(config, weights=nested.outputs / "model"), [note]


# Training and scoring ------------------------------------------------------------------------------------------------


def train_model(
    config: Config, recipe: AdaptConfig, scans: LabelledSets, first: Start, folder: RunFolder, log: Log
) -> Adapted:
    """Adapt on the manifest's training scans, select on its validation scans."""
    cohort = scans.cohort
    # Packing reads every scan once: those of the test split may be broken, and are read later.
    learnt = cohort.take(cohort.rows("train", "validation"))
    source = LabelledSource(input_source(learnt.scans, first.preprocess, config.data.cache), learnt.targets)
    train, validation = (SubsetSource(source, learnt.rows(split)) for split in ("train", "validation"))
    log.say(f"{len(train):,} scans to train on, {len(validation):,} to select on.")
    return adapt(
        recipe, first.model, scans.meaning.task, train, validation, PreparedField(first.preprocess),
        folder=folder, log=log, augment=config.augmentation if config.augmentation.active else None, start=first.params,
    )  # fmt: skip


def named_sets(config: Config, scans: LabelledSets) -> list[tuple[str, str, Cohort]]:
    """Return name, group and scans of everything that is scored."""
    found = []
    for split in ("validation", "test"):
        rows = scans.cohort.rows(split)
        if len(rows):
            found.append((split, config.data.group, scans.cohort.take(rows)))
    return found + scans.externals


# Outputs -------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, adapted: Adapted, first: Start, task: Task) -> None:
    """Export the adapted model for predict and embed."""
    record = {
        "family": "tangerine",
        "kind": "classifier",
        "config": to_record(adapted.config),
        "preprocess": to_record(first.preprocess),
        "licence": first.licence,
        "task": to_record(task),
    }
    export_parameters(folder, adapted.params, record)

"""ProFound's part in adapting to labels: weights as an encoder, the recipes of its code, and phantom prostates."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

from jaxmed.arrays.task import Task
from jaxmed.config import Length, Positive, Whole, checked
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.errors import InputError
from jaxmed.models.convnext import PROFOUND, ConvNextClassifierConfig, ConvNextConfig, convnext_encoder
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.load import OWN_LICENCE, Published, load_published, resize_positions
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.models.upernet import UperNetConfig, upernet_network
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.adapt import LARS_PROBE, AdaptConfig, take_encoder
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, LabelledFlags, Start
from jaxmed.recipes.adapt_start import start_from_weights
from jaxmed.recipes.segment_cases import Segmenter, task_labels
from jaxmed.recipes.stage import nested_run
from jaxmed.recipes.training import TrainConfig
from jaxmed.systems.profound.cases import SMALL, SMALL_INPUT, SMALL_SIZE, TINY, CaseFiles, write_cases
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder

FEWEST_FOR_BATCH_NORM = 8
FINE_TUNING = OptimizerConfig(
    peak_lr=5e-4, weight_decay=1e-5, layer_decay=0.8, no_decay=(r"(^|/)(bias|scale)$", r"^head/")
)
"""AdamW with rates that fall towards the stem, and no decay of the head, norms and constants.

Source: ProFound, official code, which leaves the rate and the factor between layers to the user.
"""
AUGMENTATION = AugmentConfig(
    order=("affine", "flip", "intensity", "bias", "blur"),
    affine_probability=0.5,
    rotation=10.0,
    scale=(0.9, 1.1),
    is_isotropic=False,
    translation=0.1,
    spacing=PREPROCESS.spacing,
    flip_axes=(2,),
    intensity_probability=0.8,
    bias_probability=0.2,
    blur_probability=1.0,
    blur_sigma=(0.25, 1.5),
    blur_is_isotropic=False,
)
"""What happens to training cases. All of them are blurred, and no others: a note says so.

Source: ProFound, official code (MONAI's transforms). Deviation: rotation, zoom and the move of a random cut are drawn
together, in half of the cases.
"""

PAPER = LabelledConfig(
    adapt=AdaptConfig(
        TrainConfig(
            FINE_TUNING, LoopConfig(log_every=10, save_every=100), LoaderConfig(batch_size=2, num_threads=4),
            MeshConfig(data=1), epochs=400, warmup_epochs=40,
        ),
        smoothing=0.0,
    ),
    pool="mean", hidden=256, balance=True,
)  # fmt: skip
"""The released code's fine-tuning: batch 2, 400 epochs, the lowest loss on validation cases."""


@dataclasses.dataclass(frozen=True)
@checked
class AdaptationConfig:
    """Adaptation of ProFound to labels; defaults are the released code's fine-tuning.

    Attributes:
        labelled: Labelled cases, what is learnt of them and how. --mode frozen trains the head alone, by LARS unless
            another optimizer is set. Labels of zones are columns of 0 and 1 (--label.columns zone_1 zone_2 ...), each
            with a binary cross-entropy. Deviation: classes are balanced by weights of the loss, where the released
            code draws records of rare ones more often, with replacement; in expectation a step is the same.
        image_size: Voxels along slices, rows and columns; 0 0 0 takes the weights' (64 x 224 x 224 from scratch, and
            of published files, which do not tell it).
        spacing: Voxel size from scratch, in mm, along slices, rows and columns; of the weights otherwise.
        encoder: Sizes from scratch; of the weights' encoder otherwise, of which only drop_path_rate and remat are
            taken from here.
        preprocess: How the files of a case are named, where it is not as the weights expect.
        augmentation: What happens to training cases. Deviation: they are cut about the centre, as all are, where the
            released code cuts a region of 1.2 times the size at random; translation moves them by as much instead.
        quality_scans: Training cases whose quality is measured and kept beside the model, so that predict can tell
            which cases are worse, or better, than any of them; 0 measures none.
    """

    labelled: LabelledFlags = PAPER
    image_size: tuple[Length, Length, Length] = (0, 0, 0)
    spacing: tuple[Positive, Positive, Positive] = (1.0, 0.5, 0.5)
    encoder: ConvNextConfig = dataclasses.replace(PROFOUND, drop_path_rate=0.1)
    preprocess: CaseFiles = CaseFiles()
    augmentation: AugmentConfig = AUGMENTATION
    quality_scans: Whole = 200

    def __post_init__(self) -> None:
        if any(self.image_size) and not all(self.image_size):
            raise ValueError(f"image_size: expected three sizes above 0, or 0 0 0, found {self.image_size}")

    @property
    def augment(self) -> AugmentConfig | None:
        """The augmentation, where anything can happen."""
        return self.augmentation if self.augmentation.active else None

    @property
    def size(self) -> tuple[int, ...] | None:
        """Voxels along each axis, where they are not the weights' own."""
        return self.image_size if any(self.image_size) else None


def small(synthetic: int, train: TrainConfig, *, tiny: bool = False, evaluate_epochs: float = 1) -> AdaptationConfig:
    """A small or tiny model at 16 x 32 x 32, for a laptop.

    Args:
        synthetic: Phantoms where no manifest is given.
        train: Optimizer, length and batch.
        tiny: Whether the encoder is that of the smoke preset of pretrain.
        evaluate_epochs: Between evaluations.
    """
    adapt = AdaptConfig(
        dataclasses.replace(train, mesh=MeshConfig(data=1)), evaluate_epochs=evaluate_epochs, smoothing=0.0
    )
    labelled = dataclasses.replace(PAPER, data=LabelledData(synthetic=synthetic), hidden=16, adapt=adapt)
    mild = dataclasses.replace(AUGMENTATION, spacing=SMALL_INPUT.spacing, translation=0.03, blur_probability=0.0)
    depth, rows, columns = SMALL_INPUT.spacing
    return AdaptationConfig(
        labelled, SMALL_SIZE, (depth, rows, columns), TINY if tiny else SMALL, augmentation=mild
    )  # fmt: skip


def small_optimizer(peak_lr: float) -> OptimizerConfig:
    """Return the fine-tuning optimizer of a small model."""
    return dataclasses.replace(FINE_TUNING, peak_lr=peak_lr, end_lr=1e-5)


def with_probe(labelled: LabelledConfig) -> LabelledConfig:
    """Return the settings with LARS for a head on a frozen encoder, where the optimizer is left to the recipe."""
    adapt = labelled.adapt
    if adapt.mode != "frozen" or adapt.train.optimizer != FINE_TUNING:
        return labelled
    train = dataclasses.replace(adapt.train, optimizer=LARS_PROBE)
    return dataclasses.replace(labelled, adapt=dataclasses.replace(adapt, train=train))


def find_start(config: AdaptationConfig, task: Task) -> Start:
    """Read the weights, at the size that is wanted, and decide the classifier.

    Raises:
        InputError: They are of another model.
    """
    labelled, notes = config.labelled, []
    head = HeadConfig(
        len(task.names), "mean" if labelled.pool == "auto" else labelled.pool, labelled.hidden, hidden_layer="relu"
    )
    ours, params, licence = config.encoder, None, OWN_LICENCE
    if labelled.weights is None:
        encoder = dataclasses.replace(ours, image_size=config.size or ours.image_size)
        preprocess = dataclasses.replace(PREPROCESS, size=encoder.image_size, spacing=config.spacing)
        notes.append("No weights were given: the model starts from random ones, as the baseline from scratch.")
    else:
        published = load_weights(CaseFiles(), labelled.weights)
        if isinstance(published.config, MaeConfig | ClassifierConfig):
            return _start_transformer(config, task)
        notes += published.report.lines
        if config.size is not None:
            published = resize_positions(published, config.size)
        encoder, preprocess, licence = published.config.encoder, published.preprocess, published.report.licence
        params = take_encoder(dict(published.params), convnext_encoder(encoder), str(labelled.weights))
    part = labelled.adapt.train.loader.batch_size // labelled.adapt.train.accumulation
    is_trained = labelled.adapt.mode in ("full", "frozen")
    if is_trained and head.hidden and part < FEWEST_FOR_BATCH_NORM:
        notes.append(
            f"BatchNorm of the head sees {part} cases at a time, of which its moments are uncertain: take a larger "
            "batch, or --hidden 0 for a head without it."
        )
    if is_trained:
        notes += blur_notes(config.augmentation)
    encoder = dataclasses.replace(
        encoder, drop_path_rate=ours.drop_path_rate, remat=ours.remat, dtype=labelled.adapt.train.dtype,
        response_scope="sample",
    )  # fmt: skip
    return Start(
        convnext_encoder(encoder), head, params, config.preprocess.apply(preprocess), "profound",
        partial(ConvNextClassifierConfig, encoder), licence, notes,
    )  # fmt: skip


def blur_notes(augmentation: AugmentConfig) -> list[str]:
    """Say that training cases are softer than others, where they are blurred."""
    if not augmentation.blur_probability:
        return []
    return [
        f"Training cases are blurred with probability {augmentation.blur_probability:g}, others never: the encoder "
        "learns on softer scans than it is tested on. --augmentation.blur-probability 0 leaves them."
    ]


def _start_transformer(config: AdaptationConfig, task: Task) -> Start:
    ours = VitConfig((16, 16, 16), drop_path_rate=config.encoder.drop_path_rate, remat=config.encoder.remat)
    found = start_from_weights(config.labelled, task, ("profound",), ours, config.size)
    preprocess = config.preprocess.apply(found.preprocess)
    return found._replace(preprocess=preprocess, kind="transformer-classifier")


def load_weights(files: CaseFiles, place: Path, task: Task | None = None) -> Published:
    """Read weights of this family, for cases whose files are named as said."""
    published = load_published(place, "profound", task=task)
    return dataclasses.replace(published, preprocess=files.apply(published.preprocess))


def segmenter_of(published: Published, where: Path, dtype: Literal["float32", "bfloat16"]) -> Segmenter:
    """Return weights of a segmenter as what segments cases.

    Raises:
        InputError: They are of another model.
    """
    if not isinstance(published.config, UperNetConfig):
        raise InputError(where, "weights of a segmenter", f"weights of kind {published.report.kind}")
    encoder = dataclasses.replace(published.config.encoder, dtype=dtype, response_scope="sample")
    sizes = dataclasses.replace(published.config, encoder=encoder)
    labels = task_labels(published.task, sizes.classes)
    return Segmenter(upernet_network(sizes), dict(published.params), labels, published.preprocess)


def with_synthetic(config: AdaptationConfig, folder: RunFolder) -> tuple[AdaptationConfig, list[str]]:
    """Where no files are given, write phantom prostates and, without weights, pre-train a small model on them.

    Args:
        config: Of a stage.
        folder: The run, begun here where anything is written.

    Returns:
        The configuration with files, and notes on them.
    """
    labelled = config.labelled
    if not labelled.is_synthetic:
        return config, []
    count, seed = labelled.data.synthetic, labelled.adapt.train.seed
    manifest = write_cases(folder, seed, count, fractions=(0.5, 0.2, 0.3))
    weights, note = labelled.weights, "Prostates are phantoms; the label is a lesion of grade 2 or more."
    if weights is None:
        weights = pretrain_on(folder, manifest, seed, preset="laptop" if count >= 300 else "smoke")
        note += " The model was pre-trained on these phantoms without labels."
    data = LabelledData(manifest, group="seen", cache=folder.path / "inputs" / "prepared")
    return dataclasses.replace(config, labelled=dataclasses.replace(labelled, data=data, weights=weights)), [note]


def pretrain_on(folder: RunFolder, manifest: Path, seed: int, *, preset: str = "smoke") -> Path:
    """Pre-train a small masked autoencoder on the cases of a manifest, and return its weights."""
    changes = {
        "data.manifest": manifest, "data.cache": folder.path / "inputs" / "volumes", "data.synthetic": 0,
        "train.seed": seed,
    }  # fmt: skip
    nested = nested_run(
        folder, "profound pretrain", changes, Log(folder.path, folder.options.quiet),
        "Pre-training a small model on the synthetic cases first, without their labels.", preset=preset,
    )  # fmt: skip
    return nested.outputs / "model"

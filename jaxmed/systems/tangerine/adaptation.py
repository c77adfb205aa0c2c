"""TANGERINE's part in adapting to labels: weights as an encoder, the augmentation of its code, and phantom chests."""

import dataclasses
from pathlib import Path

from jaxmed.arrays.task import Task
from jaxmed.config import Length, checked
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import FileAxes
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.mae import MAE_LAPTOP_3D, MAE_SMOKE_3D
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.adapt import FINE_TUNING, AdaptConfig
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, LabelledFlags, Start
from jaxmed.recipes.adapt_start import start_from_scratch, start_from_weights
from jaxmed.recipes.stage import nested_run
from jaxmed.recipes.training import TrainConfig
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start

SOURCE = "Model: TANGERINE, arXiv:2507.01881. For research only, not for diagnosis."
CHESTS = ChestConfig(severity=(0.7, 1.0))
SMALL_SHAPE = (32, 32, 32)

AUGMENTATION = AugmentConfig(
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

PAPER = LabelledConfig(
    adapt=AdaptConfig(
        TrainConfig(
            FINE_TUNING, LoopConfig(log_every=10, save_every=100), LoaderConfig(batch_size=12, num_threads=4),
            MeshConfig(data=1), epochs=200, warmup_epochs=5, accumulation=4, seed=5,
        )
    ),
)  # fmt: skip
"""The released code's fine-tuning: batch 3 x 4, 200 epochs."""


@dataclasses.dataclass(frozen=True)
@checked
class AdaptationConfig:
    """Adaptation of TANGERINE to labels; defaults are the released code's fine-tuning.

    Attributes:
        labelled: Labelled scans, what is learnt of them and how.
        image_size: Voxels of the cube along slices, rows and columns; 0 0 0 takes the weights' (256 from scratch).
            Positions are interpolated to another size.
        encoder: Sizes from scratch; of the weights' encoder otherwise, of which only drop_path_rate, remat, scan and
            attention are taken from here.
        preprocess: How the files' axes lie, where it is not as the weights expect.
        augmentation: What happens to training volumes.
    """

    labelled: LabelledFlags = PAPER
    image_size: tuple[Length, Length, Length] = (0, 0, 0)
    encoder: VitConfig = VitConfig()
    preprocess: FileAxes = FileAxes()
    augmentation: AugmentConfig = AUGMENTATION

    def __post_init__(self) -> None:
        if len(self.encoder.image_size) != 3:
            raise ValueError(f"encoder.image_size: expected 3 axes, found {self.encoder.image_size}")
        if any(self.image_size) and not all(self.image_size):
            raise ValueError(f"image_size: expected three sizes above 0, or 0 0 0, found {self.image_size}")

    @property
    def augment(self) -> AugmentConfig | None:
        """The augmentation, where anything can happen."""
        return self.augmentation if self.augmentation.active else None


def full_size() -> AdaptationConfig:
    """ViT-L at 256^3, in bfloat16."""
    train = dataclasses.replace(PAPER.adapt.train, dtype="bfloat16")
    labelled = dataclasses.replace(PAPER, adapt=dataclasses.replace(PAPER.adapt, train=train))
    return AdaptationConfig(labelled, encoder=dataclasses.replace(VitConfig(), remat=True, scan=True))


def small(
    synthetic: int,
    train: TrainConfig,
    *,
    tiny: bool = False,
    evaluate_epochs: float = 1,
    auroc: bool = True,
    hidden: int = 0,
) -> AdaptationConfig:
    """A small or tiny model at 32^3, for a laptop.

    Args:
        synthetic: Phantom chests where no manifest is given.
        train: Optimizer, length and batch.
        tiny: Whether the encoder is that of the smoke preset of pretrain.
        evaluate_epochs: Between evaluations.
        auroc: Whether the AUROC selects, rather than the loss.
        hidden: Width of a hidden layer in the head.
    """
    adapt = AdaptConfig(
        dataclasses.replace(train, mesh=MeshConfig(data=1), seed=PAPER.adapt.train.seed),
        evaluate_epochs=evaluate_epochs, select="auroc" if auroc else "loss",
    )  # fmt: skip
    labelled = LabelledConfig(LabelledData(synthetic=synthetic), hidden=hidden, adapt=adapt)
    return AdaptationConfig(labelled, SMALL_SHAPE, (MAE_SMOKE_3D if tiny else MAE_LAPTOP_3D).encoder)


def small_optimizer(peak_lr: float) -> OptimizerConfig:
    """Return the fine-tuning optimizer of a small model."""
    return dataclasses.replace(FINE_TUNING, peak_lr=peak_lr, end_lr=1e-5)


def find_start(config: AdaptationConfig, task: Task) -> Start:
    """Read the weights, at the size that is wanted, and decide the classifier.

    Raises:
        InputError: They are of another model.
    """
    size = config.image_size if any(config.image_size) else None
    if config.labelled.weights is None:
        encoder = dataclasses.replace(config.encoder, image_size=size or config.encoder.image_size)
        preprocess = config.preprocess.apply(dataclasses.replace(PREPROCESS, size=encoder.image_size))
        return start_from_scratch(config.labelled, task, encoder, "tangerine", preprocess)
    found = start_from_weights(config.labelled, task, ("tangerine",), config.encoder, size)
    return found._replace(preprocess=config.preprocess.apply(found.preprocess))


def load_weights(axes: FileAxes, place: Path, task: Task | None = None) -> Published:
    """Read weights of this family, for files whose axes lie as said."""
    published = load_published(place, "tangerine", task=task)
    return dataclasses.replace(published, preprocess=axes.apply(published.preprocess))


def with_synthetic(
    config: AdaptationConfig, folder: RunFolder, *, is_shared: bool = False, elsewhere: bool = True
) -> tuple[AdaptationConfig, list[str]]:
    """Where no files are given, write phantom chests and, without weights, pre-train a small model on them.

    Args:
        config: Of a stage.
        folder: The run, begun here where anything is written.
        is_shared: As for `run_folder.start`.
        elsewhere: Whether chests of another scanner are an external set.

    Returns:
        The configuration with files, and notes on them.
    """
    labelled = config.labelled
    if not labelled.is_synthetic:
        return config, []
    size = config.image_size if any(config.image_size) else SMALL_SHAPE
    if labelled.weights is not None:
        size = load_published(labelled.weights, "tangerine").preprocess.volume_size
    start(folder, is_shared=is_shared)
    place, count, seed = folder.path / "inputs", labelled.data.synthetic, labelled.adapt.train.seed
    manifest = write_chest_cohort(place, seed, count, size, CHESTS, finding="effusion", fractions=(0.5, 0.2, 0.3))
    other = (f"elsewhere:other={_write_elsewhere(place / 'elsewhere', seed + 1, count, size)}",) if elsewhere else ()
    weights, note = labelled.weights, "Chests are phantoms; the label is effusion."
    if weights is None:
        # By the manifest: its test scans are not even seen without labels.
        changes = {"data.manifest": manifest, "data.cache": place / "volumes", "data.synthetic": 0, "train.seed": seed}
        # Few chests are for seconds: a tiny model then learns the anatomy and not much more.
        preset, length = ("laptop", {}) if count >= 500 else ("smoke", {"train.epochs": 6})
        nested = nested_run(
            folder, "tangerine pretrain", changes | length, Log(folder.path, folder.options.quiet),
            "Pre-training a small model on the synthetic chests first, without their labels.", preset=preset,
        )  # fmt: skip
        weights = nested.outputs / "model"
        note = (
            "Chests are phantoms, the label is effusion, and the model was pre-trained on these chests without labels."
        )
    data = LabelledData(manifest, group="seen", external=other)
    return dataclasses.replace(config, labelled=dataclasses.replace(labelled, data=data, weights=weights)), [note]


def _write_elsewhere(place: Path, seed: int, count: int, size: tuple[int, int, int]) -> Path:
    scanner = dataclasses.replace(CHESTS, noise=40.0, field_of_view=(350.0, 350.0, 330.0))
    cohort = write_chest_cohort(
        place, seed, max(count // 4, 8), size, scanner, finding="effusion", fractions=(0.0, 0.0, 1.0)
    )
    # A table of its own: what is written over its source is another after every start.
    rows = [{**row, "subject": f"elsewhere_{row['subject']}"} for row in read_table(cohort).rows]
    write_table(place / "renamed.csv", list(rows[0]), rows)
    return place / "renamed.csv"

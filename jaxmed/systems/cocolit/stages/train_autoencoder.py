"""CoCoLIT train-autoencoder: the KL autoencoder of MRI or of SUVR maps, against a discriminator."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxmed.config import Positive, Size, checked
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.io.tables import resolve_paths
from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, AutoencoderKlConfig
from jaxmed.models.patch_discriminator import COCOLIT_DISCRIMINATOR, PatchDiscriminatorConfig
from jaxmed.models.published import cocolit
from jaxmed.objectives.perceptual import PerceptualConfig
from jaxmed.recipes.adversarial_autoencoder import AutoencoderLossConfig
from jaxmed.recipes.autoencoder_stage import (
    Images,
    Parts,
    Summary,
    autoencoder_page,
    read_start,
    require_sizes,
    run_autoencoder,
    shown_row,
)
from jaxmed.recipes.pair_tables import make_data
from jaxmed.recipes.stage import Clock, Finished, Page
from jaxmed.recipes.training import TrainConfig, TrainFlags
from jaxmed.report.figures import MapStyle
from jaxmed.systems.cocolit.networks import TINY_AUTOENCODER, TINY_SIZE, TINY_SPACING
from jaxmed.systems.cocolit.training import COLUMNS, SOURCE, Modality, PairData, find_pairs, make_preprocess
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder

UNITS = {"mri": "1", "suvr": "SUVR"}
AUGMENT = AugmentConfig(
    ("affine",), affine_probability=0.3, rotation=float(np.rad2deg(0.05)), scale=(0.95, 1.05), is_isotropic=False,
    translation=2 / 128, fill=None,
)  # fmt: skip
"""Rotations of .05 rad, scales of 5 %, shifts of 2 voxels of 128."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of an autoencoder; defaults are the released code's, but for what `match_release` says.

    Attributes:
        data: The pairs; all images of one modality are trained on.
        modality: Which of the two images: mri or suvr.
        size: Voxels of an input, multiples of what the autoencoder halves; scans are padded or cut about their middle.
        spacing: Voxel size in mm.
        mean: Of intensities, which is subtracted; the released one of the modality where none is given.
        std: By which they are divided, likewise.
        model: The autoencoder; its dtype is set by --dtype.
        discriminator: Its opponent.
        loss: What counts how much.
        augment: Variants of an image.
        weights: Autoencoder to start from, such as MAISI's; random where empty.
        perceptual: Weights of LPIPS by SqueezeNet, for the perceptual term, which is left out where empty.
        slices: Which slices that term looks at.
        train: The run.
    """

    data: PairData = PairData()
    modality: Modality = "mri"
    size: tuple[Size, ...] = (128, 152, 128)
    spacing: Positive = 1.5
    mean: float | None = None
    std: Positive | None = None
    model: AutoencoderKlConfig = COCOLIT_AUTOENCODER
    discriminator: PatchDiscriminatorConfig = COCOLIT_DISCRIMINATOR
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    augment: AugmentConfig = AUGMENT
    weights: Path | None = None
    perceptual: Path | None = None
    slices: PerceptualConfig = PerceptualConfig()
    train: TrainFlags = TrainConfig()

    def __post_init__(self) -> None:
        require_sizes(self.model, self.discriminator, self.size)


def paper() -> Config:
    """20.9 M parameters on 128 x 152 x 128 voxels of 1.5 mm, 200 epochs in batches of 16: an accelerator."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2e-4, end_lr=2e-5, weight_decay=0.0),
        LoopConfig(log_every=10, save_every=200, evaluate_every=100),
        LoaderConfig(batch_size=16, num_threads=4),
        MeshConfig(data=1),
        epochs=200,
        accumulation=16,
        dtype="bfloat16",
    )
    return Config(model=dataclasses.replace(COCOLIT_AUTOENCODER, remat=True), train=train)


def laptop() -> Config:
    """0.3 M parameters on 48 x 56 x 48 voxels of 4 mm, 1,000 steps of 2: your pairs, about an hour on a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=5e-4, end_lr=5e-5, weight_decay=0.0),
        LoopConfig(steps=1000, log_every=20, save_every=200, evaluate_every=200),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    model = AutoencoderKlConfig(widths=(16, 32), blocks=(1, 1), groups=8)
    return Config(
        size=(48, 56, 48), spacing=4.0, model=model, discriminator=PatchDiscriminatorConfig(width=8), train=train
    )


def smoke() -> Config:
    """A tiny autoencoder at 16^3, in seconds: on your pairs, or on phantoms."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, end_lr=3e-4, weight_decay=0.0),
        LoopConfig(steps=40, log_every=4, save_every=40),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    return Config(
        PairData(synthetic=8), size=TINY_SIZE, spacing=TINY_SPACING, model=TINY_AUTOENCODER,
        discriminator=PatchDiscriminatorConfig(width=4, layers=1), train=train,
    )  # fmt: skip


def run(config: Config, folder: RunFolder) -> None:
    """Read the table, train, export the autoencoder, show what becomes of one image."""
    clock, modality = Clock(), config.modality
    parts = Parts(
        config.model, config.discriminator, config.loss, config.augment, config.weights, config.perceptual,
        config.slices, config.train,
    )  # fmt: skip
    initial, column = read_start(parts), COLUMNS[modality]
    table = find_pairs(config.data, folder, config.train.seed, (column,))
    preprocess = make_preprocess(modality, config.size, config.spacing, config.mean, config.std)
    data = make_data(table, {"image": (column, preprocess)})
    shown = resolve_paths(table, column)[shown_row(table.column("split"))]
    record = {"family": cocolit.NAME, "kind": "autoencoder", "modality": modality}
    images = Images(data, preprocess, shown, modality, UNITS[modality])
    run_autoencoder(config, parts, initial, images, record, folder, clock, page)


READING = (
    "The autoencoder is in outputs/model: that of the evaluation with the least error where images were held out. "
    "jaxmed cocolit encode takes two such runs, one of each modality.",
    "Blurred reconstructions are the common complaint: train longer, or look at the table, in which the mean absolute "
    "error should be the largest term without drowning the adversarial one.",
    SOURCE,
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, what each term weighs, and one image with its reconstruction."""
    modality = run.config.modality
    style = MapStyle("WhiteStripe", colormap="gray") if modality == "mri" else MapStyle("SUVR", colormap="inferno")
    subtitle = f"A KL autoencoder of {modality}"
    return autoencoder_page(run, "CoCoLIT autoencoder", subtitle, run.config.loss, style, READING)

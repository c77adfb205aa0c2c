"""RETFound's part in adapting to labels: weights of any family as an encoder, the official recipe, and phantom eyes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.config import Length, checked
from jaxmed.data.augment_pictures import FineTuneAugment
from jaxmed.data.labels import LabelConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import ANY_KIND
from jaxmed.models.heads import Classifier, ClassifierConfig
from jaxmed.models.published.dino import picture_preprocess
from jaxmed.models.published.load import Published, resize_positions
from jaxmed.models.vit import VIT_L16_2D, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.recipes.adapt import AdaptConfig
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, LabelledFlags, Start
from jaxmed.recipes.adapt_start import read_weights, start_from_scratch, start_from_weights
from jaxmed.recipes.scan_job import ScansConfig
from jaxmed.recipes.stage import nested_run
from jaxmed.recipes.training import NO_PREFIX, TrainConfig
from jaxmed.synthesis.phantoms.retina import OTHER_CAMERA
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start

SOURCE = "Study: arXiv:2509.03421; RETFound, Nature 2023. For research only, not for diagnosis."
FAMILIES = ("retfound", "dinov2", "dinov3")
EDGE = 64  # pixels of phantom eyes
TINY = VitConfig(
    (EDGE, EDGE), (8, 8), 3, width=48, depth=2, heads=3, hidden=192, drop_path_rate=0.1, positions="learned"
)  # fmt: skip
SMALL = dataclasses.replace(TINY, width=96, depth=4, hidden=384)
RATE = OptimizerConfig(peak_lr=1e-3, end_lr=1e-6, weight_decay=0.05, layer_decay=0.75)  # of small models
PEAK = 5e-3 * 24 / 256  # blr x batch / 256

PAPER = LabelledConfig(
    adapt=AdaptConfig(
        TrainConfig(
            OptimizerConfig(peak_lr=PEAK, end_lr=1e-6, weight_decay=0.05, layer_decay=0.65, no_decay=(
                r"(^|/)(bias|scale)$", r"(^|/)position$")),
            LoopConfig(log_every=10, save_every=200), LoaderConfig(batch_size=24, num_threads=4), MeshConfig(data=1),
            epochs=50, warmup_epochs=10,
        ),
        smoothing=0.0, select="score",
    ),
    pool="auto",
)  # fmt: skip
"""The official fine-tuning: batch 24, 50 epochs, layer decay 0.65, no smoothing, the best mean of F1, AUROC and kappa.

Source: RETFound, official code of 2025.
"""


@dataclasses.dataclass(frozen=True)
@checked
class PictureInput:
    """What may differ from the preprocessing that travels with weights.

    Attributes:
        crop: "disc" cuts a fundus photograph to its disc first; "none" is for pictures that are cropped, and OCT;
            "weights" does what is stored with the weights, which is nothing for published ones.
        normalise: "imagenet" takes the colours' means and deviations of ImageNet; "image" those of each picture, as
            RETFound's feature notebook does; "weights" what is stored with the weights.
    """

    crop: Literal["weights", "none", "disc"] = "weights"
    normalise: Literal["weights", "imagenet", "image"] = "weights"

    def apply(self, preprocess: Preprocess) -> Preprocess:
        """Return the preprocessing of the weights with what is set here."""
        changed = preprocess if self.crop == "weights" else dataclasses.replace(preprocess, crop=self.crop)
        if self.normalise == "weights":
            return changed
        intensity = picture_preprocess(preprocess.size).intensity
        if self.normalise == "image":
            intensity = dataclasses.replace(intensity, kind="zscore", mean=(), std=())
        return dataclasses.replace(changed, intensity=intensity)


@dataclasses.dataclass(frozen=True)
@checked
class WeightsInput:
    """How images become the input of given weights.

    Attributes:
        image_size: Rows and columns; 0 0 takes the weights' own (224 from scratch). Positions are interpolated to
            another size.
        interpolation: Of a table of positions; "auto" as the code that goes with the weights.
        picture: How pictures become the input, where it is not as the weights expect.
        match_release: Apply the layer norm of a head's pooled features twice, as the official code of 2025 did.
    """

    image_size: tuple[Length, Length] = (0, 0)
    interpolation: Literal["auto", "size", "offset", "antialias", "linear"] = "auto"
    picture: PictureInput = PictureInput()
    match_release: bool = False

    def __post_init__(self) -> None:
        if any(self.image_size) and not all(self.image_size):
            raise ValueError(f"image_size: expected two sizes above 0, or 0 0, found {self.image_size}")

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns, where they are not the weights' own."""
        return self.image_size if any(self.image_size) else None

    @property
    def how(self) -> Interpolation | Literal[""]:
        """The interpolation, where it is not the family's own."""
        return "" if self.interpolation == "auto" else self.interpolation


# The type of a stage's field `given`: on the command line its options carry no prefix.
GivenFlags: TypeAlias = Annotated[WeightsInput, NO_PREFIX]


@dataclasses.dataclass(frozen=True)
@checked
class AdaptationConfig:
    """Adaptation of an encoder of images to labels; defaults are the official fine-tuning of RETFound.

    Attributes:
        labelled: Labelled images, what is learnt of them and how; --mode frozen is the official linear probe.
        given: Size of the images, and how pictures become the input.
        encoder: Sizes from scratch; of the weights' encoder otherwise, of which only drop_path_rate, remat, scan and
            attention are taken from here.
        augmentation: What happens to training images; by default the official random crops, RandAugment and erasing,
            and of --mode mae-probe crops and flips alone, as MAE's recipe has it (which takes --pool class).
    """

    labelled: LabelledFlags = PAPER
    given: GivenFlags = WeightsInput((224, 224))
    encoder: VitConfig = dataclasses.replace(VIT_L16_2D, drop_path_rate=0.2, positions="learned")
    augmentation: FineTuneAugment = FineTuneAugment()

    def __post_init__(self) -> None:
        if len(self.encoder.image_size) != 2:
            raise ValueError(f"encoder.image_size: expected 2 axes, found {self.encoder.image_size}")


def load_weights(given: WeightsInput, place: Path, task: Task | None = None) -> Published:
    """Read weights of the study's families, at the size that is wanted.

    Raises:
        InputError: They are of another model.
    """
    published = read_weights(place, FAMILIES, 2, task)
    if given.size is not None:
        published = resize_positions(published, given.size, given.how)
    config = published.config
    if given.match_release and isinstance(config, ClassifierConfig):
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, norm_repeats=2))
        published = dataclasses.replace(published, config=config, model=make_model(Classifier(config)))
    return dataclasses.replace(published, preprocess=given.picture.apply(published.preprocess))


def full_size() -> AdaptationConfig:
    """ViT-L at 224, in bfloat16."""
    train = dataclasses.replace(PAPER.adapt.train, dtype="bfloat16")
    labelled = dataclasses.replace(PAPER, adapt=dataclasses.replace(PAPER.adapt, train=train))
    return AdaptationConfig(labelled, encoder=dataclasses.replace(AdaptationConfig().encoder, remat=True, scan=True))


def small(synthetic: int, train: TrainConfig, *, tiny: bool = False, evaluate_epochs: float = 1) -> AdaptationConfig:
    """A small or tiny model at 64 pixels, for a laptop.

    Args:
        synthetic: Phantom eyes where no manifest is given.
        train: Optimizer, length and batch.
        tiny: Whether the encoder is that of the smoke preset of pretrain.
        evaluate_epochs: Between evaluations.
    """
    adapt = AdaptConfig(
        dataclasses.replace(train, mesh=MeshConfig(data=1)), evaluate_epochs=evaluate_epochs, select="auroc",
        smoothing=0.0,
    )  # fmt: skip
    labelled = LabelledConfig(LabelledData(synthetic=synthetic), pool="auto", adapt=adapt)
    return AdaptationConfig(
        labelled, WeightsInput((EDGE, EDGE)), TINY if tiny else SMALL,
        FineTuneAugment(scale=(0.6, 1.0), num_operations=0, erase=0.0),
    )  # fmt: skip


def find_start(config: AdaptationConfig, task: Task) -> Start:
    """Read the weights, at the size that is wanted, and decide the classifier.

    Raises:
        InputError: They are of another model.
    """
    given = config.given
    if config.labelled.weights is None:
        encoder = dataclasses.replace(config.encoder, image_size=given.size or config.encoder.image_size)
        family = "dinov2" if encoder.layer_scale and encoder.positions != "rope" else "retfound"
        found = start_from_scratch(config.labelled, task, encoder, family, picture_preprocess(encoder.image_size))
    else:
        found = start_from_weights(
            config.labelled, task, FAMILIES, config.encoder, given.size, given.how, _train_positions
        )
    preprocess = given.picture.apply(found.preprocess)
    rows, columns = preprocess.size
    # Training crops are cut out of what an evaluation sees and the margin that it cuts away.
    larger = (max(preprocess.shorter, rows), max(preprocess.shorter, columns))
    intensity = preprocess.intensity
    augmentation, mode = config.augmentation, config.labelled.adapt.mode
    if mode == "mae-probe" and augmentation == FineTuneAugment():
        augmentation = dataclasses.replace(augmentation, num_operations=0, erase=0.0)
    augment = dataclasses.replace(augmentation, size=(rows, columns), mean=intensity.mean, std=intensity.std)
    training = dataclasses.replace(preprocess, size=larger)
    head = dataclasses.replace(found.head, norm_repeats=1 + given.match_release)
    encoder = found.encoder
    if mode == "frozen":  # the official linear probe trains what is called "head" and no norm
        encoder = dataclasses.replace(encoder, frozen=(*encoder.frozen, r"^head/norm/"))
    return found._replace(encoder=encoder, head=head, preprocess=preprocess, training=training, augment=augment)


def _train_positions(encoder: VitConfig) -> VitConfig:
    """Return an encoder whose table of positions is fine-tuned, as the official code does with that of sines."""
    return dataclasses.replace(encoder, positions="learned") if encoder.positions == "sincos" else encoder


def with_synthetic(
    config: AdaptationConfig, folder: RunFolder, *, is_shared: bool = False
) -> tuple[AdaptationConfig, list[str]]:
    """Where no files are given, write phantom eyes, those of another camera beside them, and pre-train on them.

    Args:
        config: Of a stage.
        folder: The run, begun here where anything is written.
        is_shared: As for `run_folder.start`.

    Returns:
        The configuration with files, and notes on them.
    """
    labelled = config.labelled
    if not labelled.is_synthetic:
        return config, []
    start(folder, is_shared=is_shared)
    place, count, seed = folder.path / "inputs", labelled.data.synthetic, labelled.adapt.train.seed
    manifest = write_retina_cohort(place, seed, count // 2, EDGE, fractions=(0.5, 0.2, 0.3))
    other = write_retina_cohort(
        place / "elsewhere", seed + 1, max(count // 8, 15), EDGE, OTHER_CAMERA, fractions=(0.0, 0.0, 1.0), name="other"
    )
    weights, note = labelled.weights, "Eyes are phantoms; the label is the grade."
    if weights is None:
        weights = pretrain_on(folder, manifest, seed, preset="laptop" if count >= 500 else "smoke")
        note = "Eyes are phantoms, the label is the grade, and the encoder was pre-trained on them without labels."
    data = LabelledData(manifest, group="seen", external=(f"elsewhere:other={other}",))
    made = dataclasses.replace(labelled, data=data, weights=weights, label=LabelConfig(kind="multiclass"))
    return dataclasses.replace(config, labelled=made), [note]


def pretrain_on(
    folder: RunFolder, manifest: Path, seed: int, *, preset: str = "smoke", what: str = "synthetic eyes"
) -> Path:
    """Pre-train a small masked autoencoder on the images of a manifest, and return its weights."""
    changes = {"data.manifest": manifest, "data.synthetic": 0, "train.seed": seed}
    place = "" if what == "synthetic eyes" else f"pretrain-{what}"
    nested = nested_run(
        folder, "retfound pretrain", changes, Log(folder.path, folder.options.quiet),
        f"Pre-training a small model on {what} first, without labels.", preset=preset, place=place,
    )  # fmt: skip
    return nested.outputs / "model"


def scans_with_synthetic(
    scans: ScansConfig, folder: RunFolder, *, is_classifier: bool = False
) -> tuple[ScansConfig, list[str]]:
    """Write phantom eyes where no images are given; where no weights are, make some on such eyes.

    Args:
        scans: Of the stage.
        folder: The run, begun here where anything is written.
        is_classifier: Whether the weights are adapted to the grade, and not only pre-trained.

    Returns:
        The images, and notes on them.
    """
    if not scans.needs_synthetic(ANY_KIND):
        return scans, []
    given, seed = scans.weights, scans.seed
    start(folder)
    manifest = write_retina_cohort(folder.path / "inputs", seed, scans.data.synthetic, EDGE, fractions=(0.5, 0.2, 0.3))
    if scans.is_synthetic:
        split = scans.data.split or ("test" if is_classifier else "")
        scans = dataclasses.replace(scans, data=dataclasses.replace(scans.data, manifest=manifest, split=split))
    if given is not None:
        return scans, []
    weights = pretrain_on(folder, manifest, seed)
    if is_classifier:
        changes = {"labelled.data.manifest": manifest, "labelled.weights": weights, "labelled.adapt.mode": "logistic"}
        changes |= {"labelled.label.kind": "multiclass", "labelled.data.synthetic": 0}
        nested = nested_run(
            folder, "retfound adapt", changes, Log(folder.path, folder.options.quiet),
            "Fitting a probe to the grade of the synthetic eyes.",
        )  # fmt: skip
        weights = nested.outputs / "model"
    note = "No weights were given: the model is a tiny one made for this run on phantom eyes, and means nothing."
    return dataclasses.replace(scans, weights=weights), [note]

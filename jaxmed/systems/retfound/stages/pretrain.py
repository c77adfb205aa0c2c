"""RETFound pretrain: train an encoder on retinal images without labels, by a masked autoencoder or by DINOv2."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmed.arrays.types import Params
from jaxmed.config import checked
from jaxmed.data.augment_pictures import MAE_CROP, CropAugment, DinoAugment
from jaxmed.data.inputs import PreparedField
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.data.scans import ANY_KIND
from jaxmed.errors import InputError
from jaxmed.io.images import read_image, write_png
from jaxmed.models.dino import DinoHeadConfig
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.published.dino import picture_preprocess
from jaxmed.models.published.load import Published, resize_positions
from jaxmed.models.vit import VIT_L16_2D, VitConfig, vit_encoder
from jaxmed.recipes.adapt_start import read_weights
from jaxmed.recipes.dino_loss import DinoConfig
from jaxmed.recipes.pretrain_dino import check_anchor, collapse_notes, plan_dino, pretrain_dino, released
from jaxmed.recipes.pretrain_mae import Reconstruction, plan_pretraining, pretrain
from jaxmed.recipes.pretrain_stage import (
    UnlabelledData,
    error_curves,
    find_unlabelled,
    load_initial_weights,
    model_record,
    prepared_source,
    pretrain_tiles,
    rate_curve,
    start_notes,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only
from jaxmed.recipes.training import TrainConfig, TrainData, TrainFlags
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Note, Section, Text
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.systems.retfound.adaptation import EDGE, FAMILIES, SMALL, SOURCE, TINY, PictureInput
from jaxmed.train.checkpoint import compare_arrays, describe, export_parameters
from jaxmed.train.log import read_metrics, series
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.train.workload import Workload

Method = Literal["mae", "dinov2"]
# Source: RETFound, Nature 2023, methods, as recalled (not read): 800 epochs, batch 1792, 15 of warm-up, rate 1e-3.
MAE_OPTIMIZER = OptimizerConfig(peak_lr=1e-3, b2=0.95, weight_decay=0.05)


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Pre-training on retinal images; defaults are RETFound's for its masked autoencoder, and DINOv2's.

    Attributes:
        data: Images listed in a table.
        input: An image, or a folder of images, instead of a table.
        weights: Published or own weights to start from, such as those of ImageNet; random where empty.
        method: "mae" fills in hidden patches; "dinov2" lets a student follow its own average over crops.
        picture: How pictures become the input.
        mae: The masked autoencoder; its dtype is set by --dtype.
        mae_crop: What happens to training images of a masked autoencoder.
        dino: Student, teacher and their loss.
        dino_optimizer: How the student is updated, in place of optimizer.
        dino_crops: What happens to images of DINOv2.
        anchor: Weights of an encoder whose similarity of patches the student keeps to (DINOv3's gram anchoring), such
            as an earlier run's; with --dino.gram-weight.
        train: Optimizer of the masked autoencoder, length, reading, devices and seed.
    """

    data: UnlabelledData = UnlabelledData()
    input: Path | None = None
    weights: Path | None = None
    method: Method = "mae"
    picture: PictureInput = PictureInput()
    mae: MaeConfig = MaeConfig(VIT_L16_2D, norm_target=True, sigmoid=False)
    mae_crop: CropAugment = MAE_CROP
    dino: DinoConfig = DinoConfig()
    dino_optimizer: OptimizerConfig = released()[1].optimizer
    dino_crops: DinoAugment = DinoAugment()
    anchor: Path | None = None
    train: TrainFlags = TrainConfig(
        MAE_OPTIMIZER, LoopConfig(log_every=10, save_every=500, evaluate_every=500),
        LoaderConfig(batch_size=1792, num_threads=8), epochs=800, warmup_epochs=15,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if len(self.mae.encoder.image_size) != 2:
            raise ValueError(f"mae.encoder.image_size: expected 2 axes, found {self.mae.encoder.image_size}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.synthetic > 0 and not self.data.is_given and self.input is None

    @property
    def preprocess(self) -> Preprocess:
        """From a file to the input."""
        return self.picture.apply(picture_preprocess(self.encoder.image_size))

    @property
    def encoder(self) -> VitConfig:
        """Sizes of what is trained."""
        return self.mae.encoder if self.method == "mae" else self.dino.encoder


def paper() -> Config:
    """ViT-L at 224, 800 epochs, batch 1792, bfloat16: for your images on accelerators."""
    config = Config()
    large = {"remat": True, "scan": True}
    return dataclasses.replace(
        config,
        mae=dataclasses.replace(config.mae, encoder=dataclasses.replace(config.mae.encoder, **large)),
        dino=dataclasses.replace(config.dino, encoder=dataclasses.replace(config.dino.encoder, **large)),
        train=dataclasses.replace(config.train, accumulation=4 if config.method == "mae" else 1, dtype="bfloat16"),
    )


def laptop() -> Config:
    """A small model at 64 pixels, in minutes: on your images, or on 1,000 phantom eyes."""
    return _small(SMALL, 1000, 24, 60, 512)


def smoke() -> Config:
    """A tiny model at 64 pixels, in seconds: on your images, or on a few phantom eyes."""
    return _small(TINY, 40, 8, 8, 64)


def _small(encoder: VitConfig, synthetic: int, batch: int, epochs: float, prototypes: int) -> Config:
    encoder = dataclasses.replace(encoder, drop_path_rate=0.0, positions="sincos")
    mae = MaeConfig(
        encoder, decoder_width=encoder.width // 2, decoder_depth=2, decoder_heads=encoder.heads,
        decoder_hidden=2 * encoder.width, norm_target=True, sigmoid=False,
    )  # fmt: skip
    head = DinoHeadConfig(prototypes, hidden=4 * encoder.width, bottleneck=encoder.width)
    dino = DinoConfig(
        dataclasses.replace(encoder, positions="learned", mask_token=True, layer_scale=1.0, drop_path_rate=0.1),
        head, local_size=(32, 32), local_crops=4, koleo_weight=0.01, freeze_epochs=0, reference_batch=0,
        teacher_temperature=(0.03, 0.03), teacher_momentum=0.996, final_weight_decay=0.1,
    )  # fmt: skip
    # With the released temperature, which rises to 0.07, a teacher that follows faster, or crops that lose their
    # colour and blur by pixels of a picture of 224, a short run ends where all prototypes are as likely.
    crops = DinoAugment(
        global_size=(EDGE, EDGE), local_size=(32, 32), num_locals=4, global_scale=(0.5, 1.0), local_scale=(0.2, 0.5),
        brightness=0.2, contrast=0.2, saturation=0.1, hue=0.03, grey=0.0, solarise=0.0, blur_sigma=(0.05, 0.6),
    )  # fmt: skip
    train = TrainConfig(
        dataclasses.replace(MAE_OPTIMIZER, peak_lr=2e-3),
        LoopConfig(log_every=10, save_every=200, evaluate_every=200),
        LoaderConfig(batch_size=batch, num_threads=2), MeshConfig(data=1), epochs=epochs, warmup_epochs=epochs / 10,
    )  # fmt: skip
    optimizer = dataclasses.replace(Config().dino_optimizer, peak_lr=1e-3, layer_decay=1.0)
    return Config(
        data=UnlabelledData(synthetic=synthetic), mae=mae, dino=dino, dino_optimizer=optimizer,
        mae_crop=CropAugment(size=(EDGE, EDGE), scale=(0.4, 1.0)), dino_crops=crops, train=train,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a pre-training ended with.

    Attributes:
        images: Trained on ("train") and held out ("validation").
        method: How.
        parameters: Of the encoder.
        errors: Of the first held-out images, and the variance of what was hidden; none for DINOv2.
        notes: What a user should know.
    """

    images: dict[str, int]
    method: str
    parameters: int
    errors: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check the images, train, export the model, write the report."""
    clock = Clock()
    train, encoder = config.train, dataclasses.replace(config.encoder, dtype=config.train.dtype)
    preprocess = config.preprocess
    first, origin = _find_start(config, encoder)
    anchor = _find_anchor(config, encoder)
    made = with_synthetic(config, folder)
    images = find_unlabelled(made.data, made.input, preprocess, train, kinds=ANY_KIND)
    notes = [*images.notes, *length_notes(train.loop, train.epochs), *start_notes(origin, preprocess)]
    log = begin(folder, notes, tensorboard=train.loop.tensorboard)
    counts = images.counts
    log.say(f"{counts['train']:,} images to train on, {counts['validation']:,} held out.")
    cache = config.data.cache or (folder.path / "inputs" / "prepared" if config.is_synthetic else None)
    source = prepared_source(images, preprocess, cache, log)
    rows = np.arange(len(images.scans))
    held_out = SubsetSource(source, rows[images.num_training :]) if counts["validation"] else None
    data = TrainData(SubsetSource(source, rows[: images.num_training]), held_out, PreparedField(preprocess))
    clock.lap("read and check")
    pictures: list[Reconstruction] = []
    if config.method == "mae":
        mae, crop = masked_setup(config, encoder, preprocess)
        params, pictures = pretrain(train, masked_model(mae), data, folder=folder, log=log, augment=crop, start=first)
        record = model_record("retfound", "mae", mae, params, preprocess, origin)
    else:
        recipe, dino, crops = dino_setup(config, encoder, preprocess)
        teacher, _ = pretrain_dino(recipe, dino, data, crops, folder=folder, log=log, start=first, anchor=anchor)
        collapsed = collapse_notes(read_metrics(folder.path), dino.head.prototypes)
        notes += collapsed
        for note in collapsed:
            log.say(note)
        params = {"encoder": teacher}
        family = "dinov3" if encoder.positions == "rope" else "dinov2"
        record = model_record(family, "encoder", encoder, params, preprocess, origin)
    clock.lap("train, compilation included")
    export_parameters(folder.outputs / "model", params, record)
    if jax.process_index() != 0:
        return
    write_pictures(folder.outputs, pictures, preprocess)
    summary = Summary(
        counts, config.method, sum(int(leaf.size) for leaf in jax.tree.leaves(params["encoder"])),
        tuple((float(picture.error), float(picture.variance)) for picture in pictures), tuple(notes),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run and the shapes of its arguments; nothing is read or drawn."""
    encoder = dataclasses.replace(config.encoder, dtype=config.train.dtype)
    preprocess = config.picture.apply(picture_preprocess(encoder.image_size))
    if config.method == "mae":
        mae, crop = masked_setup(config, encoder, preprocess)
        return plan_pretraining(config.train, masked_model(mae), mesh, crop)
    return plan_dino(*dino_setup(config, encoder, preprocess), (*preprocess.size, preprocess.channels), mesh)


def masked_setup(config: Config, encoder: VitConfig, preprocess: Preprocess) -> tuple[MaeConfig, CropAugment]:
    """Return the masked autoencoder around an encoder, and what happens to its training images."""
    colours = {"mean": preprocess.intensity.mean, "std": preprocess.intensity.std}
    crop = dataclasses.replace(config.mae_crop, size=encoder.image_size, **colours)
    return dataclasses.replace(config.mae, encoder=encoder), crop


def dino_setup(
    config: Config, encoder: VitConfig, preprocess: Preprocess
) -> tuple[TrainConfig, DinoConfig, DinoAugment]:
    """Return the run of DINOv2 on an encoder, its sizes, and its crops."""
    dino = dataclasses.replace(config.dino, encoder=encoder)
    crops = dataclasses.replace(
        config.dino_crops, global_size=encoder.image_size, local_size=dino.local_size, num_locals=dino.local_crops,
        mean=preprocess.intensity.mean, std=preprocess.intensity.std,
    )  # fmt: skip
    return dataclasses.replace(config.train, optimizer=config.dino_optimizer), dino, crops


def _find_start(config: Config, encoder: VitConfig) -> tuple[Params | None, Published | None]:
    """Read weights to start from: a whole masked autoencoder, or an encoder for student and teacher.

    Raises:
        InputError: They are no model of these sizes.
    """
    if config.weights is None:
        return None, None
    if config.method == "mae":
        mae = dataclasses.replace(config.mae, encoder=encoder)
        published = load_initial_weights(config.weights, "retfound", mae, masked_model(mae))
        return published.params, published
    given, published = _read_encoder(config.weights, encoder)
    return {"encoder": given}, published


def _find_anchor(config: Config, encoder: VitConfig) -> Params | None:
    """Read the encoder that the student keeps to, where there is one; what hides patches has no part in it.

    Raises:
        InputError: It is no whole encoder of these sizes, or nothing asks for it.
    """
    if config.method == "mae":
        if config.anchor is not None:
            raise InputError("anchor", "none, for --method mae", config.anchor, "leave it out")
        return None
    check_anchor(config.dino, config.anchor is not None)
    if config.anchor is None:
        return None
    given, _ = _read_encoder(config.anchor, encoder)
    wanted: Any = jax.eval_shape(vit_encoder(encoder).init, jax.random.key(0))
    if missing := set(wanted) - set(given) - {"mask_token"}:
        raise InputError(
            config.anchor, "a whole encoder", f"none of {', '.join(sorted(missing))}", "take other weights"
        )
    return {"mask_token": np.zeros(encoder.width, np.float32)} | given


def _read_encoder(path: Path, encoder: VitConfig) -> tuple[Params, Published]:
    """Read an encoder of these sizes, without what this one does not have.

    Raises:
        InputError: It is none.
    """
    published = resize_positions(read_weights(path, FAMILIES, 2), encoder.image_size)
    wanted: Any = jax.eval_shape(vit_encoder(encoder).init, jax.random.key(0))
    given = {name: value for name, value in published.params["encoder"].items() if name in wanted}
    compare_arrays(describe({name: wanted[name] for name in given}), describe(given), str(path))
    return given, published


def with_synthetic(config: Config, folder: RunFolder) -> Config:
    """Where no files are given, write phantom eyes, of which a fifth is held out and a fifth left to tests."""
    if not config.is_synthetic:
        return config
    place = folder.path / "inputs"
    written: list[Path] = []

    def write() -> None:
        start(folder)
        written.append(
            write_retina_cohort(place, config.train.seed, config.data.synthetic // 2, EDGE, fractions=(0.6, 0.2, 0.2))
        )

    first_only(write, "inputs")
    manifest = written[0] if written else place / "pictures.csv"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, manifest=manifest, synthetic=0))


def write_pictures(folder: Path, pictures: list[Reconstruction], preprocess: Preprocess) -> None:
    """Write held-out images, what was seen of them, and their completion, as PNG."""
    for number, picture in enumerate(pictures):
        for name in ("image", "seen", "completed"):
            write_png(folder / f"held_out_{number}_{name}.png", to_colours(getattr(picture, name), preprocess))


def to_colours(image: Float[np.ndarray, "row column 3"], preprocess: Preprocess) -> Float[np.ndarray, "row column 3"]:
    """Return a prepared image in [0, 1], to be looked at."""
    intensity = preprocess.intensity
    if not intensity.mean:
        low, high = image.min(), image.max()
        return (image - low) / max(float(high - low), 1e-6)
    return np.clip(image * np.array(intensity.std, np.float32) + np.array(intensity.mean, np.float32), 0, 1)


# The page ------------------------------------------------------------------------------------------------------------


def page(run: Finished[Config, Summary]) -> Page:
    """Show how the loss fell, and what the model completes."""
    summary, lines = run.summary, read_metrics(run.path)
    is_mae = summary.method == "mae"
    what = (
        "mean squared error of hidden pixels, normalised by patch" if is_mae else "of the student against its teacher"
    )
    notes = [Note(text, "warning") for text in summary.notes]
    blocks = [*notes, *(_mae_curves(lines) if is_mae else _dino_curves(lines))]
    name = "A masked autoencoder" if is_mae else "Self-distillation by DINOv2"
    return Page(
        "RETFound study: pre-training",
        f"{name}; an encoder of {summary.parameters:,} parameters, trained on {summary.images['train']:,} images "
        "without labels",
        pretrain_tiles(lines, summary.images, "images", what),
        [Section("Training", blocks), *_pictures_section(run.outputs, summary), _reading_section(is_mae)],
    )


def _mae_curves(lines: list[dict[str, float]]) -> list[Any]:
    caption = (
        "Mean squared error of hidden pixels, each patch normalised to mean 0 and variance 1, and that of the best "
        "constant: the variance."
    )
    return error_curves(lines, caption)


def _dino_curves(lines: list[dict[str, float]]) -> list[Any]:
    parts = {"all": series(lines, "loss")}
    parts |= {name: series(lines, name) for name in ("dino_local", "dino_global", "ibot", "koleo") if name in lines[-1]}
    shown = {name: found for name, found in parts.items() if len(found[0])}
    blocks: list[Any] = [curves(shown, xlabel="step", ylabel="loss", caption="The loss and its parts.")]
    entropies = {name.replace("_entropy", ""): series(lines, name) for name in ("teacher_entropy", "patch_entropy")}
    caption = (
        "Entropy of the teacher's targets for class tokens and for hidden patches, in nats. Where it rises to the "
        "logarithm of the number of prototypes and stays, the teacher says the same of everything."
    )
    blocks.append(curves(entropies, xlabel="step", ylabel="entropy", caption=caption))
    signs = {name: series(lines, f"evaluation/{name}") for name in ("spread", "matched")}
    signs = {name: found for name, found in signs.items() if len(found[0]) > 1}
    if signs:
        caption = (
            "Held-out images under the teacher. spread: root of the variance of class tokens of length 1, 0 where all "
            "are the same, which is collapse. matched: share of crops whose nearest other crop is of the same image."
        )
        blocks.append(curves(signs, xlabel="step", ylabel="share", caption=caption))
    return [*blocks, rate_curve(lines)]


def _pictures_section(outputs: Path, summary: Summary) -> list[Section]:
    panels = []
    for number, (error, variance) in enumerate(summary.errors):
        for name, title in (("image", "input"), ("seen", "seen"), ("completed", "completed")):
            image = read_image(outputs / f"held_out_{number}_{name}.png")
            told = f", explained {1 - error / variance:.0%}" if name == "completed" else ""
            panels.append(Panel(image, f"{title} {number + 1}{told}"))
    if not panels:
        return []
    caption = (
        "Held-out images, what the encoder sees of them (hidden patches grey), and hidden patches as predicted, each "
        "with the mean and deviation of the patch that it stands for."
    )
    alt = f"{len(panels) // 3} images, masked and completed."
    return [Section("What the model completes", [mask_panels(panels, columns=3, caption=caption, alt=alt)])]


def _reading_section(is_mae: bool) -> Section:
    text = (
        "Most patches are hidden from the encoder, and the decoder has to fill them in. The error is told on hidden "
        "patches only; a model that knows nothing predicts a constant, whose error is the variance."
        if is_mae
        else "A student sees crops with patches hidden and is to say of them what its teacher, its own moving average, "
        "says of the whole. The loss alone does not tell whether that is worth anything."
    )
    further = "What counts is whether the encoder's features help afterwards: jaxmed retfound adapt, and compare."
    return Section("How to read this", [Text([f"{text} {further}", SOURCE])])

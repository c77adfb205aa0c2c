"""TANGERINE pretrain: train a 3D masked autoencoder on chest CTs without labels."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float64

from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Epochs, Number, Seed, Share, Size, Whole, checked
from jaxmed.data.augment import draw_flips, flip
from jaxmed.data.cohort import split_unlabelled, subject_notes
from jaxmed.data.inputs import PreparedField, check_scans, input_source
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess, differences
from jaxmed.data.records import SubsetSource
from jaxmed.data.scans import VOLUMES, find_scans, read_manifest
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import make_table, resolve_paths
from jaxmed.models.mae import Mae, MaeConfig, masked_model
from jaxmed.models.published.load import (
    OWN_LICENCE,
    ImportReport,
    Published,
    load_published,
    published_record,
    resize_positions,
)
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.published.timm_vit import entries
from jaxmed.models.published.warm_start import read_warm_start
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.recipes.pretrain_mae import Reconstruction, pretrain
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.pretrain_page import write_page
from jaxmed.train.checkpoint import compare_arrays, export_parameters
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start, write_summary
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

# Axes of the cube where a volume comes without a place in the world: slices from foot to head, rows from front to back,
# columns from right to left, as axial slices are stored.
AXIAL = np.array([[0.0, 0.0, -1.0, 0.0], [0.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """Which volumes are trained on.

    Attributes:
        manifest: CSV with the column path (NIfTI in HU, a DICOM folder, or .npz with an array "volume" in [0, 1]);
            optionally subject and split (train, validation, test). Only train is trained on; validation tells the
            reconstruction error; test is left alone.
        validation: Share of subjects held out where there is no column split.
        check: Volumes read from end to end before training starts, evenly spread; of the others only the headers are.
            One that turns out broken later stops the run and is named.
        cache: Folder in which prepared volumes are kept (float16, 34 MB each at 256^3), so that later epochs and runs
            read them in place. Empty prepares them anew in every epoch.
        embedded: Generate this many phantom chests where no files are given.
    """

    manifest: Path | None = None
    validation: float = 0.05
    check: Whole = 64
    cache: Path | None = None
    embedded: Number = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected a share in [0, 1), found {self.validation:g}")
        if self.check < 0 or self.embedded < 0:
            raise ValueError(f"check, embedded: expected 0 or more, found {self.check, self.embedded}")


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Pre-training of TANGERINE; defaults are the released code's.

    Attributes:
        data: Volumes listed in a table.
        input: A file, a DICOM folder, or a folder of such, instead of a table.
        weights: Published or own weights of a masked autoencoder to start from; random where empty.
        warm_start: A published 2D transformer in timm's names (MAE, say) whose blocks training starts from: tensors of
            the same name and shape are taken, patches, positions and prediction are drawn.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity in HU of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are
            refused.
        preprocess: From a file to the model's input; its size is always that of the model's image.
        model: The masked autoencoder; its dtype is set by --dtype.
        optimizer: AdamW with a cosine.
        epochs: Passes over the training volumes; 0 leaves the length to loop.steps.
        warmup_epochs: Epochs over which the learning rate rises from 0.
        accumulation: Parts in which a batch is processed: the same numbers with less memory.
        flip_probability: Of a flip along rows, and along columns.
        loader: Batch size (over all devices) and reading.
        loop: Intervals of lines, saves and evaluations.
        mesh: The devices.
        dtype: Of the matrix products.
        seed: Of parameters, masks, augmentation and order.
    """

    data: DataConfig = DataConfig()
    input: Path | None = None
    weights: Path | None = None
    warm_start: Path | None = None
    series: str = ""
    fill: float | None = None
    preprocess: Preprocess = PREPROCESS
    model: MaeConfig = MaeConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.05)
    epochs: Epochs = 400
    warmup_epochs: Epochs = 20
    accumulation: Size = 1
    flip_probability: Share = 0.2
    loader: LoaderConfig = LoaderConfig(batch_size=8, num_threads=4)
    loop: LoopConfig = LoopConfig(log_every=10, save_every=500, evaluate_every=500)
    mesh: MeshConfig = MeshConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if len(self.model.encoder.image_size) != 3:
            raise ValueError(f"model.encoder.image_size: expected 3 axes, found {self.model.encoder.image_size}")
        # Files are prepared at the size of the model's image, and config.json says so.
        size = self.model.encoder.image_size
        object.__setattr__(self, "preprocess", dataclasses.replace(self.preprocess, size=size))
        if self.model.encoder.dtype not in ("float32", self.dtype):
            raise ValueError(f"model.encoder.dtype: expected to be left to --dtype, found {self.model.encoder.dtype}")
        if self.weights is not None and self.warm_start is not None:
            raise ValueError(f"warm_start: expected nothing beside weights, found {self.warm_start}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability: expected a probability, found {self.flip_probability:g}")
        if min(self.epochs, self.warmup_epochs) < 0:
            raise ValueError(f"epochs, warmup_epochs: expected 0 or more, found {self.epochs, self.warmup_epochs}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded > 0 and self.data.manifest is None and self.input is None


def small_model(edge: int, patch: int, width: int, depth: int) -> MaeConfig:
    """Return a masked autoencoder that a laptop can train."""
    encoder = VitConfig(
        (edge,) * 3, (patch,) * 3, width=width, depth=depth, heads=width // 32, hidden=4 * width, patch_gain=8.0
    )
    return MaeConfig(
        encoder, decoder_width=width // 2, decoder_depth=2, decoder_heads=width // 32, decoder_hidden=2 * width
    )


def paper() -> Config:
    """ViT-L at 256^3, 400 epochs, batch 224, bfloat16: for your scans on accelerators."""
    encoder = dataclasses.replace(VitConfig(), remat=True, scan=True)
    return Config(
        model=MaeConfig(encoder), loader=LoaderConfig(batch_size=224, num_threads=8), accumulation=4, dtype="bfloat16"
    )


def laptop() -> Config:
    """A small model at 32^3, in minutes: on your scans, or on 600 of 1,000 phantom chests."""
    return Config(
        data=DataConfig(embedded=1000),
        model=small_model(32, 8, 96, 3),
        optimizer=OptimizerConfig(peak_lr=2e-3, b2=0.95, weight_decay=0.05),
        epochs=130,
        warmup_epochs=13,
        loader=LoaderConfig(batch_size=16, num_threads=2),
        loop=LoopConfig(log_every=50, save_every=1000, evaluate_every=1000),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """A tiny model at 32^3, in seconds: on your scans, or on a few phantom chests."""
    return Config(
        data=DataConfig(embedded=16),
        model=small_model(32, 8, 64, 2),
        optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.95, weight_decay=0.05),
        epochs=40,
        warmup_epochs=2,
        loader=LoaderConfig(batch_size=4),
        loop=LoopConfig(log_every=5, save_every=50, evaluate_every=50),
        mesh=MeshConfig(data=1),
    )


class Volumes(NamedTuple):
    """The volumes of a run.

    Attributes:
        scans: Files, or folders of DICOM slices: those to train on first, then those held out.
        num_training: How many are trained on.
        notes: What is unexpected about them.
    """

    scans: tuple[ScanFiles, ...]
    num_training: int
    notes: list[str]


def run(config: Config, folder: RunFolder) -> None:
    """Read and check the volumes, train, export the model, write the report."""
    began = time.monotonic()
    settings, model, preprocess = resolve(config)
    check_fit(settings, masked_model(model).network)
    published = None if config.weights is None else read_start(config.weights, model)
    warm = None if config.warm_start is None else read_warm_start(config.warm_start, entries(model))
    given = warm or published
    if config.is_synthetic:
        volumes = make_embedded(config, folder, preprocess)
    else:
        volumes = find_volumes(config, preprocess)
        if is_first():
            start(folder)
        wait_for_first("folder")
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard, is_first())
    notes = [
        *volumes.notes,
        *length_notes(config.loop, config.epochs),
        *start_notes(published, preprocess),
        *([] if warm is None else [warm.note]),
    ]
    for note in notes:
        log.say(f"Note: {note}")
    counts = {"train": volumes.num_training, "validation": len(volumes.scans) - volumes.num_training}
    log.say(f"{counts['train']:,} volumes to train on, {counts['validation']:,} held out.")
    cache = config.data.cache or (folder.path / "inputs" / "volumes" if config.data.embedded else None)
    source = None
    if cache is not None:
        log.say(f"Preparing volumes in {cache}; those that are there already stay.")
        if is_first():
            source = input_source(volumes.scans, preprocess, cache)
        wait_for_first("cache")
    if source is None:  # opening a cache sums every file in it: the first process has done so
        source = input_source(volumes.scans, preprocess, cache)
    rows = np.arange(len(volumes.scans))
    held_out = SubsetSource(source, rows[volumes.num_training :]) if counts["validation"] else None

    def augment(key: KeyArray, image: Float[Array, "..."]) -> Float[Array, "..."]:
        return flip(image, draw_flips(key, 3, (1, 2), config.flip_probability))

    ready = time.monotonic()
    data = TrainData(SubsetSource(source, rows[: volumes.num_training]), held_out, PreparedField(preprocess))
    params, pictures = pretrain(
        settings, masked_model(model), data,
        folder=folder, log=log, augment=augment, start=None if given is None else given.params,
    )  # fmt: skip
    trained = time.monotonic()
    export_parameters(folder.outputs / "model", params, model_record(model, params, preprocess, published))
    if not is_first():
        return
    write_pictures(folder.outputs, pictures, volumes.scans[volumes.num_training :], preprocess)
    summary = {
        "volumes": counts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "window": [*preprocess.intensity.window],
        "errors": [{"error": picture.error, "variance": picture.variance} for picture in pictures],
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine pretrain --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "train, compilation included": trained - ready},
    }
    write_summary(folder, summary)
    write_page(folder.path)


report = write_page


def resolve(config: Config) -> tuple[TrainConfig, MaeConfig, Preprocess]:
    """Return the settings of the recipe, the model, and the preprocessing at the size of its image."""
    encoder = dataclasses.replace(config.model.encoder, dtype=config.dtype)
    model = dataclasses.replace(config.model, encoder=encoder)
    x, y, z = encoder.image_size
    settings = TrainConfig(
        config.optimizer, config.loop, config.loader, config.mesh, config.epochs, config.warmup_epochs,
        config.accumulation, dtype=config.dtype, seed=config.seed,
    )  # fmt: skip
    return settings, model, dataclasses.replace(config.preprocess, size=(x, y, z))


def make_embedded(config: Config, folder: RunFolder, preprocess: Preprocess) -> Volumes:
    """Write phantom chests, half of them with fluid behind a lung and a third with each other finding.

    Of them a fifth is held out, and a fifth is left to tests of what grows on the model.
    """
    place = folder.path / "inputs"
    if is_first():
        start(folder)
        write_chest_cohort(
            place, config.seed, config.data.embedded, preprocess.volume_size, ChestConfig(severity=(0.5, 1.0)),
            finding="effusion", distractors=1 / 3,
        )  # fmt: skip
    wait_for_first("inputs")
    return find_volumes(dataclasses.replace(config, data=DataConfig(manifest=place / "scans.csv")), preprocess)


def find_volumes(config: Config, preprocess: Preprocess) -> Volumes:
    """List the volumes of a run, and look at them.

    Raises:
        InputError: There are none, some are missing or broken, or none is to be trained on.
    """
    manifest, place = config.data.manifest, config.input
    if (manifest is None) == (place is None):
        found = "neither" if place is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    if manifest is not None:
        table = read_manifest(manifest)
        scans, passed = [ScanFiles(path, config.series, fill=config.fill) for path in resolve_paths(table)], ()
    else:
        assert place is not None
        scans, passed = find_scans(place, VOLUMES, config.series, config.fill)
        # Series of one study show one person.
        rows = [{"path": str(scan.path), "subject": scan.study} for scan in scans]
        table = make_table(place, ("path", "subject"), rows)
    splits = np.array(split_unlabelled(table, config.data.validation, config.seed))
    if "train" not in splits:
        raise InputError(table.path, "rows with split 'train'", f"only {', '.join(sorted(set(splits)))}")
    training, held_out = ([scans[row] for row in np.flatnonzero(splits == name)] for name in ("train", "validation"))
    chosen = (*training, *held_out)
    notes = [*passed]
    notes += [] if manifest is None or "subject" not in table.columns else subject_notes(table)
    notes += check_scans(chosen, preprocess, config.data.check, config.loader.num_threads)
    return Volumes(chosen, len(training), notes)


def read_start(path: Path, model: MaeConfig) -> Published:
    """Read weights to start from, positions resized to the model's grid.

    Raises:
        InputError: They are no masked autoencoder of these sizes.
    """
    published = load_published(path, "tangerine")
    if not isinstance(published.config, MaeConfig) or "decoder" not in published.params:
        advice = "leave --weights out to start from random ones"
        raise InputError(path, "a masked autoencoder with its decoder", "an encoder without it", advice)
    published = resize_positions(published, model.encoder.image_size)
    image = jax.ShapeDtypeStruct((1, *model.encoder.image_size, model.encoder.channels), np.float32)
    noise = jax.ShapeDtypeStruct((1, model.encoder.num_tokens), np.float32)
    expected = jax.eval_shape(make_model(Mae(model)).init, jax.random.key(0), image, noise)
    compare_arrays(_shapes(expected), _shapes(published.params), str(path))
    for name in ("sigmoid", "norm_target"):
        if getattr(published.config, name) != getattr(model, name):
            found = f"{name} {getattr(published.config, name)}"
            raise InputError(path, f"weights trained with {name} {getattr(model, name)}", found, f"set --model.{name}")
    return published


def start_notes(published: Published | None, preprocess: Preprocess) -> list[str]:
    """Say whose weights training starts from, and how their input differed."""
    if published is None:
        return []
    report = published.report
    notes = [f"Starting from weights of {report.family}. Licence: {report.licence}.", *report.remarks]
    differing = [f"{name} {a}, here {b}" for name, (a, b) in differences(published.preprocess, preprocess).items()]
    return notes + [f"The weights to start from were trained with other input: {'; '.join(differing)}."] * bool(
        differing
    )


def model_record(model: MaeConfig, params: Params, preprocess: Preprocess, origin: Published | None) -> dict[str, Any]:
    """Return what `load_published` has to know about exported parameters; a licence is handed on."""
    licence = OWN_LICENCE if origin is None else origin.report.licence
    report = ImportReport("tangerine", "mae", (), (), (), licence)
    return published_record(Published(make_model(Mae(model)), params, preprocess, model, report))


def write_pictures(
    folder: Path, pictures: list[Reconstruction], scans: tuple[ScanFiles, ...], preprocess: Preprocess
) -> None:
    """Write held-out volumes and their completion on the model's grid, in the scan's world, with sidecars."""
    kinds = {
        "image": "the model's input",
        "seen": "the input with hidden patches 0",
        "completed": "the input with hidden patches as predicted",
    }
    for number, (picture, scan) in enumerate(zip(pictures, scans, strict=False)):
        affine = find_affine(scan, preprocess)
        for name, definition in kinds.items():
            stem = f"held_out_{number}_{name}"
            nifti.write(folder / f"{stem}.nii.gz", Volume.make(getattr(picture, name)[..., 0], affine))
            sidecar = {
                "definition": definition,
                "unit": "1",
                "constants": dict(zip(("HU that is 0", "HU that is 1"), preprocess.intensity.window, strict=True)),
                "source": str(scan.path),
                "axes": "slice, row, column of the model; the affine leads to the scan's world",
                "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
            }
            write_json(folder / f"{stem}.json", sidecar)


def find_affine(scan: ScanFiles, preprocess: Preprocess) -> Float64[np.ndarray, "4 4"]:
    """Return where the voxels of a scan's cube stand."""
    grid = preprocess.prepare(scan).grid
    return AXIAL if grid is None else preprocess.input_grid(grid).affine


def is_first() -> bool:
    """Tell whether this is the one process of several that writes."""
    return jax.process_index() == 0


def wait_for_first(what: str) -> None:
    """Wait until the first process, and every other, has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _shapes(tree: Any) -> dict[str, Any]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}

"""TANGERINE pretrain: train a 3D masked autoencoder on chest CTs without labels."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.position import resize_table
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import to_record
from jaxmed.data.augment import draw_flips, flip
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import SubsetSource
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.tables import Table, resolve_paths
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.published.load import load_published
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.recipes.pretrain_mae import PretrainConfig, Reconstruction, pretrain
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.pretrain_page import write_page
from jaxmed.systems.tangerine.records import Prepared, find_volumes, read_manifest, split_unlabelled, volume_source
from jaxmed.train.checkpoint import compare_arrays, export_parameters
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which volumes are trained on.

    Attributes:
        manifest: CSV with the column path (NIfTI in HU, or .npz with an array "volume" in [0, 1]); optionally subject
            and split (train, validation, test). Only train is trained on; validation tells the reconstruction error.
        validation: Share of subjects held out where the manifest has no column split.
        cache: Folder in which prepared volumes are kept (float16, 34 MB each at 256^3), so that later epochs and runs
            read them in place. Empty prepares them anew in every epoch.
        embedded: Generate this many phantom chests instead of reading files.
    """

    manifest: Path | None = None
    validation: float = 0.05
    cache: Path | None = None
    embedded: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected a share in [0, 1), found {self.validation:g}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Pre-training of TANGERINE; defaults are the released code's.

    Attributes:
        data: Volumes listed in a table.
        input: A folder of volumes instead of a table.
        weights: Published or own weights to start from; random where empty.
        preprocess: From a file to the model's input; its size is always the model's.
        model: The masked autoencoder.
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
    preprocess: Preprocess = Preprocess()
    model: MaeConfig = MaeConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.05)
    epochs: float = 400
    warmup_epochs: float = 20
    accumulation: int = 1
    flip_probability: float = 0.2
    loader: LoaderConfig = LoaderConfig(batch_size=8, num_threads=4)
    loop: LoopConfig = LoopConfig(log_every=10, save_every=500, evaluate_every=500)
    mesh: MeshConfig = MeshConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.model.encoder.image_size) != 3:
            raise ValueError(f"model.encoder.image_size: expected 3 axes, found {self.model.encoder.image_size}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability: expected a probability, found {self.flip_probability:g}")


def small_model(edge: int, patch: int, width: int, depth: int) -> MaeConfig:
    """Return a masked autoencoder that a laptop can train."""
    encoder = VitConfig((edge,) * 3, (patch,) * 3, width=width, depth=depth, heads=width // 32, hidden=4 * width)
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
    """A small model on 160 embedded chests of 64^3, in minutes."""
    return Config(
        data=DataConfig(embedded=160),
        model=small_model(64, 8, 192, 4),
        optimizer=OptimizerConfig(peak_lr=1e-3, b2=0.95, weight_decay=0.05),
        epochs=20,
        warmup_epochs=2,
        loader=LoaderConfig(batch_size=16),
        loop=LoopConfig(log_every=5, save_every=100, evaluate_every=50),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """A tiny model on a few embedded chests, in seconds."""
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


def run(config: Config, folder: RunFolder) -> None:
    """Read and check the volumes, train, export the model, write the report."""
    began = time.monotonic()
    model = dataclasses.replace(config.model, encoder=dataclasses.replace(config.model.encoder, dtype=config.dtype))
    x, y, z = model.encoder.image_size
    preprocess = dataclasses.replace(config.preprocess, size=(x, y, z))
    weights = None if config.weights is None else read_start(config.weights, model)
    if config.data.embedded:
        if config.data.manifest or config.input:
            raise InputError("data.embedded", "no files beside embedded data", "both", "drop --preset, or the files")
        start(folder)
        manifest = write_chest_cohort(folder.path / "inputs", config.seed, config.data.embedded, (x, y, z))
        paths, splits = read_paths(dataclasses.replace(config, data=DataConfig(manifest=manifest)))
    else:
        paths, splits = read_paths(config)
        start(folder)
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard, jax.process_index() == 0)
    source = volume_source(paths, preprocess, config.data.cache)
    rows = {name: np.flatnonzero(np.array(splits) == name) for name in ("train", "validation")}
    for path in (paths[index] for index in rows["train"][:1]):
        notes = orientation_notes(path, preprocess)
    for note in notes:
        log.say(f"Note: {note}")
    held_out = SubsetSource(source, rows["validation"]) if len(rows["validation"]) else None
    log.say(f"{len(rows['train']):,} volumes to train on, {len(rows['validation']):,} held out.")
    settings = PretrainConfig(
        model, config.optimizer, config.loop, config.loader, config.mesh, config.epochs, config.warmup_epochs,
        config.accumulation, config.seed,
    )  # fmt: skip

    def augment(key: KeyArray, image: Float[Array, "..."]) -> Float[Array, "..."]:
        return flip(image, draw_flips(key, 3, (1, 2), config.flip_probability))

    ready = time.monotonic()
    params, pictures = pretrain(
        settings, SubsetSource(source, rows["train"]), held_out, Prepared(preprocess),
        folder=folder, log=log, augment=augment, start=weights,
    )  # fmt: skip
    trained = time.monotonic()
    record = {"family": "tangerine", "kind": "mae", "config": to_record(model), "preprocess": to_record(preprocess)}
    export_parameters(folder.outputs / "model", params, record)
    write_pictures(folder.outputs, pictures)
    summary = {
        "volumes": {name: len(index) for name, index in rows.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "errors": [{"error": picture.error, "variance": picture.variance} for picture in pictures],
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine pretrain --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "train, compilation included": trained - ready},
    }
    write_json(folder.outputs / "summary.json", summary)
    write_page(folder.path)


report = write_page


def read_paths(config: Config) -> tuple[tuple[Path, ...], list[str]]:
    """Return the volumes of a run and the split of each.

    Raises:
        InputError: When there are none, some are missing, or no split is to be trained on.
    """
    if (config.data.manifest is None) == (config.input is None):
        found = "neither" if config.input is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    if config.input is not None:
        paths = find_volumes(config.input)
        table = Table(config.input, ("path",), tuple({"path": str(path)} for path in paths), tuple(range(len(paths))))
    else:
        assert config.data.manifest is not None
        table = read_manifest(config.data.manifest)
        paths = tuple(resolve_paths(table))
    splits = split_unlabelled(table, config.data.validation, config.seed)
    if "train" not in splits:
        raise InputError(table.path, "rows with split 'train'", f"only {', '.join(sorted(set(splits)))}")
    return paths, splits


def orientation_notes(path: Path, preprocess: Preprocess) -> list[str]:
    """Say what is unexpected about the axes of a NIfTI file."""
    if not path.name.lower().endswith(nifti.SUFFIXES):
        return []
    return [f"{path.name}: {note}" for note in preprocess.check_orientation(nifti.read(path))]


def read_start(path: Path, model: MaeConfig) -> Params:
    """Read weights to start from, positions resized to the model's grid.

    Raises:
        InputError: When they are no masked autoencoder of these sizes.
    """
    published = load_published(path)
    if "decoder" not in published.params:
        raise InputError(path, "a masked autoencoder with its decoder", "an encoder with a head")
    params: Any = jax.tree.map(lambda leaf: leaf, published.params)
    old, new = published.config.encoder.grid, model.encoder.grid
    for part in ("encoder", "decoder"):
        params[part]["position"] = resize_table(params[part]["position"], old, new)
    image = jax.ShapeDtypeStruct((1, *model.encoder.image_size, model.encoder.channels), np.float32)
    noise = jax.ShapeDtypeStruct((1, model.encoder.num_tokens), np.float32)
    expected = jax.eval_shape(make_model(Mae(model)).init, jax.random.key(0), image, noise)
    compare_arrays(_shapes(expected), _shapes(params), str(path))
    return params


def _shapes(tree: Any) -> dict[str, Any]:
    from jaxmed.arrays.trees import named_leaves

    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}


def write_pictures(folder: Path, pictures: list[Reconstruction]) -> None:
    """Write held-out volumes and their completion on the model's grid, as NIfTI with sidecars."""
    kinds = {
        "image": "the model's input: HU from -1200 to 800 as 0 to 1",
        "seen": "the input with hidden patches 0",
        "completed": "the input with hidden patches as predicted",
    }
    for number, picture in enumerate(pictures):
        for name, definition in kinds.items():
            array = getattr(picture, name)[..., 0]
            stem = folder / f"held_out_{number}_{name}"
            nifti.write(stem.with_suffix(".nii.gz"), Volume.make(array, np.eye(4)))
            sidecar = {"definition": definition, "unit": "1", "frame": "the model's own axes (slice, row, column)"}
            write_json(stem.with_suffix(".json"), sidecar)

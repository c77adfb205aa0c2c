"""Train a U-Net of images on scans and label maps: from files to outputs/model, and the parts of its page.

A stage says what the network learns, by a loss and by what becomes of an image (`make_prepare`); all else is here. What
is written is read again by `models.published.load_published`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float32

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Share, checked, to_record
from jaxmed.data.images import MAX_INTENSITY, PREPROCESS, Cut, ImageData, list_files, read_images
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.models.published import guided_diffusion
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_guided import CI_PRIOR, GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.recipes.denoiser import NetworkLoss, Prepare, train_denoiser
from jaxmed.recipes.stage import Clock, Page, begin, first_only
from jaxmed.recipes.training import NO_PREFIX, TrainConfig, TrainData, check_fit
from jaxmed.report.figures import MapStyle, curves, slice_maps
from jaxmed.report.page import Block, Figure, Section, Table, Text, Tile
from jaxmed.synthesis.label_images import ImageMaker, SyntheticConfig
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume

STYLE = MapStyle(colormap="gray", limits=(0.0, MAX_INTENSITY))
Counts: TypeAlias = dict[str, dict[str, int]]
"""Scans, label maps and images of each split."""


@dataclasses.dataclass(frozen=True)
@checked
class ImageNetworkConfig:
    """A network of brain images, and what it is trained on.

    Attributes:
        data: Scans and label maps.
        input: A scan, or a folder of scans, instead of a table.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: Published or own weights to start from; random where empty.
        preprocess: How scans become images; its size decides between slices and patches of volumes.
        synthetic: How contrasts are drawn from label maps.
        model: The network; its dtype is set by --dtype.
        flip_probability: Probability of an exchange of left and right.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
    """

    data: ImageData = ImageData()
    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    preprocess: Preprocess = PREPROCESS
    synthetic: SyntheticConfig = SyntheticConfig()
    model: GuidedUnetConfig = GuidedUnetConfig()
    flip_probability: Share = 0.5
    fill: float | None = None

    def __post_init__(self) -> None:
        if self.model.learn_sigma or self.model.channels != 1 or self.model.outputs != 1:
            found = f"{self.model.channels}, {self.model.outputs} and {self.model.learn_sigma}"
            raise ValueError(f"model.channels, outputs, learn_sigma: expected 1, 1 and false, found {found}")
        if self.model.dtype != "float32":
            raise ValueError(f"model.dtype: expected to be left to --dtype, found {self.model.dtype}")


# The type of a stage's field `network`: on the command line its options carry no prefix (--input, --model.width).
NetworkFlags: TypeAlias = Annotated[ImageNetworkConfig, NO_PREFIX]


LAPTOP = ImageNetworkConfig(
    ImageData(supersample=3), preprocess=dataclasses.replace(PREPROCESS, size=(64, 64), spacing=(3.0,)), model=CI_PRIOR
)
"""1.2 M parameters on slices of 64 x 64 voxels of 3 mm."""
SMOKE = ImageNetworkConfig(
    ImageData(synthetic=40),
    preprocess=dataclasses.replace(PREPROCESS, size=(32, 32)),
    model=GuidedUnetConfig(width=16, multipliers=(1, 2), blocks=1, attention_factors=(), heads=2, groups=8),
)
"""A tiny network at 32 x 32, on phantom brains where no files are given."""
SMOKE_TRAINING = TrainConfig(
    OptimizerConfig(peak_lr=2e-3, warmup_steps=10, weight_decay=0.0),
    LoopConfig(steps=150, log_every=10, save_every=150),
    LoaderConfig(batch_size=8),
    MeshConfig(data=1),
    ema_decay=0.98,
)


class Trained(NamedTuple):
    """A network that was trained, on what, and how a record becomes an example, on the device."""

    network: Network
    params: Params
    data: TrainData
    counts: Counts
    prepare: Prepare

    @property
    def size(self) -> int:
        """Number of the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def examples(self, key: KeyArray, count: int, *, held_out: bool) -> dict[str, Array]:
        """Return examples as the network sees them, evenly over the records; held-out ones where any were."""
        training, others, cut = self.data
        source = others if held_out and others is not None else training
        places = np.linspace(0, len(source) - 1, count).round().astype(int)
        records = [cut(source[int(place)], np.random.default_rng(n)) for n, place in enumerate(places)]
        fields = {name: np.stack([record[name] for record in records]) for name in records[0]}
        return dict(jax.jit(jax.vmap(self.prepare))(jax.random.split(key, count), fields))


def train_network(
    config: ImageNetworkConfig,
    train: TrainConfig,
    loss: NetworkLoss,
    make_prepare: Callable[[ImageMaker], Prepare],
    folder: RunFolder,
    clock: Clock,
    **further: Any,
) -> Trained:
    """Check the settings, read and cut the scans, train, or go on, and write outputs/model.

    Args:
        config: The network and its images.
        train: How it is trained.
        loss: What is to be small.
        make_prepare: From the maker of images to that of examples.
        folder: Of the run.
        clock: Gets the laps of reading and training.
        **further: What else the record of the network says.

    Raises:
        InputError: For whatever is wrong with a setting, a table or a file.
    """
    network = guided_unet(dataclasses.replace(config.model, dtype=train.dtype), config.preprocess.size)
    check_fit(train, network)
    initial, origin = load_initial_weights(config.weights, config.model)
    # Files are read before anything is written.
    data, place = write_phantoms(config, folder, train.seed)
    listed = list_files(data, place, train.seed, config.series, config.fill)
    training, held_out = (
        read_images(listed, split, data, config.preprocess, train.loader.num_threads)
        for split in ("train", "validation")
    )
    assert training is not None
    log = begin(folder, (*origin.get("notes", ()), *listed.notes), tensorboard=train.loop.tensorboard)
    counts: Counts = {}
    for split, source, words in (("train", training, "to train on"), ("validation", held_out, "held out")):
        scans, labels = (listed.count(split, kind) for kind in ("image", "labels"))
        counts[split] = {"scans": scans, "labels": labels, "images": 0 if source is None else len(source)}
        log.say(f"{counts[split]['images']:,} images {words}, of {scans} scans and {labels} label maps.")
    clock.lap("read and cut")
    # Left and right are x, which sagittal slices do not have.
    axis = None if config.preprocess.slice_axis == 0 else 0
    has_labels = any(source is not None and source.has_labels for source in (training, held_out))
    maker = ImageMaker(config.synthetic if has_labels else None, data.supersample, axis, config.flip_probability)
    prepare = make_prepare(maker)
    records = TrainData(training, held_out, Cut(config.preprocess.size, data.supersample))
    params = train_denoiser(train, network, loss, records, prepare, folder=folder, log=log, start=initial)
    clock.lap("train, compilation included")
    write_network(folder.outputs / "model", params, config.model, config.preprocess, **further, **origin)
    return Trained(network, params, records, counts, prepare)


def write_phantoms(config: ImageNetworkConfig, folder: RunFolder, seed: int) -> tuple[ImageData, Path | None]:
    """Write phantom brains where they are asked for and no files are given; return what is then to be read."""
    data, place = config.data, config.input
    if not data.synthetic or data.manifest or data.labels or place:
        return data, place
    target, size = folder.path / "inputs", config.preprocess.size
    # Real heads fill their field of view; so that the scale is the same, phantoms have no lesions here.
    brain = BrainConfig(lesion_probability=0.0)

    def write() -> None:
        start(folder)
        write_brain_cohort(target, seed, data.synthetic, size, brain, fractions=(0.8, 0.2, 0.0))

    first_only(write, "inputs")
    return dataclasses.replace(data, manifest=target / "scans.csv"), None


def load_initial_weights(path: Path | None, config: GuidedUnetConfig) -> tuple[Params | None, dict[str, Any]]:
    """Read parameters to start from, and where they come from for the record of what is made of them.

    Returns:
        Parameters and {"licence": ..., "notes": [...]}, notes where there are any; None and nothing without a path.

    Raises:
        InputError: They are of another network.
    """
    if path is None:
        return None, {}
    published = load_published(path)
    found, report = published.config, published.report
    if not isinstance(found, GuidedUnetConfig):
        raise InputError(path, "weights of a U-Net", f"a {report.kind}", "leave --weights out")
    # How a network is run does not count, nor what only training asks.
    same = dataclasses.replace(
        found, dtype=config.dtype, remat=config.remat, attention=config.attention, dropout=config.dropout
    )
    names = [f.name for f in dataclasses.fields(config) if getattr(same, f.name) != getattr(config, f.name)]
    if names:
        expected = f"a network with {names[0]} {getattr(config, names[0])}"
        raise InputError(path, expected, f"{getattr(same, names[0])}", f"set --model.{names[0].replace('_', '-')}")
    return published.params, {"licence": report.licence} | ({"notes": [*report.remarks]} if report.remarks else {})


def write_network(
    folder: Path, params: Params, config: GuidedUnetConfig, preprocess: Preprocess, **further: Any
) -> None:
    """Write a network for other stages and for `load_published`; `further` stands in its record too."""
    kind = "denoiser" if config.with_time else "enhancer"
    record = {"family": guided_diffusion.NAME, "kind": kind, "config": to_record(config)}
    export_parameters(folder, params, record | {"preprocess": to_record(preprocess)} | further)


def write_images(folder: Path, name: str, images: Float32[np.ndarray, "image ..."], definition: str) -> None:
    """Write images as one NIfTI (slices side by side along z, volumes one file each) with a sidecar."""
    is_sliced = images.ndim == 3
    stacks = {name: np.moveaxis(images, 0, 2)} if is_sliced else {f"{name}_{i}": v for i, v in enumerate(images)}
    axes = "x, y and number of the image" if is_sliced else "x, y, z in RAS+ order"
    constants = {"background": 0, "range": [0, MAX_INTENSITY]}
    for stem, array in stacks.items():
        volume = Volume.make(np.asarray(array, np.float32), np.eye(4))
        write_map(folder, stem, volume, definition, "1", constants, axes=axes)


# The page -----------------------------------------------------------------------------------------------------------


def training_page(
    title: str,
    subtitle: str,
    counts: Counts,
    lines: list[dict[str, float]],
    plots: Sequence[tuple[Mapping[str, str], str, str]],
    tiles: Sequence[Tile],
    shown: Section,
    reading: Sequence[str],
) -> Page:
    """Show how a network was trained, on what, and what it makes of images.

    Args:
        title: System and network.
        subtitle: What was trained.
        counts: Of `Trained`.
        lines: Of metrics.jsonl.
        plots: Names of series by their labels, their unit and a caption.
        tiles: The numbers to read after steps and images.
        shown: What the network makes of images.
        reading: How to read all this.
    """
    train = counts["train"]
    length = ("Steps", int(last_of(lines, "step")), f"{last_of(lines, 'steps_per_second'):.2g} per second")
    images = ("Images", train["images"], f"{train['scans']} scans, {train['labels']} label maps")
    blocks: list[Block] = []
    for names, ylabel, caption in plots:
        found = {}
        for label, name in names.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if len(points) > 1 or (points and not found):
                found[label] = tuple(np.array(column) for column in zip(*points, strict=True))
        blocks.append(curves(found, xlabel="step", ylabel=ylabel, log=True, caption=caption))
    rows = [(split, *counts[split].values()) for split in ("train", "validation")]
    blocks.append(Table(("", "Scans", "Label maps", "Images"), rows, "What was read; whole subjects are held out."))
    sections = [Section("Training", blocks), shown, Section("How to read this", [Text(reading)])]
    return Page(title, subtitle, [length, images, *tiles], sections)


def image_figure(outputs: Path, shown: Mapping[str, str], caption: str) -> Figure:
    """Draw what `write_images` wrote, names by label: slices side by side; of a single name up to four volumes."""
    maps: dict[str, np.ndarray] = {}
    for label, name in shown.items():
        paths = [outputs / f"{stem}.nii.gz" for stem in (name, *(f"{name}_{number}" for number in range(4)))]
        arrays = [nifti.read(path).array for path in paths if path.exists()]
        if len(shown) > 1 or len(arrays) == 1:
            maps[label] = arrays[0]
        else:
            maps |= {f"{label} {number + 1}": array for number, array in enumerate(arrays)}
    slices = next(iter(maps.values())).shape[2] if len(maps) == 1 else 6
    spacing = (1.0, 1.0, 1.0)
    return slice_maps(maps, spacing, caption=caption, styles=dict.fromkeys(maps, STYLE), num_slices=slices)


def last_of(lines: list[dict[str, float]], *names: str) -> float:
    """Return the last value of the first metric there is."""
    return next(line[name] for name in names for line in reversed(lines) if name in line)

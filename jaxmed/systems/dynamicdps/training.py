"""What both training stages share: the images of a run, its network from start to outputs/model, parts of the page."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float32

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Share, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_guided import GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.recipes.denoiser import NetworkLoss, Prepare, train_denoiser
from jaxmed.recipes.stage import Clock, begin, first_only
from jaxmed.recipes.training import NO_PREFIX, TrainConfig, TrainData, check_fit
from jaxmed.report.figures import MapStyle, curves
from jaxmed.report.page import Figure, Table, Tile
from jaxmed.synthesis.label_images import SyntheticConfig
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.networks import PREPROCESS, write_network
from jaxmed.systems.dynamicdps.records import Cut, DataConfig, ImageMaker, ImageSource, list_files, read_images
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

STYLE = MapStyle(colormap="gray", limits=(0.0, 2.0))
ONE_MM = (1.0, 1.0, 1.0)
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

    data: DataConfig = DataConfig()
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


class Images(NamedTuple):
    """What a run is trained on.

    Attributes:
        training: Images in memory.
        held_out: Those of other subjects; None for none.
        counts: Scans, label maps and images of each split.
        notes: What a user should know about the files.
    """

    training: ImageSource
    held_out: ImageSource | None
    counts: Counts
    notes: tuple[str, ...]


class Trained(NamedTuple):
    """A network that was trained.

    Attributes:
        network: The network.
        params: Its parameters.
        images: What it was trained on.
        prepare: From a record to an example, on the device.
        cut: From a stored record to one of the network's size, on the host.
    """

    network: Network
    params: Params
    images: Images
    prepare: Prepare
    cut: Cut

    def examples(self, key: KeyArray, count: int, *, held_out: bool) -> dict[str, Array]:
        """Return examples as the network sees them, evenly spread over the records.

        Args:
            key: Consumed.
            count: How many.
            held_out: Whether they are of those that were held out, where any were.
        """
        source = self.images.held_out if held_out and self.images.held_out is not None else self.images.training
        places = np.linspace(0, len(source) - 1, count).round().astype(int)
        records = [self.cut(source[int(place)], np.random.default_rng(n)) for n, place in enumerate(places)]
        fields = {name: np.stack([record[name] for record in records]) for name in records[0]}
        keys = jax.random.split(key, count)
        return dict(jax.jit(jax.vmap(self.prepare))(keys, fields))


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
        train: The run.
        loss: What is to be small.
        make_prepare: From the maker of images to that of examples.
        folder: The run's.
        clock: The run's clock.
        **further: What else the record of the network says.

    Raises:
        InputError: For whatever is wrong with a setting, a table or a file.
    """
    network = guided_unet(dataclasses.replace(config.model, dtype=train.dtype), config.preprocess.size)
    check_fit(train, network)
    initial, origin = load_initial_weights(config.weights, config.model)
    images = read_training_images(config, folder, train.seed, train.loader.num_threads)
    log = begin(folder, (*origin.get("notes", ()), *images.notes), tensorboard=train.loop.tensorboard)
    for split, words in (("train", "to train on"), ("validation", "held out")):
        counts = images.counts[split]
        log.say(f"{counts['images']:,} images {words}, of {counts['scans']} scans and {counts['labels']} label maps.")
    clock.lap("read and cut")
    # Left and right are x, which sagittal slices do not have.
    axis = None if config.preprocess.slice_axis == 0 else 0
    has_labels = any(source is not None and source.has_labels for source in (images.training, images.held_out))
    maker = ImageMaker(config.synthetic if has_labels else None, config.data.supersample, axis, config.flip_probability)
    prepare, cut = make_prepare(maker), Cut(config.preprocess.size, config.data.supersample)
    params = train_denoiser(
        train, network, loss, TrainData(images.training, images.held_out, cut), prepare, folder=folder, log=log,
        start=initial,
    )  # fmt: skip
    clock.lap("train, compilation included")
    write_network(folder.outputs / "model", params, config.model, config.preprocess, **further, **origin)
    return Trained(network, params, images, prepare, cut)


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
    found = published.config
    if not isinstance(found, GuidedUnetConfig):
        raise InputError(path, "weights of a U-Net", f"a {published.report.kind}", "leave --weights out")
    # How a network is run does not count, nor what only training asks.
    same = dataclasses.replace(
        found, dtype=config.dtype, remat=config.remat, attention=config.attention, dropout=config.dropout
    )
    names = [f.name for f in dataclasses.fields(config) if getattr(same, f.name) != getattr(config, f.name)]
    if names:
        expected = f"a network with {names[0]} {getattr(config, names[0])}"
        raise InputError(path, expected, f"{getattr(same, names[0])}", f"set --model.{names[0].replace('_', '-')}")
    notes = list(published.report.remarks)
    return published.params, {"licence": published.report.licence} | ({"notes": notes} if notes else {})


def read_training_images(config: ImageNetworkConfig, folder: RunFolder, seed: int, threads: int) -> Images:
    """Read all images of a run, synthetic or from files; of files before anything is written.

    Raises:
        InputError: For whatever is wrong with a table or a file.
    """
    data, place = config.data, config.input
    if data.synthetic and not (data.manifest or data.labels or place):
        target = folder.path / "inputs"
        # Real heads fill their field of view; so that the scale is the same, phantoms have no lesions here.
        brain, size, count = BrainConfig(lesion_probability=0.0), config.preprocess.size, data.synthetic

        def write() -> None:
            start(folder)
            write_brain_cohort(target, seed, count, size, brain, fractions=(0.8, 0.2, 0.0))

        first_only(write, "inputs")
        data, place = dataclasses.replace(data, manifest=target / "scans.csv"), None
    listed = list_files(data, place, seed, config.series)
    training, held_out = (
        read_images(listed, split, data, config.preprocess, threads, config.fill) for split in ("train", "validation")
    )
    assert training is not None
    counts = {
        split: {"scans": listed.count(split, "image"), "labels": listed.count(split, "labels"),
                "images": 0 if source is None else len(source)}
        for split, source in (("train", training), ("validation", held_out))
    }  # fmt: skip
    return Images(training, held_out, counts, listed.notes)


def write_images(folder: Path, name: str, images: Float32[np.ndarray, "image ..."], definition: str) -> None:
    """Write images as one NIfTI (slices side by side along z, volumes one file each) with a sidecar."""
    sidecar = {
        "definition": definition,
        "unit": "1",
        "constants": {"background": 0, "range": [0, 2]},
        "axes": "x, y and number of the image" if images.ndim == 3 else "x, y, z in RAS+ order",
        "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
    }
    stacks = {name: np.moveaxis(images, 0, 2)} if images.ndim == 3 else {f"{name}_{i}": v for i, v in enumerate(images)}
    for stem, array in stacks.items():
        nifti.write(folder / f"{stem}.nii.gz", Volume.make(np.asarray(array, np.float32), np.eye(4)))
        write_json(folder / f"{stem}.json", sidecar)


# Parts of the page --------------------------------------------------------------------------------------------------

SOURCE = "Method: DynamicDPS, arXiv:2503.01075. For research only, not for diagnosis."


def training_tiles(counts: Counts, lines: list[dict[str, float]]) -> list[Tile]:
    """Return how long a network was trained, and on what."""
    train = counts["train"]
    return [
        ("Steps", int(last_of(lines, "step")), f"{last_of(lines, 'steps_per_second'):.2g} per second"),
        ("Images", train["images"], f"{train['scans']} scans, {train['labels']} label maps"),
    ]


def loss_curves(lines: list[dict[str, float]], names: Mapping[str, str], ylabel: str, caption: str) -> Figure:
    """Plot series of metrics.jsonl by their labels."""
    found = {}
    for label, name in names.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if len(points) > 1 or (points and not found):
            found[label] = tuple(np.array(column) for column in zip(*points, strict=True))
    return curves(found, xlabel="step", ylabel=ylabel, log=True, caption=caption)


def last_of(lines: list[dict[str, float]], *names: str) -> float:
    """Return the last value of the first metric there is."""
    return next(line[name] for name in names for line in reversed(lines) if name in line)


def counts_table(counts: Counts) -> Table:
    """Return what was read."""
    rows = [(split, *counts[split].values()) for split in ("train", "validation")]
    return Table(("", "Scans", "Label maps", "Images"), rows, "What was read; whole subjects are held out.")


def stored_images(outputs: Path, name: str) -> list[np.ndarray]:
    """Return images that a stage wrote: slices side by side as one array, or the first four volumes."""
    paths = [outputs / f"{stem}.nii.gz" for stem in (name, *(f"{name}_{number}" for number in range(4)))]
    return [nifti.read(path).array for path in paths if path.exists()]

"""DynamicDPS train-initial: train a conditional enhancer on pairs that the low-field simulator makes."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Decay, Seed, Share, Size, checked, to_record
from jaxmed.data.loader import LoaderConfig
from jaxmed.metrics.imaging import psnr
from jaxmed.models.unet_guided import CI_PRIOR, ENHANCER, GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.physics.lowfield import LowField, contrast, linear_part
from jaxmed.recipes.denoiser import train_denoiser
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit
from jaxmed.synthesis.control_grid import Range
from jaxmed.systems.dynamicdps.networks import write_network
from jaxmed.systems.dynamicdps.reading import TOP, FrameConfig
from jaxmed.systems.dynamicdps.records import Cut, DataConfig, ImageMaker
from jaxmed.systems.dynamicdps.synthetic import SyntheticConfig
from jaxmed.systems.dynamicdps.train_page import write_initial_page
from jaxmed.systems.dynamicdps.training import (
    Images,
    image_maker,
    is_first,
    read_start,
    read_training_images,
    tell,
    write_images,
    write_training_summary,
)
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of a conditional enhancer: from a low-field image to the high-field one, mean absolute error.

    The paper refines whatever conditional model there is, and its own are not published: sizes and settings are ours.

    Attributes:
        data: Scans and label maps.
        input: A scan, or a folder of scans, instead of a table.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: Own weights to start from; random where empty.
        frame: How scans become images.
        synthetic: How contrasts are drawn from label maps.
        acquisition: The low-field scanner; its gamma is that of no pair.
        gamma: Range of the power of contrast, drawn for every pair.
        model: The network, without a time; its dtype is set by --dtype.
        optimizer: Adam with a constant rate.
        ema_decay: Of the moving average of parameters, which is the result.
        flip_probability: Of an exchange of left and right.
        accumulation: Parts in which a batch is processed.
        loader: Batch size (over all devices) and reading.
        loop: Length, and intervals of lines, saves and evaluations.
        mesh: The devices.
        samples: Images shown in the report.
        dtype: Of the products.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of parameters, noise and order.
    """

    data: DataConfig = DataConfig()
    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    frame: FrameConfig = FrameConfig()
    synthetic: SyntheticConfig = SyntheticConfig(t1_probability=1.0)
    acquisition: LowField = LowField()
    gamma: Range = (0.8, 1.0)
    model: GuidedUnetConfig = ENHANCER
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=2e-4, decay="constant", weight_decay=0.0)
    ema_decay: Decay = 0.999
    flip_probability: Share = 0.5
    accumulation: Size = 1
    loader: LoaderConfig = LoaderConfig(batch_size=16, num_threads=4)
    loop: LoopConfig = LoopConfig(steps=100_000, log_every=100, save_every=5000, evaluate_every=5000)
    mesh: MeshConfig = MeshConfig()
    samples: Size = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.model.with_time or self.model.learn_sigma:
            raise ValueError("model.with_time, model.learn_sigma: expected false, found true")
        if self.model.channels != 1 or self.model.outputs != 1:
            raise ValueError(f"model.channels, model.outputs: expected 1, found {self.model.channels}")
        if self.model.dtype not in ("float32", self.dtype):
            raise ValueError(f"model.dtype: expected to be left to --dtype, found {self.model.dtype}")
        if not 0 < self.gamma[0] <= self.gamma[1]:
            raise ValueError(f"gamma: expected two positive numbers in order, found {self.gamma}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability: expected a probability, found {self.flip_probability:g}")
        if self.samples < 1:
            raise ValueError(f"samples: expected 1 or more, found {self.samples}")
        for name in ("scale", "sigma"):
            value = getattr(self.acquisition, name)
            if isinstance(value, tuple) and len(value) != len(self.frame.size):
                raise ValueError(
                    f"acquisition.{name}: expected one number or one per axis of frame.size, found {value}"
                )


def paper() -> Config:
    """28 M parameters on 256 x 256 slices, contrast 0.8 to 1, 100,000 steps of 16 pairs: on an accelerator."""
    return Config()


def laptop() -> Config:
    """1 M parameters on 64 x 64 slices of 3 mm, resolution halved, 3,000 steps: an hour on a CPU."""
    return Config(
        data=DataConfig(finer=3),
        frame=FrameConfig((64, 64), spacing=3.0),
        acquisition=LowField(scale=2.0, sigma=0.7, radius=3, noise=0.01),
        model=dataclasses.replace(CI_PRIOR, with_time=False),
        optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=100, weight_decay=0.0),
        loader=LoaderConfig(batch_size=8),
        loop=LoopConfig(steps=3000, log_every=50, save_every=1000, evaluate_every=1000),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """A tiny network at 32 x 32, in seconds: on your scans, or on phantom brains."""
    return Config(
        data=DataConfig(embedded=40),
        frame=FrameConfig((32, 32)),
        acquisition=LowField(scale=2.0, sigma=0.7, radius=3, noise=0.01),
        model=GuidedUnetConfig(
            width=16, multipliers=(1, 2), blocks=1, attention_factors=(), heads=2, groups=8, with_time=False
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=10, weight_decay=0.0),
        ema_decay=0.98,
        loader=LoaderConfig(batch_size=8),
        loop=LoopConfig(steps=150, log_every=10, save_every=150),
        mesh=MeshConfig(data=1),
        samples=4,
    )


def run(config: Config, folder: RunFolder) -> None:
    """Read and cut the scans, train, export the network, show what it makes of held-out images, write the report."""
    began = time.monotonic()
    settings, network = resolve(config), make_network(config)
    check_fit(settings, network)
    first, origin = read_start(config.weights, config.model)
    images = read_training_images(
        config.data,
        config.input,
        config.frame,
        folder,
        config.seed,
        config.loader.num_threads,
        config.series,
        config.fill,
    )
    log = Log(folder.path, folder.options.quiet, config.loop.tensorboard, is_first())
    for note in origin.get("notes", ()):
        log.say(f"Note: {note}")
    tell(log, images)
    ready = time.monotonic()
    maker = image_maker(images, config.data, config.synthetic, config.frame, config.flip_probability)
    prepare, cut = make_pair(config, maker), Cut(config.frame.size, config.data.finer)
    params = train_denoiser(
        settings, network, enhancement_loss, TrainData(images.training, images.held_out, cut), prepare,
        folder=folder, log=log, start=first,
    )  # fmt: skip
    trained = time.monotonic()
    scanner = {"acquisition": to_record(config.acquisition), "gamma": list(config.gamma)}
    write_network(folder.outputs / "model", params, config.model, config.frame, **scanner, **origin)
    shown = enhance_examples(config, images, prepare, network, params)
    if not is_first():
        return
    for name, definition in (
        ("truth", "high-field images"),
        ("measurement", "their simulated low-field images"),
        ("enhanced", "what the network makes of the low-field images"),
    ):
        write_images(folder.outputs, name, getattr(shown, name), definition)
    seconds = {"read and cut": ready - began, "train, compilation included": trained - ready}
    quality = {name: _mean_psnr(getattr(shown, name), shown.truth) for name in ("measurement", "enhanced")}
    write_training_summary(folder, "train-initial", images, params, seconds=seconds, psnr=quality)
    write_initial_page(folder.path)


report = write_initial_page


def resolve(config: Config) -> TrainConfig:
    """Return the settings of the recipe."""
    return TrainConfig(
        config.optimizer, config.loop, config.loader, config.mesh, accumulation=config.accumulation,
        ema_decay=config.ema_decay, dtype=config.dtype, seed=config.seed,
    )  # fmt: skip


def make_network(config: Config) -> Network:
    """Return the network at the size of the images."""
    return guided_unet(dataclasses.replace(config.model, dtype=config.dtype), config.frame.size)


def make_pair(config: Config, maker: ImageMaker) -> Callable[[KeyArray, Mapping[str, Array]], dict[str, Array]]:
    """Return the function from a record to a high-field image and its low-field measurement, both [*size, 1]."""
    linear = linear_part(config.frame.size, config.acquisition)

    def pair(key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
        image_key, gamma_key, noise_key = jax.random.split(key, 3)
        image = maker(image_key, fields)
        gamma = jax.random.uniform(gamma_key, (), minval=config.gamma[0], maxval=config.gamma[1])
        measurement = linear(contrast(image, gamma, config.acquisition.floor))
        noise = config.acquisition.noise * jax.random.normal(noise_key, image.shape)
        return {"image": image, "measurement": measurement + noise}

    return pair


def enhancement_loss(apply: Any, params: Params, keys: Any, batch: Mapping[str, Array]) -> Any:
    """Return the mean absolute error of the enhanced images, and of the measurements as they are."""
    del keys
    image, measurement = batch["image"], batch["measurement"]
    error = jnp.mean(jnp.abs(apply(params, measurement) - image))
    return error, {"measurement_error": jnp.mean(jnp.abs(measurement - image))}


class Examples(NamedTuple):
    """Images of the report, [image, *size].

    Attributes:
        truth: High-field images.
        measurement: Their low-field images.
        enhanced: What the network makes of these, held in [0, 2].
    """

    truth: Float32[np.ndarray, "image ..."]
    measurement: Float32[np.ndarray, "image ..."]
    enhanced: Float32[np.ndarray, "image ..."]


def enhance_examples(
    config: Config, images: Images, prepare: Callable[..., dict[str, Array]], network: Network, params: Params
) -> Examples:
    """Enhance some images that were held out, or else some of those trained on, evenly spread."""
    source = images.training if images.held_out is None else images.held_out
    cut = Cut(config.frame.size, config.data.finer)
    places = np.linspace(0, len(source) - 1, config.samples).round().astype(int)
    records = [cut(source[int(place)], np.random.default_rng(number)) for number, place in enumerate(places)]
    fields = {name: np.stack([record[name] for record in records]) for name in records[0]}

    @jax.jit
    def run(params: Params, fields: dict[str, Array]) -> tuple[Array, Array, Array]:
        keys = jax.random.split(jax.random.key(config.seed + 3), config.samples)
        pairs = jax.vmap(prepare)(keys, fields)
        enhanced = jnp.clip(network.apply(params, pairs["measurement"]), 0.0, TOP)
        return pairs["image"], pairs["measurement"], enhanced

    return Examples(*(np.asarray(found, np.float32)[..., 0] for found in run(params, fields)))


def _mean_psnr(images: Float32[np.ndarray, "image ..."], truth: Float32[np.ndarray, "image ..."]) -> float:
    return float(np.mean([psnr(one, other, TOP) for one, other in zip(images, truth, strict=True)]))

"""DynamicDPS train-prior: train a diffusion prior on slices, or on patches of volumes, without pairs."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from jaxmed.arrays.types import Params
from jaxmed.config import Decay, Seed, Share, Size, checked
from jaxmed.data.loader import LoaderConfig
from jaxmed.diffusion.denoiser import denoising_loss, make_denoiser
from jaxmed.diffusion.samplers import Ddim, sample
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.unet_guided import CI_PRIOR, DYNAMICDPS_PRIOR, GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.recipes.denoiser import train_denoiser
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit
from jaxmed.systems.dynamicdps.networks import write_network
from jaxmed.systems.dynamicdps.reading import TOP, FrameConfig
from jaxmed.systems.dynamicdps.records import Cut, DataConfig
from jaxmed.systems.dynamicdps.synthetic import SyntheticConfig
from jaxmed.systems.dynamicdps.train_page import write_prior_page
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

SCHEDULE = VpDiscrete()


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of a diffusion prior; defaults are the authors' code's, but for warm-up, clipping and flips.

    The network predicts the noise of a chain of 1000 steps with cosine betas, times drawn evenly; the loss is the mean
    squared error. Deviation: warm-up over 5000 steps, gradients clipped to norm 1, flips of left and right.

    Attributes:
        data: Scans and label maps.
        input: A scan, or a folder of scans, instead of a table.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: Published or own weights to start from; random where empty.
        frame: How scans become images; its size decides between slices and patches of volumes.
        synthetic: How contrasts are drawn from label maps.
        model: The network; its dtype is set by --dtype.
        optimizer: AdamW with a constant rate.
        ema_decay: Of the moving average of parameters, which is the result.
        flip_probability: Of an exchange of left and right.
        accumulation: Parts in which a batch is processed.
        loader: Batch size (over all devices) and reading.
        loop: Length, and intervals of lines, saves and evaluations.
        mesh: The devices.
        samples: Images drawn from the trained prior for the report.
        sample_steps: Steps of DDIM for each.
        dtype: Of the products.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Of parameters, noise and order.
    """

    data: DataConfig = DataConfig()
    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    frame: FrameConfig = FrameConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    model: GuidedUnetConfig = DYNAMICDPS_PRIOR
    optimizer: OptimizerConfig = OptimizerConfig(
        peak_lr=1e-4, decay="constant", warmup_steps=5000, weight_decay=0.0, clip_norm=1.0
    )
    ema_decay: Decay = 0.9999
    flip_probability: Share = 0.5
    accumulation: Size = 1
    loader: LoaderConfig = LoaderConfig(batch_size=8, num_threads=4)
    loop: LoopConfig = LoopConfig(steps=360_000, log_every=100, save_every=5000, evaluate_every=5000)
    mesh: MeshConfig = MeshConfig()
    samples: Size = 8
    sample_steps: Size = 50
    dtype: Literal["float32", "bfloat16"] = "float32"
    fill: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.model.with_time or self.model.learn_sigma:
            raise ValueError("model.with_time, model.learn_sigma: expected true and false, as a prior has them")
        if self.model.channels != 1 or self.model.outputs != 1:
            raise ValueError(f"model.channels, model.outputs: expected 1, found {self.model.channels}")
        if self.model.dtype not in ("float32", self.dtype):
            raise ValueError(f"model.dtype: expected to be left to --dtype, found {self.model.dtype}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability: expected a probability, found {self.flip_probability:g}")
        if self.samples < 1 or not 1 <= self.sample_steps <= SCHEDULE.num_steps:
            raise ValueError(
                f"samples, sample_steps: expected 1 or more, and 1 to 1000, found {self.samples, self.sample_steps}"
            )


def paper() -> Config:
    """124 M parameters on 256 x 256 slices, 360,000 steps of 8 images: for your scans on an accelerator."""
    return Config(model=dataclasses.replace(DYNAMICDPS_PRIOR, remat=True))


def laptop() -> Config:
    """1.2 M parameters on 64 x 64 slices of 3 mm, 8,000 steps: your scans and label maps, an hour or two on a CPU."""
    return Config(
        data=DataConfig(finer=3),
        frame=FrameConfig((64, 64), spacing=3.0),
        model=CI_PRIOR,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=200, weight_decay=0.0, clip_norm=1.0),
        ema_decay=0.999,
        loop=LoopConfig(steps=8000, log_every=50, save_every=1000, evaluate_every=2000),
        mesh=MeshConfig(data=1),
    )


def smoke() -> Config:
    """A tiny network at 32 x 32, in seconds: on your scans, or on phantom brains."""
    return Config(
        data=DataConfig(embedded=40),
        frame=FrameConfig((32, 32)),
        model=GuidedUnetConfig(width=16, multipliers=(1, 2), blocks=1, attention_factors=(), heads=2, groups=8),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=10, weight_decay=0.0, clip_norm=1.0),
        ema_decay=0.98,
        loader=LoaderConfig(batch_size=8),
        loop=LoopConfig(steps=150, log_every=10, save_every=150),
        mesh=MeshConfig(data=1),
        samples=4,
        sample_steps=20,
    )


def run(config: Config, folder: RunFolder) -> None:
    """Read and cut the scans, train, export the prior, draw images from it, write the report."""
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
    make = image_maker(images, config.data, config.synthetic, config.frame, config.flip_probability)
    params = train_denoiser(
        settings, network, denoise_loss,
        TrainData(images.training, images.held_out, Cut(config.frame.size, config.data.finer)),
        lambda key, fields: {"image": make(key, fields)}, folder=folder, log=log, start=first,
    )  # fmt: skip
    trained = time.monotonic()
    write_network(folder.outputs / "model", params, config.model, config.frame, **origin)
    drawn = draw_samples(config, network, params)
    if not is_first():
        return
    write_images(folder.outputs, "samples", drawn, "images drawn from the prior")
    write_images(folder.outputs, "training", example_images(config, images), "images as the prior is trained on them")
    seconds = {"read and cut": ready - began, "train, compilation included": trained - ready}
    seconds["draw"] = time.monotonic() - trained
    write_training_summary(
        folder, "train-prior", images, params, seconds=seconds, drawn=[float(drawn.mean()), float(drawn.std())]
    )
    write_prior_page(folder.path)


report = write_prior_page


def resolve(config: Config) -> TrainConfig:
    """Return the settings of the recipe."""
    return TrainConfig(
        config.optimizer, config.loop, config.loader, config.mesh, accumulation=config.accumulation,
        ema_decay=config.ema_decay, dtype=config.dtype, seed=config.seed,
    )  # fmt: skip


def make_network(config: Config) -> Network:
    """Return the network at the size of the images."""
    return guided_unet(dataclasses.replace(config.model, dtype=config.dtype), config.frame.size)


def denoise_loss(apply: Any, params: Params, keys: Any, batch: Any) -> Any:
    """Return the mean squared error of the predicted noise."""
    return denoising_loss(apply, SCHEDULE, params, keys, batch)


def draw_samples(config: Config, network: Network, params: Params) -> np.ndarray:
    """Draw images from a trained prior by DDIM, [sample, *size]."""

    @jax.jit
    def draw(params: Params) -> Array:
        denoiser = make_denoiser(partial(network.apply, params), SCHEDULE, clip=(0.0, TOP))
        shape = (config.samples, *config.frame.size, 1)
        return sample(jax.random.key(config.seed + 2), denoiser, shape, Ddim(config.sample_steps))

    return np.asarray(draw(params), np.float32)[..., 0]


def example_images(config: Config, images: Images) -> np.ndarray:
    """Return training images as the network sees them, evenly spread over the records."""
    make = jax.jit(image_maker(images, config.data, config.synthetic, config.frame, config.flip_probability))
    cut, found = Cut(config.frame.size, config.data.finer), []
    for number, index in enumerate(np.linspace(0, len(images.training) - 1, config.samples).round().astype(int)):
        fields = cut(images.training[int(index)], np.random.default_rng(number))
        found.append(np.asarray(make(jax.random.fold_in(jax.random.key(config.seed + 3), number), fields))[..., 0])
    return np.stack(found).astype(np.float32)

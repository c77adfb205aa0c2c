"""DynamicDPS train-initial: train a conditional enhancer on pairs that the low-field simulator makes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Size, checked, to_record
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.data.loader import LoaderConfig
from jaxmed.metrics.imaging import psnr
from jaxmed.models.unet_guided import ENHANCER
from jaxmed.physics.lowfield import LowField, contrast, linear_part
from jaxmed.recipes.image_network import (
    LAPTOP,
    SMOKE,
    SMOKE_TRAINING,
    Counts,
    ImageNetworkConfig,
    NetworkFlags,
    image_figure,
    train_network,
    training_page,
    write_images,
)
from jaxmed.recipes.stage import Clock, Finished, Page, finish
from jaxmed.recipes.training import TrainConfig, TrainFlags
from jaxmed.report.page import Section
from jaxmed.synthesis.label_images import ImageMaker, SyntheticConfig
from jaxmed.systems.dynamicdps.networks import SOURCE
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder

DEFAULTS = TrainConfig(
    OptimizerConfig(peak_lr=2e-4, decay="constant", weight_decay=0.0),
    LoopConfig(steps=100_000, log_every=100, save_every=5000, evaluate_every=5000),
    LoaderConfig(batch_size=16, num_threads=4),
    ema_decay=0.999,
)
T1 = SyntheticConfig(t1_probability=1.0)
SCANNER = LowField(scale=2.0, sigma=0.7, radius=3, noise=0.01)
"""Resolution halved: what small images can show."""
SHOWN = {
    "truth": "high-field images",
    "measurement": "their simulated low-field images",
    "enhanced": "what the network makes of the low-field images",
}


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of a conditional enhancer: from a low-field image to the high-field one, mean absolute error.

    The paper refines whatever conditional model there is, and its own are not published: sizes and settings are ours.

    Attributes:
        network: The enhancer, a network without a time, and its images.
        acquisition: The low-field scanner; its gamma is that of no pair.
        gamma: Range of the power of contrast, drawn for every pair.
        train: The run: Adam with a constant rate; the moving average of the parameters is the result.
        samples: Images shown in the report.
    """

    network: NetworkFlags = ImageNetworkConfig(model=ENHANCER, synthetic=T1)
    acquisition: LowField = LowField()
    gamma: tuple[float, float] = (0.8, 1.0)
    train: TrainFlags = DEFAULTS
    samples: Size = 8

    def __post_init__(self) -> None:
        if self.network.model.with_time:
            raise ValueError("model.with_time: expected false, found true")
        if not 0 < self.gamma[0] <= self.gamma[1]:
            raise ValueError(f"gamma: expected two positive numbers in order, found {self.gamma}")
        for name in ("scale", "sigma"):
            value = getattr(self.acquisition, name)
            if isinstance(value, tuple) and len(value) != len(self.network.preprocess.size):
                raise ValueError(
                    f"acquisition.{name}: expected one number or one per axis of preprocess.size, found {value}"
                )


def paper() -> Config:
    """28 M parameters on 256 x 256 slices, contrast 0.8 to 1, 100,000 steps of 16 pairs: on an accelerator."""
    return Config()


def laptop() -> Config:
    """1 M parameters on 64 x 64 slices of 3 mm, resolution halved, 3,000 steps: an hour on a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=5e-4, warmup_steps=100, weight_decay=0.0),
        LoopConfig(steps=3000, log_every=50, save_every=1000, evaluate_every=1000),
        LoaderConfig(batch_size=8),
        MeshConfig(data=1),
        ema_decay=0.999,
    )
    return Config(_without_time(LAPTOP), SCANNER, train=train)


def smoke() -> Config:
    """A tiny network at 32 x 32, in seconds: on your scans, or on phantom brains."""
    return Config(_without_time(SMOKE), SCANNER, train=SMOKE_TRAINING, samples=4)


def _without_time(network: ImageNetworkConfig) -> ImageNetworkConfig:
    return dataclasses.replace(network, synthetic=T1, model=dataclasses.replace(network.model, with_time=False))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained.

    Attributes:
        counts: Scans, label maps and images of each split.
        parameters: Number of the network's parameters.
        psnr: Mean of the images shown, in dB: of the low-field image ("measurement"), and of what is made of it.
    """

    counts: Counts
    parameters: int
    psnr: dict[str, float]


def run(config: Config, folder: RunFolder) -> None:
    """Read and cut the scans, train, export the network, show what it makes of held-out images, write the report."""
    clock = Clock()
    scanner = {"acquisition": to_record(config.acquisition), "gamma": list(config.gamma)}
    trained = train_network(
        config.network, config.train, enhancement_loss, lambda maker: make_pair(config, maker), folder, clock, **scanner
    )
    pairs = trained.examples(jax.random.key(config.train.seed + 3), config.samples, held_out=True)
    enhanced = jnp.clip(jax.jit(trained.network.apply)(trained.params, pairs["measurement"]), 0.0, MAX_INTENSITY)
    images = {"truth": pairs["image"], "measurement": pairs["measurement"], "enhanced": enhanced}
    shown = {name: np.asarray(array, np.float32)[..., 0] for name, array in images.items()}
    if jax.process_index() == 0:
        for name, definition in SHOWN.items():
            write_images(folder.outputs, name, shown[name], definition)
    quality = {
        name: float(np.mean([psnr(*pair, MAX_INTENSITY) for pair in zip(shown[name], shown["truth"], strict=True)]))
        for name in ("measurement", "enhanced")
    }
    finish(folder, config, Summary(trained.counts, trained.size, quality), clock, page)


def make_pair(config: Config, maker: ImageMaker) -> Callable[[KeyArray, Mapping[str, Array]], dict[str, Array]]:
    """Return the function from a record to a high-field image and its low-field measurement, both [*size, 1]."""
    linear = linear_part(config.network.preprocess.size, config.acquisition)

    def pair(key: KeyArray, fields: Mapping[str, Array]) -> dict[str, Array]:
        image_key, gamma_key, noise_key = jax.random.split(key, 3)
        image = maker(image_key, fields)
        gamma = jax.random.uniform(gamma_key, (), minval=config.gamma[0], maxval=config.gamma[1])
        measurement = linear(contrast(image, gamma, config.acquisition.floor))
        noise = config.acquisition.noise * jax.random.normal(noise_key, image.shape)
        return {"image": image, "measurement": measurement + noise}

    return pair


def enhancement_loss(apply: Any, params: Any, keys: Any, batch: Mapping[str, Array]) -> Any:
    """Return the mean absolute error of the enhanced images, and of the measurements as they are."""
    del keys
    image, measurement = batch["image"], batch["measurement"]
    error = jnp.mean(jnp.abs(apply(params, measurement) - image))
    return error, {"measurement_error": jnp.mean(jnp.abs(measurement - image))}


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, and truth, low-field image and result side by side."""
    summary, lines = run.summary, read_metrics(run.path)
    names = {"training": "loss", "held out": "evaluation/loss", "measurement, held out": "evaluation/measurement_error"}
    caption = "Mean absolute error of the enhanced image, and of the low-field image taken as it is."
    picture = image_figure(
        run.outputs, {"Truth": "truth", "Low field": "measurement", "Enhanced": "enhanced"},
        "Images that were not trained on (where any were held out): truth, simulated low field, and what the network "
        "makes of it. Sharp detail that the low-field image does not show is a guess: the enhance stage checks it "
        "against the measurement and the prior.",
    )  # fmt: skip
    gained = summary.psnr["enhanced"] - summary.psnr["measurement"]
    quality = f"{summary.psnr['enhanced']:.1f} dB", f"{gained:+.1f} dB on the low-field image; range 2"
    reading = (
        "The network is the moving average of the parameters, in outputs/model; jaxmed dynamicdps enhance takes the "
        "run as --initial. It is trained on one kind of scanner and contrast; on others it invents, which is what the "
        "refinement is for.",
        SOURCE,
    )
    return training_page(
        "DynamicDPS initial network", f"A conditional enhancer, {summary.parameters:,} parameters", summary.counts,
        lines, [(names, "mean absolute error", caption)], [("PSNR", *quality)],
        Section("What the network makes of low-field images", [picture]), reading,
    )  # fmt: skip

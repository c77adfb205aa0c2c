"""DynamicDPS train-prior: train a diffusion prior on slices, or on patches of volumes, without pairs."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxmed.arrays.batches import map_rows
from jaxmed.config import Length, Size, checked
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.data.loader import LoaderConfig
from jaxmed.diffusion.denoiser import denoising_loss, make_denoiser
from jaxmed.diffusion.likelihood import LikelihoodConfig, log_likelihood
from jaxmed.diffusion.samplers import Ddim, sample
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.unet_guided import DYNAMICDPS_PRIOR
from jaxmed.recipes.image_network import (
    LAPTOP,
    SMOKE,
    SMOKE_TRAINING,
    Counts,
    ImageNetworkConfig,
    NetworkFlags,
    Trained,
    image_figure,
    last_of,
    train_network,
    training_page,
    write_images,
)
from jaxmed.recipes.stage import Clock, Finished, Page, finish
from jaxmed.recipes.training import TrainConfig, TrainFlags
from jaxmed.report.page import Section, Tile
from jaxmed.systems.dynamicdps.networks import SOURCE
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder

SCHEDULE = VpDiscrete()
AUTHORS = TrainConfig(
    OptimizerConfig(peak_lr=1e-4, decay="constant", warmup_steps=5000, weight_decay=0.0, clip_norm=1.0),
    LoopConfig(steps=360_000, log_every=100, save_every=5000, evaluate_every=5000),
    LoaderConfig(batch_size=8, num_threads=4),
    ema_decay=0.9999,
)


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of a diffusion prior; defaults are the authors' code's, but for warm-up, clipping and flips.

    The network predicts the noise of a chain of 1000 steps with cosine betas, times drawn evenly; the loss is the mean
    squared error. Deviation: warm-up over 5000 steps, gradients clipped to norm 1, flips of left and right.

    Attributes:
        network: The prior and its images.
        train: The run: AdamW with a constant rate; the moving average of the parameters is the result.
        samples: Images drawn from the trained prior for the report.
        sample_steps: Steps of DDIM for each.
        likelihoods: Held-out images whose likelihood under the prior is computed, which tells priors apart where losses
            do not. Each takes some thousand passes of the network; 0 leaves it out.
    """

    network: NetworkFlags = ImageNetworkConfig(model=DYNAMICDPS_PRIOR)
    train: TrainFlags = AUTHORS
    samples: Size = 8
    sample_steps: Size = 50
    likelihoods: Length = 0

    def __post_init__(self) -> None:
        if not self.network.model.with_time:
            raise ValueError("model.with_time: expected true, as a prior has it, found false")
        if self.sample_steps > SCHEDULE.num_steps:
            raise ValueError(f"sample_steps: expected 1 to 1000, found {self.sample_steps}")


def paper() -> Config:
    """124 M parameters on 256 x 256 slices, 360,000 steps of 8 images: for your scans on an accelerator."""
    return Config(network=ImageNetworkConfig(model=dataclasses.replace(DYNAMICDPS_PRIOR, remat=True)))


def laptop() -> Config:
    """1.2 M parameters on 64 x 64 slices of 3 mm, 8,000 steps: your scans and label maps, an hour or two on a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-4, warmup_steps=200, weight_decay=0.0, clip_norm=1.0),
        LoopConfig(steps=8000, log_every=50, save_every=1000, evaluate_every=2000),
        LoaderConfig(batch_size=8, num_threads=4),
        MeshConfig(data=1),
        ema_decay=0.999,
    )
    return Config(LAPTOP, train)


def smoke() -> Config:
    """A tiny network at 32 x 32, in seconds: on your scans, or on phantom brains."""
    optimizer = dataclasses.replace(SMOKE_TRAINING.optimizer, clip_norm=1.0)
    return Config(SMOKE, dataclasses.replace(SMOKE_TRAINING, optimizer=optimizer), samples=4, sample_steps=20)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained.

    Attributes:
        counts: Scans, label maps and images of each split.
        parameters: Number of the network's parameters.
        drawn: Mean and standard deviation of the images drawn from it.
        bits_per_voxel: Mean of -log2 likelihood over held-out images, of 256 grey levels; None where it was not asked.
    """

    counts: Counts
    parameters: int
    drawn: tuple[float, float]
    bits_per_voxel: float | None = None


def run(config: Config, folder: RunFolder) -> None:
    """Read and cut the scans, train, export the prior, draw images from it, write the report."""
    clock = Clock()
    loss: Any = lambda apply, params, keys, batch: denoising_loss(apply, SCHEDULE, params, keys, batch)  # noqa: E731
    trained = train_network(
        config.network, config.train, loss, lambda make: lambda key, fields: {"image": make(key, fields)}, folder, clock
    )
    drawn = draw_samples(config, trained)
    shown = trained.examples(jax.random.key(config.train.seed + 3), config.samples, held_out=False)["image"]
    if jax.process_index() == 0:
        write_images(folder.outputs, "samples", drawn, "images drawn from the prior")
        definition = "images as the prior is trained on them"
        write_images(folder.outputs, "training", np.asarray(shown, np.float32)[..., 0], definition)
    clock.lap("draw")
    bits = bits_per_voxel(config, trained) if config.likelihoods else None
    clock.lap("likelihoods")
    summary = Summary(trained.counts, trained.size, (float(drawn.mean()), float(drawn.std())), bits)
    finish(folder, config, summary, clock, page)


def draw_samples(config: Config, trained: Trained) -> np.ndarray:
    """Draw images from a trained prior by DDIM, [sample, *size]."""

    @jax.jit
    def draw(params: Any) -> Array:
        denoiser = make_denoiser(partial(trained.network.apply, params), SCHEDULE, clip=(0.0, MAX_INTENSITY))
        shape = (config.samples, *config.network.preprocess.size, 1)
        return sample(jax.random.key(config.train.seed + 2), denoiser, shape, Ddim(config.sample_steps))

    return np.asarray(draw(trained.params), np.float32)[..., 0]


def bits_per_voxel(config: Config, trained: Trained) -> float:
    """Return the mean of -log2 likelihood per voxel, of 256 grey levels, over images that were held out."""
    key, seed = jax.random.key(config.train.seed + 4), config.train.seed
    images = trained.examples(jax.random.key(seed + 5), config.likelihoods, held_out=True)["image"]

    @jax.jit
    def score(params: Any, images: Array) -> Array:
        # Unclipped: the flow needs a smooth denoiser.
        denoiser = make_denoiser(partial(trained.network.apply, params), SCHEDULE)
        return log_likelihood(key, denoiser, images, LikelihoodConfig(bin_width=MAX_INTENSITY / 256)).bits_per_dim

    return float(np.mean(map_rows(lambda rows: score(trained.params, images[rows]), config.likelihoods, 1)))


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, images as the prior is trained on them, and images drawn from it."""
    summary, lines, steps = run.summary, read_metrics(run.path), run.config.sample_steps
    plots = (
        ({"training": "loss", "held out": "evaluation/loss"}, "loss",
         "Mean squared error of the predicted noise over all times; a network that knows nothing has 1."),
        ({"training": "image_error", "held out": "evaluation/image_error"}, "error",
         "Mean squared error of the denoised image, which late times, where nothing is left to see, rule."),
    )  # fmt: skip
    shown = (
        ("training", "Images as the prior is trained on them: scans, and contrasts drawn from label maps where there "
         "are any, scaled to [0, 2]."),
        ("samples", f"Images drawn from the prior in {steps} steps, from noise alone. A prior that is good enough for "
         "DynamicDPS shows heads with plausible tissue, not copies of the above."),
    )  # fmt: skip
    reading = (
        "The prior is the moving average of the parameters, in outputs/model; jaxmed dynamicdps enhance takes the run "
        "as --weights. The loss is dominated by times of little noise and hardly moves late in training while the "
        "samples still improve: look at the images.",
        SOURCE,
    )
    last = float(f"{last_of(lines, 'evaluation/loss', 'loss'):.3g}")
    tiles: list[Tile] = [("Loss", last, "of the noise, held out where there is any")]
    if summary.bits_per_voxel is not None:
        tiles.append(("Bits per voxel", f"{summary.bits_per_voxel:.2f}", "-log2 likelihood of 256 grey levels"))
    figures = [image_figure(run.outputs, {name.capitalize(): name}, caption) for name, caption in shown]
    subtitle = f"A diffusion prior of brain images, {summary.parameters:,} parameters"
    return training_page(
        "DynamicDPS prior", subtitle, summary.counts, lines, plots, tiles,
        Section("What the prior has learnt", figures), reading,
    )  # fmt: skip

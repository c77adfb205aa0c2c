"""An eleventh system: adapt a small convolutional network to a table of pictures.

What a system says for itself is here; reading, splits, training, scores with intervals, export, report and resume are
the recipes'. Synthetic pictures are noise, with a bright disc in it where the label is 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.config import Size, checked
from jaxmed.data.intensity import Intensity
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.io.images import write_png
from jaxmed.io.tables import write_table
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import HeadConfig
from jaxmed.nn.convolution import conv
from jaxmed.recipes.adapt import AdaptConfig
from jaxmed.recipes.adapt_sections import adapt_page
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, LabelledFlags, Start, Summary, run_adapt
from jaxmed.recipes.stage import Finished, Page
from jaxmed.recipes.training import TrainConfig
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start


@dataclasses.dataclass(frozen=True)
@checked
class NetworkConfig:
    """Two convolutions of stride 2, with `widths` channels after each, on pictures of `image_size` pixels."""

    image_size: tuple[Size, Size] = (32, 32)
    widths: tuple[Size, Size] = (8, 16)


def conv_encoder(config: NetworkConfig) -> Encoder:
    """Return the network as the recipes take it: a token for every place of the last map."""

    def init(key: Any) -> Any:
        shapes = [(3, 3, 1, config.widths[0]), (3, 3, *config.widths)]
        keys = jax.random.split(key, len(shapes))
        drawn = (
            jax.random.normal(key, shape) * (9 * shape[2]) ** -0.5 for key, shape in zip(keys, shapes, strict=True)
        )
        return {f"layer_{number}": {"kernel": kernel} for number, kernel in enumerate(drawn)}

    def apply(params: Any, images: Any, kept: Any = None, key: Any = None) -> Any:
        for number in range(2):
            images = jax.nn.relu(conv(images, params[f"layer_{number}"]["kernel"], 2))
        return images.reshape(len(images), -1, config.widths[-1])

    x, y = (length // 4 for length in config.image_size)
    return Encoder(config, config.image_size, 1, config.widths[-1], (x, y), init, apply)


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Adaptation of a small convolutional network to pictures.

    Attributes:
        labelled: Pictures, labels, and how the network is adapted.
        network: Its sizes.
    """

    labelled: LabelledFlags = LabelledConfig()
    network: NetworkConfig = NetworkConfig()


def smoke() -> Config:
    """In seconds, on synthetic pictures."""
    optimizer = OptimizerConfig(peak_lr=1e-2, end_lr=1e-4)
    train = TrainConfig(optimizer, LoopConfig(), LoaderConfig(batch_size=16), MeshConfig(data=1), epochs=30)
    data = LabelledData(synthetic=96, fractions=(0.5, 0.2, 0.3))
    return Config(LabelledConfig(data, pool="mean", adapt=AdaptConfig(train, evaluate_epochs=5)))


def with_synthetic(config: Config, folder: RunFolder) -> Config:
    """Write pictures where none are given, as a user's would lie."""
    if not config.labelled.is_synthetic:
        return config
    start(folder)
    generator, inputs, rows = np.random.default_rng(config.labelled.adapt.train.seed), folder.path / "inputs", []
    places = np.stack(np.meshgrid(*map(np.arange, config.network.image_size), indexing="ij"))
    for number in range(config.labelled.data.synthetic):
        picture, middle = generator.uniform(0, 0.4, config.network.image_size), generator.uniform(8, 24, (2, 1, 1))
        picture += 0.6 * (number % 2) * (np.square(places - middle).sum(0) < 25)
        write_png(inputs / f"{number:03d}.png", picture)
        rows.append({"path": f"{number:03d}.png", "label": number % 2, "subject": number})
    write_table(inputs / "pictures.csv", list(rows[0]), rows)
    data = dataclasses.replace(config.labelled.data, manifest=inputs / "pictures.csv")
    return dataclasses.replace(config, labelled=dataclasses.replace(config.labelled, data=data))


def find_start(config: Config, task: Task) -> Start:
    """Start from random weights."""
    head = HeadConfig(len(task.names), config.labelled.pool, config.labelled.hidden)
    preprocess = Preprocess(config.network.image_size, fit="stretch", intensity=Intensity("unit"))
    return Start(conv_encoder(config.network), head, None, preprocess, "toy", lambda head: head, "Apache-2.0", [])


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, adapt, score every set, export the model, write the report. Returns 1 when pictures failed."""
    made = with_synthetic(config, folder)
    return run_adapt(config, made.labelled, functools.partial(find_start, made), page, folder)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the scores of every set."""
    return adapt_page(run, "A toy adapted", "Model: two convolutions, of this repository's tests.")

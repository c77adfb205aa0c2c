"""CoCoLIT train-diffusion: the U-Net that draws latents of SUVR maps, without a condition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmed.config import checked, to_record
from jaxmed.data.loader import LoaderConfig
from jaxmed.diffusion.denoiser import denoising_loss
from jaxmed.models.published import cocolit
from jaxmed.models.unet_latent import COCOLIT_UNET, LatentUnetConfig, latent_unet
from jaxmed.nn.model import Network
from jaxmed.recipes.denoiser import plan_denoiser, train_denoiser
from jaxmed.recipes.latent_tables import read_latent
from jaxmed.recipes.pair_tables import count_records, loss_figure, make_data
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only
from jaxmed.recipes.training import TrainConfig, TrainFlags, whole
from jaxmed.report.page import Section, Text
from jaxmed.systems.cocolit.networks import TINY_UNET
from jaxmed.systems.cocolit.training import BEST, LATENT_COLUMNS, SOURCE, PairData, find_latents, find_pairs
from jaxmed.systems.cocolit.translation import CHAIN
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of the U-Net of latents: the squared error of the expected noise, times drawn evenly.

    Deviation from the released code: weight decay leaves out biases and the scales of norms.

    Attributes:
        data: The table that `encode` writes.
        model: The U-Net; its dtype is set by --dtype.
        train: The run; that of the best held-out loss is handed on.
    """

    data: PairData = PairData()
    model: LatentUnetConfig = COCOLIT_UNET
    train: TrainFlags = TrainConfig()


def paper() -> Config:
    """101 M parameters on latents of 32 x 40 x 32, 500 epochs in batches of 16: an accelerator."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2.5e-5, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, log_every=10, save_every=500, evaluate_every=100),
        LoaderConfig(batch_size=16, num_threads=4),
        MeshConfig(data=1),
        epochs=500,
        dtype="bfloat16",
    )
    return Config(model=dataclasses.replace(COCOLIT_UNET, remat=True), train=train)


def laptop() -> Config:
    """A small U-Net, 5,000 steps of 8 latents as the preset laptop of train-autoencoder makes: hours of a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=5e-4, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, steps=5000, log_every=50, save_every=1000, evaluate_every=1000),
        LoaderConfig(batch_size=8),
        MeshConfig(data=1),
    )
    model = LatentUnetConfig(
        widths=(32, 32), blocks=(1, 1), attention_levels=(False, True), head_channels=32, groups=8
    )  # fmt: skip
    return Config(model=model, train=train)


def smoke() -> Config:
    """A tiny U-Net, in seconds: on your latents, or on those of phantoms, which are made first."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, steps=60, log_every=4, save_every=60),
        LoaderConfig(batch_size=4),
        MeshConfig(data=1),
    )
    return Config(PairData(synthetic=8), TINY_UNET, train)


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many latents were trained on and held out, their padded size, and the number of parameters."""

    latents: dict[str, int]
    size: tuple[int, ...]
    parameters: int


def run(config: Config, folder: RunFolder) -> None:
    """Read the latents, train, export the U-Net."""
    clock, asked = Clock(), config
    config = dataclasses.replace(config, data=find_latents(config.data, folder, config.train.seed))
    column = LATENT_COLUMNS["suvr"]
    table = find_pairs(config.data, folder, config.train.seed, (column,))
    data = make_data(table, {"image": (column, read_latent(config.model.divisor))})
    shape = data.training[0]["image"].shape
    network = make_network(config, shape)
    log = begin(folder, tensorboard=config.train.loop.tensorboard)
    counts = count_records(data)
    log.say(f"{counts['train']:,} latents to train on, {counts['held out']:,} held out.")
    clock.lap("read")
    params = train_denoiser(config.train, network, chain_loss, data, as_it_is, folder=folder, log=log)
    params = whole(params, config.train)
    clock.lap("train, compilation included")
    record: dict[str, Any] = {"family": cocolit.NAME, "kind": "latent-denoiser", "config": to_record(config.model)}
    record["preprocess"] = to_record(dataclasses.replace(cocolit.preprocess(config.model), size=shape[:3]))
    first_only(lambda: export_parameters(folder.outputs / "model", params, record), "network")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    finish(folder, asked, Summary(counts, shape[:3], size), clock, page)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the step of a run on latents of the released size and the shapes of its arguments; nothing is read."""
    shape = (*cocolit.LATENT_SIZE, config.model.channels)
    record = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return plan_denoiser(config.train, make_network(config, shape), chain_loss, record, as_it_is, mesh)


def make_network(config: Config, shape: tuple[int, ...]) -> Network:
    """Return the U-Net for latents of one shape."""
    model = latent_unet(dataclasses.replace(config.model, dtype=config.train.dtype))
    return Network(lambda key: model.init(key, jnp.zeros((1, *shape)), jnp.zeros(1)), model.apply)


def chain_loss(apply: Any, params: Any, keys: Any, batch: Any) -> Any:
    """Return the loss of denoising on the released chain of times."""
    return denoising_loss(apply, CHAIN, params, keys, batch)


def as_it_is(key: Any, fields: Any) -> Any:
    """Return a record unchanged."""
    return fields


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses."""
    summary, lines = run.summary, read_metrics(run.path)
    figure = loss_figure(
        lines, {"training": "loss", "held out": "evaluation/loss"},
        "Mean squared error of the expected noise over all times; a network that knows nothing has 1.",
    )  # fmt: skip
    reading = (
        "The U-Net is in outputs/model: that of the evaluation with the least error where latents were held out; "
        "train-controlnet and translate take the run as --weights.unet. Latents are padded with zeros to what the "
        "U-Net halves, and the padding counts in the loss, as released.",
        SOURCE,
    )
    tiles = [
        ("Latents", summary.latents["train"], f"{summary.latents['held out']} held out"),
        ("Size", " x ".join(map(str, summary.size)), "padded"),
        ("Parameters", f"{summary.parameters:,}", ""),
    ]
    sections = [Section("Training", [figure]), Section("How to read this", [Text(reading)])]
    return Page("CoCoLIT diffusion", "A diffusion U-Net of SUVR latents", tiles, sections)

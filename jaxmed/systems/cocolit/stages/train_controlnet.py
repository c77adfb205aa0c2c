"""CoCoLIT train-controlnet: the ControlNet that tells the U-Net of the MRI, and the decoder of SUVR maps with it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxmed.arrays.types import Params
from jaxmed.config import Size, checked, to_record
from jaxmed.data.loader import LoaderConfig
from jaxmed.errors import InputError
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import Published, published_record
from jaxmed.models.unet_latent import ControlNetConfig, LatentUnetConfig
from jaxmed.recipes.condition import compare_condition
from jaxmed.recipes.latent_control import ImageLoss, control_loss, make_control
from jaxmed.recipes.latent_tables import read_latent
from jaxmed.recipes.pair_tables import count_records, loss_figure, make_data
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, first_only, nested_run
from jaxmed.recipes.training import TrainConfig, TrainFlags, run_training, score_singly, selected, whole
from jaxmed.report.page import Note, Section, Text
from jaxmed.systems.cocolit.networks import RELEASED, read_network
from jaxmed.systems.cocolit.training import (
    BEST,
    COLUMNS,
    LATENT_COLUMNS,
    SOURCE,
    PairData,
    find_latents,
    find_pairs,
)
from jaxmed.systems.cocolit.translation import CHAIN
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import read_metrics
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class NetworkPlaces:
    """Where the networks of the earlier stages are.

    Attributes:
        pet: Autoencoder of SUVR maps, whose decoder is trained on.
        unet: U-Net of its latents.
        mri: Autoencoder of MRI, which made the condition: copied beside the others, so that one folder serves
            translate; not needed to train.
    """

    pet: Path | None = None
    unet: Path | None = None
    mri: Path | None = None


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of the ControlNet and of the decoder; defaults are the released code's, but for the start.

    Attributes:
        data: The table that `encode` writes.
        weights: The networks of the earlier stages.
        condition_widths: Channels of the convolutions of the condition; empty for one as wide as the U-Net's first.
        image_loss: "wisl" counts the decoded image by (T - t) / T; "isl" always by 1; "none" leaves image and decoder
            out.
        init_from_unet: Start the ControlNet's encoder as a copy of the U-Net's; else at random, as the released script
            does.
        remat_decoder: Recompute the decoder's blocks in the backward pass, which at full size take most of the memory.
        train: The run; that of the best held-out loss is handed on.
    """

    data: PairData = PairData()
    weights: NetworkPlaces = NetworkPlaces()
    condition_widths: tuple[Size, ...] = ()
    image_loss: ImageLoss = "wisl"
    init_from_unet: bool = True
    remat_decoder: bool = True
    train: TrainFlags = TrainConfig()


def paper() -> Config:
    """43 M parameters and a decoder at 128 x 152 x 128, 300 epochs in batches of 2: an accelerator."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=2.5e-5, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, log_every=10, save_every=1000, evaluate_every=1000),
        LoaderConfig(batch_size=2, num_threads=4),
        MeshConfig(data=1),
        epochs=300,
        dtype="bfloat16",
    )
    return Config(train=train)


def laptop() -> Config:
    """2,000 steps of 2 on networks of the presets laptop: an hour or two on a CPU."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=5e-4, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, steps=2000, log_every=20, save_every=500, evaluate_every=500),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    return Config(train=train)


def smoke() -> Config:
    """A few steps on your latents, or on phantoms through all stages before this one, in seconds each."""
    train = TrainConfig(
        OptimizerConfig(peak_lr=3e-3, decay="constant", weight_decay=0.01),
        dataclasses.replace(BEST, steps=20, log_every=2, save_every=20),
        LoaderConfig(batch_size=2),
        MeshConfig(data=1),
    )
    return Config(PairData(synthetic=8), remat_decoder=False, train=train)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was trained.

    Attributes:
        pairs: Number of pairs trained on and held out.
        parameters: Number of parameters that were trained.
        own: Loss with the MRI of the same subject, over some pairs that were held out where any were.
        other: The same with that of another one, at the same times and noise; equal where the MRI tells nothing.
        notes: What a user should know.
    """

    pairs: dict[str, int]
    parameters: int
    own: float
    other: float | None
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read latents and networks, train, export all networks under their released names."""
    clock, asked = Clock(), config
    config = synthetic_inputs(config, folder)
    has_images = config.image_loss != "none"
    columns = (*LATENT_COLUMNS.values(), *([COLUMNS["suvr"]] if has_images else []))
    table = find_pairs(config.data, folder, config.train.seed, columns)
    networks = read_networks(config)
    pet, unet = networks["pet"], networks["unet"]
    read = read_latent(unet.config.divisor)
    fields = {"condition": LATENT_COLUMNS["mri"], "latent": LATENT_COLUMNS["suvr"]}
    readers: dict[str, Any] = {field: (column, read) for field, column in fields.items()}
    data = make_data(table, readers | ({"image": (COLUMNS["suvr"], pet.preprocess)} if has_images else {}))
    example = data.training[0]
    check_latents(table.path, networks, example)
    control = make_config(config, unet.config, example)
    network, parts, start = make_control(
        control, unet, pet, CHAIN, example["latent"].shape[:3], config.image_loss, from_unet=config.init_from_unet,
        remat_decoder=config.remat_decoder, dtype=config.train.dtype,
    )  # fmt: skip
    notes = tuple(line for one in networks.values() for line in one.report.remarks)
    log = begin(folder, notes, tensorboard=config.train.loop.tensorboard)
    pairs = count_records(data)
    log.say(f"{pairs['train']:,} pairs to train on, {pairs['held out']:,} held out.")
    clock.lap("read")
    loss = partial(control_loss, parts, config.image_loss)
    score = score_singly(loss)
    state = run_training(config.train, network, loss, data, folder=folder, log=log, start=start, score=score)
    params = whole(selected(config.train, data, folder, state), config.train)
    clock.lap("train, compilation included")
    first_only(lambda: write_networks(folder.outputs / "models", networks, control, params), "networks")
    own, other = compare_condition(score, params, data, "condition", config.train.seed + 2)
    clock.lap("score")
    trained = (params["controlnet"], params["decoder"] if has_images else {})
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    finish(folder, asked, Summary(pairs, size, own, other, notes), clock, page)


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Return the configuration with everything that is missing made of phantoms, by the stages before this one."""
    if config.data.manifest is not None or not config.data.synthetic:
        return config
    given = [name for name in ("pet", "unet", "mri") if getattr(config.weights, name) is not None]
    if given:
        advice = f"give it, or leave --weights.{given[0]} out"
        raise InputError("data.manifest", "the table of latents that belongs to the networks", "nothing", advice)
    data = find_latents(config.data, folder, config.train.seed)
    assert data.manifest is not None
    why = "No U-Net of latents is given: a tiny one is trained."
    unet = nested_run(folder, "cocolit train-diffusion", {"data.manifest": data.manifest}, begin(folder), why)
    inner = data.manifest.parent.parent / "inputs"
    weights = NetworkPlaces(inner / "autoencoder_suvr", unet.path, inner / "autoencoder_mri")
    return dataclasses.replace(config, data=data, weights=weights)


def read_networks(config: Config) -> dict[str, Published]:
    """Read the networks, by what they are: pet, unet, and mri where it is given.

    Raises:
        InputError: One is not told, is another network, or does not fit the others.
    """
    places = {"pet": config.weights.pet, "unet": config.weights.unet}
    places |= {} if config.weights.mri is None else {"mri": config.weights.mri}
    found = {name: read_network(name, place) for name, place in places.items()}
    pet, unet = found["pet"].config, found["unet"].config
    if (unet.channels, unet.outputs) != (pet.latent_channels,) * 2:
        expected = f"{pet.latent_channels} channels in and out, as latents of {places['pet']}"
        raise InputError(
            places["unet"], expected, f"{unet.channels} and {unet.outputs}", "give networks of one training"
        )
    return found


def check_latents(where: Path, networks: Mapping[str, Published], example: Mapping[str, Any]) -> None:
    """Refuse latents of other sizes than the networks'.

    Raises:
        InputError: Channels or sizes differ.
    """
    pet, unet, latent = networks["pet"], networks["unet"].config, example["latent"]
    if latent.shape[-1] != unet.channels:
        raise InputError(where, f"latents of {unet.channels} channels, as the U-Net has", f"{latent.shape[-1]}")
    if latent.shape[:3] != example["condition"].shape[:3]:
        raise InputError(where, f"latents of one size, {latent.shape[:3]}", f"{example['mri'].shape[:3]} of the MRI")
    if "image" in example:
        inner = [length // pet.config.divisor for length in example["image"].shape[:3]]
        padded = tuple(-(-length // unet.divisor) * unet.divisor for length in inner)
        if padded != latent.shape[:3]:
            advice = "give the autoencoder that they were encoded by"
            raise InputError("weights.pet", f"latents of {latent.shape[:3]}, padded", f"{padded}", advice)


def make_config(config: Config, unet: LatentUnetConfig, example: Mapping[str, Any]) -> ControlNetConfig:
    """Return the sizes of the ControlNet of a U-Net."""
    return ControlNetConfig(unet, example["condition"].shape[-1], config.condition_widths or (unet.widths[0],))


def write_networks(folder: Path, networks: Mapping[str, Published], control: ControlNetConfig, params: Params) -> None:
    """Write all networks under their released names, as translate takes them by --weights.folder."""
    pet = dataclasses.replace(networks["pet"], params={**networks["pet"].params, **params["decoder"]})
    for name, network in {**networks, "pet": pet}.items():
        export_parameters(folder / RELEASED[name], network.params, published_record(network))
    record: dict[str, Any] = {"family": cocolit.NAME, "kind": "controlnet", "config": to_record(control)}
    record["preprocess"] = to_record(networks["unet"].preprocess)
    record["licence"] = networks["unet"].report.licence
    export_parameters(folder / RELEASED["controlnet"], params["controlnet"], record)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the losses, and whether the MRI counts."""
    summary, lines = run.summary, read_metrics(run.path)
    figure = loss_figure(
        lines,
        {"noise, training": "noise_error", "noise, held out": "evaluation/noise_error",
         "image, training": "image_error", "image, held out": "evaluation/image_error"},
        "Mean squared error of the expected noise, and weighted mean absolute error of the decoded image.",
    )  # fmt: skip
    reading = (
        "All networks are in outputs/models under their released names; translate takes the folder as "
        "--weights.folder (and --weights.mri, where the autoencoder of MRI was not given here).",
        "The loss is flat for long before a ControlNet begins to listen, and then falls at once. Whether it listens "
        "shows in the loss with the MRI of another subject, at the same times and noise: as long as it equals that "
        "with the own one, train on.",
        SOURCE,
    )
    tiles = [
        ("Pairs", summary.pairs["train"], f"{summary.pairs['held out']} held out"),
        ("Trained parameters", f"{summary.parameters:,}", ""),
        ("Loss", f"{summary.own:.4g}", "with the own MRI"),
    ]
    if summary.other is not None:
        tiles.append(("Loss", f"{summary.other:.4g}", "with that of another subject"))
    sections = [
        Section("Notes", [Note(text) for text in summary.notes]),
        Section("Training", [figure]),
        Section("How to read this", [Text(reading)]),
    ]
    return Page("CoCoLIT ControlNet", "A ControlNet of MRI latents, and the decoder of SUVR maps", tiles, sections)

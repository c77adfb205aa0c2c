"""CoCoLIT encode: the latents of all pairs, as files that the later stages train on."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Seed, checked
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import Table, resolve_paths, write_table
from jaxmed.models.autoencoder_kl import autoencoder
from jaxmed.models.published.load import Published
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, map_images
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report import page as report
from jaxmed.report.page import Note, Section, Text
from jaxmed.systems.cocolit.training import (
    COLUMNS,
    LATENT_COLUMNS,
    SOURCE,
    PairData,
    find_pairs,
    read_network,
)
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True
NETWORKS = {"mri": "mri", "suvr": "pet"}
"""Field of the autoencoder of each modality."""
FAR = 0.05
"""Share of entries beyond -1 and 1 from which the clipping of the released sampler is warned of."""


@dataclasses.dataclass(frozen=True)
@checked
class AutoencoderPlaces:
    """Where the autoencoders are.

    Attributes:
        mri: That of MRI: a run of train-autoencoder, or weights.
        pet: That of SUVR maps.
    """

    mri: Path | None = None
    pet: Path | None = None


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Latents of pairs: the mean, without noise, not scaled.

    Attributes:
        data: The pairs.
        weights: The autoencoders, each with how its images are prepared.
        dtype: Type of the networks' products.
        seed: Seed of who is held out where the table has no column split, and of what is synthetic.
    """

    data: PairData = PairData()
    weights: AutoencoderPlaces = AutoencoderPlaces()
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0


def paper() -> Config:
    """Any pairs and autoencoders; two passes of the encoder for each pair."""
    return Config()


def smoke() -> Config:
    """Phantom pairs, and tiny autoencoders that are trained first."""
    return Config(PairData(synthetic=8))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A pair that is encoded; outputs/NAME.json.

    Attributes:
        name: Of its files.
        path: The MRI.
        notes: What is unexpected about it.
        mean: Mean of the latent, by modality.
        std: Its standard deviation.
        beyond: Share of its entries beyond -1 and 1.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    mean: dict[str, float]
    std: dict[str, float]
    beyond: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many pairs of each split, how many failed, moments of latents by modality, and what a user should know."""

    pairs: dict[str, int]
    failed: int
    latents: dict[str, dict[str, float]]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> int:
    """Read the table and the autoencoders, encode pair by pair, write the table of latents. Returns 1 on failures."""
    clock = Clock()
    table = find_pairs(config.data, folder, config.seed, tuple(COLUMNS.values()))
    networks = find_autoencoders(config, folder, table)
    log = begin(folder)
    files = {modality: resolve_paths(table, column) for modality, column in COLUMNS.items()}
    names = [f"{row:05d}" for row in range(len(table))]
    inputs = [
        Inputs(name, ScanFiles(files["mri"][row]), {"suvr": files["suvr"][row]}) for row, name in enumerate(names)
    ]
    encoders = {modality: make_encoder(network, config.dtype) for modality, network in networks.items()}
    image = jax.ShapeDtypeStruct((*networks["mri"].preprocess.volume_size, 1), jnp.float32)
    announce(
        log, "Encoding", params=[one.params for one in networks.values()], batch=image, count=2 * len(inputs),
        unit="images", smaller=folder.smaller,
    )  # fmt: skip
    clock.lap("read")

    def work(number: int, one: Inputs, tell: Tell) -> Encoded:
        numbers: dict[str, dict[str, float]] = {"mean": {}, "std": {}, "beyond": {}}
        for modality, encode in encoders.items():
            tell(f"{one.name}: {modality}")
            latent = encode(files[modality][number])
            write_npz(folder.outputs / modality / f"{one.name}.npz", {"data": latent})
            found = {"mean": latent.mean(), "std": latent.std(), "beyond": np.mean(np.abs(latent) > 1)}
            for name, value in found.items():
                numbers[name][modality] = float(value)
        return Encoded(one.name, str(one.path), (), **numbers)

    done, failed = map_images(
        inputs, work, Encoded, folder.outputs, log, "Encoding", lambda row: {"std": row.std["suvr"]}
    )
    clock.lap("encode, compilation included")
    write_latents(folder.outputs / "latents.csv", table, files, [row.name for row in done])
    kept = {row.name for row in done}
    splits = [split for name, split in zip(names, table.column("split"), strict=True) if name in kept]
    latents = {modality: moments(done, modality) for modality in COLUMNS}
    notes = tuple(
        f"{numbers['beyond']:.0%} of the entries of {modality} latents lie beyond -1 and 1, where the released sampler "
        "clips: translate with --no-clip, and compare."
        for modality, numbers in latents.items()
        if modality == "suvr" and numbers["beyond"] > FAR
    )
    for note in notes:
        log.say(f"Note: {note}")
    pairs = {split: splits.count(split) for split in dict.fromkeys(splits)}
    finish(folder, config, Summary(pairs, failed, latents, notes), clock, page)
    return 1 if failed else 0


def find_autoencoders(config: Config, folder: RunFolder, table: Table) -> dict[str, Published]:
    """Read both autoencoders; train tiny ones on the same phantoms where none are given.

    Raises:
        InputError: One is not told, or they do not fit one another.
    """
    places = {modality: getattr(config.weights, name) for modality, name in NETWORKS.items()}
    if config.data.synthetic and config.data.manifest is None and not any(places.values()):
        log = begin(folder)
        for modality in places:
            changes = {"data.manifest": table.path, "modality": modality}
            why = f"No autoencoder of {modality} is given: a tiny one is trained."
            name = f"autoencoder_{modality}"
            places[modality] = nested_run(folder, "cocolit train-autoencoder", changes, log, why, place=name).path
    found = {modality: read_network(NETWORKS[modality], place) for modality, place in places.items()}
    for what, of in (
        ("voxel size in mm", lambda one: one.preprocess.spacing),
        ("size", lambda one: one.preprocess.size),
    ):
        if of(found["mri"]) != of(found["suvr"]):
            raise InputError("weights.pet", f"the {what} of weights.mri, {of(found['mri'])}", f"{of(found['suvr'])}")
    return found


def make_encoder(network: Published, dtype: Any) -> Callable[[Path], np.ndarray]:
    """Return the function from a file to its latent, [channel, i, j, k]; compiled once."""
    model = autoencoder(dataclasses.replace(network.config, dtype=dtype, remat=False))
    encode = jax.jit(lambda params, image: model.encode(params, image[None])[0][0])

    def read(path: Path) -> np.ndarray:
        latent = np.asarray(encode(network.params, network.preprocess(path)), np.float32)
        if not np.isfinite(latent).all():
            raise InputError(path, "a finite latent", "NaN or Inf", "check the weights, or --dtype")
        return np.moveaxis(latent, -1, 0)

    return read


def moments(done: tuple[Encoded, ...], modality: str) -> dict[str, float]:
    """Return mean, deviation and share beyond -1 and 1 of all latents together."""
    mean = np.array([row.mean[modality] for row in done])
    square = np.array([row.std[modality] for row in done]) ** 2 + mean**2
    beyond = float(np.mean([row.beyond[modality] for row in done]))
    return {"mean": float(mean.mean()), "std": math.sqrt(square.mean() - mean.mean() ** 2), "beyond": beyond}


def write_latents(path: Path, table: Table, files: dict[str, list[Path]], done: list[str]) -> None:
    """Write the table of pairs with the places of their latents, relative to it."""
    rows = []
    for number, row in enumerate(table.rows):
        name = f"{number:05d}"
        if name in done:
            own = {column: str(files[modality][number].absolute()) for modality, column in COLUMNS.items()}
            latents = {column: f"{modality}/{name}.npz" for modality, column in LATENT_COLUMNS.items()}
            rows.append({**row, **own, **latents})
    write_table(path, tuple(rows[0]), rows)


def page(run: Finished[Config, Summary]) -> Page:
    """Show how many latents there are, and their moments."""
    summary = run.summary
    rows = [(modality, *numbers.values()) for modality, numbers in summary.latents.items()]
    reading = (
        "outputs/latents.csv has the columns of the released code's table, and is what train-diffusion and "
        "train-controlnet take as --data.manifest. A latent is the mean of its distribution, without noise, and is "
        "not scaled: with a deviation far from 1 diffusion learns badly.",
        SOURCE,
    )
    sections = [
        Section("Notes", [Note(text, "warning") for text in summary.notes]),
        Section(
            "Latents", [report.Table(("of", "mean", "deviation", "beyond -1 and 1"), rows, "All latents together.")]
        ),
        Section("How to read this", [Text(reading)]),
    ]
    tiles = [("Pairs", sum(summary.pairs.values()), ", ".join(f"{n} {split}" for split, n in summary.pairs.items()))]
    tiles.append(("Failed", summary.failed, "see outputs/failed.csv" if summary.failed else ""))
    return Page("CoCoLIT latents", "Latents of MRI and SUVR maps", tiles, sections)

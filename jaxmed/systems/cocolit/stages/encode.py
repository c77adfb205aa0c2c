"""CoCoLIT encode: the latents of all pairs, as files that the later stages train on."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxmed.config import Seed, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import Table, resolve_paths
from jaxmed.models.published.load import Published
from jaxmed.recipes.latent_tables import encode_pairs, moments_table, pooled_moments, write_latents
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.page import Note, Section, Text
from jaxmed.systems.cocolit.networks import read_network
from jaxmed.systems.cocolit.training import COLUMNS, LATENT_COLUMNS, SOURCE, PairData, find_pairs
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
    clock.lap("read")
    done, failed = encode_pairs(networks, files, folder.outputs, log, config.dtype, folder.smaller)
    clock.lap("encode, compilation included")
    write_latents(folder.outputs / "latents.csv", table, files, COLUMNS, LATENT_COLUMNS, done)
    splits = [table.column("split")[int(row.name)] for row in done]
    latents = {modality: pooled_moments(done, modality) for modality in COLUMNS}
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


def page(run: Finished[Config, Summary]) -> Page:
    """Show how many latents there are, and their moments."""
    summary = run.summary
    reading = (
        "outputs/latents.csv has the columns of the released code's table, and is what train-diffusion and "
        "train-controlnet take as --data.manifest. A latent is the mean of its distribution, without noise, and is "
        "not scaled: with a deviation far from 1 diffusion learns badly.",
        SOURCE,
    )
    sections = [
        Section("Notes", [Note(text, "warning") for text in summary.notes]),
        Section("Latents", [moments_table(summary.latents)]),
        Section("How to read this", [Text(reading)]),
    ]
    tiles = [("Pairs", sum(summary.pairs.values()), ", ".join(f"{n} {split}" for split, n in summary.pairs.items()))]
    tiles.append(("Failed", summary.failed, "see outputs/failed.csv" if summary.failed else ""))
    return Page("CoCoLIT latents", "Latents of MRI and SUVR maps", tiles, sections)

"""TANGERINE embed: features of every scan, as CSV and NPZ."""

import dataclasses
from functools import partial

from jaxmed.config import checked
from jaxmed.data.preprocess import FileAxes
from jaxmed.models.published.load import load_published
from jaxmed.recipes.embed_stage import EmbedConfig, EmbedFlags, Summary, embed_page, run_embed
from jaxmed.recipes.encoder_calls import view
from jaxmed.recipes.map_files import BatchConfig
from jaxmed.recipes.scan_job import ScanData, ScansConfig
from jaxmed.recipes.stage import Finished, Page, nested_run
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.adaptation import SMALL_SHAPE, SOURCE, load_weights
from jaxmed.systems.tangerine.embedding import describe
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Features of scans.

    Attributes:
        embed: What is asked of the scans.
        preprocess: How the files' axes lie, where it is not as the weights expect.
    """

    embed: EmbedFlags = EmbedConfig()
    preprocess: FileAxes = FileAxes()


def paper() -> Config:
    """Both features of the released code (class and pooled, concatenated), in bfloat16 on all devices."""
    return Config(EmbedConfig(ScansConfig(batch=BatchConfig(16, 8), mesh=MeshConfig(), dtype="bfloat16")))


def smoke() -> Config:
    """A tiny model, in seconds: your scans or phantom chests, your weights or some pre-trained on the spot."""
    return Config(EmbedConfig(ScansConfig(ScanData(synthetic=12)), ("class", "pooled", "concat", "pre_logits")))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, embed every scan, write tables, picture and report. Returns 1 when scans failed."""
    scans, notes = with_synthetic(config.embed.scans, folder)
    load = partial(load_weights, config.preprocess)
    return run_embed(config, config.embed, scans, load, view, describe, page, folder, notes)


def with_synthetic(scans: ScansConfig, folder: RunFolder) -> tuple[ScansConfig, list[str]]:
    """Write phantom chests where no scans are given; where no weights are, pre-train a tiny model on such chests."""
    if not scans.needs_synthetic():
        return scans, []
    given, seed = scans.weights, scans.seed
    shape = SMALL_SHAPE if given is None else load_published(given, "tangerine").preprocess.volume_size
    start(folder)
    manifest = write_chest_cohort(folder.path / "inputs", seed, scans.data.synthetic, shape)
    note = "No weights were given: the features are those of a tiny model of phantom chests, and mean nothing."
    if scans.is_synthetic:
        scans = dataclasses.replace(scans, data=dataclasses.replace(scans.data, manifest=manifest))
        note = "Chests are phantoms, and the model is a tiny one that was pre-trained on some of them for this run."
    if given is not None:
        return scans, []
    # Without held-out chests nothing but the training step has to be compiled.
    changes = {"data.validation": 0.0, "data.synthetic": 0, "input": manifest.parent / "scans"}
    nested = nested_run(
        folder, "tangerine pretrain", changes | {"train.epochs": 10, "train.seed": seed},
        Log(folder.path, folder.options.quiet), "Pre-training a tiny model on the synthetic chests first.",
    )  # fmt: skip
    return dataclasses.replace(scans, weights=nested.outputs / "model"), [note]


def page(run: Finished[Config, Summary]) -> Page:
    """Show scans side by side, and who is next to whom."""
    return embed_page(run, "TANGERINE features", SOURCE)

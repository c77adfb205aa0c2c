"""RETFound embed: features of every image, as CSV and NPZ."""

import dataclasses
from functools import partial

from jaxmed.config import checked
from jaxmed.recipes.embed_stage import EmbedConfig, EmbedFlags, Summary, embed_page, run_embed
from jaxmed.recipes.encoder_calls import view
from jaxmed.recipes.map_files import BatchConfig
from jaxmed.recipes.scan_job import ScanData, ScansConfig
from jaxmed.recipes.stage import Finished, Page
from jaxmed.systems.retfound.adaptation import SOURCE, GivenFlags, WeightsInput, load_weights, scans_with_synthetic
from jaxmed.systems.retfound.embedding import describe
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Features of images.

    Attributes:
        embed: What is asked of the images.
        given: Size of the images, and how pictures become the input.
    """

    embed: EmbedFlags = EmbedConfig(kinds=("pre_logits", "pooled"))
    given: GivenFlags = WeightsInput()


def paper() -> Config:
    """The normalised class token and the mean of the patch tokens at 224, in bfloat16 on all devices."""
    scans = ScansConfig(batch=BatchConfig(64, 8), mesh=MeshConfig(), dtype="bfloat16")
    return Config(EmbedConfig(scans, ("pre_logits", "pooled")))


def smoke() -> Config:
    """A tiny model, in seconds: your images or phantom eyes, your weights or some pre-trained on the spot."""
    return Config(EmbedConfig(ScansConfig(ScanData(synthetic=16)), ("class", "pooled", "concat", "pre_logits")))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, embed every image, write tables, picture and report. Returns 1 when images failed."""
    scans, notes = scans_with_synthetic(config.embed.scans, folder)
    load = partial(load_weights, config.given)
    return run_embed(config, config.embed, scans, load, view, describe, page, folder, notes)


def page(run: Finished[Config, Summary]) -> Page:
    """Show images side by side, and who is next to whom."""
    return embed_page(run, "RETFound study: features", SOURCE)

"""What both training stages share: embedded brains, files read and cut, the device's side of a record, the summary."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32

from jaxmed.arrays.types import Params
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_guided import GuidedUnetConfig
from jaxmed.synthesis.phantoms.brain import BrainConfig
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.dynamicdps.reading import AXES, FrameConfig
from jaxmed.systems.dynamicdps.records import DataConfig, ImageMaker, ImageSource, Listed, list_files, read_images
from jaxmed.systems.dynamicdps.synthetic import SyntheticConfig
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary
from jaxmed.versions import software_versions
from jaxmed.volume import Volume


class Images(NamedTuple):
    """What a run is trained on.

    Attributes:
        training: Images in memory.
        held_out: Those of other subjects; None for none.
        counts: Files and images by split and kind, in words' order.
        notes: What a user should know about the files.
    """

    training: ImageSource
    held_out: ImageSource | None
    counts: dict[str, int]
    notes: tuple[str, ...] = ()


def read_training_images(
    data: DataConfig,
    place: Path | None,
    frame: FrameConfig,
    folder: RunFolder,
    seed: int,
    threads: int,
    series: str = "",
    fill: float | None = None,
) -> Images:
    """Read all images of a run, embedded or from files; the run folder is begun once they are known to be good.

    Raises:
        InputError: For whatever is wrong with a table or a file.
    """
    is_synthetic = data.embedded > 0 and not (data.manifest or data.labels or place)
    if is_synthetic:
        data = _write_embedded(data, frame, folder, seed)
        place = None
    listed = list_files(data, place, seed, series)
    training = read_images(listed, "train", data, frame, threads, fill)
    held_out = read_images(listed, "validation", data, frame, threads, fill)
    assert training is not None
    if is_first():
        start(folder)
    wait_for_first("folder")
    return Images(training, held_out, _count(listed, training, held_out), listed.notes)


def _write_embedded(data: DataConfig, frame: FrameConfig, folder: RunFolder, seed: int) -> DataConfig:
    place = folder.path / "inputs"
    if is_first():
        start(folder)
        # Real heads fill their field of view; so that the scale is the same, phantoms have no lesions here.
        config = BrainConfig(lesion_probability=0.0)
        write_brain_cohort(place, seed, data.embedded, frame.size, config, fractions=(0.8, 0.2, 0.0))
    wait_for_first("inputs")
    return dataclasses.replace(data, manifest=place / "scans.csv")


def _count(listed: Listed, training: ImageSource, held_out: ImageSource | None) -> dict[str, int]:
    counts = {}
    for split in ("train", "validation"):
        counts |= {f"{split} scans": listed.count(split, "image"), f"{split} label maps": listed.count(split, "labels")}
    counts |= {"train images": len(training), "validation images": 0 if held_out is None else len(held_out)}
    return counts


def tell(log: Log, images: Images) -> None:
    """Say what is trained on."""
    for note in images.notes:
        log.say(f"Note: {note}")
    counts = images.counts
    for split, words in (("train", "to train on"), ("validation", "held out")):
        log.say(
            f"{counts[f'{split} images']:,} images {words}, of {counts[f'{split} scans']} scans "
            f"and {counts[f'{split} label maps']} label maps."
        )


def image_maker(
    images: Images, data: DataConfig, synthetic: SyntheticConfig, frame: FrameConfig, flip: float
) -> ImageMaker:
    """Return how the records of a run become images: left and right are x, which sagittal slices do not have."""
    axis = None if frame.is_sliced and AXES[frame.axis] == 0 else 0
    has_labels = any(source is not None and source.has_labels for source in (images.training, images.held_out))
    return ImageMaker(synthetic if has_labels else None, data.finer, axis, flip)


def read_start(path: Path | None, config: GuidedUnetConfig) -> tuple[Params | None, dict[str, Any]]:
    """Read parameters to start from, and where they come from for the record of what is made of them.

    Returns:
        Parameters and {"licence": ..., "notes": [...]}, notes where there are any; None and nothing without a path.

    Raises:
        InputError: They are of another network.
    """
    if path is None:
        return None, {}
    published = load_published(path)
    found = published.config
    if not isinstance(found, GuidedUnetConfig):
        raise InputError(path, "weights of a U-Net", f"a {published.report.kind}", "leave --weights out")
    # How a network is run does not count, nor what only training asks.
    same = dataclasses.replace(
        found, dtype=config.dtype, remat=config.remat, attention=config.attention, dropout=config.dropout
    )
    names = [f.name for f in dataclasses.fields(config) if getattr(same, f.name) != getattr(config, f.name)]
    if names:
        expected = f"a network with {names[0]} {getattr(config, names[0])}"
        raise InputError(path, expected, f"{getattr(same, names[0])}", f"set --model.{names[0].replace('_', '-')}")
    notes = list(published.report.remarks)
    return published.params, {"licence": published.report.licence} | ({"notes": notes} if notes else {})


def write_images(folder: Path, name: str, images: Float32[np.ndarray, "image ..."], definition: str) -> None:
    """Write images as one NIfTI (slices side by side along z, volumes one file each) with a sidecar."""
    sidecar = {
        "definition": definition,
        "unit": "1",
        "constants": {"background": 0, "range": [0, 2]},
        "axes": "x, y and number of the image" if images.ndim == 3 else "x, y, z in RAS+ order",
        "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
    }
    stacks = {name: np.moveaxis(images, 0, 2)} if images.ndim == 3 else {f"{name}_{i}": v for i, v in enumerate(images)}
    for stem, array in stacks.items():
        nifti.write(folder / f"{stem}.nii.gz", Volume.make(np.asarray(array, np.float32), np.eye(4)))
        write_json(folder / f"{stem}.json", sidecar)


def write_training_summary(folder: RunFolder, stage: str, images: Images, params: Params, **further: Any) -> None:
    """Write outputs/summary.json, of which the report is made."""
    summary = {
        "counts": images.counts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed dynamicdps {stage} --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
    }
    write_summary(folder, summary | further)


def is_first() -> bool:
    """Tell whether this is the one process of several that writes."""
    return jax.process_index() == 0


def wait_for_first(what: str) -> None:
    """Wait until the first process, and every other, has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)

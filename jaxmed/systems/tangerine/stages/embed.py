"""TANGERINE embed: features of every scan, as CSV and NPZ."""

import csv
import dataclasses
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32

from jaxmed.config import Number, Seed, checked, to_record
from jaxmed.data.preprocess import FileAxes
from jaxmed.data.scans import Record, find_records
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, write_json
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.vit import SHARDING_RULES
from jaxmed.recipes.map_files import (
    Arrays,
    BatchConfig,
    BatchModel,
    Input,
    Outcome,
    clear_batches,
    make_batch_mesh,
    map_batches,
    read_input,
    write_failed,
)
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.embed_page import write_page
from jaxmed.systems.tangerine.embedding import DEFINITIONS, Kind, encoder_with_head, features, with_dtype
from jaxmed.systems.tangerine.feature_space import DUPLICATE, find_neighbours, principal_plane
from jaxmed.systems.tangerine.stages import pretrain
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start, write_summary
from jaxmed.versions import software_versions

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """Which scans are embedded.

    Attributes:
        manifest: CSV with the column path (NIfTI in HU, a DICOM folder, or .npz with an array "volume" in [0, 1]).
            Every further column is carried into the results; label colours the picture.
        split: Only rows of the manifest with this word under split; empty for all.
        embedded: Generate this many phantom chests where no files are given, and a tiny model where no weights are.
    """

    manifest: Path | None = None
    split: str = ""
    embedded: Number = 0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Features of chest CTs.

    Attributes:
        data: Scans listed in a table.
        input: A file, a DICOM folder, or a folder of such, instead of a table.
        weights: Published or own weights: a masked autoencoder or a classifier.
        kinds: class (1024 numbers of the published model), pooled (1024), concat (2048), pre_logits (2048).
        preprocess: How the files' axes lie, where it is not as the weights expect.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity in HU of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are
            refused.
        batch: Scans at a time, and threads that read them.
        mesh: The devices; by default one.
        dtype: Of the matrix products.
        seed: Of the embedded chests; embedding itself draws nothing.
    """

    data: DataConfig = DataConfig()
    input: Path | None = None
    weights: Path | None = None
    kinds: tuple[Kind, ...] = ("concat",)
    preprocess: FileAxes = FileAxes()
    series: str = ""
    fill: float | None = None
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: expected one or more, each once, found {' '.join(self.kinds) or 'none'}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded > 0 and self.data.manifest is None and self.input is None


def paper() -> Config:
    """Both features of the released code (class and pooled, concatenated), in bfloat16 on all devices."""
    return Config(batch=BatchConfig(16, 8), mesh=MeshConfig(), dtype="bfloat16")


def smoke() -> Config:
    """A tiny model, in seconds: your scans or phantom chests, your weights or some pre-trained on the spot."""
    return Config(data=DataConfig(embedded=12), kinds=("class", "pooled", "concat", "pre_logits"))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, embed every scan, write tables, picture and report. Returns 1 when scans failed."""
    began = time.monotonic()
    notes: list[str] = []
    if not config.is_synthetic:
        find_records(config.data.manifest, config.input, config.data.split)
    if config.is_synthetic or (config.data.embedded and config.weights is None):
        config, notes = make_embedded(config, folder)
    records, passed = find_records(config.data.manifest, config.input, config.data.split, config.series, config.fill)
    notes += passed
    if config.weights is None:
        raise InputError("weights", "a file or folder of weights", "nothing", "give --weights, or try --preset smoke")
    published = load_published(config.weights, "tangerine")
    preprocess = config.preprocess.apply(published.preprocess)
    mesh = make_batch_mesh(config.batch, config.mesh)
    if len(records) == 1:
        preprocess.prepare(records[0].scan)  # a single broken file is a mistake, not a failure among many
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    notes += [*published.report.lines, *kind_notes(published, config.kinds)]
    for note in notes:
        log.say(f"Note: {note}")
    model, params = encoder_with_head(published.config, published.params)
    ready = time.monotonic()
    job = BatchModel(
        partial(read_input, preprocess), partial(features, with_dtype(model, config.dtype)),
        partial(_keep, config.kinds), (*preprocess.size, 1), SHARDING_RULES,
    )  # fmt: skip
    done, failed, warnings = map_batches(records, job, params, config.batch, mesh, folder, log, "Embedding")
    computed = time.monotonic()
    write_embeddings(folder.outputs, done, config.kinds, published)
    space = describe_space(done, main_kind(config.kinds))
    if space:
        write_table(folder.outputs / "neighbours.csv", list(space["neighbours"][0]), space["neighbours"])
        write_table(folder.outputs / "plane.csv", list(space["plane"][0]), space["plane"])
    write_failed(folder.outputs, failed)
    summary = {
        "scans": len(done),
        "failed": len(failed),
        "lengths": {kind: int(done[0].arrays[kind].shape[0]) for kind in config.kinds} if done else {},
        "kind": main_kind(config.kinds),
        "explained": space.get("explained"),
        "agreement": space.get("agreement"),
        "notes": notes,
        "warnings": warnings,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine embed --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "embed, compilation included": computed - ready},
    }
    write_summary(folder, summary)
    clear_batches(folder, failed)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def make_embedded(config: Config, folder: RunFolder) -> tuple[Config, list[str]]:
    """Write phantom chests where no scans are given; where no weights are, pre-train a tiny model on such chests."""
    published = None if config.weights is None else load_published(config.weights, "tangerine")
    shape = (32, 32, 32) if published is None else published.preprocess.volume_size
    start(folder)
    manifest = write_chest_cohort(folder.path / "inputs", config.seed, config.data.embedded, shape)
    is_synthetic = config.is_synthetic
    if is_synthetic:
        config = dataclasses.replace(config, data=DataConfig(manifest=manifest, split=config.data.split))
    if published is not None:
        return config, []
    # Without held-out chests nothing but the training step has to be compiled.
    settings = dataclasses.replace(
        pretrain.smoke(), data=pretrain.DataConfig(validation=0.0), input=manifest.parent / "scans", epochs=10,
        seed=config.seed,
    )  # fmt: skip
    options = RunOptions(folder.path / "inputs" / "pretrain", quiet=True)
    nested = open_run("tangerine", "pretrain", settings, options)
    if nested.status != "complete":
        Log(folder.path, folder.options.quiet).say("Pre-training a tiny model on the embedded chests first.")
        pretrain.run(settings, nested)
    note = "Chests are phantoms, and the model is a tiny one that was pre-trained on some of them for this run."
    if not is_synthetic:
        note = "No weights were given: the features are those of a tiny model of phantom chests, and mean nothing."
    return dataclasses.replace(config, weights=nested.outputs / "model"), [note]


def kind_notes(published: Published, kinds: tuple[Kind, ...]) -> list[str]:
    """Say what the features of a masked autoencoder are not."""
    if published.report.kind != "mae":
        return []
    notes = ["The whole volume goes in, nothing hidden; the final norm of pre-training is not applied."]
    if set(kinds) & {"class", "concat", "pre_logits"}:
        notes.append(
            "No loss trains the class token of a masked autoencoder: half of concat is what it happens to hold."
        )
    if "pre_logits" in kinds:
        notes.append("The layer norm of pre_logits is at its start: it standardises each scan's features, no more.")
    return notes


def write_embeddings(folder: Path, done: list[Outcome], kinds: tuple[Kind, ...], published: Published) -> None:
    """Write embeddings.csv (a row per scan), embeddings.npz (an array per kind) and what they are."""
    further = list(dict.fromkeys(name for outcome in done for name in outcome.file.row if name != "path"))
    further = [name for name in further if name not in ("id", "warnings")]
    arrays = {kind: np.array([outcome.arrays[kind] for outcome in done], np.float32) for kind in kinds}
    columns = [f"{kind}_{place}" for kind in kinds if done for place in range(arrays[kind].shape[1])]
    # Row by row: 100,000 scans of 2048 features are not held as text.
    with (
        atomic_path(folder / "embeddings.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "id", *further, "warnings", *columns])
        for place, outcome in enumerate(done):
            record = outcome.file
            numbers = [f"{value:.9g}" for kind in kinds for value in arrays[kind][place].tolist()]
            cells = [record.row.get(name, "") for name in further]
            writer.writerow([record.path, record.name, *cells, "; ".join(outcome.warnings), *numbers])
    texts = {"id": [o.file.name for o in done], "path": [str(o.file.path) for o in done]}
    texts |= {name: [o.file.row.get(name, "") for o in done] for name in further if name not in texts | arrays}
    write_npz(folder / "embeddings.npz", {**arrays, **{name: np.array(values, str) for name, values in texts.items()}})
    write_json(
        folder / "embeddings.json",
        {
            "definition": {kind: DEFINITIONS[kind] for kind in kinds},
            "unit": "1",
            "constants": {"preprocess": to_record(published.preprocess), "model": to_record(published.config)},
            "weights": {"family": published.report.family, "kind": published.report.kind},
            "licence": published.report.licence,
            "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
        },
    )


def main_kind(kinds: tuple[Kind, ...]) -> Kind:
    """Return the kind that picture and neighbours are made of: concat where there is one, else the first."""
    return "concat" if "concat" in kinds else kinds[0]


def describe_space(done: list[Outcome], kind: Kind) -> dict:
    """Return the scans' places in the plane of largest spread, and their neighbours; nothing for one scan."""
    if len(done) < 2:
        return {}
    found: Float32[np.ndarray, "scan feature"] = np.array([outcome.arrays[kind] for outcome in done], np.float32)
    plane, near = principal_plane(found), find_neighbours(found)
    names = [outcome.file.name for outcome in done]
    labels = [outcome.file.row.get("label", "") for outcome in done]
    rows = [
        {
            "id": name,
            "nearest": names[int(other)],
            "relative_distance": float(f"{distance:.6g}"),
            "near_duplicate": int(distance < DUPLICATE),
            "label": labels[place],
            "nearest_label": labels[int(other)],
        }
        for place, (name, other, distance) in enumerate(zip(names, near.index, near.distance, strict=True))
    ]
    places = [
        {"id": name, "label": label, "first": float(f"{x:.6g}"), "second": float(f"{y:.6g}")}
        for name, label, (x, y) in zip(names, labels, plane.places, strict=True)
    ]
    return {
        "plane": places,
        "explained": plane.explained,
        "neighbours": rows,
        "agreement": _agreement(labels, near.index) if all(labels) and len(set(labels)) > 1 else None,
    }


def _agreement(labels: list[str], nearest: np.ndarray) -> dict[str, float]:
    """Return how often the nearest other scan has the same label, and how often any other scan has."""
    words = np.array(labels)
    counts = np.array([(words == word).sum() for word in words])
    return {"nearest": float((words == words[nearest]).mean()), "any": float(((counts - 1) / (len(words) - 1)).mean())}


def _keep(kinds: tuple[Kind, ...], record: Record, scan: Input, arrays: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    return {kind: arrays[kind] for kind in kinds}, ()

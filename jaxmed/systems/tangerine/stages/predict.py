"""TANGERINE predict: probabilities, and a map of what moved them, on the grid of each scan."""

import dataclasses
import math
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.config import Seed, Whole, checked, to_record
from jaxmed.data.intensity import unscale
from jaxmed.data.labels import read_known_targets
from jaxmed.data.preprocess import FileAxes, Preprocess
from jaxmed.data.scans import Record, find_records
from jaxmed.errors import InputError
from jaxmed.files import unique_names, write_json
from jaxmed.io import nifti
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import ScanFiles, kind_of, read_volume
from jaxmed.io.tables import write_table
from jaxmed.metrics.cohort import MEASURES, score_set
from jaxmed.metrics.statistics import Interval
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig
from jaxmed.models.published.load import load_published
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import SHARDING_RULES, VitConfig
from jaxmed.nn.model import make_model
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
from jaxmed.recipes.probe import fit_probe
from jaxmed.report.overlay import cut_slices
from jaxmed.synthesis.phantoms.chest import ChestConfig
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.embedding import features, with_dtype
from jaxmed.systems.tangerine.predict_page import write_page
from jaxmed.systems.tangerine.prediction import Maps, explain, require_classifier, to_grid
from jaxmed.systems.tangerine.stages.embed import DataConfig
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder, start, write_summary
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

MAP_DEFINITION = (
    "Grad-CAM (arXiv:1610.02391): where the patch tokens, as the last block reads them after its first layer norm, "
    "raise the output; each channel weighted by the mean of the output's gradient over the patches, negative sums 0, "
    "interpolated linearly to the grid of the scan"
)
# Of the embedded chests: enough to fit a probe, few enough for seconds.
EMBEDDED_SHAPE = (32, 32, 32)
TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What the outputs of a head mean, for files that do not say it, such as those of the original code.

    Attributes:
        kind: "weights" takes what is stored with the weights. "binary" has one logit, "multiclass" one per class,
            "multilabel" one per label, each its own sigmoid; "regression" values as they come.
        names: Of the outputs, in order; of a binary task the positive class.
    """

    kind: Literal["weights", "binary", "multiclass", "multilabel", "regression"] = "weights"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "weights") != (not self.names):
            raise ValueError(f"names: expected names beside a kind, and only there, found {self.names or 'none'}")
        self.task  # noqa: B018  refuses several names of a binary task

    @property
    def task(self) -> Task | None:
        """The task, where it is set."""
        if self.kind == "weights":
            return None
        number = len(self.names) if self.kind == "regression" else 0
        return Task(self.kind, self.names, (0.0,) * number, (1.0,) * number)


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Where a manifest holds the truth, to score predictions.

    Attributes:
        columns: One for a multi-class task, else one per output, in their order. Where empty, those of the outputs'
            names, or label; without such columns nothing is scored.
    """

    columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Predictions of an adapted classifier or regressor.

    Attributes:
        data: Scans listed in a table; where it has labels, predictions are scored. Of embedded chests the test split
            is predicted.
        input: A file, a DICOM folder, or a folder of such, instead of a table.
        weights: An adapted classifier or regressor, such as RUN/outputs/model of jaxmed tangerine adapt.
        task: What the weights' outputs mean, where their file does not say it.
        label: Columns of the manifest with the truth.
        maps: Which outputs get a map per scan: "top" the one with the highest score, "all" each, "none" none.
        threshold: Probability from which a binary label counts as predicted.
        shown: Scans whose map the report shows.
        preprocess: How the files' axes lie, where it is not as the weights expect.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity in HU of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are
            refused.
        batch: Scans at a time, and threads that read them.
        mesh: The devices; by default one.
        dtype: Of the matrix products.
        seed: Of intervals and of embedded chests.
    """

    data: DataConfig = DataConfig()
    input: Path | None = None
    weights: Path | None = None
    task: TaskConfig = TaskConfig()
    label: LabelConfig = LabelConfig()
    maps: Maps = "top"
    threshold: float = 0.5
    shown: Whole = 4
    preprocess: FileAxes = FileAxes()
    series: str = ""
    fill: float | None = None
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a probability between 0 and 1, found {self.threshold:g}")
        if self.shown < 0:
            raise ValueError(f"shown: expected 0 or more, found {self.shown}")

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.embedded > 0 and self.data.manifest is None and self.input is None


def paper() -> Config:
    """A map of the predicted class of every scan, in bfloat16 on all devices."""
    return Config(batch=BatchConfig(16, 8), mesh=MeshConfig(), dtype="bfloat16")


def smoke() -> Config:
    """In seconds: your scans or phantom chests, your weights or a tiny classifier of emphysema made on the spot."""
    return Config(data=DataConfig(embedded=60), shown=3)


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, predict every scan, write tables, maps and report. Returns 1 when scans failed."""
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
    published = load_published(config.weights, "tangerine", task=config.task.task)
    model, task = require_classifier(published, config.weights)
    targets = read_known_targets([r.row for r in records], task, config.label.columns) if config.data.manifest else None
    preprocess = config.preprocess.apply(published.preprocess)
    mesh = make_batch_mesh(config.batch, config.mesh)
    if len(records) == 1:
        preprocess.prepare(records[0].scan)  # a single broken file is a mistake, not a failure among many
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    notes += published.report.lines
    for note in notes:
        log.say(f"Note: {note}")
    ready = time.monotonic()
    compute = partial(_compute, with_dtype(model, config.dtype), task, config.maps)
    finish = partial(write_maps, folder.outputs / "maps", task, preprocess)
    job = BatchModel(partial(read_input, preprocess), compute, finish, (*preprocess.size, 1), SHARDING_RULES)
    done, failed, warnings = map_batches(records, job, published.params, config.batch, mesh, folder, log, "Predicting")
    computed = time.monotonic()
    write_predictions(folder.outputs / "predictions.csv", done, task, config.threshold)
    previews = write_previews(folder.outputs / "previews", done[: config.shown], config.maps, task, preprocess)
    if targets is not None:
        names = {outcome.file.name for outcome in done}
        targets = targets[[record.name in names for record in records]]
    scores, further = score(done, targets, task, config)
    for note in further:
        log.say(f"Note: {note}")
    write_failed(folder.outputs, failed)
    summary = {
        "scans": len(done),
        "failed": len(failed),
        "task": to_record(task),
        "maps": config.maps,
        "threshold": config.threshold,
        "limits": [*preprocess.intensity.window],
        "scores": scores,
        "previews": previews,
        "notes": notes + further,
        "warnings": warnings,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed tangerine predict --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"read and check": ready - began, "predict and map, compilation included": computed - ready},
    }
    write_summary(folder, summary)
    clear_batches(folder, failed)
    write_page(folder.path)
    return 1 if failed else 0


report = write_page


def make_embedded(config: Config, folder: RunFolder) -> tuple[Config, list[str]]:
    """Write phantom chests where no scans are given; where no weights are, fit a tiny classifier to such chests."""
    published = None if config.weights is None else load_published(config.weights, "tangerine")
    shape = EMBEDDED_SHAPE if published is None else published.preprocess.volume_size
    start(folder)
    manifest = write_chest_cohort(
        folder.path / "inputs", config.seed, config.data.embedded, shape, ChestConfig(severity=(0.7, 1.0)),
        finding="emphysema", fractions=(0.5, 0.2, 0.3),
    )  # fmt: skip
    is_synthetic = config.is_synthetic
    if is_synthetic:
        config = dataclasses.replace(config, data=DataConfig(manifest=manifest, split=config.data.split or "test"))
    if published is not None:
        return config, []
    place = folder.path / "inputs" / "model"
    make_classifier(place, manifest, config.seed)
    note = (
        "Chests are phantoms. The model is a tiny encoder with random weights under a logistic probe, fitted for this "
        "run to the training chests (emphysema or not)."
    )
    if not is_synthetic:
        note = "No weights were given: the model is a tiny classifier of phantom chests; its predictions mean nothing."
    return dataclasses.replace(config, weights=place), [note]


def make_classifier(place: Path, manifest: Path, seed: int) -> None:
    """Fit a logistic probe to the features of an encoder with random weights, and export both as a classifier."""
    model = ClassifierConfig(
        VitConfig(EMBEDDED_SHAPE, (4, 4, 4), width=48, depth=1, heads=2, hidden=96, final_norm=False),
        HeadConfig(norm=False),
    )
    preprocess = dataclasses.replace(PREPROCESS, size=EMBEDDED_SHAPE)
    image = np.zeros((1, *preprocess.size, 1), np.float32)
    params = jax.jit(make_model(Classifier(model)).init)(jax.random.key(seed), image)
    found: dict[str, tuple[Any, Any]] = {}
    for split in ("train", "validation"):
        records, _ = find_records(manifest, None, split)
        cubes = np.stack([preprocess(record.scan) for record in records])
        labels = np.array([[float(record.row["label"])] for record in records])
        found[split] = (np.asarray(features(model, params, cubes)["concat"]), labels)
    probe = fit_probe("binary", *found["train"], *found["validation"], np.ones(1))
    params["head"]["linear"] = {"kernel": probe.kernel, "bias": probe.bias}
    record = {
        "family": "tangerine", "kind": "classifier", "config": to_record(model), "preprocess": to_record(preprocess),
        "task": to_record(Task("binary", ("emphysema",))),
    }  # fmt: skip
    export_parameters(place, params, record)


def write_maps(
    folder: Path, task: Task, preprocess: Preprocess, record: Record, scan: Input, arrays: Arrays
) -> tuple[Arrays, tuple[str, ...]]:
    """Write the maps of one scan on its own grid, each with a sidecar; return its values and what was mapped."""
    warnings = []
    reference = record.path if record.path.name.lower().endswith(nifti.SUFFIXES) else None
    for output, patches in zip(arrays["mapped"].tolist(), arrays["maps"], strict=True):
        name = task.names[output]
        volume = to_grid(patches, preprocess, scan.place)
        stem = folder / map_stem(record.name, task, output)
        nifti.write(stem.with_name(stem.name + ".nii.gz"), volume, reference=reference)
        if not patches.any():
            warnings.append(f"the map of '{name}' is 0 everywhere: no patch raises it")
        sidecar = {
            "definition": MAP_DEFINITION,
            "unit": f"{'standard deviations' if task.kind == 'regression' else 'logits'} a patch, first order",
            "output": name,
            "value": float(arrays["values"][output]),
            "largest": float(volume.array.max()),
            "input": str(record.path),
            "frame": "the model's own axes (slice, row, column)" if scan.place is None else "the scan's own grid",
            "constants": {"preprocess": to_record(preprocess), "patch_grid": list(patches.shape)},
            "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
        }
        write_json(stem.with_name(stem.name + ".json"), sidecar)
    return {"values": arrays["values"], "mapped": arrays["mapped"]}, tuple(warnings)


def map_stem(identity: str, task: Task, output: int) -> str:
    """Return the name of the map of an output of a scan, without suffix."""
    return f"{identity}__{unique_names(task.names)[output]}"


def write_predictions(path: Path, done: list[Outcome], task: Task, threshold: float) -> None:
    """Write a row per scan: where it came from, a column per output, and what that predicts."""
    further = list(dict.fromkeys(name for outcome in done for name in outcome.file.row if name != "path"))
    prefix = "value" if task.kind == "regression" else "probability"
    outputs = [f"{prefix}_{name}" for name in task.names]
    further = [name for name in further if name not in ("id", "warnings", "predicted", *outputs)]
    rows = []
    for outcome in done:
        values = outcome.arrays["values"]
        row: dict[str, object] = {"path": outcome.file.path, "id": outcome.file.name}
        row |= {name: outcome.file.row.get(name, "") for name in further}
        row |= {name: f"{value:.9g}" for name, value in zip(outputs, values.tolist(), strict=True)}
        row["predicted"] = predicted(values, task, threshold)
        row["warnings"] = "; ".join(outcome.warnings)
        rows.append(row)
    write_table(path, ["path", "id", *further, *outputs, "predicted", "warnings"], rows)


def predicted(values: np.ndarray, task: Task, threshold: float) -> str:
    """Put a prediction into a word: 1 or 0, a class, the labels at or above the threshold, or the values."""
    match task.kind:
        case "binary":
            return str(int(values[0] >= threshold))
        case "multiclass":
            return task.names[int(values.argmax())]
        case "multilabel":
            return "; ".join(name for name, value in zip(task.names, values, strict=True) if value >= threshold)
    return "; ".join(f"{value:.6g}" for value in values)


def score(
    outcomes: list[Outcome], targets: np.ndarray | None, task: Task, config: Config
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score predictions against the manifest's labels, each split on its own; where that cannot be, say why."""
    if targets is None:
        return [], []
    rows, notes = [], []
    splits = [outcome.file.row.get("split", "") for outcome in outcomes]
    for split in dict.fromkeys(splits):
        chosen = [n for n, outcome in enumerate(outcomes) if splits[n] == split]
        subjects = np.array([outcomes[n].file.row.get("subject") or outcomes[n].file.name for n in chosen])
        name = f"split {split}" if split else "all scans"
        values = np.array([outcomes[n].arrays["values"] for n in chosen], np.float64).reshape(-1, len(task.names))
        scores, troubles = score_set(
            task, targets[chosen], values, subjects, seed=config.seed, threshold=config.threshold
        )
        rows += [
            {"rows": name, "scans": one.records, "label": one.label, "measure": one.measure, **finite(one.interval)}
            for one in scores
            if one.measure in MEASURES[task.kind]
        ]
        how = "not scored in all" if scores else "not scored"
        notes += [f"Predictions of {name} were {how}: {trouble}" for trouble in troubles]
    if any(split == "train" for split in splits):
        notes.append("The split train may be what the weights were adapted to: its scores say nothing about new scans.")
    return rows, notes


def finite(interval: Interval) -> dict[str, float | None]:
    """Return estimate and ends; a single subject has no interval."""
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def write_previews(
    folder: Path, done: list[Outcome], maps: Maps, task: Task, preprocess: Preprocess
) -> list[dict[str, Any]]:
    """Keep a few slices of the first scans and of their first map, for the report."""
    if maps == "none":
        return []
    previews = []
    for outcome in done:
        task_output = int(outcome.arrays["mapped"][0])
        stem = map_stem(outcome.file.name, task, task_output)
        overlay, scan = (
            nifti.read(folder.parent / "maps" / f"{stem}.nii.gz"),
            read_hounsfield(outcome.file.scan, preprocess),
        )
        if kind_of(outcome.file.path) == "array":  # slice, row, column: turned to lie as one reads
            overlay = Volume.make(np.ascontiguousarray(overlay.array.transpose(2, 1, 0)), np.eye(4))
        slices = cut_slices(scan, overlay)
        name = f"{outcome.file.name}.npz"
        write_npz(folder / name, slices._asdict(), is_compressed=True)
        previews.append(
            {"file": name, "id": outcome.file.name, "output": task_output,
             "values": [float(value) for value in outcome.arrays["values"]]}
        )  # fmt: skip
    return previews


def read_hounsfield(scan: ScanFiles, preprocess: Preprocess) -> Volume:
    """Read a scan to look at; a prepared cube as the HU that it stands for, turned to lie as one reads."""
    if kind_of(scan.path) == "array":
        cube = unscale(preprocess(scan)[..., 0], preprocess.intensity, *preprocess.intensity.window)
        return Volume.make(np.ascontiguousarray(cube.transpose(2, 1, 0)), np.eye(4))
    return read_volume(scan).volume


def _compute(config: ClassifierConfig, task: Task, maps: Maps, params: Params, cubes: Any) -> dict[str, Any]:
    return explain(config, task, maps, params, cubes)._asdict()

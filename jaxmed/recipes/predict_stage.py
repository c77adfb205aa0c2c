"""Probabilities of every scan, and maps of what moved them on the scan's grid: what a predict stage does.

Source: Grad-CAM, arXiv:1610.02391, equations 1 and 2, on what `Encoder.before_last` gives (of a transformer, the tokens
that its last block reads, after its first layer norm): a channel's weight is the mean of the score's gradient over the
places of the grid, and the map is the weighted sum of the channels where that is positive.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.grid import reorient
from jaxmed.arrays.task import Task, predict_values
from jaxmed.arrays.types import Params
from jaxmed.config import Probability, Whole, checked
from jaxmed.data.indicators import known_rows
from jaxmed.data.intensity import unscale
from jaxmed.data.labels import read_known_targets
from jaxmed.data.preprocess import WARMEST_AIR, Preprocess
from jaxmed.data.scans import Record
from jaxmed.data.sequences import find_case
from jaxmed.data.stored import as_pixels
from jaxmed.files import unique_names
from jaxmed.io import nifti
from jaxmed.io.images import read_image
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import ScanFiles, kind_of, read_volume
from jaxmed.io.tables import Table as Rows
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.cohort import HEADLINE, MEASURES, score_set, spell
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import Head, HeadConfig
from jaxmed.models.published.load import Published
from jaxmed.nn.model import make_model
from jaxmed.recipes.adapt_stage import finite, output_names
from jaxmed.recipes.map_files import Arrays, Input, Outcome, clear_batches, map_batches, write_failed
from jaxmed.recipes.quality_range import (
    NOT_COMPARED,
    Scorer,
    Tuned,
    measure_scans,
    quality_columns,
    quality_section,
    read_tuned,
    warn_outside,
)
from jaxmed.recipes.scan_job import (
    SHOWN,
    Model,
    ScansConfig,
    ScansFlags,
    count_scans,
    further_columns,
    open_job,
    trouble_sections,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.token_maps import write_map
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import MapStyle, histograms
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.overlay import PICTURE, Slices, cut_slices, heat_of, overlay_slices, picture_slice
from jaxmed.report.page import Figure, Note, Section, Table, Text, Tile
from jaxmed.report.slices import display_range
from jaxmed.report.viewer import Viewer
from jaxmed.report.volumes import MOST_VOXELS, thin, thinning, view_overlay
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

Maps: TypeAlias = Literal["top", "all", "none"]
MAP_DEFINITION = (
    "Grad-CAM (arXiv:1610.02391): where the patch tokens{as_read} "
    "raise the output; each channel weighted by the mean of the output's gradient over the patches, negative sums 0, "
    "interpolated linearly to the grid of the scan"
)
FEWEST_FOR_HISTOGRAM = 8
MOST_HISTOGRAMS = 12


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
class TruthConfig:
    """Where a manifest holds the truth, to score predictions.

    Attributes:
        columns: One for a multi-class task, else one per output, in their order. Where empty, those of the outputs'
            names, or label; without such columns nothing is scored.
    """

    columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
@checked
class PredictConfig:
    """Predictions of an adapted classifier or regressor.

    Attributes:
        scans: The scans, and how they go through the model; where a manifest has labels, predictions are scored. Of
            synthetic scans the test split is predicted.
        task: What the weights' outputs mean, where their file does not say it.
        label: Columns of the manifest with the truth.
        maps: Which outputs get a map per scan: "top" the one with the highest score, "all" each, "none" none.
        threshold: Probability from which a binary label counts as predicted.
        shown: Scans whose map the report shows.
    """

    scans: ScansFlags = ScansConfig()
    task: TaskConfig = TaskConfig()
    label: TruthConfig = TruthConfig()
    maps: Maps = "top"
    threshold: Probability = 0.5
    shown: Whole = 4


# The type of a stage's field `predict`: on the command line its options carry no prefix.
PredictFlags: TypeAlias = Annotated[PredictConfig, NO_PREFIX]


@dataclasses.dataclass(frozen=True)
class RowScore:
    """A measure of some rows of the manifest, with the ends of its interval where it has one."""

    rows: str
    scans: int
    label: str
    measure: str
    estimate: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Preview:
    """A few slices of a scan and its map: file in outputs/previews, name, mapped output, and all values."""

    file: str
    id: str
    output: int
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a prediction run found.

    Attributes:
        scans: Scans that were predicted.
        failed: Those that could not be.
        task: What the outputs mean.
        maps: Which outputs got a map.
        threshold: From which a label counts as predicted.
        limits: Intensities that became the ends of the model's range, for the pictures.
        scores: Against the manifest's labels.
        previews: For the pictures.
        notes: What a user should know.
        warnings: A scan and what is unexpected about it.
        tuned: Scores of quality that the weights were tuned on, by kind of image; empty where none were kept.
    """

    scans: int
    failed: int
    task: Task
    maps: str
    threshold: float
    limits: tuple[float, float]
    scores: tuple[RowScore, ...]
    previews: tuple[Preview, ...]
    notes: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]
    tuned: dict[str, Tuned] = dataclasses.field(default_factory=dict)


class Explained(NamedTuple):
    """What the device returns for a batch.

    Attributes:
        values: Probabilities, or values of a regression in the unit of the labels; one per name of the task.
        mapped: Which output each map explains.
        maps: On the grid of the tokens.
    """

    values: Float[Array, "batch output"]
    mapped: Int[Array, "batch map"]
    maps: Float[Array, "batch map *grid"]


# One compiled program per model and batch size, whoever calls: a loop over scans in a notebook must not trace each.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def explain(
    encoder: Encoder, head: HeadConfig, task: Task, maps: Maps, params: Params, images: Float[Any, "batch ..."]
) -> Explained:
    """Return values, and Grad-CAM on the grid of the tokens.

    Args:
        encoder: The encoder; static.
        head: The head; static.
        task: What its outputs mean; static.
        maps: Which outputs are explained; static.
        params: {"encoder": ..., "head": ...}.
        images: Prepared scans.
    """
    apply = make_model(Head(head, encoder.prefix)).apply
    rest, seen = encoder.split(params["encoder"], images)
    # The class tokens of earlier blocks, where the head looks at them, do not depend on what is seen here.
    before = []
    if head.layers > 1:
        before = [encoder.tokens(params["encoder"], images, head.layers)[:, : head.layers - 1]]

    def logits_of(seen: Array) -> Array:
        tokens = jnp.concatenate([*before, encoder.join(params["encoder"], rest, seen)], axis=1)
        return apply(params["head"], tokens)[0]

    logits, pull = jax.vjp(logits_of, seen)
    batch, outputs = logits.shape
    match maps:
        case "none":
            mapped = jnp.zeros((0, batch), jnp.int32)
        case "top":
            mapped = jnp.argmax(logits, axis=-1)[None]
        case "all":
            mapped = jnp.broadcast_to(jnp.arange(outputs)[:, None], (outputs, batch))

    def gradcam(chosen: Int[Array, " batch"]) -> Float[Array, "batch *grid"]:
        (gradient,) = pull(jax.nn.one_hot(chosen, outputs, dtype=logits.dtype))
        weights = gradient[:, encoder.prefix :].mean(axis=1, keepdims=True)
        return jax.nn.relu((weights * seen[:, encoder.prefix :]).sum(axis=-1)).reshape(batch, *encoder.grid)

    grids = jax.lax.map(gradcam, mapped) if len(mapped) else jnp.zeros((0, batch, *encoder.grid))
    return Explained(predict_values(logits, task), mapped.T, jnp.moveaxis(grids, 0, 1))


def run_predict(
    config: Any,
    predict: PredictConfig,
    scans: ScansConfig,
    load: Callable[[Path], Published],
    view: Callable[[Published, str], tuple[Model, Task]],
    page: Callable[[Finished[Any, Summary]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
    scorer: Scorer | None = None,
) -> int:
    """Read and check, predict every scan, write tables, maps and report. Returns 1 when scans failed.

    Args:
        config: Configuration of the stage.
        predict: Its part that all systems share.
        scans: Its scans, synthetic ones written where they were asked for.
        load: Reads weights of the system's family, with its preprocessing, whose outputs mean `predict.task`.
        view: Weights and a dtype to an encoder with a head, and what its outputs mean.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
        scorer: Measures the quality of a scan, for a column of its own and a warning where it lies outside what the
            weights were tuned on. None leaves that out.
    """
    clock = Clock()
    job = open_job(scans, load, notes)
    model, task = view(job.published, scans.dtype)
    preprocess, outputs, targets = job.preprocess, folder.outputs, None
    if scans.data.manifest is not None:
        rows = known_rows([record.row for record in job.records], task.names)
        targets = read_known_targets(rows, task, predict.label.columns)
    log = begin(folder, job.notes)
    clock.lap("read and check")
    compute = partial(_compute, model.encoder, model.head, task, predict.maps)
    as_read = ", as the last block reads them after its first layer norm," if model.encoder.before_last else ""
    definition = MAP_DEFINITION.format(as_read=as_read)
    batches = job.batch_model(compute, partial(write_maps, outputs, task, preprocess, definition), model)
    done, failed, warnings = map_batches(
        job.records, batches, model.params, scans.batch, job.mesh, folder, log, "Predicting"
    )
    clock.lap("predict and map, compilation included")
    tuned, measured, told = {}, [], []
    if scorer is not None and scans.weights is not None:
        tuned = read_tuned(scans.weights)
        measured, told = measure_scans([outcome.file.scan for outcome in done], scorer, log)
        done, more = _compare_quality(done, measured, tuned, log)
        warnings = [*warnings, *more]
        if not tuned:
            told.append(NOT_COMPARED)
        clock.lap("measure quality")
    write_predictions(outputs / "predictions.csv", done, task, predict.threshold, quality_columns(measured))
    previews = write_previews(outputs, done[: predict.shown], predict.maps, task, preprocess)
    if targets is not None:
        names = {outcome.file.name for outcome in done}
        targets = targets[[record.name in names for record in job.records]]
    scores, further = score(done, targets, task, predict.threshold, scans.seed)
    further = [*told, *further]
    for note in further:
        log.say(f"Note: {note}")
    write_failed(outputs, failed)
    summary = Summary(
        len(done), len(failed), task, predict.maps, predict.threshold, preprocess.intensity.window, tuple(scores),
        tuple(previews), (*job.notes, *further), tuple(warnings), tuned,
    )  # fmt: skip
    clear_batches(folder, failed)
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def _compare_quality(
    done: Sequence[Outcome], measured: Sequence[Mapping[str, float]], tuned: Mapping[str, Tuned], log: Log
) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """Warn of every scan whose quality lies outside what the weights were tuned on."""
    told = warn_outside([outcome.file.name for outcome in done], measured, tuned, log)
    pairs = [*zip(done, told, strict=True)]
    found = [outcome._replace(warnings=(*outcome.warnings, *lines)) for outcome, lines in pairs]
    return found, [(outcome.file.name, line) for outcome, lines in pairs for line in lines]


def _compute(encoder: Encoder, head: HeadConfig, task: Task, maps: Maps, params: Params, images: Any) -> dict[str, Any]:
    return explain(encoder, head, task, maps, params, images)._asdict()


def write_maps(
    outputs: Path, task: Task, preprocess: Preprocess, definition: str, record: Record, scan: Input, arrays: Arrays
) -> tuple[Arrays, tuple[str, ...]]:
    """Write the maps of one scan on its own grid, each with a sidecar; return its values and what was mapped."""
    warnings = []
    for output, places in zip(arrays["mapped"].tolist(), arrays["maps"], strict=True):
        name = task.names[output]
        told = {
            "definition": definition,
            "unit": f"{'standard deviations' if task.kind == 'regression' else 'logits'} a patch, first order",
            "output": name,
            "value": float(arrays["values"][output]),
        }
        stem = outputs / "maps" / map_stem(record.name, task, output)
        write_map(stem, places, preprocess, record, scan, told)
        if not places.any():
            warnings.append(f"the map of '{name}' is 0 everywhere: no patch raises it")
    return {"values": arrays["values"], "mapped": arrays["mapped"]}, tuple(warnings)


def map_stem(identity: str, task: Task, output: int) -> str:
    """Return the name of the map of an output of a scan, without suffix."""
    return f"{identity}__{unique_names(task.names)[output]}"


def write_predictions(
    path: Path, done: list[Outcome], task: Task, threshold: float, quality: Sequence[Mapping[str, str]] = ()
) -> None:
    """Write a row per scan: where it came from, a column per output, what that predicts, and how good the scan is."""
    outputs, own = output_names(task), list(quality[0]) if quality else []
    further = further_columns([outcome.file for outcome in done], ("predicted", *outputs, *own))
    rows = []
    for number, outcome in enumerate(done):
        values = outcome.arrays["values"]
        row: dict[str, object] = {"path": outcome.file.path, "id": outcome.file.name}
        row |= {name: outcome.file.row.get(name, "") for name in further}
        row |= {name: f"{value:.9g}" for name, value in zip(outputs, values.tolist(), strict=True)}
        row["predicted"] = predicted(values, task, threshold)
        row |= quality[number] if quality else {}
        row["warnings"] = "; ".join(outcome.warnings)
        rows.append(row)
    write_table(path, ["path", "id", *further, *outputs, "predicted", *own, "warnings"], rows)


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
    outcomes: Sequence[Outcome], targets: np.ndarray | None, task: Task, threshold: float, seed: int
) -> tuple[list[RowScore], list[str]]:
    """Score predictions against the manifest's labels, each split on its own; where that cannot be, say why."""
    if targets is None:
        return [], []
    rows: list[RowScore] = []
    notes = []
    splits = [outcome.file.row.get("split", "") for outcome in outcomes]
    for split in dict.fromkeys(splits):
        chosen = [n for n, one in enumerate(splits) if one == split]
        subjects = np.array([outcomes[n].file.row.get("subject") or outcomes[n].file.name for n in chosen])
        name = f"split {split}" if split else "all scans"
        values = np.array([outcomes[n].arrays["values"] for n in chosen], np.float64).reshape(-1, len(task.names))
        scores, troubles = score_set(task, targets[chosen], values, subjects, seed=seed, threshold=threshold)
        rows += [
            RowScore(name, one.records, one.label, one.measure, one.interval.estimate, finite(one.interval.low),
                     finite(one.interval.high))
            for one in scores if one.measure in MEASURES[task.kind]
        ]  # fmt: skip
        how = "not scored in all" if scores else "not scored"
        notes += [f"Predictions of {name} were {how}: {trouble}" for trouble in troubles]
    if "train" in splits:
        notes.append("The split train may be what the weights were adapted to: its scores say nothing about new scans.")
    return rows, notes


def write_previews(
    outputs: Path, done: Sequence[Outcome], maps: Maps, task: Task, preprocess: Preprocess
) -> list[Preview]:
    """Keep a few slices of the first scans and of their first map, for the report; of the first volume all of both.

    All of it is thinned out as far as the report's viewer wants it.
    """
    if maps == "none":
        return []
    previews, is_viewed = [], False
    for outcome in done:
        output = int(outcome.arrays["mapped"][0])
        overlay = nifti.read(outputs / "maps" / f"{map_stem(outcome.file.name, task, output)}.nii.gz")
        if kind_of(outcome.file.path) == "picture":
            pixels = read_image(outcome.file.path, fill=outcome.file.scan.fill)
            slices = picture_slice(pixels, as_pixels(overlay)[0])
        else:
            scan = read_to_show(outcome.file.scan, preprocess)
            if kind_of(outcome.file.path) == "array":
                overlay = _turned(overlay.array)
            slices = cut_slices(scan, overlay)
            if not is_viewed:
                is_viewed, every = True, thinning(scan.array.shape, MOST_VOXELS // 2)
                for what, volume in (("scan", scan), ("map", overlay)):
                    nifti.write(outputs / "previews" / f"{outcome.file.name}_{what}.nii.gz", thin(volume, every))
        name = f"{outcome.file.name}.npz"
        write_npz(outputs / "previews" / name, slices._asdict(), is_compressed=True)
        values = tuple(float(value) for value in outcome.arrays["values"])
        previews.append(Preview(name, outcome.file.name, output, values))
    return previews


def read_to_show(scan: ScanFiles, preprocess: Preprocess) -> Volume:
    """Read a scan to look at; prepared inputs in the unit that they stand for."""
    if kind_of(scan.path) == "array":
        return _turned(unscale(preprocess(scan)[..., 0], preprocess.intensity, *preprocess.intensity.window))
    if preprocess.sequences:
        scan = find_case(scan, preprocess.sequences).scan
    return read_volume(scan).volume


def _turned(cube: np.ndarray) -> Volume:
    """Turn slice, row, column to lie as one reads."""
    return Volume.make(np.ascontiguousarray(cube.transpose(2, 1, 0)), np.eye(4))


# The page ------------------------------------------------------------------------------------------------------------


def predict_page(run: Finished[Any, Summary], title: str, source: str) -> Page:
    """Show predictions.

    Args:
        run: The run.
        title: System and stage.
        source: Whose model it is, and what it is not for.
    """
    summary, task = run.summary, run.summary.task
    sections = [Section("Weights", [Note(text) for text in summary.notes])]
    if summary.scans:
        table = read_table(run.outputs / "predictions.csv")
        sections.append(_predictions_section(table, task, summary))
    if summary.scores:
        sections.append(_scores_section(summary))
    sections += _maps_section(run.outputs, task, summary)
    if summary.scans and any(table.column("quality") if "quality" in table.columns else ()):
        sections.append(quality_section(table, summary.tuned))
    sections += [*trouble_sections(run.outputs, summary.warnings, summary.failed), _reading_section(task, source)]
    subtitle = f"{', '.join(task.names)} ({task.kind}), predicted for {count_scans(summary.scans)}"
    return Page(title, subtitle, _tiles(summary, task), sections)


def _tiles(summary: Summary, task: Task) -> list[Tile]:
    tiles: list[Tile] = [("Scans", summary.scans, f"{summary.failed:,} failed")]
    further = {"multilabel": "auroc", "regression": "correlation"}.get(task.kind)
    for row in summary.scores:
        if row.measure in (HEADLINE[task.kind], further) and row.rows != "split train":
            text = row.rows
            if row.low is not None:
                text = f"95 % interval {row.low:.2f} to {row.high:.2f}, {text}"
            tiles.append((spell(row.measure), round(row.estimate, 3), text))
    return tiles[:5]


def _predictions_section(table: Rows, task: Task, summary: Summary) -> Section:
    outputs = {
        name: np.array(table.floats(column), np.float64)
        for name, column in zip(task.names, output_names(task), strict=True)
    }
    blocks: list[Any] = []
    if len(table) >= FEWEST_FOR_HISTOGRAM:
        shown = dict(list(outputs.items())[:MOST_HISTOGRAMS])
        kind = "Values, in the unit of the labels" if task.kind == "regression" else "Predicted probabilities"
        blocks.append(histograms(shown, caption=f"{kind}, over all scans.", bins=20))
    labelled = "label" in table.columns
    columns = ["Scan", *outputs, "Predicted", *(["Label"] if labelled else [])]
    rows = [
        [row["id"], *(float(values[n]) for values in outputs.values()), row["predicted"],
         *([row["label"]] if labelled else [])]
        for n, row in enumerate(table.rows[:SHOWN])
    ]  # fmt: skip
    caption = "Probabilities." if task.kind != "regression" else "Values, in the unit of the labels."
    if task.kind in ("binary", "multilabel"):
        caption += f" Predicted from {summary.threshold:g} on."
    if len(table) > SHOWN:
        caption += f" The first {SHOWN} of {len(table):,}."
    blocks.append(Table(columns, rows, caption + " outputs/predictions.csv has all."))
    return Section("Predictions", blocks)


def _scores_section(summary: Summary) -> Section:
    rows = [
        (row.rows, row.scans, row.label, spell(row.measure), row.estimate, row.low, row.high) for row in summary.scores
    ]
    caption = "Against the manifest's labels; 95 % intervals by 2000 bootstrap resamples of subjects."
    columns = ("Rows", "Scans", "Of", "Measure", "Estimate", "Low", "High")
    return Section("Against the labels", [Table(columns, rows, caption)])


def _maps_section(outputs: Path, task: Task, summary: Summary) -> list[Section]:
    blocks: list[Any] = []
    panels: list[Panel] = []
    unit = "probability" if task.kind != "regression" else "value"
    for preview in summary.previews:
        name = task.names[preview.output]
        with np.load(outputs / "previews" / preview.file, allow_pickle=False) as stored:
            slices = Slices(
                stored["image"], stored["overlay"], tuple(stored["index"].tolist()), tuple(stored["spacing"].tolist()),
                int(stored["axis"]), float(stored["largest"]),
            )  # fmt: skip
        said = f"{name}, {unit} {preview.values[preview.output]:.3g}"
        if slices.axis == PICTURE:
            said += "" if slices.largest else ", map 0"
            panels += [Panel(slices.image[0], preview.id), Panel(slices.image[0], said, heat=heat_of(slices)[0])]
        else:
            blocks.append(_slices_figure(slices, f"{preview.id}: {said}.", summary.limits))
            blocks += _viewer(outputs, preview.id, f"{preview.id}: the scan, and its map of {said}.", summary.limits)
    if panels:
        caption = (
            "Pictures, and below what is told above each the map of it: clear where it is 0, opaque at its largest."
        )
        alt = f"{len(panels) // 2} pictures, each also under its map."
        blocks.append(mask_panels(panels, columns=4, caption=caption, alt=alt))
    if not blocks:
        return []
    text = (
        "Bright where the image raised the output named (Grad-CAM on the last block's patch tokens). Among the slices "
        "of a volume is the one with the map's largest value. Whole maps, on the grid of each scan, are in "
        "outputs/maps."
    )
    return [Section("What moved them", [Text([text]), *blocks])]


def _slices_figure(slices: Slices, caption: str, limits: tuple[float, float]) -> Figure:
    if not slices.largest:
        caption += " The map is 0 everywhere: no patch raises this output."
    unit, limits = _shown(slices.image, limits)
    return overlay_slices(slices, caption=caption, limits=limits, names=("Scan", "With map"), unit=unit)


def _shown(image: np.ndarray, limits: tuple[float, float]) -> tuple[str, tuple[float, float]]:
    # What is no CT in HU, and was warned of, would be all white in the window of the model.
    if float(image.min()) < WARMEST_AIR:
        return "HU", limits
    return "as stored", display_range(image.reshape(-1).astype(np.float64))


def _viewer(outputs: Path, name: str, caption: str, limits: tuple[float, float]) -> list[Viewer]:
    places = [outputs / "previews" / f"{name}_{what}.nii.gz" for what in ("scan", "map")]
    if not all(place.exists() for place in places):
        return []
    scan, overlay = (reorient(nifti.read(place)) for place in places)
    unit, limits = _shown(scan.array, limits)
    return view_overlay(scan, overlay, caption=caption, style=MapStyle(unit, limits, "gray"))


def _reading_section(task: Task, source: str) -> Section:
    values = (
        "Values are in the unit of the labels that the weights were adapted to."
        if task.kind == "regression"
        else "Probabilities are as good as the labels and the scanners that the weights were adapted to: on other "
        "scanners and populations they may order scans well and still be too high or too low."
    )
    text = [
        values,
        "A map shows where the network's evidence for an output comes from, at the coarse grid of its patches. It is "
        "no segmentation, it says nothing about evidence against the output, and maps of different scans are scaled "
        "each by itself here.",
        source,
    ]
    return Section("How to read this", [Text(text)])

"""Cases segmented by a network that gives every voxel a label: on the grid of each, scored where the truth is known.

What belongs to a case bears its name: labels/NAME.nii.gz with its sidecar, NAME.json, previews/NAME.npz for the page.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.arrays.grid import reorient
from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.data.label_maps import MaskedScans, labels_from_input, read_label_map
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.sequences import find_case
from jaxmed.errors import InputError
from jaxmed.files import unique_names
from jaxmed.io.maps import write_map
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.scans import NAME_ENDINGS, read_volume
from jaxmed.io.tables import write_table
from jaxmed.metrics.cohort import average_subjects
from jaxmed.metrics.imaging import score_labels
from jaxmed.nn.model import Network
from jaxmed.recipes.dense_labels import label_shares
from jaxmed.recipes.map_files import TABLES, Tell
from jaxmed.recipes.map_images import Inputs, map_images
from jaxmed.recipes.quality_range import Tuned
from jaxmed.report.masks import plane
from jaxmed.report.slices import display_range
from jaxmed.train.log import Log
from jaxmed.volume import Volume

DEFINITION = (
    "the label of largest probability in every voxel; probabilities interpolated linearly from the network's grid, the "
    "background beyond it"
)
COLUMNS = (
    "id", "path", "subject", "split", "label", "volume_ml", "true_volume_ml", "dice", "hausdorff_95_mm",
    "average_surface_distance_mm",
)  # fmt: skip


class Segmenter(NamedTuple):
    """What segments.

    Attributes:
        network: See `recipes.dense_labels`.
        params: Its parameters.
        labels: Values of the label maps, the background first.
        preprocess: A scan to its input.
    """

    network: Network
    params: Params
    labels: tuple[int, ...]
    preprocess: Preprocess


@dataclasses.dataclass(frozen=True)
class CaseRow:
    """What came of a case.

    Attributes:
        name: Of its results.
        path: The scan.
        notes: What is unexpected about it.
        subject: Whose it is.
        split: Of the manifest; empty without one.
        volumes: In ml, of every label that was found.
        true_volumes: Likewise, of the true map; empty where that is not known, as what follows.
        dice: Of every label.
        hausdorff_95: 95th percentile of the distance of the surfaces, in mm.
        surface_distance: Its mean, symmetric, in mm.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    subject: str
    split: str
    volumes: dict[str, float]
    true_volumes: dict[str, float]
    dice: dict[str, float]
    hausdorff_95: dict[str, float]
    surface_distance: dict[str, float]


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """How well a label is found in the cases of a split: means, and 95 % intervals bootstrapped over subjects.

    Attributes:
        split: The split.
        label: Value in the label maps.
        cases: Cases that it rests on.
        subjects: Their subjects.
        present: Cases whose true map has the label; in the others Dice is 1 where nothing is found, else 0.
        dice: Mean Dice.
        dice_low: Lower end of its interval; None of one subject.
        dice_high: Upper end.
        hausdorff_95: Mean 95 % Hausdorff distance, in mm.
        hausdorff_low: Lower end of its interval.
        hausdorff_high: Upper end.
    """

    split: str
    label: str
    cases: int
    subjects: int
    present: int
    dice: float
    dice_low: float | None
    dice_high: float | None
    hausdorff_95: float
    hausdorff_low: float | None
    hausdorff_high: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run found; numbers of cases are in outputs/cases.csv.

    Attributes:
        labels: Values of the label maps, the background first.
        counts: Cases by what they are: of splits, or "segmented".
        failed: Cases that could not be segmented.
        parameters: Their number.
        step: Step of the kept parameters; 0 where nothing was trained.
        notes: What a user should know.
        scores: Against true label maps.
        shown: Names of the cases that the page shows.
        warnings: A case and what its quality says against it.
        tuned: Scores of quality that the weights were tuned on, by kind of image; empty where none were kept.
    """

    labels: tuple[int, ...]
    counts: dict[str, int]
    failed: int
    parameters: int
    step: int
    notes: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    shown: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...] = ()
    tuned: dict[str, Tuned] = dataclasses.field(default_factory=dict)


def label_task(labels: Sequence[int]) -> Task:
    """Return the task that travels with a segmenter: its names are the values of the label maps."""
    words = tuple(map(str, labels))
    return Task("binary", words[1:]) if len(labels) == 2 else Task("multiclass", words)


def task_labels(task: Task | None, channels: int) -> tuple[int, ...]:
    """Return the values of a segmenter's label maps, the background first; 0, 1, 2 where its weights do not tell."""
    names = () if task is None else task.names
    if len(names) == channels and all(name.isdecimal() for name in names):
        values = tuple(map(int, names))
        return (0, *values) if channels == 1 else values
    return tuple(range(max(channels, 2)))


def held_out_inputs(cases: MaskedScans) -> tuple[list[Inputs], dict[str, tuple[str, str]]]:
    """Return the cases that were not trained on, with label maps, first those to test on; subject and split by name."""
    rows = [row for split in ("test", "validation") for row in cases.rows(split)]
    names = unique_names([cases.cells[row] for row in rows], NAME_ENDINGS, (), TABLES)
    inputs = [Inputs(name, cases.scans[row], {"mask": cases.masks[row]}) for name, row in zip(names, rows, strict=True)]
    return inputs, {name: (cases.subjects[row], cases.splits[row]) for name, row in zip(names, rows, strict=True)}


def segment_cases(
    segmenter: Segmenter,
    inputs: Sequence[Inputs],
    about: Mapping[str, tuple[str, str]],
    outputs: Path,
    log: Log,
    *,
    shown: int,
    part: str = "",
) -> tuple[tuple[CaseRow, ...], int]:
    """Segment cases, write their label maps and cases.csv; return what came of each, and how many failed.

    Args:
        segmenter: What segments.
        inputs: The cases; beside each, "mask", its true label map or None.
        about: Subject and split of each, by name.
        outputs: Folder of results of the run.
        log: Its log.
        shown: Cases of which a picture is kept for the page.
        part: As of `map_files`.
    """
    rows, failed = map_images(
        inputs, partial(_segment, segmenter, about, outputs, shown), CaseRow, outputs, log, "Segmenting",
        lambda row: {f"dice_{label}": value for label, value in row.dice.items()}, part,
    )  # fmt: skip
    cells = [
        (row.name, row.path, row.subject, row.split, label, f"{volume:.6g}", row.true_volumes.get(label),
         row.dice.get(label), row.hausdorff_95.get(label), row.surface_distance.get(label))
        for row in rows for label, volume in row.volumes.items()
    ]  # fmt: skip
    write_table(outputs / "cases.csv", COLUMNS, [dict(zip(COLUMNS, one, strict=True)) for one in cells])
    return rows, failed


def _segment(
    segmenter: Segmenter, about: Mapping[str, tuple[str, str]], outputs: Path, shown: int, number: int, one: Inputs,
    tell: Tell,
) -> CaseRow:  # fmt: skip
    labels, preprocess = segmenter.labels, segmenter.preprocess
    tell(one.name)
    prepared = preprocess.prepare(one.scan)
    if prepared.grid is None:
        raise InputError(one.path, "a scan with its place in the world", "an input prepared before", "give the scan")
    shares = np.asarray(label_shares(segmenter.network.apply, segmenter.params, prepared.image[None]))[0]
    found = labels_from_input(shares, labels, preprocess, prepared.grid)
    first = find_case(one.scan, preprocess.sequences).scan if preprocess.sequences else one.scan
    write_map(outputs / "labels", one.name, found, DEFINITION, "1", {"labels": [*labels]}, reference=first.path)
    names, voxel = {str(label): label for label in labels[1:]}, float(np.prod(found.spacing)) / 1000
    truth, notes, true_volumes = None, [*prepared.notes], dict[str, float]()
    measures: tuple[dict[str, float], ...] = ({}, {}, {})
    if (mask := one.beside["mask"]) is not None:
        truth = read_label_map(mask, prepared.grid, str(first.path))
        if unknown := sorted(set(np.unique(truth.array).tolist()) - {*labels}):
            notes.append(f"{mask.name} holds the value {unknown[0]}, which the network does not know")
        scored = score_labels(truth.array, found.array, found.spacing, names)
        measures = tuple({name: float(scored[name][kind] or 0) for name in names} for kind in COLUMNS[-3:])
        true_volumes = _volumes(truth, names, voxel)
    if number < shown:
        write_preview(outputs / "previews" / f"{one.name}.npz", read_volume(first).volume, found, truth)
    volumes = _volumes(found, names, voxel)
    return CaseRow(one.name, str(one.path), tuple(notes), *about[one.name], volumes, true_volumes, *measures)


def _volumes(labels: Volume, names: Mapping[str, int], voxel: float) -> dict[str, float]:
    return {name: float((labels.array == label).sum()) * voxel for name, label in names.items()}


def write_preview(path: Path, scan: Volume, found: Volume, truth: Volume | None) -> None:
    """Keep the axial slice with most of the labels, true ones where they are known, for the page."""
    maps = {"found": np.asarray(reorient(found).array)}
    if truth is not None:
        maps["truth"] = np.asarray(reorient(truth).array)
    image, guide = np.asarray(reorient(scan).array, np.float32), maps["found"] > 0
    if "truth" in maps and maps["truth"].any():
        guide = maps["truth"] > 0
    low, high = display_range(image.reshape(-1).astype(np.float64))
    shown = np.clip((plane(image, guide) - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    planes = {name: np.ascontiguousarray(plane(labels, guide)) for name, labels in maps.items()}
    write_npz(path, {"image": shown} | planes, is_compressed=True)


def with_preview(outputs: Path, rows: Sequence[CaseRow]) -> tuple[str, ...]:
    """Return the names of the cases of which a picture was kept."""
    return tuple(row.name for row in rows if (outputs / "previews" / f"{row.name}.npz").exists())


def score_rows(rows: Sequence[CaseRow], labels: Sequence[int], seed: int) -> tuple[LabelScore, ...]:
    """Return the scores of every split and label, of the cases whose true label map is known."""
    scores = []
    for split in dict.fromkeys(row.split for row in rows):
        for label in map(str, labels[1:]):
            own = [row for row in rows if row.split == split and label in row.dice]
            if not own:
                continue
            subjects = np.array([row.subject for row in own])
            overlap, far = (
                average_subjects(np.array([values[label] for values in several], np.float64), subjects, seed)
                for several in ([row.dice for row in own], [row.hausdorff_95 for row in own])
            )
            present = sum(row.true_volumes[label] > 0 for row in own)
            scores.append(
                LabelScore(split, label, len(own), len(np.unique(subjects)), present, *overlap[:3], *far[:3])
            )  # fmt: skip
    return tuple(scores)


def count_parameters(params: Params) -> int:
    """Return the number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))

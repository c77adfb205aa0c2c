"""Few-shot segmentation: images with masks of familiar and of new tasks, listed in a manifest, read into memory, drawn.

NumPy on the host. A task is what masks show, such as one organ; a case is an image with its mask. Familiar tasks have
the splits train and validation, new ones support (the few labelled images, or shots) and test.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Shaped

from jaxmed.arrays.batches import evenly
from jaxmed.config import Count, Length, Number, Share, Whole, checked
from jaxmed.data.cohort import groups_of, stated_splits
from jaxmed.data.cuts import load_images, mask_images, name_item
from jaxmed.data.inputs import try_each
from jaxmed.data.intensity import Kind
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import record_seed
from jaxmed.data.splits import split_subjects
from jaxmed.data.windows import cut_window, middle_of, place
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import read_table, resolve_path

# What a manifest calls the kinds of intensities.
INTENSITIES: dict[str, Kind] = {"unit": "unit", "ct": "window", "percentile": "percentile"}
SPLITS = ("train", "validation", "support", "test")
ITEM = "{item}"


@dataclasses.dataclass(frozen=True)
@checked
class TaskData:
    """Which cases there are.

    Attributes:
        manifest: CSV with the columns path (NIfTI; a DICOM folder; PNG, JPEG, TIFF; .npy with one item after the
            other), mask (on the grid of path, or of its shape), task, subject, and split: train and validation for
            familiar tasks, support (the few labelled examples) and test for novel ones. Without a column split,
            subjects are drawn into train, validation and test. Optionally intensity (unit, ct or percentile, of that
            file) and value (the label of a NIfTI label map that counts). A subject with {item} in its name stands for
            one subject per item of a stack.
        mask: Column of the masks.
        fractions: Shares of subjects in train, validation and test where there is no column split.
        max_items: Cases of a task that are kept, evenly over its files; 0 keeps all.
        min_voxels: Mask voxels that an image needs, at the images' voxel size; slices with fewer are left out.
        shift: Largest distance of the middle of the mask from the middle of its image along each axis, in voxels, drawn
            evenly for each case; images stay inside their file, so at its sides the distance is larger.
        synthetic: Generate this many puzzles per familiar family, and half as many per novel one, where no manifest is
            given.
    """

    manifest: Path | None = None
    mask: str = "mask"
    fractions: tuple[Share, Share, Share] = (0.7, 0.15, 0.15)
    max_items: Whole = 0
    min_voxels: Count = 16
    shift: Length = 0
    synthetic: Number = 0

    def __post_init__(self) -> None:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: expected three shares that sum to 1, found {self.fractions}")


class Record(NamedTuple):
    """A row of a manifest.

    Attributes:
        path: The image.
        mask: Its mask.
        task: What the mask shows.
        subject: Whose it is; may hold {item}.
        split: One of SPLITS.
        intensity: How values become [0, 1]; None as the preprocessing says.
        value: Which label of the mask counts; None for all.
    """

    path: Path
    mask: Path
    task: str
    subject: str
    split: str
    intensity: Kind | None
    value: int | None


class Cases(NamedTuple):
    """Images with masks, in memory.

    Attributes:
        images: In [0, 1]; x to the right and y up, or x, y and z.
        masks: What lies beyond the image is not in it.
        tasks: Number of each case's task.
        task_names: In the order of the manifest; each has a case.
        subjects: Whose each case is.
        names: File and slice or item of each case.
        spacing: Voxel size of images in mm; None where files keep theirs, or have none.
    """

    images: Float32[np.ndarray, "case *size"]
    masks: Bool[np.ndarray, "case *size"]
    tasks: Int32[np.ndarray, " case"]
    task_names: tuple[str, ...]
    subjects: tuple[str, ...]
    names: tuple[str, ...]
    spacing: float | None = None

    def select(self, chosen: Sequence[int] | Shaped[np.ndarray, " kept"]) -> "Cases":
        """Return some of the cases, by number; names of tasks stay."""
        rows = np.asarray(chosen, np.int64)
        subjects, names = (tuple(column[row] for row in rows) for column in (self.subjects, self.names))
        images, masks, tasks = (array[rows] for array in (self.images, self.masks, self.tasks))
        return self._replace(images=images, masks=masks, tasks=tasks, subjects=subjects, names=names)

    def spread(self, count: int) -> "Cases":
        """Return at most so many cases, evenly over all."""
        return self.select(evenly(count, len(self.images)))

    def draw_task(self, generator: np.random.Generator) -> Int[np.ndarray, " case"]:
        """Return the numbers of the cases of a task that is drawn."""
        return np.flatnonzero(self.tasks == generator.integers(len(self.task_names)))


def read_manifest(config: TaskData, seed: int) -> tuple[Record, ...]:
    """Read and check the rows of a manifest; files are not opened.

    Args:
        config: Table and columns.
        seed: Seed of the draw of subjects where there is no column split.

    Raises:
        InputError: A column or a cell is missing or wrong, or the same subject stands in two splits.
    """
    if config.manifest is None:
        raise InputError("data.manifest", "a CSV file", "none", "give one, or try --preset smoke")
    required = ("path", config.mask, "task", "subject")
    table = read_table(config.manifest, required=required, optional=("split", "intensity", "value"))
    splits = stated_splits(table, SPLITS) or split_subjects(groups_of(table), config.fractions, seed)
    records = []
    for row, line, split in zip(table.rows, table.lines, splits, strict=True):
        intensity, value = row.get("intensity", ""), row.get("value", "")
        if intensity and intensity not in INTENSITIES:
            raise table.wrong(line, f"one of {', '.join(INTENSITIES)} under 'intensity'", f"'{intensity}'")
        if value and not value.isdecimal():
            raise table.wrong(line, "the number of a label under 'value'", f"'{value}'")
        path, mask = (resolve_path(row[column], table.path.parent) for column in ("path", config.mask))
        kind, label = INTENSITIES.get(intensity), int(value) if value else None
        records.append(Record(path, mask, row["task"], row["subject"], split, kind, label))
    return tuple(records)


# Reading -------------------------------------------------------------------------------------------------------------


def read_splits(
    config: TaskData,
    preprocess: Preprocess,
    required: Sequence[str],
    optional: Sequence[str] = (),
    seed: int = 0,
    series: str = "",
    fill: float | None = None,
) -> tuple[dict[str, Cases], tuple[dict[str, str], ...]]:
    """Read the cases of splits that a manifest has to have, and of others where it has them; see `read_cases`."""
    known = {record.split for record in read_manifest(config, seed)}
    splits = (*required, *(name for name in optional if name in known))
    found = {split: read_cases(config, preprocess, split, seed, series, fill) for split in splits}
    failed = tuple(failure for _, failures in found.values() for failure in failures)
    return {split: cases for split, (cases, _) in found.items()}, failed


def read_cases(
    config: TaskData,
    preprocess: Preprocess,
    split: str,
    seed: int = 0,
    series: str = "",
    fill: float | None = None,
    threads: int = 2,
) -> tuple[Cases, tuple[dict[str, str], ...]]:
    """Read every file of a split and cut its cases, each about the middle of its mask.

    Args:
        config: Table and choices.
        preprocess: Size, axis, voxel size and scale.
        split: One of SPLITS.
        seed: Seed of shifts, and of the draw of subjects where there is no column split.
        series: Which DICOM series is meant where a folder holds several.
        fill: Value of voxels that have none; None refuses them.
        threads: Threads that read.

    Returns:
        The cases; path, id (subject) and reason of the records that could not be used.

    Raises:
        InputError: The manifest is wrong, the split is empty, or none of its records can be used.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found '{split}'")
    everything = read_manifest(config, seed)
    numbered = [(row, record) for row, record in enumerate(everything) if record.split == split]
    if not numbered:
        found = f"only {', '.join(name for name in SPLITS if any(record.split == name for record in everything))}"
        raise InputError(config.manifest, f"rows with split '{split}'", found)

    def read(numbered: tuple[int, Record]) -> list[_Case]:
        row, record = numbered
        return _cut_record(record, config, preprocess, record_seed(seed, 0, row), series, fill)

    failures, by_task = [], {}
    for (_, record), outcome in zip(numbered, try_each(read, numbered, threads), strict=True):
        if isinstance(outcome, InputError):
            failures.append({"path": str(record.path), "id": record.subject, "reason": str(outcome)})
            if len(numbered) == 1:
                raise outcome
        else:
            by_task.setdefault(record.task, []).extend(outcome)
    if not by_task:
        told = "; ".join(failure["reason"] for failure in failures[:3]) + ("; ..." if len(failures) > 3 else "")
        raise InputError(config.manifest, f"files of split '{split}' that can be used", f"all broken: {told}")
    kept = [_thin(cases, config.max_items) for cases in by_task.values()]
    images, masks, subjects, names = zip(*(case for listed in kept for case in listed), strict=True)
    tasks = np.repeat(np.arange(len(kept), dtype=np.int32), [len(listed) for listed in kept])
    spacing = preprocess.spacing[0] if preprocess.spacing else None
    return Cases(np.stack(images), np.stack(masks), tasks, tuple(by_task), subjects, names, spacing), tuple(failures)


class _Case(NamedTuple):
    image: Float32[np.ndarray, "..."]
    mask: Bool[np.ndarray, "..."]
    subject: str
    name: str


def _cut_record(
    record: Record,
    config: TaskData,
    preprocess: Preprocess,
    generator: np.random.Generator,
    series: str,
    fill: float | None,
) -> list[_Case]:
    """Return the cases of one file: its slices or items with enough of the mask."""
    if record.intensity is not None:
        intensity = dataclasses.replace(preprocess.intensity, kind=record.intensity)
        preprocess = dataclasses.replace(preprocess, intensity=intensity)
    loaded = load_images(ScanFiles(record.path, series), preprocess, fill)
    masks = mask_images(record.mask, loaded, preprocess, record.value)
    cases = []
    largest = 0
    for item, (image, mask) in enumerate(zip(loaded.images, masks, strict=True)):
        # Drawn for every item, so that those before it do not matter.
        shift = generator.integers(-config.shift, config.shift + 1, len(preprocess.size))
        largest = max(largest, int(mask.sum()))
        if mask.sum() < config.min_voxels:
            continue
        center = tuple(int(c + s) for c, s in zip(middle_of(mask), shift, strict=True))
        starts = place(image.shape, preprocess.size, center)
        inside = cut_window(mask, starts, preprocess.size)
        if inside.sum() < config.min_voxels:
            continue
        subject = record.subject.replace(ITEM, f"{item:04d}")
        cases.append(_Case(cut_window(image, starts, preprocess.size), inside, subject, name_item(loaded, item)))
    if not cases:
        expected = f"{config.min_voxels} voxels or more in an image" if largest else "a mask with voxels inside"
        found = f"{largest} at most" if largest else "none above 0"
        raise InputError(record.mask, expected, found, "set --data.min-voxels" if largest else "leave the record out")
    return cases


def _thin(cases: list[_Case], count: int) -> list[_Case]:
    """Return so many cases, evenly over the list."""
    if not count or len(cases) <= count:
        return cases
    return [cases[int(index)] for index in (np.arange(count) + 0.5) * len(cases) / count]


# Drawing -------------------------------------------------------------------------------------------------------------


def choose_task(cases: Cases, name: str) -> tuple[Cases, str]:
    """Return the cases of one task, and its name.

    Raises:
        InputError: There is no such task, or there are several and none is named.
    """
    known = ", ".join(f"'{task}'" for task in cases.task_names)
    if not name and len(cases.task_names) > 1:
        raise InputError("task", f"one of {known}", "none", "set --task")
    name = name or next(iter(cases.task_names))
    if name not in cases.task_names:
        raise InputError("task", f"one of {known}", f"'{name}'")
    return cases.select(np.flatnonzero(cases.tasks == cases.task_names.index(name))), name


def draw_shots(cases: Cases, count: int, seed: int) -> Cases:
    """Draw some labelled images; all where `count` is 0.

    Raises:
        InputError: There are not as many.
    """
    if count == 0:
        return cases
    if count > len(cases.images):
        raise InputError("shots", f"at most the {len(cases.images)} labelled images that there are", count)
    return cases.select(np.sort(np.random.default_rng(seed).choice(len(cases.images), count, replace=False)))


def task_batches(
    cases: Cases, shape: tuple[int, ...], seed: int, last: int, first: int
) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
    """Yield "image" and "mask" [*shape *size] of one task each; batch n, first to last, depends on seed and n alone."""
    for number in range(first, last):
        generator = np.random.default_rng((seed, 7, number))
        chosen = generator.choice(cases.draw_task(generator), shape)
        yield {"image": cases.images[chosen], "mask": cases.masks[chosen].astype(np.float32)}


def draw_episode(
    cases: Cases, of_task: Int[np.ndarray, " case"], shots: int, images: int, generator: np.random.Generator
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Draw labelled images of a task from one half of its subjects, and images to be segmented from the other half.

    Args:
        cases: Cases of all tasks.
        of_task: Numbers of the cases of the task; its subjects are halved, the cases of a single subject are.
        shots: Labelled images.
        images: The others.
        generator: Random numbers of the draws.

    Returns:
        "shot" and "shot_mask" [shots *size], "image" and "mask" [images *size].
    """
    subjects = np.array([cases.subjects[case] for case in of_task])
    owners = subjects if len(np.unique(subjects)) > 1 else np.arange(len(of_task))
    order = generator.permutation(np.unique(owners))
    is_labelled = np.isin(owners, order[: max(len(order) // 2, 1)])
    pools = of_task[is_labelled], of_task[~is_labelled] if len(order) > 1 else of_task
    first, second = (
        generator.choice(pool, count, replace=len(pool) < count)
        for pool, count in zip(pools, (shots, images), strict=True)
    )
    return {
        "shot": cases.images[first], "shot_mask": cases.masks[first],
        "image": cases.images[second], "mask": cases.masks[second],
    }  # fmt: skip


def task_episodes(
    cases: Cases, shots: int, images: int, seed: int, last: int, first: int
) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
    """Yield episodes of one task each; episode n, first to last, depends on seed and n alone."""
    for number in range(first, last):
        generator = np.random.default_rng((seed, 11, number))
        yield draw_episode(cases, cases.draw_task(generator), shots, images, generator)

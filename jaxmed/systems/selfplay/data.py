"""What System I learns from and is tested on: cases of familiar and novel tasks, listed in a manifest, in memory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

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
from jaxmed.synthesis.phantoms.write_puzzles import Counts, write_puzzle_cohort

# What a manifest calls the kinds of intensities.
INTENSITIES: dict[str, Kind] = {"unit": "unit", "ct": "window", "percentile": "percentile"}
SPLITS = ("train", "validation", "support", "test")
ITEM = "{item}"


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
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
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: expected three shares that sum to 1, found {self.fractions}")
        if self.min_voxels < 1:
            raise ValueError(f"min_voxels: expected 1 or more, found {self.min_voxels}")
        for name in ("max_items", "shift", "synthetic"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")


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
        row: Its number, from 0.
    """

    path: Path
    mask: Path
    task: str
    subject: str
    split: str
    intensity: Kind | None
    value: int | None
    row: int


class Failure(NamedTuple):
    """A record that could not be used.

    Attributes:
        path: The image.
        subject: Whose it is.
        reason: The error in one line.
    """

    path: str
    subject: str
    reason: str


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


class _Case(NamedTuple):
    image: Float32[np.ndarray, "..."]
    mask: Bool[np.ndarray, "..."]
    subject: str
    name: str


def write_synthetic(config: DataConfig, preprocess: Preprocess, seed: int, folder: Path) -> DataConfig:
    """Write the puzzles of a run as files, and return the settings that read them.

    Args:
        config: With `synthetic` above 0.
        preprocess: Of whose size they are.
        seed: Of the puzzles.
        folder: Gets the files; what is there already stays.
    """
    half = max(config.synthetic // 2, 1)
    counts = Counts(train=config.synthetic, validation=half, support=min(half, 16), test=half)
    manifest = write_puzzle_cohort(folder, seed, counts, preprocess.size)
    # Small images hold small shapes; each is one to be found.
    return dataclasses.replace(config, manifest=manifest, synthetic=0, min_voxels=1)


def read_manifest(config: DataConfig, seed: int) -> tuple[Record, ...]:
    """Read and check the rows of a manifest; files are not opened.

    Args:
        config: Table and columns.
        seed: Of the draw of subjects where there is no column split.

    Raises:
        InputError: A column or a cell is missing or wrong, or the same subject stands in two splits.
    """
    if config.manifest is None:
        raise InputError("data.manifest", "a CSV file", "none", "give one, or try --preset smoke")
    required = ("path", config.mask, "task", "subject")
    table = read_table(config.manifest, required=required, optional=("split", "intensity", "value"))
    splits = stated_splits(table, SPLITS) or split_subjects(groups_of(table), config.fractions, seed)
    records = []
    for number, (row, line, split) in enumerate(zip(table.rows, table.lines, splits, strict=True)):
        intensity, value = row.get("intensity", ""), row.get("value", "")
        if intensity and intensity not in INTENSITIES:
            raise table.wrong(line, f"one of {', '.join(INTENSITIES)} under 'intensity'", f"'{intensity}'")
        if value and not value.isdecimal():
            raise table.wrong(line, "the number of a label under 'value'", f"'{value}'")
        path, mask = (resolve_path(row[column], table.path.parent) for column in ("path", config.mask))
        records.append(
            Record(
                path,
                mask,
                row["task"],
                row["subject"],
                split,
                INTENSITIES.get(intensity),
                int(value) if value else None,
                number,
            )
        )
    return tuple(records)


def read_cases(
    config: DataConfig,
    preprocess: Preprocess,
    split: str,
    seed: int = 0,
    threads: int = 2,
    series: str = "",
    fill: float | None = None,
) -> tuple[Cases, tuple[Failure, ...]]:
    """Read every file of a split and cut its cases, each about the middle of its mask.

    Args:
        config: Table and choices.
        preprocess: Size, axis, voxel size and scale.
        split: One of SPLITS.
        seed: Of shifts, and of the draw of subjects where there is no column split.
        threads: That read.
        series: Which DICOM series is meant where a folder holds several.
        fill: Value of voxels that have none; None refuses them.

    Returns:
        The cases, and the records that could not be used.

    Raises:
        InputError: The manifest is wrong, the split is empty, or none of its records can be used.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found '{split}'")
    everything = read_manifest(config, seed)
    records = [record for record in everything if record.split == split]
    if not records:
        found = f"only {', '.join(name for name in SPLITS if any(record.split == name for record in everything))}"
        raise InputError(config.manifest, f"rows with split '{split}'", found)

    def read(record: Record) -> list[_Case]:
        return _cut_record(record, config, preprocess, seed, series, fill)

    found = try_each(read, records, threads)
    failures = tuple(
        Failure(str(record.path), record.subject, str(outcome))
        for record, outcome in zip(records, found, strict=True) if isinstance(outcome, InputError)
    )  # fmt: skip
    if len(failures) == len(records):
        if len(failures) == 1:
            raise next(outcome for outcome in found if isinstance(outcome, InputError))
        told = "; ".join(failure.reason for failure in failures[:3]) + ("; ..." if len(failures) > 3 else "")
        raise InputError(config.manifest, f"files of split '{split}' that can be used", f"all broken: {told}")
    by_task: dict[str, list[_Case]] = {}
    for record, outcome in zip(records, found, strict=True):
        if not isinstance(outcome, InputError):
            by_task.setdefault(record.task, []).extend(outcome)
    cases = _gather({task: _thin(cases, config.max_items) for task, cases in by_task.items()})
    return cases._replace(spacing=preprocess.spacing[0] if preprocess.spacing else None), failures


def _cut_record(
    record: Record, config: DataConfig, preprocess: Preprocess, seed: int, series: str, fill: float | None
) -> list[_Case]:
    """Return the cases of one file: its slices or items with enough of the mask."""
    if record.intensity is not None:
        intensity = dataclasses.replace(preprocess.intensity, kind=record.intensity)
        preprocess = dataclasses.replace(preprocess, intensity=intensity)
    loaded = load_images(ScanFiles(record.path, series), preprocess, fill)
    masks = mask_images(record.mask, loaded, preprocess, record.value)
    generator = record_seed(seed, 0, record.row)
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


def _gather(by_task: dict[str, list[_Case]]) -> Cases:
    cases = [case for listed in by_task.values() for case in listed]
    numbers = [number for number, listed in enumerate(by_task.values()) for _ in listed]
    return Cases(
        images=np.stack([case.image for case in cases]),
        masks=np.stack([case.mask for case in cases]),
        tasks=np.array(numbers, np.int32),
        task_names=tuple(by_task),
        subjects=tuple(case.subject for case in cases),
        names=tuple(case.name for case in cases),
    )

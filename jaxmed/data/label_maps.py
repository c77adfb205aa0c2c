"""Label maps of scans: listed and checked, onto the grid of a network's input, and back onto the grid of the scan.

NumPy on the host. A label map is a NIfTI file of whole numbers on the grid of its scan, 0 the background. On a
network's grid a voxel holds the place of its label among those that are learnt: 0, 1, 2, whatever the labels are.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from jaxmed.config import Count, Number, Share, checked
from jaxmed.data.cohort import groups_of, stated_splits, subject_notes, subjects_of
from jaxmed.data.inputs import require_whole, try_each
from jaxmed.data.pack import PackConfig, PackedSource, pack
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import FileSource
from jaxmed.data.sequences import find_case
from jaxmed.data.splits import split_subjects
from jaxmed.data.windows import cut_window
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles, read_volume
from jaxmed.io.tables import read_table, resolve_paths
from jaxmed.volume import Grid, Volume, require_same_grid

MOST_LABELS = 64
LARGEST = 32_767


@dataclasses.dataclass(frozen=True)
@checked
class MaskData:
    """Which scans with label maps are learnt from.

    Attributes:
        manifest: CSV with the columns path (a scan, or the folder of a case) and that of the label maps; optionally
            subject and split (train, validation, test).
        mask: Column of the label maps: NIfTI files of whole numbers on the grid of the scan, 0 the background.
        labels: Values that are learnt; every other one is refused. Empty takes those of the split train.
        fractions: Shares of subjects in train, validation and test, where there is no column split.
        cache: Folder in which prepared scans and label maps are kept (float16). Empty prepares them anew in every
            epoch.
        synthetic: Generate this many where no manifest is given.
    """

    manifest: Path | None = None
    mask: str = "mask"
    labels: tuple[Count, ...] = ()
    fractions: tuple[Share, Share, Share] = (0.7, 0.15, 0.15)
    cache: Path | None = None
    synthetic: Number = 0

    def __post_init__(self) -> None:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: expected three shares that sum to 1, found {self.fractions}")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) >= MOST_LABELS:
            raise ValueError(f"labels: expected up to {MOST_LABELS - 1} values, each once, found {self.labels}")


class MaskedScans(NamedTuple):
    """Scans with label maps.

    Attributes:
        scans: The scans.
        masks: Label map of each.
        subjects: Whose they are.
        splits: "train", "validation" or "test".
        labels: Values that are learnt, the background first.
        cells: The scans as written in the table.
        notes: What a user should know.
    """

    scans: tuple[ScanFiles, ...]
    masks: tuple[Path, ...]
    subjects: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[int, ...]
    cells: tuple[str, ...]
    notes: tuple[str, ...]

    def rows(self, split: str) -> list[int]:
        """Return the numbers of the scans of a split."""
        return [row for row, one in enumerate(self.splits) if one == split]

    def learnt(self) -> "MaskedScans":
        """Return the scans of the splits train and validation alone."""
        kept = [row for row, split in enumerate(self.splits) if split != "test"]
        columns = {
            name: tuple(getattr(self, name)[row] for row in kept)
            for name in ("scans", "masks", "subjects", "splits", "cells")
        }
        return self._replace(**columns)


def list_masked(
    config: MaskData, seed: int, preprocess: Preprocess, fill: float | None = None, threads: int = 2
) -> MaskedScans:
    """Read a table of scans with label maps, and every map that is learnt from, and check that it is one.

    Args:
        config: Table and columns.
        seed: Seed of the draw of subjects where there is no column split.
        preprocess: How the sequences of a case are named.
        fill: Intensity of voxels that have none; None refuses them.
        threads: Threads that read.

    Raises:
        InputError: A file is missing, or of the splits train and validation broken; a map of these stands on another
            grid than its scan, or holds a value that is not learnt; or there is nothing to learn.
    """
    if config.manifest is None:
        raise InputError("data.manifest", "a table of scans with label maps", "nothing", "or try --preset smoke")
    table = read_table(config.manifest, required=("path", config.mask), optional=("subject", "split"))
    paths, masks = resolve_paths(table), resolve_paths(table, config.mask)
    splits = stated_splits(table) or split_subjects(groups_of(table), config.fractions, seed)
    for split in ("train", "validation"):
        if split not in splits:
            raise InputError(table.path, f"records with split '{split}'", f"only {', '.join(sorted(set(splits)))}")

    def read(pair: tuple[Path, Path]) -> frozenset[int]:
        found = read_label_map(pair[1], scan_grid(ScanFiles(pair[0], fill=fill), preprocess), str(pair[0]))
        return frozenset(np.unique(found.array).tolist())

    # What is wrong with a case of the split test stops nothing: it fails alone when it is segmented.
    learnt = [row for row, split in enumerate(splits) if split != "test"]
    pairs = [(paths[row], masks[row]) for row in learnt]
    values = require_whole(try_each(read, pairs, threads), str(table.path))
    training = [found for row, found in zip(learnt, values, strict=True) if splits[row] == "train"]
    labels = _labels_of(config, frozenset().union(*training))
    for (_, path), found in zip(pairs, values, strict=True):
        if unknown := sorted(found - {*labels}):
            told = ", ".join(map(str, labels))
            advice = "correct the map, or name all values: --data.labels"
            raise InputError(path, f"the labels {told}", f"the value {unknown[0]}", advice)
    empty, notes = sum(found == {0} for found in values), [*subject_notes(table)]
    if empty:
        notes.append(f"{empty:,} of {len(pairs):,} label maps to learn from hold no label.")
    cells = tuple(
        cell if not Path(cell).is_absolute() else "/".join(Path(cell).parts[-2:]) for cell in table.column("path")
    )
    scans = tuple(ScanFiles(path, fill=fill) for path in paths)
    return MaskedScans(scans, tuple(masks), tuple(subjects_of(table)), tuple(splits), labels, cells, tuple(notes))


def _labels_of(config: MaskData, found: frozenset[int]) -> tuple[int, ...]:
    labels = tuple(sorted({0, *(config.labels or found)}))
    where = f"{config.manifest}, column '{config.mask}'"
    if len(found | {0}) == 1:
        raise InputError(where, "label maps with a label in the split train", "no value above 0 in any of them")
    if len(labels) > MOST_LABELS:
        told = f"{len(labels) - 1} values"
        raise InputError(where, f"up to {MOST_LABELS - 1} labels", told, "are these label maps, or scans?")
    return labels


def scan_grid(scan: ScanFiles, preprocess: Preprocess) -> Grid:
    """Return the grid of a scan; of a case of several sequences that of its first one."""
    return read_volume(find_case(scan, preprocess.sequences).scan if preprocess.sequences else scan).volume.grid


def read_label_map(path: Path, grid: Grid | None = None, where: str = "") -> Volume:
    """Read a label map as int32.

    Args:
        path: NIfTI.
        grid: Of the scan; None does not look.
        where: The scan, for messages.

    Raises:
        InputError: It is none: broken, not 3D, not finite, on another grid, or of numbers that are no labels.
    """
    volume = nifti.read(path, dimensions=(3,), dtype=np.int32)
    if grid is not None:
        require_same_grid(volume.grid, grid, str(path), where)
    low, high = int(volume.array.min()), int(volume.array.max())
    if low < 0 or high > LARGEST:
        raise InputError(path, f"labels from 0 to {LARGEST}", f"values from {low} to {high}")
    return volume


def labels_to_input(mask: Volume, labels: Sequence[int], preprocess: Preprocess) -> UInt8[np.ndarray, "*size"]:
    """Return the place of every voxel's label, on the grid of a 3D network's input.

    Every label is interpolated by itself, as the scan is, and the one with the largest share of a voxel wins.

    Args:
        mask: On the grid of the scan.
        labels: Those that are learnt, the background first.
        preprocess: Of the scan.
    """
    shares = [_share(mask.array == label, mask, preprocess) for label in labels[1:]]
    background = 1 - np.sum(shares, axis=0, dtype=np.float32)
    return np.argmax([background, *shares], axis=0).astype(np.uint8)


def _share(inside: Bool[np.ndarray, "x y z"], mask: Volume, preprocess: Preprocess) -> Float32[np.ndarray, "*size"]:
    """Return how much of each voxel of the input lies inside; nothing does beyond the field of view."""
    if not inside.any():
        return np.zeros(preprocess.size, np.float32)
    volume = preprocess.turn(Volume.make(inside.astype(np.float32), mask.affine))
    array = np.asarray(preprocess.lay_out(volume, "volume", None).array, np.float32)
    return cut_window(array, preprocess.starts(array.shape), preprocess.size)


def labels_from_input(
    shares: Float32[np.ndarray, "*size label"], labels: Sequence[int], preprocess: Preprocess, grid: Grid
) -> Volume:
    """Return the label with the largest share in every voxel of a scan; the background where the input did not reach.

    Args:
        shares: Probability of each label in each voxel of the input.
        labels: Their values, the background first.
        preprocess: Of the scan.
        grid: Of the scan.
    """
    found = [preprocess.inverse(shares[..., place], grid).array for place in range(len(labels))]
    return Volume.make(np.array(labels, np.int16)[np.argmax(found, axis=0)], grid.affine)


# As records ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PreparedPair:
    """What a scan and its label map go through: names it in a cache, and hands both to the device."""

    preprocess: Preprocess
    labels: tuple[int, ...]
    fill: float | None = None

    def read_image(self, path: Path) -> Float32[np.ndarray, "*size channel"]:
        """Read a scan."""
        return self.preprocess(ScanFiles(path, fill=self.fill))

    def read_labels(self, path: Path) -> UInt8[np.ndarray, "*size"]:
        """Read a label map."""
        return labels_to_input(read_label_map(path), self.labels, self.preprocess)

    def __call__(self, fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
        """Return the fields as arrays: float32 and int32."""
        return {"image": np.asarray(fields["image"], np.float32), "label": np.asarray(fields["label"], np.int32)}


def masked_source(listed: MaskedScans, field: PreparedPair, cache: Path | None = None) -> FileSource | PackedSource:
    """Make a source of "image" [*size, channels] and "label" [*size].

    Args:
        listed: The scans.
        field: What they go through.
        cache: Folder in which both are kept, to be read in place from then on.
    """
    source = FileSource(
        {"image": tuple(scan.path for scan in listed.scans), "label": listed.masks},
        readers={"image": field.read_image, "label": field.read_labels},
    )
    return source if cache is None else pack(source, cache, field, PackConfig("float16"))

"""Scans that a model is applied to: which they are, and how each becomes the model's cube."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped

from jaxmed.data.scans import find_scans
from jaxmed.errors import InputError
from jaxmed.files import unique_names
from jaxmed.io.scans import NAME_ENDINGS, Kind, ScanFiles, kind_of, read_volume
from jaxmed.io.tables import resolve_path, resolve_paths
from jaxmed.models.published.preprocess import RANGE_TOLERANCE, Preprocess, load_input
from jaxmed.recipes.map_files import Input
from jaxmed.systems.tangerine.records import read_manifest
from jaxmed.volume import Grid, Volume

KINDS: tuple[Kind, ...] = ("nifti", "dicom", "array")


@dataclasses.dataclass(frozen=True)
class FrameConfig:
    """What may differ from the preprocessing that travels with the weights.

    Attributes:
        axis_order: Stored axes of the files (x the first, z the last) that become D, H, W of the model: slices, rows
            from the front to the back of the patient, columns. "weights" takes the order stored with the weights.
        edge: What stands beyond the field of view where an axis grows to twice its size or more: "clamp" repeats the
            last voxel, "zero" is 0 HU, as in the original; "weights" as above.
    """

    axis_order: Literal["weights", "zyx", "xyz", "zxy", "yzx", "yxz", "xzy"] = "weights"
    edge: Literal["weights", "clamp", "zero"] = "weights"

    def apply(self, preprocess: Preprocess) -> Preprocess:
        """Return the preprocessing of the weights with what is set here."""
        found: dict[str, Any] = {"axis_order": self.axis_order, "edge": self.edge}
        return dataclasses.replace(preprocess, **{name: value for name, value in found.items() if value != "weights"})


@dataclasses.dataclass(frozen=True)
class Record:
    """One scan of a job.

    Attributes:
        name: A name that is unique in the job and fit for a file.
        scan: Its file or DICOM folder.
        row: Its row of the manifest; empty without one.
    """

    name: str
    scan: ScanFiles
    row: dict[str, str]

    @property
    def path(self) -> Path:
        """Its file or folder."""
        return self.scan.path


class Scan(NamedTuple):
    """A scan, ready for the model.

    Attributes:
        cube: The model's input, in [0, 1].
        grid: Where the scan's voxels stand; None for a cube that came without a place in the world.
        warnings: What is unexpected about it.
    """

    cube: Float32[np.ndarray, "d h w 1"]
    grid: Grid | None
    warnings: tuple[str, ...]


def find_records(
    manifest: Path | None, place: Path | None, split: str = "", series: str = "", fill: float | None = None
) -> tuple[list[Record], tuple[str, ...]]:
    """List the scans of a job.

    Args:
        manifest: Table with the column path; the rows are records.
        place: Instead of a table: a file, a DICOM folder, or a folder of such.
        split: Of a manifest, only rows with this word under "split"; empty for all.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Returns:
        The records, and notes on what was passed over.

    Raises:
        InputError: When there are none, or not a single one exists; a few missing files fail on their own, later.
    """
    if (manifest is None) == (place is None):
        found = "neither" if place is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    if place is not None:
        scans, notes = find_scans(place, KINDS, series, fill)
        root = place if place.is_dir() and [scan.path for scan in scans] != [place] else place.parent
        return _named([(os.path.relpath(scan.path, root), scan, {}) for scan in scans]), notes
    assert manifest is not None
    table = read_manifest(manifest)
    rows = list(table.rows)
    if split:
        rows = [row for row, name in zip(rows, table.column("split"), strict=True) if name == split]
        if not rows:
            names = ", ".join(sorted(set(table.column("split"))))
            raise InputError(manifest, f"rows with split '{split}'", f"only {names}")
    paths = [resolve_path(row["path"], manifest.parent) for row in rows]
    if not any(path.exists() for path in paths):
        resolve_paths(table)  # says which are missing, and from where they were looked for
    cells = [row["path"] if not Path(row["path"]).is_absolute() else Path(row["path"]).name for row in rows]
    return _named(
        [(cell, ScanFiles(path, series, fill=fill), row) for cell, path, row in zip(cells, paths, rows, strict=True)]
    ), ()


def read_scan(scan: ScanFiles | Path, preprocess: Preprocess) -> Scan:
    """Read a scan of any kind and look at it.

    Raises:
        InputError: It is missing, damaged, not 3D, not finite, constant, a single slice, or without a proper place in
            the world.
    """
    path = scan.path if isinstance(scan, ScanFiles) else scan
    if kind_of(path) == "array":
        return Scan(load_input(path, preprocess), None, ())
    volume, knows_frame, warnings = read_volume(scan)
    if knows_frame:
        warnings += tuple(preprocess.check_orientation(volume))
    else:
        warnings += ("the header states no orientation: whether the axes are as expected cannot be checked",)
    try:
        cube = preprocess(volume)
    except InputError as error:
        raise InputError(path, error.expected, error.found, error.advice) from error
    return Scan(cube, volume.grid, (*warnings, *preprocess.check_values(volume)))


def read_input(preprocess: Preprocess, record: Record) -> Input:
    """Read a record as a batch job takes it."""
    scan = read_scan(record.scan, preprocess)
    return Input(scan.cube, scan.warnings, scan.grid)


def empty_volume(grid: Grid) -> Volume:
    """Return a volume of zeros that takes no memory, where only the grid counts."""
    return Volume.make(np.broadcast_to(np.float32(0), grid.shape), grid.affine)


def check_cubes(cubes: Shaped[Any, "..."], preprocess: Preprocess) -> Float[Any, "batch d h w 1"]:
    """Return prepared cubes as a batch, checked.

    Raises:
        InputError: They have another shape or range than the model's input.
    """
    batch = cubes[None] if cubes.ndim == 4 else cubes
    if batch.ndim != 5 or batch.shape[1:] != (*preprocess.size, 1):
        expected = f"[batch, {', '.join(map(str, preprocess.size))}, 1]"
        advice = "give a 3D array in HU, a Volume or a path to have it prepared"
        raise InputError("volume", f"prepared cubes {expected}", f"shape {cubes.shape}", advice)
    low, high = float(batch.min()), float(batch.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        advice = "give a 3D array in HU, a Volume or a path to have it prepared"
        raise InputError("volume", "prepared cubes in [0, 1]", f"[{low:g}, {high:g}]", advice)
    return batch


def _named(found: list[tuple[str, ScanFiles, dict[str, str]]]) -> list[Record]:
    """Give every record a name of its own, made from where its file lies."""
    names = unique_names([cell for cell, _, _ in found], NAME_ENDINGS)
    return [Record(name, scan, dict(row)) for name, (_, scan, row) in zip(names, found, strict=True)]

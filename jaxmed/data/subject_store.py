"""A store of subjects: label maps, distances, coordinates and images in one or two bytes a voxel, mapped into memory.

A store is a folder with `store.json` (label table, subjects) and one folder per subject, of `.npy` arrays and a
`subject.json`. Every subject is written under a temporary name and renamed; `store.json` comes last. Volumes are at
1 mm, in RAS+ order, cut about the brain; reading pads them to one grid. The arrays are those of
`synthesis.brain_targets`.

What the files do not hold is computed: distances to the cortex from the labels, generation labels from the table, and
coordinates by whoever knows how to find MNI space (`locate`).
"""

import dataclasses
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Shaped

from jaxmed.arrays.grid import crop_or_pad, reorient, resample
from jaxmed.data.label_table import LabelRow, LabelTable
from jaxmed.data.subject_files import COORDINATES, DISTANCES, IMAGES, SubjectFiles, modalities_of, thresholds_of
from jaxmed.data.surface_distances import surface_distances
from jaxmed.errors import InputError
from jaxmed.files import make_folder, read_record, remove_leftovers, write_json
from jaxmed.io import nifti
from jaxmed.io.numpy_files import map_array
from jaxmed.volume import Grid, Volume, require_same_grid

VERSION = 1
MARGIN = 24
"""Voxels that are kept around the brain on every side, so that it is in the middle of its volume."""
BRAIN = (2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28, 77)
"""Generation labels of the brain; fluid may reach down to the neck."""
WHOLE_HEAD = (192, 232, 192)
"""Voxels of 1 mm about an adult's brain with this margin, as stores of real heads have them: what is planned for."""
MULTIPLE = 8
"""Of voxels, to which the common grid is rounded up."""
LARGEST_STORED = 32_767
COORDINATE_STEP = 100.0  # of a stored coordinate per mm
PADDING = {"distances": 255}


class Location(NamedTuple):
    """Where a subject is in MNI space.

    Attributes:
        matrix: The file's mm to mm in MNI space.
        overlap: Of the subject's tissue with the template's, from 0 to 1.
    """

    matrix: Float64[np.ndarray, "4 4"]
    overlap: float


Locate = Callable[[Volume], Location]
"""From generation labels, with their place, to MNI space."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SubjectStore:
    """Subjects on disk, as records for training.

    Attributes:
        path: The folder.
        names: Of the subjects.
        splits: train, validation, test or "", per subject.
        table: What the labels mean.
        shape: The grid that all are padded to, of all voxels.
        channels: Modalities that images hold; 0 for none.
        has_age: Whether any subject's age is known; records then have it, NaN where it is not.
        step: Every so many voxels along each axis are read: 2 reads a grid of 2 mm, an eighth of the bytes.
    """

    path: Path
    names: tuple[str, ...]
    splits: tuple[str, ...]
    table: LabelTable
    shape: tuple[int, int, int]
    channels: int
    has_age: bool = False
    step: int = 1

    def __len__(self) -> int:
        """Return the number of subjects."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Return where a subject lies."""
        return str(self.path / self.names[index])

    def __repr__(self) -> str:
        """Return what tells this data from other."""
        coarser = f", every {self.step} voxels" if self.step > 1 else ""
        return f"SubjectStore({self.table.name}, {self.shape}{coarser}, {', '.join(self.names)[:200]})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a subject's arrays, padded to the common grid."""
        folder, step = self.path / self.names[index], self.step
        record = read_record(folder / "subject.json")
        x, y, z = (-(-length // step) for length in self.shape)
        shape = (x, y, z)
        found: dict[str, Any] = {
            name: _padded(_mapped(folder / f"{name}.npy")[::step, ::step, ::step], shape, PADDING.get(name, 0))
            for name in record["arrays"]
        }
        if self.channels:
            stored = found.pop("images", np.zeros((*shape, 0), np.int16))
            images = np.zeros((*shape, self.channels), np.int16)
            images[..., [IMAGES.index(name) for name in record["images"]]] = stored
            scale = [record["scale"].get(name, 1.0) for name in IMAGES[: self.channels]]
            found["images"], found["image_scale"] = images, np.array(scale, np.float32)
            found["present"] = np.array([name in record["images"] for name in IMAGES[: self.channels]])
        if self.has_age:
            found["age"] = np.float32(np.nan if record["age"] is None else record["age"])
        found.setdefault("defaced", np.zeros(shape, np.uint8))
        found["size"] = -(-np.array(record["size"], np.int32) // step)
        found["mirror"] = np.array(self.table.mirror, np.uint8)
        # Negative where the data set states none: the generator's own are taken.
        found["read"] = np.array(record["read"] or [-1.0] * len(IMAGES), np.float32)
        return found

    def affine(self, index: int) -> Float64[np.ndarray, "4 4"]:
        """Return where a subject's voxels are, in mm of its files."""
        return np.array(read_record(self.path / self.names[index] / "subject.json")["affine"])


def example_record(
    table: LabelTable, shape: tuple[int, int, int], channels: int = len(IMAGES)
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return a record of everything that a store may hold, all zeros that take no memory: its shapes are what counts.

    Args:
        table: What the labels mean.
        shape: The grid that all subjects are padded to.
        channels: Modalities of its images.
    """
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "labels": (shape, np.uint8), "segmentation": (shape, np.uint8), "coordinates": ((*shape, 3), np.int16),
        "images": ((*shape, channels), np.int16), "image_scale": ((channels,), np.float32),
        "present": ((channels,), np.bool_), "defaced": (shape, np.uint8), "size": ((3,), np.int32),
        "mirror": ((len(table.mirror),), np.uint8), "read": ((len(IMAGES),), np.float32),
    }  # fmt: skip
    if table.has_surfaces:
        kinds["distances"] = (*shape, len(DISTANCES)), np.uint8
    return {name: np.broadcast_to(np.zeros((), dtype), size) for name, (size, dtype) in kinds.items()}


def write_subject(store: Path, files: SubjectFiles, table: LabelTable, locate: Locate | None) -> dict[str, Any]:
    """Read a subject's files, compute what is missing, and write it; a subject that is there already stays.

    Args:
        store: The folder.
        files: Of the subject.
        table: What its labels mean.
        locate: Finds MNI space where there are no maps of it; None leaves coordinates out.

    Returns:
        Its record.

    Raises:
        InputError: For whatever is wrong with a file.
    """
    folder = store / files.name
    if (folder / "subject.json").exists():
        return read_record(folder / "subject.json")
    stored = read_labels(files.path, table)
    labels, box = _cut_labels(stored, table)
    arrays, scale, overlap = _arrays(files, stored.grid, labels, box, table, locate)
    record = {
        "subject": files.subject,
        "split": files.split,
        "age": files.age,
        "size": labels.array.shape,
        "affine": labels.affine,
        "images": files.images,
        "scale": scale,
        "overlap": overlap,
        "read": thresholds_of(files.dataset),
        "arrays": sorted(arrays),
        "files": {name: str(path) for name, path in {"path": files.path, **files.others}.items()},
        "volumes_ml": _volumes(arrays["segmentation"], table),
    }
    temporary = store / f".{uuid.uuid4().hex[:12]}-{files.name[-100:]}"
    make_folder(temporary)
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", np.ascontiguousarray(array))
        write_json(temporary / "subject.json", record)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_record(folder / "subject.json")


def read_labels(path: Path, table: LabelTable) -> Volume:
    """Read a label map.

    Raises:
        InputError: It cannot be read, or holds labels that the table does not know.
    """
    stored = nifti.read(path, dimensions=(3,), dtype=np.int32, allow_constant=False)
    table.require_known(stored.array, path)
    return stored


def check_subject(files: SubjectFiles, table: LabelTable) -> None:
    """Read all files of a subject as `write_subject` will, and keep nothing.

    Raises:
        InputError: For whatever is wrong with one of them.
    """
    grid = read_labels(files.path, table).grid
    for name in files.others:
        _read_beside(files, name, grid, np.int32 if name == "generation" else np.float32)


def close_store(store: Path, subjects: Sequence[SubjectFiles], table: LabelTable) -> None:
    """Write what makes the folder a store, when its subjects are written.

    Raises:
        InputError: There are none.
    """
    remove_leftovers(store)
    if not subjects:
        raise InputError(store, "one subject at least", "none", "see outputs/failed.csv")
    records = [read_record(store / one.name / "subject.json") for one in subjects]
    largest = np.max([record["size"] for record in records], 0)
    content = {
        "version": VERSION,
        "subjects": [one.name for one in subjects],
        "splits": [one.split for one in subjects],
        "shape": (-(-largest // MULTIPLE) * MULTIPLE).tolist(),
        "channels": modalities_of(subjects),
        "has_age": any(one.age is not None for one in subjects),
        "table": {"name": table.name, "rows": [row._asdict() for row in table.rows]},
    }
    write_json(store / "store.json", content)


def find_store(path: Path) -> Path | None:
    """Return the store that a folder is, or that the run in it has made; None where there is none."""
    return next((place for place in (path, path / "outputs" / "store") if (place / "store.json").exists()), None)


def open_store(path: Path) -> SubjectStore:
    """Open a store, or that of a run.

    Raises:
        InputError: The folder is none, or one of another version.
    """
    found = find_store(path)
    if found is None:
        advice = "make one with jaxmed brainfm generate --store"
        raise InputError(path, "a store of subjects (with store.json)", "none", advice)
    path = found
    record = read_record(path / "store.json")
    if record.get("version") != VERSION:
        raise InputError(path / "store.json", f"a store of version {VERSION}", record.get("version"), "make it again")
    stored = record["table"]
    table = LabelTable(stored["name"], tuple(LabelRow(**row) for row in stored["rows"]))
    x, y, z = record["shape"]
    names, splits = tuple(record["subjects"]), tuple(record["splits"])
    return SubjectStore(path, names, splits, table, (x, y, z), record["channels"], record["has_age"])


class Box(NamedTuple):
    """Voxels that are kept: the first ones, which may lie before the file's, and how many."""

    start: tuple[int, int, int]
    shape: tuple[int, int, int]


def _cut_labels(stored: Volume, table: LabelTable) -> tuple[Volume, Box]:
    """Return the label map at 1 mm, cut about the brain, and where it was cut."""
    labels = _upright(stored, 0)
    is_brain = np.isin(table.generation(labels.array), BRAIN)
    if not is_brain.any():
        is_brain = labels.array > 0
    start, shape = [], []
    for axis in range(3):
        places = np.flatnonzero(is_brain.any(tuple(other for other in range(3) if other != axis)))
        start.append(int(places[0]) - MARGIN)
        shape.append(int(places[-1]) + 1 - int(places[0]) + 2 * MARGIN)
    box = Box((start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))
    return _cut(labels, box), box


def _arrays(files, grid, labels, box, table, locate):
    """Return all arrays of a subject, the scale of its images, and how well MNI space was found."""

    def read(name: str, order: int, dtype: Any = np.float32) -> np.ndarray:
        return _cut(_upright(_read_beside(files, name, grid, dtype), order), box).array

    generation = table.generation(labels.array)
    if "generation" in files.others:
        generation = read("generation", 0, np.int32).astype(np.uint8)
    arrays = {"labels": generation, "segmentation": table.index(labels.array, files.path)}
    if DISTANCES[0] in files.others:
        stored = np.stack([read(name, 1) for name in DISTANCES], -1)
        arrays["distances"] = np.clip(np.rint(stored), 0, 255).astype(np.uint8)
    elif table.has_surfaces:
        arrays["distances"] = surface_distances(labels.array, table)
    overlap = None
    if COORDINATES[0] in files.others:
        stored = np.stack([read(name, 1) for name in COORDINATES], -1)
        arrays["coordinates"] = _whole(stored)
    elif locate is not None:
        matrix, overlap = locate(Volume.make(generation, labels.affine))
        matrix = matrix @ labels.affine
        voxels = np.stack(np.meshgrid(*map(np.arange, generation.shape), indexing="ij"), -1)
        arrays["coordinates"] = _whole((voxels @ matrix[:3, :3].T + matrix[:3, 3]) * COORDINATE_STEP)
    scale = {}
    if files.images:
        stored = []
        for name in files.images:
            image = read(name, 1)
            # HU are whole numbers already; the rest takes all of the 15 bits.
            scale[name] = 1.0 if name == "CT" else max(float(np.abs(image).max()), 1e-12) / LARGEST_STORED
            stored.append(_whole(image / scale[name]))
        arrays["images"] = np.stack(stored, -1)
    if "defaced" in files.others:
        arrays["defaced"] = (read("defaced", 0) > 0).astype(np.uint8)
    if "lesion" in files.others:
        arrays["lesion"] = np.clip(np.rint(255 * read("lesion", 1)), 0, 255).astype(np.uint8)
    return arrays, scale, overlap


def _read_beside(files: SubjectFiles, name: str, grid: Grid, dtype: Any) -> Volume:
    """Read a further file of a subject, which lies on the grid of its label map."""
    path = files.others[name]
    volume = nifti.read(path, dimensions=(3,), dtype=dtype)
    require_same_grid(volume.grid, grid, str(path), str(files.path))
    if name == "generation" and (volume.array.min() < 0 or volume.array.max() > 255):
        raise InputError(path, "labels from 0 to 255", f"{volume.array.min()} to {volume.array.max()}")
    return volume


def _volumes(segmentation: Shaped[np.ndarray, "x y z"], table: LabelTable) -> dict[str, float]:
    """Return the volume of every class in ml: voxels of 1 mm."""
    counts = np.bincount(segmentation.reshape(-1), minlength=len(table.classes))
    return {row.name: float(count) / 1000 for row, count in zip(table.classes, counts, strict=False) if row.label}


def _upright(volume: Volume, order: int) -> Volume:
    """Turn to RAS+ and resample to 1 mm; a grid that is oblique to the scanner stays so."""
    volume = reorient(volume)
    if np.allclose(volume.spacing, 1.0, atol=1e-3):
        return volume
    return resample(volume, 1.0, order=order)


def _cut(volume: Volume, box: Box) -> Volume:
    x, y, z = (start + size // 2 for start, size in zip(box.start, box.shape, strict=True))
    return crop_or_pad(volume, box.shape, center=(x, y, z))


def _whole(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return np.clip(np.rint(values), -LARGEST_STORED, LARGEST_STORED).astype(np.int16)


def _mapped(path: Path) -> Shaped[np.ndarray, "..."]:
    try:
        return map_array(path)
    except (OSError, ValueError) as error:
        raise InputError(path, "an array of a store", f"a damaged one ({error})", "make the store again") from error


def _padded(array: Shaped[np.ndarray, "..."], shape: tuple[int, int, int], fill: int) -> Shaped[np.ndarray, "..."]:
    result = np.full((*shape, *array.shape[3:]), fill, array.dtype)
    x, y, z = array.shape[:3]
    result[:x, :y, :z] = array
    return result

"""Packed records: each field of each record one `.npy` file that training maps into memory, beside an index.

Why plain .npy and not .npz or shards: reading a gzipped NIfTI is bound by decompression, some hundred MB/s a core; a
mapped file costs no decompression at all, the page cache serves it to every worker, a random crop reads only the pages
that it touches, packing continues where it was stopped, and one damaged record is one file. The price is disk: int16
or float16 halve it. Folders hold at most a thousand records.

    pack.json                    settings, and per field: file, its sum, shape, type, affine, and its source's size,
                                 time and sum
    values.npz                   numbers beside the files (ages, labels), one column each
    0000/0000012.image.npy
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from jaxmed.config import Threads, checked
from jaxmed.data.records import FileSource
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, remove_leftovers, require_file, walk_files, write_json
from jaxmed.io.numpy_files import map_array, write_npz
from jaxmed.volume import Volume

INDEX, VALUES, VERSION = "pack.json", "values.npz", 1


@dataclasses.dataclass(frozen=True)
@checked
class PackConfig:
    """How records are stored.

    Attributes:
        dtype: Type of fields that are read as floating point. An integer type asks for whole numbers in its range (HU
            of a CT in int16), and float16 for magnitudes up to 65504; it keeps three digits. Fields of whole numbers
            (labels) keep their type.
        threads: Records packed at a time.
    """

    dtype: Literal["float32", "float16", "int16", "uint8"] = "float32"
    threads: Threads = 2


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class PackedSource:
    """Records of a pack; arrays are mapped, not read.

    Attributes:
        folder: Where the pack is.
        records: Per record and field: file, shape, type, affine.
        values: Per name one number (or row of numbers) per record.
        settings: The transform and the type that the pack was made with.
    """

    folder: Path
    records: tuple[dict[str, Any], ...]
    values: Mapping[str, Shaped[np.ndarray, "record ..."]]
    settings: tuple[str, str]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Map a record's fields: a Volume where it was packed from one, else an array; read-only."""
        fields = {name: _mapped(self.folder, entry) for name, entry in self.records[index].items()}
        return {**fields, **{name: column[index] for name, column in self.values.items()}}

    def name(self, index: int) -> str:
        """Return the record's first file."""
        return str(self.folder / next(iter(self.records[index].values()))["file"])

    def __repr__(self) -> str:
        """Return the settings and a digest of the sources' sums."""
        digest = hashlib.sha256()
        for record in self.records:
            for field, entry in record.items():
                digest.update(f"{field} {entry['source']['sha256']}\n".encode())
        return f"PackedSource({'; '.join(self.settings)}; {len(self)} records, {digest.hexdigest()[:16]})"


def pack(
    source: FileSource,
    folder: str | Path,
    transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    config: PackConfig = PackConfig(),
) -> PackedSource:
    """Read every record once, transform it and store it.

    Records that an earlier call packed from unchanged files with equal settings are kept, so a call that was stopped
    continues; every kept file is read, and packed again with a warning where its bits have changed. Each file is
    written wholly or not at all.

    Args:
        source: What to pack.
        folder: Where to; made when missing.
        transform: What is done once and for all, without random numbers: fields to fields, such as reorientation and
            resampling. Its repr is stored and must be the same in every run: that of a frozen dataclass is.
        config: How to store.

    Returns:
        The packed records, in the order of the source.

    Raises:
        InputError: When a record cannot be read or does not fit the type; what was packed before stays.
        ValueError: When the transform's repr shows an address in memory.
    """
    folder = Path(folder)
    if " at 0x" in repr(transform):
        raise ValueError(f"transform: expected a repr that is equal in every run, found {transform!r}")
    head = {"version": VERSION, "transform": repr(transform), "dtype": config.dtype}
    remove_leftovers(folder, min_age=3600.0)  # a cache may be shared by runs of today
    known = _known_records(folder, head)
    records: list[dict[str, Any] | None] = [None] * len(source)
    work = functools.partial(_pack_record, source, folder, transform, config, known)
    executor = concurrent.futures.ThreadPoolExecutor(config.threads)
    try:
        futures = {executor.submit(work, index): index for index in range(len(source))}
        for future in concurrent.futures.as_completed(futures):
            records[futures[future]] = future.result()
    finally:
        # Also after an error or Ctrl-C: what is done is written down, and the next call starts there.
        executor.shutdown(wait=True, cancel_futures=True)
        columns: dict[str, Any] = {name: np.asarray(column) for name, column in source.values.items()}
        write_npz(folder / VALUES, columns)
        is_complete = all(record is not None for record in records)
        write_json(folder / INDEX, {**head, "complete": is_complete, "records": records})
    return _open(folder, _read_index(folder))


def open_pack(folder: str | Path, *, check_sources: bool = True) -> PackedSource:
    """Open a pack.

    Args:
        folder: Where it is.
        check_sources: Whether to compare with the files that it was made from; those that are not on this machine
            are not compared.

    Raises:
        InputError: When there is no pack, it was not finished, a source has changed since, or a packed file has.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if not index["complete"]:
        missing = sum(record is None for record in index["records"])
        raise InputError(folder, "a finished pack", f"{missing} records missing", "run the packing again")
    if check_sources:
        stale = stale_files(folder)
        if stale:
            found = f"{len(stale)} changed: {', '.join(stale[:3])}{', ...' if len(stale) > 3 else ''}"
            raise InputError(folder, "sources as they were packed", found, "run the packing again")
    entries = [entry for record in index["records"] for entry in record.values()]
    with concurrent.futures.ThreadPoolExecutor() as executor:
        whole = list(executor.map(functools.partial(_is_whole, folder), entries))
    if damaged := [entry["file"] for entry, is_whole in zip(entries, whole, strict=True) if not is_whole]:
        found = f"{len(damaged)} damaged: {', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''}"
        raise InputError(folder, "records as they were packed", found, "run the packing again")
    return _open(folder, index)


def _open(folder: Path, index: Mapping[str, Any]) -> PackedSource:
    with np.load(require_file(folder / VALUES, "the values of a pack")) as values:
        columns = {name: values[name] for name in values.files}
    return PackedSource(folder, tuple(index["records"]), columns, (index["transform"], index["dtype"]))


def stale_files(folder: str | Path) -> list[str]:
    """Return the sources that changed after they were packed: another size, or another time and another sum."""
    records = [record for record in _read_index(Path(folder))["records"] if record is not None]
    sources = [entry["source"] for record in records for entry in record.values()]
    return [source["path"] for source in sources if os.path.exists(source["path"]) and not _is_unchanged(source)]


def _pack_record(
    source: FileSource,
    folder: Path,
    transform: Callable[[dict[str, Any]], dict[str, Any]] | None,
    config: PackConfig,
    known: Mapping[str, dict[str, Any]],
    index: int,
) -> dict[str, Any]:
    paths = {name: os.path.abspath(paths[index]) for name, paths in source.files.items()}
    old = known.get(_identity(index, paths))
    if old is not None and all(
        _is_unchanged(entry["source"]) and (folder / entry["file"]).is_file() for entry in old.values()
    ):
        damaged = [entry["file"] for entry in old.values() if not _is_whole(folder, entry)]
        if not damaged:
            return old
        told = "its bits are not those that were written; it is packed again. Is the disk in order?"
        warnings.warn(f"{folder / damaged[0]}: {told}", stacklevel=2)
    fingerprints = {name: _fingerprint(path) for name, path in paths.items()}
    fields = {name: value for name, value in source[index].items() if name in paths}
    if transform is not None:
        try:
            fields = transform(fields)
        except InputError as error:
            raise InputError(
                f"{source.name(index)}: {error.where}", error.expected, error.found, error.advice
            ) from error
    if set(fields) != set(paths):
        raise ValueError(f"transform: expected the fields {sorted(paths)}, found {sorted(fields)}")
    record = {}
    for name, value in fields.items():
        is_volume = isinstance(value, Volume)
        array = as_stored(np.asarray(value.array if is_volume else value), config.dtype, paths[name])
        place = Path(f"{index // 1000:04d}") / f"{index:07d}.{name}.npy"
        with atomic_path(folder / place) as temporary:
            np.save(temporary, array, allow_pickle=False)
            total = _sum(str(temporary))
        record[name] = {
            "file": place.as_posix(),
            "sha256": total,
            "shape": array.shape,
            "dtype": array.dtype.name,
            "affine": value.affine if is_volume else None,
            "source": fingerprints[name],
        }
    return record


def as_stored(array: Shaped[np.ndarray, "..."], dtype: str, where: str) -> Shaped[np.ndarray, "..."]:
    """Return an array in the type that files hold; whole numbers keep theirs.

    Args:
        array: As it was read.
        dtype: For floating point.
        where: Its file, for messages.

    Raises:
        InputError: A value does not fit.
    """
    if array.dtype.kind != "f":
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(array, dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise InputError(where, f"finite values that fit {dtype}", f"up to {np.abs(array).max():g}", "use float32")
    if stored.dtype.kind != "f" and not np.array_equal(stored, array):
        found = f"others in [{array.min():g}, {array.max():g}]"
        raise InputError(where, f"whole numbers that fit {dtype}", found, "pack as float16 or float32")
    return stored


def _mapped(folder: Path, entry: Mapping[str, Any]) -> Volume | Shaped[np.ndarray, "..."]:
    path = require_file(folder / entry["file"], "a packed record")
    try:
        array = map_array(path)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(path, "a whole .npy file", error, "run the packing again") from error
    if list(array.shape) != entry["shape"] or array.dtype.name != entry["dtype"]:
        expected = f"{entry['dtype']} of shape {entry['shape']}"
        raise InputError(path, expected, f"{array.dtype} of shape {list(array.shape)}", "run the packing again")
    return array if entry["affine"] is None else Volume.make(array, np.array(entry["affine"], np.float64))


def _known_records(folder: Path, head: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not (folder / INDEX).is_file():
        return {}
    index = _read_index(folder)
    if any(index.get(name) != value for name, value in head.items()):
        return {}
    known = {}
    for number, record in enumerate(index["records"]):
        if record is not None:
            paths = {name: entry["source"]["path"] for name, entry in record.items()}
            known[_identity(number, paths)] = record
    return known


def _identity(index: int, paths: Mapping[str, str]) -> str:
    return json.dumps([index, sorted(paths.items())])


def _read_index(folder: Path) -> dict[str, Any]:
    path = require_file(folder / INDEX, "the index of a pack")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, "the index of a pack", f"damaged JSON ({error})", "pack into a new folder") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        found = index.get("version") if isinstance(index, dict) else "something else"
        raise InputError(path, f"a pack of version {VERSION}", found, "pack again with this version")
    return index


def _fingerprint(path: str) -> dict[str, Any]:
    if not os.path.isdir(path):
        require_file(path, "a file to pack")
    size, time = size_and_time(path)
    return {"path": path, "size": size, "mtime_ns": time, "sha256": _sum(path)}


def _is_unchanged(source: Mapping[str, Any]) -> bool:
    if not os.path.exists(source["path"]):
        return False
    size, time = size_and_time(source["path"])
    if size != source["size"]:
        return False
    # Copying a data set changes times and not contents, so a time alone proves nothing.
    return time == source["mtime_ns"] or _sum(source["path"]) == source["sha256"]


def size_and_time(path: str) -> tuple[int, int]:
    """Return the bytes of a file and when it changed; of a folder, such as one of slices, of all files under it."""
    files = [os.stat(file) for file in walk_files(path)] if os.path.isdir(path) else [os.stat(path)]
    return sum(status.st_size for status in files), max((status.st_mtime_ns for status in files), default=0)


def _is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and _sum(str(path)) == entry.get("sha256")


def _sum(path: str) -> str:
    if os.path.isdir(path):
        parts = [f"{os.path.relpath(file, path)} {_sum(str(file))}" for file in walk_files(path)]
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

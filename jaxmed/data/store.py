"""A store of prepared records: a few large ArrayRecord files that training reads in any order, made to be moved.

A cache (`data.pack`) keeps a file for every record beside the images that it was made from. A store is what a pod
reads: file systems that serve many machines are slow with millions of small files, and the images are elsewhere. All
of its records have one shape and type; ArrayRecord, which comes with Grain, finds each by its number, and notices a
damaged block by its hash.

    store.json                   what every record went through, their shape, the shards; written last
    records.csv                  the manifest's row of every record, in order: a manifest itself, which names the store
    shards/00000.array_record    the records of some rows, one after another
    shards/00000.json            these rows' files with sizes and times, by which a call that was stopped continues
    outputs/failed.csv           rows that could not be read, and why
"""

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int, Shaped

from jaxmed.config import Size, Threads, checked, from_record, to_record
from jaxmed.data.pack import as_stored, size_and_time
from jaxmed.data.preprocess import Preprocess, differences
from jaxmed.data.scans import Record
from jaxmed.data.sequences import find_case
from jaxmed.errors import InputError, reason_of
from jaxmed.files import atomic_path, read_record, remove_leftovers, write_json
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import Table, read_table, resolve_path, write_table

INDEX, RECORDS, SHARDS, COLUMN, VERSION = "store.json", "records.csv", "shards", "store", 1
# Groups of one record, so that any is read by itself.
OPTIONS = {"none": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:1"}


@dataclasses.dataclass(frozen=True)
@checked
class StoreSettings:
    """What every record of a store went through.

    Attributes:
        preprocess: From a file to a network's input.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.
        dtype: Of the numbers; float16 keeps three digits.
        compression: "zstd" makes files smaller, by half where much is background, and reading slower.
    """

    preprocess: Preprocess
    series: str = ""
    fill: float | None = None
    dtype: Literal["float16", "float32"] = "float16"
    compression: Literal["none", "zstd"] = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a record."""
        return (*self.preprocess.size, self.preprocess.channels)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record before compression."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Shard(NamedTuple):
    """A file of records, as ArrayRecord's reader wants it told (its FileInstruction)."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class StoredSource:
    """Records of a store, read when they are asked for.

    Attributes:
        folder: The store.
        settings: What every record went through.
        paths: The file that each was made from, which need not be on this machine.
        shards: Where they lie.
    """

    folder: Path
    settings: StoreSettings
    paths: tuple[str, ...]
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record's image, [*size, channel]; read-only.

        Raises:
            InputError: It is damaged.
        """
        try:
            content = self._reader[index]
            array = np.frombuffer(content, self.settings.dtype).reshape(self.settings.shape)
        except (RuntimeError, OSError, ValueError) as error:  # Riegeli's hashes differ, or a file is cut off
            found = str(error).splitlines()[0][:120]
            raise InputError(self.folder, f"record {index} as it was packed", found, "pack it again") from error
        return {"image": array}

    def name(self, index: int) -> str:
        """Return the file that a record was made from."""
        return self.paths[index]

    def __repr__(self) -> str:
        """Return the settings and a digest of the files."""
        digest = hashlib.sha256("\0".join(self.paths).encode(errors="surrogateescape")).hexdigest()[:16]
        return f"StoredSource({self.settings}; {len(self)} records, {digest})"

    def rows(self, scans: Sequence[ScanFiles], preprocess: Preprocess) -> Int[np.ndarray, " scan"] | None:
        """Return the records of scans; None where not all are here as a network wants them."""
        if any(self._other_settings(scan, preprocess) for scan in scans):
            return None
        found = [self._places.get(os.path.abspath(scan.path)) for scan in scans]
        return None if None in found else np.array(found, np.int64)

    def require(self, scans: Sequence[ScanFiles], preprocess: Preprocess) -> None:
        """Refuse scans that are not here, or not as a network wants them.

        Raises:
            InputError: One is not.
        """
        for scan in scans:
            if other := self._other_settings(scan, preprocess):
                name, (here, wanted) = next(iter(other.items()))
                advice = "pack a store for this stage, or set its option to the store's"
                raise InputError(self.folder, f"records of {name} {wanted}", f"a store of {name} {here}", advice)
            if os.path.abspath(scan.path) not in self._places:
                advice = "see outputs/failed.csv there, or pack again with this manifest"
                raise InputError(self.folder, f"a record of {scan.path}", "none", advice)

    def _other_settings(self, scan: ScanFiles, preprocess: Preprocess) -> dict[str, tuple[Any, Any]]:
        if preprocess == self.settings.preprocess and (scan.series, scan.fill) == (
            self.settings.series, self.settings.fill,
        ):  # fmt: skip
            return {}
        pairs = {"series": (self.settings.series, scan.series), "fill": (self.settings.fill, scan.fill)}
        own = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return differences(self.settings.preprocess, preprocess) | own

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {path: number for number, path in enumerate(self.paths)}

    @functools.cached_property
    def _reader(self) -> ArrayRecordDataSource:
        shards: Any = self.shards  # it takes whatever has these fields
        return ArrayRecordDataSource(shards)


def find_store(store: Path | None, manifest: Path | None) -> tuple[StoredSource | None, Path | None]:
    """Return the store of a run, and its table: a store is a manifest itself, and a manifest may name one.

    Args:
        store: Folder of a store; None where the manifest may name it in a column "store", the same in every row.
        manifest: The table, or a store; None takes the store's own table.

    Raises:
        InputError: There is no finished store at the place, or the table names several.
    """
    if store is None and manifest is not None and (manifest / INDEX).is_file():
        store, manifest = manifest, None
    if store is None and manifest is not None and manifest.is_file():
        table = read_table(manifest, required=("path",))
        if COLUMN in table.columns:
            cells = sorted(set(table.column(COLUMN)))
            if len(cells) > 1 or not cells[0]:
                found = f"{len(cells)}: {', '.join(cell or 'an empty cell' for cell in cells[:3])}"
                raise InputError(manifest, f"one store in every row of the column '{COLUMN}'", found)
            store = Path(os.path.normpath(resolve_path(cells[0], manifest.parent)))
    if store is None:
        return None, manifest
    return open_store(store), manifest or store / RECORDS


def stored_scans(table: Table, series: str = "", fill: float | None = None) -> list[ScanFiles]:
    """Return the scans of a table whose records are in a store: their files need not be on this machine."""
    folder = table.path.absolute().parent
    cells = table.column("path")
    return [ScanFiles(Path(os.path.abspath(resolve_path(cell, folder))), series, fill=fill) for cell in cells]


def open_store(folder: str | Path) -> StoredSource:
    """Open a store.

    Raises:
        InputError: There is none, it was not finished, or a shard is missing or cut off.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        is_begun = (folder / SHARDS).is_dir()
        found = "one that was not finished" if is_begun else "none"
        advice = "run jaxmed data pack again: it continues" if is_begun else "make one with jaxmed data pack"
        raise InputError(folder, "a store", found, advice)
    index = read_record(folder / INDEX)
    if index.get("version") != VERSION:
        raise InputError(folder / INDEX, f"a store of version {VERSION}", index.get("version"), "pack it again")
    settings = from_record(StoreSettings, index["settings"], str(folder / INDEX))
    shards = []
    for name, count, size in index["shards"]:
        place = folder / SHARDS / name
        found = place.stat().st_size if place.is_file() else 0
        if found != size:
            told = f"{found:,} bytes" if found else "no file"
            raise InputError(place, f"a shard of {size:,} bytes", told, "copy the store again, or pack it again")
        shards.append(Shard(str(place), 0, count, count))
    paths = tuple(read_table(folder / RECORDS, required=("path",)).column("path"))
    if len(paths) != sum(shard.take for shard in shards):
        expected = f"{sum(shard.take for shard in shards)} records, as the shards have"
        advice = "give other rows as a manifest of their own beside --data.store"
        raise InputError(folder / RECORDS, expected, len(paths), advice)
    return StoredSource(folder, settings, paths, tuple(shards))


# Packing -------------------------------------------------------------------------------------------------------------


def pack_store(
    folder: Path,
    records: Sequence[Record],
    settings: StoreSettings,
    *,
    shard_mb: Size = 256,
    threads: Threads = 2,
    tell: Callable[[int, int], None] = lambda done, failed: None,
) -> tuple[StoredSource, list[dict[str, str]]]:
    """Read, prepare and store records, past broken ones; shards of an earlier start are kept.

    A shard is packed again where one of its files has changed, or could not be read. Each is written wholly or not at
    all; a call that was stopped continues at the shard it was at.

    Args:
        folder: The store; made where it is missing.
        records: What is packed, in this order.
        settings: What each goes through.
        shard_mb: Size of a shard in MB before compression; a larger record has one of its own.
        threads: That read.
        tell: Called after each shard with the records that were looked at and those that failed, so far.

    Returns:
        The store, and path, id and reason of what failed.

    Raises:
        InputError: The place holds a store of other settings, cannot be written, or no record can be read.
    """
    remove_leftovers(folder)
    _require_same(folder, settings)
    size = max(1, shard_mb * 10**6 // settings.record_bytes)
    chunks = [records[first : first + size] for first in range(0, len(records), size)]
    kept: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with ThreadPoolExecutor(threads) as executor:
        for number, chunk in enumerate(chunks):
            shard = _known_shard(folder, number, chunk, settings)
            if shard is None:
                # What the index says is no longer so; nobody opens a store while it changes.
                (folder / INDEX).unlink(missing_ok=True)
                shard = _write_shard(folder, number, chunk, settings, executor)
            kept.append(shard)
            failed += shard["failed"]
            tell(min((number + 1) * size, len(records)), len(failed))
    if not any(shard["kept"] for shard in kept):
        # Nothing is lost by it, and other settings, which may be what is needed, find the place free.
        shutil.rmtree(folder / SHARDS)
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        reason = f"{failed[0]['reason']}{more}" if failed else "no record"
        raise InputError(folder, "records that can be read", reason)
    _close(folder, chunks, kept, settings)
    return open_store(folder), failed


def _require_same(folder: Path, settings: StoreSettings) -> None:
    """Refuse to pack into a store of other settings, finished or not."""
    for place in (folder / INDEX, *sorted((folder / SHARDS).glob("*.json"))[:1]):
        if not place.is_file():
            continue
        found = from_record(StoreSettings, read_record(place)["settings"], str(place))
        if found != settings:
            pairs = {
                field.name: (getattr(found, field.name), getattr(settings, field.name))
                for field in dataclasses.fields(settings) if field.name != "preprocess"
            }  # fmt: skip
            pairs = differences(found.preprocess, settings.preprocess) | pairs
            name, (there, here) = next((name, pair) for name, pair in pairs.items() if pair[0] != pair[1])
            advice = "choose another --out, or replace it with --overwrite"
            raise InputError(folder, f"a new folder, or a store of {name} {here}", f"one of {name} {there}", advice)


def _known_shard(folder: Path, number: int, chunk: Sequence[Record], settings: StoreSettings) -> dict[str, Any] | None:
    """Return what a shard holds that an earlier start wrote from the same files; None where it is to be written."""
    record, data = folder / SHARDS / f"{number:05d}.json", _place(folder, number)
    if not record.is_file() or not data.is_file():
        return None
    shard = read_record(record)
    is_same = shard["settings"] == to_record(settings) and shard["size"] == data.stat().st_size
    is_same = is_same and not shard["failed"] and shard["sources"] == [_sources(one.scan, settings) for one in chunk]
    return shard if is_same else None


def _write_shard(
    folder: Path, number: int, chunk: Sequence[Record], settings: StoreSettings, executor: ThreadPoolExecutor
) -> dict[str, Any]:
    place = _place(folder, number)
    # Before they are read: what changes meanwhile is then seen to have changed.
    sources = [_sources(one.scan, settings) for one in chunk]
    found = list(executor.map(functools.partial(_read, settings), chunk))
    good = [row for row, one in enumerate(found) if isinstance(one, np.ndarray)]
    place.unlink(missing_ok=True)
    if good:
        with atomic_path(place) as temporary:
            try:
                writer = ArrayRecordWriter(str(temporary), OPTIONS[settings.compression])
                for row in good:
                    writer.write(np.ascontiguousarray(found[row]).tobytes())
                writer.close()
            except RuntimeError as error:  # which is how it tells of a full disk
                told = str(error).splitlines()[0][:160]
                raise InputError(place, "enough space to write", told, "free some space, or write elsewhere") from error
    failed = [
        {"path": str(one.path), "id": one.name, "reason": str(reason)}
        for one, reason in zip(chunk, found, strict=True) if not isinstance(reason, np.ndarray)
    ]  # fmt: skip
    size = place.stat().st_size if good else 0
    shard = {"settings": to_record(settings), "sources": sources, "kept": good, "failed": failed, "size": size}
    write_json(folder / SHARDS / f"{number:05d}.json", shard)
    return shard


def _read(settings: StoreSettings, record: Record) -> Shaped[np.ndarray, "..."] | str:
    """Return a record as it is stored, or why there is none."""
    try:
        image = settings.preprocess(record.scan)
        if image.shape != settings.shape:
            found = f"shape {image.shape}"
            raise InputError(record.path, f"one image of {settings.shape}", found, "pack slices one by one")
        return as_stored(image, settings.dtype, str(record.path))
    except (InputError, OSError, MemoryError) as error:
        return reason_of(error, record.path)


def _sources(scan: ScanFiles, settings: StoreSettings) -> list[list[Any]]:
    """Return path, size and time of the files of a scan; size -1 where there is none."""
    paths: list[Path] = [*scan.files] or [scan.path]
    if settings.preprocess.sequences:
        try:
            paths = [path for path in find_case(scan, settings.preprocess.sequences).paths if path is not None]
        except InputError:  # reading it will say so
            paths = [scan.path]
    return [[str(path), *(size_and_time(str(path)) if path.exists() else (-1, -1))] for path in paths]


def _close(
    folder: Path, chunks: Sequence[Sequence[Record]], shards: Sequence[Mapping[str, Any]], settings: StoreSettings
) -> None:
    """Write the table and, last, the index; delete shards of rows that are no longer asked for."""
    wanted = {f"{number:05d}" for number in range(len(chunks))}
    for path in (folder / SHARDS).iterdir():
        if path.stem not in wanted:
            path.unlink()
    rows = []
    for chunk, shard in zip(chunks, shards, strict=True):
        for row in shard["kept"]:
            given = {name: cell for name, cell in chunk[row].row.items() if name not in ("path", COLUMN)}
            rows.append({"path": os.path.abspath(chunk[row].path), **given, COLUMN: "."})
    columns = dict.fromkeys(name for row in rows for name in row)
    write_table(folder / RECORDS, list(columns), rows)
    listed = [
        [_place(folder, number).name, len(shard["kept"]), shard["size"]]
        for number, shard in enumerate(shards) if shard["kept"]
    ]  # fmt: skip
    write_json(folder / INDEX, {"version": VERSION, "settings": to_record(settings), "shards": listed})


def _place(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05d}.array_record"

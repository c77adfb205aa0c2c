"""Many scans as a network's inputs: looked at before a run, read side by side, and as a source of records."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Shaped

from jaxmed.data.pack import PackConfig, PackedSource, pack
from jaxmed.data.preprocess import RANGE_TOLERANCE, Preprocess
from jaxmed.data.records import FileSource, SubsetSource
from jaxmed.data.scans import describe
from jaxmed.data.sequences import find_case, require_sequences
from jaxmed.data.store import StoredSource
from jaxmed.errors import InputError
from jaxmed.files import require_file
from jaxmed.io.scans import ScanFiles, kind_of

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class PreparedField:
    """What a record's image went through: names it in a cache, and hands it to the device as float32."""

    preprocess: Preprocess
    fill: float | None = None

    def __call__(self, fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
        """Return the fields, the image as an array."""
        return {**fields, "image": np.asarray(fields["image"], np.float32)}


def input_source(
    scans: Sequence[ScanFiles | Path],
    preprocess: Preprocess,
    cache: Path | None = None,
    series: str = "",
    fill: float | None = None,
    store: StoredSource | None = None,
) -> FileSource | PackedSource | SubsetSource:
    """Make a source of prepared inputs under the field "image".

    Args:
        scans: One per record.
        preprocess: What each goes through.
        cache: Folder in which prepared inputs are kept, float16, to be read in place from then on.
        series: Which DICOM series is meant where a folder holds several, of scans that do not say it themselves.
        fill: Intensity of voxels that have none, likewise.
        store: Records that were prepared before: read instead of files where all scans are in it and it was packed by
            this preprocessing.
    """
    listed = [scan if isinstance(scan, ScanFiles) else ScanFiles(scan, series, fill=fill) for scan in scans]
    rows = None if store is None else store.rows(listed, preprocess)
    if store is not None and rows is not None:
        return SubsetSource(store, rows)
    source = FileSource(
        {"image": tuple(scan.path for scan in listed)},
        readers={"image": partial(_read, {scan.path: scan for scan in listed}, preprocess)},
    )
    if cache is None:
        return source
    return pack(source, cache, PreparedField(preprocess, listed[0].fill), PackConfig("float16"))


def check_scans(
    scans: Sequence[ScanFiles | Path],
    preprocess: Preprocess,
    whole: int,
    threads: int,
    store: StoredSource | None = None,
) -> list[str]:
    """Look at the header of every scan of a training run before it starts, and read some from end to end.

    Args:
        scans: Files, or folders of DICOM slices.
        preprocess: What each will go through.
        whole: How many are read, evenly spread over the list; of the others only the headers are.
        threads: That read.
        store: Scans that are in it need no look, as of `input_source`.

    Returns:
        What is unexpected, each with the number of volumes and one of them.

    Raises:
        InputError: A volume is broken; where several are, the first three are named.
    """
    scans = [scan if isinstance(scan, ScanFiles) else ScanFiles(scan) for scan in scans]
    if store is not None and store.rows(scans, preprocess) is not None:
        return []
    read_whole = set(np.linspace(0, len(scans) - 1, min(whole, len(scans))).round().astype(int).tolist())

    def look(item: tuple[int, ScanFiles]) -> tuple[str, ...]:
        number, scan = item
        return preprocess.prepare(scan).notes if number in read_whole else _look_at_header(scan, preprocess)

    found = require_whole(try_each(look, [*enumerate(scans)], threads), "volumes")
    places: dict[str, list[Path]] = {}
    for scan, notes in zip(scans, found, strict=True):
        for note in notes:
            places.setdefault(note, []).append(scan.path)
    return [f"{where[0].name}{_others(len(where), len(scans))}: {note}" for note, where in places.items()]


def try_each(read: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result | InputError]:
    """Read files side by side; where one is broken its error takes the place of the result."""

    def read_or_error(item: Item) -> Result | InputError:
        try:
            return read(item)
        except InputError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read_or_error, items))


def require_whole(found: Sequence[Result | InputError], where: str) -> list[Result]:
    """Return the results of `try_each`.

    Raises:
        InputError: A file is broken; where several are, the first three are named.
    """
    broken = [error for error in found if isinstance(error, InputError)]
    if len(broken) == 1:
        raise broken[0]
    if broken:
        told = "; ".join(map(str, broken[:3])) + ("; ..." if len(broken) > 3 else "")
        expected, advice = "files that can be trained on", "repair them, or leave them out of the manifest"
        raise InputError(where, expected, f"{len(broken)} of {len(found)} broken: {told}", advice)
    return [result for result in found if not isinstance(result, InputError)]


def require_inputs(batch: Shaped[Any, "..."], preprocess: Preprocess) -> Float[Any, "batch *size channel"]:
    """Return prepared inputs, one or more, as a batch.

    Raises:
        InputError: They have another shape or range than the network's input.
    """
    shape, (low, high) = (*preprocess.size, preprocess.channels), preprocess.intensity.limits
    name, what, raw = (
        ("image", "images", "an image of 8 or 16 bits")
        if preprocess.is_sliced
        else ("volume", "cubes", "a 3D array in HU, a Volume")
    )
    batch = batch[None] if batch.ndim == len(shape) else batch
    advice = f"give {raw} or a path to have it prepared"
    if batch.ndim != len(shape) + 1 or batch.shape[1:] != shape:
        expected = f"prepared {what} [batch, {', '.join(map(str, shape))}]"
        raise InputError(name, expected, f"shape {batch.shape}", advice)
    least, largest = float(batch.min()), float(batch.max())
    if not (least >= low - RANGE_TOLERANCE and largest <= high + RANGE_TOLERANCE):
        raise InputError(name, f"prepared {what} in [{low:g}, {high:g}]", f"[{least:g}, {largest:g}]", advice)
    return batch


def _read(scans: Mapping[Path, ScanFiles], preprocess: Preprocess, path: Path) -> np.ndarray:
    return preprocess(scans[path])


def _look_at_header(scan: ScanFiles, preprocess: Preprocess) -> tuple[str, ...]:
    if (kind := kind_of(scan.path)) in ("array", "picture"):
        require_file(scan.path, f"a {kind}", kinds=("npy", "zip") if kind == "array" else ("png", "jpeg", "tiff"))
        return ()
    if preprocess.sequences:
        case = find_case(scan, preprocess.sequences)
        if preprocess.missing == "refuse":
            require_sequences(case, preprocess.sequences)
        for path in case.paths:
            if path is not None and path != case.scan.path:
                describe(path)
        scan = case.scan
    _, codes = describe(scan)
    return () if codes is None else tuple(preprocess.check_axes(codes))


def _others(number: int, total: int) -> str:
    return f" (and {number - 1} more of {total})" if number > 1 else ""

"""Volumes of a training run looked at before it starts: all that is broken is told at once, and what is unexpected."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxmed.data.scans import describe
from jaxmed.errors import InputError
from jaxmed.files import require_file
from jaxmed.io.scans import ScanFiles, kind_of
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.systems.tangerine.inputs import read_scan


def check_volumes(scans: Sequence[ScanFiles | Path], preprocess: Preprocess, whole: int, threads: int) -> list[str]:
    """Look at the header of every volume, and read some from end to end.

    Args:
        scans: Files, or folders of DICOM slices.
        preprocess: What each will go through.
        whole: How many are read, evenly spread over the list; of the others only the headers are.
        threads: That read.

    Returns:
        What is unexpected, each with the number of volumes and one of them.

    Raises:
        InputError: A volume is broken; where several are, the first three are named.
    """
    scans = [scan if isinstance(scan, ScanFiles) else ScanFiles(scan) for scan in scans]
    paths = [scan.path for scan in scans]
    is_whole = np.zeros(len(paths), bool)
    is_whole[np.linspace(0, len(paths) - 1, min(whole, len(paths))).round().astype(int)] = True

    def look(scan: ScanFiles, is_whole: np.bool_) -> tuple[str, ...] | InputError:
        try:
            return read_scan(scan, preprocess).warnings if is_whole else _look_at_header(scan, preprocess)
        except InputError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(look, scans, is_whole))
    broken = [error for error in found if isinstance(error, InputError)]
    if len(broken) == 1:
        raise broken[0]
    if broken:
        told = "; ".join(map(str, broken[:3])) + ("; ..." if len(broken) > 3 else "")
        advice = "repair them, or leave them out of the manifest"
        raise InputError(
            "volumes", "files that can be trained on", f"{len(broken)} of {len(paths)} broken: {told}", advice
        )
    places: dict[str, list[Path]] = {}
    for path, warnings in zip(paths, found, strict=True):
        for warning in warnings if not isinstance(warnings, InputError) else ():
            places.setdefault(warning, []).append(path)
    return [f"{where[0].name}{_others(len(where), len(paths))}: {warning}" for warning, where in places.items()]


def _look_at_header(scan: ScanFiles, preprocess: Preprocess) -> tuple[str, ...]:
    if kind_of(scan.path) == "array":
        require_file(scan.path, "a volume")
        return ()
    _, codes = describe(scan)
    return () if codes is None else tuple(preprocess.check_axes(codes))


def _others(number: int, total: int) -> str:
    return f" (and {number - 1} more of {total})" if number > 1 else ""

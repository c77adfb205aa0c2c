"""The sequences of one case, each a scan of its own, as the channels of one volume; on the host.

A sequence is told by the name of its file or DICOM folder: "t2w.nii.gz", or "case12_t2w.nii.gz" beside
"case12_adc.nii.gz". The first one that is there gives the grid, and the others are brought onto it by their affines.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmed.arrays.grid import resample_to
from jaxmed.data.stored import Stored
from jaxmed.errors import InputError
from jaxmed.io.scans import NAME_ENDINGS, ScanFiles, kind_of, read_volume
from jaxmed.volume import GRID_TOLERANCE, Grid, Volume

SEPARATORS = "_-. "
LEAST_COVERED = 0.5  # share of the first sequence's field of view that another must show
NOTED_BELOW = 0.99  # a smaller share is told


class Case(NamedTuple):
    """Where the sequences of one case lie.

    Attributes:
        scan: The first sequence that is there: its grid is the case's.
        paths: File or DICOM folder of every channel; None where there is none.
    """

    scan: ScanFiles
    paths: tuple[Path | None, ...]


def sequence_of(path: Path, sequences: Sequence[str]) -> tuple[int, str] | None:
    """Return which sequence a name tells, and what stands before it; None where it tells none.

    Args:
        path: A file or folder.
        sequences: A word for each channel, in any case; several words for the same one are parted by "|". Channels
            without a word are never found.
    """
    name = path.name.lower()
    stem = name.removesuffix(max((ending for ending in NAME_ENDINGS if name.endswith(ending)), key=len, default=""))
    for number, words in enumerate(sequences):
        for word in filter(None, words.lower().split("|")):
            before = stem.removesuffix(word)
            if before != stem and (not before or before[-1] in SEPARATORS):
                return number, before
    return None


def find_case(scan: ScanFiles, sequences: Sequence[str]) -> Case:
    """Return the files of a case.

    Args:
        scan: One of its sequences, or the folder of all of them; a file of another name counts as the first sequence.
        sequences: As of `sequence_of`.

    Raises:
        InputError: A folder has no sequence, or those of several cases.
    """
    path = scan.path
    found: dict[int, Path] = {}
    if not path.is_dir() or sequence_of(path, sequences) is not None:
        if not path.exists():
            return Case(scan, tuple(path if number == 0 else None for number in range(len(sequences))))
        own, before = sequence_of(path, sequences) or (0, "")
        found = _beside(path.parent, sequences).get(before, {}) | {own: path}
    else:
        cases = _beside(path, sequences)
        if len(cases) != 1:
            expected = f"one case with files named {' , '.join(filter(None, sequences))}"
            names = f"{len(cases)} of them" if cases else "none"
            raise InputError(path, expected, names, "give its folder, or its first sequence")
        found = next(iter(cases.values()))
    paths = tuple(found.get(number) for number in range(len(sequences)))
    first = next(one for one in paths if one is not None)
    return Case(scan if first == path else ScanFiles(first, fill=scan.fill), paths)


def gather_cases(scans: Sequence[ScanFiles], sequences: Sequence[str]) -> tuple[tuple[ScanFiles, ...], tuple[str, ...]]:
    """Return the first sequence of every case among the scans of a folder, and what was passed over.

    Args:
        scans: What `data.scans.find_scans` found.
        sequences: As of `sequence_of`; where there are none, the scans are returned.

    Raises:
        InputError: No scan is named after a sequence.
    """
    if not sequences or len(scans) == 1:
        return tuple(scans), ()
    named = [scan for scan in scans if sequence_of(scan.path, sequences) is not None]
    if not named:
        expected = f"scans named {', '.join(filter(None, sequences))}"
        raise InputError(scans[0].path.parent, expected, f"none of {len(scans)}", "set --preprocess.sequences")
    firsts = dict.fromkeys(find_case(scan, sequences).scan.path for scan in named)
    kept = tuple(scan for scan in named if scan.path in firsts)
    passed = [scan.path for scan in scans if scan not in named]
    if not passed:
        return kept, ()
    note = f"{passed[0]} is not named after a sequence ({', '.join(filter(None, sequences))}): passed over"
    return kept, (note + f", and {len(passed) - 1} more" * (len(passed) > 1),)


def require_sequences(case: Case, sequences: Sequence[str]) -> None:
    """Refuse a case that lacks a sequence which has a name.

    Raises:
        InputError: It does.
    """
    for words, path in zip(sequences, case.paths, strict=True):
        if words and path is None:
            advice = "or fill it with zeros: --preprocess.missing zero"
            raise InputError(case.scan.path, f"a file named {words.replace('|', ' or ')} beside it", "none", advice)


def read_case(case: Case, sequences: Sequence[str]) -> Stored:
    """Read a case as one volume; channels that are not there are 0.

    Args:
        case: Its files.
        sequences: For messages.

    Raises:
        InputError: A file cannot be read, or shows another region than the first.
    """
    first = read_volume(case.scan)
    grid, notes = first.volume.grid, list(first.notes)
    channels, knows_frame = [], first.knows_frame
    for words, path in zip(sequences, case.paths, strict=True):
        if path is None:
            channels.append(np.zeros(grid.shape, np.float32))
            continue
        if path == case.scan.path:
            channels.append(np.asarray(first.volume.array, np.float32))
            continue
        other = read_volume(ScanFiles(path, fill=case.scan.fill))
        knows_frame = knows_frame and other.knows_frame
        notes += other.notes
        covered = share_inside(grid, other.volume.grid)
        if covered < LEAST_COVERED:
            expected, advice = f"a scan of the region of {case.scan.path}", "check its affine, and whose it is"
            raise InputError(path, expected, f"one that shows {covered:.0%} of it", advice)
        if covered < NOTED_BELOW:
            notes.append(f"{words} shows {covered:.0%} of the region of the first sequence, and is 0 beyond")
        channels.append(np.asarray(_onto(other.volume, grid), np.float32))
    volume = Volume.make(np.stack(channels, axis=-1), grid.affine)
    return Stored((volume,), "volume", case.scan.path, knows_frame, tuple(notes))


def share_inside(inner: Grid, outer: Grid, samples: int = 16) -> float:
    """Return the share of the field of view of one grid that lies within that of another, by a lattice of places."""
    places = [(np.arange(samples) + 0.5) * size / samples - 0.5 for size in inner.shape]
    points = np.stack([*np.meshgrid(*places, indexing="ij"), np.ones((samples,) * 3)], axis=-1)
    found = (points @ np.linalg.solve(outer.affine, inner.affine).T)[..., :3]
    return float(((found >= -0.5) & (found <= np.array(outer.shape) - 0.5)).all(axis=-1).mean())


def _onto(volume: Volume, grid: Grid) -> np.ndarray:
    """Interpolate linearly, unless both grids are the same."""
    if volume.grid.shape == grid.shape:
        corners = np.array([[*corner, 1] for corner in itertools.product(*((0, size - 1) for size in grid.shape))])
        apart = np.abs((corners @ (volume.affine - grid.affine).T)[:, :3]).max()
        if apart < GRID_TOLERANCE * min(volume.spacing):
            return volume.array
    return resample_to(volume, grid, order=1).array


def _beside(folder: Path, sequences: Sequence[str]) -> dict[str, dict[int, Path]]:
    """Return the sequences in a folder, by what stands before their names."""
    return _listed(folder, folder.stat().st_mtime_ns, tuple(sequences))


@functools.lru_cache(maxsize=4)  # a folder may hold thousands of cases, each of which asks
def _listed(folder: Path, changed: int, sequences: tuple[str, ...]) -> dict[str, dict[int, Path]]:
    cases: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        named = None if path.name.startswith(".") else sequence_of(path, sequences)
        if named is not None and kind_of(path) in ("nifti", "dicom"):
            number, before = named
            cases.setdefault(before, {}).setdefault(number, path)
    return cases

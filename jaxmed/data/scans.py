"""Which scans lie under a folder.

A scan is a NIfTI file, a NumPy array, a picture, or a DICOM series. The slices of a series are brought together by
their SeriesInstanceUID, in whichever folders they lie, and files need no suffix. Counted once, or not at all:

- hidden files, and those that a link leads to a second time;
- a DICOMDIR, which is an index of files that are there anyway; reports, plans and other objects without an image;
- localisers, screenshots and single slices beside a series that can be a scan;
- a NIfTI file in the folder of the series that it was made from, and pictures in a folder of DICOM slices.

Where several series that can be scans lie in one folder nobody knows which is meant: that scan fails on being read,
with a list of them, unless one was named.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmed.arrays.grid import orientation
from jaxmed.data.class_folders import read_class_folders
from jaxmed.errors import InputError
from jaxmed.files import unique_names, walk_files
from jaxmed.io import dicom, nifti
from jaxmed.io.dicom_files import (
    INDEX,
    NO_SERIES,
    SORTING_TAGS,
    SUFFIXES,
    Image,
    collect_warnings,
    group_series,
    is_scan,
    list_names,
    looks_like_dicom,
    matches,
    missing_slices,
    read_image,
    require_pydicom,
    text_of,
)
from jaxmed.io.scans import NAME_ENDINGS, Kind, ScanFiles, kind_of, read_volume, require_depth, volume_kind
from jaxmed.io.scans import SUFFIXES as KIND_SUFFIXES
from jaxmed.io.tables import Table, read_table, resolve_path, resolve_paths

VOLUMES: tuple[Kind, ...] = ("nifti", "dicom", "array")
ANY_KIND: tuple[Kind, ...] = ("nifti", "dicom", "picture", "array")


class Found(NamedTuple):
    """The scans under a folder.

    Attributes:
        scans: In the order of their paths, which are all different.
        notes: What was counted once, or passed over.
    """

    scans: tuple[ScanFiles, ...]
    notes: tuple[str, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The path of each."""
        return tuple(scan.path for scan in self.scans)


def find_scans(
    place: Path,
    kinds: Sequence[Kind],
    series: str = "",
    fill: float | None = None,
    apart: Sequence[Path | None] = (),
) -> Found:
    """Return a file, or the scans under a folder.

    Args:
        place: A file of any kind, a DICOMDIR, a folder of DICOM slices, or a folder of such.
        kinds: What is looked for in a folder.
        series: SeriesInstanceUID or SeriesDescription of the DICOM series that are meant; empty for all.
        fill: Intensity of voxels that have none, in all of them; None refuses such voxels.
        apart: Files and folders that are something else, such as masks, and may lie in the same folder.

    Raises:
        InputError: There is none.
    """
    if not place.exists():
        what = "scan" if "picture" in kinds else "volume"
        raise InputError(place, f"a {what} or a folder of {what}s", "nothing", "check the path")
    if place.is_file() and place.name.upper() != INDEX:
        return Found((ScanFiles(place, series, fill=fill),), ())
    root = place.absolute().parent if place.is_file() else place
    files: dict[Kind | None, list[Path]] = {}
    others = {path.resolve() for path in apart if path is not None and path.resolve() != root.resolve()}
    for path in walk_files(root):
        if others and not others.isdisjoint((path.resolve(), *path.resolve().parents)):
            continue
        files.setdefault(_kind(path), []).append(path)
    scans, notes = [], []
    if "dicom" in kinds and files.get("dicom"):
        scans = _find_series(root, files["dicom"], files.get(None, []), series)
    folders = {file.parent: scan for scan in scans for file in (scan.files or [scan.path / "any"])}
    for kind in kinds:
        for path in files.get(kind, []) if kind != "dicom" else []:
            beside = folders.get(path.parent)
            if kind == "nifti" and beside is not None and show_same(ScanFiles(path), beside):
                notes.append(f"{path} shows the DICOM series beside it: taken once, from the DICOM files")
            elif kind == "picture" and beside is not None:
                notes.append(f"{path} lies in a folder of DICOM slices: passed over")
            else:
                scans.append(ScanFiles(path, series))
    if not scans:
        wanted = ", ".join(suffix for kind in kinds for suffix in KIND_SUFFIXES.get(kind, ()))
        expected = f"scans ({wanted}{', or DICOM files' * ('dicom' in kinds)})"
        raise InputError(place, expected, "none in this folder", "check the path")
    found = sorted((scan._replace(fill=fill) for scan in scans), key=lambda scan: scan.path)
    return Found(tuple(found), tuple(_shortened(notes)))


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


def find_records(
    manifest: Path | None,
    place: Path | None,
    split: str = "",
    series: str = "",
    fill: float | None = None,
    kinds: Sequence[Kind] = VOLUMES,
) -> tuple[list[Record], tuple[str, ...]]:
    """List the scans of a job.

    Args:
        manifest: Table with the column path, or folder of classes; the rows are records.
        place: Instead of a table: a file, a DICOM folder, or a folder of such.
        split: Of a manifest, only rows with this word under "split"; empty for all.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.
        kinds: What is looked for in a folder.

    Returns:
        The records, and notes on what was passed over.

    Raises:
        InputError: When there are none, or not a single one exists; a few missing files fail on their own, later.
    """
    if (manifest is None) == (place is None):
        found = "neither" if place is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    if place is not None:
        scans, notes = find_scans(place, kinds, series, fill)
        return _named([(where, scan, {}) for where, scan in zip(_below(scans, place), scans, strict=True)]), notes
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


def read_manifest(path: Path) -> Table:
    """Read a manifest, which has at least the column "path", or a folder of classes as one."""
    if path.is_dir():
        return read_class_folders(path, is_whole=False)[0]
    return read_table(path, required=("path",), optional=("label", "subject", "split"))


def partner_of(folder: Path, place: str | Path) -> Path:
    """Return where what belongs to a scan, such as its mask, should lie: under the same name in another folder.

    Args:
        folder: The other folder.
        place: Of the scan in its own folder; what belongs to a folder of slices may be a NIfTI file of its name.
    """
    named = folder / place
    files = [named.with_name(named.name + suffix) for suffix in nifti.SUFFIXES]
    return named if named.is_file() else next((file for file in files if file.is_file()), named)


def find_partners(scans: Sequence[ScanFiles], place: Path, other: Path | None) -> list[Path | None]:
    """Return what belongs to each scan, such as its mask: see `partner_of`.

    Args:
        scans: What `find_scans` found.
        place: Where it looked.
        other: The other folder, or the one file of a single scan; None gives None for each.

    Raises:
        InputError: One has no partner.
    """
    if other is None:
        return [None] * len(scans)
    if other.is_file() and len(scans) > 1:
        raise InputError(other, f"a folder with {len(scans)} files", "one file", "give a folder")
    found = [other] if other.is_file() else [partner_of(other, where) for where in _below(scans, place)]
    for path in found:
        if not path.exists():
            raise InputError(path, "a file for every input, by the same name", "none", "check the path")
    return [*found]


def name_scans(scans: Sequence[ScanFiles], place: Path, endings: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return a name for the results of each scan; see `files.unique_names`."""
    return unique_names(_below(scans, place), NAME_ENDINGS, endings, taken)


def _below(scans: Sequence[ScanFiles], place: Path) -> list[str]:
    """Return where scans lie below the folder in which they were found."""
    root = place if place.is_dir() and [scan.path for scan in scans] != [place] else place.parent
    return [os.path.relpath(scan.path, root) for scan in scans]


def describe(scan: ScanFiles | Path) -> tuple[tuple[int, ...], str | None]:
    """Return shape and orientation (such as "LPS"; None where it is not stated), from headers alone.

    Raises:
        InputError: As `read_volume`, as far as headers tell.
    """
    scan = scan if isinstance(scan, ScanFiles) else ScanFiles(scan)
    kind = volume_kind(scan.path)
    if kind == "dicom":
        grid = dicom.read_grid(scan.path, series=scan.series or None, files=scan.files)
        shape, codes = grid.shape, orientation(grid.affine)
    else:
        header = nifti.describe(scan.path)
        shape, codes = header["shape"], header["orientation"]
        assert isinstance(shape, tuple) and (codes is None or isinstance(codes, str))
    if len(shape) != 3:
        raise InputError(scan.path, "3D data", f"shape {shape}", "choose one volume of it")
    require_depth(scan.path, kind, shape)
    return shape, codes


def show_same(scan: ScanFiles, other: ScanFiles) -> bool:
    """Tell whether two scans are one, such as a series and its conversion: equal grids, and equal values but for scale.

    Their axes may be stored in another order or direction.
    """
    try:
        if sorted(describe(scan)[0]) != sorted(describe(other)[0]):
            return False
        one, two = (read_volume(which).volume for which in (scan, other))
    except InputError:
        return False
    shift = np.linalg.inv(two.affine) @ one.affine
    places = np.array([[axis] for axis in one.array.shape]) * np.random.default_rng(0).random((3, 4096))
    places = np.floor(places).astype(int)
    there = np.rint(shift[:3, :3] @ places + shift[:3, 3:]).astype(int)
    is_inside = ((there >= 0) & (there < np.array(two.array.shape)[:, None])).all(axis=0)
    if is_inside.mean() < 0.99:
        return False
    values = one.array[tuple(places[:, is_inside])], two.array[tuple(there[:, is_inside])]
    return min(float(np.ptp(row)) for row in values) > 0 and float(np.corrcoef(*values)[0, 1]) > 0.99


def _kind(path: Path) -> Kind | None:
    return None if path.name.upper() == INDEX else kind_of(path)


def _find_series(root: Path, files: list[Path], others: list[Path], series: str) -> list[ScanFiles]:
    """Bring the images among DICOM files together as scans; what is damaged lies with those of its folder."""
    require_pydicom()
    images: list[Image] = []
    damaged: list[Path] = []
    with collect_warnings([]):  # heard again where the scan is read
        for file in files:
            try:
                found = read_image(file, SORTING_TAGS)
            except InputError:
                damaged.append(file)
                continue
            if found is not None:
                images.append(found)
            elif file.suffix.lower() in SUFFIXES and not looks_like_dicom(file):
                damaged.append(file)
        damaged += missing_slices(others, [image.path for image in images])
        if series and images and not any(matches(uid, group, series) for uid, group in group_series(images).items()):
            raise InputError(root, f"the series {series}", list_names(images), "name one of these with --series")
        groups = _connected(images, series)
        scans = [_one_scan(group, images, damaged, series) for group in groups]
    known = {file.parent for group in groups for file in (image.path for image in group)}
    lost = sorted({file.parent for file in damaged} - known)
    scans += [ScanFiles(folder, series) for folder in lost if not series]
    return _unlike_paths(scans)


def _connected(images: list[Image], series: str) -> list[list[Image]]:
    """Return images by scan: those of one series, and of all series that share a folder with another."""
    # Without an identifier the folder stands for one.
    pools: dict[str, list[Image]] = {}
    for uid, group in group_series(images).items():
        for image in group:
            pools.setdefault(f"{uid} {image.path.parent}" if uid == NO_SERIES else uid, []).append(image)
    if series:
        pools = {uid: group for uid, group in pools.items() if matches(uid, group, series)}
    good = {uid: group for uid, group in pools.items() if is_scan(group)}
    places = {image.path.parent for group in good.values() for image in group}
    # What cannot be a scan counts only where nothing else lies: it then fails by itself, and is named.
    alone = {
        uid: group
        for uid, group in pools.items()
        if uid not in good and places.isdisjoint(i.path.parent for i in group)
    }
    merged: list[tuple[set[Path], list[Image]]] = []
    for group in (*good.values(), *alone.values()):
        folders = {image.path.parent for image in group}
        joined = list(group)
        for entry in [entry for entry in merged if entry[0] & folders]:
            merged.remove(entry)
            folders |= entry[0]
            joined = entry[1] + joined
        merged.append((folders, joined))
    return [group for _, group in merged]


def _one_scan(group: list[Image], images: list[Image], damaged: list[Path], series: str) -> ScanFiles:
    """Return where the images of a scan lie: a folder, and the files where more lies under it."""
    folders = sorted({image.path.parent for image in group})
    base = folders[0]
    while not all(folder == base or base in folder.parents for folder in folders):
        base = base.parent
    uids = {image.series for image in group}
    bad = [file for file in damaged if file.parent in folders]
    own = {image.path for image in group} | set(bad)
    strangers = [
        image for image in images
        if image.path not in own and base in image.path.parents
        # What shares a folder and cannot be a scan is passed over on reading, which says so.
        and not (image.path.parent in folders and len(uids) == 1 and not series)
    ]  # fmt: skip
    studies = {text_of(image.header, "StudyInstanceUID") for image in group}
    uid = next(iter(uids)) if series and len(uids) == 1 and NO_SERIES not in uids else series
    if not strangers and all(file in own for file in damaged if base in file.parents):
        return ScanFiles(base, uid, (), min(studies))
    return ScanFiles(base, uid, tuple(sorted(own)), min(studies))


def _unlike_paths(scans: list[ScanFiles]) -> list[ScanFiles]:
    """Give scans of one folder the path of their first file's folder, or of that file."""
    for choose in (lambda scan: scan.files[0].parent, lambda scan: scan.files[0]):
        paths = [scan.path for scan in scans]
        scans = [
            scan._replace(path=choose(scan)) if scan.files and paths.count(scan.path) > 1 else scan for scan in scans
        ]
    return scans


def _shortened(notes: list[str]) -> list[str]:
    return notes if len(notes) <= 5 else [*notes[:4], f"{len(notes) - 4} more such files"]


def _named(found: list[tuple[str, ScanFiles, dict[str, str]]]) -> list[Record]:
    """Give every record a name of its own, made from where its file lies."""
    names = unique_names([cell for cell, _, _ in found], NAME_ENDINGS)
    return [Record(name, scan, dict(row)) for name, (_, scan, row) in zip(names, found, strict=True)]

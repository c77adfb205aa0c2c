"""Images of scans as a trained network takes them, with label maps or partners of another kind; on the host."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxmed.arrays.batches import evenly
from jaxmed.data.brain_labels import LESION, read_labels, simplify_labels
from jaxmed.data.cohort import stated_splits, subjects_of
from jaxmed.data.images import LEAST_HEAD, cut_head
from jaxmed.data.preprocess import Preprocess, load
from jaxmed.data.scans import ANY_KIND, find_partners, find_scans
from jaxmed.data.windows import cut_about
from jaxmed.errors import InputError
from jaxmed.files import unique_names
from jaxmed.io.scans import NAME_ENDINGS, ScanFiles
from jaxmed.io.tables import read_table, resolve_paths
from jaxmed.volume import require_same_grid


class SubjectScan(NamedTuple):
    """A test scan: whose it is, its file, and its label map where there is one."""

    subject: str
    files: ScanFiles
    labels: Path | None


class SubjectImages(NamedTuple):
    """A subject's images, in the network's unit, and what `brain_labels.simplify_labels` makes of its label maps."""

    subject: str
    images: Float32[np.ndarray, "image ..."]
    labels: Int[np.ndarray, "image ..."] | None

    @property
    def brain(self) -> Bool[np.ndarray, "image ..."]:
        """The brain; without labels what is not dark."""
        return self.images > 0.05 if self.labels is None else self.labels > 0

    @property
    def lesions(self) -> Bool[np.ndarray, "image ..."]:
        """The lesions; none without labels."""
        return np.zeros(self.images.shape, bool) if self.labels is None else self.labels == LESION


class PairedImages(NamedTuple):
    """Images, and their partners of another kind where there are any.

    Attributes:
        images: In the network's unit, (image, *size, 1).
        partners: The same places in the other scans; None without any.
        names: File, and slice.
    """

    images: Float32[np.ndarray, "image ..."]
    partners: Float32[np.ndarray, "image ..."] | None
    names: tuple[str, ...]


def list_subjects(
    manifest: Path | None, place: Path | None, series: str = "", fill: float | None = None
) -> list[SubjectScan]:
    """List every test scan.

    Args:
        manifest: CSV with the column path; optionally subject, labels (a label map in FreeSurfer's numbering) and split
            (then only test is used).
        place: A scan, or a folder of scans, instead.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: There are none, or table and folder are both given.
    """
    if (manifest is None) == (place is None):
        found = "neither" if manifest is None else "both"
        raise InputError("manifest, input", "one of them", found, "or try --preset smoke")
    if manifest is None:
        assert place is not None
        scans = find_scans(place, ANY_KIND, series, fill).scans
        root = place if place.is_dir() and scans[0].path != place else place.parent
        # Every scan is a subject of its own, whatever its folder's files are called.
        names = unique_names([os.path.relpath(scan.path, root) for scan in scans], NAME_ENDINGS)
        return [SubjectScan(name, scan, None) for name, scan in zip(names, scans, strict=True)]
    table = read_table(manifest, required=("path",), optional=("subject", "labels", "split"))
    paths = [ScanFiles(path, series, fill=fill) for path in resolve_paths(table)]
    labels = resolve_paths(table, "labels") if "labels" in table.columns else [None] * len(paths)
    splits = stated_splits(table) or ["test"] * len(paths)
    if "test" not in splits:
        raise InputError(manifest, "rows with split 'test'", "none", "leave the column out to use all")
    rows = zip(map(SubjectScan, subjects_of(table), paths, labels), splits, strict=True)
    return [scan for scan, split in rows if split == "test"]


def read_subjects(
    scans: Sequence[SubjectScan], preprocess: Preprocess, slices: int, subjects: int = 0
) -> list[SubjectImages]:
    """Read images, and those of label maps where every scan of a subject has one.

    Args:
        scans: From `list_subjects`.
        preprocess: A file to the network's input.
        slices: Images per scan, evenly over those that show enough of a head.
        subjects: The first so many; 0 for all.

    Raises:
        InputError: A file cannot be read, a label map has another grid, or no image shows a head.
    """
    names = list(dict.fromkeys(scan.subject for scan in scans))[: subjects or None]
    found = []
    for name in names:
        parts = [_read_images(scan, preprocess, slices) for scan in scans if scan.subject == name]
        labels = [cut for _, cut in parts if cut is not None]
        stacked = np.concatenate(labels) if len(labels) == len(parts) else None
        found.append(SubjectImages(name, np.concatenate([images for images, _ in parts]), stacked))
    return found


def _read_images(
    found: SubjectScan, preprocess: Preprocess, slices: int
) -> tuple[Float32[np.ndarray, "image ..."], np.ndarray | None]:
    path = found.files.path
    scan = load(found.files, preprocess)
    images, kept, head = cut_head(scan, preprocess)
    if not kept.size:
        raise _no_head(path)
    chosen = kept[evenly(slices, len(kept))]
    labels = None
    if found.labels is not None:
        volume = read_labels(found.labels, preprocess)
        if volume.array.shape != scan.volume.array.shape:
            raise InputError(found.labels, f"the grid of {path}", f"shape {volume.array.shape}", "resample it")
        labels = cut_about(simplify_labels(volume.array), preprocess.slice_axis, preprocess.size, head)[0][chosen]
    return images[chosen].astype(np.float32), labels


def read_pairs(
    place: Path, other: Path | None, preprocess: Preprocess, count: int, series: str = "", fill: float | None = None
) -> PairedImages:
    """Read images evenly over all of some scans that show enough of a head, and the same places in other scans.

    Args:
        place: A scan, or a folder of scans.
        other: Scans on the same grids: a file, or a folder with the same file names; None for no partners.
        preprocess: A file to the network's input.
        count: Images, at most.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: A file cannot be read, a pair is incomplete or on two grids, or no image shows a head.
    """
    scans = find_scans(place, ANY_KIND, series, apart=(other,)).scans
    found: list[tuple[np.ndarray, np.ndarray | None, str]] = []
    for files, partner in zip(scans, find_partners(scans, place, other), strict=True):
        scan = load(files, preprocess, fill)
        cut, kept, head = cut_head(scan, preprocess)
        below = [None] * len(cut)
        if partner is not None:
            second = load(partner, preprocess, fill)
            require_same_grid(second.volume, scan.volume, str(partner), str(files.path))
            below = cut_about(second.volume.array, preprocess.slice_axis, preprocess.size, head)[0]
        found += [(cut[index], below[index], f"{files.path.name}, {index}") for index in kept]
    if not found:
        raise _no_head(place)
    images, partners, names = zip(*[found[row] for row in evenly(count, len(found))], strict=True)
    stacks = [np.stack(side)[..., None].astype(np.float32) for side in (images, partners) if side[0] is not None]
    return PairedImages(stacks[0], stacks[1] if len(stacks) > 1 else None, names)


def _no_head(place: Path) -> InputError:
    advice = "check the scans, or the size of the network's images"
    return InputError(place, f"images of which {LEAST_HEAD:.0%} is head", "none", advice)

"""Scans and label maps as training images: split by subject, cut into slices or volumes, in memory; on the host.

Scans are kept as float16 and label maps as uint8, from which images are drawn on the device
(`synthesis.label_images.ImageMaker`), so that a cohort of slices fits the memory of a small machine.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxmed.arrays.foreground import find_foreground
from jaxmed.config import Decay, Number, Share, Size, checked
from jaxmed.data.brain_labels import read_labels
from jaxmed.data.cohort import groups_of_files, hold_out, require_files_apart, split_unlabelled, subject_notes
from jaxmed.data.inputs import require_whole, try_each
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Loaded, Preprocess, load
from jaxmed.data.scans import ANY_KIND, find_scans
from jaxmed.data.windows import cut_about, random_crop
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import Kind, ScanFiles
from jaxmed.io.tables import Table, read_table, resolve_paths

KINDS = ("image", "labels")
LABEL_MAPS: tuple[Kind, ...] = ("nifti",)
MAX_INTENSITY = 2.0
"""Images lie between 0, the background, and this."""
PREPROCESS = Preprocess(
    (256, 256), intensity=Intensity("background", percentiles=(0.0, 99.5), reference=1.6, range=(0.0, MAX_INTENSITY))
)
"""Scans are turned to RAS+ and scaled: the background, also of scans in [-1, 1] or with a mean of 0, becomes 0, and a
percentile of the intensities inside the head a fixed value, so that scans of any unit look alike."""
LEAST_HEAD = 0.1
"""Share of head that an image of a reference or test scan needs."""


@dataclasses.dataclass(frozen=True)
@checked
class ImageData:
    """Which scans are trained on.

    Attributes:
        manifest: CSV with the column path (NIfTI, PNG, JPEG, TIFF, .npy); optionally subject, split (train, validation,
            test; only train is trained on, validation tells the loss, test is left alone) and kind (image, or labels: a
            label map in FreeSurfer's numbering, from which contrasts are drawn).
        labels: Besides, or instead: a label map, or a folder of them, each a subject of its own.
        validation: Share of subjects held out where there is no column split.
        slices: First and last slice, as shares of the head's extent.
        every: Distance of the slices that are taken; 1 takes all.
        patches: Patches of a volume in an epoch, for networks in 3D.
        supersample: Label maps are read, and their images drawn, with voxels this many times as small along each axis
            of an image; means over them make the image, in which structures then mix at their borders as in a scan.
        synthetic: Draw this many phantom brains where no files are given.
    """

    manifest: Path | None = None
    labels: Path | None = None
    validation: Decay = 0.1
    slices: tuple[Share, Share] = (0.05, 0.95)
    every: Size = 1
    patches: Size = 32
    supersample: Size = 1
    synthetic: Number = 0

    def __post_init__(self) -> None:
        if not 0 <= self.slices[0] < self.slices[1] <= 1:
            raise ValueError(f"slices: expected two shares in order, found {self.slices}")


class Listed(NamedTuple):
    """The files of a run.

    Attributes:
        scans: One per record.
        kinds: "image" or "labels".
        splits: "train", "validation" or "test".
        notes: What a user should know about them.
    """

    scans: tuple[ScanFiles, ...]
    kinds: tuple[str, ...]
    splits: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def count(self, split: str, kind: str) -> int:
        """Return the number of files of a kind in a split."""
        return sum(one == (split, kind) for one in zip(self.splits, self.kinds, strict=True))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageSource:
    """Slices, or volumes to cut patches from, in memory.

    Attributes:
        images: Each as float16 in the network's unit, or as uint8 labels.
        names: Where each comes from.
        patches: How often each counts in an epoch.
    """

    images: Sequence[Shaped[np.ndarray, "..."]]
    names: Sequence[str]
    patches: int = 1

    def __len__(self) -> int:
        """Return the number of records of an epoch."""
        return len(self.images) * self.patches

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a record's voxels, and whether they are labels."""
        image = self.images[index // self.patches]
        return {"voxels": image, "is_labels": np.bool_(image.dtype == np.uint8)}

    @property
    def has_labels(self) -> bool:
        """Whether any image is to be drawn."""
        return any(image.dtype == np.uint8 for image in self.images)

    def name(self, index: int) -> str:
        """Return the file."""
        return self.names[index // self.patches]

    def __repr__(self) -> str:
        """Return the numbers and the files."""
        return f"ImageSource({len(self.images)} images x {self.patches}; {', '.join(dict.fromkeys(self.names))[:200]})"


@dataclasses.dataclass(frozen=True)
class Cut:
    """A record's fields to one image of the network's size: volumes give a random patch.

    Attributes:
        size: Voxels along each axis.
        supersample: How much finer label maps are; scans repeat their voxels, whose mean they are again.
    """

    size: tuple[int, ...]
    supersample: int = 1

    def __call__(self, fields: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Return the voxels as float32."""
        voxels = fields["voxels"]
        size = tuple(length * (self.supersample if fields["is_labels"] else 1) for length in self.size)
        if voxels.shape != size:
            voxels = random_crop({"voxels": voxels}, size, generator)["voxels"]
        if self.supersample > 1 and not fields["is_labels"]:
            for axis in range(voxels.ndim):
                voxels = np.repeat(voxels, self.supersample, axis)
        return {"voxels": np.asarray(voxels, np.float32), "is_labels": fields["is_labels"]}


def list_files(data: ImageData, place: Path | None, seed: int, series: str = "", fill: float | None = None) -> Listed:
    """List the files of a run.

    Args:
        data: Tables and folders.
        place: A scan, or a folder of scans, instead of a manifest.
        seed: Seed of the draw of held-out subjects.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: There are none, some are missing, or none is to be trained on.
    """
    if data.manifest is not None and place is not None:
        raise InputError("data.manifest, input", "one of them", "both", "drop one")
    if data.manifest is None and place is None and data.labels is None:
        raise InputError("data.manifest, input, data.labels", "at least one of them", "none", "or try --preset smoke")
    scans: list[ScanFiles] = []
    kinds: list[str] = []
    splits: list[str] = []
    notes: list[str] = []
    if data.manifest is not None:
        table = read_table(data.manifest, required=("path",), optional=("subject", "split", "kind"))
        scans = [ScanFiles(path, series, fill=fill) for path in resolve_paths(table)]
        kinds, splits = _kinds_of(table), split_unlabelled(table, data.validation, seed)
        notes = subject_notes(table)
    # Drawn apart, so that both kinds are held out where there are two or more of each.
    for kind, folder, wanted in (("image", place, ANY_KIND), ("labels", data.labels, LABEL_MAPS)):
        if folder is None:
            continue
        found = find_scans(folder, wanted, series, fill, apart=(data.labels,))
        # Series of one study show one person, and links lead to one file.
        files = groups_of_files(found.paths)
        subjects = [scan.study or file for scan, file in zip(found.scans, files, strict=True)]
        scans += found.scans
        kinds += [kind] * len(subjects)
        splits += hold_out(subjects, data.validation, seed)
        notes += found.notes
    require_files_apart(data.manifest or "input, data.labels", [scan.path for scan in scans], splits)
    if "train" not in splits:
        raise InputError(data.manifest, "rows with split 'train'", f"only {', '.join(sorted(set(splits)))}")
    return Listed(tuple(scans), tuple(kinds), tuple(splits), tuple(notes))


def read_images(
    listed: Listed, split: str, data: ImageData, preprocess: Preprocess, threads: int
) -> ImageSource | None:
    """Read every file of a split and cut it.

    Args:
        listed: The files.
        split: Which of them.
        data: Which slices.
        preprocess: Size, axis, voxel size and scale.
        threads: That read.

    Returns:
        The images; None where the split is empty.

    Raises:
        InputError: A file is broken (where several are, the first three are named), or shows no head.
    """
    files = [(scan, k) for scan, k, s in zip(listed.scans, listed.kinds, listed.splits, strict=True) if s == split]
    if not files:
        return None
    stacks = require_whole(try_each(lambda file: _cut_file(*file, data, preprocess), files, threads), "scans")
    images = [image for stack in stacks for image in stack]
    names = [str(scan.path) for (scan, _), stack in zip(files, stacks, strict=True) for _ in stack]
    return ImageSource(images, names, 1 if preprocess.is_sliced else data.patches)


def cut_head(
    scan: Loaded, preprocess: Preprocess
) -> tuple[Shaped[np.ndarray, "image ..."], Int[np.ndarray, " kept"], Bool[np.ndarray, "x y z"]]:
    """Cut a scan; return its images, the numbers of those that show enough of a head, and the head."""
    head = find_foreground(scan.volume.array)
    images, _ = cut_about(scan.volume.array, preprocess.slice_axis, preprocess.size, head)
    share = cut_about(head, preprocess.slice_axis, preprocess.size, head)[0].reshape(len(images), -1).mean(1)
    return images, np.flatnonzero(share >= LEAST_HEAD), head


def _kinds_of(table: Table) -> list[str]:
    """Return what each row of a manifest is; "image" where the column kind is missing or empty."""
    if "kind" not in table.columns:
        return ["image"] * len(table)
    for cell, line in zip(table.column("kind"), table.lines, strict=True):
        if cell not in ("", *KINDS):
            raise table.wrong(line, f"one of {', '.join(KINDS)} under 'kind'", f"'{cell}'")
    return [cell or "image" for cell in table.column("kind")]


def _cut_file(scan: ScanFiles, kind: str, data: ImageData, preprocess: Preprocess) -> Shaped[np.ndarray, "image ..."]:
    path = scan.path
    if kind == "labels":
        if not path.name.lower().endswith(nifti.SUFFIXES):
            raise InputError(path, "a label map as NIfTI", f"the suffix '{path.suffix}'")
        preprocess = _supersampled(preprocess, data.supersample)
        array = read_labels(path, preprocess).array.astype(np.uint8)
        head = array > 0
    else:
        array = load(scan, preprocess).volume.array.astype(np.float16)
        head = find_foreground(array.astype(np.float32))
    if not head.any():
        raise InputError(path, "a head", "background alone", "check the file")
    present = [np.flatnonzero(head.any(axis=tuple(o for o in range(3) if o != axis))) for axis in range(3)]
    axis = preprocess.slice_axis
    if axis is None:
        # Patches are drawn from the head, with a quarter of a patch around it.
        box = tuple(
            slice(max(0, places[0] - size // 4), places[-1] + 1 + size // 4)
            for places, size in zip(present, preprocess.size, strict=True)
        )
        return array[box][None]
    first, last = present[axis][0], present[axis][-1]
    low, high = (round(first + share * (last - first)) for share in data.slices)
    return cut_about(array, axis, preprocess.size, head)[0][low : high + 1 : data.every]


def _supersampled(preprocess: Preprocess, supersample: int) -> Preprocess:
    """Return the preprocessing of images that have so many voxels more along each axis."""
    if supersample == 1:
        return preprocess
    if not preprocess.spacing:
        expected = "1 where preprocess.spacing is that of the files"
        raise InputError("data.supersample", expected, supersample, "set --preprocess.spacing")
    size = tuple(length * supersample for length in preprocess.size)
    spacing = tuple(length / supersample for length in preprocess.spacing)
    return dataclasses.replace(preprocess, size=size, spacing=spacing)

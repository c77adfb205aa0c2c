"""One scan of any kind as a volume: what a file is, where a scan lies, and how it is read.

The kind is told by the suffix where it says something, and by a look at the file where it does not: DICOM files have
any name. Whoever asks gets the same answer.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from jaxmed.errors import InputError
from jaxmed.files import require_file
from jaxmed.io import dicom, dicom_files, nifti
from jaxmed.io.images import ARRAY_SUFFIXES, PICTURE_SUFFIXES
from jaxmed.volume import Volume

Kind = Literal["nifti", "dicom", "picture", "array"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "nifti": nifti.SUFFIXES,
    "array": ARRAY_SUFFIXES,
    "picture": PICTURE_SUFFIXES,
}
NAME_ENDINGS = (*(suffix for suffixes in SUFFIXES.values() for suffix in suffixes), *dicom_files.SUFFIXES, ".gz")
"""What is no part of a scan's name."""


class ScanFiles(NamedTuple):
    """Where one scan lies.

    Attributes:
        path: Its file, or a folder of DICOM slices.
        series: SeriesInstanceUID or SeriesDescription, where the folder may hold several series; empty for the one.
        files: The slices themselves, where there are others under the folder; empty for what lies there.
        study: StudyInstanceUID, where it is known: scans of one study are of one person.
        fill: Intensity of voxels that have none (NaN, Inf, fill values); None refuses them.
    """

    path: Path
    series: str = ""
    files: tuple[Path, ...] = ()
    study: str = ""
    fill: float | None = None


class ScanVolume(NamedTuple):
    """A scan as it was read.

    Attributes:
        volume: Its voxels and their place.
        knows_frame: Whether the place is stated; if not, left and right cannot be told.
        notes: What is unexpected about the file.
    """

    volume: Volume
    knows_frame: bool
    notes: tuple[str, ...]


def kind_of(path: Path) -> Kind | None:
    """Tell what a file or folder is; None for what is no scan. A folder counts as one of DICOM slices."""
    name = path.name.lower()
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes) and not path.is_dir():
            return kind
    return "dicom" if path.is_dir() or dicom_files.is_dicom(path) else None


def read_volume(scan: ScanFiles | Path, *, allow_plane: bool = False) -> ScanVolume:
    """Read a NIfTI file or a DICOM series as a 3D volume.

    Args:
        scan: Where it lies.
        allow_plane: Whether it may be one voxel thick.

    Raises:
        InputError: It is no such file, or damaged, not 3D, not finite, constant, or a single slice.
    """
    scan = scan if isinstance(scan, ScanFiles) else ScanFiles(scan)
    kind = volume_kind(scan.path)
    if kind == "dicom":
        volume, notes = dicom.read_with_notes(scan.path, series=scan.series or None, files=scan.files, fill=scan.fill)
        if volume.array.min() == volume.array.max():
            found = f"a constant volume, {volume.array.flat[0]:g} everywhere"
            raise InputError(scan.path, "an image with contrast", found)
        knows_frame = True
    else:
        volume = nifti.read(scan.path, dimensions=(3,), allow_constant=False, fill=scan.fill)
        header = nifti.describe(scan.path)
        knows_frame, notes = header["orientation"] is not None, ()
        if header["forms_agree"] is False:
            notes = ("the header's sform and qform disagree: the sform was taken",)
    if not allow_plane:
        require_depth(scan.path, kind, volume.array.shape)
    return ScanVolume(volume, knows_frame, tuple(notes))


def volume_kind(path: Path) -> Kind:
    """Tell whether a file or folder is read as NIfTI or as DICOM.

    Raises:
        InputError: It is neither, or there is nothing.
    """
    kind = kind_of(path)
    if kind in ("nifti", "dicom"):
        return kind
    require_file(path, "a scan")
    found = f"the suffix '{path.suffix}', and a file that is no DICOM" if kind is None else f"a file of kind {kind}"
    raise InputError(path, "a NIfTI file (.nii, .nii.gz), or DICOM files or a folder of them", found, "convert it")


def require_depth(path: Path, kind: Kind, shape: tuple[int, ...]) -> None:
    """Refuse what is one voxel thick: stretched into a cube it would look like a scan.

    Raises:
        InputError: It is.
    """
    if min(shape) > 1:
        return
    found = f"one plane of shape {' x '.join(map(str, shape))}"
    advice = "give the whole scan"
    if kind == "dicom" and not path.is_dir():
        advice = f"give the folder of the whole series: {path.absolute().parent}"
    raise InputError(path, "a volume of several slices", found, advice)

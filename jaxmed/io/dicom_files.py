"""DICOM files: which files are images, what their headers say, and to which series they belong.

A file is DICOM when it has the preamble, or when it starts with the first elements of a data set and holds what an
image needs: some archives write files without the preamble. Objects that are no images (reports, plans, DICOMDIR,
vendors' private ones) are passed over. A file that lies among slices and is called like one, and yet cannot be read, is
an error: passing over it could drop a slice.

What pydicom warns of is collected in a list, so that a series of 300 slices gives one note and not 300 lines.

Source: DICOM PS3.10 (files), PS3.3, C.7.3.1 (series), C.7.6.1 (image type).
"""

import contextlib
import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmed.errors import InputError, require_extra
from jaxmed.files import DAMAGED, require_file, walk_files

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

# What pydicom raises on damaged or undecodable data: it has no error of its own.
SUFFIXES = (".dcm", ".ima", ".dicom")
INDEX = "DICOMDIR"
TEXT_VRS = ("AS", "CS", "DA", "DS", "DT", "IS", "LO", "PN", "SH", "TM", "UI")
NO_SERIES = "(no SeriesInstanceUID)"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# What tells series apart and says what they are, without their private parts: a tenth of the time of a whole header.
SORTING_TAGS = (
    "SOPClassUID", "ImageType", "Modality", "SeriesDescription", "StudyInstanceUID", "SeriesInstanceUID", "Rows",
    "SamplesPerPixel", "NumberOfFrames", "ImagePositionPatient",
)  # fmt: skip
# pydicom's warnings go through the interpreter's one list of filters, which threads share.
_LOCK = threading.RLock()


class Image(NamedTuple):
    """A file of one or more slices, and what its header says."""

    path: Path
    header: "Dataset"

    @property
    def series(self) -> str:
        """Its SeriesInstanceUID, or `NO_SERIES`."""
        return text_of(self.header, "SeriesInstanceUID") or NO_SERIES

    @property
    def num_slices(self) -> int:
        """Slices of the file."""
        return count_frames(self.path, self.header)


def require_pydicom(package: str = "pydicom") -> None:
    """Check that a package of the extra `dicom` is installed.

    Raises:
        InputError: It is not.
    """
    require_extra(package, "dicom", "DICOM")


@contextlib.contextmanager
def collect_warnings(found: list[str]) -> Iterator[None]:
    """Append what pydicom warns of inside the block to a list, instead of showing it."""
    log = logging.getLogger("pydicom")  # to which pydicom says the same again
    with _LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
    for one in caught:
        if "pydicom" in one.filename:
            found.append(" ".join(str(one.message).split()))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def warning_notes(found: Sequence[str]) -> list[str]:
    """Return what pydicom warned of as a few notes: warnings that differ in numbers only are one."""
    kinds: dict[str, list[str]] = {}
    for line in found:
        kinds.setdefault(re.sub(r"\d+", "#", line), []).append(line)
    notes = [
        f"pydicom warned {'once' if len(lines) == 1 else f'{len(lines)} times'}: {lines[0][:200]}"
        for lines in kinds.values()
    ]
    return notes[:3] + ([f"pydicom warned of {len(notes) - 3} other things"] if len(notes) > 3 else [])


def looks_like_dicom(path: Path) -> bool:
    """Tell whether a file starts as DICOM does: with the preamble, or with the first elements of a data set."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    if len(start) < 8 or start[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    has_vr = start[4:6] in (b"UL", b"UI", b"CS", b"DA", b"TM", b"LO", b"SH", b"OB")
    order = "big" if start[0] == 0 else "little"
    # Without a VR the length of a first element follows, which is a short text or number.
    return int.from_bytes(start[2:4], order) <= 0x60 and (has_vr or int.from_bytes(start[4:8], order) <= 256)


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM by its suffix, or by how it starts."""
    return path.suffix.lower() in SUFFIXES or path.name.upper() == INDEX or looks_like_dicom(path)


def read_file(path: Path, *, pixels: bool = False, tags: Sequence[str] | None = None) -> "Dataset":
    """Read a file that `looks_like_dicom`, with or without the preamble.

    Raises:
        InputError: It is damaged.
    """
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        data = dcmread(path, stop_before_pixels=not pixels, force=True, specific_tags=None if tags is None else [*tags])
    except DAMAGED as error:
        raise InputError(path, "a whole DICOM file", f"a damaged one ({error})", "copy it again") from error
    if not data.file_meta.get("TransferSyntaxUID"):
        is_implicit, is_little = data.original_encoding
        little = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = little if is_little else ExplicitVRBigEndian
    return data


def read_image(path: Path, tags: Sequence[str] | None = None) -> Image | None:
    """Read the header of a file; None for what is no DICOM, or no image.

    Raises:
        InputError: It is damaged: cut files end before their Rows.
    """
    if not looks_like_dicom(path):
        return None
    header = read_file(path, tags=tags)
    if "Rows" in header:
        return Image(path, header)
    kind = _class_of(header)
    has_preamble = getattr(header, "preamble", None) is not None
    if kind is None and not has_preamble:
        return None
    # pydicom reads as far as a cut file goes; passing over it could drop the last slice.
    if kind is None or "Image Storage" in kind.name:
        raise InputError(path, "a whole DICOM image", "no Rows in its header", "copy it again")
    return None


def find_images(files: Iterable[Path]) -> list[Image]:
    """Read the headers of all images among some files.

    Raises:
        InputError: One is damaged, or is called as the slices beside it are and is no DICOM file.
    """
    images, others = [], []
    for file in files:
        image = read_image(file)
        if image is not None:
            images.append(image)
        elif not looks_like_dicom(file):
            others.append(file)
    for file in missing_slices(others, [image.path for image in images]):
        raise not_dicom(file)
    return images


def missing_slices(others: Iterable[Path], images: Iterable[Path]) -> list[Path]:
    """Return the files that are no DICOM, and yet lie beside images under such a name as theirs."""
    names = {(path.parent, _pattern(path.name)) for path in images}
    folders = {folder for folder, _ in names}
    return [
        path
        for path in others
        if path.parent in folders
        and (path.suffix.lower() in SUFFIXES or (path.parent, _pattern(path.name)) in names)
    ]  # fmt: skip


def not_dicom(path: Path) -> InputError:
    """Return the error that names a file which should be a slice."""
    expected = "a DICOM file, as those beside it"
    try:
        require_file(path, expected)
    except InputError as error:
        return error
    return InputError(path, expected, "something else", "copy it again, or take it away")


def list_files(path: Path) -> list[Path]:
    """Return the files under a folder, beside a DICOMDIR, or the one file.

    Raises:
        InputError: There is nothing.
    """
    if not path.exists():
        raise InputError(path, "a DICOM folder or file", "no such path", "check the path")
    if path.name.upper() == INDEX and path.is_file():
        path = path.absolute().parent  # an index: what it lists lies beside it
    if not path.is_dir():
        return [path]
    return [file for file in walk_files(path) if file.name.upper() != INDEX]


def group_series(images: Iterable[Image]) -> dict[str, list[Image]]:
    """Return the images of each series, by SeriesInstanceUID in order."""
    found: dict[str, list[Image]] = {}
    for image in images:
        found.setdefault(image.series, []).append(image)
    return dict(sorted(found.items()))


def name_series(uid: str, images: Sequence[Image]) -> str:
    """Return how a message speaks of a series: its identifier, description, modality and slices."""
    header = images[0].header
    about = [text_of(header, name) for name in ("SeriesDescription", "Modality")]
    count = sum(image.num_slices for image in images)
    words = [about[0] or "no description", about[1], f"{count} slice{'s' * (count != 1)}"]
    return f"{uid} ({', '.join(word for word in words if word)})"


def list_names(images: Iterable[Image]) -> str:
    """Return how a message lists the series of some images."""
    names = [name_series(uid, group) for uid, group in group_series(images).items()]
    return ", ".join(names[:10]) + (f", and {len(names) - 10} more" if len(names) > 10 else "")


def is_scan(images: Sequence[Image]) -> bool:
    """Tell whether a series can be a scan: images of a scanner, more than one slice, with places in space."""
    kept = [image for image in images if _aside(image) is None and _is_grey(image)]
    num_slices = sum(image.num_slices for image in kept)
    return num_slices > 1 and any(image.num_slices > 1 or "ImagePositionPatient" in image.header for image in kept)


def matches(uid: str, images: Sequence[Image], series: str) -> bool:
    """Tell whether a series is the one that is asked for, by identifier or description."""
    return series == uid or series.casefold() == text_of(images[0].header, "SeriesDescription").casefold()


def choose_series(path: Path, images: Sequence[Image], series: str | None) -> tuple[list[Image], list[str]]:
    """Return the images of one series, and notes on what was passed over.

    Without a name it is the only series that can be a scan: localisers, screenshots, reports as images, segmentations
    and single slices beside it are passed over.

    Args:
        path: Where they were found, for messages.
        images: At least one, of any number of series.
        series: SeriesInstanceUID, or SeriesDescription; None or empty where there is one.

    Raises:
        InputError: There are several, or none of that name.
    """
    groups = group_series(images)
    notes = []
    if series:
        chosen = {uid: group for uid, group in groups.items() if matches(uid, group, series)}
        if not chosen:
            raise InputError(path, f"the series {series}", list_names(images), "name one of these with --series")
        groups = chosen
    elif len(groups) > 1:
        scans = {uid: group for uid, group in groups.items() if is_scan(group)}
        if len(scans) == 1:
            rest = list_names(image for image in images if image.series not in scans)
            notes.append(f"beside the series that was taken, {rest} cannot be a scan of its own: passed over")
        groups = scans or groups
    if len(groups) > 1:
        names = list_names(image for group in groups.values() for image in group)
        raise InputError(path, "one series", f"{len(groups)}: {names}", "name one of them with --series")
    found = next(iter(groups.values()))
    reasons = [_aside(image) for image in found]
    kept = [image for image, reason in zip(found, reasons, strict=True) if reason is None]
    if kept and len(kept) < len(found):
        for reason, count in Counter(reason for reason in reasons if reason is not None).items():
            notes.append(f"{count} image{'s' * (count > 1)} of the series passed over: {reason}")
        found = kept
    return found, notes


def count_frames(file: Path, header: "Dataset") -> int:
    """Return the number of frames; 1 where none is stated.

    Raises:
        InputError: What is stated is no whole number above 0.
    """
    found = read_numbers(file, header, "NumberOfFrames", 1)
    if found is None:
        return 1
    if found[0] < 1 or found[0] != int(found[0]):
        raise InputError(file, "a whole number of frames", f"{found[0]:g} in NumberOfFrames", "export it again")
    return int(found[0])


def read_numbers(file: Path, source: "Dataset", name: str, count: int) -> tuple[float, ...] | None:
    """Return the numbers of an element; None where it is absent or empty.

    Raises:
        InputError: They are not so many finite numbers.
    """
    text = text_of(source, name)
    if not text:
        return None
    try:
        value = source[name].value
        parts = [value] if isinstance(value, str | bytes | int | float) else [*value]
        values = tuple(float(part) for part in parts)
    except DAMAGED:
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        advice = "write decimals with a point" if "," in text else "export the series again"
        expected = f"{count} numbers in {name}" if count > 1 else f"one number in {name}"
        raise InputError(file, expected, f"'{text[:80]}'", advice)
    return values


def text_of(source: "Dataset", name: str) -> str:
    """Return an element as it is written; empty where it is absent or empty."""
    from pydicom.datadict import dictionary_VR

    if name not in source:
        return ""
    try:
        value: Any = source.get_item(name).value  # before it is converted, which damaged ones cannot be
        if isinstance(value, bytes) and dictionary_VR(name) in TEXT_VRS:
            value = value.decode("latin-1")
        elif isinstance(value, bytes):
            value = source[name].value
    except DAMAGED:
        return "something unreadable"
    if value is None:
        return ""
    if not isinstance(value, str | bytes) and hasattr(value, "__iter__"):
        value = "\\".join(map(str, value))
    return str(value).strip("\0 \n")


def _is_grey(image: Image) -> bool:
    return text_of(image.header, "SamplesPerPixel") in ("", "1")


def _class_of(header: "Dataset") -> "UID | None":
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    text = text_of(header, "SOPClassUID") or text_of(header.file_meta, "MediaStorageSOPClassUID")
    return UID(text, IGNORE) if text else None


def _aside(image: Image) -> str | None:
    """Return why an image is no slice of a scan; None when it may be one."""
    kind = _class_of(image.header)
    if kind is not None and str(kind).startswith(SECONDARY_CAPTURE):
        return "secondary captures (screenshots)"
    if kind is not None and kind.name != str(kind) and "Image Storage" not in kind.name:
        return f"objects of the class {kind.name}"
    if "LOCALIZER" in text_of(image.header, "ImageType").upper().split("\\"):
        return "localisers"
    return None


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)

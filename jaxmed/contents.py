"""What a file really is, by its first bytes: names lie, and downloads bring pages and pointers instead of data."""

import re
import zlib
from typing import NamedTuple

START = 1024
"""Bytes that tell what a file is."""


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        kind: One word, for code.
        name: In words, with an article.
        advice: What to do where something else was expected; may be empty.
    """

    kind: str
    name: str
    advice: str = ""


# Where they begin, the bytes, and what they say. In order: the longer and surer first.
MAGIC: tuple[tuple[int, bytes, Content], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", Content("png", "a PNG image")),
    (0, b"\x89HDF\r\n\x1a\n", Content("hdf5", "an HDF5 file (MINC, MATLAB 7.3, Keras)", "convert it")),
    (0, b"\x93NUMPY", Content("npy", "a NumPy array (.npy)")),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", Content("jp2", "a JPEG 2000 image", "convert it")),
    (0, b"\xff\x4f\xff\x51", Content("jp2", "a JPEG 2000 image", "convert it")),
    (0, b"\xff\xd8\xff", Content("jpeg", "a JPEG image")),
    (0, b"II*\0", Content("tiff", "a TIFF image")),
    (0, b"MM\0*", Content("tiff", "a TIFF image")),
    (0, b"II+\0", Content("tiff", "a BigTIFF image")),
    (0, b"MM\0+", Content("tiff", "a BigTIFF image")),
    (0, b"GIF87a", Content("gif", "a GIF image", "convert it to PNG")),
    (0, b"GIF89a", Content("gif", "a GIF image", "convert it to PNG")),
    (8, b"WEBPVP8", Content("webp", "a WebP image", "convert it to PNG")),
    (344, b"n+1\0", Content("nifti", "a NIfTI volume")),
    (344, b"ni1\0", Content("pair", "the header of a NIfTI pair (.hdr, .img)", "convert the pair to .nii")),
    (4, b"n+2\0\r\n\x1a\n", Content("nifti", "a NIfTI-2 volume")),
    (4, b"ni2\0\r\n\x1a\n", Content("pair", "the header of a NIfTI-2 pair (.hdr, .img)", "convert the pair to .nii")),
    (128, b"DICM", Content("dicom", "a DICOM file", "give it under its own name, such as .dcm")),
    (0, b"PK\x03\x04", Content("zip", "a zip archive")),
    (0, b"PK\x05\x06", Content("zip", "an empty zip archive")),
    (257, b"ustar", Content("tar", "a tar archive", "unpack it first")),
    (0, b"\x1f\x8b", Content("gzip", "a gzip file")),
    (4, b"1AY&SY", Content("bzip2", "a bzip2 file", "unpack it first")),
    (0, b"\xfd7zXZ\0", Content("xz", "an xz file", "unpack it first")),
    (0, b"\x28\xb5\x2f\xfd", Content("zstd", "a Zstandard file", "unpack it first")),
    (0, b"7z\xbc\xaf\x27\x1c", Content("7z", "a 7-Zip archive", "unpack it first")),
    (0, b"Rar!\x1a\x07", Content("rar", "a RAR archive", "unpack it first")),
    (0, b"%PDF-", Content("pdf", "a PDF document")),
    (
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        Content("ole", "an old Office document, such as .xls", "export it as CSV"),
    ),
    (0, b"PAR1", Content("parquet", "a Parquet table", "export it as CSV")),
    (0, b"CDF\x01", Content("netcdf", "a netCDF file", "convert it")),
    (0, b"CDF\x02", Content("netcdf", "a netCDF file", "convert it")),
    (0, b"NRRD000", Content("nrrd", "an NRRD volume", "convert it to .nii.gz")),
    (0, b"ObjectType = Image", Content("metaimage", "a MetaImage header (.mhd)", "convert it to .nii.gz")),
    (0, b"\0\x05\x16\x07", Content("appledouble", "macOS metadata (._ file), not the file itself", "leave it out")),
    (0, b"version https://git-lfs", Content("lfs", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull")),
    (0, b"/annex/objects/", Content("annex", "a git-annex pointer, not the file itself", "fetch it: git annex get")),
)
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, at most: the library's own limit."""
PICKLES = tuple(b"\x80" + bytes([version]) for version in (2, 3, 4, 5))
# Nobody wants these, whatever the name says.
NEVER = ("lfs", "annex", "html", "error", "appledouble")


def recognise(start: bytes) -> Content | None:
    """Say what a file is.

    Args:
        start: Its first `START` bytes; fewer where it is shorter.

    Returns:
        None where nothing is known: text, or a format without a mark of its own.
    """
    # First: its length in front may look like the mark of any other.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
        return Content("safetensors", "a safetensors file", "name it .safetensors")
    for place, magic, content in MAGIC:
        if start[place : place + len(magic)] == magic:
            look = {"gzip": _inside, "zip": _archive}.get(content.kind)
            return look(start) if look else content
    if start[:2] in PICKLES:
        return Content("pickle", "a Python pickle")
    if len(start) >= 512 and not start.strip(b"\0"):
        return Content("zeros", "nothing but zero bytes at its start", "copy it again: the copy was interrupted")
    return _document(start)


def _archive(start: bytes) -> Content:
    """Tell archives by the name of their first member, which stands at the start."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if not name:
        return Content("zip", "an empty zip archive", "make it again")
    if name.endswith(b"/data.pkl"):
        return Content("zip", "a PyTorch checkpoint", "name it .pth")
    if name.endswith(b".npy"):
        return Content("zip", "a NumPy archive (.npz)")
    if name.startswith((b"[Content_Types]", b"_rels/", b"xl/", b"docProps/")):
        return Content("zip", "an Office document, such as .xlsx", "export the table as CSV")
    return Content("zip", "a zip archive", "unpack it first; export Excel workbooks as CSV")


def _inside(start: bytes) -> Content:
    """Look into a gzip file: an archive, a page, or nothing, may be packed as well."""
    try:
        inner = zlib.decompressobj(wbits=31).decompress(start, START)
    except zlib.error:
        return Content("gzip", "a gzip file")
    if not inner:
        return Content("gzip", "a gzip file of nothing", "make it again")
    found = recognise(inner)
    if found is None:
        return Content("gzip", "a gzip file")
    return Content(found.kind if found.kind in NEVER else "gzip", f"{found.name} (packed with gzip)", found.advice)


def _document(start: bytes) -> Content | None:
    text = start.removeprefix(b"\xef\xbb\xbf").decode("latin-1").lstrip()
    low, again = text[:200].lower(), "download the file itself; the link may need a login"
    if low.startswith(("<!doctype html", "<html", "<head", "<body", "<!-- saved from")):
        return Content("html", "a web page (HTML)", again)
    if low.startswith(("<?xml", "<error")):
        body = text.partition("?>")[2].lstrip() if low.startswith("<?xml") else text
        if re.match(r"<(!doctype )?html", body, re.IGNORECASE):
            return Content("html", "a web page (HTML)", again)
        if body.startswith("<Error"):
            return Content("error", "an error message of a server (XML)", again)
        return Content("xml", "an XML document")
    if re.match(r'\{\s*("|\})|\[\s*["\[{\]]', text) and "\0" not in text:
        return Content("json", "a JSON document", "check that the download worked")
    return None

"""What a file is, whatever its name says, and how each reader says so."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxmed.contents import recognise
from jaxmed.errors import InputError
from jaxmed.files import read_record, require_file
from jaxmed.io import gradients, nifti, onnx, pickles, safetensors
from jaxmed.io.images import read_image
from jaxmed.io.tables import read_table

pytestmark = pytest.mark.core

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'


def as_zip(name="a.txt", content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def as_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return buffer.getvalue()


def as_image(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def as_npy():
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    return buffer.getvalue()


def empty_zip():
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


FOREIGN = {
    "lfs": (LFS, "a Git LFS pointer"),
    "annex": (b"/annex/objects/MD5E-s1--a.nii.gz\n", "a git-annex pointer"),
    "html": (HTML, "a web page"),
    "xhtml": (b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "x"><html>', "a web page"),
    "error": (S3, "an error message of a server"),
    "appledouble": (b"\0\5\x16\7" + bytes(90), "macOS metadata"),
    "xml": (b'<?xml version="1.0"?><svg/>', "an XML document"),
    "json": (b'{"message": "404"}', "a JSON document"),
    "zip": (as_zip(), "a zip archive"),
    "empty zip": (empty_zip(), "an empty zip archive"),
    "npz": (as_zip("a.npy"), "a NumPy archive"),
    "checkpoint": (as_zip("archive/data.pkl"), "a PyTorch checkpoint"),
    "xlsx": (as_zip("[Content_Types].xml"), "an Office document"),
    "tar": (as_tar(), "a tar archive"),
    "tgz": (gzip.compress(as_tar()), r"a tar archive \(packed with gzip\)"),
    "packed page": (gzip.compress(HTML), r"a web page \(HTML\) \(packed with gzip\)"),
    "packed lfs": (gzip.compress(LFS), "a Git LFS pointer"),
    "empty gzip": (gzip.compress(b""), "a gzip file of nothing"),
    "bzip2": (bz2.compress(b"x"), "a bzip2 file"),
    "xz": (lzma.compress(b"x"), "an xz file"),
    "png": (as_image("PNG"), "a PNG image"),
    "jpeg": (as_image("JPEG"), "a JPEG image"),
    "tiff": (as_image("TIFF"), "a TIFF image"),
    "gif": (as_image("GIF"), "a GIF image"),
    "npy": (as_npy(), "a NumPy array"),
    "pickle": (pickle.dumps([1]), "a Python pickle"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
    "dicom": (bytes(128) + b"DICM" + bytes(90), "a DICOM file"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "zeros": (bytes(4000), "nothing but zero bytes"),
}
ZIPS = ("zip", "empty zip", "npz", "checkpoint", "xlsx")
NEVER = ("lfs", "annex", "html", "xhtml", "error", "appledouble", "packed page", "packed lfs")


def told(read, path):
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and "\n" not in message
    return caught.value.found


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".png", ".jpg", ".tif", ".npy", ".npz"])
def test_readers_say_what_a_misnamed_file_is(tmp_path, name, suffix):
    content, words = FOREIGN[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    read = nifti.read if ".nii" in suffix else read_image
    if (read is read_image and name in ("png", "jpeg", "tiff") and suffix in (".png", ".jpg", ".tif")) or (
        name == "npy" and suffix in (".npy", ".npz")
    ):
        read(path)  # what it is, is among what is read
        return
    if name in ZIPS and suffix in (".npy", ".npz"):  # archives are read, and hold no array
        words = "the arrays|bad file"
    if content[:2] == b"\x1f\x8b" and suffix == ".nii" and name not in NEVER:
        words = "a gzip file named .nii"
    found = told(read, path)
    assert re.search(words, found), found


@pytest.mark.parametrize("name", NEVER)
def test_what_stands_in_for_a_file_is_refused_for_every_reader(tmp_path, name):
    (tmp_path / "a.csv").write_bytes(FOREIGN[name][0])
    assert told(lambda path: require_file(path, "a table"), tmp_path / "a.csv")


OTHERS = {
    ".pth": (pickles.read_checkpoint, (*ZIPS, "pickle")),
    ".safetensors": (safetensors.read, ()),
    ".csv": (read_table, ()),
    ".bval": (lambda path: gradients.read_gradients(path, path), ()),
    ".onnx": (onnx.load, ()),
    ".json": (read_record, ("json",)),
}


@pytest.mark.parametrize("suffix", OTHERS)
def test_readers_of_weights_tables_and_settings_say_so_too(tmp_path, suffix):
    read, own = OTHERS[suffix]
    for name, (content, words) in FOREIGN.items():
        if name not in own:
            (tmp_path / f"a{suffix}").write_bytes(content)
            assert re.search(words, told(read, tmp_path / f"a{suffix}")), name


def test_text_and_tables_are_not_mistaken():
    for content in (b"path,label\na.nii,0\n", b"0 1000 2000\n", b"# comment\n1,2\n", b"[1, 2", b"BZ,1", b"{curly}"):
        assert recognise(content) is None
    assert recognise(b"{}").kind == recognise(b'[["a"]]').kind == "json"


def test_plain_nifti_named_gz_and_the_reverse_are_told_their_names(tmp_path):
    good = nifti_bytes()
    (tmp_path / "a.nii.gz").write_bytes(good)
    (tmp_path / "b.nii").write_bytes(gzip.compress(good))
    with pytest.raises(InputError, match=r"found a NIfTI volume; rename it to a\.nii$"):
        nifti.read(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"found a gzip file named \.nii; rename it to b\.nii\.gz$"):
        nifti.read(tmp_path / "b.nii")


def nifti_bytes():
    import nibabel as nib

    return nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)).to_bytes()

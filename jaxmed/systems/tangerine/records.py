"""Where the volumes of a training run come from, who is held out, and how they are read."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.pack import PackConfig, PackedSource, pack
from jaxmed.data.records import FileSource
from jaxmed.errors import InputError
from jaxmed.io.tables import Table, read_table
from jaxmed.models.published.preprocess import Preprocess, load_input

SUFFIXES = (".nii", ".nii.gz", ".npz", ".npy")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a record's image went through: names it in a cache, and hands it to the device as float32."""

    preprocess: Preprocess

    def __call__(self, fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
        """Return the fields, the image as an array."""
        return {**fields, "image": np.asarray(fields["image"], np.float32)}


def find_volumes(place: Path) -> tuple[Path, ...]:
    """Return a file, or the volumes of a folder in the order of their names.

    Raises:
        InputError: When there is none.
    """
    if not place.exists():
        raise InputError(place, "a volume or a folder of volumes", "nothing")
    if place.is_file():
        return (place,)
    found = tuple(sorted(path for path in place.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file()))
    if not found:
        raise InputError(place, f"volumes ({', '.join(SUFFIXES)})", "none in this folder")
    return found


def read_manifest(path: Path) -> Table:
    """Read a manifest, which has at least the column "path"."""
    return read_table(path, required=("path",), optional=("label", "subject", "split"))


def volume_source(
    paths: tuple[Path, ...], preprocess: Preprocess, cache: Path | None = None
) -> FileSource | PackedSource:
    """Make a source of prepared volumes under the field "image".

    Args:
        paths: One file per record.
        preprocess: What each goes through.
        cache: Folder in which prepared volumes are kept, float16, to be read in place from then on.
    """
    source = FileSource({"image": paths}, readers={"image": partial(load_input, preprocess=preprocess)})
    if cache is None:
        return source
    return pack(source, cache, Prepared(preprocess), PackConfig("float16"))

"""Where the volumes of a training run come from, who is held out, and how they are read."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.pack import PackConfig, PackedSource, pack
from jaxmed.data.records import FileSource
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import Table, read_table
from jaxmed.models.published.preprocess import Preprocess, load_input


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a record's image went through: names it in a cache, and hands it to the device as float32."""

    preprocess: Preprocess
    fill: float | None = None

    def __call__(self, fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
        """Return the fields, the image as an array."""
        return {**fields, "image": np.asarray(fields["image"], np.float32)}


def read_manifest(path: Path) -> Table:
    """Read a manifest, which has at least the column "path"."""
    return read_table(path, required=("path",), optional=("label", "subject", "split"))


def volume_source(
    scans: Sequence[ScanFiles | Path],
    preprocess: Preprocess,
    cache: Path | None = None,
    series: str = "",
    fill: float | None = None,
) -> FileSource | PackedSource:
    """Make a source of prepared volumes under the field "image".

    Args:
        scans: One per record.
        preprocess: What each goes through.
        cache: Folder in which prepared volumes are kept, float16, to be read in place from then on.
        series: Which DICOM series is meant where a folder holds several, of scans that do not say it themselves.
        fill: Intensity of voxels that have none, likewise.
    """
    listed = [scan if isinstance(scan, ScanFiles) else ScanFiles(scan, series, fill=fill) for scan in scans]
    source = FileSource(
        {"image": tuple(scan.path for scan in listed)},
        readers={"image": partial(_load, {scan.path: scan for scan in listed}, preprocess)},
    )
    if cache is None:
        return source
    return pack(source, cache, Prepared(preprocess, listed[0].fill), PackConfig("float16"))


def _load(scans: Mapping[Path, ScanFiles], preprocess: Preprocess, path: Path) -> np.ndarray:
    return load_input(scans[path], preprocess)

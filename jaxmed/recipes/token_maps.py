"""Maps on the grid of an encoder's tokens, put onto the scans that they tell of, and written with what they are."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from jaxmed.arrays.grid import resize
from jaxmed.config import to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import Record
from jaxmed.data.stored import as_pixels
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.io.scans import kind_of
from jaxmed.recipes.map_files import Input
from jaxmed.versions import software_versions
from jaxmed.volume import Grid, Volume


def spread(places: Float[np.ndarray, "*grid"], size: tuple[int, ...]) -> Float32[np.ndarray, "*size"]:
    """Interpolate a map on the grid of the tokens to the image, linearly between the centres of the patches."""
    flat = (1,) * (3 - len(size))
    x, y, z = (*size, *flat)
    volume = Volume.make(places.reshape(*places.shape, *flat).astype(np.float32), np.eye(4))
    return resize(volume, (x, y, z), order=1).array.reshape(size).astype(np.float32)


def to_grid(
    places: Float[np.ndarray, "*grid"], preprocess: Preprocess, grid: Grid | None, cropped: Grid | None = None
) -> Volume:
    """Put a map on the grid of the tokens onto that of its scan; onto the model's input where the scan has none.

    Args:
        places: The map.
        preprocess: How the scan became the model's input.
        grid: Of the scan, or of the pixels of a picture.
        cropped: Of the square that a picture was cut to, where it was.
    """
    image = spread(places, preprocess.size)
    if grid is None:
        return Volume.make(image.reshape(*image.shape, *(1,) * (3 - image.ndim)), np.eye(4))
    return preprocess.inverse(image, grid, cropped)


def write_map(
    stem: Path,
    places: Float[np.ndarray, "*grid"],
    preprocess: Preprocess,
    record: Record,
    scan: Input,
    told: dict[str, Any],
) -> Volume:
    """Write a map on the grid of its scan as NIfTI, with a sidecar, and return it.

    That of a picture is written as a picture of the same pixels too, from 0 (black) to its largest value (white).

    Args:
        stem: Name of the files, without suffix.
        places: The map, on the grid of the tokens.
        preprocess: How the scan became the model's input.
        record: The scan.
        scan: What the model took, of `map_files.read_input`.
        told: What the sidecar says of the map: definition, unit, and what is its own.
    """
    volume = to_grid(places, preprocess, *scan.place)
    reference = record.path if record.path.name.lower().endswith(nifti.SUFFIXES) else None
    nifti.write(stem.with_name(stem.name + ".nii.gz"), volume, reference=reference)
    if kind_of(record.path) == "picture":
        shown = as_pixels(volume)[0]
        write_png(stem.with_name(stem.name + ".png"), np.clip(shown / (shown.max() or 1.0), 0, 1))
    frame = "the model's own axes (slice, row, column)" if scan.place[0] is None else "the scan's own grid"
    sidecar = {
        **told,
        "largest": float(volume.array.max()),
        "input": str(record.path),
        "frame": frame,
        "constants": {"preprocess": to_record(preprocess), "patch_grid": list(places.shape)},
        "software": f"jaxmed {software_versions().get('jaxmed', 'unknown')}",
    }
    write_json(stem.with_name(stem.name + ".json"), sidecar)
    return volume

"""Read what a network is applied to: a diffusion scan of its protocol, and the voxels inside."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.gradients import GradientTable, read_gradients
from jaxmed.systems.noddi.network import Table, require_table
from jaxmed.systems.noddi.reading import read_mask
from jaxmed.volume import Volume


class Signals(NamedTuple):
    """A checked scan.

    Attributes:
        dwi: The 4D scan.
        mask: Voxels inside whose values are all finite.
        signals: Magnitudes of those voxels.
        notes: What a reader of the maps should know, one sentence each.
    """

    dwi: Volume
    mask: Bool[np.ndarray, "x y z"]
    signals: Float32[np.ndarray, "voxel image"]
    notes: list[str]


def require_path(path: Path | None, name: str) -> Path:
    """Return a path that a stage cannot do without.

    Raises:
        InputError: It was not given.
    """
    if path is None:
        raise InputError(name, "a file", "nothing", f"give --{name} FILE, or try --preset smoke")
    return path


def read_table(
    bvals: Path | None, bvecs: Path | None, b0_threshold: float, num_images: int | None = None
) -> GradientTable:
    """Read a gradient table that has unweighted rows and enough directions for a network to be trained on.

    Raises:
        InputError: It is missing or wrong, nothing is unweighted, or directions lie on a plane.
    """
    bvals, bvecs = require_path(bvals, "bvals"), require_path(bvecs, "bvecs")
    table = read_gradients(bvals, bvecs, b0_threshold=b0_threshold, num_images=num_images)
    weighted = table.bvals > b0_threshold
    if weighted.all():
        raise InputError(
            bvals,
            f"an unweighted image (b <= {b0_threshold:g} s/mm^2)",
            f"a smallest b-value of {table.bvals.min():g}",
            "raise the b0-threshold if these images are meant as b = 0",
        )
    directions = table.bvecs[weighted]
    if len(directions) < 6 or np.linalg.matrix_rank(directions.T @ directions, tol=1e-3) < 3:
        expected = "six or more weighted images in different directions"
        raise InputError(bvals, expected, f"{len(directions)} on a plane or line")
    return table


def read_signals(dwi: Path | None, bvals: Path | None, bvecs: Path | None, mask: Path | None, table: Table) -> Signals:
    """Read a scan of a network's protocol.

    Args:
        dwi: 4D NIfTI file of magnitudes.
        bvals: Its b-values.
        bvecs: Its directions.
        mask: NIfTI file on its grid; None for the bright unweighted voxels.
        table: The protocol that it must have.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    dwi = require_path(dwi, "dwi")
    shape = nifti.describe(dwi)["shape"]
    num_images = shape[3] if isinstance(shape, tuple) and len(shape) == 4 else None
    gradients = read_table(bvals, bvecs, table.b0_threshold, num_images)
    require_table(table, Table.make(gradients.bvals, gradients.bvecs, table.b0_threshold), bvals)
    volume = nifti.read(dwi, dimensions=(4,), allow_constant=False, allow_nonfinite=True)
    notes = list(gradients.notes)
    b0 = volume.array[..., np.flatnonzero(table.is_b0)].mean(axis=-1)
    inside = read_mask(mask, volume, dwi, b0, notes)
    inside = _only_finite(inside, volume, dwi, notes)
    signals = volume.array[inside]
    empty = int((b0[inside] <= 0).sum())
    if empty == len(signals):
        raise InputError(dwi, "unweighted signal inside the mask", "none above 0", "check the mask")
    if empty:
        notes.append(f"{empty:,} voxels inside the mask have no unweighted signal; their maps are 0.")
    negative = int((signals < 0).any(axis=1).sum())
    if negative:
        notes.append(f"{negative:,} voxels hold negative values, which a network trained on magnitudes never saw.")
    return Signals(volume, inside, signals, notes)


def _only_finite(inside: np.ndarray, dwi: Volume, path: Path, notes: list[str]) -> np.ndarray:
    finite = np.asarray(np.isfinite(dwi.array[inside]).all(axis=1))
    bad = int((~finite).sum())
    if bad > len(finite) / 2:
        found = f"NaN or Inf in {bad:,} of {len(finite):,}"
        raise InputError(path, "finite voxels inside the mask", found, "mask or repair them first")
    if not bad:
        return inside
    notes.append(f"{bad:,} voxels hold NaN or Inf; their maps are 0, and map 'mask' leaves them out.")
    kept = inside.copy()
    kept[inside] = finite
    return kept

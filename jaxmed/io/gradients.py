"""Diffusion gradient tables in FSL's text format.

A .bval file holds one row of b-values in s/mm^2; a .bvec file three rows of direction components (one column per
image);
tables with one row per image are read too. FSL's directions are relative to the image axes, with x reversed where the
determinant of the affine is positive; `to_world` turns them into RAS+.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from jaxmed.errors import InputError
from jaxmed.files import require_file, write_text

MAX_NORM_ERROR = 0.1
"""Directions within 10 % of unit length are normalised; beyond, the table says something else."""


class GradientTable(NamedTuple):
    """b-values and directions of a diffusion scan.

    Attributes:
        bvals: b-values in s/mm^2.
        bvecs: Unit directions in FSL's frame; zero on rows at or below the b = 0 threshold.
        notes: What was repaired while reading, one sentence each.
    """

    bvals: Float64[np.ndarray, " measurement"]
    bvecs: Float64[np.ndarray, "measurement 3"]
    notes: tuple[str, ...]


def read_gradients(
    bvals_path: str | Path, bvecs_path: str | Path, *, b0_threshold: float = 50.0, num_images: int | None = None
) -> GradientTable:
    """Read and check a gradient table.

    Args:
        bvals_path: Text file of b-values in s/mm^2.
        bvecs_path: Text file of directions, 3 x N or N x 3.
        b0_threshold: Rows up to this b-value need no direction: whatever stands there, NaN included, becomes zero.
        num_images: Number of images that the tables must match.

    Raises:
        InputError: A file is missing or not numbers; lengths disagree; a b-value is negative or not finite; a
            direction of a weighted row is missing or far from unit length.
    """
    bvals = _read_numbers(bvals_path, "b-values").reshape(-1)
    table = _read_numbers(bvecs_path, "gradient directions")
    if num_images is not None and len(bvals) != num_images:
        raise InputError(
            bvals_path,
            f"{num_images} b-values, one per image",
            f"{len(bvals)}",
            "give the table that belongs to this scan",
        )
    if 3 not in table.shape or table.size != 3 * len(bvals):
        raise InputError(
            bvecs_path,
            f"3 x {len(bvals)} components, one direction per b-value",
            " x ".join(map(str, table.shape)),
            "give the table that belongs to these b-values",
        )
    # A 3 x 3 table is read as FSL writes it: one column per image.
    bvecs = table.T if table.shape[0] == 3 else table
    _check_bvals(bvals_path, bvals, b0_threshold)
    bvecs, notes = _clean_directions(bvecs_path, bvals, bvecs, b0_threshold)
    return GradientTable(bvals, bvecs, notes)


def _read_numbers(path: str | Path, what: str) -> Float64[np.ndarray, "row column"]:
    path = require_file(path, f"a text file of {what}", kinds=())
    try:
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        rows = [[float(word) for word in line.split()] for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(path, f"a text file of {what}", "bytes that are not text") from error
    except ValueError as error:
        word = str(error).rpartition(": ")[2]
        raise InputError(path, f"a text file of {what}", f"the word {word}") from error
    widths = {len(row) for row in rows}
    if not rows or len(widths) != 1:
        found = "no numbers" if not rows else f"rows of {min(widths)} to {max(widths)} numbers"
        raise InputError(path, f"a rectangular table of {what}", found)
    return np.array(rows, np.float64)


def _check_bvals(path: str | Path, bvals: np.ndarray, b0_threshold: float) -> None:
    wrong = np.flatnonzero(~np.isfinite(bvals) | (bvals < 0))
    if len(wrong):
        found = f"{bvals[wrong[0]]:g} in place {wrong[0] + 1}"
        raise InputError(path, "finite b-values of 0 or more in s/mm^2", found)
    if bvals.max() <= b0_threshold:
        raise InputError(
            path,
            f"b-values above {b0_threshold:g} s/mm^2",
            f"a largest one of {bvals.max():g}",
            "check the unit: s/mm^2, not ms/um^2",
        )


def _clean_directions(path, bvals, bvecs, b0_threshold) -> tuple[np.ndarray, tuple[str, ...]]:
    notes = []
    weighted = bvals > b0_threshold
    if not np.isfinite(bvecs[~weighted]).all():
        count = int((~np.isfinite(bvecs[~weighted]).all(axis=1)).sum())
        notes.append(f"{count} direction(s) that are not numbers, on b = 0 rows, were set to zero.")
    bvecs = np.where(weighted[:, None], bvecs, 0.0)
    missing = np.flatnonzero(~np.isfinite(bvecs).all(axis=1))
    if len(missing):
        found = f"NaN or Inf in place {missing[0] + 1} (b = {bvals[missing[0]]:g})"
        raise InputError(path, "a finite direction for every weighted image", found)
    lengths = np.linalg.norm(bvecs, axis=1)
    wrong = np.flatnonzero(weighted & (np.abs(lengths - 1) > MAX_NORM_ERROR))
    if len(wrong):
        found = f"length {lengths[wrong[0]]:.3g} in place {wrong[0] + 1} (b = {bvals[wrong[0]]:g})"
        raise InputError(path, "directions of unit length", found, "check the table, or normalise it")
    if np.any(np.abs(lengths[weighted] - 1) > 1e-3):
        notes.append(
            f"Directions with lengths of {lengths[weighted].min():.4f} to {lengths[weighted].max():.4f} "
            "were normalised."
        )
    unit = bvecs / np.where(weighted, lengths, 1.0)[:, None]
    return unit, tuple(notes)


def write_gradients(
    bvals_path: str | Path,
    bvecs_path: str | Path,
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
) -> None:
    """Write a gradient table as FSL does: b-values in one row, directions in three."""
    write_text(bvals_path, " ".join(f"{bval:g}" for bval in bvals) + "\n")
    rows = (" ".join(f"{component:.8f}" for component in axis) for axis in bvecs.T)
    write_text(bvecs_path, "\n".join(rows) + "\n")


def to_world(
    directions: Float[np.ndarray, "*batch 3"], affine: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "*batch 3"]:
    """Rotate directions from FSL's frame to RAS+ world axes.

    Source: FSL's diffusion FAQ (bvecs are relative to image axes in radiological storage).
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    flip = np.array([-1.0 if np.linalg.det(affine[:3, :3]) > 0 else 1.0, 1.0, 1.0])
    return directions @ (axes * flip).T


def from_world(
    directions: Float[np.ndarray, "*batch 3"], affine: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "*batch 3"]:
    """Rotate directions from RAS+ world axes to FSL's frame: the inverse of `to_world`, for orthogonal axes."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    flip = np.array([-1.0 if np.linalg.det(affine[:3, :3]) > 0 else 1.0, 1.0, 1.0])
    return directions @ (axes * flip)

"""Diffusion gradient tables: one checked record, from arrays or from FSL's text files.

A .bval file holds one row of b-values in s/mm^2; a .bvec file three rows of direction components (one column per
image); tables with one row per image are read too. FSL's directions are relative to the image axes, with x reversed
where the determinant of the affine is positive; `to_world` turns them into RAS+.

`check_gradients` is what every table passes, whether it stood in a file, in DICOM headers or in an argument.
"""

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float64

from jaxmed.errors import InputError
from jaxmed.files import write_text
from jaxmed.io.sheets import read_sheet

Numbers: TypeAlias = Any
"""Whatever NumPy turns into an array: arrays of any kind, lists, tuples."""
MAX_NORM_ERROR = 0.1
"""Directions within 10 % of unit length are normalised; beyond, the table says something else."""
BVAL_LIMITS = (100.0, 1e5)
"""The largest b-value of a scan in s/mm^2 lies between these: below, the unit is ms/um^2; above, it is s/m^2."""
ENCODED = 0.05
"""Lengths tell b where their squares are b / largest b to this."""


class GradientTable(NamedTuple):
    """b-values and directions of a diffusion scan, checked.

    Attributes:
        bvals: b-values in s/mm^2.
        bvecs: Unit directions in FSL's frame; zero where an unweighted image has none.
        notes: What was repaired, one sentence each.
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
        b0_threshold: Rows up to this b-value need no direction.
        num_images: Number of images that the tables must match.

    Raises:
        InputError: A file is missing or not numbers, or `check_gradients` refuses the table.
    """
    bvals = _read_numbers(bvals_path, "b-values").reshape(-1)
    table = _read_numbers(bvecs_path, "gradient directions")
    return check_gradients(
        bvals, table, b0_threshold=b0_threshold, num_images=num_images, where=(bvals_path, bvecs_path)
    )


def check_gradients(
    bvals: Numbers,
    bvecs: Numbers,
    *,
    b0_threshold: float = 50.0,
    num_images: int | None = None,
    where: tuple[object, object] = ("bvals", "bvecs"),
) -> GradientTable:
    """Check a gradient table, and repair what can be repaired without a doubt.

    Where a scanner writes one b-value and tells the shells by the lengths of the directions (|g|^2 = b / largest b),
    b is scaled by the squared lengths; where the lengths repeat what the b-values say, they are normalised.

    Args:
        bvals: b-values in s/mm^2; any sequence of numbers.
        bvecs: Directions, N x 3 or 3 x N; a 3 x 3 table is read as FSL writes it, one column per image.
        b0_threshold: Rows up to this b-value need no direction: NaN there becomes zero.
        num_images: Number of images that the table must match.
        where: What messages call the b-values and the directions: files or arguments.

    Raises:
        InputError: Lengths disagree; a b-value is negative or not finite, or all are in another unit than s/mm^2; a
            direction of a weighted row is missing or far from unit length.
    """
    values, table = as_numbers(bvals, where[0]).reshape(-1), as_numbers(bvecs, where[1])
    if num_images is not None and len(values) != num_images:
        expected, advice = f"{num_images} b-values, one per image", "give the table that belongs to this scan"
        raise InputError(where[0], expected, len(values), advice)
    if table.ndim != 2 or 3 not in table.shape or table.size != 3 * len(values):
        expected, advice = (
            f"3 x {len(values)} components, one direction per b-value",
            "give the table of these b-values",
        )
        raise InputError(where[1], expected, " x ".join(map(str, table.shape)) or "one number", advice)
    _check_bvals(where[0], values, b0_threshold)
    return _clean_directions(where, values, table.T if table.shape[0] == 3 else table, b0_threshold)


def as_numbers(values: Numbers, where: object, dtype: type = np.float64) -> np.ndarray:
    """Turn what a caller gave into an array.

    Raises:
        InputError: It is none of numbers.
    """
    try:
        return np.asarray(values, dtype)
    except (TypeError, ValueError) as error:
        text = str(error)
        found = text if len(text) < 90 else f"{text[:87]}..."
        raise InputError(where, "a rectangular array of numbers", found) from error


def _read_numbers(path: str | Path, what: str) -> Float64[np.ndarray, "row column"]:
    sheet = read_sheet(path)
    rows = []
    for row in sheet.rows:
        # A minus sign that a word processor has made pretty; blanks at the end of a line are no cell.
        cells = [word for cell in row for word in cell.replace("\u2212", "-").split()]
        try:
            rows.append([sheet.number(cell) for cell in cells])
        except ValueError as error:
            raise InputError(path, f"a text file of {what}", f"the word '{error}'") from error
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        found = "no numbers" if not rows else f"rows of {min(widths)} to {max(widths)} numbers"
        raise InputError(path, f"a rectangular table of {what}", found)
    return np.array(rows, np.float64)


def _check_bvals(where: object, bvals: np.ndarray, b0_threshold: float) -> None:
    wrong = np.flatnonzero(~np.isfinite(bvals) | (bvals < 0))
    if len(wrong):
        found = f"{bvals[wrong[0]]:g} in place {wrong[0] + 1}"
        raise InputError(where, "finite b-values of 0 or more in s/mm^2", found)
    (lowest, highest), largest = BVAL_LIMITS, bvals.max()
    lowest = b0_threshold if largest <= b0_threshold else lowest
    if largest <= lowest:
        expected, advice = f"b-values above {lowest:g} s/mm^2", "check the unit: s/mm^2, not ms/um^2"
        raise InputError(where, expected, f"a largest one of {largest:g}", advice)
    if largest > highest:
        expected, advice = f"b-values up to {highest:g} s/mm^2", "check the unit: s/mm^2, not s/m^2"
        raise InputError(where, expected, f"a largest one of {largest:g}", advice)


def _clean_directions(
    where: tuple[object, object], bvals: np.ndarray, bvecs: np.ndarray, b0_threshold: float
) -> GradientTable:
    notes = []
    weighted = bvals > b0_threshold
    finite = np.asarray(np.isfinite(bvecs).all(axis=1))
    if not finite[~weighted].all():
        count = int((~finite[~weighted]).sum())
        notes.append(f"{count} direction(s) that are not numbers, on b = 0 rows, were set to zero.")
    missing = np.flatnonzero(weighted & ~finite)
    if len(missing):
        found = f"NaN or Inf in place {missing[0] + 1} (b = {bvals[missing[0]]:g})"
        raise InputError(where[1], "a finite direction for every weighted image", found)
    bvecs = np.where(finite[:, None], bvecs, 0.0)
    lengths = np.linalg.norm(bvecs, axis=1)
    is_unit = np.abs(lengths - 1) <= MAX_NORM_ERROR
    if not is_unit[weighted].all():
        scaled, note = _bvals_of_lengths(bvals, lengths, weighted)
        if scaled is None:
            wrong = int(np.flatnonzero(weighted & ~is_unit)[0])
            found = f"length {lengths[wrong]:.3g} in place {wrong + 1} (b = {bvals[wrong]:g})"
            expected = "directions of unit length, or of lengths whose squares are b / largest b"
            raise InputError(where[1], expected, found, "check the table, or normalise it")
        bvals, weighted = scaled, scaled > b0_threshold
        is_unit = lengths > 0
        notes.append(note)
    elif np.any(np.abs(lengths[weighted] - 1) > 1e-3):
        low, high = lengths[weighted].min(), lengths[weighted].max()
        notes.append(f"Directions with lengths of {low:.4f} to {high:.4f} were normalised.")
    # An unweighted image keeps a direction: at b = 60 it still says which way the signal fell.
    kept = weighted | (is_unit & (bvals > 0))
    # Unit vectors stay as they are, to the last bit: a table that has been checked is the same table.
    divisor = np.where(kept & (np.abs(lengths - 1) > 1e-12), lengths, 1.0)
    unit = np.where(kept[:, None], bvecs / divisor[:, None], 0.0)
    return GradientTable(bvals, unit, tuple(notes))


def _bvals_of_lengths(bvals: np.ndarray, lengths: np.ndarray, weighted: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Return the b-values that lengths encode, and what to say of it; None where they encode none."""
    largest, squares = bvals.max(), lengths**2
    if abs(lengths[weighted].max() - 1) > ENCODED:
        return None, ""
    said = f"Directions have lengths of {lengths[weighted].min():.3f} to {lengths[weighted].max():.3f}"
    if np.all(np.abs(squares - bvals / largest)[weighted] <= ENCODED):
        return bvals, f"{said}, whose squares are the b-values over the largest one; they were normalised."
    if np.ptp(bvals[weighted]) > ENCODED * largest:
        return None, ""
    # Lengths that differ: zeros among unit ones are directions that are missing, not images at b = 0.
    if np.all((np.abs(lengths - 1) <= MAX_NORM_ERROR) | (lengths == 0)):
        return None, ""
    scaled = np.where(weighted, bvals * squares, bvals)
    low, high = scaled[weighted].min(), scaled[weighted].max()
    note = f"{said} at one b-value of {largest:g}: they tell b, which was scaled by their squares "
    note += f"(b = {low:.0f} to {high:.0f} s/mm^2)."
    return scaled, note


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

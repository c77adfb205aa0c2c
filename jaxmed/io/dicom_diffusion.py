"""Diffusion series from DICOM: a 4D volume with its b-values and directions.

Standard tags only: Diffusion b-value (0018,9087) and Diffusion Gradient Orientation (0018,9089), at the root of a
classic file or in the functional groups of an enhanced one. Orientations are in patient coordinates (LPS+); they come
out in FSL's frame of the array, as a .bvec file would hold them. Vendors' private tags and mosaics are left to
converters.

Source: DICOM PS3.3, C.8.13.5.9 (MR diffusion macro).
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxmed.errors import InputError
from jaxmed.io.dicom import _arrange, _choose, _decode, _Frame, _frames, _group, _headers, require_pydicom
from jaxmed.io.gradients import MAX_NORM_ERROR, GradientTable, from_world
from jaxmed.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CONVERT = "convert the series with dcm2niix, and give its NIfTI, bval and bvec files"
POSITION_STEP = 1e-2  # mm: positions closer than this are one slice


class _Weighted(NamedTuple):
    """A frame, its place in the acquisition, and its weighting."""

    frame: _Frame
    order: tuple[int, int, int]
    bval: float
    direction: tuple[float, ...] | None  # patient coordinates, LPS+


def read_diffusion(
    path: str | Path, *, series: str | None = None, b0_threshold: float = 50.0
) -> tuple[Volume, GradientTable]:
    """Read one diffusion series.

    Args:
        path: A folder, searched with its subfolders, or a single enhanced file.
        series: SeriesInstanceUID to read; needed when the folder holds several.
        b0_threshold: Frames up to this b-value, in s/mm^2, need no direction.

    Returns:
        The scan, images in order of acquisition along the last axis, and their table.

    Raises:
        InputError: There is no such series, b-values or directions are not in the standard tags, or frames do not
            make whole images on one grid.
    """
    path = Path(path)
    require_pydicom()
    headers = _headers(path)
    if not headers:
        raise InputError(path, "a DICOM image series", "no DICOM image", "name the folder that holds the .dcm files")
    members = _choose(path, headers, series)
    weighted = [item for file, header in members for item in _weighted_frames(file, header, b0_threshold)]
    images = _group_images(path, weighted)
    places, affine = {}, np.eye(4)
    for number, image in enumerate(images):
        order, found = _arrange(path, [item.frame for item in image], False)
        if number == 0:
            affine = found
        elif len(image) != len(images[0]) or not np.allclose(found, affine, atol=1e-3):
            raise InputError(path, f"image {number + 1} on the grid of the first", "another grid", CONVERT)
        for z, item in enumerate(order):
            places[image[item].frame.path, image[item].frame.number] = (z, number, image[item].frame)
    array = _read_pixels(members, places, len(images[0]), len(images))
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(path, "finite voxels", f"{bad} NaN or Inf voxels of {array.size}")
    return Volume.make(array, affine), _make_table(path, images, affine, b0_threshold)


def _weighted_frames(file: Path, header: "Dataset", b0_threshold: float) -> list[_Weighted]:
    if "MOSAIC" in [str(word) for word in header.get("ImageType", [])]:
        raise InputError(file, "one slice per frame", "a mosaic", CONVERT)
    shared = [*header.get("SharedFunctionalGroupsSequence", [])]
    per_frame = [*header.get("PerFrameFunctionalGroupsSequence", [])]
    found = []
    for index, frame in enumerate(_frames(file, header)):
        group = _group([*per_frame[index : index + 1], *shared], "MRDiffusionSequence", header)
        bval = group.get("DiffusionBValue")
        if bval is None:
            raise InputError(file, "a b-value in the standard tag (0018,9087)", "none", CONVERT)
        inner = group.get("DiffusionGradientDirectionSequence") or [group]
        orientation = inner[0].get("DiffusionGradientOrientation")
        direction = None if orientation is None else tuple(float(value) for value in orientation)
        if float(bval) > b0_threshold and (
            direction is None or len(direction) != 3 or not np.isfinite(direction).all()
        ):
            expected = f"a direction in the standard tag (0018,9089) of the image at b = {float(bval):g}"
            raise InputError(file, expected, f"{direction or 'none'}", CONVERT)
        if float(bval) > b0_threshold and abs(np.linalg.norm(direction or ()) - 1) > MAX_NORM_ERROR:
            found_ = f"length {np.linalg.norm(direction or ()):.3g}"
            raise InputError(file, "a direction of unit length", found_, CONVERT)
        order = (int(header.get("AcquisitionNumber") or 0), int(header.get("InstanceNumber") or 0), index)
        found.append(_Weighted(frame, order, float(bval), direction if float(bval) > b0_threshold else None))
    return found


def _group_images(path: Path, weighted: list[_Weighted]) -> list[list[_Weighted]]:
    """Gather the frames of each image: one b-value and direction, one frame per position, repeats in their order."""
    stacks: dict[object, dict[tuple[int, ...], list[_Weighted]]] = {}
    for item in sorted(weighted, key=lambda item: item.order):
        direction = None if item.direction is None else tuple(np.round(item.direction, 4) + 0.0)
        where = tuple(int(round(value / POSITION_STEP)) for value in item.frame.position)
        stacks.setdefault((round(item.bval, 1), direction), {}).setdefault(where, []).append(item)
    images = []
    for (bval, direction), positions in stacks.items():  # pyright: ignore[reportGeneralTypeIssues]
        counts = {len(items) for items in positions.values()}
        if len(counts) != 1:
            found = f"{min(counts)} to {max(counts)} at b = {bval:g}, direction {direction}"
            raise InputError(path, "as many frames at every slice position", found, "copy the missing files")
        images += [list(image) for image in zip(*positions.values(), strict=True)]
    return sorted(images, key=lambda image: min(item.order for item in image))


def _read_pixels(members, places, num_slices: int, num_images: int) -> np.ndarray:
    first = next(iter(places.values()))[2]
    rows, columns = first.shape
    array = np.empty((columns, rows, num_slices, num_images), np.float32)
    for file, _ in members:
        for index, pixels in enumerate(_decode(file)):
            z, number, frame = places[file, index]
            array[..., z, number] = pixels.T * frame.slope + frame.intercept
    return array


def _make_table(path: Path, images: list[list[_Weighted]], affine: np.ndarray, b0_threshold: float) -> GradientTable:
    bvals = np.array([image[0].bval for image in images])
    if bvals.max() <= b0_threshold:
        raise InputError(path, f"b-values above {b0_threshold:g} s/mm^2", f"a largest one of {bvals.max():g}")
    patient = np.array([image[0].direction or (0.0, 0.0, 0.0) for image in images])
    bvecs = from_world(patient * np.array([-1.0, -1.0, 1.0]), affine)
    lengths = np.linalg.norm(bvecs, axis=1, keepdims=True)
    return GradientTable(bvals, bvecs / np.where(lengths > 0, lengths, 1.0), ())

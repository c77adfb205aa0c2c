"""Diffusion series from DICOM: a 4D volume with its b-values and directions.

Standard tags only: Diffusion b-value (0018,9087) and Diffusion Gradient Orientation (0018,9089), at the root of a
classic file or in the functional groups of an enhanced one. Orientations are in patient coordinates (LPS+); they come
out in FSL's frame of the array, as a .bvec file would hold them. Vendors' private tags and mosaics are left to
converters.

Source: DICOM PS3.3, C.8.13.5.9 (MR diffusion macro).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmed.errors import InputError
from jaxmed.io.dicom import CONVERT, Frame, arrange, fill_images, group_of, open_series, read_frames
from jaxmed.io.dicom_files import Image, collect_warnings, read_numbers, warning_notes
from jaxmed.io.gradients import MAX_NORM_ERROR, GradientTable, check_gradients, from_world
from jaxmed.volume import Volume, require_intensities

POSITION_STEP = 1e-2  # mm: positions closer than this are one slice


class _Weighted(NamedTuple):
    """A frame, its place in the acquisition, and its weighting."""

    frame: Frame
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
    path, warned = Path(path), []
    members, notes = open_series(path, series, (), warned)
    with collect_warnings(warned):
        weighted = [item for image in members for item in _weighted_frames(image, b0_threshold)]
    images = _group_images(path, weighted)
    frames, affine = [], np.eye(4)
    for number, image in enumerate(images):
        order, found, further = arrange(path, [item.frame for item in image], False)
        if number == 0:
            affine = found
            notes += further
        elif len(image) != len(images[0]) or not np.allclose(found, affine, atol=1e-3):
            raise InputError(path, f"image {number + 1} on the grid of the first", "another grid", CONVERT)
        frames += [image[index].frame for index in order]
    array = require_intensities(fill_images(frames, warned, len(images)), path)
    table = _make_table(path, images, affine, b0_threshold)
    return Volume.make(array, affine), table._replace(notes=(*table.notes, *notes, *warning_notes(warned)))


def _weighted_frames(image: Image, b0_threshold: float) -> list[_Weighted]:
    file, header = image
    acquisition, instance = (
        int((read_numbers(file, header, name, 1) or (0,))[0]) for name in ("AcquisitionNumber", "InstanceNumber")
    )
    found = []
    for index, frame in enumerate(read_frames(image)):
        group = group_of(frame.groups, "MRDiffusionSequence")
        bval = read_numbers(file, group, "DiffusionBValue", 1)
        if bval is None:
            raise InputError(file, "a b-value in the standard tag (0018,9087)", "none", CONVERT)
        inner = group.get("DiffusionGradientDirectionSequence") or [group]
        direction = None
        if bval[0] > 0:  # without any weighting the frames of one image may hold anything
            direction = read_numbers(file, inner[0], "DiffusionGradientOrientation", 3)
            if direction is None and bval[0] > b0_threshold:
                expected = f"a direction in the standard tag (0018,9089) of the image at b = {bval[0]:g}"
                raise InputError(file, expected, "none", CONVERT)
            length = float(np.linalg.norm(direction or ()))
            if length > 1 + MAX_NORM_ERROR:
                raise InputError(file, "a direction of unit length", f"length {length:.3g}", CONVERT)
        found.append(_Weighted(frame, (acquisition, instance, index), bval[0], direction))
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


def _make_table(path: Path, images: list[list[_Weighted]], affine: np.ndarray, b0_threshold: float) -> GradientTable:
    bvals = np.array([image[0].bval for image in images])
    patient = np.array([image[0].direction or (0.0, 0.0, 0.0) for image in images])
    bvecs = from_world(patient * np.array([-1.0, -1.0, 1.0]), affine)
    return check_gradients(bvals, bvecs, b0_threshold=b0_threshold, where=(path, path))

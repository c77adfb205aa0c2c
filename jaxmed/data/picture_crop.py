"""Where the disc of a fundus photograph lies in its picture, and the square around it; on the host.

The camera's dark rim is told by the corners, which a round disc never fills: at least two of the four have to be dark
beside the retina. What is brighter than the rim by a tenth of the way to the retina is the disc, as far as it hangs
together; specks, dates and logos in the rim lie apart from it. Where the picture cuts the disc off above or below, or
on one side, the square reaches beyond the picture, so that the disc keeps its middle and its scale; where it is cut off
along both axes its diameter is not known, and the longer side counts.

Source: RETFound's photographs were cropped to the disc and squared before pre-training and before fine-tuning (the
preprocessing step of AutoMorph, as its authors say in their repository).
Deviation: the rule is our own; the original segments the disc by its own thresholds.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from scipy import ndimage

from jaxmed.data.windows import cut_window
from jaxmed.errors import InputError
from jaxmed.volume import Grid, Volume

WORKED_ON = 1024  # pixels of the longer side on which the disc is looked for; of larger pictures every nth is taken
CORNER = 0.03  # edge of a corner, as a share of the shorter side
DARK = 0.2  # the rim is at most this share of the retina's brightness
THRESHOLD = 0.1  # of the way from the rim to the retina
LEAST_SHARE = 0.01  # of the picture that a disc's box has
LEAST_BYTE = 8 / 255  # a picture of 8 bits whose retina is darker shows the noise of the camera
NO_RIM = "no dark rim around a disc was found: the picture is taken whole"


class Square(NamedTuple):
    """A square of a picture.

    Attributes:
        starts: Its first pixel along both axes; negative where it reaches beyond the picture.
        edge: Its pixels along either.
        fill: Intensity of the rim, for what lies beyond the picture.
    """

    starts: tuple[int, int]
    edge: int
    fill: float


def find_disc(picture: Shaped[np.ndarray, "x y *channel"], where: object) -> Square | None:
    """Return the square around the disc of a fundus photograph; None where there is no dark rim, or no disc in it.

    Args:
        picture: Grey or in colour, in any unit, darkness being low; the brightest channel counts.
        where: The file, for messages.

    Raises:
        InputError: It is dark nearly everywhere.
    """
    step = -(-max(picture.shape[:2]) // WORKED_ON)
    levels = picture[::step, ::step]
    levels = levels if levels.ndim == 2 else levels.max(axis=2)
    low, bright = float(levels.min()), float(np.percentile(levels, 98))
    if not bright > low or (0 <= bright < LEAST_BYTE and _holds_bytes(levels)):
        found = f"{low:g} to {bright:g} in 98 % of it"
        raise InputError(where, "an image with contrast: a bright disc", found, "leave the picture out")
    rim = _rim(levels)
    if rim - min(0.0, low) > DARK * (bright - min(0.0, low)):
        return None
    box = _largest(levels > rim + THRESHOLD * (bright - rim))
    # On the pixels of the whole picture, to which the last ones belong whatever the step.
    ends = [(part.start * step, min(part.stop * step, n)) for part, n in zip(box, picture.shape, strict=False)]
    lengths = [stop - start for start, stop in ends]
    if lengths[0] * lengths[1] < LEAST_SHARE * picture.shape[0] * picture.shape[1]:
        return None
    edge = max(lengths)
    x, y = (_place(*end, edge, n) for end, n in zip(ends, picture.shape, strict=False))
    return Square((x, y), edge, rim)


def crop_to_disc(volume: Volume, where: object) -> tuple[Volume, tuple[str, ...]]:
    """Cut a picture to the square around its disc.

    Args:
        volume: The picture, as a volume of one plane; channels last.
        where: The file, for messages.

    Returns:
        The square, in its place, and what is unexpected; a picture without a dark rim as it is.

    Raises:
        InputError: It is dark nearly everywhere.
    """
    found = find_disc(volume.array[:, :, 0], where)
    if found is None:
        return volume, (NO_RIM,)
    starts, size = (*found.starts, 0), (found.edge, found.edge, 1)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(starts, np.float64)
    return Volume.make(cut_window(volume.array, starts, size, found.fill), affine), ()


def crop_grid(volume: Volume, grid: Grid) -> Volume:
    """Cut what lies on the picture's grid, such as a mask, to the grid of its square; 0 beyond the picture."""
    steps = np.rint(np.linalg.solve(volume.affine, grid.affine)[:3, 3]).astype(int)
    return Volume.make(cut_window(volume.array, steps.tolist(), grid.shape), grid.affine)


def _rim(levels: Shaped[np.ndarray, "x y"]) -> float:
    """Return the intensity of the second darkest corner: that of a pixel, so that bytes stay bytes."""
    n = max(1, round(CORNER * min(levels.shape)))
    corners = [levels[x, y] for x in (slice(n), slice(-n, None)) for y in (slice(n), slice(-n, None))]
    return sorted(float(np.percentile(corner, 50, method="lower")) for corner in corners)[1]


def _largest(mask: Shaped[np.ndarray, "x y"]) -> tuple[slice, slice]:
    """Return the box around the largest connected part of a mask that is not empty."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    x, y = ndimage.find_objects(labels)[int(np.argmax(sizes)) - 1]
    return x, y


def _place(start: int, stop: int, edge: int, length: int) -> int:
    """Return where the square starts along an axis: on the side that the picture cuts off it reaches out."""
    is_cut = start == 0, stop == length
    if is_cut == (True, False):
        return stop - edge
    return start if is_cut == (False, True) else start - (edge - (stop - start)) // 2


def _holds_bytes(levels: Shaped[np.ndarray, "x y"]) -> bool:
    return bool(np.abs(levels * 255 - np.rint(levels * 255)).max() < 1e-3)

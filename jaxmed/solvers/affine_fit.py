"""The affine map that takes points to points, by least squares or robustly; on the host, in closed form per turn."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from jaxmed.errors import InputError

TURNS = 50
CUT = 4.685  # residuals beyond this many deviations have no weight: 95 % efficiency for normal errors
DEVIATION = 1.4826  # of a normal distribution, in medians of its absolute values


class AffineFit(NamedTuple):
    """An affine map.

    Attributes:
        matrix: Homogeneous coordinates of a point to those of its target.
        residual: Median distance of targets from where their points go, in the points' unit.
        inliers: Share of points whose weight is above 0; 1 without robustness.
    """

    matrix: Float64[np.ndarray, "4 4"]
    residual: float
    inliers: float


def fit_affine(
    points: Float[np.ndarray, "point 3"], targets: Float[np.ndarray, "point 3"], *, is_robust: bool = True
) -> AffineFit:
    """Fit the affine map that takes points to targets.

    Args:
        points: At least four that are not in a plane.
        targets: Of each.
        is_robust: Whether far residuals lose their weight (Tukey's biweight, reweighted until nothing changes).

    Raises:
        InputError: Too few points, or all in a plane.
    """
    columns = np.concatenate([points, np.ones((len(points), 1))], axis=1).astype(np.float64)
    wanted = targets.astype(np.float64)
    if len(points) < 4 or np.linalg.matrix_rank(columns[:, :3] - columns[:, :3].mean(0)) < 3:
        raise InputError("points", "four or more that are not in a plane", f"{len(points)}")
    weight, matrix = np.ones(len(points)), np.zeros((4, 3))
    for _ in range(TURNS if is_robust else 1):
        scaled = columns * weight[:, None]
        new = np.linalg.solve(columns.T @ scaled, scaled.T @ wanted)
        distance = np.linalg.norm(columns @ new - wanted, axis=1)
        is_done, matrix = np.allclose(new, matrix, rtol=0, atol=1e-9), new
        if is_done or not is_robust:
            break
        limit = CUT * max(DEVIATION * float(np.median(distance)), 1e-9)
        weight = np.square(np.maximum(1 - np.square(distance / limit), 0))
    residual = np.linalg.norm(columns @ matrix - wanted, axis=1)
    return AffineFit(np.vstack([matrix.T, [0, 0, 0, 1]]), float(np.median(residual)), float(np.mean(weight > 0)))

"""Registration by regressed coordinates: to MNI space, of an atlas, of another scan; and how far off it is.

Every voxel of the brain carries its place in MNI space, so that registration is looking up: an atlas is sampled there,
and two scans find one another through the space that both lead to.

Source: BrainFM, arXiv:2509.00549, official code (atlas warping). The affine fit, pairs and their errors are ours.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Real
from scipy import ndimage
from scipy.spatial import KDTree

from jaxmed.errors import InputError
from jaxmed.metrics.imaging import dice
from jaxmed.solvers.affine_fit import AffineFit, fit_affine
from jaxmed.systems.brainfm.prediction import Prediction
from jaxmed.volume import Volume

POINTS = 100_000  # voxels of which an affine map is fitted
NEIGHBOURS = 16  # voxels that are averaged where coordinates are looked up: noise of theirs of 1 mm costs 0.5 mm then
LEAST_DISTANCE = 1e-4  # mm: nearer ones have the weight of this
SCORED = 5_000  # voxels that the error of a pair is measured in


def affine_to_atlas(prediction: Prediction, *, is_robust: bool = True) -> AffineFit:
    """Fit the affine map from the world of the scan to MNI space, both in mm, to the coordinates of brain voxels.

    Raises:
        InputError: There are no coordinates, or too few voxels of brain.
    """
    coordinates, places = coordinates_of(prediction), brain_voxels(prediction, POINTS)
    world = to_world(prediction.scan.volume.affine, places)
    return fit_affine(world, coordinates[tuple(places.T)], is_robust=is_robust)


def bring(
    prediction: Prediction, world: Float[np.ndarray, "point 3"], volume: Volume, order: Literal[0, 1] = 1
) -> Real[np.ndarray, "x y z"]:
    """Bring a volume onto the input of a scan; 0 outside of the brain.

    Args:
        prediction: Of the scan.
        world: Where each of its brain voxels is in the world of the volume, in mm: its coordinates for an atlas in MNI
            space, `register_pair` for another scan.
        volume: What is brought.
        order: 0 for labels, 1 for intensities, float32.
    """
    places = to_world(np.linalg.inv(volume.affine), world).T
    array = np.asarray(volume.array, np.float32) if order else np.asarray(volume.array)
    result = np.zeros(prediction.brain.shape, array.dtype)
    result[prediction.brain] = ndimage.map_coordinates(array, places, order=order, cval=0.0)
    return result


def find_in(other: Prediction) -> Callable[[Float[np.ndarray, "point 3"]], Float32[np.ndarray, "point 3"]]:
    """Return the function that takes places in MNI space into the world of a scan, both in mm.

    The scan's coordinates are inverted by the voxels whose coordinates are nearest, their places weighted by the
    inverse of the distance.

    Raises:
        InputError: It has no coordinates, or no brain.
    """
    known = brain_coordinates(other)
    if len(known) < NEIGHBOURS:
        raise InputError(other.scan.path, "a brain to register", f"{len(known)} voxels of one")
    tree, world = KDTree(known), to_world(other.scan.volume.affine, np.argwhere(other.brain))

    def find(wanted: Float[np.ndarray, "point 3"]) -> Float32[np.ndarray, "point 3"]:
        distance, index = tree.query(wanted, k=NEIGHBOURS, workers=-1)
        weight = 1 / np.maximum(distance.reshape(len(wanted), -1), LEAST_DISTANCE)
        weight /= weight.sum(1, keepdims=True)
        return np.einsum("pk,pkc->pc", weight, world[index.reshape(len(wanted), -1)]).astype(np.float32)

    return find


def brain_coordinates(prediction: Prediction) -> Float32[np.ndarray, "point 3"]:
    """Return the coordinates of the brain voxels, in mm.

    Raises:
        InputError: The network tells none.
    """
    return coordinates_of(prediction)[prediction.brain]


def register_pair(prediction: Prediction, other: Prediction) -> Float32[np.ndarray, "point 3"]:
    """Return where, in the world of another scan and in mm, the brain voxels of this one are.

    Raises:
        InputError: One has no coordinates, or no brain.
    """
    return find_in(other)(brain_coordinates(prediction))


def pair_error(
    prediction: Prediction,
    find: Callable[[np.ndarray], np.ndarray],
    truth: Callable[[Int[np.ndarray, "point 3"]], Float[np.ndarray, "point 3"]],
) -> float:
    """Return how far from the truth the brain voxels of a scan are found in another one; mean, in mm.

    Args:
        prediction: Of the scan.
        find: From MNI space into the world of the other one, as of `find_in`.
        truth: From voxels of the scan to where they really are in that world.
    """
    places = brain_voxels(prediction, SCORED)
    found = find(coordinates_of(prediction)[tuple(places.T)])
    return float(np.linalg.norm(found - truth(places), axis=1).mean())


def warped_label_scores(
    prediction: Prediction, truth: Int[np.ndarray, "x y z"], world: Float[np.ndarray, "point 3"], labels: Volume
) -> dict[str, float]:
    """Compare the label map of a scan with that of an atlas, or of another scan, that is brought onto it.

    Args:
        prediction: Of the scan.
        truth: Its label map.
        world: Where the brain voxels are in the world of the other label map.
        labels: That map.

    Returns:
        "dice", and "center_mm", the distance between a structure's centre in the other map and where the voxels of the
        structure are found; both means over the structures that both have. Empty where there is none.
    """
    moved, own = bring(prediction, world, labels, order=0), truth[prediction.brain]
    common = [label for label in np.unique(own) if label and (labels.array == label).any()]
    if not common:
        return {}
    errors = []
    for label in common:
        center = to_world(labels.affine, np.argwhere(labels.array == label)).mean(0)
        errors.append(float(np.linalg.norm(world[own == label].mean(0) - center)))
    scores = [dice(truth == label, moved == label) for label in common]
    return {"dice": float(np.mean(scores)), "center_mm": float(np.mean(errors))}


def to_world(affine: Float[np.ndarray, "4 4"], places: Real[np.ndarray, "point 3"]) -> Float[np.ndarray, "point 3"]:
    """Return the place in mm of voxels."""
    return places @ affine[:3, :3].T + affine[:3, 3]


def brain_voxels(prediction: Prediction, most: int) -> Int[np.ndarray, "point 3"]:
    """Return the voxels of the brain, evenly thinned to about so many."""
    places = np.argwhere(prediction.brain)
    return places[:: max(1, len(places) // most)]


def coordinates_of(prediction: Prediction) -> Float32[np.ndarray, "x y z 3"]:
    """Return the coordinates of every voxel, in mm.

    Raises:
        InputError: The network tells none.
    """
    if "coordinates" not in prediction.maps:
        raise InputError(prediction.scan.path, "a network with the task registration", "none", "take other weights")
    return prediction.maps["coordinates"]

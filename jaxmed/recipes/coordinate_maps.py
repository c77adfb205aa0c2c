"""Registration by regressed coordinates: to MNI space, of an atlas, of another scan; and how far off it is.

Every voxel of the brain carries its place in MNI space, so that registration is looking up: an atlas is sampled there,
and two scans find one another through the space that both lead to.

Source: BrainFM, arXiv:2509.00549, official code (atlas warping). The affine fit, pairs and their errors are ours.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Real
from scipy import ndimage
from scipy.spatial import KDTree

from jaxmed.errors import InputError
from jaxmed.metrics.imaging import dice
from jaxmed.solvers.affine_fit import AffineFit, fit_affine
from jaxmed.volume import Volume

POINTS = 100_000  # voxels of which an affine map is fitted
NEIGHBOURS = 16  # voxels that are averaged where coordinates are looked up: noise of theirs of 1 mm costs 0.5 mm then
LEAST_DISTANCE = 1e-4  # mm: nearer ones have the weight of this
SCORED = 5_000  # voxels that the error of a pair is measured in


class CoordinateMap(NamedTuple):
    """A scan whose voxels carry their places in MNI space.

    Attributes:
        coordinates: Of every voxel, in mm.
        brain: Voxels that count.
        affine: Voxels to the world of the scan, in mm.
        where: The scan, for messages.
    """

    coordinates: Float32[np.ndarray, "x y z 3"]
    brain: Bool[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    where: object = "scan"

    @property
    def of_brain(self) -> Float32[np.ndarray, "point 3"]:
        """Places of the voxels of the brain."""
        return self.coordinates[self.brain]

    def voxels(self, most: int) -> Int[np.ndarray, "point 3"]:
        """Return voxels of the brain, evenly thinned to about so many."""
        places = np.argwhere(self.brain)
        return places[:: max(1, len(places) // most)]


def affine_to_atlas(found: CoordinateMap, *, is_robust: bool = True) -> AffineFit:
    """Fit the affine map from the world of a scan to MNI space, both in mm, to the coordinates of brain voxels.

    Raises:
        InputError: There are too few voxels of brain.
    """
    places = found.voxels(POINTS)
    world = to_world(found.affine, places)
    return fit_affine(world, found.coordinates[tuple(places.T)], is_robust=is_robust)


def bring(
    brain: Bool[np.ndarray, "x y z"], world: Float[np.ndarray, "point 3"], volume: Volume, order: Literal[0, 1] = 1
) -> Real[np.ndarray, "x y z"]:
    """Bring a volume onto a scan; 0 outside of the brain.

    Args:
        brain: Voxels of the scan that are filled.
        world: Where each of them is in the world of the volume, in mm: its coordinates for an atlas in MNI space,
            `register_pair` for another scan.
        volume: What is brought.
        order: 0 for labels, 1 for intensities, float32.
    """
    places = to_world(np.linalg.inv(volume.affine), world).T
    array = np.asarray(volume.array, np.float32) if order else np.asarray(volume.array)
    result = np.zeros(brain.shape, array.dtype)
    result[brain] = ndimage.map_coordinates(array, places, order=order, cval=0.0)
    return result


def find_in(other: CoordinateMap) -> Callable[[Float[np.ndarray, "point 3"]], Float32[np.ndarray, "point 3"]]:
    """Return the function that takes places in MNI space into the world of a scan, both in mm.

    The scan's coordinates are inverted by the voxels whose coordinates are nearest, their places weighted by the
    inverse of the distance.

    Raises:
        InputError: It has no brain.
    """
    known = other.of_brain
    if len(known) < NEIGHBOURS:
        raise InputError(other.where, "a brain to register", f"{len(known)} voxels of one")
    tree, world = KDTree(known), to_world(other.affine, np.argwhere(other.brain))

    def find(wanted: Float[np.ndarray, "point 3"]) -> Float32[np.ndarray, "point 3"]:
        distance, index = tree.query(wanted, k=NEIGHBOURS, workers=-1)
        weight = 1 / np.maximum(distance.reshape(len(wanted), -1), LEAST_DISTANCE)
        weight /= weight.sum(1, keepdims=True)
        return np.einsum("pk,pkc->pc", weight, world[index.reshape(len(wanted), -1)]).astype(np.float32)

    return find


def register_pair(found: CoordinateMap, other: CoordinateMap) -> Float32[np.ndarray, "point 3"]:
    """Return where, in the world of another scan and in mm, the brain voxels of this one are.

    Raises:
        InputError: The other one has no brain.
    """
    return find_in(other)(found.of_brain)


def pair_error(
    scan: CoordinateMap,
    find: Callable[[np.ndarray], np.ndarray],
    truth: Callable[[Int[np.ndarray, "point 3"]], Float[np.ndarray, "point 3"]],
) -> float:
    """Return how far from the truth the brain voxels of a scan are found in another one; mean, in mm.

    Args:
        scan: The scan.
        find: From MNI space into the world of the other one, as of `find_in`.
        truth: From voxels of the scan to where they really are in that world.
    """
    places = scan.voxels(SCORED)
    found = find(scan.coordinates[tuple(places.T)])
    return float(np.linalg.norm(found - truth(places), axis=1).mean())


def warped_label_scores(
    brain: Bool[np.ndarray, "x y z"],
    truth: Int[np.ndarray, "x y z"],
    world: Float[np.ndarray, "point 3"],
    labels: Volume,
) -> dict[str, float]:
    """Compare the label map of a scan with that of an atlas, or of another scan, that is brought onto it.

    Args:
        brain: Voxels of the scan whose places are known.
        truth: Its label map.
        world: Where those voxels are in the world of the other label map.
        labels: That map.

    Returns:
        "dice", and "center_mm", the distance between a structure's centre in the other map and where the voxels of the
        structure are found; both means over the structures that both have. Empty where there is none.
    """
    moved, own = bring(brain, world, labels, order=0), truth[brain]
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

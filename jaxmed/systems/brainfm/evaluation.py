"""How good the maps of a scan are, and how much they change when the scan is worse.

Where there is a label map, Dice against it is told; without one, against what the network says of the scan as it is,
which measures stability and not truth.

Source: BrainFM, arXiv:2509.00549, official evaluation code. Errors in mm and the means of corrected scans are ours.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxmed.arrays.types import KeyArray
from jaxmed.metrics.imaging import SSIM_RADIUS, dice, field_error, mae, ms_ssim, psnr, ssim
from jaxmed.recipes.coordinate_maps import find_in, pair_error, to_world
from jaxmed.recipes.worse_scans import CONDITIONS, pull, to_unit_range
from jaxmed.systems.brainfm.prediction import Prediction

LEAST_GAIN = 1e-3  # below it a bias field divides nothing
LARGEST_PSNR = 100.0  # dB, of equal images


def robustness(
    prediction: Prediction,
    truth: Int[np.ndarray, "x y z"] | None,
    again: Callable[[np.ndarray], Prediction],
    key: KeyArray,
) -> dict[str, dict[str, float]]:
    """Ask the network about worse versions of a scan.

    Args:
        prediction: Of the scan as it is.
        truth: Label map on the grid of the input; None compares with the prediction.
        again: From an image on the grid of the input to its prediction.
        key: Of what is random in the conditions.

    Returns:
        By condition the scores of `compare`, and "pair_mm", the mean error of registering the worse scan with the scan
        as it is by the coordinates of both; where every voxel really is is known.
    """
    volume = prediction.scan.volume
    find = find_in(prediction.located) if "coordinates" in prediction.maps else None

    def score(other: Prediction, moved: Array | None) -> dict[str, float]:
        before, labels = prediction.maps, truth
        if moved is not None:
            before = {name: pull(value, moved) for name, value in before.items()}
            labels = None if labels is None else pull(labels, moved)
        result = compare(before, other.maps, labels, prediction._replace(maps=before))
        if find is None:
            return result

        def where(places: np.ndarray) -> np.ndarray:
            were = places if moved is None else np.asarray(moved)[tuple(places.T)]
            return to_world(volume.affine, were)

        return result | {"pair_mm": pair_error(other.located, find, where)}

    found = {"as it is": score(prediction, None)}
    for number, (name, worsen) in enumerate(CONDITIONS.items()):
        worse = worsen(jax.random.fold_in(key, number), volume)
        found[name] = score(again(worse.image), worse.places)
    return found


def compare(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    truth: Int[np.ndarray, "x y z"] | None,
    where: Prediction,
) -> dict[str, float]:
    """Return how much maps differ.

    Args:
        before: Maps by name: true ones, or those of the scan as it is.
        after: Maps that are compared with them.
        truth: Label map in place of the first ones'.
        where: Of the scan, for its brain and its labels.

    Returns:
        "dice", mean over labels, and "dice_with_background"; "coordinate_mm" and "distance_mm", mean errors in the
        brain; "bias_error", |w b - b*| / |b*| of the bias field, and "corrected_error", the mean absolute difference of
        the scans that are divided by both fields, in their means; of images "T1_error" and so on, mean absolute error
        (in HU for CT), "T1_psnr" in dB, and "T1_ssim" and "T1_ms_ssim" of the images between their extremes.
    """
    result: dict[str, float] = {}
    brain = where.brain
    for name, value in before.items():
        other = after[name]
        match name:
            case "segmentation":
                reference = value if truth is None else truth
                labels = [label for label in np.unique(reference) if label in where.voxels]
                scores = {int(label): dice(reference == label, other == label) for label in labels}
                if any(scores):
                    result["dice"] = float(np.mean([score for label, score in scores.items() if label]))
                    result["dice_with_background"] = float(np.mean([*scores.values()]))
            case "coordinates":
                result["coordinate_mm"] = float(np.linalg.norm(value - other, axis=-1)[brain].mean())
            case "distance":
                result["distance_mm"] = float(np.abs(value - other)[brain].mean())
            case "bias_field":
                result["bias_error"] = field_error(value, other, brain)
                image = where.scan.volume.array[brain]
                one, two = (image / np.maximum(field[brain], LEAST_GAIN) for field in (value, other))
                result["corrected_error"] = mae(one / one.mean(), two / two.mean())
            case "T1" | "T2" | "FLAIR" | "CT":
                result[f"{name}_error"] = mae(value, other)
                result[f"{name}_psnr"] = min(psnr(value, other, max(float(value.max()), 1e-6)), LARGEST_PSNR)
                if min(value.shape) > 2 * SSIM_RADIUS:
                    result[f"{name}_ssim"] = ssim(to_unit_range(value), to_unit_range(other), 1.0)
                    result[f"{name}_ms_ssim"] = ms_ssim(to_unit_range(value), to_unit_range(other), 1.0)
            case _:
                pass
    return result

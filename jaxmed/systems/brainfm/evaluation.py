"""How much the maps of a scan change when the scan is worse: spacing x bias, contrast, deformation, ghosts and motion.

Every condition degrades the network's input and asks the network again. Where there is a label map, Dice against it is
told; without one, against what the network says of the scan as it is, which measures stability and not truth.

Source: spacing x bias: BrainFM, arXiv:2509.00549, official test code (linear interpolation without blur, back and
forth; bias of 3 to 6 control points and a deviation of .1 to .6). The others are ours.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Int, Real

from jaxmed.arrays.grid import resample, resample_to
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.metrics.imaging import SSIM_RADIUS, dice, field_error, mae, ms_ssim, psnr, ssim
from jaxmed.synthesis.artifacts import ghost, move
from jaxmed.synthesis.bias_field import BiasFieldConfig, draw_log_bias
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation
from jaxmed.systems.brainfm.coordinates import find_in, pair_error, to_world
from jaxmed.systems.brainfm.prediction import Prediction
from jaxmed.volume import Volume

THICK = (1.5, 1.5, 5.0)  # mm
LEAST_GAIN = 1e-3  # below it a bias field divides nothing
LARGEST_PSNR = 100.0  # dB, of equal images
DEFORMATION = DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, amplitude=2.0)


# Compiled here, once for all scans of a size: operation by operation they take longer to compile than the network.
_deformation = jax.jit(draw_deformation, static_argnums=(1, 2, 3))
_log_bias = jax.jit(draw_log_bias, static_argnums=(1, 2))
_ghost = jax.jit(ghost, static_argnums=(1, 2))
_move = jax.jit(move)
_sample = jax.jit(sample, static_argnames="order")


class Degraded(NamedTuple):
    """A worse scan.

    Attributes:
        image: The network's input.
        places: Where each of its voxels was before, in voxels; None where nothing moved.
    """

    image: Float32[np.ndarray, "x y z"]
    places: Array | None = None


def thicken(key: KeyArray, volume: Volume) -> Degraded:
    """Resample to thick slices and back, linearly and without blur."""
    del key
    coarse = resample(volume, THICK, order=1, antialias=False)
    back = resample_to(coarse, volume.grid, order=1, antialias=False, fill=None)
    return Degraded(np.asarray(back.array, np.float32))


def bias(key: KeyArray, volume: Volume) -> Degraded:
    """Multiply by a bias field of the release's severe range, of 3 to 6 control points whatever the voxel size."""
    longest = max(volume.array.shape)
    field = _log_bias(key, volume.array.shape, BiasFieldConfig((min(3 / longest, 1.0), min(6 / longest, 1.0))))
    return Degraded(to_unit_range(volume.array * np.exp(np.asarray(field))))


def thicken_and_bias(key: KeyArray, volume: Volume) -> Degraded:
    """Do both."""
    return thicken(key, Volume.make(bias(key, volume).image, volume.affine))


def change_contrast(key: KeyArray, volume: Volume) -> Degraded:
    """Turn bright into dark within the head: a contrast that no scanner has."""
    del key
    image = volume.array
    return Degraded(np.where(image != 0, 1.0 - 0.8 * image, 0).astype(np.float32))


def deform(key: KeyArray, volume: Volume) -> Degraded:
    """Deform the head; truth is deformed alike."""
    shape = volume.array.shape
    places, _ = _deformation(key, shape, shape, DEFORMATION)
    return Degraded(_pulled(np.asarray(volume.array, np.float32), places), places)


def add_ghosts(key: KeyArray, volume: Volume) -> Degraded:
    """Add ghosts from front to back."""
    del key
    return Degraded(to_unit_range(np.asarray(_ghost(volume.array, 1, 2, 0.4))))


def shake(key: KeyArray, volume: Volume) -> Degraded:
    """Move the head during the scan."""
    return Degraded(to_unit_range(np.asarray(_move(key, volume.array))))


CONDITIONS: dict[str, Callable[[KeyArray, Volume], Degraded]] = {
    "1.5 x 1.5 x 5 mm": thicken,
    "bias": bias,
    "1.5 x 1.5 x 5 mm, bias": thicken_and_bias,
    "inverted contrast": change_contrast,
    "deformation": deform,
    "ghosts": add_ghosts,
    "motion": shake,
}


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
    find = find_in(prediction) if "coordinates" in prediction.maps else None

    def score(other: Prediction, moved: Array | None) -> dict[str, float]:
        before, labels = prediction.maps, truth
        if moved is not None:
            before = {name: _pulled(value, moved) for name, value in before.items()}
            labels = None if labels is None else _pulled(labels, moved)
        result = compare(before, other.maps, labels, prediction._replace(maps=before))
        if find is None:
            return result

        def where(places: np.ndarray) -> np.ndarray:
            were = places if moved is None else np.asarray(moved)[tuple(places.T)]
            return to_world(volume.affine, were)

        return result | {"pair_mm": pair_error(other, find, where)}

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

    Source: BrainFM, arXiv:2509.00549, official evaluation code. Errors in mm and the means of corrected scans are ours.
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


def _pulled(values: np.ndarray, places: Array) -> np.ndarray:
    is_class = values.dtype.kind in "iu"
    wide = values if values.ndim == 4 else values[..., None]
    found = np.asarray(_sample(wide, places, order=0 if is_class else 1), values.dtype)
    return found if values.ndim == 4 else found[..., 0]


def to_unit_range(image: Real[np.ndarray, "x y z"]) -> Float32[np.ndarray, "x y z"]:
    """Bring the extremes of an image to 0 and 1."""
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1e-12)).astype(np.float32)

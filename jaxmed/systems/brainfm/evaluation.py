"""How much the maps of a scan change when the scan is worse: spacing x bias, contrast, deformation, ghosts and motion.

Every condition degrades the network's input and asks the network again. Where there is a label map, Dice against it is
told; without one, against what the network says of the scan as it is, which measures stability and not truth.

Source: spacing x bias: BrainFM, arXiv:2509.00549, official test code (linear interpolation without blur, back and
forth; bias of 3 to 6 control points and a deviation of .1 to .6). The others are ours.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxmed.arrays.grid import resample, resample_to
from jaxmed.arrays.types import KeyArray
from jaxmed.arrays.warping import sample
from jaxmed.metrics.imaging import dice, field_error, mae, psnr, ssim
from jaxmed.models.published.load import Published
from jaxmed.synthesis.artifacts import ghost, move
from jaxmed.synthesis.bias_field import BiasFieldConfig, draw_log_bias
from jaxmed.synthesis.deformation import DeformationConfig, draw_deformation
from jaxmed.systems.brainfm.prediction import Prediction, predict_input
from jaxmed.volume import Volume

THICK = (1.5, 1.5, 5.0)  # mm
DEFORMATION = DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, amplitude=2.0)


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
    field = draw_log_bias(key, volume.array.shape, BiasFieldConfig((min(3 / longest, 1.0), min(6 / longest, 1.0))))
    return Degraded(_unit(volume.array * np.exp(np.asarray(field))))


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
    places, _ = draw_deformation(key, shape, shape, DEFORMATION)
    moved = sample(jnp.asarray(volume.array)[..., None], places, order=1)[..., 0]
    return Degraded(np.asarray(moved, np.float32), places)


def add_ghosts(key: KeyArray, volume: Volume) -> Degraded:
    """Add ghosts from front to back."""
    del key
    return Degraded(_unit(np.asarray(ghost(jnp.asarray(volume.array), 1, 2, 0.4))))


def shake(key: KeyArray, volume: Volume) -> Degraded:
    """Move the head during the scan."""
    return Degraded(_unit(np.asarray(move(key, jnp.asarray(volume.array)))))


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
    published: Published, prediction: Prediction, truth: Int[np.ndarray, "x y z"] | None, key: KeyArray
) -> dict[str, dict[str, float]]:
    """Ask the network about worse versions of a scan.

    Args:
        published: The network.
        prediction: Of the scan as it is.
        truth: Label map on the grid of the input; None compares with the prediction.
        key: Of what is random in the conditions.

    Returns:
        By condition: "dice", mean over labels; "coordinate_mm" and "distance_mm", mean change in the brain;
        "bias_error", |w b - b*| / |b*| of the bias field; of synthesized images "T1_error" and so on, mean absolute
        change, with "_psnr" and "_ssim" beside.
    """
    volume = prediction.scan.volume
    found: dict[str, dict[str, float]] = {"as it is": compare(prediction.maps, prediction.maps, truth, prediction)}
    for number, (name, worsen) in enumerate(CONDITIONS.items()):
        worse = worsen(jax.random.fold_in(key, number), volume)
        maps = predict_input(published, prediction.scan, worse.image).maps
        before, labels = prediction.maps, truth
        if worse.places is not None:
            before = {one: _moved(value, worse.places) for one, value in before.items()}
            labels = None if truth is None else _moved(truth.astype(np.int32), worse.places)
        found[name] = compare(before, maps, labels, prediction._replace(maps=before))
    return found


def compare(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], truth: np.ndarray | None, where: Prediction
) -> dict[str, float]:
    """Return how much maps differ; see `robustness`."""
    result: dict[str, float] = {}
    brain = where.brain
    for name, value in before.items():
        other = after[name]
        match name:
            case "segmentation":
                reference = value if truth is None else truth
                labels = [label for label in np.unique(reference) if label and label in where.voxels]
                scores = [dice(reference == label, other == label) for label in labels]
                result["dice"] = float(np.mean(scores)) if scores else float("nan")
            case "coordinates":
                result["coordinate_mm"] = float(np.linalg.norm(value - other, axis=-1)[brain].mean())
            case "distance":
                result["distance_mm"] = float(np.abs(value - other)[brain].mean())
            case "bias_field":
                result["bias_error"] = field_error(value, other, brain)
            case "T1" | "T2" | "FLAIR":
                result[f"{name}_error"] = mae(value, other)
                result[f"{name}_psnr"] = min(psnr(value, other, max(float(value.max()), 1e-6)), 100.0)
                if min(value.shape) > 10:
                    one, two = _unit(value), _unit(other)
                    result[f"{name}_ssim"] = ssim(one, two, 1.0)
            case _:
                pass
    return result


def _moved(values: np.ndarray, places: Array) -> np.ndarray:
    is_class = values.dtype.kind in "iu"
    wide = values if values.ndim == 4 else values[..., None]
    found = np.asarray(sample(jnp.asarray(wide), places, order=0 if is_class else 1), values.dtype)
    return found if values.ndim == 4 else found[..., 0]


def _unit(image: np.ndarray) -> Float32[np.ndarray, "x y z"]:
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1e-12)).astype(np.float32)

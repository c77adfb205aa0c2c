"""One scan of any modality to its maps at the network's voxel size: whole, or in windows; and what follows from them.

The network sees the whole volume by default, because its norms depend on the field of view. Windows of one size stand
on a regular lattice; probabilities and regressed values are averaged where they overlap, and classes chosen after that.

Source: BrainFM, arXiv:2509.00549, official code (post-processing, pseudo-cortical image).
Deviation: the released tiling averages label numbers, cuts its later windows to their stride, and one of its helpers
cuts what is below 0 off every result; none of that here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage
from scipy.spatial import KDTree

from jaxmed.arrays.grid import restore
from jaxmed.arrays.types import Params
from jaxmed.data.preprocess import Loaded, load
from jaxmed.data.windows import Window, blend, cut_window, tile
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.models.published.brainfm import of_modality
from jaxmed.models.published.load import Published
from jaxmed.models.unet_brain import BrainUnetConfig, process
from jaxmed.nn.model import Model
from jaxmed.solvers.affine_fit import AffineFit, fit_affine
from jaxmed.volume import Volume

Modality: TypeAlias = Literal["auto", "CT", "other"]
LARGEST_AIR = -500.0  # HU: a scan that goes below is CT
MM, HU = 100.0, 1000.0  # of coordinates and CT in the network's unit
POINTS = 100_000  # voxels of which an affine map is fitted
MAPS = {
    "T1": ("T1-weighted image, synthesized; lowest intensity 0, highest 1", "1"),
    "T2": ("T2-weighted image, synthesized; lowest intensity 0, highest 1", "1"),
    "FLAIR": ("FLAIR image, synthesized; lowest intensity 0, highest 1", "1"),
    "CT": ("CT, synthesized", "[hnsf'U]"),
    "segmentation": ("label of the most probable class", "1"),
    "distance": ("signed distance to surfaces of the cortex: left pial, left white, right pial, right white", "mm"),
    "bias_field": ("gain that the intensities of the scan are multiplied by", "1"),
    "coordinates": ("place in MNI space: x, y, z", "mm"),
    "high_res_residual": ("what the scan lacks of detail, scan between 0 and 1", "1"),
    "pathology": ("probability of lesion", "1"),
    "cortex": ("image of the cortex made of the distances: white matter 110, grey 70 to 40", "1"),
    "atlas": ("atlas, warped onto the scan by the coordinates", "that of the atlas"),
    "reference": ("reference scan, brought onto this one by the coordinates of both", "that of the reference"),
}
"""Definition and unit of each map."""


class Prediction(NamedTuple):
    """What a network makes of a scan.

    Attributes:
        scan: As the network saw it; `scan.volume` is the input, `scan.grid` the file's own grid.
        maps: On the grid of the input, by the names of MAPS; float32, labels int32; 0 where the input is 0.
        voxels: Sum of the probabilities of each label over the head, in voxels of the input.
        feature: The vector of every voxel, where it was asked for.
        age: In years, where the network tells it.
    """

    scan: Loaded
    maps: dict[str, np.ndarray]
    voxels: dict[int, float]
    feature: Float32[np.ndarray, "x y z channel"] | None = None
    age: float | None = None

    @property
    def inside(self) -> Bool[np.ndarray, "x y z"]:
        """Where the input is not 0."""
        return self.scan.volume.array != 0

    @property
    def brain(self) -> Bool[np.ndarray, "x y z"]:
        """Where there is a label, or else where the input is not 0."""
        labels = self.maps.get("segmentation")
        return self.inside if labels is None or not labels.any() else labels > 0


def predict(
    published: Published,
    volume: Volume | ScanFiles | Path | str | np.ndarray,
    *,
    modality: Modality = "auto",
    window: tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    feature: bool = False,
    fill: float | None = None,
    place: Callable[[Any], Any] = lambda array: array,
) -> Prediction:
    """Run every head on a scan.

    Args:
        published: From `load_published`.
        volume: A scan of any modality, voxel size and orientation; an array is taken to have the network's voxel size.
        modality: "CT" cuts intensities to 0 to 80 HU first; "auto" does so where values go below -500.
        window: Voxels of a window along each axis; None takes the volume whole.
        overlap: Share of a window that its neighbour has too.
        feature: Return features too: 64 numbers per voxel of the released network.
        fill: Intensity of voxels that have none; None refuses them.
        place: Puts an array onto the devices, such as split along x.

    Raises:
        InputError: For whatever is wrong with the scan or the weights.
    """
    if not isinstance(published.config, BrainUnetConfig):
        raise InputError("weights", "a multi-task network of brains", f"a {published.report.kind}")
    scan = read_scan(published, volume, modality, fill)
    image = np.asarray(scan.volume.array, np.float32)
    return predict_input(published, scan, image, window=window, overlap=overlap, feature=feature, place=place)


def predict_input(
    published: Published,
    scan: Loaded,
    image: Float32[np.ndarray, "x y z"],
    *,
    window: tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    feature: bool = False,
    place: Callable[[Any], Any] = lambda array: array,
) -> Prediction:
    """Run every head on an image of a scan's grid, the scan itself or a worse version of it; as `predict` otherwise."""
    config = published.config
    run = functools.partial(_run, published.model, config, feature, published.params, place)
    found = run(image) if window is None else _in_windows(run, image, window, overlap)
    return _finished(config, scan, image != 0, found)


def read_scan(
    published: Published,
    volume: Volume | ScanFiles | Path | str | np.ndarray,
    modality: Modality = "auto",
    fill: float | None = None,
) -> Loaded:
    """Read a scan as the network sees it.

    Raises:
        InputError: For whatever is wrong with it.
    """
    volume = Path(volume) if isinstance(volume, str) else volume
    preprocess = of_modality(published.preprocess, modality == "CT")
    scan = load(volume, preprocess, fill)
    if modality == "auto" and scan.extent[0] < LARGEST_AIR:
        scan = load(volume, of_modality(published.preprocess, True), fill)
    if scan.volume.array.ndim != 3:
        raise InputError(scan.path, "a volume of one channel", f"shape {scan.volume.array.shape}")
    return scan


@functools.lru_cache(maxsize=8)
def _program(model: Model, config: BrainUnetConfig, feature: bool) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(lambda params, x: process(config, model.apply(params, x, feature=feature)))


def _run(
    model: Model,
    config: BrainUnetConfig,
    feature: bool,
    params: Params,
    place: Callable[[Any], Any],
    image: Float32[np.ndarray, "x y z"],
) -> dict[str, np.ndarray]:
    """Run the network on one image; what is too small to be halved often enough is extended by background."""
    least = 2 ** (config.levels - 1)
    wider = np.pad(image, [(0, max(least - length, 0)) for length in image.shape])
    maps = jax.device_get(_program(model, config, feature)(params, place(wider[None, ..., None])))
    x, y, z = image.shape
    found = {name: value[0] if name == "age" else value[0, :x, :y, :z] for name, value in maps.items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise InputError("weights", f"finite values of {name}", "NaN or Inf", "check the weights, or --dtype")
    return found


def _in_windows(
    run: Callable[[Any], dict[str, np.ndarray]], image: Float32[np.ndarray, "x y z"], size: tuple[int, int, int],
    overlap: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Run windows that show something; the others, and what no window shows, are 0."""
    windows = [one for one in tile(1, image.shape, size, overlap) if cut_window(image, one.starts, size).any()]
    channels: dict[str, int] = {}

    def results() -> Iterator[Float32[np.ndarray, "x y z channel"]]:
        for one in windows or [Window(0, (0, 0, 0))]:
            found = run(cut_window(image, one.starts, size))
            found.pop("age", None)  # of whole volumes alone
            channels.update({name: value.shape[-1] for name, value in found.items()})
            yield np.concatenate([*found.values()], axis=-1)

    whole = blend(results(), windows or [Window(0, (0, 0, 0))], image.shape)
    ends = np.cumsum([*channels.values()])[:-1]
    return dict(zip(channels, np.split(whole, ends, axis=-1), strict=True))


def _finished(
    config: BrainUnetConfig, scan: Loaded, inside: Bool[np.ndarray, "x y z"], found: dict[str, np.ndarray]
) -> Prediction:
    """Give maps their units, and choose the classes."""
    feature, age = found.pop("feature", None), found.pop("age", None)
    maps: dict[str, np.ndarray] = {}
    voxels: dict[int, float] = {}
    for name, value in found.items():
        match name:
            case "segmentation":
                voxels = dict(zip(config.labels, value[inside].sum(0, dtype=np.float64).tolist(), strict=True))
                maps[name] = np.array(config.labels, np.int32)[value.argmax(-1)]
            case "CT":
                maps[name] = HU * value[..., 0]
            case "bias_field_log":
                maps["bias_field"] = np.exp(value[..., 0])
            case "registration":
                maps["coordinates"] = MM * value
            case "distance":
                maps[name], maps["cortex"] = value, cortex_image(value)
            case _:
                maps[name] = value[..., 0] if value.shape[-1] == 1 else value
    for name, value in maps.items():
        mask = inside if value.ndim == 3 else inside[..., None]
        maps[name] = np.where(mask, value, 0).astype(value.dtype)
    return Prediction(scan, maps, voxels, feature, None if age is None else float(age))


def cortex_image(distance: Float[np.ndarray, "x y z surface"]) -> Float32[np.ndarray, "x y z"]:
    """Return an image of the cortex from distances to the pial and the white surface of one side, or of both."""

    def inside(value: np.ndarray) -> np.ndarray:
        return 1 - (np.tanh(2 * value) + 1) / 2

    sides = range(0, distance.shape[-1], 2)
    total = sum(70 * inside(distance[..., side + 1] + 0.3) + 40 * inside(distance[..., side]) for side in sides)
    return np.asarray(total, np.float32)


def affine_to_atlas(prediction: Prediction, *, is_robust: bool = True) -> AffineFit:
    """Fit the affine map from the world of the scan to MNI space, both in mm, to the coordinates of brain voxels.

    Raises:
        InputError: There are no coordinates, or too few voxels of brain.
    """
    coordinates = _coordinates(prediction)
    places = np.argwhere(prediction.brain)
    places = places[:: max(1, len(places) // POINTS)]
    world = to_world(prediction.scan.volume.affine, places)
    return fit_affine(world, coordinates[tuple(places.T)], is_robust=is_robust)


def warp_atlas(prediction: Prediction, atlas: Volume) -> Float32[np.ndarray, "x y z"]:
    """Bring an atlas in MNI space onto the input, by the coordinates of its brain voxels; 0 elsewhere."""
    coordinates = _coordinates(prediction)
    return _sampled(prediction.brain, coordinates[prediction.brain], atlas)


def register_pair(prediction: Prediction, other: Prediction, *, neighbours: int = 4) -> Float32[np.ndarray, "point 3"]:
    """Return where, in the world of another scan and in mm, the brain voxels of this one are.

    Both maps lead to MNI space. The other's is inverted by the voxels whose coordinates are nearest, their places
    weighted by the inverse of the distance.

    Args:
        prediction: Of this scan.
        other: Of the other.
        neighbours: Voxels that are averaged.

    Raises:
        InputError: One has no coordinates, or no brain.
    """
    wanted, known = (_coordinates(one)[one.brain] for one in (prediction, other))
    if len(known) < neighbours or not len(wanted):
        raise InputError(other.scan.path, "a brain to register", f"{len(known)} voxels of one")
    distance, index = KDTree(known).query(wanted, k=neighbours, workers=-1)
    world = to_world(other.scan.volume.affine, np.argwhere(other.brain))
    weight = 1 / np.maximum(distance.reshape(len(wanted), -1), 1e-3)
    weight /= weight.sum(1, keepdims=True)
    return np.einsum("pk,pkc->pc", weight, world[index.reshape(len(wanted), -1)]).astype(np.float32)


def warp_other(prediction: Prediction, other: Prediction) -> Float32[np.ndarray, "x y z"]:
    """Bring another scan, as its network saw it, onto the input of this one."""
    return _sampled(prediction.brain, register_pair(prediction, other), other.scan.volume)


def to_world(affine: Float[np.ndarray, "4 4"], places: np.ndarray) -> Float[np.ndarray, "point 3"]:
    """Return the place in mm of voxels."""
    return places @ affine[:3, :3].T + affine[:3, 3]


def on_input_grid(prediction: Prediction, maps: Mapping[str, np.ndarray]) -> dict[str, Volume]:
    """Bring maps back onto the grid of the file: labels by the nearest voxel, all else linearly."""
    affine, grid = prediction.scan.volume.affine, prediction.scan.grid
    return {
        name: restore(Volume.make(value, affine), grid, order=0 if value.dtype.kind in "iu" else 1)
        for name, value in maps.items()
    }


def _sampled(
    brain: Bool[np.ndarray, "x y z"], world: Float[np.ndarray, "point 3"], volume: Volume
) -> Float32[np.ndarray, "x y z"]:
    back = np.linalg.inv(volume.affine)
    places = to_world(back, world).T
    result = np.zeros(brain.shape, np.float32)
    result[brain] = ndimage.map_coordinates(np.asarray(volume.array, np.float32), places, order=1, cval=0.0)
    return result


def _coordinates(prediction: Prediction) -> Float32[np.ndarray, "x y z 3"]:
    if "coordinates" not in prediction.maps:
        raise InputError(prediction.scan.path, "a network with the task registration", "none", "take other weights")
    return prediction.maps["coordinates"]

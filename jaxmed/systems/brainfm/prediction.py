"""One scan of any modality to its maps at the network's voxel size: whole, or in windows.

The network sees the whole volume by default, because its norms depend on the field of view. Windows of one size stand
on a regular lattice; probabilities and regressed values are averaged where they overlap, and classes chosen after that.

Source: BrainFM, arXiv:2509.00549, official code (post-processing, pseudo-cortical image).
Deviation: the released tiling averages label numbers, cuts its later windows to their stride, and one of its helpers
cuts what is below 0 off every result; none of that here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32

from jaxmed.arrays.grid import restore
from jaxmed.arrays.tracing import require_values
from jaxmed.arrays.types import Params
from jaxmed.data.head_scans import Modality, load_head
from jaxmed.data.preprocess import Loaded
from jaxmed.data.windows import Window, blend, cut_window, tile
from jaxmed.errors import InputError
from jaxmed.io.scans import ScanFiles
from jaxmed.models.published.brainfm import of_modality
from jaxmed.models.published.load import Published
from jaxmed.models.unet_brain import BrainUnetConfig, process
from jaxmed.nn.model import Model
from jaxmed.recipes.coordinate_maps import CoordinateMap
from jaxmed.volume import Volume

MM, HU = 100.0, 1000.0  # of coordinates and CT in the network's unit
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
MAPS |= {
    f"{name}_scale": (f"scale of the distribution that {name} is told with", MAPS[name][1])
    for name in ("T1", "T2", "FLAIR", "CT", "distance", "bias_field", "coordinates", "high_res_residual")
}
"""Definition and unit of each map; that of the bias field has a scale of its logarithm."""


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
    def located(self) -> CoordinateMap:
        """Where the brain is in MNI space.

        Raises:
            InputError: The network tells no coordinates.
        """
        if "coordinates" not in self.maps:
            raise InputError(self.scan.path, "a network with the task registration", "none", "take other weights")
        return CoordinateMap(self.maps["coordinates"], self.brain, self.scan.volume.affine, self.scan.path)

    @property
    def brain(self) -> Bool[np.ndarray, "x y z"]:
        """Where there is a label, or else where the input is not 0."""
        labels = self.maps.get("segmentation")
        return self.inside if labels is None or not labels.any() else labels > 0


def predict(
    published: Published,
    volume: Volume | ScanFiles | Path | str | np.ndarray | jax.Array,
    *,
    modality: Modality = "auto",
    window: tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    feature: bool = False,
    fill: float | None = None,
    average: bool = False,
    crop: bool = False,
    sharding: NamedSharding | None = None,
) -> Prediction:
    """Run every head on a scan; a driver on the host, `predict_maps` is what jit, vmap and grad go through.

    Args:
        published: From `load_published`.
        volume: A scan of any modality, voxel size and orientation; an array is taken to have the network's voxel size.
        modality: "CT" cuts intensities to 0 to 80 HU first; "auto" does so where values go below -500.
        window: Voxels of a window along each axis; None takes the volume whole.
        overlap: Share of a window that its neighbour has too.
        feature: Return features too: 64 numbers per voxel of the released network.
        fill: Intensity of voxels that have none; None refuses them.
        average: Whether the last of four axes, of colours or echoes, is averaged; such scans are refused otherwise.
        crop: Whether what is 0 around the head is cut off before the network sees it; its norms depend on that.
        sharding: Of the volume over the devices, such as split along x; any size will do. None takes one device.

    Raises:
        InputError: For whatever is wrong with the scan or the weights.
    """
    if not isinstance(published.config, BrainUnetConfig):
        raise InputError("weights", "a multi-task network of brains", f"a {published.report.kind}")
    require_values("brainfm.predict", "brainfm.predict_maps", volume=volume, params=published.params)
    scan = read_scan(published, volume, modality, fill, average=average, crop=crop)
    image = np.asarray(scan.volume.array, np.float32)
    return predict_input(published, scan, image, window=window, overlap=overlap, feature=feature, sharding=sharding)


def predict_maps(
    published: Published, images: Float[Any, "batch x y z 1"], *, feature: bool = False
) -> dict[str, Float[Array, "batch *map"]]:
    """Return the maps of prepared volumes; jit, vmap and grad go through, nothing on the host looks at a value.

    Args:
        published: As of `predict`; a pytree, so that parameters may be traced, mapped over and differentiated.
        images: Volumes as the network sees them, in [0, 1].
        feature: Return features too.

    Returns:
        By task, in the network's units (`models.unet_brain.BrainUnet`); classes are probabilities, distances are cut
        off at their limits.
    """
    params = jax.tree.map(jnp.asarray, published.params)
    return process(published.config, published.model.apply(params, images, feature=feature))


def predict_input(
    published: Published,
    scan: Loaded,
    image: Float32[np.ndarray, "x y z"],
    *,
    window: tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    feature: bool = False,
    sharding: NamedSharding | None = None,
) -> Prediction:
    """Run every head on an image of a scan's grid, the scan itself or a worse version of it; as `predict` otherwise."""
    config = published.config
    run = functools.partial(_run, published.model, config, feature, sharding, published.params)
    found = run(image) if window is None else _in_windows(run, image, window, overlap)
    return _finished(config, scan, image != 0, found)


def read_scan(
    published: Published,
    volume: Volume | ScanFiles | Path | str | np.ndarray | jax.Array,
    modality: Modality = "auto",
    fill: float | None = None,
    *,
    average: bool = False,
    crop: bool = False,
) -> Loaded:
    """Read a scan as the network sees it; arguments as of `predict`.

    Raises:
        InputError: For whatever is wrong with it.
    """
    ct = of_modality(published.preprocess, True)
    return load_head(volume, published.preprocess, ct, modality, fill, average=average, crop=crop)


@functools.lru_cache(maxsize=8)
def _program(
    model: Model, config: BrainUnetConfig, feature: bool, sharding: NamedSharding | None
) -> Callable[..., dict[str, jax.Array]]:
    def run(params: Params, x: jax.Array) -> dict[str, jax.Array]:
        # Inside of the program a split need not divide the volume: the compiler sees to what is left over.
        x = x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
        return process(config, model.apply(params, x, feature=feature))

    return jax.jit(run, out_shardings=None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec()))


def _run(
    model: Model,
    config: BrainUnetConfig,
    feature: bool,
    sharding: NamedSharding | None,
    params: Params,
    image: Float32[np.ndarray, "x y z"],
) -> dict[str, np.ndarray]:
    """Run the network on one image; what is too small to be halved often enough is extended by background."""
    least = 2 ** (config.levels - 1)
    wider = np.pad(image, [(0, max(least - length, 0)) for length in image.shape])
    maps = jax.device_get(_program(model, config, feature, sharding)(params, wider[None, ..., None]))
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
    scales = {name: np.exp(found.pop(name)) for name in [*found] if name.endswith("_log_scale")}
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
    for name, value in scales.items():
        task = name.removesuffix("_log_scale")
        named = {"registration": "coordinates", "bias_field_log": "bias_field"}.get(task, task)
        scale = {"registration": MM, "CT": HU}.get(task, 1.0) * value
        maps[f"{named}_scale"] = scale[..., 0] if scale.shape[-1] == 1 else scale
    ordered: dict[str, np.ndarray] = {}
    for name in sorted(maps, key=[*MAPS].index):
        value = maps[name]
        mask = inside if value.ndim == 3 else inside[..., None]
        ordered[name] = np.where(mask, value, 0).astype(value.dtype)
    return Prediction(scan, ordered, voxels, feature, None if age is None else float(age))


def cortex_image(distance: Float[np.ndarray, "x y z surface"]) -> Float32[np.ndarray, "x y z"]:
    """Return an image of the cortex from distances to the pial and the white surface of one side, or of both."""

    def inside(value: np.ndarray) -> np.ndarray:
        return 1 - (np.tanh(2 * value) + 1) / 2

    sides = range(0, distance.shape[-1], 2)
    total = sum(70 * inside(distance[..., side + 1] + 0.3) + 40 * inside(distance[..., side]) for side in sides)
    return np.asarray(total, np.float32)


def on_input_grid(prediction: Prediction, maps: Mapping[str, np.ndarray]) -> dict[str, Volume]:
    """Bring maps back onto the grid of the file: labels by the nearest voxel, all else linearly."""
    affine, grid = prediction.scan.volume.affine, prediction.scan.grid
    return {
        name: restore(Volume.make(value, affine), grid, order=0 if value.dtype.kind in "iu" else 1)
        for name, value in maps.items()
    }

"""Probabilities of a classifier, and maps of what moved them, on the grid of the scan.

Source: Grad-CAM, arXiv:1610.02391, equations 1 and 2, on the tokens that TANGERINE's last block reads, after its first
layer norm: a channel's weight is the mean of the score's gradient over the patch tokens, and the map is the weighted
sum of the channels where that is positive. The map on the patch grid is interpolated linearly to the cube, then put
onto the grid of the scan by `Preprocess.inverse`.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

from jaxmed.arrays.grid import resize
from jaxmed.arrays.task import Task, predict_values
from jaxmed.arrays.types import Params
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.heads import Classifier, ClassifierConfig
from jaxmed.models.published.load import Published
from jaxmed.nn.model import make_model
from jaxmed.systems.tangerine.embedding import prepare
from jaxmed.volume import Grid, Volume

Maps: TypeAlias = Literal["top", "all", "none"]


class Prediction(NamedTuple):
    """What a classifier says of one scan, or of a batch of prepared cubes.

    Attributes:
        values: Probabilities, or values of a regression in the unit of the labels; one per name of the task.
        mapped: Which output each map explains.
        maps: Of one scan: one volume per map, on its grid. Of prepared cubes: an array on their grid.
    """

    values: Float[np.ndarray, "*batch output"]
    mapped: Int[np.ndarray, "*batch map"]
    maps: tuple[Volume, ...] | Float32[np.ndarray, "*batch map d h w"]


class Explained(NamedTuple):
    """What the device returns for a batch.

    Attributes:
        values: As in `Prediction`.
        mapped: Likewise.
        maps: On the patch grid.
    """

    values: Float[Array, "batch output"]
    mapped: Int[Array, "batch map"]
    maps: Float[Array, "batch map d h w"]


def predict(published: Published, volume: Volume | str | Path | Shaped[Any, "..."], maps: Maps = "top") -> Prediction:
    """Return the probabilities of one scan or of a batch of prepared cubes, and maps of what raised them.

    Args:
        published: A classifier or regressor, from `load_published`.
        volume: A CT in HU: a `Volume`, a file, a DICOM folder, or a 3D array in the axis order of a file (x, y, z).
            Or prepared cubes in [0, 1]: [d, h, w, 1], or a batch of them.
        maps: "top" explains the output with the highest score, "all" each of them, "none" none.

    Raises:
        InputError: The weights are no classifier's, or the scan cannot be read or used.
    """
    config, task = require_classifier(published)
    given = prepare(published.preprocess, volume)
    found = jax.device_get(explain(config, task, maps, published.params, given.cubes))
    if given.is_scan:
        volumes = tuple(to_grid(one, published.preprocess, given.grid) for one in found.maps[0])
        return Prediction(found.values[0], found.mapped[0], volumes)
    size = published.preprocess.volume_size
    arrays = [spread(one, size) for one in found.maps.reshape(-1, *found.maps.shape[2:])]
    found = found._replace(maps=np.array(arrays, np.float32).reshape(*found.maps.shape[:2], *size))
    return Prediction(*(field[0] if given.is_single else field for field in found))


def require_classifier(published: Published, where: object = "published") -> tuple[ClassifierConfig, Task]:
    """Return the sizes and the task of weights that have a head.

    Raises:
        InputError: They have none.
    """
    if not isinstance(published.config, ClassifierConfig):
        advice = "adapt it on labels first: jaxmed tangerine adapt"
        raise InputError(where, "weights of a classifier or regressor", "a masked autoencoder", advice)
    if published.task is None:
        outputs = published.config.head.outputs
        advice = "give --task.kind and --task.names (in Python: load_published(path, task=Task(...)))"
        raise InputError(where, "weights that say what their outputs mean", f"{outputs} without a meaning", advice)
    return published.config, published.task


# One compiled program per model and batch size, whoever calls: a loop over scans in a notebook must not trace each.
@partial(jax.jit, static_argnums=(0, 1, 2))
def explain(
    config: ClassifierConfig, task: Task, maps: Maps, params: Params, cubes: Float[Any, "batch d h w 1"]
) -> Explained:
    """Return values, and Grad-CAM on the patch grid.

    Args:
        config: Sizes of the model; static.
        task: What its outputs mean; static.
        maps: Which outputs are explained; static.
        params: Parameters.
        cubes: Prepared scans.
    """
    model = make_model(Classifier(config))
    stream, normed = model.apply(params, cubes, method="before_last")
    logits, pull = jax.vjp(lambda normed: model.apply(params, stream, normed, method="from_last"), normed)
    batch, outputs = logits.shape
    match maps:
        case "none":
            mapped = jnp.zeros((0, batch), jnp.int32)
        case "top":
            mapped = jnp.argmax(logits, axis=-1)[None]
        case "all":
            mapped = jnp.broadcast_to(jnp.arange(outputs)[:, None], (outputs, batch))

    def gradcam(chosen: Int[Array, " batch"]) -> Float[Array, "batch d h w"]:
        (gradient,) = pull(jax.nn.one_hot(chosen, outputs, dtype=logits.dtype))
        weights = gradient[:, 1:].mean(axis=1, keepdims=True)
        return jax.nn.relu((weights * normed[:, 1:]).sum(axis=-1)).reshape(batch, *config.encoder.grid)

    grids = jax.lax.map(gradcam, mapped) if len(mapped) else jnp.zeros((0, batch, *config.encoder.grid))
    return Explained(predict_values(logits, task), mapped.T, jnp.moveaxis(grids, 0, 1))


def spread(patches: Float[np.ndarray, "d h w"], size: tuple[int, int, int]) -> Float32[np.ndarray, "d2 h2 w2"]:
    """Interpolate a map on the patch grid to the cube, linearly between the centres of the patches."""
    return resize(Volume.make(patches.astype(np.float32), np.eye(4)), size, order=1).array.astype(np.float32)


def to_grid(patches: Float[np.ndarray, "d h w"], preprocess: Preprocess, grid: Grid | None) -> Volume:
    """Put a map on the patch grid onto the grid of its scan; onto the model's cube where the scan has none."""
    cube = spread(patches, preprocess.volume_size)
    if grid is None:
        return Volume.make(cube, np.eye(4))
    return preprocess.inverse(cube, grid)

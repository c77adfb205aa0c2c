"""Probabilities of a classifier of chest CTs, and maps of what moved them, on the grid of the scan.

The map on the patch grid (`recipes.predict_stage.explain`, Grad-CAM) is interpolated linearly to the cube, then put
onto the grid of the scan by `Preprocess.inverse`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from jaxmed.arrays.task import Task
from jaxmed.errors import InputError
from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.published.load import Published
from jaxmed.recipes.predict_stage import Maps, explain, spread, to_grid
from jaxmed.recipes.scan_job import Model
from jaxmed.systems.tangerine.embedding import prepare, view
from jaxmed.volume import Volume


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
    model, task = view_classifier(published)
    given = prepare(published.preprocess, volume)
    found = jax.device_get(explain(*model[:2], task, maps, model.params, given.cubes))
    if given.is_scan:
        volumes = tuple(to_grid(one, published.preprocess, given.grid) for one in found.maps[0])
        return Prediction(found.values[0], found.mapped[0], volumes)
    size = published.preprocess.size
    arrays = [spread(one, size) for one in found.maps.reshape(-1, *found.maps.shape[2:])]
    found = found._replace(maps=np.array(arrays, np.float32).reshape(*found.maps.shape[:2], *size))
    return Prediction(*(field[0] if given.is_single else field for field in found))


def view_classifier(published: Published, dtype: str | None = None, where: object = "published") -> tuple[Model, Task]:
    """Return weights that have a head as encoder and head, and what its outputs mean.

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
    return view(published, dtype), published.task

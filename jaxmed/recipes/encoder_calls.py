"""Published encoders and classifiers on scans and pictures in Python: features, predictions, maps; no run, no files.

`embed` and `predict` are drivers on the host, which read, prepare and check. `embed_prepared` is the jittable core, for
jit, vmap and grad.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

from jaxmed.arrays.task import Task
from jaxmed.arrays.tracing import require_values
from jaxmed.data.inputs import require_inputs
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.convnext import ConvNextClassifierConfig, convnext_encoder
from jaxmed.models.fcmae import FcmaeConfig
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.load import Published
from jaxmed.models.vit import vit_encoder
from jaxmed.recipes.encoder_features import LAYERS, Kind, features, require_kinds
from jaxmed.recipes.predict_stage import Maps, explain
from jaxmed.recipes.scan_job import Model
from jaxmed.recipes.token_maps import spread, to_grid
from jaxmed.volume import Grid, Volume


class Given(NamedTuple):
    """What was given to a model, ready for it.

    Attributes:
        images: Prepared scans or pictures.
        is_single: Whether one was given, not a batch.
        is_scan: Whether it came as a scan or picture, not as prepared inputs.
        grid: Where the scan's voxels stand; None for prepared inputs.
        cropped: Where the square stands that a picture was cut to; None where it was not.
    """

    images: Float[Any, "batch *size channel"]
    is_single: bool
    is_scan: bool
    grid: Grid | None
    cropped: Grid | None = None


class Prediction(NamedTuple):
    """What a classifier says of one scan or picture, or of a batch of prepared inputs.

    Attributes:
        values: Probabilities, or values of a regression in the unit of the labels; one per name of the task.
        mapped: Which output each map explains.
        maps: Of one scan: one volume per map, on its grid. Of prepared inputs: an array on their grid.
    """

    values: Float[np.ndarray, "*batch output"]
    mapped: Int[np.ndarray, "*batch map"]
    maps: tuple[Volume, ...] | Float32[np.ndarray, "..."]


def embed(
    published: Published,
    image: Volume | str | Path | Shaped[Any, "..."],
    kind: Kind,
    called: tuple[str, str],
    layers: int = LAYERS,
) -> Float[Array, "*batch feature"]:
    """Return the features of one scan or picture, or of a batch of prepared inputs.

    Args:
        published: An encoder, a masked autoencoder or a classifier, from `load_published`.
        image: A `Volume`, a file, a DICOM folder, or an array in the axis order of a file. Or prepared inputs, channels
            last, one or a batch.
        kind: Which features (`recipes.embed_stage`).
        called: The function that a user has called, and its core for traced arrays, for messages.
        layers: Blocks of the kind "layers".

    Raises:
        InputError: It cannot be read or used; what is merely unexpected about it is a warning.
    """
    require_values(*called, image=image, params=published.params)
    given = prepare(published.preprocess, image)
    found = embed_prepared(published, given.images, kind, layers)
    return found[0] if given.is_single else found


def embed_prepared(
    published: Published, images: Float[Any, "batch *size channel"], kind: Kind = "concat", layers: int = LAYERS
) -> Float[Array, "batch feature"]:
    """Return the features of prepared inputs; jit, vmap and grad go through, nothing on the host looks at a value.

    Args:
        published: As of `embed`; a pytree, so that parameters may be traced, mapped over and differentiated.
        images: As `published.preprocess` returns them, one or more; values are not checked.
        kind: As of `embed`.
        layers: As of `embed`.

    Raises:
        InputError: The encoder does not have what the kind asks for.
    """
    model = view(published)
    require_kinds(model.encoder, (kind,), layers)
    return features(model.encoder, model.head, model.params, images, kinds=(kind,), layers=layers)[kind]


def predict(published: Published, image: Volume | str | Path | Shaped[Any, "..."], maps: Maps = "top") -> Prediction:
    """Return the probabilities of one scan or picture, or of a batch of prepared inputs, and maps of what raised them.

    The map on the patch grid (`recipes.predict_stage.explain`, Grad-CAM) is interpolated linearly to the input, then
    put onto the grid of the scan by `Preprocess.inverse`.

    Args:
        published: A classifier or regressor, from `load_published`.
        image: As of `embed`.
        maps: "top" explains the output with the highest score, "all" each of them, "none" none.

    Raises:
        InputError: The weights are no classifier's, or the scan cannot be read or used.
    """
    model, task = view_classifier(published)
    given = prepare(published.preprocess, image)
    found = jax.device_get(explain(*model[:2], task, maps, model.params, given.images))
    if given.is_scan:
        volumes = tuple(to_grid(one, published.preprocess, given.grid, given.cropped) for one in found.maps[0])
        return Prediction(found.values[0], found.mapped[0], volumes)
    size = published.preprocess.size
    arrays = [spread(one, size) for one in found.maps.reshape(-1, *found.maps.shape[2:])]
    found = found._replace(maps=np.array(arrays, np.float32).reshape(*found.maps.shape[:2], *size))
    return Prediction(*(field[0] if given.is_single else field for field in found))


def view(published: Published, dtype: str | None = None) -> Model:
    """Look at any weights as an encoder with a head.

    A masked autoencoder gets the layer norm of a new head on class token and patch tokens, and loses its final norm,
    which no fine-tuned model has; other encoders are read at the class token after their final norm.

    Args:
        published: An encoder, a masked autoencoder or a classifier.
        dtype: Type of the matrix products; as the weights say where None.
    """
    config, params = published.config, published.params
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if isinstance(config, ClassifierConfig):
        return Model(vit_encoder(dataclasses.replace(config.encoder, **changes)), config.head, params)
    if isinstance(config, ConvNextClassifierConfig):
        return Model(convnext_encoder(dataclasses.replace(config.encoder, **changes)), config.head, params)
    if not isinstance(config, MaeConfig):
        head = {"encoder": params["encoder"], "head": {}}
        return Model(vit_encoder(dataclasses.replace(config, **changes)), HeadConfig(pool="class"), head)
    encoder = vit_encoder(dataclasses.replace(config.encoder, final_norm=False, **changes))
    width = 2 * encoder.width
    norm = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    return Model(encoder, HeadConfig(), {"encoder": params["encoder"], "head": {"norm": norm}})


def view_classifier(
    published: Published, dtype: str | None = None, where: object = "published", system: str = "SYSTEM"
) -> tuple[Model, Task]:
    """Return weights that have a head as encoder and head, and what its outputs mean.

    Args:
        published: The weights.
        dtype: Type of the matrix products; as the weights say where None.
        where: The file, for messages.
        system: Whose stage adapts such weights, likewise.

    Raises:
        InputError: They have none.
    """
    if not isinstance(published.config, ClassifierConfig | ConvNextClassifierConfig):
        is_masked = isinstance(published.config, MaeConfig | FcmaeConfig)
        found = "a masked autoencoder" if is_masked else "an encoder"
        advice = f"adapt it on labels first: jaxmed {system} adapt"
        raise InputError(where, "weights of a classifier or regressor", found, advice)
    if published.task is None:
        outputs = published.config.head.outputs
        advice = "give --task.kind and --task.names (in Python: load_published(path, task=Task(...)))"
        raise InputError(where, "weights that say what their outputs mean", f"{outputs} without a meaning", advice)
    return view(published, dtype), published.task


def prepare(preprocess: Preprocess, image: Volume | str | Path | Shaped[Any, "..."]) -> Given:
    """Prepare whatever `embed` takes; warn of what is unexpected about it."""
    if isinstance(image, str | Path | Volume) or _is_stored(preprocess, image):
        scan = preprocess.prepare(image if isinstance(image, str | Path | Volume) else _as_read(np.asarray(image)))
        for note in scan.notes:
            warnings.warn(note, stacklevel=4)
        return Given(scan.image[None], True, True, scan.grid, scan.cropped)
    inputs = require_inputs(image, preprocess)
    return Given(jnp.asarray(inputs, jnp.float32), image.ndim == len(preprocess.size) + 1, False, None)


def _as_read(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return the colours of a picture of 8 or 16 bits in [0, 1], as its file is read; other arrays as they are."""
    if array.ndim == 3 and array.shape[2] == 3 and array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    return array


def _is_stored(preprocess: Preprocess, image: Shaped[Any, "..."]) -> bool:
    """Tell whether an array holds what a file holds: no channel, or the colours of a picture of 8 or 16 bits."""
    is_picture = preprocess.is_sliced and image.ndim == 3 and np.issubdtype(image.dtype, np.integer)
    return image.ndim == len(preprocess.size) or is_picture

"""Features of chest CTs: what an encoder's class token and patch tokens say.

Source: TANGERINE, arXiv:2507.01881, the embedding export of the released code: the class token ("class"), the mean of
the patch tokens ("pooled"), one after the other ("concat"), and what enters the head after its layer norm
("pre_logits").

`embed` is the driver on the host: it reads, prepares and checks. `embed_cubes` is its jittable core on prepared cubes,
for jit, vmap and grad.

What a reader of these numbers must know:
- Tokens are taken after the last block, before any final norm, as the released exporter takes them: that of a masked
  autoencoder's pre-training is never applied (the fine-tuning model has none), that of a classifier on the class token
  only in "pre_logits".
- Of a masked autoencoder the whole volume goes in, nothing hidden.
- No loss trains the class token of a masked autoencoder; it has only looked at the patches.
- A masked autoencoder's file has no layer norm for "pre_logits": it is at its start, which standardises each scan's
  2048 numbers and learns nothing.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxmed.arrays.tracing import require_values
from jaxmed.data.inputs import require_inputs
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.published.load import Published
from jaxmed.models.vit import vit_encoder
from jaxmed.recipes.embed_stage import Kind, features
from jaxmed.recipes.scan_job import Model
from jaxmed.volume import Grid, Volume


def embed(
    published: Published, volume: Volume | str | Path | Shaped[Any, "..."], kind: Kind = "concat"
) -> Float[Array, "*batch feature"]:
    """Return the features of one scan or of a batch of prepared cubes; the driver on the host, which looks at values.

    Inside jit, vmap or grad it refuses what is traced: call `embed_cubes` there.

    Args:
        published: A masked autoencoder or a classifier, from `load_published`.
        volume: A CT in HU: a `Volume`, a file, a DICOM folder, or a 3D array in the axis order of a file (x, y, z).
            Or prepared cubes in [0, 1]: [d, h, w, 1], or a batch of them.
        kind: Which features; see the top of this file for what a masked autoencoder's mean.

    Returns:
        One row of features, or one per cube of a batch; of the published model 1024 numbers ("class", "pooled") or
        2048 each.

    Raises:
        InputError: The scan cannot be read or used; what is merely unexpected about it is a warning.
    """
    require_values("tangerine.embed", "tangerine.embed_cubes", volume=volume, params=published.params)
    given = prepare(published.preprocess, volume)
    found = embed_cubes(published, given.cubes, kind)
    return found[0] if given.is_single else found


def embed_cubes(
    published: Published, cubes: Float[Any, "batch d h w 1"], kind: Kind = "concat"
) -> Float[Array, "batch feature"]:
    """Return the features of prepared cubes; the jittable core of `embed`, which nothing on the host looks at.

    Args:
        published: As of `embed`; a pytree, so that parameters may be traced, mapped over and differentiated.
        cubes: As `published.preprocess` returns them, one or more; values are not checked.
        kind: As of `embed`.
    """
    model = view(published)
    return features(model.encoder, model.head, model.params, cubes)[kind]


def view(published: Published, dtype: str | None = None) -> Model:
    """Look at any weights as an encoder with a head: a masked autoencoder gets the layer norm of a new head.

    Args:
        published: A masked autoencoder or a classifier.
        dtype: Type of the matrix products; as the weights say where None.
    """
    config, params = published.config, published.params
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if isinstance(config, ClassifierConfig):
        return Model(vit_encoder(dataclasses.replace(config.encoder, **changes)), config.head, params)
    encoder = vit_encoder(dataclasses.replace(config.encoder, final_norm=False, **changes))
    width = 2 * encoder.width
    norm = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    return Model(encoder, HeadConfig(), {"encoder": params["encoder"], "head": {"norm": norm}})


def describe(published: Published, kinds: tuple[Kind, ...]) -> list[str]:
    """Say what the features of a masked autoencoder are not."""
    if published.report.kind != "mae":
        return []
    notes = ["The whole volume goes in, nothing hidden; the final norm of pre-training is not applied."]
    if set(kinds) & {"class", "concat", "pre_logits"}:
        notes.append(
            "No loss trains the class token of a masked autoencoder: half of concat is what it happens to hold."
        )
    if "pre_logits" in kinds:
        notes.append("The layer norm of pre_logits is at its start: it standardises each scan's features, no more.")
    return notes


class Given(NamedTuple):
    """What was given to a model, ready for it.

    Attributes:
        cubes: Prepared scans.
        is_single: Whether one scan was given, not a batch.
        is_scan: Whether it came as a scan, not as prepared cubes.
        grid: Where the scan's voxels stand; None for cubes.
    """

    cubes: Float[Any, "batch d h w 1"]
    is_single: bool
    is_scan: bool
    grid: Grid | None


def prepare(preprocess: Preprocess, volume: Volume | str | Path | Shaped[Any, "..."]) -> Given:
    """Prepare whatever `embed` takes; warn of what is unexpected about it."""
    if isinstance(volume, str | Path | Volume) or volume.ndim == 3:
        scan = preprocess.prepare(volume if isinstance(volume, str | Path | Volume) else np.asarray(volume))
        for note in scan.notes:
            warnings.warn(note, stacklevel=3)
        return Given(scan.image[None], True, True, scan.grid)
    cubes = require_inputs(volume, preprocess)
    return Given(jnp.asarray(cubes, jnp.float32), volume.ndim == 4, False, None)

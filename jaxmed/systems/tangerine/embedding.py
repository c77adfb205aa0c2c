"""Features of chest CTs, and what a classifier says of one.

Source: TANGERINE, arXiv:2507.01881, the embedding export of the released code: the class token ("class"), the mean of
the patch tokens ("pooled"), one after the other ("concat"), and what enters the head after its layer norm
("pre_logits").

What a reader of these numbers must know:
- Tokens are taken after the last block, before any final norm, as the released exporter takes them: that of a masked
  autoencoder's pre-training is never applied (the fine-tuning model has none), that of a classifier on the class token
  only in "pre_logits".
- Of a masked autoencoder the whole volume goes in, nothing hidden.
- No loss trains the class token of a masked autoencoder; it has only looked at the patches.
- A masked autoencoder's file has no layer norm for "pre_logits": it is at its start, which standardises each scan's
  2048 numbers and learns nothing.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Array, Float, Shaped

from jaxmed.models.published.load import Published
from jaxmed.recipes import encoder_calls
from jaxmed.recipes.encoder_features import Kind
from jaxmed.volume import Volume


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
    return encoder_calls.embed(published, volume, kind, ("tangerine.embed", "tangerine.embed_cubes"))


def embed_cubes(
    published: Published, cubes: Float[Any, "batch d h w 1"], kind: Kind = "concat"
) -> Float[Array, "batch feature"]:
    """Return the features of prepared cubes; the jittable core of `embed`, which nothing on the host looks at.

    Args:
        published: As of `embed`; a pytree, so that parameters may be traced, mapped over and differentiated.
        cubes: As `published.preprocess` returns them, one or more; values are not checked.
        kind: As of `embed`.
    """
    return encoder_calls.embed_prepared(published, cubes, kind)


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

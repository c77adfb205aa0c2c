"""Features of retinal images.

Of DINOv2 and DINOv3 "pre_logits" is the class token after the final norm, which is what their authors call the feature
of an image; "class" and "pooled" are taken before it. Of a masked autoencoder no loss trains the class token: take
"pooled".
"""

from pathlib import Path
from typing import Any

from jaxtyping import Array, Float, Shaped

from jaxmed.models.published.load import Published
from jaxmed.recipes import encoder_calls
from jaxmed.recipes.encoder_features import LAYERS, Kind


def embed(
    published: Published, images: str | Path | Shaped[Any, "..."], kind: Kind | None = None, layers: int = LAYERS
) -> Float[Array, "*batch feature"]:
    """Return the features of one image or of a batch of prepared ones; the driver on the host, which looks at values.

    Inside jit, vmap or grad it refuses what is traced: call `embed_prepared` there.

    Args:
        published: An encoder, a masked autoencoder or a classifier, from `load_published`.
        images: A file, or an image [row, column, colour] of 8 or 16 bits, which are prepared as
            `published.preprocess` says. Or prepared images, float: [row, column, 3], or a batch of them.
        kind: Which features (`recipes.embed_stage`); by default what the weights' authors use: the mean of the patch
            tokens of a masked autoencoder, the normalised class token of other encoders.
        layers: Last blocks of the kind "layers".

    Raises:
        InputError: An image cannot be read or used, or the encoder has no such features; what is merely unexpected
            about an image is a warning.
    """
    called = ("retfound.embed", "retfound.embed_prepared")
    return encoder_calls.embed(published, images, kind or usual(published), called, layers)


def embed_prepared(
    published: Published, images: Float[Any, "batch row column colour"], kind: Kind | None = None, layers: int = LAYERS
) -> Float[Array, "batch feature"]:
    """Return the features of prepared images; the core of `embed`, which jit, vmap and grad go through.

    Args:
        published: As of `embed`; a pytree, so that parameters may be traced, mapped over and differentiated.
        images: As `published.preprocess` returns them, one or more; values are not checked.
        kind: As of `embed`.
        layers: As of `embed`.
    """
    return encoder_calls.embed_prepared(published, images, kind or usual(published), layers)


def usual(published: Published) -> Kind:
    """Return the features that the weights' authors use."""
    return "pooled" if published.report.kind == "mae" else "pre_logits"


def describe(published: Published, kinds: tuple[Kind, ...]) -> list[str]:
    """Say what the features of these weights are, and are not."""
    if published.report.kind == "classifier":
        return []
    if published.report.kind != "mae":
        return ["pre_logits is the class token after the final norm; class and pooled are taken before it."]
    notes = ["The whole image goes in, nothing hidden; the final norm of pre-training is not applied."]
    if set(kinds) & {"class", "concat", "pre_logits"}:
        notes.append("No loss trains the class token of a masked autoencoder: take pooled.")
    return notes

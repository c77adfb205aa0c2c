"""From weights, or from nothing, to where adaptation starts: encoder, head, parameters and preprocessing."""

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.load import OWN_LICENCE, Published, load_published, resize_positions
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.adapt import take_encoder
from jaxmed.recipes.adapt_stage import LabelledConfig, Start


def start_from_scratch(
    labelled: LabelledConfig, task: Task, encoder: VitConfig, family: str, preprocess: Preprocess
) -> Start:
    """Start from random weights.

    Args:
        labelled: What is learnt and how.
        task: What the outputs mean.
        encoder: Sizes.
        family: Whose names the adapted model gets.
        preprocess: A file to the input, whatever its size.
    """
    pool = find_pool(labelled, encoder)
    head = HeadConfig(len(task.names), pool, labelled.hidden)
    encoder = dataclasses.replace(encoder, final_norm=pool == "class", dtype=labelled.adapt.train.dtype)
    note = "No weights were given: the model starts from random ones, as the baseline from scratch."
    return Start(
        vit_encoder(encoder), head, None, preprocess, family, partial(ClassifierConfig, encoder), OWN_LICENCE, [note]
    )


def start_from_weights(
    labelled: LabelledConfig,
    task: Task,
    families: Collection[str],
    ours: VitConfig,
    size: tuple[int, ...] | None,
    how: Interpolation | Literal[""] = "",
    change: Callable[[VitConfig], VitConfig] = lambda encoder: encoder,
) -> Start:
    """Start from the encoder of published or own weights, at the size that is wanted.

    Args:
        labelled: What is learnt and how; its weights are read.
        task: What the outputs mean.
        families: Whose weights are taken.
        ours: Says what weights do not: drop_path_rate, remat, scan and attention.
        size: Of the image; None takes the weights'.
        how: How tables of positions are interpolated; as the family's code does by default.
        change: Makes other changes to the encoder.

    Raises:
        InputError: The weights are of another family or dimension, or lack a part.
    """
    place = labelled.weights
    assert place is not None
    published = read_weights(place, families, len(ours.image_size))
    notes = [*published.report.lines]
    encoder = encoder_of(published.config)
    if size is not None and size != (old := encoder.image_size):
        published = resize_positions(published, size, how)
        encoder = encoder_of(published.config)
        told = [" x ".join(map(str, edges)) for edges in (old, size)]
        if encoder.positions != "rope":
            notes.append(f"The weights are for {told[0]}: positions were interpolated to {told[1]}.")
    if published.report.kind == "classifier":
        notes.append("The weights are a classifier's: its encoder is taken, its head is drawn anew.")
    pool = find_pool(labelled, encoder)
    encoder = change(
        dataclasses.replace(
            encoder, remat=ours.remat, scan=ours.scan, attention=ours.attention, drop_path_rate=ours.drop_path_rate,
            final_norm=pool == "class", dtype=labelled.adapt.train.dtype,
        )
    )  # fmt: skip
    params = dict(published.params)
    if encoder.final_norm and "norm" not in params["encoder"]:
        advice = "pool the patch tokens: --pool mean"
        raise InputError(place, "an encoder with its final norm, for --pool class", "none, a fine-tuned file", advice)
    head = HeadConfig(len(task.names), pool, labelled.hidden)
    return Start(
        vit_encoder(encoder), head, take_encoder(params, vit_encoder(encoder), str(place)), published.preprocess,
        published.report.family, partial(ClassifierConfig, encoder), published.report.licence, notes,
    )  # fmt: skip


def find_pool(labelled: LabelledConfig, encoder: VitConfig) -> Literal["concat", "mean", "class"]:
    """Return what the head stands on: encoders of masked autoencoders have no factors on their branches.

    Source: RETFound, official code: its masked autoencoder is fine-tuned on the mean, DINOv2 on the class token.
    """
    if labelled.pool != "auto":
        return labelled.pool
    return "class" if encoder.layer_scale else "mean"


def read_weights(place: Any, families: Collection[str], axes: int, task: Task | None = None) -> Published:
    """Read weights of one of several families.

    Args:
        place: A file or folder.
        families: Names.
        axes: Of the images, 2 or 3.
        task: What the outputs of a classifier mean, for files that do not say it.

    Raises:
        InputError: They are of another, or of other dimensions.
    """
    only = next(iter(families)) if len(families) == 1 else "auto"
    published = load_published(place, only, task=task)
    if published.report.family not in families:
        raise InputError(place, f"weights of {' or '.join(families)}", f"weights of {published.report.family}")
    if len(encoder_of(published.config).image_size) != axes:
        found = {2: "one of images", 3: "one of volumes"}
        raise InputError(place, "an encoder" + found[axes].removeprefix("one"), found[5 - axes])
    return published


def encoder_of(config: Any) -> VitConfig:
    """Return the sizes of the encoder of an encoder, a masked autoencoder or a classifier."""
    return config.encoder if isinstance(config, MaeConfig | ClassifierConfig) else config

"""What a family of published weights says of itself: one record per family, 2D and 3D alike.

A family is a file beside this one that ends in `FAMILY = Family(...)`, and its name in `load.FAMILIES`. The kinds of
models that it has, the classes of their sizes and their input are its own: nothing else branches on them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.published.names import Entry
from jaxmed.nn.model import Model


class Hints(NamedTuple):
    """What is known of a model beside the shapes of its tensors.

    Attributes:
        heads: Attention heads of the encoder, as the user says; None where nothing is said.
        decoder_heads: Attention heads of the decoder, likewise.
        settings: The arguments of the training code, where the file holds them, by name.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    settings: Mapping[str, Any] = MappingProxyType({})


class Kind(NamedTuple):
    """One kind of model in a family.

    Attributes:
        config: The frozen dataclass of its sizes.
        title: What it is, with its article, for messages.
    """

    config: type
    title: str


class Facts(NamedTuple):
    """What others ask of a model, whatever its family.

    Attributes:
        kind: Its name in `Family.kinds`.
        heads: Attention heads of the encoder; None without attention.
        decoder_heads: Attention heads of a decoder that has its own.
        image_size: Voxels of the input along each axis of space; None where a model takes any size.
        outputs: Number of named outputs of a classifier or regressor; None of other models.
    """

    kind: str
    heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, ...] | None = None
    outputs: int | None = None


def no_resize(config: Any, params: Params, image_size: tuple[int, ...], how: Interpolation) -> tuple[Any, Params]:
    """Return a model without a table of positions as it is."""
    return config, params


class Family(NamedTuple):
    """A family of published weights. `config` is always an instance of one of its kinds' classes.

    Attributes:
        name: As --family and records spell it.
        title: A line for `jaxmed weights list`.
        licence: What it allows, in a sentence.
        where: Where each file is had.
        keys: The names of tensors that are expected.
        kinds: Every kind of model, by the name that records keep.
        recognises: Tensors by their original names -> whether they are of this family.
        infer: (where, tensors, hints) -> config, from shapes; where is the file, for messages. Raises InputError where
            tensors that tell sizes are missing or contradict each other, or something is not told.
        facts: config -> what others ask.
        entries: (config, naming) -> every tensor and its parameter.
        make_model: (config, parts of the parameters that are there) -> the model that runs them.
        preprocess: config -> a file, volume or array to the model's input.
        notes: (config, settings) -> what a user should know, in sentences.
        describe: (config, parts, task) -> lines of `jaxmed weights show`: a word and a text, the kind first.
        own_record: (where, run, parameters by path) -> what `record.json` would say of a checkpoint of an own run
            ("kind", "config", "preprocess"); None for a run of another family.
        resize: (config, params, image_size, how) -> both, for images of another size; how as in
            `arrays.position.resize_matrix`. Raises InputError where no model has the size.
        optional: Parts of the parameters that a file may lack as a whole.
        counters: Regular expressions of small tensors that nothing uses, but that are exported again.
        interpolation: (config, naming) -> how the released code interpolates tables of positions.
        naming: Tensors -> which of several ways of naming them a file follows; "" is the family's own.
        unapplied: (config, naming) -> what an export adds: tensors that the original code holds and wants, and that
            nothing applies.
        renames: Names of a file -> those of them that `entries` knows by another name, such as blocks in chunks.
    """

    name: str
    title: str
    licence: str
    where: str
    keys: str
    kinds: Mapping[str, Kind]
    recognises: Callable[[Mapping[str, Any]], bool]
    infer: Callable[[str, Mapping[str, Any], Hints], Any]
    facts: Callable[[Any], Facts]
    entries: Callable[..., list[Entry]]
    make_model: Callable[[Any, Collection[str]], Model]
    preprocess: Callable[[Any], Preprocess]
    notes: Callable[[Any, Mapping[str, Any]], tuple[str, ...]]
    describe: Callable[[Any, Collection[str], Task | None], list[tuple[str, str]]]
    own_record: Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any] | None]
    resize: Callable[..., tuple[Any, Params]] = no_resize
    optional: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    interpolation: Callable[[Any, str], Interpolation] = lambda config, naming: "linear"
    naming: Callable[[Mapping[str, Any]], str] = lambda tensors: ""
    unapplied: Callable[[Any, str], Mapping[str, np.ndarray]] = lambda config, naming: {}
    renames: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {}

    def is_counter(self, name: str) -> bool:
        """Tell whether a tensor is kept although nothing uses it."""
        return any(re.fullmatch(pattern, name) for pattern in self.counters)

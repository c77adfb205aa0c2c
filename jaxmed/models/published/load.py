"""Weights from outside and from own runs, as a model that can be run; and back to the original key names.

A family is a file beside this one and a line in `FAMILIES`. It tells its NAME, TITLE, LICENCE, WHERE, KEYS and
COUNTERS; it has `recognises(tensors)`, `infer(where, tensors, ...)` for the sizes of a model, `entries(config)` for its
names and layouts, `preprocess(config)` and `notes(config)`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jaxmed.arrays.position import resize_table
from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.errors import InputError, nearest
from jaxmed.io import safetensors
from jaxmed.models.heads import Classifier, ClassifierConfig, Task
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.published import guided_diffusion, tangerine
from jaxmed.models.published.image_preprocess import ImagePreprocess
from jaxmed.models.published.names import collect, listed, to_tensor
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.published.sources import RECORD, Source, read_source
from jaxmed.models.unet_guided import GuidedUnet, GuidedUnetConfig
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import Model, make_model

FAMILIES: tuple[ModuleType, ...] = (tangerine, guided_diffusion)
PublishedConfig: TypeAlias = MaeConfig | ClassifierConfig | GuidedUnetConfig
CONFIGS: dict[str, type[PublishedConfig]] = {
    "mae": MaeConfig,
    "classifier": ClassifierConfig,
    "denoiser": GuidedUnetConfig,
    "enhancer": GuidedUnetConfig,
}
OWN_LICENCE = "made by an own run; where that started from published weights, their licence holds"


class ImportReport(NamedTuple):
    """What became of the tensors of a file.

    Attributes:
        family: Whose weights these are, such as "tangerine".
        kind: "mae", "classifier", "denoiser" (a diffusion network) or "enhancer" (one without time). A masked
            autoencoder without its whole decoder has the parameters of the encoder alone; `missing` names what was
            looked for.
        used: Tensors that became parameters.
        left_over: Tensors of the file that have no place in the model.
        missing: Tensors of the decoder that the file does not hold; all others are needed.
        licence: What the licence allows, in a sentence.
        notes: What else a user should know, in sentences.
    """

    family: str
    kind: str
    used: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    licence: str
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a stage says on the screen of the weights it was given: tensors without a place, missing ones, notes."""
        found = []
        if self.missing and set(self.left_over) & _siblings(self.missing):
            found.append(f"the decoder is not whole (no {listed(self.missing)}): the encoder alone is used")
        elif self.left_over:
            count = len(self.left_over)
            found.append(f"{count} tensors of the file have no place in the model: {listed(self.left_over)}")
        return (*found, *self.notes)

    @property
    def lines(self) -> tuple[str, ...]:
        """Whose weights these are, what their licence allows, and `remarks`: what a stage says."""
        return (f"Weights: {self.family}, {self.kind}. Licence: {self.licence}.", *self.remarks)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Published:
    """A model with its weights. A pytree whose leaves are those of `params`: jit, vmap and grad take it as it is.

    Attributes:
        model: `model.apply(params, ...)` runs it: `models.mae.Mae`, or its encoder where the decoder is missing
            (image to tokens), or `models.heads.Classifier`, or `models.unet_guided.GuidedUnet`.
        params: Its parameters, float32: {"encoder": ..., "decoder": ...}, {"encoder": ...}, {"encoder": ...,
            "head": ...}, or the parts of a U-Net.
        preprocess: A file or volume to the model's input (`Preprocess`); an array, for a U-Net (`ImagePreprocess`).
        config: The model's sizes, a `PublishedConfig`; who asks for a family knows which.
        report: Where the weights came from.
        task: What the outputs mean, of a classifier; None where nobody has said.
        extras: Counters of the original code that nothing uses; they are exported again.
    """

    model: Model
    params: Params
    preprocess: Any
    config: Any
    report: ImportReport
    task: Task | None = None
    extras: Mapping[str, Integer[np.ndarray, ""]] = dataclasses.field(default_factory=dict)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return params, and what is static: it decides what is compiled, and compares by value."""
        extras = tuple(sorted((name, int(count)) for name, count in self.extras.items()))
        static = (self.model, self.preprocess, self.config, self.report, self.task, extras)
        return ((jax.tree_util.GetAttrKey("params"), self.params),), static

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "Published":
        """Return weights of leaves of any kind: arrays, tracers, gradients."""
        model, preprocess, config, report, task, extras = static
        made = object.__new__(cls)  # no check of types: leaves may be anything while a tree is walked
        counts = {name: np.asarray(count, np.int64) for name, count in extras}
        fields = (model, leaves[0], preprocess, config, report, task, counts)
        for field, value in zip(dataclasses.fields(cls), fields, strict=True):
            object.__setattr__(made, field.name, value)
        return made


def load_published(
    path: str | Path,
    family: str = "auto",
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    task: Task | None = None,
) -> Published:
    """Read weights of any supported kind.

    Args:
        path: A .safetensors file; a PyTorch checkpoint (.pth, .pt, .bin), of which no code is run; a run or its
            outputs/model; or a run's checkpoints, checkpoints/state or checkpoints/state/STEP.
        family: Whose weights they are; "auto" looks at the names.
        heads: Attention heads of the encoder, for files whose width was not published: shapes do not tell them, and
            not every file holds the arguments of its training.
        decoder_heads: Of the decoder, likewise.
        task: What the outputs of a classifier mean, for files that do not say it.

    Raises:
        InputError: The file cannot be read or is of another model; the encoder, or a classifier's head, is not wholly
            there; a tensor has another shape than it should.
    """

    def find_wanted(source: Source) -> set[str]:
        module = _find_family(source, family)
        entries = module.entries(_find_config(source, module, heads, decoder_heads))
        fitting = {entry.name for entry in entries if _shape(source, entry.name) == entry.shape}
        return fitting | set(module.COUNTERS)

    def is_known(tensors: Mapping[str, Any]) -> bool:
        return any(module.recognises(tensors) for module in FAMILIES)

    source = read_source(Path(path), is_known, find_wanted)
    module = _find_family(source, family)
    config = _find_config(source, module, heads, decoder_heads)
    entries = module.entries(config)
    found = collect(source.where, [entry.own() for entry in entries] if source.is_own else entries, source.tensors)
    task = _find_task(source, config, task)
    counters = [name for name in found.left_over if name in module.COUNTERS]
    extras = {name: np.asarray(source.tensors[name]) for name in counters}
    extras |= {name: np.asarray(count, np.int64) for name, count in source.record.get("extras", {}).items()}
    report = ImportReport(
        module.NAME,
        _kind(config),
        found.used,
        tuple(name for name in found.left_over if name not in counters),
        found.missing,
        str(source.record.get("licence", OWN_LICENCE if source.is_own else module.LICENCE)),
        found.notes + source.notes + (() if source.record else module.notes(config, source.settings)),
    )
    preprocess = _find_preprocess(source, module, config)
    return Published(_make_model(config, found.params), found.params, preprocess, config, report, task, extras)


def export_published(published: Published, path: str | Path) -> None:
    """Write weights under the key names of the original code, as safetensors.

    Every tensor that was imported comes back bit for bit, those of half precision as float32 of the same value. What
    shapes do not tell (heads, preprocessing, task) stands in the file's metadata, so that it is read back as it was.

    Raises:
        InputError: The place cannot be written, or has another suffix than .safetensors.
    """
    module = _named_family(published.report.family)
    leaves = named_leaves(published.params)
    entries = [entry for entry in module.entries(published.config) if entry.part in published.params]
    tensors: dict[str, Any] = {entry.name: to_tensor(entry, leaves[entry.path]) for entry in entries}
    record = published_record(published)
    metadata = {"format": "pt", "family": module.NAME, "kind": published.report.kind}
    config = published.config
    heads = config.heads if isinstance(config, GuidedUnetConfig) else config.encoder.heads
    metadata |= {"heads": str(heads), "licence": published.report.licence}
    metadata[RECORD] = json.dumps({name: value for name, value in record.items() if name != "extras"})
    safetensors.write(path, tensors | dict(published.extras), metadata)


def published_record(published: Published) -> dict[str, Any]:
    """Return what stands in record.json beside own parameters (`train.checkpoint.export_parameters`)."""
    record = {
        "family": published.report.family,
        "kind": published.report.kind,
        "config": to_record(published.config),
        "preprocess": to_record(published.preprocess),
        "licence": published.report.licence,
    }
    if published.task is not None:
        record["task"] = to_record(published.task)
    if published.extras:
        record["extras"] = {name: int(count) for name, count in published.extras.items()}
    return record


def resize_positions(published: Published, image_size: tuple[int, ...]) -> Published:
    """Return the same weights for images of another size: position tables are interpolated, nothing else changes.

    Args:
        published: From `load_published`.
        image_size: Voxels along each axis; multiples of the patch size.

    Raises:
        InputError: The size does not divide into patches.
    """
    if isinstance(published.config, GuidedUnetConfig):
        raise InputError("image size", "a model with a table of positions", "a U-Net", "it takes any size as it is")
    old = published.config.encoder
    if tuple(image_size) == old.image_size:
        return published
    try:
        encoder = dataclasses.replace(old, image_size=tuple(image_size))
        config = dataclasses.replace(published.config, encoder=encoder)
    except ValueError as error:
        advice = f"take multiples of {old.patch_size}"
        raise InputError("image size", "a size that the model can have", str(error), advice) from error
    params = dict(published.params)
    for part in ("encoder", "decoder"):
        if part in params:
            table = resize_table(jnp.asarray(params[part]["position"]), old.grid, encoder.grid)
            params[part] = {**params[part], "position": table}
    x, y, z = encoder.image_size
    preprocess = dataclasses.replace(published.preprocess, size=(x, y, z))
    model = _make_model(config, params)
    return dataclasses.replace(published, model=model, params=params, config=config, preprocess=preprocess)


def _shape(source: Source, name: str) -> tuple[int, ...] | None:
    return tuple(source.tensors[name].shape) if name in source.tensors else None


def _siblings(missing: tuple[str, ...]) -> set[str]:
    """Return names of the decoder, of which some are missing."""
    entries = tangerine.entries(MaeConfig())
    return {entry.name for entry in entries if entry.part == "decoder"} - set(missing)


def _find_family(source: Source, family: str) -> ModuleType:
    told = source.record.get("family")
    if family != "auto":
        module = _named_family(family)
        if told not in (None, family):
            raise InputError(source.where, f"weights of {family}", f"weights of {told}")
        return module
    if told is not None:
        names = [module.NAME for module in FAMILIES]
        if told not in names:
            raise InputError(source.where, f"weights of {', '.join(names)}", f"weights of {told}")
        return _named_family(told)
    for module in FAMILIES:
        if module.recognises(source.tensors):
            return module
    names = ", ".join(module.NAME for module in FAMILIES)
    found = f"tensors such as {listed(source.tensors, 4)}"
    raise InputError(source.where, f"weights of a known family ({names})", found, "see jaxmed weights list")


def _named_family(name: str) -> ModuleType:
    names = {module.NAME: module for module in FAMILIES}
    if name not in names:
        raise InputError("family", f"auto or one of {', '.join(names)}", name, nearest(name, names))
    return names[name]


def _find_config(source: Source, module: ModuleType, heads: int | None, decoder_heads: int | None) -> PublishedConfig:
    """Return the sizes that the place says, or else those that the shapes tell."""
    record = source.record
    if record.get("config") is None:
        if source.is_own:
            raise InputError(source.where, "a record with the model's sizes ('config')", "none")
        return module.infer(source.where, source.tensors, heads, decoder_heads, source.settings)
    kind = CONFIGS.get(str(record.get("kind")))
    if kind is None:
        raise InputError(source.where, f"a record of kind {' or '.join(CONFIGS)}", f"kind {record.get('kind')}")
    config = from_record(kind, record["config"], source.where)
    encoder_heads = config.heads if isinstance(config, GuidedUnetConfig) else config.encoder.heads
    known = (encoder_heads, config.decoder_heads if isinstance(config, MaeConfig) else None)
    for name, told, stored in zip(("heads", "decoder-heads"), (heads, decoder_heads), known, strict=True):
        if told not in (None, stored):
            raise InputError(name, f"{stored}, as {source.where} says", told, f"leave --{name} out")
    return config


def _find_task(source: Source, config: PublishedConfig, task: Task | None) -> Task | None:
    if task is None and source.record.get("task") is not None:
        task = from_record(Task, source.record["task"], source.where)
    if task is None:
        return None
    if not isinstance(config, ClassifierConfig):
        found = "a U-Net" if isinstance(config, GuidedUnetConfig) else "a masked autoencoder"
        raise InputError(source.where, "a classifier, which has a task", found, "leave the task out")
    if len(task.names) != config.head.outputs:
        expected = f"a task with {config.head.outputs} names, one per output"
        raise InputError(source.where, expected, ", ".join(task.names))
    return task


def _find_preprocess(source: Source, module: ModuleType, config: PublishedConfig) -> Preprocess | ImagePreprocess:
    """Return what the place says, or else what the family expects; a transformer's size is always the model's."""
    expected: Preprocess | ImagePreprocess = module.preprocess(config)
    if source.record.get("preprocess") is None:
        return expected
    told = from_record(type(expected), source.record["preprocess"], source.where)
    return told if isinstance(told, ImagePreprocess) else dataclasses.replace(told, size=expected.size)


def _kind(config: PublishedConfig) -> str:
    if isinstance(config, GuidedUnetConfig):
        return "denoiser" if config.with_time else "enhancer"
    return "classifier" if isinstance(config, ClassifierConfig) else "mae"


def _make_model(config: PublishedConfig, params: Params) -> Model:
    if isinstance(config, GuidedUnetConfig):
        return make_model(GuidedUnet(config))
    if isinstance(config, ClassifierConfig):
        return make_model(Classifier(config))
    return make_model(Mae(config)) if "decoder" in params else _encoder_model(config.encoder)


def _encoder_model(config: VitConfig) -> Model:
    """Return a model whose parameters are {"encoder": ...}: image to tokens."""
    vit = make_model(Vit(config))

    def init(key: Any, *inputs: Any, **options: Any) -> Params:
        return {"encoder": vit.init(key, *inputs, **options)}

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        return vit.apply(params["encoder"], *inputs, **options)

    return Model(init, apply)

"""Weights from outside and from own runs, as a model that can be run; and back to the original key names.

A family is a file beside this one, which ends in its `family.Family`, and a word in `FAMILIES`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.arrays.trees import named_leaves
from jaxmed.arrays.types import Params
from jaxmed.config import from_record, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError, listed, nearest
from jaxmed.io import safetensors
from jaxmed.io.weights_files import RECORD, Source, read_source
from jaxmed.models.published import (
    brainfm,
    cocolit,
    dinov2,
    dinov3,
    guided_diffusion,
    llava,
    lpips,
    profound,
    retfound,
    tangerine,
)
from jaxmed.models.published.family import Family, Hints
from jaxmed.models.published.names import collect, to_tensor
from jaxmed.nn.model import Model

_FAMILIES = (
    *(tangerine.FAMILY, retfound.FAMILY, dinov2.FAMILY, dinov3.FAMILY, guided_diffusion.FAMILY),
    *(brainfm.FAMILY, profound.FAMILY, cocolit.FAMILY, llava.FAMILY, lpips.FAMILY),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
OWN_LICENCE = "made by an own run; where that started from published weights, their licence holds"


class ImportReport(NamedTuple):
    """What became of the tensors of a file.

    Attributes:
        family: Whose weights these are, such as "tangerine".
        kind: One of the family's, such as "mae", "classifier", "denoiser" (a diffusion network) or "enhancer" (one
            without time). A masked autoencoder without its whole decoder has the parameters of the encoder alone;
            `missing` names what was looked for.
        used: Tensors that became parameters.
        left_over: Tensors of the file that have no place in the model.
        missing: Tensors of the decoder that the file does not hold; all others are needed.
        licence: What the licence allows, in a sentence.
        notes: What else a user should know, in sentences.
        is_partial: Whether the file holds some tensors of a part that is left out because others are missing.
    """

    family: str
    kind: str
    used: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    licence: str
    notes: tuple[str, ...] = ()
    is_partial: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a stage says on the screen of the weights it was given: tensors without a place, missing ones, notes."""
        found = []
        if self.is_partial:
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
            (image to tokens), or `models.heads.Classifier`, or `models.unet_guided.GuidedUnet`, and so on by family.
        params: Its parameters, float32: {"encoder": ..., "decoder": ...}, {"encoder": ...}, {"encoder": ...,
            "head": ...}, or the parts of a U-Net.
        preprocess: A file, volume or array to the model's input.
        config: The model's sizes, of one of the classes of `Family.kinds`; who asks for a family knows which.
        report: Where the weights came from.
        task: What the outputs mean, of a classifier; None where nobody has said.
        extras: Small arrays of the original code that nothing uses (counters, constants); they are exported again.
        naming: How the file named its tensors, where a family has several ways.
    """

    model: Model
    params: Params
    preprocess: Preprocess
    config: Any
    report: ImportReport
    task: Task | None = None
    extras: Mapping[str, Shaped[np.ndarray, "..."]] = dataclasses.field(default_factory=dict)
    naming: str = ""

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return params, and what is static: it decides what is compiled, and compares by value."""
        extras = tuple((n, a.dtype.str, a.shape, a.tobytes()) for n, a in sorted(self.extras.items()))
        static = (self.model, self.preprocess, self.config, self.report, self.task, extras, self.naming)
        return ((jax.tree_util.GetAttrKey("params"), self.params),), static

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "Published":
        """Return weights of leaves of any kind: arrays, tracers, gradients."""
        model, preprocess, config, report, task, extras, naming = static
        made = object.__new__(cls)  # no check of types: leaves may be anything while a tree is walked
        arrays = {n: np.frombuffer(bits, kind).reshape(shape) for n, kind, shape, bits in extras}
        fields = (model, leaves[0], preprocess, config, report, task, arrays, naming)
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
        path: A .safetensors file, or a folder of such with config.json, as the hub has them; a PyTorch checkpoint
            (.pth, .pt, .bin), of which no code is run; a run or its outputs/model; or a run's checkpoints,
            checkpoints/state or checkpoints/state/STEP.
        family: Whose weights they are; "auto" looks at the names.
        heads: Attention heads of the encoder, for files whose width was not published: shapes do not tell them, and
            not every file holds the arguments of its training.
        decoder_heads: Attention heads of the decoder, likewise.
        task: What the outputs of a classifier mean, for files that do not say it.

    Raises:
        InputError: The file cannot be read or is of another model; the encoder, or a classifier's head, is not wholly
            there; a tensor has another shape than it should.
    """
    hints = Hints(heads, decoder_heads)

    def find_wanted(source: Source) -> set[str]:
        known = _find_family(source, family)
        new, renames = _renamed(source, known), known.renames(source.tensors)
        entries = known.entries(_find_config(new, known, hints), known.naming(new.tensors))
        fitting = {entry.name for entry in entries if _shape(new, entry.name) == entry.shape}
        return {name for name in source.tensors if renames.get(name, name) in fitting or known.is_counter(name)}

    def is_known(tensors: Mapping[str, Any]) -> bool:
        return any(known.recognises(tensors) for known in FAMILIES.values())

    source = _with_record(read_source(Path(path), is_known, find_wanted))
    known = _find_family(source, family)
    source = _renamed(source, known)
    config, naming = _find_config(source, known, hints), known.naming(source.tensors)
    entries = known.entries(config, naming)
    if source.is_own:
        naming = str(source.record.get("naming", ""))
        entries = list(dict.fromkeys(entry.own() for entry in known.entries(config, naming)))
    found = collect(source.where, entries, source.tensors, known.optional)
    task = _find_task(source, known, config, task)
    counters = [name for name in found.left_over if known.is_counter(name)]
    extras = {name: np.asarray(source.tensors[name]) for name in counters}
    extras |= {name: _read_extra(source.where, value) for name, value in source.record.get("extras", {}).items()}
    report = ImportReport(
        known.name,
        known.facts(config).kind,
        found.used,
        tuple(name for name in found.left_over if name not in counters),
        found.missing,
        str(source.record.get("licence", OWN_LICENCE if source.is_own else known.licence)),
        found.notes + source.notes + (() if source.record else known.notes(config, source.settings)),
        bool(found.missing) and any(entry.name in found.left_over for entry in entries),
    )
    preprocess = _find_preprocess(source, known, config)
    model = known.make_model(config, found.params)
    return Published(model, found.params, preprocess, config, report, task, extras, naming)


def export_published(published: Published, path: str | Path) -> None:
    """Write weights under the key names of the original code, as safetensors.

    Every tensor that was imported comes back bit for bit, those of half precision as float32 of the same value. What
    shapes do not tell (heads, preprocessing, task) stands in the file's metadata, so that it is read back as it was.

    Raises:
        InputError: The place cannot be written, or has another suffix than .safetensors.
    """
    family = _named_family(published.report.family)
    leaves = named_leaves(published.params)
    entries = family.entries(published.config, published.naming)
    entries = [entry for entry in entries if entry.part in published.params]
    tensors: dict[str, Any] = {entry.name: to_tensor(entry, leaves[entry.path]) for entry in entries}
    tensors |= family.unapplied(published.config, published.naming)
    record = published_record(published)
    metadata = {"format": "pt", "family": family.name, "kind": published.report.kind}
    heads = family.facts(published.config).heads
    metadata |= {} if heads is None else {"heads": str(heads)}
    metadata["licence"] = published.report.licence
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
        record["extras"] = {name: _write_extra(np.asarray(value)) for name, value in published.extras.items()}
    if published.naming:
        record["naming"] = published.naming
    return record


def _write_extra(value: np.ndarray) -> Any:
    if not value.ndim and value.dtype.kind in "iu":
        return int(value)
    return {"dtype": value.dtype.str, "shape": list(value.shape), "hex": value.tobytes().hex()}


def _read_extra(where: str, value: Any) -> np.ndarray:
    try:
        if not isinstance(value, dict):
            return np.asarray(value, np.int64)
        return np.frombuffer(bytes.fromhex(value["hex"]), value["dtype"]).reshape(value["shape"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(where, "arrays under 'extras' of its record", str(error), "export it again") from error


def resize_positions(
    published: Published, image_size: tuple[int, ...], how: Interpolation | Literal[""] = ""
) -> Published:
    """Return the same weights for images of another size: position tables are interpolated, nothing else changes.

    Args:
        published: From `load_published`.
        image_size: Voxels along each axis; multiples of the patch size.
        how: How tables are interpolated; as the family's released code does by default.

    Raises:
        InputError: The size does not divide into patches.
    """
    family, size = _named_family(published.report.family), tuple(image_size)
    facts = family.facts(published.config)
    if facts.image_size is None:
        found = family.kinds[facts.kind].title
        raise InputError("image size", "a model with a table of positions", found, "it takes any size as it is")
    if size == facts.image_size:
        return published
    config, params = family.resize(
        published.config, published.params, size, how or family.interpolation(published.config, published.naming)
    )
    preprocess = _resize_input(published.preprocess, family.preprocess(published.config), family.preprocess(config))
    model = family.make_model(config, params)
    return dataclasses.replace(published, model=model, params=params, config=config, preprocess=preprocess)


def _resize_input(own: Preprocess, before: Preprocess, after: Preprocess) -> Preprocess:
    """Return the preprocessing at the new size; the side from which pictures are cut out goes with it."""
    if own.shorter == before.shorter:
        return dataclasses.replace(own, size=after.size, shorter=after.shorter)
    return dataclasses.replace(own, size=after.size, shorter=round(own.shorter * min(after.size) / min(before.size)))


def _shape(source: Source, name: str) -> tuple[int, ...] | None:
    return tuple(source.tensors[name].shape) if name in source.tensors else None


def _renamed(source: Source, family: Family) -> Source:
    """Give tensors the names that the family's entries know."""
    names = {} if source.is_own else family.renames(source.tensors)
    return source._replace(tensors={names.get(name, name): value for name, value in source.tensors.items()})


def _with_record(source: Source) -> Source:
    """Say of a run's checkpoint what `record.json` says of finished weights."""
    if source.run is None:
        return source
    for family in FAMILIES.values():
        if (record := family.own_record(source.where, source.run, source.tensors)) is not None:
            return source._replace(record={"family": family.name, **record})
    return source._replace(record={"family": source.run.get("system")})


def _find_family(source: Source, family: str) -> Family:
    told, names = source.record.get("family"), ", ".join(FAMILIES)
    if family != "auto":
        if told not in (None, _named_family(family).name):
            raise InputError(source.where, f"weights of {family}", f"weights of {told}")
        return FAMILIES[family]
    if told is not None:
        if told not in FAMILIES:
            raise InputError(source.where, f"weights of {names}", f"weights of {told}")
        return FAMILIES[told]
    for known in FAMILIES.values():
        if known.recognises(source.tensors):
            return known
    found = f"tensors such as {listed(source.tensors, 4)}"
    raise InputError(source.where, f"weights of a known family ({names})", found, "see jaxmed weights list")


def _named_family(name: str) -> Family:
    if name not in FAMILIES:
        raise InputError("family", f"auto or one of {', '.join(FAMILIES)}", name, nearest(name, FAMILIES))
    return FAMILIES[name]


def _find_config(source: Source, family: Family, hints: Hints) -> Any:
    """Return the sizes that the place says, or else those that the shapes tell."""
    record = source.record
    if record.get("config") is None:
        if source.is_own:
            raise InputError(source.where, "a record with the model's sizes ('config')", "none")
        return family.infer(source.where, source.tensors, hints._replace(settings=source.settings))
    kind = family.kinds.get(str(record.get("kind")))
    if kind is None:
        raise InputError(source.where, f"a record of kind {' or '.join(family.kinds)}", f"kind {record.get('kind')}")
    config = from_record(kind.config, record["config"], source.where)
    facts = family.facts(config)
    for name in ("heads", "decoder_heads"):
        said, stored = getattr(hints, name), getattr(facts, name)
        if said not in (None, stored):
            option = name.replace("_", "-")
            raise InputError(option, f"{stored}, as {source.where} says", said, f"leave --{option} out")
    return config


def _find_task(source: Source, family: Family, config: Any, task: Task | None) -> Task | None:
    if task is None and source.record.get("task") is not None:
        task = from_record(Task, source.record["task"], source.where)
    if task is None:
        return None
    facts = family.facts(config)
    if facts.outputs is None:
        found = family.kinds[facts.kind].title
        raise InputError(source.where, "a classifier, which has a task", found, "leave the task out")
    if len(task.names) != facts.outputs:
        expected = f"a task with {facts.outputs} names, one per output"
        raise InputError(source.where, expected, ", ".join(task.names))
    return task


def _find_preprocess(source: Source, family: Family, config: Any) -> Preprocess:
    """Return what the place says, or else what the family expects; a size that the model prescribes always holds."""
    expected, size = family.preprocess(config), family.facts(config).image_size
    if source.record.get("preprocess") is None:
        return expected
    told = from_record(Preprocess, source.record["preprocess"], source.where)
    return told if size is None else dataclasses.replace(told, size=size)

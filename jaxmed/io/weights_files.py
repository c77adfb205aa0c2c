"""Files of weights: published ones, folders of own runs, and the Orbax checkpoints of runs.

Each becomes names and arrays, and what the place says about them; whose weights they are is not known here. In
published files the names are those of the original code; in own files they are the paths of parameters.
"""

import functools
import json
import logging
import operator
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxmed.errors import InputError, listed
from jaxmed.files import read_record, require_file
from jaxmed.io import pickles, safetensors
from jaxmed.io.pickle_names import Tensor, Unread

# Keys under which training codes keep a state dict, the preferred first.
WRAPPERS = (
    *("model", "model_state", "state_dict", "model_state_dict", "module", "net", "network", "params"),
    *("teacher", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "ema", "student"),
    *("encoder", "backbone", "target_encoder"),
)
PREFIXES = ("module.", "model.", "_orig_mod.")  # of data parallelism, of wrapping modules, of torch.compile
# Of a model inside a larger one: taken off where the names are of no known family with them.
ROLES = (
    *("teacher.", "ema.", "ema_model.", "model_ema.", "student."),
    *("encoder.", "backbone.", "net.", "network.", "trunk."),
)
SETTINGS = (
    *("args", "config", "cfg", "hparams", "hyper_parameters", "hyperparameters", "model_args", "opt", "options"),
    *("train_args", "gen_args"),
)
NO_MODEL = re.compile(r"optim|sched|scaler|loss|criterion", re.IGNORECASE)
PICKLED = (".pth", ".pt", ".bin")
# Under this name a safetensors file that this package wrote says, in JSON, what shapes do not.
RECORD = "jaxmed_record"
SMALL = 1 << 26  # bytes


class Source(NamedTuple):
    """Tensors and what is known of them.

    Attributes:
        where: The file or folder, for messages.
        tensors: By name; of a pickled checkpoint those that were not wanted are `pickle_names.Tensor`, not read.
        record: "family", "kind", "config", "preprocess", "task", "licence" and "extras", as far as the place says them.
        is_own: Whether names are the paths of parameters.
        settings: What a training code kept beside its tensors (its args or configuration), by name.
        notes: What a user should know of how the tensors were found, in sentences.
        run: The record of the run whose checkpoint it is ("system", "stage", "config"); None of other places.
    """

    where: str
    tensors: dict[str, Any]
    record: dict[str, Any]
    is_own: bool
    settings: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    run: Mapping[str, Any] | None = None


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of leaves that are named by their paths."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


def load_parameters(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `train.checkpoint.export_parameters` wrote.

    Returns:
        The nested dict of NumPy arrays, and the record.

    Raises:
        InputError: The folder holds no exported parameters.
    """
    source = _read_own(folder)
    return nest(source.tensors), source.record


def load_exported(
    path: Path, name: str, family: str, expected: str, advice: str
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read what a run exported to outputs/NAME, or such a folder itself: parameters, record, and the record's place.

    Raises:
        InputError: The place holds nothing of the kind, or weights of another family.
    """
    places = [place for place in (path / "outputs" / name, path) if (place / "record.json").exists()]
    if not places:
        raise InputError(path, expected, "no record.json there" if path.exists() else "nothing", advice)
    params, record = load_parameters(places[0])
    if record.get("family") != family:
        raise InputError(path, expected, f"weights of {record.get('family')}", advice)
    return params, record, str(places[0] / "record.json")


def read_source(
    path: Path,
    is_known: Callable[[Mapping[str, Any]], bool],
    find_wanted: Callable[[Source], Collection[str]] | None = None,
) -> Source:
    """Read a file or a folder of any supported kind.

    Args:
        path: The file or folder.
        is_known: Whether names are those of a family; decides whether a prefix such as "encoder." belongs to them.
        find_wanted: Given what a pickled checkpoint holds, its tensors not read yet, names those to read: a model of
            other shapes is refused before, and what has no place in it costs nothing. All by default.

    Raises:
        InputError: It is missing, damaged, or of another kind.
    """
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        if path.name == "parameters.safetensors" and (path.parent / "record.json").exists():
            return _read_own(path.parent)
        tensors, notes = _strip(path, safetensors.read(path), is_known)
        return Source(str(path), tensors, _read_metadata(path), is_own=False, notes=notes)
    if suffix in PICKLED:
        return _read_pickled(path, is_known, find_wanted)
    require_file(path, "weights")
    expected = f"weights as .safetensors, {', '.join(PICKLED)}, or a folder of a run"
    raise InputError(path, expected, f"the suffix '{path.suffix}'", "check the path")


def _read_folder(path: Path) -> Source:
    for folder in (path, path / "outputs" / "model"):
        if (folder / "record.json").exists():
            return _read_own(folder)
    for folder in (path, path / "state"):
        if step := _newest_step(folder):
            return _read_state(step)
    if shards := sorted(path.glob("*.safetensors")):
        return _read_shards(path, shards)
    if (path / "config.json").exists():
        advice = f"continue the run, or give {path / 'checkpoints' / 'state'} for its last checkpoint"
        raise InputError(path, "a finished run with outputs/model", "none", advice)
    expected = "a run, its outputs/model, or a checkpoint of it"
    raise InputError(path, expected, "none of them in this folder", "check the path, or name the file itself")


def _read_shards(path: Path, shards: list[Path]) -> Source:
    """Read a published folder: all its safetensors as one, and its config.json as settings. Names stay whole.

    Raises:
        InputError: A tensor stands in two files, or one that the index names is missing.
    """
    tensors: dict[str, Any] = {}
    for shard in shards:
        found = safetensors.read(shard)
        if both := tensors.keys() & found.keys():
            raise InputError(shard, "tensors of its own", f"'{min(both)}', which another file has too")
        tensors |= found
    index = path / "model.safetensors.index.json"
    if index.exists():
        named = read_record(index).get("weight_map")
        if not isinstance(named, dict) or (missing := sorted(named.keys() - tensors.keys())):
            found = f"no {listed(missing)}" if isinstance(named, dict) else "an index without 'weight_map'"
            raise InputError(path, f"all tensors of {index.name}", found, "copy the missing files too")
    settings = read_record(path / "config.json") if (path / "config.json").exists() else {}
    record = _read_metadata(shards[0]) if len(shards) == 1 else {}
    return Source(str(path), tensors, record, is_own=False, settings=settings)


def _read_own(folder: Path) -> Source:
    record = read_record(folder / "record.json")
    tensors = safetensors.read(folder / "parameters.safetensors")
    return Source(str(folder), dict(sorted(tensors.items())), record, is_own=True)


def _read_metadata(path: Path) -> dict[str, Any]:
    text = safetensors.read_metadata(path).get(RECORD)
    if text is None:
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"metadata '{RECORD}' in JSON", str(error), "export it again") from error
    if not isinstance(record, dict):
        raise InputError(path, f"metadata '{RECORD}' as a JSON object", type(record).__name__, "export it again")
    return record


def _read_pickled(
    path: Path,
    is_known: Callable[[Mapping[str, Any]], bool],
    find_wanted: Callable[[Source], Collection[str]] | None,
) -> Source:
    found: list[Source] = []

    def choose(content: Any) -> dict[str, Any]:
        named, taken = _unwrap(path, content)
        tensors, notes = _strip(path, named, is_known)
        size, stored = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
        if size > 4 * stored + SMALL:  # tensors that repeat a few numbers
            expected = f"tensors that fit into its {stored:,} bytes"
            raise InputError(path, expected, f"{size:,} bytes of them", "copy it again")
        found.append(Source(str(path), tensors, {}, False, _settings(content), (*taken, *notes)))
        wanted = tensors if find_wanted is None else find_wanted(found[0])
        return {name: tensor for name, tensor in tensors.items() if name in wanted}

    read = pickles.read_checkpoint(path, choose)
    return found[0]._replace(tensors=found[0].tensors | read)


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the dict of tensors inside a checkpoint, and what else could have been taken."""
    where, others = "", []
    while isinstance(content, dict):
        inner = {
            name: _count(value)
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, dict) and not NO_MODEL.search(name) and _count(value)
        }
        known = [name for name in WRAPPERS if name in inner]
        # A tensor beside a dict of tensors (a score, a queue) is not the model.
        larger = [name for name in inner if inner[name] > _own_count(content)]
        if not known and not larger:
            break
        taken = known[0] if known else max(larger, key=lambda name: inner[name])
        others += [f"{where}{name}" for name in inner if name != taken and 2 * inner[name] > inner[taken]]
        where, content = f"{where}{taken}/", content[taken]
    if isinstance(content, Unread):
        raise InputError(path, "a dict of tensors", f"an object of {content.name}", "save the state dict")
    if not isinstance(content, dict):
        raise InputError(path, "a dict of tensors", f"a {type(content).__name__}", "save the state dict")
    if not _own_count(content):
        objects = [f"{name} (an object of {v.name})" for name, v in content.items() if isinstance(v, Unread)]
        expected = f"tensors by name, or a dict of them under {', '.join(WRAPPERS[:4])}"
        keys = listed([str(name) for name in content if not isinstance(content[name], Unread)] + objects)
        raise InputError(path, expected, f"the keys {keys or '(none)'}", "save the state dict")
    for name, value in content.items():
        if isinstance(value, Unread) and value.name.startswith(("torch._utils.", "torch._tensor.")):
            found = f"{listed([str(name)])} made by {value.name}"
            raise InputError(path, "dense tensors of plain numbers", found, "save them dense and dequantized")
    notes = ()
    if others:
        notes = (f"tensors under '{where[:-1]}' were taken; the file holds others under {listed(others)}",)
    return {name: value for name, value in content.items() if _is_tensor(name, value)}, notes


def _is_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray | Tensor)


def _own_count(content: Mapping[Any, Any]) -> int:
    return sum(_is_tensor(name, value) for name, value in content.items())


def _count(content: Mapping[Any, Any], depth: int = 3) -> int:
    """Return the number of named tensors in a dict and the dicts in it."""
    inner = [value for value in content.values() if isinstance(value, dict)] if depth else []
    return _own_count(content) + sum(_count(value, depth - 1) for value in inner)


def _settings(content: Any) -> dict[str, Any]:
    """Return what a training code's arguments or configuration say, by the last part of the name; outer ones win."""
    found: dict[str, Any] = {}
    open_ = [content[name] for name in SETTINGS if name in content] if isinstance(content, dict) else []
    for _ in range(4):
        further = []
        for value in open_:
            if isinstance(value, Unread):  # a configuration's own class: its attributes
                value = value.state if isinstance(value.state, dict) else {}
                value = value.get("_content", value)  # omegaconf
            for name, item in value.items() if isinstance(value, dict) else ():
                if isinstance(item, Unread) and isinstance(item.state, dict) and "_val" in item.state:
                    item = item.state["_val"]
                if isinstance(item, dict | Unread):
                    further.append(item)
                elif isinstance(name, str) and isinstance(item, str | int | float | None):
                    found.setdefault(name, item)
        open_ = further[:1000]
    return found


def _strip(
    path: Path, tensors: Mapping[str, Any], is_known: Callable[[Mapping[str, Any]], bool]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take prefixes off names; say where a part of the names was taken for the model."""
    stripped: dict[str, Any] = {}
    for full, value in tensors.items():
        name = full
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise InputError(path, "one tensor of each name", f"'{name}' twice, with and without a prefix")
        stripped[name] = value
    inside = _inside(stripped, is_known, 3)
    if inside is None or not inside[0]:
        return stripped, ()
    prefix, found = inside
    return found, (f"names that begin with '{prefix}' were taken for the model",)


def _inside(
    tensors: dict[str, Any], is_known: Callable[[Mapping[str, Any]], bool], depth: int
) -> tuple[str, dict[str, Any]] | None:
    """Return the prefix without which names are of a known family, and the names without it."""
    if is_known(tensors):
        return "", tensors
    for prefix in (*ROLES, *PREFIXES) if depth else ():
        short = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if not short:
            continue
        if (found := _inside(short, is_known, depth - 1)) is not None:
            rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
            return prefix + found[0], rest | found[1]
    return None


def _newest_step(folder: Path) -> Path | None:
    """Return the folder of a checkpoint's step: this one, or the newest below."""
    if (folder / "record" / "metadata").exists() and (folder / "state").is_dir():
        return folder
    steps = [step for step in folder.iterdir() if re.fullmatch(r"\d+", step.name)] if folder.is_dir() else []
    steps = [step for step in steps if (step / "record" / "metadata").exists()]
    return max(steps, key=lambda step: int(step.name), default=None)


def _read_state(step: Path) -> Source:
    """Read the parameters of a train state, alone: without moments they are a third of it."""
    stored = read_record(step / "record" / "metadata")
    arrays, sums, run = stored.get("arrays"), stored.get("checksums"), stored.get("run")
    if not isinstance(arrays, dict) or not isinstance(sums, dict) or not isinstance(run, dict):
        raise InputError(step, "a checkpoint of a run", "a record without arrays, checksums and run")
    wanted = {name: value for name, value in arrays.items() if name.startswith("params/")}
    restored = (
        _restore(step, nest({name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in wanted.items()}))
        if wanted
        else {}
    )
    tensors = {}
    for name in sorted(wanted):
        array = functools.reduce(operator.getitem, name.split("/"), restored)
        # The same sum of words as `train.checkpoint` stores.
        if int(np.ascontiguousarray(array).view(np.uint32).sum(dtype=np.uint32)) != sums.get(name):
            raise InputError(step, "a good checkpoint", f"other bits of {name} than were saved", "take another step")
        tensors[name.removeprefix("params/")] = array
    return Source(str(step), tensors, {}, is_own=True, run=run)


def _restore(step: Path, item: dict[str, Any]) -> dict[str, Any]:
    # Orbax repeats on stderr, in paragraphs and from several threads, what becomes one line here.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(step.absolute() / "state", args=arguments)
    except Exception as error:  # Orbax and TensorStore raise plain Exception for truncated chunks
        found = f"a damaged one ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        raise InputError(step, "a checkpoint that can be read", found, "take another step") from error
    finally:
        sys.unraisablehook = hook

"""jaxmed weights: published and own weights, from one kind of file to another.

  jaxmed weights list                    families, where each file is had, licence, expected keys
  jaxmed weights show PATH               what a file holds: family, sizes, tensors, preprocessing, licence, leftovers
  jaxmed weights import FILE --out DIR   a published file as a folder that every --weights takes
  jaxmed weights export DIR --out FILE   .safetensors with the original key names, or .stablehlo, which runs anywhere

FILE is .safetensors, or a PyTorch checkpoint (.pth, .pt, .bin): of these no code is run, and PyTorch is not needed.
PATH and DIR may besides be a run, its outputs/model, or its checkpoints/state. Nothing is downloaded: you accept an
archive's terms there. Importing is not needed before use (--weights takes the file itself); it checks the file once,
and keeps what shapes do not tell, such as heads of other sizes than the published ones, or the names of the outputs.
"""

import os
import shutil
import textwrap
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxmed.errors import InputError
from jaxmed.files import make_folder

if TYPE_CHECKING:  # jax is imported on use: help and mistakes answer at once
    from jaxmed.arrays.task import Task
    from jaxmed.models.published.load import Published

OWN_FILES = ("parameters.safetensors", "record.json")
CARD = "README.md"


def import_weights(
    file: Path,
    /,
    *,
    out: Path,
    family: str = "auto",
    heads: int | None = None,
    decoder_heads: int | None = None,
    task: Literal["binary", "multiclass", "multilabel", "regression"] | None = None,
    names: tuple[str, ...] = (),
    mean: tuple[float, ...] = (),
    deviation: tuple[float, ...] = (),
    overwrite: bool = False,
) -> None:
    """Turn a published file into a folder that every --weights takes, and say what became of its tensors.

    The folder holds parameters.safetensors, named and laid out as this package has them, and record.json: sizes,
    preprocessing, licence. An encoder that is not wholly in the file is an error; whatever else is missing or left over
    is listed.

    Example: jaxmed weights import mae_pretrained.pth --out weights/tangerine

    Args:
        file: The file: .safetensors, .pth, .pt or .bin.
        out: Folder to write.
        family: Whose weights they are, see jaxmed weights list; auto looks at the names of the tensors.
        heads: Attention heads of the encoder, for widths that were not published: shapes do not tell them.
        decoder_heads: Attention heads of the decoder, likewise.
        task: What a classifier's outputs mean; a published file does not say it, and predict needs it.
        names: Names of the outputs: classes, labels or targets; of a binary task the positive class.
        mean: Mean of a regression's training targets, one per output.
        deviation: Their standard deviation, likewise.
        overwrite: Replace weights that the folder holds.
    """
    from jaxmed.models.published.load import load_published, published_record
    from jaxmed.train.checkpoint import export_parameters

    _check_folder(out, overwrite)
    published = load_published(
        file, family, heads=heads, decoder_heads=decoder_heads, task=_make_task(task, names, mean, deviation)
    )
    make_folder(out.absolute().parent)
    temporary = out.absolute().with_name(f".{uuid.uuid4().hex[:12]}-{out.absolute().name}")
    try:
        make_folder(temporary)
        export_parameters(temporary, published.params, published_record(published))
        make_folder(out)
        for name in OWN_FILES:
            os.replace(temporary / name, out / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(describe(published, file))
    print(f"\nWritten: {out}")


def export_weights(
    source: Path,
    /,
    *,
    out: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write weights for others: with the key names of the original code, or as a program that runs by itself.

    The original PyTorch code loads the .safetensors file; every tensor that was imported is in it, bit for bit. A
    .stablehlo file holds a classifier with its parameters and runs on CPU, GPU and TPU wherever jax is, and in other
    StableHLO runtimes.

    Example: jaxmed weights export runs/task/outputs/model --out task.safetensors

    Args:
        source: A run, its outputs/model, its checkpoints/state, an imported folder, or a file.
        out: File to write: .safetensors or .stablehlo.
        heads: Attention heads of the encoder, where a file's width was not published.
        decoder_heads: Attention heads of the decoder, likewise.
        overwrite: Replace the file.
    """
    from jaxmed.models.published.load import export_published, load_published

    if out.suffix not in (".safetensors", ".stablehlo"):
        raise InputError("--out", "a name ending in .safetensors or .stablehlo", out, "the suffix decides the format")
    if out.exists() and not overwrite:
        raise InputError(out, "a new file", "one that exists", "choose another --out, or replace it with --overwrite")
    published = load_published(source, heads=heads, decoder_heads=decoder_heads)
    if out.suffix == ".stablehlo":
        from jaxmed.models.published.stablehlo import export_stablehlo

        export_stablehlo(published, out)
    else:
        export_published(published, out)
    print(describe(published, source))
    print(f"\nWritten: {out}")


def show_weights(
    path: Path, /, *, family: str = "auto", heads: int | None = None, decoder_heads: int | None = None
) -> None:
    """Say what a file or folder holds: family, sizes, tensors, preprocessing, licence, what is left over or missing.

    Of a model that a run trained its card follows, README.md beside the parameters: data, scores with intervals, and
    how it is loaded.

    Example: jaxmed weights show mae_pretrained.pth

    Args:
        path: Weights of any kind that --weights takes.
        family: Whose weights they are; auto looks at the names of the tensors.
        heads: Attention heads of the encoder, where a file's width was not published.
        decoder_heads: Attention heads of the decoder, likewise.
    """
    from jaxmed.models.published.load import load_published

    print(describe(load_published(path, family, heads=heads, decoder_heads=decoder_heads), path))
    for card in (path / CARD, path / "outputs" / "model" / CARD):
        if path.is_dir() and card.is_file():
            print(f"\n{card}\n\n{card.read_text(encoding='utf-8')}", end="")
            break


def list_families() -> None:
    """List the families of published weights: where each file is had, its licence, the keys that are expected."""
    from jaxmed.models.published.load import FAMILIES

    for family in FAMILIES.values():
        print(f"{family.name}: {family.title}")
        for name, text in (("where", family.where), ("licence", family.licence), ("keys", family.keys)):
            print(_field(name, text))
    print("\nNothing is downloaded: get the file there, then  jaxmed weights show FILE")


COMMANDS = {"import": import_weights, "export": export_weights, "show": show_weights, "list": list_families}


def describe(published: "Published", path: Path) -> str:
    """Return what `jaxmed weights show` prints."""
    import jax

    from jaxmed.models.published.load import FAMILIES
    from jaxmed.recipes.model_card import preprocessing_words

    report, params = published.report, published.params
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    tables = sum(tree["position"].size for tree in params.values() if "position" in tree)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    constant = f", of them {tables:,} in constant position tables" if tables else ""
    fields = [
        ("family", report.family),
        *FAMILIES[report.family].describe(published.config, params, published.task),
        ("parameters", f"{sum(counts.values()):,} ({parts}){constant}"),
        ("preprocess", preprocessing_words(published.preprocess)),
        ("licence", report.licence),
        ("used", f"{len(report.used)} tensors"),
        ("left over", _names(report.left_over)),
        ("missing", _names(report.missing)),
        *(("note", note) for note in report.notes),
    ]
    return "\n".join([str(path), *(_field(name, text) for name, text in fields)])


def _names(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def _field(name: str, text: str) -> str:
    indent = " " * 14
    return textwrap.fill(
        text, 110, initial_indent=f"  {name:<12}", subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _make_task(
    kind: Literal["binary", "multiclass", "multilabel", "regression"] | None,
    names: tuple[str, ...],
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
) -> "Task | None":
    from jaxmed.arrays.task import Task

    if kind is None:
        if names or mean or deviation:
            raise InputError("--task", "a task beside --names, --mean and --deviation", "none", "give --task too")
        return None
    try:
        return Task(kind, names, mean, deviation)
    except ValueError as error:
        raise InputError("--task", "one name per output, and of a regression mean and deviation", error) from error


def _check_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(out, "a folder for the weights", "a file", "choose another --out")
    held = sorted(item.name for item in out.iterdir()) if out.is_dir() else []
    if foreign := [name for name in held if name not in (*OWN_FILES, CARD)]:
        raise InputError(out, "a new or empty folder", f"one holding {foreign[0]}", "choose another --out")
    if held and not overwrite:
        advice = "choose another --out, or replace them with --overwrite"
        raise InputError(out, "a new or empty folder", "one holding weights", advice)

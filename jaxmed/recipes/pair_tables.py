"""Tables whose rows are files that belong together, such as an MRI and the PET of the same day: split, and read.

A stage says which columns hold files and how one of each is read; subjects stay together, and what a table calls its
splits may be spelt otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from jaxmed.data.cohort import groups_of, hold_out, stated_splits
from jaxmed.data.records import FileSource, SubsetSource
from jaxmed.errors import InputError
from jaxmed.io.tables import Table, read_table, resolve_paths
from jaxmed.recipes.fitted_probes import identity
from jaxmed.recipes.training import TrainData
from jaxmed.report.figures import curves
from jaxmed.report.page import Figure
from jaxmed.train.log import series

# By field: the column of its files, and how one is read.
Readers: TypeAlias = Mapping[str, tuple[str, Callable[[Path], Any]]]


def read_pairs(
    manifest: Path,
    needed: Sequence[str],
    validation: float,
    seed: int,
    words: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """Read a table of files that belong together; splits are filled in, and named as everywhere here.

    Args:
        manifest: CSV with the columns `needed`, and optionally subject and split.
        needed: Columns of files that must be there, the one that tells records apart first.
        validation: Share of the subjects to hold out where there is no column split.
        seed: Of who is held out.
        words: Splits that the table may name otherwise, and their names here.

    Raises:
        InputError: A column or a file is missing, or a subject stands in two splits.
    """
    table = read_table(manifest, needed, ("subject", "split"))
    for column in needed:
        resolve_paths(table, column)
    if "split" in table.columns:
        rows = tuple({**row, "split": words.get(row["split"], row["split"])} for row in table.rows)
        table = dataclasses.replace(table, rows=rows)
        stated_splits(table, column=needed[0])
        return table
    splits = hold_out(groups_of(table, needed[0]), validation, seed)
    rows = tuple({**row, "split": split} for row, split in zip(table.rows, splits, strict=True))
    return dataclasses.replace(table, columns=(*table.columns, "split"), rows=rows)


def make_data(table: Table, readers: Readers) -> TrainData:
    """Return the records of a table: to train on, and held out.

    Args:
        table: With a column split.
        readers: By field, the column of its files and how one is read.

    Raises:
        InputError: Nothing is to be trained on, or the first record cannot be read.
    """
    files = {field: tuple(resolve_paths(table, column)) for field, (column, _) in readers.items()}
    source = FileSource(files, readers={field: read for field, (_, read) in readers.items()})
    splits = np.array(table.column("split"))
    training, held_out = (np.flatnonzero(splits == split) for split in ("train", "validation"))
    if not len(training):
        raise InputError(table.path, "records of split train", "none", "check the column split")
    source[int(training[0])]
    return TrainData(
        SubsetSource(source, training), SubsetSource(source, held_out) if len(held_out) else None, identity
    )


def count_records(data: TrainData) -> dict[str, int]:
    """Return how many records are trained on, and held out."""
    return {"train": len(data.training), "held out": 0 if data.held_out is None else len(data.held_out)}


def loss_figure(lines: list[dict[str, float]], names: Mapping[str, str], caption: str) -> Figure:
    """Draw series of metrics.jsonl over steps, by label; those that are not there are left out."""
    found = {label: series(lines, name) for label, name in names.items()}
    shown = {label: line for label, line in found.items() if len(line[0])}
    return curves(shown, xlabel="step", ylabel="loss", log=True, caption=caption)

"""A store of subjects from their files, past broken ones: `data.subject_store`, one subject after the other."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmed.data.cohort import hold_out
from jaxmed.data.inputs import require_whole, try_each
from jaxmed.data.label_table import LabelTable
from jaxmed.data.records import SubsetSource
from jaxmed.data.subject_files import SubjectFiles
from jaxmed.data.subject_store import Locate, SubjectStore, check_subject, close_store, open_store, write_subject
from jaxmed.errors import InputError
from jaxmed.recipes.map_files import Tell, map_files, write_failed
from jaxmed.recipes.mni_space import POOR
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder


class MadeStore(NamedTuple):
    """A store, how far each subject that was aligned overlaps the template, and how many subjects failed."""

    store: SubjectStore
    overlaps: dict[str, float]
    failed: int


def check_subjects(files: Sequence[SubjectFiles], table: LabelTable, where: Path, threads: int) -> None:
    """Read every file from end to end before a run that needs all of them begins.

    Args:
        files: Of the subjects.
        table: What their labels mean.
        where: The table or folder that lists them, for messages.
        threads: That read.

    Raises:
        InputError: A subject's file is broken; where several are, the first three are named.
    """
    require_whole(try_each(partial(check_subject, table=table), files, threads), str(where))


def split_store(
    store: SubjectStore, held_out: Sequence[str], validation: float, seed: int
) -> tuple[SubsetSource, SubsetSource | None]:
    """Return the subjects to train on and those held out; None for none.

    Args:
        store: The store; its own splits count where nothing else is said.
        held_out: Names of subjects to hold out.
        validation: Share of the subjects that is held out where neither says which.
        seed: Of that draw.

    Raises:
        InputError: A name is unknown, or nobody is left to train on.
    """
    require_known(held_out, store.names)
    splits = [*store.splits]
    if held_out:
        splits = ["validation" if name in held_out else "train" for name in store.names]
    elif not any(splits):
        splits = hold_out(store.names, validation, seed)
    rows = {name: np.flatnonzero([one == name for one in splits]) for name in ("train", "validation", "test")}
    if not len(rows["train"]):
        raise InputError(store.path, "subjects of split train", "none", "check the column split")
    held = rows["validation"] if len(rows["validation"]) else rows["test"]
    return SubsetSource(store, rows["train"]), SubsetSource(store, held) if len(held) else None


def require_known(held_out: Sequence[str], names: Sequence[str]) -> None:
    """Refuse subjects to hold out that there are none of.

    Raises:
        InputError: There is one.
    """
    if unknown := set(held_out) - set(names):
        raise InputError("data.held-out", f"some of {', '.join(names[:8])}", ", ".join(sorted(unknown)))


def make_store(
    folder: RunFolder, files: list[SubjectFiles], table: LabelTable, locate: Locate | None, log: Log
) -> MadeStore:
    """Write every subject into outputs/store, and what failed into outputs/failed.csv.

    Args:
        folder: Of the run, begun.
        files: Of the subjects.
        table: What their labels mean.
        locate: Finds MNI space; None leaves coordinates out.
        log: Of the run.

    Raises:
        InputError: There is one subject only, and it is broken; or none is left.
    """
    place = folder.outputs / "store"

    def work(_: int, one: SubjectFiles, tell: Tell) -> dict[str, Any]:
        tell(one.name)
        record = write_subject(place, one, table, locate)
        return {"name": one.name, "size": record["size"], "overlap": record["overlap"]}

    results = map_files(files, work, folder.outputs / "subjects", log, "Storing", "subjects", lambda row: {})
    write_failed(folder.outputs, results.failed)
    done = {row["name"] for row in results.rows}
    close_store(place, [one for one in files if one.name in done], table)
    overlaps = {row["name"]: row["overlap"] for row in results.rows if row["overlap"] is not None}
    for name, overlap in overlaps.items():
        if overlap < POOR:
            log.say(f"Note: {name} overlaps the template by {overlap:.0%} only; look at its coordinates.")
    return MadeStore(open_store(place), overlaps, len(results.failed))

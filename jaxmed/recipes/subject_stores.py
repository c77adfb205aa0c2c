"""A store of subjects from their files, past broken ones: `data.subject_store`, one subject after the other."""

from typing import Any, NamedTuple

from jaxmed.data.label_table import LabelTable
from jaxmed.data.subject_files import SubjectFiles
from jaxmed.data.subject_store import Locate, SubjectStore, close_store, open_store, write_subject
from jaxmed.recipes.map_files import Tell, map_files, write_failed
from jaxmed.recipes.mni_space import POOR
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder


class MadeStore(NamedTuple):
    """A store, how far each subject that was aligned overlaps the template, and how many subjects failed."""

    store: SubjectStore
    overlaps: dict[str, float]
    failed: int


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

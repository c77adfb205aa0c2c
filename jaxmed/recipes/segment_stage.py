"""What a predict stage does where the weights are a segmenter's: label maps of many scans, scored and warned of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.data.scans import Record
from jaxmed.errors import InputError
from jaxmed.files import unique_names
from jaxmed.io.tables import resolve_path, write_table
from jaxmed.models.published.load import Published
from jaxmed.recipes.map_files import TABLES
from jaxmed.recipes.map_images import Inputs
from jaxmed.recipes.quality_range import (
    NOT_COMPARED,
    Scorer,
    Tuned,
    measure_scans,
    quality_columns,
    read_tuned,
    warn_outside,
)
from jaxmed.recipes.scan_job import ScansConfig, open_job
from jaxmed.recipes.segment_cases import (
    CaseRow,
    Segmenter,
    Summary,
    count_parameters,
    score_rows,
    segment_cases,
    with_preview,
)
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder


def run_segmenter(
    config: Any,
    scans: ScansConfig,
    published: Published,
    segmenter: Segmenter,
    columns: Sequence[str],
    shown: int,
    page: Callable[[Finished[Any, Any]], Page],
    folder: RunFolder,
    notes: Sequence[str] = (),
    scorer: Scorer | None = None,
) -> int:
    """Segment every scan of a predict stage, whose weights are a segmenter's. Returns 1 when scans failed.

    Args:
        config: Configuration of the stage.
        scans: Its scans, synthetic ones written where they were asked for.
        published: The weights.
        segmenter: The same as a network.
        columns: That of a manifest with true label maps; empty where there are none.
        shown: Cases that the page shows.
        page: Of the stage.
        folder: The run.
        notes: What a user should know about the inputs.
        scorer: As of `predict_stage.run_predict`.

    Raises:
        InputError: There are no scans, or the only one is broken, or the column is not there.
    """
    clock, job = Clock(), open_job(scans, lambda place: published, notes)
    masks = _true_maps(job.records, columns, scans.data.manifest)
    names = unique_names([record.name for record in job.records], taken=TABLES)
    inputs = [
        Inputs(name, record.scan, {"mask": mask})
        for name, record, mask in zip(names, job.records, masks, strict=True)
    ]  # fmt: skip
    about = {
        name: (record.row.get("subject") or name, record.row.get("split") or "all")
        for name, record in zip(names, job.records, strict=True)
    }
    log = begin(folder, job.notes)
    announce(log, "Segmenting", params=segmenter.params, count=len(inputs), unit="cases", smaller=folder.smaller)
    clock.lap("read and check")
    rows, failed = segment_cases(segmenter, inputs, about, folder.outputs, log, shown=shown)
    clock.lap("segment, compilation included")
    told, warnings, tuned = [*job.notes], list[tuple[str, str]](), dict[str, Tuned]()
    if scorer is not None and scans.weights is not None:
        tuned = read_tuned(scans.weights)
        done = {row.name for row in rows}
        measured, further = measure_scans([one.scan for one in inputs if one.name in done], scorer, log)
        lines = warn_outside([row.name for row in rows], measured, tuned, log)
        write_quality(folder.outputs / "quality.csv", rows, measured, lines)
        warnings = [(row.name, line) for row, own in zip(rows, lines, strict=True) for line in own]
        told += [*further, *([] if tuned else [NOT_COMPARED])]
        clock.lap("measure quality")
    summary = Summary(
        segmenter.labels, {"segmented": len(rows)}, failed, count_parameters(segmenter.params), 0, tuple(told),
        score_rows(rows, segmenter.labels, scans.seed), with_preview(folder.outputs, rows), tuple(warnings), tuned,
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return int(failed > 0)


def write_quality(
    path: Path, rows: Sequence[CaseRow], measured: Sequence[Mapping[str, float]], lines: Sequence[tuple[str, ...]]
) -> None:
    """Write a row per case: how good its scans are, and the lines that say what is against it."""
    table = [
        {"id": row.name, "path": row.path, **cells, "warnings": "; ".join(own)}
        for row, cells, own in zip(rows, quality_columns(measured), lines, strict=True)
    ]
    write_table(path, tuple(table[0]) if table else ("id", "path", "quality", "warnings"), table)


def _true_maps(records: Sequence[Record], columns: Sequence[str], manifest: Path | None) -> list[Path | None]:
    if not columns:
        return [None] * len(records)
    if len(columns) > 1 or manifest is None:
        expected, found = "the one column of a manifest with label maps", f"{' '.join(columns)}"
        raise InputError("label.columns", expected, found if manifest is not None else f"{found} and no manifest")
    (column,) = columns
    if records and column not in records[0].row:
        raise InputError(manifest, f"a column '{column}'", f"the columns {', '.join(records[0].row)}")
    cells = [record.row[column] for record in records]
    return [resolve_path(cell, manifest.parent) if cell else None for cell in cells]

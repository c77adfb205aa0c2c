"""What the stages share that take many scans through given weights: which scans, how they are read, what failed."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from jax.sharding import Mesh

from jaxmed.config import Number, Seed, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import ANY_KIND, VOLUMES, Record, find_records
from jaxmed.data.sequences import gather_cases
from jaxmed.errors import InputError
from jaxmed.io.scans import Kind
from jaxmed.io.tables import read_table
from jaxmed.models.encoder import Encoder
from jaxmed.models.heads import HeadConfig
from jaxmed.models.published.load import Published
from jaxmed.recipes.map_files import BatchConfig, BatchModel, make_batch_mesh, read_input
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.page import Note, Section, Table
from jaxmed.train.mesh import MeshConfig

SHOWN = 20  # rows of a table


@dataclasses.dataclass(frozen=True)
@checked
class ScanData:
    """Which scans go through.

    Attributes:
        manifest: CSV with the column path (a file that the weights' preprocessing reads, a DICOM folder, or prepared
            inputs as .npz), or a folder of pictures by split and class. Every further column is carried into the
            results; where it has labels, they are used.
        split: Only rows of the manifest with this word under split; empty for all.
        synthetic: Generate this many scans where no files are given, and a tiny model where no weights are.
    """

    manifest: Path | None = None
    split: str = ""
    synthetic: Number = 0


@dataclasses.dataclass(frozen=True)
@checked
class ScansConfig:
    """Scans, and how they go through a model.

    Attributes:
        data: Scans listed in a table.
        input: A file, a DICOM folder, or a folder of such, instead of a table.
        weights: Published or own weights.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38), in HU for CT; without it they
            are refused.
        batch: Scans at a time, and threads that read them.
        mesh: The devices; by default one.
        dtype: Type of the matrix products.
        seed: Seed of intervals and of synthetic scans.
    """

    data: ScanData = ScanData()
    input: Path | None = None
    weights: Path | None = None
    series: str = ""
    fill: float | None = None
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0

    @property
    def is_synthetic(self) -> bool:
        """Whether the data are generated: files given take their place, whatever the preset."""
        return self.data.synthetic > 0 and self.data.manifest is None and self.input is None

    def needs_synthetic(self, kinds: Sequence[Kind] = VOLUMES) -> bool:
        """Tell whether scans or weights are to be made; the files that are given are looked at first.

        Args:
            kinds: Of files, in a folder.

        Raises:
            InputError: They cannot be used.
        """
        if not self.is_synthetic:
            find_records(self.data.manifest, self.input, self.data.split, kinds=kinds)
        return self.is_synthetic or (self.data.synthetic > 0 and self.weights is None)


# The type of a stage's field `scans`: on the command line its options carry no prefix.
ScansFlags: TypeAlias = Annotated[ScansConfig, NO_PREFIX]


class Model(NamedTuple):
    """Weights as an encoder with a head, whatever they are.

    Attributes:
        encoder: The encoder.
        head: The head on its tokens; of weights without one, the layer norm of a new one.
        params: {"encoder": ..., "head": ...}.
    """

    encoder: Encoder
    head: HeadConfig
    params: Any


class Job(NamedTuple):
    """What a stage works on, checked.

    Attributes:
        records: The scans.
        published: The weights.
        preprocess: A file to the model's input.
        mesh: The devices.
        notes: What a user should know.
    """

    records: list[Record]
    published: Published
    preprocess: Preprocess
    mesh: Mesh
    notes: list[str]

    def batch_model(self, compute: Callable[..., Any], finish: Callable[..., Any], model: Model) -> BatchModel:
        """Return what `map_batches` does with the scans."""
        shape = model.encoder.image_shape
        return BatchModel(partial(read_input, self.preprocess), compute, finish, shape, model.encoder.rules)


def open_job(scans: ScansConfig, load: Callable[[Path], Published], notes: Sequence[str]) -> Job:
    """Find the scans, read the weights, and check that they fit; nothing is written.

    Args:
        scans: Synthetic ones written where they were asked for.
        load: Reads weights of the system's family.
        notes: What a user should know about the inputs.

    Raises:
        InputError: They do not, or a single scan is broken: that is a mistake, not a failure among many.
    """
    given = (scans.data.manifest, scans.input, scans.data.split, scans.series, scans.fill)
    if scans.weights is None:
        find_records(*given, kinds=ANY_KIND)
        raise InputError("weights", "a file or folder of weights", "nothing", "give --weights, or try --preset smoke")
    published = load(scans.weights)
    records, passed = find_records(*given, kinds=ANY_KIND if published.preprocess.is_sliced else VOLUMES)
    preprocess = published.preprocess
    if scans.input is not None:
        kept, further = gather_cases([record.scan for record in records], preprocess.sequences)
        records = [record for record in records if record.scan in kept]
        passed = (*passed, *further)
    mesh = make_batch_mesh(scans.batch, scans.mesh)
    if len(records) == 1:
        preprocess.prepare(records[0].scan)
    return Job(records, published, preprocess, mesh, [*notes, *passed, *published.report.lines])


def further_columns(records: Sequence[Record], own: Sequence[str]) -> list[str]:
    """Return the columns of the manifest that are carried into the results."""
    names = dict.fromkeys(name for record in records for name in record.row)
    return [name for name in names if name not in ("path", "id", "warnings", *own)]


def trouble_sections(outputs: Path, warnings: Sequence[tuple[str, str]], failed: int) -> list[Section]:
    """Return what is unexpected about scans, and which failed."""
    sections = []
    if warnings:
        rest = len(warnings) - SHOWN
        caption = "These scans were used as they are." + (f" {rest:,} more are in log.txt." if rest > 0 else "")
        sections.append(Section("Unexpected", [Table(("Scan", "What is unexpected"), warnings[:SHOWN], caption)]))
    if failed:
        table = read_table(outputs / "failed.csv")
        rows = [(row["id"], row["reason"]) for row in table.rows[:SHOWN]]
        text = f"{failed:,} scans could not be used; outputs/failed.csv lists them all."
        sections.append(Section("Failed", [Note(text, "warning"), Table(("Scan", "Reason"), rows)]))
    return sections


def count_scans(number: int) -> str:
    """Return a number of scans in words."""
    return f"{number:,} scan{'' if number == 1 else 's'}"

"""What stages share that pre-train without labels: on which scans, where training starts, and the page of the loss.

What is trained, and what is shown of it, is the stage's own.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Number, Whole, checked
from jaxmed.data.cohort import split_unlabelled, subject_notes
from jaxmed.data.inputs import check_scans, input_source
from jaxmed.data.preprocess import Preprocess, differences
from jaxmed.data.records import Source
from jaxmed.data.scans import VOLUMES, find_scans, read_manifest
from jaxmed.data.sequences import gather_cases
from jaxmed.data.store import StoredSource, find_store, stored_scans
from jaxmed.errors import InputError
from jaxmed.io.scans import Kind, ScanFiles
from jaxmed.io.tables import make_table, resolve_paths
from jaxmed.models.mae import MaskedModel
from jaxmed.models.published.load import (
    OWN_LICENCE,
    ImportReport,
    Published,
    load_published,
    published_record,
    resize_positions,
)
from jaxmed.nn.model import Model
from jaxmed.recipes.stage import first_only
from jaxmed.recipes.training import TrainConfig
from jaxmed.report.figures import curves
from jaxmed.report.page import Figure, Tile
from jaxmed.train.checkpoint import compare_arrays, describe
from jaxmed.train.log import Log, series


@dataclasses.dataclass(frozen=True)
@checked
class UnlabelledData:
    """Which scans are trained on.

    Attributes:
        manifest: CSV with the column path (a file that the model's preprocessing reads, a DICOM folder, or prepared
            inputs as .npz); optionally subject and split (train, validation, test). Only train is trained on;
            validation tells how well; test is left alone.
        validation: Share of subjects held out where there is no column split.
        check: Scans read from end to end before training starts, evenly spread; of the others only the headers are.
            One that turns out broken later stops the run and is named.
        cache: Folder in which prepared scans are kept (float16, 34 MB each at 256^3), so that later epochs and runs
            read them in place. Empty prepares them anew in every epoch.
        store: Records prepared by `jaxmed data pack`, read instead of the manifest's files; without a manifest its own
            table counts. A manifest may name it in a column "store".
        synthetic: Generate this many where no files are given.
    """

    manifest: Path | None = None
    validation: float = 0.05
    check: Whole = 64
    cache: Path | None = None
    store: Path | None = None
    synthetic: Number = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected a share in [0, 1), found {self.validation:g}")

    @property
    def is_given(self) -> bool:
        """Whether there are records of a user's."""
        return self.manifest is not None or self.store is not None


class Unlabelled(NamedTuple):
    """The scans of a run.

    Attributes:
        scans: Files, or folders of DICOM slices: those to train on first, then those held out.
        num_training: How many are trained on.
        notes: What is unexpected about them.
        store: Where they are prepared already; None where files are read.
    """

    scans: tuple[ScanFiles, ...]
    num_training: int
    notes: list[str]
    store: StoredSource | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many are trained on, and how many are held out."""
        return {"train": self.num_training, "validation": len(self.scans) - self.num_training}


def find_unlabelled(
    data: UnlabelledData,
    place: Path | None,
    preprocess: Preprocess,
    train: TrainConfig,
    *,
    kinds: Sequence[Kind] = VOLUMES,
    series: str = "",
    fill: float | None = None,
) -> Unlabelled:
    """List the scans of a run, and look at them.

    Args:
        data: Which of a table.
        place: Instead of a table: a file, a DICOM folder, or a folder of such.
        preprocess: What each will go through.
        train: Its seed draws what is held out, its loader reads.
        kinds: Of files, in a folder.
        series: Which DICOM series is meant where a folder holds several.
        fill: Intensity of voxels that have none.

    Raises:
        InputError: There are none, some are missing or broken, a store was packed by other preprocessing, or none is
            to be trained on.
    """
    if data.is_given == (place is not None):
        found = "neither" if place is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    store, manifest = find_store(data.store, data.manifest)
    if manifest is not None:
        table, passed = read_manifest(manifest), ()
        if store is None:
            scans = [ScanFiles(path, series, fill=fill) for path in resolve_paths(table)]
        else:
            scans = stored_scans(table, series, fill)
    else:
        assert place is not None
        scans, passed = find_scans(place, kinds, series, fill)
        scans, further = gather_cases(scans, preprocess.sequences)
        passed = (*passed, *further)
        # Series of one study show one person.
        rows = [{"path": str(scan.path), "subject": scan.study} for scan in scans]
        table = make_table(place, ("path", "subject"), rows)
    splits = np.array(split_unlabelled(table, data.validation, train.seed))
    if "train" not in splits:
        raise InputError(table.path, "rows with split 'train'", f"only {', '.join(sorted(set(splits)))}")
    training, held_out = ([scans[row] for row in np.flatnonzero(splits == name)] for name in ("train", "validation"))
    chosen = (*training, *held_out)
    notes = [*passed]
    notes += [] if manifest is None or "subject" not in table.columns else subject_notes(table)
    if store is not None:
        store.require(chosen, preprocess)
    notes += check_scans(chosen, preprocess, data.check, train.loader.num_threads, store)
    return Unlabelled(chosen, len(training), notes, store)


def load_initial_weights(path: Path, family: str, config: Any, model: MaskedModel) -> Published:
    """Read a masked autoencoder to start from, positions resized to the model's grid.

    Args:
        path: A file or folder.
        family: Whose weights are taken.
        config: Sizes of the model.
        model: The model.

    Raises:
        InputError: They are no masked autoencoder of these sizes.
    """
    published = load_published(path, family)
    if not isinstance(published.config, type(config)) or "decoder" not in published.params:
        advice = "leave --weights out to start from random ones"
        found = f"weights of kind {published.report.kind}"
        if isinstance(published.config, type(config)):
            found = "an encoder without it"
        raise InputError(path, "a masked autoencoder with its decoder", found, advice)
    published = resize_positions(published, model.image_size)
    expected: Any = jax.eval_shape(model.network.init, jax.random.key(0))
    found = {name: published.params[name] for name in expected}
    compare_arrays(describe(expected), describe(found), str(path))
    for name in ("sigmoid", "norm_target"):
        if getattr(published.config, name, None) != getattr(config, name, None):
            found = f"{name} {getattr(published.config, name)}"
            raise InputError(path, f"weights trained with {name} {getattr(config, name)}", found, f"set --model.{name}")
    return dataclasses.replace(published, params={name: published.params[name] for name in expected})


def start_notes(published: Published | None, preprocess: Preprocess) -> list[str]:
    """Say whose weights training starts from, and how their input differed."""
    if published is None:
        return []
    report = published.report
    notes = [f"Starting from weights of {report.family}. Licence: {report.licence}.", *report.remarks]
    differing = [f"{name} {a}, here {b}" for name, (a, b) in differences(published.preprocess, preprocess).items()]
    return notes + [f"The weights to start from were trained with other input: {'; '.join(differing)}."] * bool(
        differing
    )


def model_record(
    family: str, kind: str, model: Any, params: Params, preprocess: Preprocess, origin: Published | None
) -> dict[str, Any]:
    """Return what `load_published` has to know about exported parameters; a licence is handed on."""
    licence = OWN_LICENCE if origin is None else origin.report.licence
    report = ImportReport(family, kind, (), (), (), licence)
    return published_record(Published(Model(params.get, params.get), params, preprocess, model, report))


def prepared_source(found: Unlabelled, preprocess: Preprocess, cache: Path | None, log: Log) -> Source:
    """Return a source of prepared inputs; the first process fills a cache before others open it."""
    scans = found.scans
    if found.store is not None:
        log.say(f"Reading {len(scans):,} prepared records of {found.store.folder}.")
        return input_source(scans, preprocess, store=found.store)
    if cache is not None:
        log.say(f"Preparing inputs in {cache}; those that are there already stay.")
        opened: list[Source] = []
        first_only(lambda: opened.append(input_source(scans, preprocess, cache)), "cache")
        if opened:  # opening a cache sums every file in it
            return opened[0]
    return input_source(scans, preprocess, cache)


# The page ------------------------------------------------------------------------------------------------------------


def pretrain_tiles(lines: list[dict[str, float]], counts: dict[str, int], unit: str, what: str) -> list[Tile]:
    """Return steps, loss and explained variance.

    Args:
        lines: Of metrics.jsonl.
        counts: Records trained on ("train") and held out.
        unit: What a record is, in the plural.
        what: The loss is, in words.
    """
    steps, losses = series(lines, "loss")
    tiles: list[Tile] = [
        ("Steps", int(steps[-1]), f"{counts['train']:,} {unit}"),
        ("Loss", float(f"{losses[-1]:.3g}"), f"{what}, last line"),
    ]
    explained = series(lines, "evaluation/explained")[1]
    if len(explained):
        tiles.append(("Explained", f"{explained[-1]:.1%}", f"of the variance of hidden patches, held-out {unit}"))
    return tiles


def error_curves(lines: list[dict[str, float]], caption: str) -> list[Any]:
    """Return the error of hidden patches, beside that of a constant, and the learning rate."""
    shown = {"training": series(lines, "loss")}
    shown["constant, training"] = series(lines, "target_variance")
    if len(series(lines, "evaluation/error")[0]) > 1:
        shown["held out"] = series(lines, "evaluation/error")
        shown["constant, held out"] = series(lines, "evaluation/variance")
    return [curves(shown, xlabel="step", ylabel="error", caption=caption), rate_curve(lines)]


def rate_curve(lines: list[dict[str, float]]) -> Figure:
    """Return the learning rate over the steps."""
    caption = "Learning rate: warm-up, then half a cosine."
    return curves({"rate": series(lines, "learning_rate")}, xlabel="step", ylabel="learning rate", caption=caption)

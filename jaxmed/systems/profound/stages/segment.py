"""ProFound segment: train UPerNet on cases with label maps, and segment those that it was not trained on."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmed.arrays.types import Params
from jaxmed.config import Length, Positive, Size, Whole, checked, to_record
from jaxmed.data.augment import AugmentConfig
from jaxmed.data.inputs import check_scans
from jaxmed.data.label_maps import MaskData, PreparedPair, list_masked, masked_source
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import SubsetSource
from jaxmed.errors import InputError
from jaxmed.models.convnext import PROFOUND, ConvNextConfig, convnext_encoder
from jaxmed.models.published.load import OWN_LICENCE, resize_positions
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.models.upernet import UperNetConfig, upernet_network
from jaxmed.recipes.adapt import take_encoder
from jaxmed.recipes.dense_labels import train_labels
from jaxmed.recipes.quality_range import write_tuned
from jaxmed.recipes.segment_cases import (
    Segmenter,
    Summary,
    count_parameters,
    held_out_inputs,
    label_task,
    score_rows,
    segment_cases,
    task_labels,
    with_preview,
)
from jaxmed.recipes.segment_sections import segment_page
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.training import TrainConfig, TrainData, TrainFlags, check_fit
from jaxmed.systems.profound import adaptation
from jaxmed.systems.profound.adaptation import FINE_TUNING, blur_notes, load_weights
from jaxmed.systems.profound.cases import SMALL_INPUT, SMALL_SIZE, SOURCE, TINY_SEGMENTER, CaseFiles, write_cases
from jaxmed.systems.profound.scoring import score_case
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.loop import LoopConfig, length_notes
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder

AUXILIARY = 0.4  # weight of the auxiliary head's loss
CHECKED = 16  # cases all of whose sequences are read from end to end beforehand; of the others the headers are
# Columns of phantoms by what is asked for: a smoke run has time for zones, where lesions are the common column.
PHANTOM_COLUMNS = {"mask": "zones", "lesion": "mask"}
HEAD = r"^(decoder|auxiliary|hidden_norm)/"
BEST = LoopConfig(log_every=10, best="loss", best_is="smallest")
OPTIMIZER = dataclasses.replace(FINE_TUNING, no_decay=(*FINE_TUNING.no_decay, HEAD))
AUGMENTATION = dataclasses.replace(
    adaptation.AUGMENTATION, rotation=30.0, rotation_axes=(0,), scale_axes=(1, 2), translation=0.0
)
"""What happens to training cases, their label maps moved alike: a turn about the axis of the slices, a zoom in them.

Source: ProFound, official code. Deviation: turn and zoom are drawn together, in half of the cases.
"""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Segmentation by ProFound; defaults are the released code's fine-tuning.

    Attributes:
        data: Cases with label maps.
        weights: Published or own weights to start from: an encoder, or a segmenter, whose head is taken too where it
            has the same labels. Empty trains from scratch.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        image_size: Voxels along slices, rows and columns; 0 0 0 takes the weights' (64 x 224 x 224 from scratch).
        spacing: Voxel size from scratch, in mm, along slices, rows and columns; of the weights otherwise.
        encoder: Sizes from scratch; of the weights' encoder otherwise, of which only drop_path_rate and remat are
            taken from here.
        width: Channels of UPerNet's head, from scratch or on an encoder.
        auxiliary_width: Channels of the head on the third stage, whose loss counts 0.4 in training; 0 for none.
        preprocess: How the files of a case are named, where it is not as the weights expect.
        train: Optimizer, length, reading, devices and seed; the parameters of lowest validation loss are kept.
        augmentation: What happens to training cases.
        shown: Cases that the report shows.
        quality_scans: Training cases whose quality is measured and kept beside the model, for predict; 0 for none.
    """

    data: MaskData = MaskData()
    weights: Path | None = None
    fill: float | None = None
    image_size: tuple[Length, Length, Length] = (0, 0, 0)
    spacing: tuple[Positive, Positive, Positive] = (1.0, 0.5, 0.5)
    encoder: ConvNextConfig = dataclasses.replace(PROFOUND, drop_path_rate=0.1)
    width: Size = 512
    auxiliary_width: Length = 256
    preprocess: CaseFiles = CaseFiles()
    train: TrainFlags = TrainConfig(
        OPTIMIZER, dataclasses.replace(BEST, save_every=200, evaluate_every=200),
        LoaderConfig(batch_size=2, num_threads=4), MeshConfig(data=1), epochs=400, warmup_epochs=40,
    )  # fmt: skip
    augmentation: AugmentConfig = AUGMENTATION
    shown: Whole = 6
    quality_scans: Whole = 200

    def __post_init__(self) -> None:
        if any(self.image_size) and not all(self.image_size):
            raise ValueError(f"image_size: expected three sizes above 0, or 0 0 0, found {self.image_size}")


def paper() -> Config:
    """UPerNet on ConvNeXt V2 tiny at 64 x 224 x 224, batch 2, 400 epochs: for your cases on accelerators."""
    return Config()


def smoke() -> Config:
    """A tiny model at 16 x 32 x 32, in seconds: on your cases, or the zones of phantom glands.

    Lesions of phantoms (--data.mask lesion) are a few voxels here: they need more cases and longer training, such as
    --data.synthetic 200 --epochs 60.
    """
    train = TrainConfig(
        dataclasses.replace(OPTIMIZER, peak_lr=1e-2, end_lr=1e-4, layer_decay=1.0),
        dataclasses.replace(BEST, save_every=33, evaluate_every=33), LoaderConfig(batch_size=4), MeshConfig(data=1),
        epochs=22, warmup_epochs=2,
    )  # fmt: skip
    depth, rows, columns = SMALL_INPUT.spacing
    mild = dataclasses.replace(
        AUGMENTATION, spacing=SMALL_INPUT.spacing, affine_probability=0.0, blur_probability=0.0
    )  # fmt: skip
    return Config(
        MaskData(synthetic=30), image_size=SMALL_SIZE, spacing=(depth, rows, columns), encoder=TINY_SEGMENTER,
        width=16, auxiliary_width=8, train=train, augmentation=mild,
    )  # fmt: skip


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, train, segment validation and test, export the model, write the report.

    Returns 1 when cases failed.
    """
    clock, train, data, notes = Clock(), config.train, config.data, list[str]()
    start = find_start(config)
    if data.manifest is None and data.synthetic:
        place = write_cases(folder, train.seed, data.synthetic)
        column = PHANTOM_COLUMNS.get(data.mask, data.mask)
        cache = data.cache or folder.path / "inputs" / "prepared"
        data = dataclasses.replace(data, manifest=place, mask=column, cache=cache)
        told = {"zones": "1 the outer zone of the gland, 2 the inner one", "mask": "1 a lesion"}.get(column, "")
        notes.append(f"The cases are phantoms, the labels those of column '{column}'{told and ': ' + told}.")
    cases = list_masked(data, train.seed, start.preprocess, config.fill, train.loader.num_threads or 1)
    start = start.with_labels(cases.labels)
    network = upernet_network(start.sizes)
    check_fit(train, network)
    learnt = cases.learnt()
    notes += [*start.notes, *cases.notes, *check_scans(learnt.scans, start.preprocess, CHECKED, 2)]
    notes += [*blur_notes(config.augmentation), *length_notes(train.loop, train.epochs)]
    log = begin(folder, notes, tensorboard=train.loop.tensorboard)
    clock.lap("read and check")
    field = PreparedPair(start.preprocess, cases.labels, config.fill)
    source = masked_source(learnt, field, data.cache)
    training, held_out = (SubsetSource(source, np.array(learnt.rows(split))) for split in ("train", "validation"))
    log.say(f"{len(training):,} cases to train on, {len(held_out):,} to select on; labels {start.told(cases.labels)}.")
    trained = train_labels(
        train, network, TrainData(training, held_out, field),
        varied=config.augmentation if config.augmentation.active else None, auxiliary=AUXILIARY,
        layers=convnext_encoder(start.sizes.encoder).layers, start=start.params, folder=folder, log=log,
    )  # fmt: skip
    export_parameters(folder.outputs / "model", trained.params, model_record(start, cases.labels))
    clock.lap("train, compilation included")
    if config.quality_scans:
        seen = [(cases.scans[row], cases.subjects[row]) for row in cases.rows("train")]
        scans, subjects = zip(*seen, strict=True)
        scorer = partial(score_case, config.preprocess.apply(PREPROCESS).sequences)
        notes += write_tuned(folder.outputs / "model", scans, subjects, config.quality_scans, scorer, log)
        clock.lap("measure quality")
    inputs, about = held_out_inputs(cases)
    segmenter = Segmenter(network, trained.params, cases.labels, start.preprocess)
    rows, failed = segment_cases(segmenter, inputs, about, folder.outputs, log, shown=config.shown, part="cases")
    clock.lap("segment, compilation included")
    counts = {split: len(cases.rows(split)) for split in dict.fromkeys(cases.splits)}
    summary = Summary(
        cases.labels, counts, failed, count_parameters(trained.params), trained.step, tuple(notes),
        score_rows(rows, cases.labels, train.seed), with_preview(folder.outputs, rows),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return int(failed > 0)


class SegmenterStart(NamedTuple):
    """Where training starts.

    Attributes:
        sizes: Of the network; as many logits as the weights have, where they are a segmenter's.
        preprocess: A case to its input.
        params: Parameters to start from; None from scratch.
        labels: Of weights of a segmenter; None of others.
        licence: Of the weights.
        notes: What a user should know about them.
    """

    sizes: UperNetConfig
    preprocess: Preprocess
    params: Params | None
    labels: tuple[int, ...] | None
    licence: str
    notes: tuple[str, ...]

    def with_labels(self, labels: tuple[int, ...]) -> "SegmenterStart":
        """Return the start for some labels, whose head is a new one unless the weights have just these."""
        if labels == self.labels:
            return self
        sizes, notes = dataclasses.replace(self.sizes, classes=1 if len(labels) == 2 else len(labels)), self.notes
        if self.labels is not None:
            notes = (*notes, f"The weights segment the labels {self.told(self.labels)}: their head is left behind.")
        params = None if self.params is None else {"encoder": self.params["encoder"]}
        return self._replace(sizes=sizes, params=params, labels=labels, notes=notes)

    @staticmethod
    def told(labels: tuple[int, ...]) -> str:
        """Return the labels in words, without the background."""
        return ", ".join(map(str, labels[1:]))


def find_start(config: Config) -> SegmenterStart:
    """Read the weights, at the size that is wanted, and decide the network.

    Raises:
        InputError: They are of another model.
    """
    ours, size = config.encoder, config.image_size if any(config.image_size) else None
    if config.weights is None:
        encoder = dataclasses.replace(ours, image_size=size or ours.image_size, dtype=config.train.dtype)
        preprocess = dataclasses.replace(PREPROCESS, size=encoder.image_size, spacing=config.spacing)
        sizes = UperNetConfig(encoder, 2, config.width, config.auxiliary_width)
        note = "No weights were given: the model starts from random ones."
        return SegmenterStart(sizes, config.preprocess.apply(preprocess), None, None, OWN_LICENCE, (note,))
    published = load_weights(config.preprocess, config.weights)
    if not isinstance(published.config.encoder, ConvNextConfig):
        raise InputError(config.weights, "weights of a ConvNeXt", "a transformer", "UPerNet stands on a ConvNeXt here")
    if size is not None:
        published = resize_positions(published, size)
    encoder = dataclasses.replace(
        published.config.encoder, drop_path_rate=ours.drop_path_rate, remat=ours.remat, dtype=config.train.dtype,
        response_scope="sample",
    )  # fmt: skip
    found: Any = published.config
    if isinstance(found, UperNetConfig):
        sizes, labels = dataclasses.replace(found, encoder=encoder), task_labels(published.task, found.classes)
        # The norm after the encoder is a classifier's.
        params = {name: value for name, value in published.params.items() if name != "norm"}
    else:
        sizes, labels = UperNetConfig(encoder, 2, config.width, config.auxiliary_width), None
        params = take_encoder(dict(published.params), convnext_encoder(encoder), str(config.weights))
    licence, lines = published.report.licence, published.report.lines
    return SegmenterStart(sizes, published.preprocess, params, labels, licence, tuple(lines))


def model_record(start: SegmenterStart, labels: tuple[int, ...]) -> dict[str, Any]:
    """Return what `load_published` has to know of a segmenter; its task names the values of the label maps."""
    return {
        "family": "profound", "kind": "segmenter", "config": to_record(start.sizes), "licence": start.licence,
        "preprocess": to_record(start.preprocess), "task": to_record(label_task(labels)),
    }  # fmt: skip


def page(run: Finished[Config, Summary]) -> Page:
    """Show how well label maps are found, and some of them."""
    return segment_page(run, "ProFound segmentation", SOURCE)

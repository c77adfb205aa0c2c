"""ProFound predict: probabilities and what moved them, or label maps, on the grid of each case's first sequence."""

import dataclasses
from functools import partial
from typing import Any

from jaxmed.config import checked
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.models.upernet import UperNetConfig
from jaxmed.recipes import predict_stage, segment_cases
from jaxmed.recipes.encoder_calls import view_classifier
from jaxmed.recipes.map_files import BatchConfig
from jaxmed.recipes.predict_stage import PredictConfig, PredictFlags, predict_page, run_predict
from jaxmed.recipes.scan_job import ScanData, ScansConfig
from jaxmed.recipes.segment_sections import segment_page
from jaxmed.recipes.segment_stage import run_segmenter
from jaxmed.recipes.stage import Finished, Page, nested_run
from jaxmed.systems.profound.adaptation import load_weights, pretrain_on, segmenter_of
from jaxmed.systems.profound.cases import SOURCE, CaseFiles, write_cases
from jaxmed.systems.profound.scoring import score_case
from jaxmed.train.log import Log
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True
Summary = predict_stage.Summary | segment_cases.Summary


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Predictions of an adapted classifier or regressor, or label maps of a segmenter.

    Attributes:
        predict: What is asked of the cases. Where the weights are a segmenter's (profound segment), every case gets a
            label map, and --label.columns names the column of true ones, against which they are scored; cases go one
            by one, on one device.
        preprocess: How the files of a case are named, where it is not as the weights expect.
    """

    predict: PredictFlags = PredictConfig()
    preprocess: CaseFiles = CaseFiles()


def paper() -> Config:
    """A map of the predicted class of every case, in bfloat16 on all devices."""
    return Config(PredictConfig(ScansConfig(batch=BatchConfig(8, 8), mesh=MeshConfig(), dtype="bfloat16")))


def smoke() -> Config:
    """In seconds: your cases or phantoms, your weights or a tiny classifier of lesions made on the spot."""
    return Config(PredictConfig(ScansConfig(ScanData(synthetic=60)), shown=3))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, predict and measure every case, write tables, maps and report. Returns 1 when cases failed."""
    scans, notes = with_synthetic(config.predict.scans, folder)
    load = partial(load_weights, config.preprocess, task=config.predict.task.task)
    look = partial(view_classifier, where=scans.weights, system="profound")
    scorer = partial(score_case, config.preprocess.apply(PREPROCESS).sequences)
    if scans.weights is not None:
        published = load(scans.weights)
        if isinstance(published.config, UperNetConfig):
            segmenter = segmenter_of(published, scans.weights, scans.dtype)
            columns, shown = config.predict.label.columns, config.predict.shown
            return run_segmenter(config, scans, published, segmenter, columns, shown, page, folder, notes, scorer)
        load = {scans.weights: published}.__getitem__  # large files are read once
    return run_predict(config, config.predict, scans, load, look, page, folder, notes, scorer)


def with_synthetic(scans: ScansConfig, folder: RunFolder) -> tuple[ScansConfig, list[str]]:
    """Write phantoms where no cases are given; where no weights are, pre-train and fit a probe on such phantoms."""
    if not scans.needs_synthetic():
        return scans, []
    given, seed = scans.weights, scans.seed
    start(folder)
    manifest = write_cases(folder, seed, scans.data.synthetic, fractions=(0.5, 0.2, 0.3))
    if scans.is_synthetic:
        data = dataclasses.replace(scans.data, manifest=manifest, split=scans.data.split or "test")
        scans = dataclasses.replace(scans, data=data)
    if given is not None:
        return scans, []
    changes = {
        "labelled.data.manifest": manifest, "labelled.data.synthetic": 0, "labelled.adapt.mode": "logistic",
        "labelled.weights": pretrain_on(folder, manifest, seed), "labelled.hidden": 0,
    }  # fmt: skip
    nested = nested_run(
        folder, "profound adapt", changes, Log(folder.path, folder.options.quiet),
        "Fitting a probe to the lesions of the synthetic cases.",
    )  # fmt: skip
    note = "No weights were given: the model is a tiny one made for this run on phantoms, and means nothing."
    return dataclasses.replace(scans, weights=nested.outputs / "model"), [note]


def page(run: Finished[Config, Any]) -> Page:
    """Show predictions, scores and maps."""
    if isinstance(run.summary, segment_cases.Summary):
        return segment_page(run, "ProFound label maps", SOURCE)
    return predict_page(run, "ProFound predictions", SOURCE)

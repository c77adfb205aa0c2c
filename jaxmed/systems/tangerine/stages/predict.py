"""TANGERINE predict: probabilities, and a map of what moved them, on the grid of each scan."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.arrays.task import Task
from jaxmed.config import checked, to_record
from jaxmed.data.preprocess import FileAxes
from jaxmed.data.scans import find_records
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig
from jaxmed.models.published.load import load_published
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.nn.model import make_model
from jaxmed.recipes.encoder_calls import view_classifier
from jaxmed.recipes.encoder_features import features
from jaxmed.recipes.map_files import BatchConfig
from jaxmed.recipes.predict_stage import PredictConfig, PredictFlags, Summary, predict_page, run_predict
from jaxmed.recipes.probe import fit_probe
from jaxmed.recipes.scan_job import ScanData, ScansConfig
from jaxmed.recipes.stage import Finished, Page
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort
from jaxmed.systems.tangerine.adaptation import CHESTS, SMALL_SHAPE, SOURCE, load_weights
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Predictions of an adapted classifier or regressor.

    Attributes:
        predict: What is asked of the scans.
        preprocess: How the files' axes lie, where it is not as the weights expect.
    """

    predict: PredictFlags = PredictConfig()
    preprocess: FileAxes = FileAxes()


def paper() -> Config:
    """A map of the predicted class of every scan, in bfloat16 on all devices."""
    return Config(PredictConfig(ScansConfig(batch=BatchConfig(16, 8), mesh=MeshConfig(), dtype="bfloat16")))


def smoke() -> Config:
    """In seconds: your scans or phantom chests, your weights or a tiny classifier of emphysema made on the spot."""
    return Config(PredictConfig(ScansConfig(ScanData(synthetic=60)), shown=3))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, predict every scan, write tables, maps and report. Returns 1 when scans failed."""
    scans, notes = with_synthetic(config.predict.scans, folder)
    load = partial(load_weights, config.preprocess, task=config.predict.task.task)
    look = partial(view_classifier, where=scans.weights, system="tangerine")
    return run_predict(config, config.predict, scans, load, look, page, folder, notes)


def with_synthetic(scans: ScansConfig, folder: RunFolder) -> tuple[ScansConfig, list[str]]:
    """Write phantom chests where no scans are given; where no weights are, fit a tiny classifier to such chests."""
    if not scans.needs_synthetic():
        return scans, []
    given, seed = scans.weights, scans.seed
    shape = SMALL_SHAPE if given is None else load_published(given, "tangerine").preprocess.volume_size
    start(folder)
    place = folder.path / "inputs"
    manifest = write_chest_cohort(
        place, seed, scans.data.synthetic, shape, CHESTS, finding="emphysema", fractions=(0.5, 0.2, 0.3)
    )
    note = "No weights were given: the model is a tiny classifier of phantom chests; its predictions mean nothing."
    if scans.is_synthetic:
        data = ScanData(manifest, scans.data.split or "test")
        scans = dataclasses.replace(scans, data=data)
        note = (
            "Chests are phantoms. The model is a tiny encoder with random weights under a logistic probe, fitted for "
            "this run to the training chests (emphysema or not)."
        )
    if given is not None:
        return scans, []
    make_classifier(place / "model", manifest, seed)
    return dataclasses.replace(scans, weights=place / "model"), [note]


def make_classifier(place: Path, manifest: Path, seed: int) -> None:
    """Fit a logistic probe to the features of an encoder with random weights, and export both as a classifier."""
    encoder = VitConfig(SMALL_SHAPE, (4, 4, 4), width=48, depth=1, heads=2, hidden=96, final_norm=False)
    model = ClassifierConfig(encoder, HeadConfig(norm=False))
    preprocess = dataclasses.replace(PREPROCESS, size=SMALL_SHAPE)
    image = np.zeros((1, *SMALL_SHAPE, 1), np.float32)
    params = jax.jit(make_model(Classifier(model)).init)(jax.random.key(seed), image)
    found: dict[str, tuple[Any, Any]] = {}
    for split in ("train", "validation"):
        records, _ = find_records(manifest, None, split)
        cubes = np.stack([preprocess(record.scan) for record in records])
        labels = np.array([[float(record.row["label"])] for record in records])
        seen = features(vit_encoder(encoder), model.head, params, cubes)
        found[split] = (np.asarray(seen["concat"]), labels)
    probe = fit_probe("binary", *found["train"], *found["validation"], np.ones(1))
    params["head"]["linear"] = {"kernel": probe.kernel, "bias": probe.bias}
    record = {
        "family": "tangerine", "kind": "classifier", "config": to_record(model), "preprocess": to_record(preprocess),
        "task": to_record(Task("binary", ("emphysema",))),
    }  # fmt: skip
    export_parameters(place, params, record)


def page(run: Finished[Config, Summary]) -> Page:
    """Show predictions, scores and maps."""
    return predict_page(run, "TANGERINE predictions", SOURCE)

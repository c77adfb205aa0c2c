"""RETFound predict: probabilities, and a map of what moved them, for every image."""

import dataclasses
from functools import partial

from jaxmed.config import checked
from jaxmed.recipes.encoder_calls import view_classifier
from jaxmed.recipes.map_files import BatchConfig
from jaxmed.recipes.predict_stage import PredictConfig, PredictFlags, Summary, predict_page, run_predict
from jaxmed.recipes.scan_job import ScanData, ScansConfig
from jaxmed.recipes.stage import Finished, Page
from jaxmed.systems.retfound.adaptation import SOURCE, GivenFlags, WeightsInput, load_weights, scans_with_synthetic
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Predictions of an adapted classifier or regressor.

    Attributes:
        predict: What is asked of the images.
        given: Size of the images, and how pictures become the input.
    """

    predict: PredictFlags = PredictConfig()
    given: GivenFlags = WeightsInput()


def paper() -> Config:
    """A map of the predicted class of every image, in bfloat16 on all devices."""
    return Config(PredictConfig(ScansConfig(batch=BatchConfig(64, 8), mesh=MeshConfig(), dtype="bfloat16")))


def smoke() -> Config:
    """In seconds: your images or phantom eyes, your weights or a tiny classifier adapted on the spot."""
    return Config(PredictConfig(ScansConfig(ScanData(synthetic=60)), shown=3))


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, predict every image, write tables, maps and report. Returns 1 when images failed."""
    scans, notes = scans_with_synthetic(config.predict.scans, folder, is_classifier=True)
    load = partial(load_weights, config.given, task=config.predict.task.task)
    look = partial(view_classifier, where=scans.weights, system="retfound")
    return run_predict(config, config.predict, scans, load, look, page, folder, notes)


def page(run: Finished[Config, Summary]) -> Page:
    """Show predictions, scores and maps."""
    return predict_page(run, "RETFound study: predictions", SOURCE)

"""Published and own weights: from a file to a model that runs, and back to the original key names."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.arrays.types import Params
from jaxmed.models.heads import ClassifierConfig, Task
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.nn.model import Model


class ImportReport(NamedTuple):
    """What became of the tensors of a file.

    Attributes:
        family: Whose weights these are, such as "tangerine".
        kind: "mae" or "classifier".
        used: Tensors that became parameters.
        left_over: Tensors of the file that have no place in the model.
        missing: Parameters that the file does not hold.
        licence: What the licence allows, in a sentence.
    """

    family: str
    kind: str
    used: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    licence: str


@dataclasses.dataclass(frozen=True)
class Published:
    """A model with its weights.

    Attributes:
        model: `model.apply(params, ...)` runs it.
        params: Its parameters, float32.
        preprocess: A file or volume to the model's input.
        config: The model's sizes.
        report: Where the weights came from.
        task: What the outputs mean, of a classifier.
    """

    model: Model
    params: Params
    preprocess: Preprocess
    config: MaeConfig | ClassifierConfig
    report: ImportReport
    task: Task | None = None


def load_published(path: str | Path, family: str = "auto") -> Published:
    """Read weights of any supported kind."""

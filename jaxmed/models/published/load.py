"""Weights from outside and from own runs, as a model that can be run; and back to the original key names."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.arrays.types import Params
from jaxmed.config import from_record
from jaxmed.errors import InputError
from jaxmed.models.heads import Classifier, ClassifierConfig, Task
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.parameters import load_parameters
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import Model, make_model

OWN_LICENCE = "own run; where it started from published weights, their licence holds"


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
    path = Path(path)
    for folder in (path, path / "outputs" / "model"):
        if (folder / "record.json").exists():
            return _load_own(folder)
    raise InputError(path, "a folder of parameters, or a run that made one", "neither", "check the path")


def _load_own(folder: Path) -> Published:
    params, record = load_parameters(folder)
    where = str(folder / "record.json")
    kind, family = str(record.get("kind")), str(record.get("family"))
    config_kind = {"mae": MaeConfig, "classifier": ClassifierConfig}.get(kind)
    if config_kind is None:
        raise InputError(where, "kind 'mae' or 'classifier'", f"'{kind}'")
    config = from_record(config_kind, record.get("config"), where)
    preprocess = from_record(Preprocess, record.get("preprocess"), where)
    task = from_record(Task, record["task"], where) if record.get("task") is not None else None
    report = ImportReport(family, kind, (), (), (), str(record.get("licence", OWN_LICENCE)))
    return Published(_make_model(config, params), params, preprocess, config, report, task)


def _make_model(config: MaeConfig | ClassifierConfig, params: Params) -> Model:
    if isinstance(config, ClassifierConfig):
        return make_model(Classifier(config))
    return make_model(Mae(config)) if "decoder" in params else _encoder_model(config.encoder)


def _encoder_model(config: VitConfig) -> Model:
    """Return a model whose parameters are {"encoder": ...}: image to tokens."""
    vit = make_model(Vit(config))

    def init(key: Any, *inputs: Any, **options: Any) -> Params:
        return {"encoder": vit.init(key, *inputs, **options)}

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        return vit.apply(params["encoder"], *inputs, **options)

    return Model(init, apply)

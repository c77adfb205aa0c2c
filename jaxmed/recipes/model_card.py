"""The card of a model that a run trained: README.md beside its parameters, in the form that model hubs read.

A header of YAML says licence, tags and scores for machines; below it stand, for people, what the model is, what it was
trained on, its scores with intervals, its input, how it is loaded and what it is not for. A folder of outputs/model can
then be handed on as it is: the card names files without their folders, and nobody's notes.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.config import from_record
from jaxmed.data.preprocess import Preprocess, differences
from jaxmed.files import read_record, write_text
from jaxmed.io.tables import read_table
from jaxmed.models.published.load import FAMILIES, OWN_LICENCE
from jaxmed.train.log import read_metrics
from jaxmed.versions import software_name

NAME = "README.md"
# Shown of every preprocessing, default or not.
ALWAYS = dict.fromkeys(("size", "axes", "fit", "interpolation", "edge", "kind"))
# Words of a licence, and how hubs call it; of several, or of one with conditions of its own, they hear "other".
LICENCES = (
    (r"CC[- ]BY[- ]NC[- ]4|CC[- ]BY[- ]NC 4", "cc-by-nc-4.0"), (r"Apache-2", "apache-2.0"), (r"\bMIT\b", "mit"),
    (r"BSD 2", "bsd-2-clause"), (r"BSD 3", "bsd-3-clause"),
)  # fmt: skip
# Words of kinds of models that are no word themselves.
KINDS = {"mae": "masked autoencoder", "fcmae": "convolutional masked autoencoder", "unet": "U-Net"}
CONDITIONAL = r"ask the|ambiguous|their terms|licence holds"
INTERVALS = ("set", "label", "measure", "estimate", "low", "high")


@dataclasses.dataclass(frozen=True)
class CardScore:
    """One score of a model: of which set and label, its estimate, and the ends of its 95 % interval, where known."""

    set: str
    label: str
    measure: str
    estimate: float
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        """The measure with its label and interval."""
        name = f"{self.measure} of {self.label}" if self.label else self.measure
        return f"{name}{'' if self.low is None else f' (95 % interval {self.low:.4g} to {self.high:.4g})'}"


def write_cards(run: Path) -> list[Path]:
    """Write README.md beside every model in the outputs of a run whose summary is written; return where.

    Nothing in it depends on when or where the run was: equal runs have equal cards.
    """
    outputs = run / "outputs"
    places = [place.parent for pattern in ("*/record.json", "*/*/record.json") for place in outputs.glob(pattern)]
    places = sorted(place for place in places if (place / "parameters.safetensors").exists())
    if places:
        record, summary = read_record(run / "config.json"), read_record(outputs / "summary.json")
        scores = find_scores(run)
        for place in places:
            write_text(place / NAME, make_card(record, summary, read_record(place / "record.json"), scores, place.name))
    return [place / NAME for place in places]


def find_scores(run: Path) -> list[CardScore]:
    """Return the scores of a run: of outputs/metrics.csv with intervals; else those of its last evaluation."""
    path = run / "outputs" / "metrics.csv"
    if path.exists():
        table = read_table(path)
        if set(INTERVALS) <= set(table.columns):
            numbers = {name: table.floats(name, allow_missing=True) for name in INTERVALS[3:]}
            rows = zip(table.rows, *numbers.values(), strict=True)
            return [
                CardScore(row["set"], row["label"], row["measure"], estimate, *(_ends(low, high)))
                for row, estimate, low, high in rows if math.isfinite(estimate)
            ]  # fmt: skip
    found: dict[str, float] = {}
    for line in read_metrics(run):
        found |= {name: value for name, value in line.items() if "evaluation/" in name}
    return [CardScore("held out", "", name.replace("evaluation/", ""), value) for name, value in found.items()]


def make_card(
    record: Mapping[str, Any],
    summary: Mapping[str, Any],
    model: Mapping[str, Any],
    scores: Sequence[CardScore],
    place: str = "model",
) -> str:
    """Return the text of a card.

    Args:
        record: config.json of the run.
        summary: outputs/summary.json of it.
        model: record.json of the model.
        scores: What it was scored by.
        place: Name of its folder.
    """
    system, stage = str(record["system"]), str(record["stage"])
    family, licence = str(model.get("family", "")), str(model.get("licence", OWN_LICENCE))
    name = f"{system} {stage}" + (f", {place}" if place != "model" else "")
    kind = str(model.get("kind", "model"))
    lines = [
        "---",
        *_header(system, stage, kind, licence, family, scores, model),
        "---",
        "",
        f"# {name}",
        "",
        f"{_with_article(kind)} trained by `jaxmed {system} {stage}` ({software_name()}).",
        "",
        *(f"{text}\n" for text in _about(system)),
        "**Not for clinical use.** It was made for research; nobody has approved it for anything else.",
        "",
        "## Data",
        "",
        *(f"- {text}" for text in _data(record["config"], summary)),
        "",
        "## Scores",
        "",
        *_score_table(scores),
        "",
        "## Input",
        "",
        _input(model),
        "",
        "## How to load it",
        "",
        "```python",
        *_example(family, model),
        "```",
        "",
        "## Licence",
        "",
        f"{licence[:1].upper()}{licence[1:]}.",
    ]
    return "\n".join(lines) + "\n"


def preprocessing_words(given: Preprocess) -> str:
    """Say what differs from the plainest preprocessing, and the fields that decide most."""
    shown = {**ALWAYS, **differences(given, Preprocess())}
    values = {name: getattr(given, name, getattr(given.intensity, name, None)) for name in shown}
    return ", ".join(f"{name} {_told(name, value)}" for name, value in values.items())


def licence_name(licence: str) -> str:
    """Return a hub's word for a licence that is told in a sentence; "other" where no single one is meant."""
    found = {name for pattern, name in LICENCES if re.search(pattern, licence)}
    return found.pop() if len(found) == 1 and not re.search(CONDITIONAL, licence) else "other"


def _with_article(kind: str) -> str:
    words = KINDS.get(kind, re.sub("[-_]", " ", kind))
    return f"{'An' if words[:1] in tuple('aeio') else 'A'} {words}"


def _header(
    system: str, stage: str, kind: str, licence: str, family: str, scores: Sequence[CardScore], model: Mapping[str, Any]
) -> list[str]:
    """Return the lines of YAML; text is quoted as JSON, which is YAML too."""
    known = licence_name(licence)
    lines = [f"license: {known}"]
    if known == "other":
        lines += ["license_name: see-below", "license_link: README.md"]
    tags = dict.fromkeys(["medical-imaging", "jax", "jaxmed", system, family or system, kind])
    lines += ["library_name: jaxmed", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if scores:
        lines += ["metrics:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(one.measure for one in scores))]
        lines += ["model-index:", f"- name: {json.dumps(f'jaxmed {system} {stage}')}", "  results:"]
    for name in dict.fromkeys(one.set for one in scores):
        lines += ["  - task:", f"      type: {_task(model)}", "    dataset:"]
        lines += [f"      name: {json.dumps(name)}", f"      type: {json.dumps(name)}", "    metrics:"]
        for one in scores:
            if one.set == name:
                lines += [f"    - type: {json.dumps(one.measure)}", f"      value: {one.estimate:.6g}"]
                lines += [f"      name: {json.dumps(one.words)}"]
    return lines


def _about(system: str) -> list[str]:
    """Return what a system says of itself first: what it is, and its paper."""
    place = f"jaxmed.systems.{system}"
    if importlib.util.find_spec(place) is None:  # one that is not in the package
        return []
    parts = (importlib.import_module(place).__doc__ or "").split("\n\n")
    return [" ".join(part.split()) for part in parts[:2]]


def _task(model: Mapping[str, Any]) -> str:
    if "task" in model:
        return "image-classification"
    is_made = str(model.get("kind")) in ("denoiser", "enhancer", "unet", "controlnet", "autoencoder")
    return "image-to-image" if is_made else "image-feature-extraction"


def _data(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Say which files were given, by their names alone, and how many of what was trained on."""
    given = list(_files(config))
    files = [f"{name}: {file}" for name, file in given]
    if all(re.search("weights|warm_start|anchor", name) for name, _ in given):
        files.append("synthetic records drawn by jaxmed, of no patient")
    counts = [f"{name}: {_counted(value)}" for name, value in summary.items() if isinstance(value, dict)]
    numbers = [
        f"{name.replace('_', ' ')}: {format(value, ',' if isinstance(value, int) else '.6g')}"
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not re.search("second|rate", name)
    ]
    return [*files, *(count for count in counts if not count.endswith(": ")), *numbers]


def _files(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every file that a configuration names: its field and its own name."""
    if name.rpartition(".")[2] in ("cache", "coordinator"):
        return
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _files(value, f"{name}.{key}".strip("."))
    elif isinstance(config, list):
        for value in config:
            yield from _files(value, name)
    elif isinstance(config, str):
        before, mark, path = config.rpartition("=")
        if path.startswith("/"):
            yield name, f"{before}{mark}{Path(path).name}"


def _counted(value: Mapping[str, Any]) -> str:
    parts = []
    for name, count in value.items():
        if isinstance(count, Mapping) and (inner := _counted(count)):
            parts.append(f"{name} ({inner})")
        elif isinstance(count, int) and not isinstance(count, bool):
            parts.append(f"{count:,} {name}")
    return ", ".join(parts)


def _score_table(scores: Sequence[CardScore]) -> list[str]:
    if not scores:
        return ["It was not scored on records that were held out."]
    lines = ["| Set | Label | Measure | Estimate | 95 % interval |", "|---|---|---|---|---|"]
    for one in scores:
        interval = "" if one.low is None else f"{one.low:.4g} to {one.high:.4g}"
        lines.append(f"| {one.set} | {one.label} | {one.measure} | {one.estimate:.4g} | {interval} |")
    if all(one.low is None for one in scores):
        lines += ["", "Of the last evaluation during training: numbers without intervals."]
    return lines


def _input(model: Mapping[str, Any]) -> str:
    if "preprocess" not in model:
        return "As record.json beside the parameters says."
    preprocess = from_record(Preprocess, model["preprocess"], "record.json")
    return f"`published.preprocess` makes it of a file: {preprocessing_words(preprocess)}."


def _example(family: str, model: Mapping[str, Any]) -> list[str]:
    if family not in FAMILIES or "preprocess" not in model:
        return [
            "from pathlib import Path",
            "from jaxmed.io.weights_files import load_parameters",
            "",
            'params, record = load_parameters(Path("FOLDER"))  # this folder',
        ]
    return [
        "from jaxmed.models.published.load import load_published",
        "",
        'published = load_published("FOLDER")  # this folder',
        'image = published.preprocess("FILE")',
        "output = published.model.apply(published.params, image[None])",
    ]


def _told(name: str, value: Any) -> str:
    if name == "size":
        return " x ".join(map(str, value))
    if not isinstance(value, tuple):
        return str(value)
    if any(isinstance(part, str) for part in value):
        return ", ".join(map(str, value))
    return " to ".join(f"{part:g}" for part in value)


def _ends(low: float, high: float) -> tuple[float, float] | tuple[None, None]:
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)

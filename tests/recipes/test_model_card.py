"""Cards of trained models: what a hub's reader and a person find in them, and that equal runs have equal ones."""

import json

import numpy as np
import pytest
import yaml

from jaxmed.config import to_record
from jaxmed.io import safetensors
from jaxmed.io.tables import write_table
from jaxmed.models.published.load import FAMILIES, OWN_LICENCE
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.recipes.model_card import find_scores, licence_name, write_cards

pytestmark = pytest.mark.core

RECORD = {
    "family": "tangerine", "kind": "classifier", "preprocess": to_record(PREPROCESS),
    "licence": FAMILIES["tangerine"].licence, "task": {"kind": "binary"},
}  # fmt: skip
COLUMNS = ("set", "group", "label", "measure", "estimate", "low", "high")
ROWS = [
    ("test", "unseen", "effusion", "auroc", 0.91, 0.85, 0.96),
    ("test", "unseen", "", "loss", 0.31, None, None),
    ("elsewhere", "other", "effusion", "auroc", 0.8, 0.7, 0.9),
    ("elsewhere", "other", "effusion", "ece", None, None, None),
]


def write_run(path, record=RECORD, *, manifest="/secret/place/scans.csv", metrics=True, place="model"):
    model = path / "outputs" / place
    model.mkdir(parents=True)
    config = {"labelled": {"data": {"manifest": manifest, "external": ["elsewhere=/secret/b.csv"], "cache": "/c"},
                           "weights": "/secret/mae.pth"}, "seed": 0}  # fmt: skip
    (path / "config.json").write_text(json.dumps({"system": "tangerine", "stage": "adapt", "config": config}))
    summary = {"records": {"train": 70, "test": 15}, "parameters": 1234567, "notes": ["/secret/note"], "mode": "full",
               "seconds_to_best": 3.2}  # fmt: skip
    (path / "outputs" / "summary.json").write_text(json.dumps(summary))
    (model / "record.json").write_text(json.dumps(record))
    safetensors.write(model / "parameters.safetensors", {"a": np.zeros(1, np.float32)})
    lines = [{"step": 5, "evaluation/error": 2.0, "steps_per_second": 7.0}, {"step": 9, "evaluation/error": 1.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if metrics:
        write_table(path / "outputs" / "metrics.csv", COLUMNS, [dict(zip(COLUMNS, row, strict=True)) for row in ROWS])
    return path


def read(card):
    _, header, body = card.read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_card_says_to_machines_and_people_what_a_model_is(tmp_path):
    (card,) = write_cards(write_run(tmp_path / "run"))
    assert card == tmp_path / "run" / "outputs" / "model" / "README.md"
    header, body = read(card)
    assert header["license"] == "cc-by-nc-4.0" and header["library_name"] == "jaxmed"
    assert {"medical-imaging", "tangerine", "classifier"} <= set(header["tags"])
    assert header["metrics"] == ["auroc", "loss"]
    (index,) = header["model-index"]
    test, elsewhere = index["results"]
    assert test["task"] == {"type": "image-classification"} and test["dataset"]["name"] == "test"
    assert test["metrics"][0] == {
        "type": "auroc", "value": 0.91, "name": "auroc of effusion (95 % interval 0.85 to 0.96)",
    }  # fmt: skip
    assert elsewhere["metrics"] == [
        {"type": "auroc", "value": 0.8, "name": "auroc of effusion (95 % interval 0.7 to 0.9)"}
    ]
    for words in (
        "# tangerine adapt", "A classifier trained by", "arXiv:2507.01881", "Not for clinical use",
        "labelled.data.manifest: scans.csv",
        "elsewhere=b.csv", "labelled.weights: mae.pth", "records: 70 train, 15 test", "parameters: 1,234,567",
        "| test | effusion | auroc | 0.91 | 0.85 to 0.96 |", "size 256 x 256 x 256", "CC-BY-NC 4.0: no commercial use",
    ):  # fmt: skip
        assert words in body, words
    assert "/secret" not in body and "seconds" not in body and "synthetic" not in body
    lines = body.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len(lines) == 5 and "load_published" in lines[0]
    compile("\n".join(lines), "card", "exec")


def test_equal_runs_in_other_places_have_equal_cards(tmp_path):
    cards = [write_cards(write_run(tmp_path / place, manifest=f"/{place}/scans.csv"))[0].read_bytes() for place in "ab"]
    assert cards[0] == cards[1]


def test_a_model_without_intervals_or_files_says_so(tmp_path):
    record = {"family": "noddi_network", "config": {}}
    run = write_run(tmp_path / "run", record, metrics=False, place="policy", manifest=None)
    config = json.loads((run / "config.json").read_text())
    config["config"]["labelled"]["data"]["external"] = []
    (run / "config.json").write_text(json.dumps(config))
    (card,) = write_cards(run)
    header, body = read(card)
    assert header["license"] == "other" and header["license_link"] == "README.md"
    assert "# tangerine adapt, policy" in body and "synthetic records drawn by jaxmed, of no patient" in body
    assert "numbers without intervals" in body and "| held out |  | error | 1.5 |  |" in body
    assert "load_parameters" in body and "record.json beside the parameters" in body
    assert OWN_LICENCE[5:] in body
    # The last evaluation counts.
    assert [(one.measure, one.estimate) for one in find_scores(run)] == [("error", 1.5)]


def test_folders_that_hold_no_model_get_no_card(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "outputs" / "model" / "parameters.safetensors").unlink()
    assert write_cards(run) == [] and not list(run.rglob("README.md"))


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        (FAMILIES["tangerine"].licence, "cc-by-nc-4.0"), (FAMILIES["retfound"].licence, "cc-by-nc-4.0"),
        (FAMILIES["dinov2"].licence, "other"), (FAMILIES["brainfm"].licence, "other"),
        (FAMILIES["profound"].licence, "other"), (OWN_LICENCE, "other"), ("MIT", "mit"), ("Apache-2.0", "apache-2.0"),
    ],
)  # fmt: skip
def test_a_licence_is_named_only_where_it_is_the_one(licence, name):
    assert licence_name(licence) == name

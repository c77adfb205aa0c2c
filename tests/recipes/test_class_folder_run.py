"""A folder of classes through an adaptation: eyes averaged, covariates as a baseline, a folder as external set."""

import csv
import dataclasses

import numpy as np
import pytest
import toy_system
from sklearn.metrics import roc_auc_score

from jaxmed.data.scans import find_records
from jaxmed.errors import InputError
from jaxmed.io.images import write_png
from jaxmed.io.tables import write_table
from jaxmed.recipes import adapt_stage
from jaxmed.recipes.adapt_stage import LabelledData
from jaxmed.train.run_folder import RunOptions, open_run

SUBJECTS = {"train": 20, "val": 10, "test": 12}


def write_folder(root, splits, seed):
    """Write two pictures per subject, of which one alone shows the disc well; return what is known of the subjects."""
    generator, rows = np.random.default_rng(seed), []
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32), indexing="ij"))
    for split, count in splits.items():
        for number in range(count):
            is_ill = number % 2
            for eye in ("left", "right"):
                picture, middle = generator.uniform(0, 0.4, (32, 32)), generator.uniform(8, 24, (2, 1, 1))
                picture += (0.6 if eye == "left" else 0.2) * is_ill * (np.square(places - middle).sum(0) < 25)
                name = f"{split}{number}_{eye}.png"
                write_png(root / split / ("well", "ill")[is_ill] / name, picture)
                rows.append(
                    {"path": name, "subject": f"{split}{number}", "age": round(generator.normal(50 + 9 * is_ill, 6))}
                )
    return rows


def config_of(folder, **data):
    root = folder / "pictures"
    config = toy_system.smoke()
    given = LabelledData(root, external=(f"there={folder / 'there'}",), **data)
    train = dataclasses.replace(config.labelled.adapt.train, epochs=6)
    adapt = dataclasses.replace(config.labelled.adapt, train=train)
    return dataclasses.replace(
        config, labelled=dataclasses.replace(config.labelled, data=given, adapt=adapt, average="subject")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    rows = write_folder(folder / "pictures", SUBJECTS, 0)
    write_table(folder / "who.csv", list(rows[0]), rows)
    write_folder(folder / "there", {"test": 8}, 1)
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    config = config_of(folder, subjects=folder / "who.csv", covariates=("age",))
    run = open_run("toy", "adapt", config, RunOptions(folder / "run", quiet=True))
    assert toy_system.run(config, run) == 0
    return run.outputs


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_subjects_are_scored_by_the_mean_of_their_images(outputs):
    scores = {(row["set"], row["label"], row["measure"]): row for row in rows_of(outputs / "metrics.csv")}
    predictions = rows_of(outputs / "predictions.csv")
    for name, count in (("validation", 10), ("test", 12), ("there", 16)):
        rows = [row for row in predictions if row["set"] == name]
        # The external folder tells no subjects: its pictures are each their own.
        assert len(rows) == (2 * count if name != "there" else count)
        values: dict[str, list[float]] = {}
        for row in rows:
            values.setdefault(row["subject"], []).append(float(row["probability_well"]))
        truth = [next(row["label"] == "well" for row in rows if row["subject"] == subject) for subject in values]
        found = scores[name, "well", "auroc"]
        assert int(found["records"]) == int(found["subjects"]) == count == len(values)
        means = [np.mean(one) for one in values.values()]
        assert float(found["estimate"]) == pytest.approx(roc_auc_score(truth, means), abs=1e-6)
        accuracy = np.mean((np.array(means) >= 0.5) == truth)
        assert float(scores[name, "well", "accuracy"]["estimate"]) == pytest.approx(accuracy)


def test_covariates_stand_beside_the_model(outputs):
    rows = {(row["set"], row["label"]): row for row in rows_of(outputs / "metrics.csv") if row["measure"] == "auroc"}
    alone, both = rows["test", "covariates"], rows["test", "covariates + model"]
    assert 0.5 < float(alone["estimate"]) <= 1 and int(both["records"]) == 12 and float(both["low"]) <= 1
    assert ("there", "covariates") not in rows and ("validation", "covariates") not in rows
    log = (outputs.parent / "log.txt").read_text() + (outputs / "summary.json").read_text()
    assert "there, covariates: one class only among the records whose covariates are known" in log
    assert "the probabilities of 24 images were averaged over 12 subjects" in log
    page = (outputs.parent / "report.html").read_text()
    assert "test, covariates + model" in page


def test_labels_that_do_not_agree_stop_a_run_before_it_starts(folder):
    config = config_of(folder, subject_pattern="^[a-z]+")
    config = dataclasses.replace(config.labelled, data=dataclasses.replace(config.labelled.data, external=()))
    with pytest.raises(InputError, match="one label for all images of subject 'train', found ill and well"):
        adapt_stage.read_sets(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, subject_pattern="", covariates=("bmi",)))
    with pytest.raises(InputError, match="a column 'bmi'"):
        adapt_stage.read_sets(config)


def test_a_folder_of_classes_is_the_manifest_of_a_job(folder):
    labelled, _ = find_records(folder / "pictures", None, split="test")
    assert len(labelled) == 24 and {one.row["label"] for one in labelled} == {"ill", "well"}
    assert all(one.path.is_file() for one in labelled)

"""Labels of a manifest: what they mean, how they are read for a task that is known, and weights of classes."""

import numpy as np
import pytest
from tiny_tangerine import BINARY, CLASSES, LABELS, VALUES

from jaxmed.arrays.task import Task
from jaxmed.data.cohort import read_labelled
from jaxmed.data.labels import LabelConfig, balanced_weights, find_meaning, read_known_targets, read_targets
from jaxmed.errors import InputError

pytestmark = pytest.mark.core


def meaning_of(tmp_path, cells, **config):
    rows = [f"{i}.nii,{i},{cell},{'train' if i else 'validation'}" for i, cell in enumerate([cells[0], *cells])]
    (tmp_path / "t.csv").write_text("\n".join(["path,subject,label,split", *rows]) + "\n")
    settings = LabelConfig(**config)
    table = read_labelled(tmp_path / "t.csv", settings)
    meaning = find_meaning(table, settings, table.column("split"))
    return meaning.task, read_targets(table, settings, meaning)[1:, 0].tolist()


def test_the_kind_of_a_label_is_found(tmp_path):
    assert meaning_of(tmp_path, ["0", "1", "1.0"]) == (Task("binary", ("label",)), [0, 1, 1])
    assert meaning_of(tmp_path, ["sick", "well", "sick"]) == (Task("binary", ("well",)), [0, 1, 0])
    assert meaning_of(tmp_path, ["sick", "well"], positive="sick") == (Task("binary", ("sick",)), [1, 0])
    task, targets = meaning_of(tmp_path, ["10", "9", "2", "10"])
    assert (task.kind, task.names, targets) == ("multiclass", ("2", "9", "10"), [2, 1, 0, 2])
    task, targets = meaning_of(tmp_path, ["1.5", "2.5", "4.5"])
    assert task.kind == "regression" and targets == [1.5, 2.5, 4.5]
    np.testing.assert_allclose([task.mean[0], task.deviation[0]], [np.mean(targets), np.std(targets)])
    assert meaning_of(tmp_path, ["0", "1"], kind="multiclass")[0].names == ("0", "1")


def test_balanced_weights():
    classes = np.array([[0], [0], [0], [1], [2], [2]], np.float32)
    assert balanced_weights(classes, Task("multiclass", ("a", "b", "c"))) == pytest.approx((6 / 9, 2.0, 1.0))
    labels = np.array([[0, 1], [0, np.nan], [1, 0], [0, 1]], np.float32)
    assert balanced_weights(labels, Task("multilabel", ("a", "b"))) == (3.0, 0.5)


def test_labels_are_read_by_task():
    rows = [{"label": "nodule", "age": "61"}, {"label": "", "age": "na"}, {"label": "healthy", "age": "50.5"}]
    nan = np.nan
    np.testing.assert_array_equal(read_known_targets(rows, CLASSES), [[1], [nan], [0]])
    np.testing.assert_array_equal(read_known_targets(rows, VALUES), [[61], [nan], [50.5]])
    assert read_known_targets(rows, LABELS) is None and read_known_targets([{"path": "x"}], BINARY) is None
    np.testing.assert_array_equal(read_known_targets([{"label": "nodule"}, {"label": "0"}], BINARY), [[1], [0]])
    words = [{"finding": "benign"}, {"finding": "nodule"}, {"finding": ""}]
    np.testing.assert_array_equal(read_known_targets(words, BINARY, ("finding",)), [[0], [1], [nan]])
    grades = Task("multiclass", ("0", "1", "2"))
    np.testing.assert_array_equal(read_known_targets([{"label": "2.0"}, {"label": "0"}], grades), [[2], [0]])
    with pytest.raises(InputError, match="column finding: expected 0, 1 or 'nodule', found 'benign'"):
        read_known_targets([*words, {"finding": "unclear"}], BINARY, ("finding",))
    with pytest.raises(InputError, match="label.columns: expected columns of the manifest, finding, found 'lable'"):
        read_known_targets(words, BINARY, ("lable",))

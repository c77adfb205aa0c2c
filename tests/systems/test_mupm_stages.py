"""`jaxmed mupm` on tables of answers: planted coefficients, sites and factors, from files to pages; mistakes."""

import csv
import json

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.data.option_answers import match_answer
from jaxmed.metrics.uncertainty import decile_calibration
from jaxmed.synthesis.phantoms.answers import AnswersConfig, write_answers
from jaxmed.systems.mupm.answers import (
    KEYWORDS,
    AnswerConfig,
    match_keyword,
    read_answers,
    variances_of,
)
from jaxmed.systems.mupm.doubt import given_answers

TINY = ["--preset", "smoke", "--quiet"]


def run(stage, *words):
    return main(["mupm", stage, *map(str, words), *TINY])


def summary_of(path):
    return json.loads((path / "outputs" / "summary.json").read_text())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Forty planted cases of twenty subjects at two sites."""
    return write_answers(tmp_path_factory.mktemp("mupm") / "answers.csv", 0, AnswersConfig())


def test_planted_coefficients_are_found_by_the_command(table, tmp_path):
    assert run("propagate", "--table", table, "--fit.resamples", 200, "--out", tmp_path / "run") == 0
    found = summary_of(tmp_path / "run")
    assert found["cases"] == 40 and found["subjects"] == 20 and found["draws"] == 20
    for name, truth in (("image", 1.0), ("text", 1.0), ("covariance", 0.6)):
        estimate, low, high = found["coefficients"][name]
        assert estimate == pytest.approx(truth, abs=5e-3) and low <= estimate <= high
    assert found["held_out"]["r2"][0] > 0.9999 and found["rank_correlation"] > 0.999
    assert found["ablations"]["V_I, V_T"] < found["held_out_r2"]["r2"]
    assert found["calls"] == {"measured": 63, "predicted": 41}
    assert 0 < found["accuracy"] < 1 and 0.5 < found["doubts"]["V, both varied"]["auroc"] <= 1
    cases, classes = rows_of(tmp_path / "run/outputs/cases.csv"), rows_of(tmp_path / "run/outputs/variances.csv")
    assert len(cases) == 40 and len(classes) == 160
    total = sum(float(row["v"]) for row in classes[:4])
    assert (
        float(cases[0]["v"])
        == pytest.approx(total, rel=1e-5)
        == pytest.approx(float(cases[0]["v_predicted"]), rel=0.02)
    )
    few = rows_of(tmp_path / "run/outputs/few_cases.csv")
    assert [int(row["cases"]) for row in few] == [1, 2, 5, 10, 20] and float(few[-1]["r2"]) > 0.999
    page = (tmp_path / "run/report.html").read_text()
    assert "coefficient of V_I" in page and page.count("<figure>") >= 5
    assert main(["report", str(tmp_path / "run")]) == 0 and (tmp_path / "run/report.html").read_text() == page


def test_the_table_made_without_files_is_planted_with_noise(tmp_path):
    assert run("propagate", "--fit.resamples", 50, "--out", tmp_path / "run") == 0
    found = summary_of(tmp_path / "run")
    assert any("are planted" in note for note in found["notes"])
    # Twenty draws blur each variance by a third of it: a fit is near the planted coefficients, not at them.
    assert 0.3 < found["held_out"]["r2"][0] < 0.99
    assert sum(found["coefficients"][name][0] for name in ("image", "text", "covariance")) == pytest.approx(2.6, abs=1)
    page = (tmp_path / "run/report.html").read_text()
    assert "Predicted against measured." in page and "Estimate against truth." not in page


def test_coefficients_of_one_site_predict_the_other_and_another_table(table, tmp_path):
    """The sites differ in the strength of their perturbations, not in how these add up."""
    other = write_answers(tmp_path / "other.csv", 1, AnswersConfig(cases=8, correlation=0.3))
    words = ["--table", table, "--by", "site", "--data.external", f"elsewhere={other}", "--resamples", 100]
    assert run("transfer", *words, "--out", tmp_path / "run") == 0
    rows = {(row["fitted_on"], row["scored_on"]): row for row in rows_of(tmp_path / "run/outputs/transfer.csv")}
    assert set(rows) == {(one, to) for one in ("north", "south") for to in ("north", "south", "elsewhere")}
    assert all(float(row["r2"]) > 0.999 for row in rows.values())
    found = summary_of(tmp_path / "run")
    assert found["sets"]["elsewhere"] == [8, 4] and "subjects stand in both" in found["notes"][0]
    for site in ("north", "south"):
        assert found["coefficients"][site]["covariance"][0] == pytest.approx(0.6, abs=0.02)


def test_the_factor_that_says_nothing_is_redundant(table, tmp_path):
    assert run("redundancy", "--table", table, "--redraws", 40, "--out", tmp_path / "run") == 0
    factors = summary_of(tmp_path / "run")["factors"]
    assert factors["bmi"]["verdict"] == "redundant" and abs(factors["bmi"]["difference"][0]) < 1e-3
    # Without the history V_T falls by 64 %, and with it V predicted.
    assert factors["history"]["verdict"] == factors["symptoms"]["verdict"] == "matters"
    assert factors["history"]["difference"][2] < factors["symptoms"]["difference"][0] < 0
    # Of the image 64 % of V_I are the affine move's, 36 % the noise's; which phase is seen says nothing.
    assert factors["phase"]["verdict"] == "redundant" and abs(factors["phase"]["difference"][0]) < 1e-3
    assert factors["affine"]["verdict"] == factors["noise"]["verdict"] == "matters"
    assert factors["affine"]["difference"][0] < factors["noise"]["difference"][0] < 0


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def texts(cases=3):
    """Answers as text: A and B in turn with the image varied, always A with the text, a refusal among the joint."""
    for case in range(cases):
        for draw in range(21):
            yield f"c{case}", "image", draw, "AB"[draw % 2] + ". because", "valve"
            yield f"c{case}", "text", draw, "The answer is A", "valve"
            yield (
                f"c{case}",
                "joint",
                draw,
                "I'm sorry, I cannot tell whether it is a valve" if draw == 5 else "B)",
                "valve",
            )
            yield f"c{case}", "repeat", draw, "A", "valve"


def test_sampled_answers_become_one_hot_with_refusals_apart(tmp_path):
    path = write(tmp_path / "t.csv", ["case", "branch", "draw", "answer", "label"], texts())
    config = AnswerConfig(options=("valve", "failure"))
    answers = read_answers(path, config, 0)
    assert answers.classes == ("valve", "failure", "refusal", "other") and answers.branches.answers.shape == (
        3,
        3,
        20,
        4,
    )
    found = variances_of(answers, config)
    np.testing.assert_allclose(found.image[0], [0.25 * 20 / 19, 0.25 * 20 / 19, 0, 0], rtol=1e-6)
    assert (np.asarray(found.text) == 0).all() and float(found.joint[0, 2]) == pytest.approx(0.05, rel=1e-5)
    assert (answers.labels == 0).all() and (given_answers(answers) == 0).all()
    assert "3 of 252 answers are of the class 'refusal'." in answers.notes
    less = variances_of(answers, AnswerConfig(options=("valve", "failure"), subtract_noise=True))
    np.testing.assert_allclose(less.image, found.image)  # identical inputs gave identical answers


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "failure"), ("(b) heart failure", "failure"), ("A. valve disease", "valve"),
        ("Answer: C", "ischaemic heart"), ("A failure is likely", "failure"), ("The answer is a valve", "valve"),
        ("ischaemic heart failure", "ischaemic heart"),
        ("I cannot answer, it may be failure", "refusal"), ("nothing of these", "other"), ("D", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_letters_come_before_names_and_refusals_are_a_class(text, option):
    assert match_answer(text, ("valve", "failure", "ischaemic heart")) == option


def test_the_released_reading_takes_the_first_keyword_and_drops_the_rest(tmp_path):
    assert match_keyword("Heart Failure, then valve") == "Failure" and match_keyword("none") is None
    assert match_keyword("valve, cardiac arrest") == "Cardiac"  # in the order of the list, not of the answer
    words = ["valve", "heart failure", "none of these"]
    rows = [
        (f"c{case}", branch, draw, words[(draw + case) % (3 if branch == "joint" else 2)])
        for case in range(2) for branch in ("image", "text", "joint") for draw in range(21)
    ]  # fmt: skip
    path = write(tmp_path / "t.csv", ["case", "branch", "draw", "answer"], rows)
    answers = read_answers(path, AnswerConfig(match_release=True), 0)
    assert answers.classes == KEYWORDS and len(KEYWORDS) == 11
    counts = answers.branches.is_valid.sum(axis=2)
    assert (counts[:, :2] == 20).all() and (counts[:, 2] == 14).all()  # 20 of 21; 7 answers hold no keyword
    again = read_answers(path, AnswerConfig(match_release=True), 1)
    assert (again.branches.is_valid != answers.branches.is_valid).any()
    variance = np.asarray(variances_of(answers, AnswerConfig(match_release=True)).image)
    share = answers.branches.answers[:, 0][answers.branches.is_valid[:, 0]].reshape(2, 20, 11).mean(axis=1)
    np.testing.assert_allclose(variance, 20 / 19 * share * (1 - share), rtol=1e-5, atol=1e-7)


def test_probabilities_that_are_cut_off_have_a_rest(tmp_path):
    rows = [("c", branch, draw, 0.6, 0.3) for branch in ("image", "text") for draw in range(3)]
    answers = read_answers(
        write(tmp_path / "t.csv", ["case", "branch", "draw", "p_yes", "p_no"], rows), AnswerConfig(), 0
    )
    assert answers.classes == ("yes", "no", "other")
    np.testing.assert_allclose(answers.branches.answers[0, 0, 0], [0.6, 0.3, 0.1], rtol=1e-5)


def test_the_released_calibration_against_a_transcription():
    rng = np.random.default_rng(0)
    variances, right = rng.uniform(0, 0.2, (50, 4)), rng.random(50) < 0.6
    norm = np.sqrt((variances**2).sum(1))
    order, total = np.argsort(norm), 0.0
    for part in np.array_split(order, 10):  # fifty different values: deciles of five
        total += abs(right[part].mean() - (norm[part] / (1 + norm[part])).mean()) * 5 / 50
    assert decile_calibration(variances, right) == pytest.approx(total)


GOOD = ["case", "branch", "draw", "p_a", "p_b"]


@pytest.mark.parametrize(
    ("stage", "columns", "rows", "message"),
    [
        ("propagate", ["case", "branch", "draw"], [("c", "image", 1)], "expected a column 'answer'"),
        ("propagate", GOOD, [], "expected at least one record"),
        ("propagate", GOOD, [("c", "img", 1, 0.5, 0.5)], "line 2: expected image, text, joint or repeat"),
        ("propagate", GOOD, [("c", "image", 1.5, 0.5, 0.5)], "line 2: expected a whole number under 'draw'"),
        ("propagate", GOOD, [("c", "image", -1, 0.5, 0.5)], "line 2: expected 0 or a larger number"),
        ("propagate", GOOD, [("c", "image", 1, 0.9, 0.5)], "line 2: expected probabilities"),
        ("propagate", GOOD, [("c", "image", 1, "", 0.5)], "line 2: expected a probability for every option"),
        ("propagate", GOOD, [("c", "image", 1, "x", 0.5)], "line 2: expected a number under 'p_a'"),
        ("propagate", GOOD, [("c", "image", 1, 0.5, 0.5)] * 2, "line 3: expected one answer per case"),
        ("propagate", GOOD, [("c", "joint", 1, 0.5, 0.5)], "expected answers of the branches image and text"),
        ("propagate", GOOD, [("c", "image", 1, 0.5, 0.5)], "expected three subjects or more"),
        ("redundancy", GOOD, [("c", "image", 1, 0.5, 0.5)], "expected answers without a factor"),
        ("transfer", GOOD, [("c", "image", 1, 0.5, 0.5)], "by: expected a column that divides the cases"),
        ("propagate", [*GOOD, "label"], [("c", "image", 1, 0.5, 0.5, "z")], "line 2: expected one of the options"),
        (
            "propagate", GOOD,
            [(c, b, d, 0.5, 0.5) for c in "xyz" for b in ("image", "text", "joint") for d in range(4)],
            "expected answers that change with the image, found the same ones everywhere",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(stage, columns, rows, message, tmp_path, capsys):
    path = write(tmp_path / "t.csv", columns, rows)
    assert run(stage, "--table", path, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert (
        message in said
        and said.startswith("jaxmed: ")
        and said.count("\n") == 1
        and "t.csv" in said
        or stage == "transfer"
    )
    assert not (tmp_path / "run").exists()


def test_cases_that_nobody_asked_both_ways_are_predicted(table, tmp_path):
    rows = [row for row in rows_of(table) if not (row["case"] == "case000" and row["branch"] == "joint")]
    path = write(tmp_path / "t.csv", list(rows[0]), [list(row.values()) for row in rows])
    answers = read_answers(path, AnswerConfig(), 0)
    found = variances_of(answers, AnswerConfig())
    assert np.isnan(found.joint[0]).all() and np.isfinite(found.joint[1:]).all() and np.isfinite(found.covariance).all()
    assert (
        answers.factors.keys() == {"bmi", "symptoms", "history", "affine", "noise", "phase"}
        and answers.groups["site"][0] == "north"
    )

"""`jaxmed mupm answer`: a real local server with faults, nothing asked twice, killed and resumed to the same table."""

import csv
import json

import numpy as np
import pytest
from chat_server import dropped, hashed_rule, says, serving, silent, status, truncated

from jaxmed.cli import main
from jaxmed.data.option_answers import Reply, block_of, letter_probabilities, meaning_of
from jaxmed.io.images import write_png
from jaxmed.synthesis.phantoms.stand_in import stand_in_probabilities
from jaxmed.systems.mupm.answers import AnswerConfig, read_answers, variances_of

KEY, OPTIONS = "sk-this-is-secret", ("valve", "failure", "none")
DRAWS = 3


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("JAXMED_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXMED_API_KEY", KEY)


@pytest.fixture
def server():
    with serving(hashed_rule(3)) as one:
        yield one


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four cases, three draws of each branch, two repeats, and one factor of the text."""
    folder, rows = tmp_path_factory.mktemp("asked"), []
    rng = np.random.default_rng(0)
    for case in range(4):
        name = f"c{case}"
        for place in range(2 * DRAWS + 1):
            write_png(folder / name / f"{place}.png", rng.random((8, 8)))
        plan = [("image", draw, draw, "as stored") for draw in range(DRAWS + 1)]
        plan += [("text", draw, 0, f"words {draw}" if draw else "as stored") for draw in range(DRAWS + 1)]
        plan += [("joint", draw, DRAWS + draw if draw else 0, f"both {draw}" if draw else "as stored")
                 for draw in range(DRAWS + 1)]  # fmt: skip
        plan += [("repeat", draw, 0, "as stored") for draw in (1, 2)]
        for branch, draw, picture, text in plan:
            rows.append((name, f"s{case}", OPTIONS[case % 3], branch, draw, "", f"{name}/{picture}.png", text))
        rows += [(name, f"s{case}", OPTIONS[case % 3], "text", draw, "bmi", f"{name}/0.png", f"less {draw}")
                 for draw in range(1, DRAWS + 1)]  # fmt: skip
    with (folder / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "subject", "label", "branch", "draw", "factor", "image", "text", "options"])
        writer.writerows([*row[:7], f"{row[7]}\n{block_of(OPTIONS)}", "|".join(OPTIONS)] for row in rows)
    return folder / "questions.csv"


PER_CASE = 3 * (DRAWS + 1) + 2 + DRAWS  # rows; the unperturbed question stands there three times
DIFFERENT = 3 * DRAWS + 1 + 2 + DRAWS


def answer(questions, server, out, *more):
    words = ["mupm", "answer", "--questions", questions, "--endpoint.url", server.url, "--endpoint.model", "toy"]
    words += ["--endpoint.pause", 0.001, "--endpoint.timeout", 2, "--quiet", "--out", out, *more]
    return main(list(map(str, words)))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summary_of(path):
    return json.loads((path / "outputs" / "summary.json").read_text())


@pytest.fixture(scope="module")
def expected(questions, tmp_path_factory):
    """The table of a run in which nothing went wrong."""
    out = tmp_path_factory.mktemp("good") / "run"
    with serving(hashed_rule(3)) as server:
        assert answer(questions, server, out) == 0
        assert len(server.requests) == 4 * DIFFERENT
    return out


def test_answers_become_the_table_that_propagate_reads(questions, expected):
    rows = rows_of(expected / "outputs/answers.csv")
    assert len(rows) == 4 * PER_CASE and set(rows[0]) == {
        "case", "subject", "label", "branch", "draw", "factor", "answer", "reply", *(f"p_{name}" for name in OPTIONS),
    }  # fmt: skip
    found = summary_of(expected)
    assert (found["questions"], found["different"], found["failed"], found["silent"]) == (
        4 * PER_CASE, 4 * DIFFERENT, 0, 0,
    )  # fmt: skip
    answers = read_answers(expected / "outputs/answers.csv", AnswerConfig(), 0)
    # The server keeps a tenth for other words, which the table has as a class of its own.
    assert answers.classes == (*OPTIONS, "other") and answers.branches.answers.shape == (4, 3, DRAWS, 4)
    np.testing.assert_allclose(answers.branches.answers.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(answers.branches.answers[..., 3], 0.1, atol=1e-6)
    assert set(answers.factors) == {"bmi"} and answers.repeats.is_valid.sum() == 8
    variances = variances_of(answers, AnswerConfig())
    assert all(np.isfinite(np.asarray(part)).all() for part in variances)
    # Draws are what the rule makes of these words and this picture.
    row = next(row for row in rows if (row["case"], row["branch"], row["draw"]) == ("c2", "joint", "2"))
    text = f"both 2\n{block_of(OPTIONS)}\nAnswer with the letter of one option."
    shares = hashed_rule(3)(text, (questions.parent / f"c2/{DRAWS + 2}.png").read_bytes())
    np.testing.assert_allclose([float(row[f"p_{name}"]) for name in OPTIONS], shares, atol=1e-7)
    assert row["answer"] == OPTIONS[int(shares.argmax())] and row["reply"] == "ABC"[int(shares.argmax())]
    assert "Answers of a model" in (expected / "report.html").read_text()


def test_the_run_finishes_through_faults_and_asks_nothing_twice(questions, server, expected, tmp_path):
    server.faults = [status(429), silent(3), truncated, status(500), dropped, status(503), status(429)]
    assert answer(questions, server, tmp_path / "run") == 0
    assert len(server.answered) == len(set(server.answered)) == 4 * DIFFERENT
    assert (tmp_path / "run/outputs/answers.csv").read_bytes() == (expected / "outputs/answers.csv").read_bytes()
    # The key has gone to the server and into no file.
    assert all(one["Authorization"] == f"Bearer {KEY}" for one in server.headers)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_killed_and_resumed_it_is_the_same_table(questions, server, expected, tmp_path, capsys):
    """The server turns the run away half-way; what the kill tears of the last line is asked again."""
    answered = 0

    def turn_away(request, reply):
        nonlocal answered
        answered += 1
        if answered == 20:
            server.faults = [status(401, error={"message": "no credit"})] * 100
        return reply

    server.says = turn_away
    out = tmp_path / "run"
    assert answer(questions, server, out) == 2
    said = capsys.readouterr().err
    assert "the same command goes on from there" in said and said.count("\n") == 1 and KEY not in said
    assert not (out / "report.html").exists()
    kept = out / "checkpoints/replies.jsonl"
    whole = kept.read_bytes()
    lines = whole.count(b"\n")
    assert 20 <= lines == len(server.answered) <= 23  # what was under way is kept too
    kept.write_bytes(whole[:-15])
    server.faults, before = [], list(server.answered)
    assert answer(questions, server, out) == 0
    assert len(server.answered) - len(before) == 4 * DIFFERENT - (lines - 1)
    assert len(set(server.answered)) == 4 * DIFFERENT
    assert (out / "outputs/answers.csv").read_bytes() == (expected / "outputs/answers.csv").read_bytes()
    assert (out / "outputs/summary.json").read_bytes() == (expected / "outputs/summary.json").read_bytes()


def test_a_cache_serves_another_run(questions, server, expected, tmp_path):
    for name in ("first", "second"):
        assert answer(questions, server, tmp_path / name, "--cache", tmp_path / "replies.jsonl") == 0
        assert len(server.requests) == 4 * DIFFERENT
    assert answer(questions, server, tmp_path / "other", "--cache", tmp_path / "replies.jsonl",
                  "--decoding.instruction", "One letter.") == 0  # fmt: skip
    assert len(server.requests) == 8 * DIFFERENT


def test_refusals_are_a_class_and_answers_without_logprobs_are_told(questions, server, tmp_path):
    server.faults = [
        says(None, message={"refusal": "I will not."}),
        status(400, error={"code": "content_filter", "message": "filtered"}), says("B. failure"),
    ]  # fmt: skip
    assert answer(questions, server, tmp_path / "run", "--endpoint.concurrency", 1) == 0
    found, rows = summary_of(tmp_path / "run"), rows_of(tmp_path / "run/outputs/answers.csv")
    # The first question is the unperturbed one, which stands in three branches.
    refused = [row for row in rows if row["answer"] == "refusal"]
    assert found["refused"] == len(refused) == 4 and found["silent"] == 1
    assert all(row["p_refusal"] == "1" and float(row["p_valve"]) == 0 for row in refused)
    silent_row = next(row for row in rows if row["reply"] == "B. failure")
    assert silent_row["answer"] == "failure" and silent_row["p_failure"] == silent_row["p_refusal"] == ""
    answers = read_answers(tmp_path / "run/outputs/answers.csv", AnswerConfig(), 0)
    assert answers.classes == (*OPTIONS, "refusal", "other")
    assert answers.branches.is_valid.sum() == 4 * 3 * DRAWS - 1
    assert "1 of 68 answers have no probabilities" in " ".join(found["notes"])


def test_drawn_answers_have_a_seed_each_and_one_hot_classes(questions, server, tmp_path):
    assert answer(questions, server, tmp_path / "run", "--decoding.readout", "answers") == 0
    # Identical inputs are drawn anew: every row is a question of its own.
    assert len(server.requests) == len({one["seed"] for one in server.requests}) == 4 * PER_CASE
    assert not any("logprobs" in one for one in server.requests) and server.requests[0]["temperature"] == 1.0
    rows = rows_of(tmp_path / "run/outputs/answers.csv")
    assert {row["answer"] for row in rows} <= set(OPTIONS) and "p_valve" not in rows[0]
    answers = read_answers(tmp_path / "run/outputs/answers.csv", AnswerConfig(), 0)
    assert answers.branches.is_valid.all() and set(answers.classes) <= set(OPTIONS)


def test_a_failed_question_is_listed_and_tried_again(questions, server, expected, tmp_path):
    server.faults = [status(422, error={"message": "strange"})]
    out = tmp_path / "run"
    assert answer(questions, server, out, "--endpoint.concurrency", 1) == 1
    failed = rows_of(out / "outputs/failed.csv")
    assert len(failed) == 3 and {row["reason"] for row in failed} == {"status 422: strange"}
    assert len(rows_of(out / "outputs/answers.csv")) == 4 * PER_CASE - 3
    assert answer(questions, server, out, "--endpoint.concurrency", 1) == 0
    assert not (out / "outputs/failed.csv").exists() and len(server.requests) == 4 * DIFFERENT + 1
    assert (out / "outputs/answers.csv").read_bytes() == (expected / "outputs/answers.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, [], "endpoint.url: expected the address of a model, found nothing"),
        (None, ["--endpoint.url", "http://127.0.0.1:9/v1"], "endpoint.model: expected the name of the model"),
        (None, ["--model", "llava"], "weights: expected a file"),
        (("valve|failure|none", "valve"), ["--model", "stand-in"], "line 5: expected 2 to 26 different options"),
        ((".png", ".jpg"), ["--model", "stand-in"], "expected pictures under 'image', found none"),
        (("branch,", "brunch,"), ["--model", "stand-in"], "expected a column 'branch'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(change, words, message, questions, tmp_path, capsys):
    path = questions
    if change is not None:
        path = questions.with_name("changed.csv")
        path.write_text(questions.read_text().replace(*change))
    assert main(["mupm", "answer", "--questions", str(path), "--quiet", "--out", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("jaxmed: ") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_stand_in_answers_the_questions_that_perturb_makes(tmp_path):
    """From nothing to coefficients: perturb, answer and propagate, without a network and without data."""
    out = tmp_path / "answers"
    assert main(["mupm", "answer", "--preset", "smoke", "--quiet", "--out", str(out)]) == 0
    found = summary_of(out)
    assert found["questions"] == 4 * 25 and found["failed"] == found["refused"] == found["other"] == 0
    assert "No model was asked" in found["notes"][0]
    for shares in found["shares"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    table = str(out / "outputs/answers.csv")
    words = ["--fit.method", "ridge", "--fit.resamples", "20", "--fit.repeats", "4", "--quiet"]
    assert main(["mupm", "propagate", "--table", table, "--out", str(tmp_path / "run"), *words]) == 0
    assert summary_of(tmp_path / "run")["fitted"] == 4


def test_the_stand_in_changes_with_picture_and_words():
    image = np.random.default_rng(0).random((9, 7)).astype(np.float32)
    one = stand_in_probabilities(image, "a woman of 60 years", 4)
    assert one.shape == (4,) and one.sum() == pytest.approx(1) and (one > 0).all()
    np.testing.assert_array_equal(one, stand_in_probabilities(image, "of 60 years a woman", 4))
    assert np.abs(one - stand_in_probabilities(image, "a man of 60 years", 4)).max() > 1e-3
    assert np.abs(one - stand_in_probabilities(image[::-1], "a woman of 60 years", 4)).max() > 1e-3


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        ([("B", {"A": 0.2, " B": 0.5, "b": 0.1, "the": 0.1})], (0.2, 0.6)),
        ([("(", {"(": 0.9, "A": 0.1}), ("A", {"A": 0.7, "B": 0.2}), (")", {")": 1.0})], (0.7, 0.2)),
        ([("The", {"The": 0.9, "A": 0.1}), (" answer", {" answer": 1.0}), (" B", {" B": 0.8})], (0.0, 0.8)),
        ([("I", {"I": 0.9, "A": 0.05}), (" cannot", {" cannot": 1.0})], (0.05, 0.0)),
        ([("**", {"**": 1.0})], None),
        ([("A", {"A": 0.8, " A": 0.3})], (1.0, 0.0)),  # rounding of a server
    ],
)
def test_probabilities_are_read_where_the_letter_stands(tokens, shares):
    logs = [(token, {word: float(np.log(p)) for word, p in likely.items()}) for token, likely in tokens]
    found = letter_probabilities(logs, 2)
    assert found == (None if shares is None else pytest.approx(shares))


def test_a_reply_means_an_option_a_refusal_or_neither():
    assert meaning_of(Reply("B", None, True), OPTIONS) == "refusal"
    assert meaning_of(Reply("(b)", None, False), OPTIONS) == "failure"
    assert meaning_of(Reply("perhaps", None, False), OPTIONS) == "other"

"""LLaVA as a model that is asked: letters, groups by picture, prompts, and the stage on a tiny checkpoint."""

import csv
from pathlib import Path

import numpy as np
import pytest
from tiny_llava import TINY, write_llava, write_tokenizer

from jaxmed.cli import main
from jaxmed.data.option_answers import Decoding, Inquiry, Reply
from jaxmed.errors import InputError
from jaxmed.io.images import write_png
from jaxmed.recipes.llava_answers import ask_llava, group_by_image, option_probabilities, read_llava, split_prompt

OPTIONS = ("valve", "failure", "none")


def test_questions_about_one_picture_go_together():
    images = [Path(name) for name in "aabacdeb"]
    groups = group_by_image(images, 2)
    assert [(group.places, group.is_shared) for group in groups] == [
        ((0, 1), True), ((3,), True), ((2, 7), True), ((4, 5), False), ((6,), False),
    ]  # fmt: skip


def test_probabilities_are_of_the_options_alone():
    logits = np.log(np.array([0.4, 0.1, 0.2, 0.1, 0.2], np.float32))
    np.testing.assert_allclose(option_probabilities(logits, [[1, 3], [2]]), [0.5, 0.5], rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return write_tokenizer(write_llava(tmp_path_factory.mktemp("llava") / "hub"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(4):
        write_png(place / f"{number}.png", rng.random((30, 36)))
    return place


@pytest.mark.peers
def test_a_prompt_has_the_placeholders_that_an_image_needs(folder):
    answerer = read_llava(folder)
    before, words = split_prompt(answerer, "which valve?")
    assert before.count(TINY.image_token) == 4 and before[0] == 1 and before[-1] == TINY.image_token
    assert TINY.image_token not in words and len(words) >= 4 and answerer.end == 2
    with pytest.raises(InputError, match="a question without '<image>', found 1 of them"):
        split_prompt(answerer, "which <image> valve?")


def ask(answerer, decoding, inquiries):
    found = {}
    ask_llava(answerer, decoding, 9, inquiries, found.__setitem__)
    return [found[place] for place in range(len(inquiries))]


@pytest.mark.peers
@pytest.mark.parametrize("readout", ["probabilities", "answers"])
def test_an_answer_depends_on_nothing_else_that_is_asked(folder, pictures, readout):
    answerer, decoding = read_llava(folder), Decoding(readout, max_tokens=3)
    asked = [Inquiry(pictures / f"{image}.png", f"which valve {words}?", OPTIONS, seed)
             for image, words, seed in [(0, 1, 5), (0, 2, 6), (1, 1, 5), (2, 1, 5), (0, 3, 5), (3, 2, 8)]]  # fmt: skip
    together = ask(answerer, decoding, asked)
    assert all(isinstance(reply, Reply) and not reply.is_refusal for reply in together)
    for place in (1, 3):
        (alone,) = ask(answerer, decoding, asked[place : place + 1])
        if readout == "answers":
            assert alone.text == together[place].text and alone.probabilities is None
        else:
            np.testing.assert_allclose(alone.probabilities, together[place].probabilities, atol=1e-5)
            assert sum(alone.probabilities) == pytest.approx(1) and alone.text in "ABC"
    if readout == "probabilities":
        shares = np.array([reply.probabilities for reply in together])
        assert np.abs(shares[0] - shares[1]).max() > 1e-5  # other words
        assert np.abs(shares[0] - shares[2]).max() > 1e-5  # another picture


@pytest.mark.peers
def test_the_stage_asks_it(folder, pictures, tmp_path, capsys):
    rows = []
    for case in range(2):
        for branch in ("image", "text", "joint"):
            for draw in range(3):
                picture, words = draw * (branch != "text"), draw * (branch != "image")
                rows.append((f"c{case}", branch, draw, f"{picture}.png", f"which valve {words}?"))
    path = pictures / "questions.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["case", "branch", "draw", "image", "text", "options"],
                                    *[(*row, "|".join(OPTIONS)) for row in rows]])  # fmt: skip
    words = ["mupm", "answer", "--questions", str(path), "--model", "llava", "--quiet"]
    assert main([*words, "--weights", str(folder), "--out", str(tmp_path / "run")]) == 0
    with (tmp_path / "run/outputs/answers.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 18
    for row in found:
        assert sum(float(row[f"p_{name}"]) for name in OPTIONS) == pytest.approx(1, abs=1e-6)
    capsys.readouterr()
    (bare := tmp_path / "bare").mkdir()
    assert main([*words, "--weights", str(bare), "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "tokenizer.json: expected the tokenizer beside the weights" in said and said.count("\n") == 1

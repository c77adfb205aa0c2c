"""`jaxmed mupm perturb`: moves in mm, noise, sentences that keep their facts, and the manifest of questions."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.cli import main
from jaxmed.data.augment import affine_places, warp
from jaxmed.errors import InputError
from jaxmed.io.images import read_image
from jaxmed.synthesis.image_moves import FACTORS, ImageConfig, hold_still, move, perturb_images, rotation_matrix
from jaxmed.synthesis.record_texts import LEADS, QUESTIONS, TEMPLATES, body_mass_index, horizon, parse, question, render
from jaxmed.systems.mupm.answers import AnswerConfig, read_answers

FACTS = {
    "age": "61", "sex": "woman", "bmi": "27.4", "systolic": "131", "diastolic": "82", "pulse": "67",
    "symptoms": "short of breath on stairs", "history": "none", "smoking": "former", "alcohol": "rarely",
    "findings": "left ventricle of 385 to 1577 pixels",
}  # fmt: skip
STILL = ImageConfig(rotation=0, zoom=0, shear=0, shift=0, noise=0, phase=False)


def test_no_ranges_leave_the_image_and_the_released_ones_leave_a_picture():
    cine = jnp.asarray(np.random.default_rng(0).random((3, 6, 5, 4)), jnp.float32)
    cine = (cine - cine[0].min()) / (cine[0].max() - cine[0].min())
    keys = jax.random.split(jax.random.key(0), 3)
    same = perturb_images(keys, cine, (1.0, 1.0, 10.0), STILL)
    np.testing.assert_allclose(same, np.broadcast_to(cine[0], same.shape), atol=1e-6)
    moved = np.asarray(perturb_images(keys, cine, (1.0, 1.0, 10.0), ImageConfig(batch=2)))
    assert moved.shape == (3, 6, 5, 4) and (moved.reshape(3, -1).var(axis=1) > 1e-3).all()
    assert moved.min() == 0 and moved.max() == 1 and np.abs(moved[0] - moved[1]).max() > 0.1
    # A key names a perturbation, whatever else is in the batch.
    np.testing.assert_allclose(
        perturb_images(keys[1:2], cine, (1.0, 1.0, 10.0), ImageConfig(batch=2))[0], moved[1], atol=1e-6
    )


def test_a_factor_that_is_held_still_changes_nothing_any_more():
    assert set(FACTORS) == {"phase", "affine", "noise"}
    still = ImageConfig()
    for name in FACTORS:
        still = hold_still(still, name)
    assert still == STILL


def shown(image, matrix):
    return np.asarray(warp(jnp.asarray(image)[..., None], affine_places(matrix, image.shape)))[..., 0]


def test_a_quarter_turn_of_a_labelled_cube_and_steps_in_mm():
    cube = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    still, ones, nothing = jnp.eye(3), jnp.ones(3), jnp.zeros((3, 3))
    turn = move(rotation_matrix(jnp.array([0.0, 0.0, np.pi / 2])), ones, nothing, jnp.zeros(3), ones)
    np.testing.assert_allclose(shown(cube, turn), np.rot90(cube, 1, (0, 1)), atol=1e-4)
    spacing = jnp.array([1.0, 1.0, 10.0])
    step = move(still, ones, nothing, jnp.array([0.0, 0.0, 10.0]), spacing)  # 10 mm are one slice, upwards
    np.testing.assert_allclose(shown(cube, step)[..., 1:], cube[..., :-1], atol=1e-4)
    assert (shown(cube, step)[..., 0] == 0).all()
    shear = move(still, ones, nothing.at[0, 2].set(0.1), jnp.zeros(3), spacing)  # 0.1 mm a mm: a voxel per slice
    np.testing.assert_allclose(shown(cube, shear)[1:, :, 2], cube[:-1, :, 2], atol=1e-4)
    np.testing.assert_allclose(shown(cube, shear)[:, :, 1], cube[:, :, 1], atol=1e-4)


def test_a_move_is_what_scipy_makes_of_the_same_matrix():
    """SciPy's grid-constant border fades to 0 as grid_sample does with zero padding and align_corners False."""
    rng = np.random.default_rng(0)
    image = rng.random((7, 6, 5)).astype(np.float32)
    spacing = np.array([1.0, 1.5, 4.0])
    shears = 0.1 * rng.standard_normal((3, 3)) * (1 - np.eye(3))
    zooms, shift, rotation = (
        np.array([1.1, 0.9, 1.05]),
        np.array([0.7, -1.2, 2.0]),
        rotation_matrix(jnp.array([0.2, -0.1, 0.3])),
    )
    matrix = move(rotation, *(jnp.asarray(part, jnp.float32) for part in (zooms, shears, shift, spacing)))
    forwards = np.diag(1 / spacing) @ (np.eye(3) + shears) @ np.diag(zooms) @ np.asarray(rotation) @ np.diag(spacing)
    backwards, center = np.linalg.inv(forwards), (np.array(image.shape) - 1) / 2
    offset = center - backwards @ (center + shift / spacing)
    expected = scipy.ndimage.affine_transform(image, backwards, offset, order=1, mode="grid-constant")
    np.testing.assert_allclose(shown(image, matrix), expected, atol=1e-5)


def test_every_sentence_gives_its_facts_back():
    assert len(QUESTIONS) >= 10 and all(len(set(templates)) >= 10 for templates in TEMPLATES.values())
    for templates in TEMPLATES.values():
        for template in templates:
            names = [name for name in FACTS if f"{{{name}}}" in template]
            assert parse(template.format(**FACTS)) == {name: FACTS[name] for name in names}, template
    rng = np.random.default_rng(0)
    texts = {render(rng, FACTS) for _ in range(50)}
    assert len(texts) == 50 and all(parse(text) == FACTS for text in texts)
    less = render(rng, FACTS, ("bmi", "habits"))
    assert parse(less) == {name: fact for name, fact in FACTS.items() if name not in ("bmi", "smoking", "alcohol")}
    with pytest.raises(InputError, match="without"):
        render(rng, {"symptoms": "pain, nausea"})
    assert body_mass_index(81.0, 1.8) == pytest.approx(25.0)  # not the weight, as in the release


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("within 5 years?", "5"),
        ("a 60-year-old: in the next 10 years", "10"),
        ("over 2.5 years", "2.5"),
        ("in 1 year", "1"),
    ],
)
def test_the_horizon_is_kept_and_options_stay_byte_for_byte(text, years):
    assert horizon(text) == years
    options = "A. valve \nB.  failure"
    asked = question(np.random.default_rng(0), text, options)
    assert asked.endswith(options) and horizon(asked.removesuffix(options)) == years
    assert question(None, text, options) == f"{text}\n{options}"


def test_a_question_about_the_present_keeps_its_words():
    asked, rng = "Is the left ventricle large?", np.random.default_rng(0)
    assert horizon(asked) is None and len(set(LEADS)) >= 10
    found = {question(rng, asked, "A. yes") for _ in range(60)}
    assert len(found) == len(LEADS) and all(text.endswith(f"{asked}\nA. yes") for text in found)


def test_the_command_writes_questions_that_come_back_as_a_table(tmp_path):
    assert main(["mupm", "perturb", "--preset", "smoke", "--quiet", "--out", str(tmp_path / "run")]) == 0
    outputs = tmp_path / "run" / "outputs"
    with (outputs / "questions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (3 * 5 + 2 + 4 + 4)
    # Whatever else the table of cases says stays with the case: for transfer --by.
    assert {row["smoking"] for row in rows} <= {"never", "former", "current"} and "path" not in rows[0]
    first, still = rows[:21], rows[21:25]
    assert [(row["branch"], row["draw"]) for row in first[:6]] == [("image", str(d)) for d in range(5)] + [
        ("text", "0")
    ]
    assert len({row["image"] for row in first}) == 9 and len({row["text"] for row in first[:5]}) == 1
    assert all("kg/m2" not in row["text"] for row in first if row["factor"] == "bmi")
    images = [read_image(outputs / row["image"]) for row in first[:5]]
    assert all(image.var() > 1e-3 for image in images) and np.abs(images[1] - images[2]).max() > 0.1
    (tmp_path / "answered.csv").write_text("")
    with (tmp_path / "answered.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "answer"])
        writer.writeheader()
        writer.writerows(row | {"answer": "ABC"[place % 3]} for place, row in enumerate(rows))
    options = ("heart failure", "hypertrophy", "none of these")
    answers = read_answers(tmp_path / "answered.csv", AnswerConfig(options=options), 0)
    assert answers.branches.answers.shape == (3, 3, 4, 5) and answers.repeats.is_valid.sum() == 6
    # The factor of the image that is held still: images of their own, unmoved but for noise and phase, stored words.
    assert [(row["branch"], row["draw"], row["factor"]) for row in still] == [
        ("image", str(draw), "affine") for draw in range(1, 5)
    ]
    assert {row["text"] for row in still} == {first[0]["text"]}
    assert len({row["image"] for row in still} | {row["image"] for row in first}) == 13
    kept = [read_image(outputs / row["image"]) for row in still]
    # Unmoved, a picture is nearer the stored one than moved ones are, whatever phase it shows.
    assert np.mean([np.abs(image - images[0]).mean() for image in kept]) < np.mean(
        [np.abs(image - images[0]).mean() for image in images[1:]]
    )
    assert set(answers.factors) == {"bmi", "affine"} and (answers.labels == [0, 1, 2]).all()
    assert json.loads((outputs / "summary.json").read_text())["calls"] == 25


def test_a_broken_case_fails_alone_and_wrong_tables_are_one_line(tmp_path, capsys):
    np.save(tmp_path / "good.npy", np.random.default_rng(0).random((2, 32, 32)))
    np.save(tmp_path / "flat.npy", np.ones((2, 32, 32)))
    text = "path,age,sex,weight,height\n{},60,man,80,1.8\nflat.npy,61,man,80,1.8\n"
    (tmp_path / "cases.csv").write_text(text.format("good.npy"))
    words = ["mupm", "perturb", "--preset", "smoke", "--quiet", "--data.manifest"]
    assert main([*words, str(tmp_path / "cases.csv"), "--out", str(tmp_path / "run")]) == 1
    assert "flat" in (tmp_path / "run/outputs/failed.csv").read_text()
    assert "24.7" in (tmp_path / "run/outputs/questions.csv").read_text()
    capsys.readouterr()
    (tmp_path / "bare.csv").write_text("path\ngood.npy\n")
    assert main([*words, str(tmp_path / "bare.csv"), "--out", str(tmp_path / "other")]) == 2
    assert "expected facts in columns" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main([*words, str(tmp_path / "cases.csv"), "--without", "bim", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean 'bmi'?" in capsys.readouterr().err

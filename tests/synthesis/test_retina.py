"""Phantom retinas: dots by grade, winding by hypertension, eyes in the mirror, cameras, and cohorts as files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.picture_crop import find_disc
from jaxmed.errors import InputError
from jaxmed.io.images import read_image
from jaxmed.io.tables import read_table, require_disjoint_subjects, resolve_paths
from jaxmed.synthesis.phantoms.retina import GRADES, OPTIC_DISC, OTHER_CAMERA, RetinaConfig, make_retina
from jaxmed.synthesis.phantoms.textures import make_texture
from jaxmed.synthesis.phantoms.write_retina import COLUMNS, write_retina_cohort, write_textures

pytestmark = pytest.mark.core
EDGE, NUMBER = 32, 12


@functools.cache
def program():
    return jax.jit(jax.vmap(functools.partial(make_retina, edge=EDGE)))


def retinas(grade=0, wound=False, right=True, seed=0):
    keys = jax.random.split(jax.random.key(seed), NUMBER)
    labels = (jnp.full(NUMBER, grade), jnp.full(NUMBER, wound), jnp.full(NUMBER, right))
    return jax.tree.map(np.asarray, program()(keys, *labels))


@pytest.fixture(scope="module")
def grades():
    return [retinas(grade) for grade in range(GRADES)]


def test_pictures_are_a_disc_in_a_dark_rim(grades):
    for found in grades:
        assert found.array.shape == (NUMBER, EDGE, EDGE, 3)
        assert found.array.min() >= 0 and found.array.max() <= 1
        assert found.array[:, :3, :3].max() < 0.1 and found.array[:, 12:20, 12:20].mean() > 0.15
        for picture in found.array:
            square = find_disc(picture, "phantom")
            assert square is not None and abs(square.edge - 0.92 * EDGE) <= 2


def test_a_higher_grade_has_more_dots_of_both_kinds_and_the_same_vessels(grades):
    for lower, higher in zip(grades[:-1], grades[1:], strict=True):
        for name in ("dark", "bright"):
            few, many = getattr(lower, name), getattr(higher, name)
            assert (many >= few - 1e-5).all() and (many.sum((1, 2)) > few.sum((1, 2)) + 0.5).all()
        np.testing.assert_array_equal(lower.vessels, higher.vessels)
    assert not grades[0].dark.any() and not grades[0].bright.any()
    # Dark dots darken, bright ones brighten: where there is nothing but the one.
    change = (grades[4].array - grades[0].array)[..., 1]
    for one, other, sign in ((grades[4].dark, grades[4].bright, -1), (grades[4].bright, grades[4].dark, 1)):
        chosen = (one > 0.5) & (other < 0.01) & (grades[0].vessels < 0.05)
        assert chosen.any() and (sign * change[chosen]).mean() > 0.05


def test_vessels_of_hypertension_wind_and_are_longer(grades):
    wound = retinas(wound=True)
    assert (wound.vessels.sum((1, 2)) > 1.03 * grades[0].vessels.sum((1, 2))).all()
    assert not wound.dark.any()


def test_the_eyes_of_a_subject_are_mirrored_and_share_its_colour(grades):
    left, right = retinas(right=False), grades[0]
    nose, temple = (round(EDGE / 2 * (1 + side * OPTIC_DISC[0] * 0.92)) for side in (1, -1))
    for found, near, far in ((right, nose, temple), (left, temple, nose)):
        middle = found.vessels[:, EDGE // 2 - 2 : EDGE // 2 + 2].max(1)  # all vessels meet at the optic disc
        assert (middle[:, near - 2 : near + 2].max(1) > middle[:, far - 2 : far + 2].max(1) + 1).all()
    one, other = (np.median(found.array.reshape(NUMBER, -1, 3), axis=1) for found in (left, right))
    assert np.abs(one - other).max() < 0.6 * np.ptp(one, axis=0).max() and np.abs(one - other).mean() < one.std()
    assert np.abs(left.vessels[:, :, ::-1] - right.vessels).max() > 0.3  # not the very same vessels


def test_a_retina_is_a_function_of_its_key(grades):
    again = retinas(2)
    np.testing.assert_array_equal(again.array, grades[2].array)
    assert np.abs(retinas(2, seed=1).array - again.array).max() > 0.3
    assert len({picture.tobytes() for picture in again.array}) == NUMBER


@pytest.mark.parametrize(
    ("field", "value"), [("field", 0.0), ("noise", -1.0), ("winding", (0.1, -0.1)), ("dot_radius", (0.0, 0.1))]
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        RetinaConfig(**{field: value})


def test_a_cohort_comes_back_from_its_files(tmp_path):
    manifest = write_retina_cohort(tmp_path, 3, 30, EDGE, OTHER_CAMERA, name="there")
    table = read_table(manifest, required=COLUMNS)
    require_disjoint_subjects(table)
    assert len(table) == 60 and len(set(table.column("subject"))) == 30
    assert [table.column("split").count(name) for name in ("train", "validation", "test")] == [36, 12, 12]
    paths = resolve_paths(table)
    for column in ("label", "hypertension", "age", "sex"):  # of the subject, not the eye
        assert table.column(column)[::2] == table.column(column)[1::2]
    for split in ("train", "validation", "test"):
        rows = [row for row in table.rows if row["split"] == split]
        assert {row["hypertension"] for row in rows} == {"0", "1"}
        assert len({row["label"] for row in rows}) == 5
    ages = {wound: [int(row["age"]) for row in table.rows if row["hypertension"] == wound] for wound in "01"}
    assert np.mean(ages["1"]) - np.mean(ages["0"]) > 3
    picture = read_image(paths[7])
    expected = make_retina_once(jax.random.fold_in(jax.random.key(3), 3), table.rows[7])
    np.testing.assert_allclose(picture, expected, atol=0.5 / 255 + 1e-4)
    square = find_disc(picture, paths[7])
    assert square is not None and abs(square.edge - 0.8 * EDGE) <= 3  # the other camera's disc is smaller
    # A second call writes nothing, one after an interruption what is missing.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    paths[7].unlink()
    assert write_retina_cohort(tmp_path, 3, 30, EDGE, OTHER_CAMERA, name="there") == manifest
    np.testing.assert_array_equal(read_image(paths[7]), picture)
    assert {p: p.stat().st_mtime_ns for p in times if p != paths[7]} == {
        p: t for p, t in times.items() if p != paths[7]
    }
    with pytest.raises(InputError, match=r"pictures\.json: expected a cohort of seed 4, found 3"):
        write_retina_cohort(tmp_path, 4, 30, EDGE, OTHER_CAMERA, name="there")


def make_retina_once(key, row):
    labels = (jnp.array(int(row["label"])), jnp.array(row["hypertension"] == "1"), jnp.array(row["eye"] == "right"))
    return np.asarray(jax.jit(functools.partial(make_retina, edge=EDGE, config=OTHER_CAMERA))(key, *labels).array)


def test_textures_are_pictures_of_anything_but_a_retina(tmp_path):
    manifest = write_textures(tmp_path, 0, 12, EDGE)
    paths = resolve_paths(read_table(manifest, required=("path",)))
    pictures = np.stack([read_image(path) for path in paths])
    assert pictures.shape == (12, EDGE, EDGE, 3) and len({one.tobytes() for one in pictures}) == 12
    assert (pictures.std((1, 2)).max(1) > 0.05).all()
    # No frame: the corners are as bright as the rest.
    assert abs(pictures[:, :4, :4].mean() - pictures.mean()) < 0.2
    assert sum(find_disc(picture, "texture") is None for picture in pictures) >= 9
    expected = jax.jit(functools.partial(make_texture, edge=EDGE))(jax.random.fold_in(jax.random.key(0), 5))
    np.testing.assert_allclose(pictures[5], expected, atol=0.5 / 255 + 1e-4)
    assert write_textures(tmp_path, 0, 12, EDGE) == manifest


@pytest.mark.parametrize(("field", "value"), [("subjects", 0), ("edge", 4), ("fractions", (0.5, 0.5, 0.5))])
def test_impossible_cohorts_are_refused_before_anything_is_written(tmp_path, field, value):
    with pytest.raises(InputError, match=field):
        write_retina_cohort(tmp_path, **{"seed": 0, "subjects": 2, "edge": 16, field: value})
    with pytest.raises(InputError, match="number"):
        write_textures(tmp_path, 0, 0)
    assert not any(tmp_path.iterdir())

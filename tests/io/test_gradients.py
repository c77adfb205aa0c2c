"""FSL gradient tables: what is read, repaired, and refused."""

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.gradients import check_gradients, read_gradients, to_world, write_gradients

pytestmark = pytest.mark.core

BVALS = np.array([0.0, 1000.0, 1000.0, 2000.0])
BVECS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.fixture
def table(tmp_path):
    """Write a table, after some change to its text."""

    def write(bvals=None, bvecs=None):
        paths = tmp_path / "dwi.bval", tmp_path / "dwi.bvec"
        write_gradients(*paths, BVALS, BVECS)
        for path, text in zip(paths, (bvals, bvecs), strict=True):
            if text is not None:
                path.write_text(text)
        return paths

    return write


def test_a_table_comes_back_as_written(table):
    found = read_gradients(*table(), num_images=4)
    np.testing.assert_array_equal(found.bvals, BVALS)
    np.testing.assert_array_equal(found.bvecs, BVECS)
    assert found.notes == ()


def test_one_row_per_image_is_read_too(table):
    found = read_gradients(*table(bvecs="\n".join(" ".join(map(str, row)) for row in BVECS)))
    np.testing.assert_array_equal(found.bvecs, BVECS)


def test_directions_that_are_not_numbers_on_unweighted_rows_become_zero(table):
    found = read_gradients(*table(bvecs="nan 1 0 0\nnan 0 1 0\nnan 0 0 1\n"))
    np.testing.assert_array_equal(found.bvecs[0], 0.0)
    assert "1 direction(s)" in found.notes[0]


def test_nearly_unit_directions_are_normalised_and_said(table):
    found = read_gradients(*table(bvecs="0 1.02 0 0\n0 0 1 0\n0 0 0 1\n"))
    np.testing.assert_allclose(np.linalg.norm(found.bvecs[1:], axis=1), 1.0)
    assert "normalised" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bvals": "0 1000 x 2000"}, "the word 'x'"),
        ({"bvals": "0 -5 1000 2000"}, "found -5 in place 2"),
        ({"bvals": "0 nan 1000 2000"}, "found nan in place 2"),
        ({"bvals": "0 1000 1000"}, "found 3"),
        ({"bvals": "0 1 1 2"}, "s/mm^2, not ms/um^2"),
        ({"bvals": "\n"}, "found only blank lines"),
        ({"bvecs": "0 1 0 0\n0 0 1\n"}, "rows of 3 to 4 numbers"),
        ({"bvecs": "0 1 0 0\n0 0 1 0\n"}, "found 2 x 4"),
        ({"bvecs": "0 nan 0 0\n0 0 1 0\n0 0 0 1\n"}, "NaN or Inf in place 2"),
        ({"bvecs": "0 3 0 0\n0 0 1 0\n0 0 0 1\n"}, "length 3 in place 2"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(table, change, expected):
    with pytest.raises(InputError) as caught:
        read_gradients(*table(**change), num_images=4)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(table):
    bvals, bvecs = table()
    bvals.write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(InputError, match="expected a text file of b-values"):
        read_gradients(bvals, bvecs)


# The same table as people write it. Four images of 0, 1000, 1000 and 2000 with oblique directions.
OBLIQUE = np.array([[0.0, 0, 0], [0.6, -0.8, 0], [0, 0.28, -0.96], [-0.48, 0.6, 0.64]])
POINT = {"point": lambda number: f"{number:g}", "signs": lambda number: f"{number:+g}"}
POINT |= {"exponents": lambda number: f"{number:.6e}", "decimal comma": lambda number: f"{number:g}".replace(".", ",")}
POINT |= {"minus sign": lambda number: f"{number:g}".replace("-", "\u2212")}
BETWEEN = {"blank": " ", "tab": "\t", "blanks": "   ", "semicolon": ";", "comma": ",", "comma and blank": ", "}


WRITTEN = [
    (point, between)
    for point in POINT
    for between in BETWEEN
    if point != "decimal comma" or "comma" not in between  # nobody can tell these apart
]


@pytest.mark.parametrize(("point", "between"), WRITTEN)
@pytest.mark.parametrize("turned", [False, True], ids=["3 x N", "N x 3"])
def test_a_table_is_read_however_its_numbers_are_written(tmp_path, turned, between, point):
    rows = OBLIQUE if turned else OBLIQUE.T
    for end in ("\n", "\r\n", "\r", "\n\n", "  \n", " \r\n"):
        text = end.join(BETWEEN[between].join(map(POINT[point], row)) for row in rows) + end
        (tmp_path / "b.bvec").write_bytes(text.encode())
        (tmp_path / "b.bval").write_bytes((BETWEEN[between].join(f"{bval:g}" for bval in BVALS) + end).encode())
        found = read_gradients(tmp_path / "b.bval", tmp_path / "b.bvec")
        np.testing.assert_array_equal(found.bvals, BVALS)
        np.testing.assert_allclose(found.bvecs, OBLIQUE, atol=1e-7)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "ascii"])
def test_encodings_that_say_what_they_are_are_read(tmp_path, encoding):
    (tmp_path / "b.bvec").write_text("\n".join(" ".join(map(str, row)) for row in OBLIQUE.T), encoding=encoding)
    (tmp_path / "b.bval").write_text("0\n1000\n1000\n2000\n", encoding=encoding)
    np.testing.assert_allclose(read_gradients(tmp_path / "b.bval", tmp_path / "b.bvec").bvecs, OBLIQUE, atol=1e-7)


# Arrays, as a Python call gives them ---------------------------------------------------------------------------------

UNITS = {"s/m^2": (1e6, "not s/m^2"), "ms/um^2": (1e-3, "not ms/um^2"), "s/cm^2 and more": (1e2, "not s/m^2")}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("threshold", [0.5, 50.0])
def test_b_values_in_another_unit_are_refused(unit, threshold):
    factor, message = UNITS[unit]
    with pytest.raises(InputError, match="bvals: expected") as caught:
        check_gradients(BVALS * factor, BVECS, b0_threshold=threshold * min(factor, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize("factor", [0.01, 0.5, 0.7, 0.85, 1.2, 2.0, 100.0])
def test_directions_of_another_length_are_refused(factor):
    with pytest.raises(InputError, match="bvecs: expected directions of unit length"):
        check_gradients(BVALS, BVECS * factor)


@pytest.mark.parametrize("kind", [list, tuple, np.float32, np.float64])
@pytest.mark.parametrize("turned", [False, True], ids=["3 x N", "N x 3"])
def test_sequences_and_both_orders_are_one_table(kind, turned):
    rows = (OBLIQUE.T if turned else OBLIQUE).tolist()
    found = check_gradients(kind(BVALS.tolist()), kind(rows))
    np.testing.assert_array_equal(found.bvals, BVALS)
    np.testing.assert_allclose(found.bvecs, OBLIQUE, atol=1e-6)


@pytest.mark.parametrize(
    ("bvals", "bvecs", "message"),
    [
        ([0, np.nan, 1000, 2000], BVECS, "bvals: expected finite b-values"),
        ([0, np.inf, 1000, 2000], BVECS, "bvals: expected finite b-values"),
        ([0, -1000, 1000, 2000], BVECS, "found -1000 in place 2"),
        (BVALS, np.where(BVECS == 1, np.nan, BVECS), "bvecs: expected a finite direction"),
        (BVALS, BVECS[:3], "bvecs: expected 3 x 4 components"),
        (BVALS, "up", "bvecs: expected a rectangular array of numbers"),
        (BVALS, [[0, 0, 0], [1, 0], [0, 1, 0], [0, 0, 1]], "bvecs: expected a rectangular array"),
        (["a", "b"], BVECS, "bvals: expected a rectangular array of numbers"),
    ],
)
def test_wrong_arrays_are_refused_by_name(bvals, bvecs, message):
    with pytest.raises(InputError, match=message):
        check_gradients(bvals, bvecs)


def test_a_checked_table_is_the_same_table_when_it_is_checked_again():
    once = check_gradients(BVALS, OBLIQUE * 1.01)
    np.testing.assert_array_equal(check_gradients(*once[:2]).bvecs, once.bvecs)


def lengths_of(bvals):
    return BVECS * np.sqrt(np.asarray(bvals) / max(bvals))[:, None]


def test_lengths_that_encode_b_scale_it_and_are_said():
    """One nominal b-value, |g|^2 = b / largest b."""
    found = check_gradients([0, 2000, 2000, 2000], lengths_of([0, 700, 1000, 2000]))
    np.testing.assert_allclose(found.bvals, [0, 700, 1000, 2000])
    np.testing.assert_allclose(np.linalg.norm(found.bvecs[1:], axis=1), 1.0)
    assert "scaled by their squares (b = 700 to 2000 s/mm^2)" in found.notes[0]


def test_a_row_of_length_zero_at_the_nominal_b_is_unweighted_where_lengths_encode_b():
    found = check_gradients([2000, 2000, 2000, 2000], lengths_of([0, 700, 1000, 2000]))
    np.testing.assert_allclose(found.bvals, [0, 700, 1000, 2000])


def test_lengths_that_repeat_b_are_normalised_and_said():
    found = check_gradients(BVALS, lengths_of(BVALS))
    np.testing.assert_array_equal(found.bvals, BVALS)
    np.testing.assert_allclose(found.bvecs, BVECS)
    assert "squares are the b-values over the largest one" in found.notes[0]


def test_a_direction_that_is_missing_is_not_an_image_without_weighting():
    with pytest.raises(InputError, match="length 0 in place 2"):
        check_gradients([0, 2000, 2000, 2000], [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_weakly_weighted_images_keep_their_directions():
    found = check_gradients([0, 60, 60, 1000], [[1, 0, 0], [0, 1, 0], [np.nan] * 3, [0, 0, 1]], b0_threshold=100.0)
    np.testing.assert_array_equal(found.bvecs, [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_fsl_directions_turn_into_world_axes():
    x = np.array([1.0, 0.0, 0.0])
    # Stored right to left (negative determinant): FSL's x is the array's, which points to the left.
    np.testing.assert_allclose(to_world(x, np.diag([-2.0, 2, 2, 1])), [-1, 0, 0])
    # Stored left to right: FSL reverses x, so its direction still points to the left of the world.
    np.testing.assert_allclose(to_world(x, np.diag([2.0, 2, 2, 1])), [-1, 0, 0])

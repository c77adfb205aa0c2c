"""FSL gradient tables: what is read, repaired, and refused."""

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.gradients import read_gradients, to_world, write_gradients

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
        ({"bvals": "\n"}, "found no numbers"),
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
    with pytest.raises(InputError, match="bytes that are not text"):
        read_gradients(bvals, bvecs)


def test_fsl_directions_turn_into_world_axes():
    x = np.array([1.0, 0.0, 0.0])
    # Stored right to left (negative determinant): FSL's x is the array's, which points to the left.
    np.testing.assert_allclose(to_world(x, np.diag([-2.0, 2, 2, 1])), [-1, 0, 0])
    # Stored left to right: FSL reverses x, so its direction still points to the left of the world.
    np.testing.assert_allclose(to_world(x, np.diag([2.0, 2, 2, 1])), [-1, 0, 0])

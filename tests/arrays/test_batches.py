"""Batches of one shape: every row comes once, in order, and what fills the last one is left out."""

import numpy as np
import pytest

from jaxmed.arrays.batches import map_rows, padded_rows

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("total", "size"), [(7, 3), (6, 3), (2, 5), (0, 4)])
def test_every_row_comes_once_in_batches_of_one_size(total, size):
    batches = list(padded_rows(total, size))
    assert all(len(rows.index) == size and rows.is_real.sum() == rows.count > 0 for rows in batches)
    np.testing.assert_array_equal([row for rows in batches for row in rows.index[rows.is_real]], np.arange(total))
    # What fills a batch are rows that exist.
    assert all(0 <= row < total for rows in batches for row in rows.index)


def test_a_function_of_batches_gives_what_it_gives_of_all_rows():
    values, seen, shapes = np.arange(14.0).reshape(7, 2), [], set()

    def function(index):
        shapes.add(values[index].shape)
        return {"twice": 2 * values[index], "sum": values[index].sum(axis=1)}

    found = map_rows(function, 7, 3, seen.append)
    np.testing.assert_array_equal(found["twice"], 2 * values)
    np.testing.assert_array_equal(found["sum"], values.sum(axis=1))
    assert seen == [3, 6, 7] and shapes == {(3, 2)}

"""Tables as heat maps: one picture per theme, empty cells, and a description."""

import numpy as np
import pytest

from jaxmed.report.heatmap import heat_maps

pytestmark = pytest.mark.core
AXES = {"ylabel": "down", "xlabel": "across", "caption": "What it is."}


def test_tables_stand_side_by_side_in_both_themes():
    tables = {"one": np.array([[0.1, np.nan, 0.3], [0.4, 0.5, 0.6]]), "two": np.zeros((2, 3))}
    found = heat_maps(tables, ("a", "b"), ("x", "y", "z"), **AXES)
    assert found.light.startswith(b"<?xml") and found.light != found.dark
    assert found.alt == "Tables of 2 rows and 3 columns: one, two." and found.caption == "What it is."
    assert found == heat_maps(tables, ("a", "b"), ("x", "y", "z"), **AXES)


def test_differences_run_about_zero_and_may_all_be_zero():
    small, large = ({"gain": np.array([[-0.1, size]])} for size in (0.1, 0.3))
    one, two = (heat_maps(table, ("a",), ("x", "y"), **AXES, is_difference=True) for table in (small, large))
    assert one.light != two.light
    assert heat_maps({"gain": np.zeros((1, 1))}, ("a",), ("x",), **AXES, is_difference=True).light

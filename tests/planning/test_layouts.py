"""Which layouts are compiled, and in which order."""

import itertools

import pytest

from jaxmed.planning.layouts import Layout, candidates, first_layout, fitted

pytestmark = pytest.mark.core

ASKED = Layout(1, 1, 224, 4, True)


def test_a_mesh_that_fills_the_machine_stays_and_others_lie_along_data():
    assert first_layout(Layout(8, 8, 64, 1, None), 64).data == 8
    assert first_layout(ASKED, 64) == Layout(64, 1, 224, 4, True)
    assert first_layout(Layout(1, 2, 224, 4, True), 64) == Layout(32, 2, 224, 4, True)
    assert first_layout(Layout(1, 3, 224, 4, True), 64) == Layout(64, 1, 224, 4, True)


def test_a_batch_keeps_its_size_where_fewer_parts_divide_and_grows_where_none_do():
    assert fitted(Layout(8, 1, 224, 4, True)) == Layout(8, 1, 224, 4, True)
    assert fitted(Layout(56, 1, 224, 5, True)).accumulation == 4
    assert fitted(Layout(64, 1, 224, 4, True)) == Layout(64, 1, 256, 1, True)
    assert fitted(Layout(64, 1, 1, 1, None)).batch == 64


@pytest.mark.parametrize("can_accumulate", [True, False])
@pytest.mark.parametrize("count", [8, 64, 256])
@pytest.mark.parametrize("asked", [ASKED, Layout(1, 1, 1, 1, None), Layout(1, 2, 24, 1, False)])
def test_every_layout_fills_the_machine_divides_and_comes_once(asked, count, can_accumulate):
    found = list(candidates(first_layout(asked, count), can_accumulate))
    assert len(set(found)) == len(found) >= 2
    assert all(one.data * one.model == count and one.divides for one in found)
    assert can_accumulate or all(one.accumulation == 1 for one in found)
    if asked.remat is not None:
        assert {True, False} == {one.remat for one in found}
    assert min(one.per_device for one in found) == 1


def test_the_configured_layout_comes_first_and_then_recomputation():
    first, second = itertools.islice(candidates(Layout(8, 1, 64, 1, False)), 2)
    assert first == Layout(8, 1, 64, 1, False)
    assert second == Layout(8, 1, 64, 1, True)

"""Rooflines, batches and input rates against closed forms."""

import math

import pytest

from jaxmed.planning.estimate import (
    LINKS,
    PRODUCTS,
    TRAFFIC,
    Memory,
    Rates,
    largest_batch,
    needed_input,
    predict,
    rates_of,
    sent_by_axis,
)
from jaxmed.planning.topologies import H200, V5P
from jaxmed.planning.traffic import Message, Work

pytestmark = pytest.mark.core

RATES = Rates(1e12, 1e11, 1e10, 1e9)
MESSAGES = (
    Message("all-reduce", "data", "f32", 2.0, 1e7, 2e7), Message("all-gather", "data", "f32", 1.0, 1e6, 3e6),
    Message("all-reduce", "model", "bf16", 1.0, 1e6, 1e6), Message("all-reduce", "none", "f32", 1.0, 5e6, 0.0),
)  # fmt: skip


def test_a_step_bound_by_products_takes_their_time_and_that_of_messages():
    found = predict(Work(6e11, 1e9, MESSAGES), RATES)
    exchanged = (23e6 + 1e6) / (1e10 * LINKS)
    assert found.bound == "products"
    assert found.seconds == pytest.approx(0.6 / PRODUCTS + exchanged)
    assert found.messages == pytest.approx({"data": 23e6 / (1e10 * LINKS), "model": 1e6 / (1e10 * LINKS)})
    assert found.utilisation == pytest.approx(0.6 / found.seconds)
    assert found.quickest <= found.seconds <= found.slowest
    assert found.quickest == pytest.approx(0.6)


def test_a_step_bound_by_memory_takes_its_traffic():
    found = predict(Work(1e9, 8e10, ()), RATES)
    assert found.bound == "traffic" and found.seconds == pytest.approx(0.8 / TRAFFIC)
    assert found.slowest == pytest.approx(0.8 / TRAFFIC + 1e-3 / PRODUCTS)


def test_of_measured_rates_no_share_is_taken():
    found = predict(Work(6e11, 1e9, ()), RATES._replace(is_measured=True))
    assert found.seconds == pytest.approx(0.6) and found.utilisation == pytest.approx(1.0)


def test_published_rates_depend_on_the_type():
    assert rates_of(H200, "bfloat16").flops == 2 * rates_of(H200, "float32").flops + 1e12
    assert rates_of(V5P, "bfloat16").flops == rates_of(V5P, "float32").flops


def test_messages_within_a_device_are_none():
    assert sent_by_axis(MESSAGES) == {"data": 23e6, "model": 1e6}


def test_memory_is_the_sum_of_its_parts():
    assert Memory({"parameters": 3.0, "optimiser": 6.0}, 10.0, 1.0, 0.5).total == 20.5


@pytest.mark.parametrize(
    ("first", "second", "capacity", "multiple", "expected"),
    [
        ((8, 100.0), (16, 180.0), 1000.0, 8, 96),  # 20 + 10 for each record: 98 fit
        ((16, 180.0), (8, 100.0), 1000.0, 1, 98),
        ((8, 100.0), (16, 180.0), 30.0, 8, 0),
        ((8, 100.0), (16, 100.0), 1000.0, 8, 16),  # no slope: what was compiled
        ((8, 100.0), (16, 100.0), 50.0, 8, 0),
    ],
)
def test_the_largest_batch_lies_on_a_line(first, second, capacity, multiple, expected):
    assert largest_batch(first, second, capacity, multiple) == expected


def test_two_equal_batches_make_no_line():
    with pytest.raises(ValueError, match="another batch than 8"):
        largest_batch((8, 1.0), (8, 2.0), 10.0, 1)


def test_hosts_share_the_input():
    found = needed_input(records=256, record_bytes=2e6, seconds=0.5, chips=64, per_host=4)
    assert found.records == 512 and found.megabytes == pytest.approx(1024)
    assert found.records_per_host == 32 and found.megabytes_per_host == pytest.approx(64)
    assert math.isinf(needed_input(1, 1.0, 0.0, 1, 1).records)

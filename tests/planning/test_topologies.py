"""Machines by name."""

import pytest

from jaxmed.errors import InputError
from jaxmed.planning.topologies import GPUS, TPUS, find_topology

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("word", "kind", "count"),
    [("v5p:4x4x4", "tpu", 64), ("v5e:16x16", "tpu", 256), ("v6e:16x16", "tpu", 256), ("h200x8", "gpu", 8),
     ("h100x8", "gpu", 8), ("cpu:8", "cpu", 8)],
)  # fmt: skip
def test_words_name_machines(word, kind, count):
    found = find_topology(word)
    assert (found.kind, found.count, found.word) == (kind, count, word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("v5p:4x4", "topology: expected 3 lengths for v5p"),
        ("v6e:4x4x4", "topology: expected 2 lengths for v6e"),
        ("v7:4x4", "topology: expected a machine such as"),
        ("h300x8", "did you mean 'h200'|did you mean 'h100'"),
        ("cpu:0", "topology: expected 1 to 65,536 chips"),
        ("", "topology: expected a machine such as"),
    ],
)
def test_other_words_are_refused(word, message):
    with pytest.raises(InputError, match=message):
        find_topology(word)


def test_every_chip_has_figures_and_their_source():
    for chip in (*TPUS.values(), *GPUS.values()):
        assert chip.source and min(chip.flops, chip.float32_flops, chip.memory, chip.bandwidth, chip.link) > 1e10
        assert chip.float32_flops <= chip.flops and chip.per_host >= 1

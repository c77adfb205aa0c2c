"""Leaves by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.trees import exponential_average, map_named, named_leaves, replace

pytestmark = pytest.mark.core
TREE = {"encoder": {"block_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}, "head": {"kernel": jnp.ones(3)}}


def test_names_are_paths():
    assert list(named_leaves(TREE)) == ["encoder/block_0/bias", "encoder/block_0/kernel", "head/kernel"]
    assert named_leaves((TREE["head"], None, [jnp.ones(1)])).keys() == {"0/kernel", "2/0"}
    assert map_named(lambda name, leaf: (name, leaf.ndim), TREE)["head"]["kernel"] == ("head/kernel", 1)


def test_replace_exchanges_named_leaves_only():
    found = replace(TREE, {"head/kernel": jnp.full(3, 7.0)})
    np.testing.assert_array_equal(found["head"]["kernel"], [7, 7, 7])
    assert found["encoder"]["block_0"]["kernel"] is TREE["encoder"]["block_0"]["kernel"]
    with pytest.raises(ValueError, match=r"head/kernel: expected shape \(3,\), got \(4,\)"):
        replace(TREE, {"head/kernel": jnp.ones(4)})
    with pytest.raises(ValueError, match="name of a leaf, got tail"):
        replace(TREE, {"tail": jnp.ones(4)})


def test_exponential_average_by_hand():
    found = exponential_average({"a": jnp.float32(1.0)}, {"a": jnp.float32(3.0)}, 0.75)
    assert float(found["a"]) == 1.5

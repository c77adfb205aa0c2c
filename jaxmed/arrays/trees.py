"""Trees of parameters by name: a leaf's name is its path, such as "encoder/block_3/attention/kernel"."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf by its name, in the order of the tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `function(name, leaf, *other_leaves)` to every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *others)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether any regular expression is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the tree with some leaves exchanged.

    Raises:
        ValueError: A name is not in the tree, or a shape differs.
    """
    known = named_leaves(tree)
    for name, leaf in leaves.items():
        if name not in known:
            raise ValueError(f"expected the name of a leaf, got {name}")
        if jnp.shape(leaf) != jnp.shape(known[name]):
            raise ValueError(f"{name}: expected shape {jnp.shape(known[name])}, got {jnp.shape(leaf)}")
    return map_named(lambda name, leaf: leaves.get(name, leaf), tree)


def fitting(given: Any, wanted: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return those leaves of one tree that another has in the same shape, by path, and the paths of the others."""
    leaves, known = named_leaves(given), named_leaves(wanted)
    fits = {name: leaf for name, leaf in leaves.items() if name in known and leaf.shape == known[name].shape}
    return fits, tuple(name for name in leaves if name not in fits)


def choose(condition: Any, first: Any, second: Any) -> Any:
    """Return one tree where a condition holds, else the other."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), first, second)


def exponential_average(average: Any, tree: Any, decay: Any) -> Any:
    """Return `decay * average + (1 - decay) * tree`, leaf by leaf."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

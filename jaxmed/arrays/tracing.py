"""Drivers on the host beside functions that jax transforms: which is which, said where it matters."""

import jax
from jax.core import Tracer

from jaxmed.errors import InputError


def require_values(call: str, inside: str | None, **arguments: object) -> None:
    """Refuse arguments that jax traces, in a function that looks at their values.

    Args:
        call: Name of the function.
        inside: What to call inside jit, vmap and grad; None where there is nothing.
        arguments: By name; pytrees.

    Raises:
        InputError: One of them is traced.
    """
    for name, value in arguments.items():
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
            advice = f"{call} is a driver on the host: call it outside jit, vmap and grad"
            advice += f", and {inside} inside" if inside else ""
            raise InputError(name, "an array with values", "one that jax traces", advice)

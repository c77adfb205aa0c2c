"""Results that cannot be differentiated in reverse say so in words.

Reverse mode has to keep every pass of a loop, which it cannot for one that ends when its values say so. JAX's own error
tells of a while_loop that the caller has never seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def forward_only(values: Any, reason: str) -> Any:
    """Return arrays as they are; differentiating them in reverse raises a TypeError with this reason.

    Tangents pass: forward mode, `jit` and `vmap` see nothing of it.

    Args:
        values: A pytree of arrays; those that are not real stay out of it.
        reason: Whose derivative it is, why there is none, and what to do.
    """

    def mark(leaf: Any) -> Any:
        return _marked.bind(leaf, reason=reason) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf

    return jax.tree.map(mark, values)


def _refuse(cotangent: Any, *, reason: str) -> Any:
    raise TypeError(reason)


_marked = Primitive("forward_only")
_marked.def_impl(lambda value, *, reason: value)
_marked.def_abstract_eval(lambda value, *, reason: value)
ad.deflinear(_marked, _refuse)
batching.defvectorized(_marked)
mlir.register_lowering(_marked, lambda context, value, *, reason: [value])

"""What a policy draws actions from, as functions of a network's output."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray


class Distribution(NamedTuple):
    """A family of distributions of actions, one for each game; every leaf of its parameters has games first.

    Attributes:
        sample: Draw actions.
        log_prob: Log-probability, or density, of actions.
        entropy: That of the family, or of the part of it that the source names.
        mode: The actions that a policy takes when it does not explore.
    """

    sample: Callable[[KeyArray, Any], Array]
    log_prob: Callable[[Any, Array], Float[Array, " game"]]
    entropy: Callable[[Any], Float[Array, " game"]]
    mode: Callable[[Any], Array]

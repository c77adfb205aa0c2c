"""The aliases that signatures share."""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Key

# A plain nested dict of arrays; Any, because its leaves and its depth are the model's business.
Params: TypeAlias = dict[str, Any]
KeyArray: TypeAlias = Key[Array, ""]
Scalar: TypeAlias = Float[Array, ""]

"""The aliases that signatures share."""

from typing import Any, TypeAlias

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

# A plain nested dict of arrays; Any, because its leaves and its depth are the model's business.
Params: TypeAlias = dict[str, Any]
KeyArray: TypeAlias = Key[Array, ""]
Scalar: TypeAlias = Float[Array, ""]
# (regular expression on a leaf's name, its partition), the first match counts; see `train.mesh.param_shardings`.
PartitionRules: TypeAlias = tuple[tuple[str, PartitionSpec], ...]

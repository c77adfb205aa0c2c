"""DINOv2's linear probe: a grid of linear heads on a frozen encoder, trained at once; validation records choose one.

Every head has its learning rate, its number of last blocks whose class tokens it sees, and sees the mean of the patch
tokens or not. All read one row of features, the class tokens of the last blocks and the mean; a head's mask hides what
is not its own. Gradients of what is hidden are 0, and nothing decays, so every head is as if it were alone.

Source: DINOv2, arXiv:2304.07193, section 7 and released code: SGD with momentum 0.9, a cosine to 0, no weight decay,
kernels drawn with a deviation of 0.01.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmed.arrays.trees import map_named
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import Positive, Size, checked
from jaxmed.models.heads import HeadConfig

INIT_STD = 0.01
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class Cell(NamedTuple):
    """One head of the grid.

    Attributes:
        rate: Learning rate, per 256 records of a batch.
        blocks: Last blocks whose class tokens it sees.
        has_mean: Whether it sees the mean of the patch tokens too.
    """

    rate: float
    blocks: int
    has_mean: bool


@dataclasses.dataclass(frozen=True)
@checked
class ProbeGrid:
    """The heads that are tried.

    Attributes:
        rates: Learning rates, per 256 records of a batch.
        blocks: Numbers of last blocks whose class tokens are features.
    """

    rates: tuple[Positive, ...] = RATES
    blocks: tuple[Size, ...] = (1, 4)

    def __post_init__(self) -> None:
        if not self.rates or not self.blocks:
            raise ValueError(f"rates, blocks: expected at least one of each, found {self.rates} and {self.blocks}")

    @property
    def cells(self) -> list[Cell]:
        """Every head."""
        return [Cell(*cell) for cell in itertools.product(self.rates, self.blocks, (False, True))]

    def head(self, outputs: int) -> HeadConfig:
        """Return the head whose features all share."""
        return HeadConfig(outputs, "concat", norm=False, layers=max(self.blocks), init_std=INIT_STD)


def init_grid(grid: ProbeGrid, head: HeadConfig, width: int, key: KeyArray) -> Params:
    """Draw the heads: "kernel" [head, feature, output] and "bias" [head, output]."""
    shape = (len(grid.cells), head.num_features(width), head.outputs)
    return {"kernel": INIT_STD * jax.random.normal(key, shape), "bias": jnp.zeros((shape[0], shape[2]))}


def grid_logits(
    grid: ProbeGrid, params: Params, features: Float[Array, "batch feature"]
) -> Float[Array, "head batch output"]:
    """Return what every head says of features, which are those of `ProbeGrid.head`."""
    layers = max(grid.blocks)
    seen = np.array([_sees(cell, layers) for cell in grid.cells], np.float32)
    seen = jnp.asarray(np.repeat(seen, features.shape[-1] // (layers + 1), axis=1))

    def one(kernel: Array, bias: Array, seen: Array) -> Array:
        return jnp.dot(seen * features, kernel) + bias

    return jax.vmap(one)(params["kernel"], params["bias"], seen)


def rate_factors(grid: ProbeGrid) -> optax.GradientTransformation:
    """Scale the updates of every head by its rate.

    The loss is the mean over heads, so the gradient of each is divided by their number, which is undone here.
    """
    rates = np.array([cell.rate for cell in grid.cells], np.float32) * len(grid.cells)

    def scale(updates: Any, params: Any) -> Any:
        def one(name: str, leaf: Any) -> Any:
            return rates.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf if name.startswith("head/") else leaf

        return map_named(one, updates)

    return optax.stateless(scale)


def take_cell(grid: ProbeGrid, params: Params, number: int, width: int) -> tuple[HeadConfig, Params]:
    """Return one head of the grid as a linear head that stands alone.

    Args:
        grid: The grid.
        params: Of all heads.
        number: Its place in `ProbeGrid.cells`.
        width: Token width of the encoder.
    """
    cell, layers = grid.cells[number], max(grid.blocks)
    rows = np.repeat(np.array(_sees(cell, layers), bool), width)
    kernel, bias = np.asarray(params["kernel"])[number], np.asarray(params["bias"])[number]
    pool = "concat" if cell.has_mean else "class"
    head = HeadConfig(kernel.shape[1], pool, norm=False, layers=cell.blocks, init_std=INIT_STD)
    return head, {"linear": {"kernel": kernel[rows], "bias": bias}}


def _sees(cell: Cell, layers: int) -> list[bool]:
    """Tell which of the shared features a head sees: class tokens of the last blocks in their order, and the mean."""
    return [place >= layers - cell.blocks for place in range(layers)] + [cell.has_mean]

"""How pathology spreads on a connectome: diffusion along connections and growth in place.

States are regional amounts on [0, v]; times are in years; rates are per year. A Laplacian comes from
`jaxmed.arrays.graphs.laplacian`: the combinatorial one keeps the total, the random-walk one the total weighted by
node strength.

Sources: Raj, Kuceyeski and Weiner, Neuron 2012 (network diffusion); arXiv:2508.07032, equation 1 (FKPP); the group's
toolbox (FKPP with a share of diffusion and regional weights). Agents are in `jaxmed.physics.agents`.
"""

from jaxtyping import Array, Float

from jaxmed.arrays.graphs import EdgeMatrix
from jaxmed.arrays.types import Scalar


def network_diffusion(
    state: Float[Array, " node"], laplacian: Float[Array, "node node"] | EdgeMatrix, rate: Scalar
) -> Float[Array, " node"]:
    """Return d state / dt = -rate L state."""
    return -rate * (laplacian @ state)


def fkpp(
    state: Float[Array, " node"],
    laplacian: Float[Array, "node node"] | EdgeMatrix,
    diffusion: Scalar,
    growth: Scalar,
    ceiling: Scalar,
) -> Float[Array, " node"]:
    """Return d state / dt = -k L c + alpha c (v - c): diffusion, and logistic growth in place.

    Args:
        state: c, on [0, ceiling].
        laplacian: L.
        diffusion: k.
        growth: alpha, per year and unit of state.
        ceiling: v.

    Source: arXiv:2508.07032, equation 1.
    """
    return -diffusion * (laplacian @ state) + growth * state * (ceiling - state)


def weighted_fkpp(
    state: Float[Array, " node"],
    laplacian: Float[Array, "node node"] | EdgeMatrix,
    share: Scalar,
    rate: Scalar,
    weights: Float[Array, " node"],
    strength: Scalar,
) -> Float[Array, " node"]:
    """Return a (-rate L x) + (1 - a) ((1 - g) + g w) x (1 - x): FKPP whose growth a regional map modulates.

    Args:
        state: x, on [0, 1].
        laplacian: L.
        share: a, of diffusion, in [0, 1].
        rate: Rate of diffusion.
        weights: w, for example amyloid or the expression of a gene, on [0, 1].
        strength: g, in [0, 1]: 0 is plain FKPP, 1 growth in proportion to the map.
    """
    growth = (1 - strength) + strength * weights
    return share * -rate * (laplacian @ state) + (1 - share) * growth * state * (1 - state)

"""How pathology spreads on a connectome: diffusion along connections and growth in place.

States are regional amounts on [0, v]; times are in years; rates are per year. A Laplacian comes from
`jaxmed.arrays.graphs.laplacian`: the combinatorial one keeps the total, the random-walk one the total weighted by
node strength.

Sources: Raj, Kuceyeski and Weiner, Neuron 2012 (network diffusion); arXiv:2508.07032, equation 1 (FKPP); the group's
toolbox (FKPP with a share of diffusion and regional weights). Agents are in `jaxmed.physics.agents`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.arrays.graphs import EdgeMatrix, LaplacianKind
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
        rate: Of diffusion.
        weights: w, for example amyloid or the expression of a gene, on [0, 1].
        strength: g, in [0, 1]: 0 is plain FKPP, 1 growth in proportion to the map.
    """
    growth = (1 - strength) + strength * weights
    return share * -rate * (laplacian @ state) + (1 - share) * growth * state * (1 - state)


class Spectrum(NamedTuple):
    """Eigenvectors of a Laplacian that is similar to a symmetric matrix.

    Attributes:
        values: Eigenvalues, ascending, not negative.
        right: Columns: right eigenvectors.
        left: Rows: left eigenvectors, left @ right = 1.
    """

    values: Float[Array, " node"]
    right: Float[Array, "node node"]
    left: Float[Array, "node node"]


def diffusion_spectrum(adjacency: Float[Array, "node node"], kind: LaplacianKind) -> Spectrum:
    """Diagonalise the Laplacian of an adjacency matrix once, for every time and seed.

    Args:
        adjacency: Symmetric, not negative, every node with an edge.
        kind: "combinatorial", "random_walk" (through the symmetric one, to which it is similar) or "symmetric".
    """
    strength = jnp.sum(adjacency, axis=-1)
    plain = jnp.diag(strength) - adjacency
    if kind == "combinatorial":
        values, vectors = jnp.linalg.eigh(plain)
        return Spectrum(values, vectors, vectors.T)
    root = jnp.sqrt(strength)
    values, vectors = jnp.linalg.eigh(plain / root[:, None] / root)
    if kind == "symmetric":
        return Spectrum(values, vectors, vectors.T)
    if kind != "random_walk":
        raise ValueError(f"kind: expected combinatorial, random_walk or symmetric, got {kind!r}")
    return Spectrum(values, vectors / root[:, None], vectors.T * root)


def diffuse(
    spectrum: Spectrum, initial: Float[Array, "*batch node"], rate: Scalar, times: Float[Array, " time"]
) -> Float[Array, "*batch time node"]:
    """Return exp(-rate L t) initial, in closed form.

    Args:
        spectrum: Of L.
        initial: States at time 0.
        rate: Per year.
        times: In years.
    """
    modes = jnp.einsum("kn,...n->...k", spectrum.left, initial)
    decay = jnp.exp(-rate * times[:, None] * spectrum.values)
    return jnp.einsum("nk,tk,...k->...tn", spectrum.right, decay, modes)


def logistic(initial: Float[Array, "*batch"], rate: Scalar, ceiling: Scalar, time: Array) -> Float[Array, "*batch"]:
    """Return logistic growth v / (1 + (v / c0 - 1) exp(-alpha v t)): FKPP without diffusion, in closed form."""
    # Multiplied through by the initial amount, so that nothing grows where there is none.
    return ceiling * initial / (initial + (ceiling - initial) * jnp.exp(-rate * ceiling * time))

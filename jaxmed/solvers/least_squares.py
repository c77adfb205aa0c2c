"""Small least-squares problems solved by the thousand.

Problems lie along the last axis, so that every operation is one vector instruction over neighbouring problems and the
few unknowns are unrolled: on a CPU batched LAPACK calls on 5 x 5 matrices cost more than the models they serve.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def solve_positive(
    matrix: Float[Array, "unknown unknown problem"], right: Float[Array, "unknown problem"]
) -> Float[Array, "unknown problem"]:
    """Solve symmetric positive definite systems by an unrolled Cholesky factorisation.

    Args:
        matrix: Left-hand sides; only the lower triangle is read.
        right: Right-hand sides.

    Returns:
        Solutions. Where a matrix is not positive definite they are not finite: the caller decides.
    """
    size = right.shape[0]
    lower: dict[tuple[int, int], Array] = {}
    inverse_diagonal = []
    for i in range(size):
        for j in range(i):
            rest = matrix[i, j] - sum(lower[i, k] * lower[j, k] for k in range(j))
            lower[i, j] = rest * inverse_diagonal[j]
        rest = matrix[i, i] - sum(lower[i, k] ** 2 for k in range(i))
        inverse_diagonal.append(1 / jnp.sqrt(rest))
    forward: list[Array] = []
    for i in range(size):
        rest = right[i] - sum(lower[i, k] * forward[k] for k in range(i))
        forward.append(rest * inverse_diagonal[i])
    solution = [jnp.zeros_like(right[0])] * size
    for i in reversed(range(size)):
        rest = forward[i] - sum(lower[k, i] * solution[k] for k in range(i + 1, size))
        solution[i] = rest * inverse_diagonal[i]
    return jnp.stack(solution)


def weighted_linear(
    design: Float[Array, "row unknown"],
    values: Float[Array, "row problem"],
    weights: Float[Array, "row problem"],
    ridge: float = 0.0,
) -> Float[Array, "unknown problem"]:
    """Minimise sum_i w_i (y_i - (X beta)_i)^2 for many right-hand sides with their own weights.

    Args:
        design: X, shared by all problems.
        values: y.
        weights: w, not negative.
        ridge: Added to the diagonal of the normal matrix, relative to its mean: 1e-6 keeps float32 solvable.
    """
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(design.shape[0], size * size)
    normal = (products.T @ weights).reshape(size, size, -1)
    diagonal = jnp.einsum("iip->ip", normal)
    normal = normal + ridge * jnp.eye(size)[:, :, None] * jnp.mean(diagonal, axis=0)
    return solve_positive(normal, design.T @ (weights * values))

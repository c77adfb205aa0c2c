"""Strong-Wolfe line searches in 1000 dimensions: row `linesearch_1000d`, peer SciPy's loop.

Each problem is one search along the negative gradient of the extended Rosenbrock function from a random point, with
c1 = 1e-4 and c2 = 0.9, in double precision. jaxmed searches all of them in one program, spread over the cores, with the
preset that takes SciPy's steps; SciPy's `line_search` takes them one after the other, with its own vectorised function
and gradient. Both compute value and gradient at the start inside the timed call; jaxmed differentiates along the line
only. `same_step` is the share of problems in which the steps agree to 1e-8, relative, and `evaluations` their mean
number per problem: the searches are the same.
"""

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import AxisType, PartitionSpec
from timing import (
    Measurement,
    alternate,
    compile_apart,
    describe_cpu,
    emit,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.solvers.line_search import CONVERGED, SCIPY, line_search

DIMENSIONS = 1000
# Few enough points that a group stays in a core's nearest cache, and waits only for its own slowest search.
GROUP = 4
COUNTS = {"smoke": 64, "cpu": 2048, "gpu": 65536, "pod": 65536}


def main() -> None:
    """Measure and print the row."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    jax.config.update("jax_enable_x64", True)
    # A device per core: a loop of small steps does not spread over cores by itself.
    jax.config.update("jax_num_cpu_devices", len(conditions.cores))
    peak = measure_peak()
    points = np.random.default_rng(0).normal(size=(COUNTS[config.size], DIMENSIONS))
    group = GROUP if jax.default_backend() == "cpu" else COUNTS[config.size]
    compiled = compile_apart(partial(search_all, group=group), jnp.asarray(points))
    ours = partial(compiled.call, jnp.asarray(points))
    functions: dict[str, Any] = {"jaxmed": ours}
    if config.peer:
        functions["SciPy"] = partial(scipy_loop, points)
    seconds = alternate(functions, config.repeats)
    found = jax.device_get(ours())
    evaluations = int(found.evaluations.sum())
    accuracy = {"converged": float((found.status == CONVERGED).mean()), "evaluations": evaluations / len(points)}
    # Value and gradient of a point are some 20 operations a coordinate, the point itself 2, the slope 2.
    flops = float((evaluations + len(points)) * DIMENSIONS * 24)
    measured = {}
    if config.peer:
        steps, calls = functions["SciPy"]()
        accuracy["same_step"] = float(np.mean(np.isclose(found.step, steps, rtol=1e-8, atol=0.0)))
        measured["SciPy"] = Measurement(
            seconds["SciPy"],
            accuracy={"converged": float(np.mean(steps > 0)), "evaluations": float(np.mean(calls))},
            versions=versions("scipy"),
            device=describe_cpu(conditions.cores),
        )
    ours_measured = Measurement(seconds["jaxmed"], compiled.seconds, flops, float(points.nbytes), accuracy)
    workload = f"{len(points)} searches in {DIMENSIONS} dimensions, Rosenbrock, float64"
    emit(make_rows("linesearch_1000d", workload, {"jaxmed": ours_measured, **measured}, conditions, peak), config.json)


def rosenbrock(x: jax.Array) -> jax.Array:
    """Return the extended Rosenbrock function of many points (point, dimension)."""
    rest, first = x[:, 1:] - x[:, :-1] ** 2, 1 - x[:, :-1]
    # As products: XLA sums the entries of a row in order, one after the other, but products in vectors.
    return 100 * jnp.einsum("pd,pd->p", rest, rest) + jnp.einsum("pd,pd->p", first, first)


def search_all(points: jax.Array, group: int) -> Any:
    """Search from every point, a group at a time, the points spread over the devices."""

    def search(x: jax.Array) -> Any:
        gradient = jax.grad(lambda x: rosenbrock(x).sum())(x)

        def phi(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Forward mode: the slope along the line costs about as much as the value.
            along = (lambda step: rosenbrock(x - step[:, None] * gradient), (step,), (jnp.ones_like(step),))
            return jax.jvp(*along)

        slope = -jnp.sum(gradient**2, axis=1)
        value = rosenbrock(x)
        return line_search(phi, value, slope, jnp.ones_like(value), CONFIG)

    def share(points: jax.Array) -> Any:
        grouped = jax.lax.map(search, points.reshape(-1, group, DIMENSIONS))
        return jax.tree.map(lambda part: part.reshape(-1), grouped)

    mesh = jax.make_mesh((jax.device_count(),), ("point",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        share, mesh=mesh, in_specs=PartitionSpec("point"), out_specs=PartitionSpec("point"), check_vma=False
    )(points)


CONFIG = dataclasses.replace(SCIPY, sufficient_decrease=1e-4, curvature=0.9)


def scipy_loop(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Search from every point by SciPy; return the steps, 0 where it fails, and its evaluations."""
    steps, calls = np.zeros(len(points)), np.zeros(len(points), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, x in enumerate(points):
            gradient = scipy.optimize.rosen_der(x)
            step, calls[index], *_ = scipy.optimize.line_search(
                scipy.optimize.rosen,
                scipy.optimize.rosen_der,
                x,
                -gradient,
                gfk=gradient,
                old_fval=scipy.optimize.rosen(x),
                c1=CONFIG.sufficient_decrease,
                c2=CONFIG.curvature,
            )
            steps[index] = step or 0.0
    return steps, calls


if __name__ == "__main__":
    main()

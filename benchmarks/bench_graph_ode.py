"""Solve a learned equation on a connectome for 64 subjects, forward and backward: rows `ode_68`, `ode_200`, `ode_1000`.

The field is the mixture of a mechanistic and a local expert (k L c, logistic growth, a network of all regions and
time, a gate over time), the same weights in both, float32, states saved at 11 times, the loss a mean square, gradients
of every parameter. The peer is torchdiffeq as its authors show it: the batch as one state, dopri5, odeint_adjoint.
jaxmed solves the batch as one state too, by Tsitouras' pair at the same tolerances, and differentiates the steps
taken. The rows with fixed steps are the two paths that the system takes: RK4 on a grid by diffrax (`--solver diffrax`,
the default) and by a scan (`--solver fixed`). Beside each time stands the error of states and of the gradient against a
double-precision solution at 1e-10, the gradient's relative to its norm.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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

from jaxmed.arrays.graphs import GraphsTuple, make_graph, operator
from jaxmed.models.graph_diffusion import ProgressionConfig, make_progression_model, set_mechanism
from jaxmed.solvers.fixed_grid import interpolate
from jaxmed.solvers.ode import OdeConfig, Solver, solve, solve_trajectory
from jaxmed.synthesis.phantoms.connectome import random_connectome

SUBJECTS = 64
TOLERANCE = 1e-5
YEARS = 10.0
SAVED = 11
STEPS = 32
SIZES = {"smoke": (68,), "cpu": (68, 200, 1000), "gpu": (68, 200, 1000), "pod": (68, 200, 1000)}
MODEL = ProgressionConfig(structure="none", local="dense", horizon=YEARS)


class Workload(NamedTuple):
    """One size.

    Attributes:
        graph: Connectome.
        params: Of the equation.
        start: States of all subjects, (subject, region).
    """

    graph: GraphsTuple
    params: Any
    start: jax.Array


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    rows = []
    for regions in SIZES[config.size]:
        work = make_workload(regions)
        reference = solve_reference(work)
        programs = {name: gradient(work, states) for name, states in WAYS.items()}
        compiled = {name: compile_apart(program, work.params) for name, program in programs.items()}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(made.call, work.params) for name, made in compiled.items()
        }
        if config.peer:
            calls["torchdiffeq"] = torch_gradient(work, len(conditions.cores))
        seconds = alternate(calls, config.repeats)
        results = {name: call() for name, call in calls.items()}
        for name in programs:
            described = f"{SUBJECTS} subjects x {regions} regions, {YEARS:g} years, forward and backward, "
            how = {"adaptive": f"diffrax, tolerance {TOLERANCE:g}", "fixed": f"{STEPS} fixed steps"}
            how["diffrax grid"] = f"diffrax, {STEPS} fixed steps"
            measured = {
                "jaxmed": Measurement(
                    seconds[name], compile_s=compiled[name].seconds, accuracy=errors(results[name], reference)
                )
            }
            if config.peer:
                measured["torchdiffeq"] = Measurement(
                    seconds["torchdiffeq"],
                    accuracy=errors(results["torchdiffeq"], reference),
                    versions=versions("torch", "torchdiffeq"),
                    device=describe_cpu(conditions.cores),
                )
            rows += make_rows(f"ode_{regions}", described + how[name], measured, conditions, peak)
    emit(rows, config.json)


# --- jaxmed ----------------------------------------------------------------------------------


def make_workload(regions: int) -> Workload:
    """Draw a connectome, weights and states."""
    # Dense at 1000 too, as the peer's: with 64 subjects at once a product of matrices beats sums over edges.
    graph = make_graph(random_connectome(0, regions, min(0.25, 20 / regions)).adjacency, is_sparse=False)
    model = make_progression_model(MODEL)
    start = jnp.asarray(np.random.default_rng(0).uniform(0.0, 0.3, (SUBJECTS, regions)), jnp.float32)
    params = model.init(jax.random.key(0), start[0], jnp.array(0.0), graph, start[0])
    params = set_mechanism(params, *(jnp.array(rate, jnp.float32) for rate in (0.9, 0.75, 1.0)))
    out = params["local"]["out"]
    kernel = jax.random.normal(jax.random.key(1), out["kernel"].shape) / np.sqrt(out["kernel"].shape[0])
    gate = {"kernel": jax.random.normal(jax.random.key(2), (4, 3)), "bias": params["gate"]["out"]["bias"]}
    params = params | {"local": params["local"] | {"out": out | {"kernel": kernel}}}
    return Workload(graph, params | {"gate": params["gate"] | {"out": gate}}, start)


def field(t: jax.Array, states: jax.Array, args: tuple[Any, GraphsTuple]) -> jax.Array:
    """Return the derivative of all subjects."""
    params, graph = args
    apply = make_progression_model(MODEL).apply
    return jax.vmap(lambda c: apply(params, c, t, graph, c).total)(states)


def adaptive(params: Any, work: Workload, tolerance: float = TOLERANCE) -> jax.Array:
    """Return states at the saved times by steps of a tolerance."""
    times = jnp.linspace(0.0, YEARS, SAVED, dtype=work.start.dtype)
    config = OdeConfig("tsit5", tolerance, tolerance, max_steps=64 if tolerance > 1e-8 else 1024)
    return solve(field, work.start, times, config, (params, work.graph)).states


def on_grid(params: Any, work: Workload, solver: Solver) -> jax.Array:
    """Return states at the saved times from a fixed grid, as a fit does."""
    grid = jnp.linspace(0.0, YEARS, STEPS + 1)
    shape = work.start.shape

    def flat(t: jax.Array, states: jax.Array, args: tuple[Any, GraphsTuple]) -> jax.Array:
        return field(t, states.reshape(shape), args).reshape(-1)

    course = solve_trajectory(flat, work.start.reshape(-1), grid, (params, work.graph), solver)
    return interpolate(course, jnp.linspace(0.0, YEARS, SAVED)).reshape(SAVED, *shape)


WAYS: dict[str, Callable[..., jax.Array]] = {
    "adaptive": adaptive,
    "diffrax grid": functools.partial(on_grid, solver="diffrax"),
    "fixed": functools.partial(on_grid, solver="fixed"),
}


def gradient(work: Workload, states: Callable[[Any, Workload], jax.Array]) -> Callable[[Any], Any]:
    """Return a program of the states and the gradient of their mean square."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        found = states(params, work)
        return jnp.mean(found**2), found

    return jax.jit(lambda params: jax.grad(loss, has_aux=True)(params))


def solve_reference(work: Workload) -> tuple[Any, np.ndarray]:
    """Return gradient and states in double precision at a tolerance of 1e-10."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, work)
        return jax.device_get(gradient(exact, lambda params, work: adaptive(params, work, 1e-10))(exact.params))


def errors(result: tuple[Any, Any], reference: tuple[Any, np.ndarray]) -> dict[str, float]:
    """Return the largest error of states and the relative error of the gradient."""
    found, states = jax.device_get(result)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference[0]), strict=True)
    difference = sum(float(np.sum((np.asarray(one, float) - other) ** 2)) for one, other in pairs)
    size = sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(reference[0]))
    return {
        "states": float(np.abs(np.asarray(states, float) - reference[1]).max()),
        "gradient": float(np.sqrt(difference / size)),
    }


# --- torchdiffeq -----------------------------------------------------------------------------


def torch_gradient(work: Workload, threads: int) -> Callable[[], Any]:
    """Return a call that solves and differentiates with torchdiffeq; its results have jaxmed's form."""
    import torch
    from torchdiffeq import odeint_adjoint

    torch.set_num_threads(threads)
    leaves, tree = jax.tree.flatten(jax.device_get(work.params))
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    laplacian = torch.tensor(np.asarray(operator(work.graph, "laplacian")))
    start = torch.tensor(np.asarray(work.start))
    times = torch.linspace(0.0, YEARS, SAVED)

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(tensors)

        def forward(self, t: Any, c: Any) -> Any:
            p = jax.tree.unflatten(tree, list(self.weights))
            softplus, silu = torch.nn.functional.softplus, torch.nn.functional.silu
            mechanism, local, gate = p["mechanism"], p["local"], p["gate"]
            k, alpha, v = (softplus(mechanism[name]) for name in ("diffusion", "growth", "ceiling"))
            reaction = -k * c @ laplacian.T + alpha * torch.clamp(c, min=0.0) * (v - c)
            share = t / YEARS
            # Time as one more column of the first layer, without a copy of the states.
            kernel = local["hidden"]["kernel"]
            hidden = silu(c @ kernel[:-1] + share * kernel[-1] + local["hidden"]["bias"])
            f_l = 0.1 * (hidden @ local["out"]["kernel"] + local["out"]["bias"])
            first = torch.relu(share * gate["time"]["kernel"][0] + gate["time"]["bias"])
            logits = first @ gate["out"]["kernel"] + gate["out"]["bias"]
            beta = torch.softmax(logits[[0, 2]], dim=-1)  # the second expert is left out
            return beta[0] * reaction + beta[1] * f_l

    module = Field()

    def call() -> Any:
        module.zero_grad()
        states = odeint_adjoint(module, start, times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        (states**2).mean().backward()
        found = [np.zeros(t.shape, np.float32) if t.grad is None else t.grad.numpy().copy() for t in tensors]
        return jax.tree.unflatten(tree, found), states.detach().numpy()

    return call


if __name__ == "__main__":
    main()

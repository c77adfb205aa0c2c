"""Maximum-likelihood labels of simulated signals, for any forward model.

Labels from a grid are what a fit gives on a scan: NODDI and ball and stick take `fitting.estimate` itself, with its
second starts. Labels that start at the truth climb the same likelihood from there; another model climbs with
derivatives by forward mode.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.physics.microstructure import MicrostructureModel, Simulated
from jaxmed.solvers.least_squares import lm_init, lm_run
from jaxmed.systems.noddi.derivatives import Point, model_forward, noddi_forward
from jaxmed.systems.noddi.fitting import estimate
from jaxmed.systems.noddi.likelihood import make_surface
from jaxmed.systems.noddi.network import ForwardConfig
from jaxmed.systems.noddi.options import SIGMA_FLOOR, FitConfig
from jaxmed.systems.noddi.protocol import Protocol, prepare
from jaxmed.systems.noddi.start import fit_tensor, search_model
from jaxmed.systems.noddi.table import Table

LabelStart = Literal["grid", "truth"]
MARGIN = 0.01
"""Of a parameter's range: a climb from the truth starts this far inside, where every derivative has a say."""


def fit_labels(
    block: Simulated, model: MicrostructureModel, table: Table, start: LabelStart, forward: ForwardConfig | None
) -> Float[Array, "voxel parameter"]:
    """Estimate the parameters of simulated voxels by maximum likelihood.

    Args:
        block: Signals, with the noise level that the likelihood is told, and the truth for fits that start there.
        model: The forward model.
        table: The protocol.
        start: A grid, as on a scan, or the truth: the nearest maximum, which a perfect search would find too.
        forward: What `model` was built from; None for a model that only its caller knows.
    """
    config = fit_config(forward or ForwardConfig(), table)
    if start == "grid" and forward is not None:
        rows = estimate(
            np.asarray(block.signals),
            table.gradients,
            sigma=np.asarray(block.sigma),
            config=config,
        )
        return jnp.asarray(rows.values)
    is_noddi = forward is not None and forward.kind == "noddi"
    return climb(model, is_noddi, config, _prepared(table, config), block, start).parameters


def fit_config(forward: ForwardConfig, table: Table) -> FitConfig:
    """Return the settings of a fit with a network's forward model and threshold."""
    return FitConfig(
        model=forward.kind,
        tissue=forward.tissue,
        extra_cellular=forward.extra_cellular,
        dot=forward.dot,
        b0_threshold=table.b0_threshold,
    )


@functools.lru_cache(8)
def _prepared(table: Table, config: FitConfig) -> Protocol:
    return prepare(np.array(table.bvals), np.array(table.bvecs), config)


def tensor_direction(block: Simulated, table: Table) -> Float[Array, "voxel 3"]:
    """Return the principal direction of each voxel's diffusion tensor."""
    return _tensor_direction(_prepared(table, FitConfig(b0_threshold=table.b0_threshold)), block.signals)


@jax.jit
def _tensor_direction(protocol: Protocol, signals: jax.Array) -> jax.Array:
    magnitudes = signals.T
    return fit_tensor(protocol, magnitudes / (protocol.is_b0 @ magnitudes)).direction.T


class Maximum(NamedTuple):
    """Where a likelihood is largest, near its start.

    Attributes:
        parameters: In their own units.
        direction: Of the fibre, unit length.
        converged: Whether the tolerance was met.
    """

    parameters: Float[Array, "voxel parameter"]
    direction: Float[Array, "voxel 3"]
    converged: Bool[Array, " voxel"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))  # a block takes seconds, its compilation longer
def climb(
    model: MicrostructureModel,
    is_noddi: bool,
    config: FitConfig,
    protocol: Protocol,
    block: Simulated,
    start: LabelStart,
) -> Maximum:
    """Climb the Rician likelihood of every voxel from its start.

    Args:
        model: The forward model.
        is_noddi: Whether NODDI's derivatives, written by hand, are those of the model.
        config: Tolerances.
        protocol: From `prepare`.
        block: Signals, noise level, truth.
        start: Where to begin.
    """
    forward = (noddi_forward if is_noddi else model_forward)(protocol, model, config)
    magnitudes = block.signals.T
    s0 = protocol.is_b0 @ magnitudes
    measured = magnitudes / s0
    precision = 1 / jnp.maximum(block.sigma / s0, SIGMA_FLOOR) ** 2
    if start == "truth":
        lower, upper = jnp.asarray(forward.lower), jnp.asarray(forward.upper)
        margin = MARGIN * (upper - lower)
        point = Point(jnp.clip(block.parameters, lower + margin, upper - margin).T, block.direction.T)
    else:
        direction = fit_tensor(protocol, measured).direction
        point = search_model(protocol, model, config, measured[protocol.order], direction).best
    surface = make_surface(forward, "rician", measured[forward.rows], precision)
    state = lm_run(surface, lm_init(surface, point, config.damping), config.cost_tolerance, config.max_iterations)
    return Maximum(state.point.values.T, state.point.direction.T, state.done)

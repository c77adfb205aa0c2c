"""The posterior of each voxel by Hamiltonian Monte Carlo, for parameters whose likelihood is no parabola.

The prior is flat over the bounds of every parameter and over the sphere. A maximum of the likelihood can lie on a
bound, or at an orientation dispersion that noise alone prefers; the mean of the posterior then has the smaller error.

blackjax (an extra) moves and tunes the chains; one chain per voxel, all voxels of a chunk at once.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from jaxmed.arrays.batches import map_rows
from jaxmed.config import Count, checked
from jaxmed.errors import require_extra
from jaxmed.physics import rician
from jaxmed.physics.microstructure import MicrostructureModel, weighted_signal
from jaxmed.physics.rician import SIGMA_FLOOR

START_MARGIN = 0.02
"""Chains start this far inside the bounds, as a share of the range: a bound is infinitely far in their coordinates."""


@dataclasses.dataclass(frozen=True)
@checked
class PosteriorConfig:
    """How long and how far chains move.

    Attributes:
        num_warmup: Steps that tune the step size and the scale of each parameter; not kept.
        num_samples: Steps that are kept.
        num_leapfrog: Gradients per step.
        chunk_size: Voxels that move at once.
    """

    num_warmup: Count = 150
    num_samples: Count = 300
    num_leapfrog: Count = 8
    chunk_size: Count = 256


class Posterior(NamedTuple):
    """Summary of each voxel's chain.

    Attributes:
        mean: Posterior mean of each parameter.
        sd: Posterior standard deviation.
        acceptance: Mean acceptance rate; far below 0.5 the chain did not move well.
    """

    mean: Float[np.ndarray, "voxel parameter"]
    sd: Float[np.ndarray, "voxel parameter"]
    acceptance: Float[np.ndarray, " voxel"]


def sample_posterior(
    key: Key[jax.Array, ""],
    model: MicrostructureModel,
    signals: Float[np.ndarray, "voxel measurement"],
    bvals: Float[np.ndarray, " measurement"],
    bvecs: Float[np.ndarray, "measurement 3"],
    sigma: float,
    values: Float[np.ndarray, "voxel parameter"],
    direction: Float[np.ndarray, "voxel 3"],
    *,
    b0_threshold: float = 50.0,
    config: PosteriorConfig = PosteriorConfig(),
) -> Posterior:
    """Sample the posterior of every voxel, with the unweighted signal as its mean.

    Args:
        key: Consumed.
        model: The forward model.
        signals: Magnitudes of fitted voxels: finite, with unweighted signal.
        bvals: b-values in s/mm^2.
        bvecs: Unit directions.
        sigma: Noise of each channel, in the unit of the signals; Rician.
        values: Where chains start: the fit.
        direction: Likewise.
        b0_threshold: Rows up to this b-value are unweighted.
        config: Length of the chains.

    Raises:
        InputError: blackjax is not installed.

    Source: Hoffman and Gelman, JMLR 2014 (tuning of the step size); blackjax's window adaptation.
    """
    require_blackjax()
    weighted = bvals > b0_threshold
    s0 = signals[:, ~weighted].mean(axis=1)
    run = jax.jit(jax.vmap(_make_chain(model, bvals, bvecs, ~weighted, config)))

    def sample(index: np.ndarray) -> Posterior:
        keys = jax.random.split(jax.random.fold_in(key, index[0]), len(index))
        measured = signals[index][:, weighted] / s0[index, None]
        relative = np.maximum(sigma / s0[index], SIGMA_FLOOR)
        arrays = (jnp.asarray(part, jnp.float32) for part in (measured, relative, values[index], direction[index]))
        return Posterior(*jax.device_get(run(keys, *arrays)))

    return map_rows(sample, len(signals), min(config.chunk_size, len(signals)))


def require_blackjax() -> None:
    """Check that the extra is there.

    Raises:
        InputError: blackjax is not installed.
    """
    require_extra("blackjax", "posterior", "posterior")


def _make_chain(
    model: MicrostructureModel, bvals: np.ndarray, bvecs: np.ndarray, is_b0: np.ndarray, config: PosteriorConfig
):
    import blackjax

    low, high = (jnp.array(end) for end in zip(*(parameter.bounds for parameter in model.parameters), strict=True))
    number = len(model.parameters)

    def unpack(position):
        axis = position[number:]
        return low + (high - low) * jax.nn.sigmoid(position[:number]), axis / jnp.sqrt(jnp.sum(axis**2))

    def chain(key, measured, sigma, values, direction) -> Any:
        def log_density(position):
            parameters, axis = unpack(position)
            predicted = weighted_signal(model, parameters, axis, bvals, bvecs, is_b0)
            cost, _ = rician.cost_and_target(measured, predicted, 1 / sigma**2)
            # A flat prior seen through the sigmoid, and a normal axis, which is uniform in direction.
            logits = position[:number]
            prior = jnp.sum(jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits))
            return prior - 0.5 * jnp.sum(position[number:] ** 2) - jnp.sum(cost)

        warm_key, sample_key = jax.random.split(key)
        share = jnp.clip((values - low) / (high - low), START_MARGIN, 1 - START_MARGIN)
        start = jnp.concatenate([jnp.log(share / (1 - share)), direction * 3**0.5])
        tuning: Any = blackjax.window_adaptation(
            blackjax.hmc, log_density, num_integration_steps=config.num_leapfrog, initial_step_size=0.1
        )
        (state, tuned), _ = tuning.run(warm_key, start, config.num_warmup)
        kernel: Any = blackjax.hmc(log_density, **tuned)

        def step(carry, step_key):
            state, mean, square, rate = carry
            state, info = kernel.step(step_key, state)
            parameters, _ = unpack(state.position)
            return (state, mean + parameters, square + parameters**2, rate + info.acceptance_rate), None

        zero = jnp.zeros(number)
        keys = jax.random.split(sample_key, config.num_samples)
        (_, mean, square, rate), _ = jax.lax.scan(step, (state, zero, zero, jnp.zeros(())), keys)
        mean, square = mean / config.num_samples, square / config.num_samples
        return mean, jnp.sqrt(jnp.maximum(square - mean**2, 0.0)), rate / config.num_samples

    return chain

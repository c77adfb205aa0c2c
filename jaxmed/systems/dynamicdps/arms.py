"""The methods that are compared, each as one function from measurements and estimates to images.

All see the same prior. Methods that start from an estimate get it from the conditional model; the others start from
noise, RED-diff and PnP-DPIR from an empty image. DDRM, DDNM and CCDF are made for linear operators: they get the linear
part and the measurement with its contrast undone, y^(1 / gamma), which is exact for gamma = 1 and an approximation at
the borders of tissues otherwise. So does DAPS, whose Langevin steps would be as small as the background's contrast is
steep. The others take the operator as it is.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.config import NonNegative, Whole, checked
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior import dynamicdps as dynamic
from jaxmed.diffusion.posterior.ccdf import Ccdf, ccdf
from jaxmed.diffusion.posterior.daps import Daps, daps
from jaxmed.diffusion.posterior.ddnm import Ddnm, ddnm
from jaxmed.diffusion.posterior.ddrm import Ddrm, ddrm, separable_spectrum
from jaxmed.diffusion.posterior.diffpir import Diffpir, diffpir
from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps, dynamicdps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.pigdm import Pigdm, pigdm
from jaxmed.diffusion.posterior.pnp_dpir import PnpDpir, pnp_dpir
from jaxmed.diffusion.posterior.reddiff import Reddiff, reddiff
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral, Ddim
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError, nearest
from jaxmed.physics.lowfield import LowField, axis_matrices, linear_part, make_operator

ARMS = {
    "conditional": "the conditional model alone",
    "dps": "DPS from noise",
    "dps-warm": "DPS from the conditional model's image, at a fixed time",
    "ddrm": "DDRM from noise",
    "ddnm": "DDNM from noise",
    "diffpir": "DiffPIR from noise",
    "pigdm": "PiGDM from noise",
    "reddiff": "RED-diff from an empty image",
    "daps": "DAPS from noise",
    "pnp-dpir": "PnP-DPIR from an empty image",
    "ccdf": "CCDF from the conditional model's image",
    "dynamicdps": "DynamicDPS from the conditional model's image",
}
STARTS_FROM_ESTIMATE = ("conditional", "dps-warm", "ccdf", "dynamicdps")
# What each method's authors use; a chain that is shorter limits it.
PUBLISHED = {
    **{"dps": 1000, "dps-warm": 50, "ddrm": 20, "ddnm": 100, "diffpir": 100, "pigdm": 100, "ccdf": 200},
    **{"reddiff": 1000, "daps": 1000, "pnp-dpir": 24},
}
ODE_STEPS = 5
"""Of DAPS, at each of its levels."""
CUTOFF = 0.1
"""Singular values below this share of the largest are unseen by DDRM, DDNM, DAPS and CCDF: they would blow up noise."""
TYPICAL = 0.4
"""Standard deviation of intensities on [0, 2]. Times the root of the number of voxels it bounds that of any direction
of the image's space, such as overall brightness: with PiGDM's usual 1, for white images, its steps along those
overshoot a hundred times, and on a real T1 slab it ended at 12 dB instead of 30."""


@dataclasses.dataclass(frozen=True)
@checked
class ArmConfig:
    """What the methods share.

    Attributes:
        evaluations: Evaluations of the network for every method but DynamicDPS, which chooses its own; 0 gives each
            the number of its authors.
        scale: Step of both forms of DPS.
    """

    evaluations: Whole = 0
    scale: NonNegative = 0.3

    def __post_init__(self) -> None:
        if self.evaluations < 0 or self.evaluations == 1:
            raise ValueError(f"evaluations: expected 2 or more, or 0, found {self.evaluations}")
        if not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, found {self.scale:g}")


class Outcome(NamedTuple):
    """What a method made of a batch.

    Attributes:
        image: Images in [0, 2].
        evaluations: Passes of the network, forward and backward counted together, per image.
        start: Steps of the chain that each walked.
    """

    image: Float[Array, "batch ..."]
    evaluations: Float[Array, " batch"]
    start: Float[Array, " batch"]


Arm = Callable[[Params, KeyArray, Array, Array, Array], Outcome]
"""(params of the prior, key, measurement, estimate, numbers of the samples) -> what came out; to be compiled."""


def make_arm(
    name: str,
    prior: Callable[[Params], Denoiser],
    size: tuple[int, ...],
    acquisition: LowField,
    method: DynamicDps,
    config: ArmConfig = ArmConfig(),
) -> Arm:
    """Prepare a method.

    Args:
        name: One of ARMS.
        prior: Denoiser of given parameters.
        size: Axes of space of an image.
        acquisition: From image to measurement.
        method: Settings of DynamicDPS; its sampler's chain is everyone's.
        config: Budget and step.

    Raises:
        InputError: There is no such method.
    """
    if name not in ARMS:
        raise InputError("arm", f"one of {', '.join(ARMS)}", f"'{name}'", nearest(name, ARMS))
    if name == "conditional":
        return _conditional
    run = make_solver(name, size, acquisition, method, config)

    def arm(params: Params, key: KeyArray, measurement: Array, estimate: Array, indices: Array) -> Outcome:
        start = estimate if name in STARTS_FROM_ESTIMATE else jnp.zeros_like(estimate)
        image, info = run(key, prior(params), measurement, start, indices)
        walked = jnp.minimum(info.start_time + 1, info.residuals.shape[0])
        return Outcome(jnp.clip(image, 0.0, 2.0), info.evaluations.astype(jnp.float32), walked.astype(jnp.float32))

    return arm


def length_of(name: str, chain: int, config: ArmConfig) -> int:
    """Return the evaluations that a method of fixed length takes on a chain."""
    return min(config.evaluations or PUBLISHED[name], chain)


def expected_passes(name: str, method: DynamicDps, config: ArmConfig) -> int:
    """Return how often the network meets a batch of a method: of DynamicDPS for a start in the first bin."""
    if name == "conditional":
        return 0
    if name != "dynamicdps":
        return length_of(name, method.sampler.num_steps or VpDiscrete().num_steps, config)
    steps = method.start.fixed + 1 if method.start.rule == "fixed" else method.start.steps_per_bin
    searched = [left for left in range(method.search_above + 1, steps) if left % method.search_every == 0]
    return steps + (len(searched) * method.search.max_evaluations if method.search else 0)


def _conditional(params: Params, key: KeyArray, measurement: Array, estimate: Array, indices: Array) -> Outcome:
    none = jnp.zeros(len(estimate))
    return Outcome(jnp.clip(estimate, 0.0, 2.0), none, none)


def make_solver(
    name: str, size: tuple[int, ...], acquisition: LowField, method: DynamicDps, config: ArmConfig
) -> Callable[..., tuple[Array, Any]]:
    """Return a method but "conditional", as (key, denoiser, measurement, start, indices) -> (image, info).

    Args:
        name: One of ARMS.
        size: Axes of space of an image.
        acquisition: From image to measurement.
        method: Settings of DynamicDPS; its sampler's chain is everyone's.
        config: Budget and step.
    """
    operator = make_operator(size, acquisition)
    chain = method.sampler
    if name == "dynamicdps":
        return _plain(dynamicdps, operator, method)
    length = length_of(name, chain.num_steps or 1000, config)
    noise = max(acquisition.noise, 1e-3)
    match name:
        case "dps":
            return _plain(dps, operator, Dps(config.scale, Ancestral(num_steps=length), PLAIN))
        case "dps-warm":
            start = StartTime(rule="fixed", fixed=length - 1)
            fixed = dataclasses.replace(
                dynamic.FIXED, start=start, sampler=chain, first_step=config.scale, fidelity=PLAIN
            )
            return _plain(dynamicdps, operator, fixed)
        case "diffpir":
            return _plain(diffpir, operator, Diffpir(noise_std=noise, num_steps=length))
        case "pigdm":
            largest = TYPICAL * math.prod(size) ** 0.5
            return _plain(pigdm, operator, Pigdm(noise_std=noise, data_std=largest, sampler=Ddim(length, eta=1.0)))
        case "reddiff":
            return _plain(reddiff, operator, Reddiff(num_steps=length))
        case "pnp-dpir":
            return _plain(pnp_dpir, operator, PnpDpir(noise, num_steps=length))
    undone = partial(_undo_contrast, gamma=acquisition.gamma)
    # The power that undoes the contrast stretches noise where the image is bright, at 1 or so, by its slope.
    noise = noise / min(acquisition.gamma, 1.0)
    if name == "ddrm":
        spectrum = separable_spectrum(axis_matrices(size, acquisition), (*size, 1), CUTOFF)
        return _plain(ddrm, spectrum, Ddrm(noise_std=noise, num_steps=length), undone)
    linear = linear_part(size, acquisition, CUTOFF)
    if name == "daps":
        # Few steps at each of many levels; what is left of the division is not used.
        steps = min(ODE_STEPS, length)
        return _plain(daps, linear.apply, Daps(noise, length // steps, steps), undone)
    if name == "ccdf":
        return _plain(ccdf, linear, Ccdf(length - 1, chain), undone)
    spread = noise * _noise_gain(size, acquisition)
    return _plain(ddnm, linear, Ddnm(noise_std=spread, sampler=Ddim(length, eta=0.85)), undone)


def _plain(
    solver: Any, operator: Any, config: Any, prepare: Callable[[Array], Array] | None = None
) -> Callable[..., tuple[Array, Any]]:
    def run(key: KeyArray, denoiser: Denoiser, measurement: Array, start: Array, indices: Array) -> Any:
        seen = measurement if prepare is None else prepare(measurement)
        return solver(key, denoiser, seen, operator, start, config, indices)

    return run


def _undo_contrast(measurement: Float[Array, "..."], gamma: float) -> Float[Array, "..."]:
    return measurement if gamma == 1 else jnp.maximum(measurement, 0.0) ** (1 / gamma)


def _noise_gain(size: tuple[int, ...], acquisition: LowField) -> float:
    """Return by how much the pseudo-inverse stretches white noise: root mean square of 1 / s over what is seen."""
    with jax.ensure_compile_time_eval():
        spectrum = separable_spectrum(axis_matrices(size, acquisition), (*size, 1), CUTOFF)
        singular = np.asarray(spectrum.singular, np.float64)
    seen = singular[singular > 0]
    return float(np.sqrt((seen**-2.0).mean()))

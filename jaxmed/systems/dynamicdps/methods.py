"""The methods that are compared: DynamicDPS as a user asks for it, and each other one as its authors run it.

All see the same prior. Methods that start from an estimate get it from the conditional model; the others start from
noise, RED-diff and PnP-DPIR from an empty image. DDRM, DDNM and CCDF are made for linear operators: they get the linear
part and the measurement with its contrast undone, y^(1 / gamma), which is exact for gamma = 1 and an approximation at
the borders of tissues otherwise. So does DAPS, whose Langevin steps would be as small as the background's contrast is
steep. The others take the operator as it is.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmed.arrays.types import KeyArray
from jaxmed.config import Length, NonNegative, Positive, Whole, checked
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior import dynamicdps as dynamic
from jaxmed.diffusion.posterior.ccdf import Ccdf
from jaxmed.diffusion.posterior.daps import Daps
from jaxmed.diffusion.posterior.ddnm import Ddnm
from jaxmed.diffusion.posterior.ddrm import Ddrm, separable_spectrum
from jaxmed.diffusion.posterior.diffpir import Diffpir
from jaxmed.diffusion.posterior.dps import Dps
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.frame import make_info
from jaxmed.diffusion.posterior.pigdm import Pigdm
from jaxmed.diffusion.posterior.pnp_dpir import PnpDpir
from jaxmed.diffusion.posterior.reddiff import Reddiff
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral, Ddim
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError, nearest
from jaxmed.physics.lowfield import LowField, axis_matrices, linear_part, make_operator
from jaxmed.recipes.posterior_samples import Solve
from jaxmed.solvers.line_search import Wolfe
from jaxmed.systems.dynamicdps.calibration import Calibrated
from jaxmed.systems.dynamicdps.enhancement import Method, enhance

AUTHORS = "DynamicDPS as in the authors' code of {}: its rule of starts, data term and line search"
PRESETS = {
    "strict": (dynamic.STRICT, "DynamicDPS with our line search (strict); --preset paper is the authors' code"),
    "repo2026": (dynamic.REPO2026, AUTHORS.format("April 2026")),
    "repo2025": (dynamic.REPO2025, AUTHORS.format("July 2025")),
    "fixed": (dynamic.FIXED, "DynamicDPS without line searches: one step size"),
}
"""Settings of DynamicDPS, and whose they are."""


@dataclasses.dataclass(frozen=True)
@checked
class MethodConfig:
    """How estimates are refined.

    Attributes:
        preset: strict: ours, with bracketing and zoom under the strong Wolfe conditions. repo2026: the authors' code
            of April 2026, with its rule of starts, data term and search. repo2025: that of July 2025, as the paper was
            published: a search at every step. fixed: one step size for all steps.
        start: bank: by the residual, from a calibration. fixed: always `fixed_start`.
        fixed_start: Steps after the first: 49 of 1000 are 5 %.
        max_trials: Evaluations of one line search, at most; 0 takes the preset's: 6 of strict, 10 of the authors'.
        step: Step size before the first search; of preset fixed always.
        noise: Standard deviation of the measurement's noise, in [0, 2]: a sample stops once it fits as well as that
            allows. 0 walks to the end.
        steps: Steps of the whole chain; 0 takes the calibration's, or all. On a shorter chain searches come as often
            for the noise that is walked through: every 5 steps of 1000 are every step of 100.
        plain: Compare by the residual alone, without edges and structural similarity.
    """

    preset: Literal["strict", "repo2026", "repo2025", "fixed"] = "strict"
    start: Literal["bank", "fixed"] = "bank"
    fixed_start: Whole = 49
    max_trials: Length = 0
    step: Positive = 1.0
    noise: NonNegative = 0.0
    steps: Length = 0
    plain: bool = False

    def __post_init__(self) -> None:
        if self.max_trials == 1:
            raise ValueError("max_trials: expected 2 or more, or 0, found 1")

    @property
    def is_release(self) -> bool:
        """Whether this is the authors' code."""
        return self.preset.startswith("repo")

    def describe(self) -> str:
        """Say whose method this is."""
        return PRESETS[self.preset][1]

    def build(self, calibrated: Calibrated | None) -> DynamicDps:
        """Return the method's own settings.

        Raises:
            InputError: A bank is wanted and there is none, or it belongs to another chain.
        """
        base = PRESETS[self.preset][0]
        steps = self.steps or (calibrated.steps if calibrated else 0)
        if self.start == "fixed":
            start = StartTime(rule="fixed", fixed=self.fixed_start)
        elif calibrated is None:
            advice = "give a run of calibrate, or --method.start fixed"
            raise InputError("calibration", "the bank that chooses starts", "nothing", advice)
        else:
            if calibrated.steps != steps:
                found = f"one of {calibrated.steps or 'all'}"
                raise InputError("calibration", f"a bank of {steps} steps", found, "leave --method.steps out")
            start = calibrated.start
            if self.is_release:
                # A bank of one's own, and the authors' way to read it.
                authors = base.start
                start = dataclasses.replace(start, rule=authors.rule, tau=authors.tau, scale=authors.scale)
        if steps and self.start == "fixed" and self.fixed_start >= steps:
            raise InputError("method.fixed-start", f"less than the {steps} steps of the chain", self.fixed_start)
        search, length = base.search, VpDiscrete().num_steps
        if search is not None and self.max_trials:
            search = dataclasses.replace(search, max_evaluations=self.max_trials)
        if isinstance(search, Wolfe):
            search = dataclasses.replace(search, max_step=max(search.max_step, self.step))
        return dataclasses.replace(
            base,
            start=start,
            sampler=Ancestral(num_steps=steps or None),
            search=search,
            search_every=max(1, base.search_every * (steps or length) // length),
            search_above=base.search_above * (steps or length) // length,
            first_step=self.step,
            noise_std=self.noise or None,
            fidelity=PLAIN if self.plain else base.fidelity,
        )


class Arm(NamedTuple):
    """A method of the comparison.

    Attributes:
        description: In words.
        evaluations: Evaluations of the network that its authors take; a chain that is shorter limits them. 0 where the
            method chooses.
        starts_from_estimate: Whether it looks at the conditional model's image.
    """

    description: str
    evaluations: int
    starts_from_estimate: bool = False


ARMS = {
    "conditional": Arm("the conditional model alone", 0, True),
    "dps": Arm("DPS from noise", 1000),
    "dps-warm": Arm("DPS from the conditional model's image, at a fixed time", 50, True),
    "ddrm": Arm("DDRM from noise", 20),
    "ddnm": Arm("DDNM from noise", 100),
    "diffpir": Arm("DiffPIR from noise", 100),
    "pigdm": Arm("PiGDM from noise", 100),
    "reddiff": Arm("RED-diff from an empty image", 1000),
    "daps": Arm("DAPS from noise", 1000),
    "pnp-dpir": Arm("PnP-DPIR from an empty image", 24),
    "ccdf": Arm("CCDF from the conditional model's image", 200, True),
    "dynamicdps": Arm("DynamicDPS from the conditional model's image", 0, True),
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
    scale: Positive = 0.3

    def __post_init__(self) -> None:
        if self.evaluations == 1:
            raise ValueError("evaluations: expected 2 or more, or 0, found 1")


def make_solver(
    name: str,
    size: tuple[int, ...],
    acquisition: LowField,
    method: DynamicDps,
    config: ArmConfig = ArmConfig(),
) -> Solve:
    """Prepare one of ARMS for images of a size; the chain of DynamicDPS is everyone's.

    Raises:
        InputError: There is no such method.
    """
    if name not in ARMS:
        raise InputError("arm", f"one of {', '.join(ARMS)}", f"'{name}'", nearest(name, ARMS))
    if name == "conditional":
        return lambda key, denoiser, measurement, estimate, indices: (
            jnp.clip(estimate, 0.0, MAX_INTENSITY),
            make_info(jnp.zeros((0, len(estimate))), 1.0, 0),
        )
    settings, operator, undone = _choose(name, size, acquisition, method, config)

    def solve(key: KeyArray, denoiser: Denoiser, measurement: Array, estimate: Array, indices: Array) -> Any:
        if undone and acquisition.gamma != 1:
            measurement = jnp.maximum(measurement, 0.0) ** (1 / acquisition.gamma)
        image, info = enhance(key, denoiser, measurement, operator, estimate, settings, indices)
        return jnp.clip(image, 0.0, MAX_INTENSITY), info

    return solve


def length_of(name: str, chain: int, config: ArmConfig) -> int:
    """Return the evaluations that a method of fixed length takes on a chain."""
    return min(config.evaluations or ARMS[name].evaluations, chain)


def expected_passes(name: str, method: DynamicDps, config: ArmConfig) -> int:
    """Return how often the network meets a batch of a method: of DynamicDPS for a start in the first bin."""
    if name == "conditional":
        return 0
    if name != "dynamicdps":
        return length_of(name, method.sampler.num_steps or VpDiscrete().num_steps, config)
    steps = method.start.fixed + 1 if method.start.rule == "fixed" else method.start.steps_per_bin
    searched = [left for left in range(method.search_above + 1, steps) if left % method.search_every == 0]
    return steps + (len(searched) * method.search.max_evaluations if method.search else 0)


def _choose(
    name: str, size: tuple[int, ...], acquisition: LowField, method: DynamicDps, config: ArmConfig
) -> tuple[Method, Any, bool]:
    """Return a method's settings, its operator, and whether the measurement's contrast is undone for it."""
    operator, chain = make_operator(size, acquisition), method.sampler
    if name == "dynamicdps":
        return method, operator, False
    length = length_of(name, chain.num_steps or VpDiscrete().num_steps, config)
    noise = max(acquisition.noise, 1e-3)
    match name:
        case "dps":
            return Dps(config.scale, Ancestral(num_steps=length), PLAIN), operator, False
        case "dps-warm":
            start = StartTime(rule="fixed", fixed=length - 1)
            fixed = dataclasses.replace(
                dynamic.FIXED, start=start, sampler=chain, first_step=config.scale, fidelity=PLAIN
            )
            return fixed, operator, False
        case "diffpir":
            return Diffpir(noise_std=noise, num_steps=length), operator, False
        case "pigdm":
            largest = TYPICAL * math.prod(size) ** 0.5
            return Pigdm(noise_std=noise, data_std=largest, sampler=Ddim(length, eta=1.0)), operator, False
        case "reddiff":
            return Reddiff(num_steps=length), operator, False
        case "pnp-dpir":
            return PnpDpir(noise, num_steps=length), operator, False
    # The power that undoes the contrast stretches noise where the image is bright, at 1 or so, by its slope.
    noise, linear = noise / min(acquisition.gamma, 1.0), linear_part(size, acquisition, CUTOFF)
    match name:
        case "daps":
            # Few steps at each of many levels; what is left of the division is not used.
            steps = min(ODE_STEPS, length)
            return Daps(noise, length // steps, steps), linear.apply, True
        case "ccdf":
            return Ccdf(length - 1, chain), linear, True
    spectrum = separable_spectrum(axis_matrices(size, acquisition), (*size, 1), CUTOFF)
    if name == "ddrm":
        return Ddrm(noise_std=noise, num_steps=length), spectrum, True
    # By how much the pseudo-inverse stretches white noise: root mean square of 1 / s over what is seen.
    with jax.ensure_compile_time_eval():
        singular = np.asarray(spectrum.singular, np.float64)
    gain = float(np.sqrt((singular[singular > 0] ** -2.0).mean()))
    return Ddnm(noise_std=noise * gain, sampler=Ddim(length, eta=0.85)), linear, True

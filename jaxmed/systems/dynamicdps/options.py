"""What a user chooses about a refinement, and what a calibration hands on."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxmed.config import Length, NonNegative, checked, from_record, read_record
from jaxmed.diffusion.posterior import dynamicdps
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.physics.lowfield import LowField
from jaxmed.solvers.line_search import Wolfe

CALIBRATION = "calibration.json"


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found for one prior and one acquisition.

    Attributes:
        start: Bank and compression for `start_time.choose_start`.
        acquisition: From high field to low field, gamma and sigma as fitted where there were pairs.
        steps: Steps of the chain that the bank was recorded on.
        prior: Digest of the prior's parameters: a bank is that of one prior.
    """

    start: StartTime
    acquisition: LowField
    steps: int
    prior: str


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
    fixed_start: int = 49
    max_trials: Length = 0
    step: NonNegative = 1.0
    noise: NonNegative = 0.0
    steps: Length = 0
    plain: bool = False

    def __post_init__(self) -> None:
        if self.fixed_start < 0 or self.steps < 0:
            found = self.fixed_start, self.steps
            raise ValueError(f"fixed_start, steps: expected 0 or more, found {found}")
        if self.max_trials < 0 or self.max_trials == 1:
            raise ValueError(f"max_trials: expected 2 or more, or 0, found {self.max_trials}")
        if not self.step > 0 or not self.noise >= 0:
            raise ValueError(f"step, noise: expected above 0, and 0 or more, found {self.step:g}, {self.noise:g}")

    @property
    def is_release(self) -> bool:
        """Whether this is the authors' code."""
        return self.preset.startswith("repo")

    def describe(self) -> str:
        """Say whose method this is."""
        match self.preset:
            case "strict":
                return "DynamicDPS with our line search (strict); --preset paper is the authors' code"
            case "repo2026":
                return "DynamicDPS as in the authors' code of April 2026: its rule of starts, data term and line search"
            case "repo2025":
                return "DynamicDPS as in the authors' code of July 2025: its rule of starts, data term and line search"
            case "fixed":
                return "DynamicDPS without line searches: one step size"

    def build(self, calibrated: Calibrated | None) -> DynamicDps:
        """Return the method's own settings.

        Raises:
            InputError: A bank is wanted and there is none, or it belongs to another chain.
        """
        base = {
            "strict": dynamicdps.STRICT,
            "repo2026": dynamicdps.REPO2026,
            "repo2025": dynamicdps.REPO2025,
            "fixed": dynamicdps.FIXED,
        }[self.preset]
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


def read_calibration(place: Path) -> Calibrated:
    """Read what a run of calibrate left.

    Raises:
        InputError: There is none, or it is damaged.
    """
    for path in (place / "outputs" / CALIBRATION, place / CALIBRATION, place):
        if path.is_file():
            return from_record(Calibrated, read_record(path), str(path))
    raise InputError(place, f"a run of calibrate, with outputs/{CALIBRATION}", "none", "check the path")

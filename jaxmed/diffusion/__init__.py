"""Diffusion priors: schedules, denoisers, samplers, likelihoods, and posterior sampling with a measurement.

The samplers stand in `samplers.py`, so that `diffusion.sample` is the function and never a module.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.diffusion.samplers import sample as sample


def __getattr__(name: str) -> object:
    """Import the Python call when it is used."""
    if name == "sample":
        from jaxmed.diffusion.samplers import sample

        return sample
    raise AttributeError(name)

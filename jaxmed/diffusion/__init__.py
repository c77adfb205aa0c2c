"""Diffusion priors: schedules, denoisers, samplers, likelihoods, and posterior sampling with a measurement.

The samplers' file is `samplers.py` and not `sample.py`, so that `diffusion.sample` is the function and never the module.
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

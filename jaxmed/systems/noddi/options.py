"""How voxels are fitted."""

import dataclasses
import math
from typing import Literal

from jaxmed.config import NonNegative, Positive, Size, checked
from jaxmed.errors import InputError
from jaxmed.physics.microstructure import MicrostructureModel, ball_and_stick_model, noddi_model
from jaxmed.physics.noddi import ExtraCellular, Tissue

Noise = Literal["gaussian", "rician"]
SIGMA_FLOOR = 1e-3
"""Smallest noise level relative to S0: the Rician likelihood has no maximum without noise."""


MOST_VOXELS = 5_000_000


@dataclasses.dataclass(frozen=True)
@checked
class FitConfig:
    """How voxels are fitted.

    Attributes:
        model: NODDI, or one stick in a ball.
        tissue: Diffusivities that NODDI fixes.
        order: Highest Legendre order of NODDI's series, even; None takes 16, or 24 where b exceeds 5000 s/mm^2.
        extra_cellular: NODDI's space outside neurites: "averaged_tensor" as in the original toolbox and AMICO, or
            "convolved" as in dmipy.
        dot: Add water that does not move to NODDI, for fixed tissue.
        s0: "mean" divides by the mean unweighted signal; "free" fits it, which counts unweighted images as data.
        b0_threshold: b-values up to this, in s/mm^2, count as unweighted. Take 100 for HCP 7T (b = 55 to 65).
        max_iterations: Most Levenberg-Marquardt iterations of one climb.
        damping: First damping, relative to the diagonal of the normal matrix.
        cost_tolerance: A voxel is done when the next step promises to lower its cost by less than this fraction:
            1e-6 of a likelihood over a hundred images moves a parameter by a hundredth of its standard error.
        restart_margin: Climb from the grid's second valley too where its squares exceed those of the first by less than
            this fraction, and keep the better end; 0 never does.
        chunk_size: Voxels that one compiled call takes. 2048 keeps the work of a chunk in a CPU's cache; take 65536 on
            an accelerator. None chooses by the device.
    """

    model: Literal["noddi", "ball-and-stick"] = "noddi"
    tissue: Tissue = dataclasses.field(default_factory=Tissue)
    order: int | None = None
    extra_cellular: ExtraCellular = "averaged_tensor"
    dot: bool = False
    s0: Literal["mean", "free"] = "mean"
    b0_threshold: NonNegative = 50.0
    max_iterations: Size = 60
    damping: Positive = 1e-2
    cost_tolerance: Positive = 1e-6
    restart_margin: NonNegative = 0.1
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.order is not None and (self.order < 4 or self.order % 2 or self.order > 32):
            raise ValueError(f"order: expected an even number from 4 to 32, found {self.order}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations: expected 1 or more, found {self.max_iterations}")
        if not 0 <= self.restart_margin:
            raise ValueError(f"restart_margin: expected 0 or more, found {self.restart_margin:g}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected 1 or more, found {self.chunk_size}")
        if self.model != "noddi" and (self.dot or self.extra_cellular != "averaged_tensor"):
            raise ValueError(f"model: expected noddi with dot or extra_cellular, found {self.model}")

    def build_model(self) -> MicrostructureModel:
        """Return the forward model; its order is that of the tables, not of this record."""
        if self.model == "ball-and-stick":
            return ball_and_stick_model()
        return noddi_model(self.tissue, self.order or 16, self.extra_cellular, self.dot)


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuse a simulated scan that no memory holds: a voxel takes about a kilobyte, a whole brain has 420,000.

    Raises:
        InputError: It has too many voxels.
    """
    if math.prod(shape) > MOST_VOXELS:
        raise InputError(name, f"sizes that make at most {MOST_VOXELS:,} voxels", " x ".join(map(str, shape)))

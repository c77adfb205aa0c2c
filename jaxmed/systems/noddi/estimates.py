"""What a fit returns for each voxel: estimates of any model, and NODDI's by name."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

FLAGS = {
    "not_converged": 1,
    "at_bound": 2,
    "ndi_undefined": 4,
    "odi_undefined": 8,
    "direction_undefined": 16,
    "no_signal": 32,
    "not_finite": 64,
    "misfit": 128,
}
"""Bits of the flags map."""
FLAG_DEFINITIONS = {
    "not_converged": "the tolerance was not met within the iterations",
    "at_bound": "a parameter lies on a bound of its range",
    "ndi_undefined": "free water fraction above 0.9, or a standard error of ndi as wide as not knowing it",
    "odi_undefined": "a standard error of odi as wide as not knowing it, or ndi below two of its own",
    "direction_undefined": "a cone of uncertainty wider than 45 degrees, or ndi below two of its standard errors",
    "no_signal": "mean unweighted signal not above 0, or another more than ten times as large; not fitted",
    "not_finite": "NaN or Inf in the input; not fitted",
    "misfit": "a residual above three times the noise: the model does not make this signal",
}


class Estimates(NamedTuple):
    """What a fit of any model returns for each voxel, on the host; zero where a voxel was not fitted.

    Attributes:
        values: Parameters, in the model's order.
        errors: Their standard errors (Laplace), at most the width of their range.
        direction: Fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        direction_error: Root mean square angle of its cone of uncertainty, in degrees.
        s0: Unweighted signal, in the unit of the input: the mean, or fitted.
        residual: Root mean squared residual over the fitted rows divided by s0 (NRMSE).
        mean_diffusivity: Of the diffusion tensor, in um^2/ms.
        fractional_anisotropy: Of the diffusion tensor.
        iterations: Levenberg-Marquardt iterations of the climb that won.
        flags: Sum of `FLAGS`.
        fitted: False outside the mask, where the unweighted signal is not positive, and where the input is not finite.
    """

    values: Float[np.ndarray, "*voxel parameter"]
    errors: Float[np.ndarray, "*voxel parameter"]
    direction: Float[np.ndarray, "*voxel 3"]
    direction_error: Float[np.ndarray, "*voxel"]
    s0: Float[np.ndarray, "*voxel"]
    residual: Float[np.ndarray, "*voxel"]
    mean_diffusivity: Float[np.ndarray, "*voxel"]
    fractional_anisotropy: Float[np.ndarray, "*voxel"]
    iterations: Int[np.ndarray, "*voxel"]
    flags: UInt8[np.ndarray, "*voxel"]
    fitted: Bool[np.ndarray, "*voxel"]


class Maps(NamedTuple):
    """NODDI of each voxel by name; see `Estimates`.

    Attributes:
        ndi: Neurite density index, the intra-cellular share of tissue water; meaningless where fwf is near 1.
        odi: Orientation dispersion index.
        fwf: Free water fraction.
        direction: Mean fibre direction in the frame of the gradient table, unit length, sign arbitrary.
        ndi_error: Standard error of ndi.
        odi_error: Standard error of odi.
        fwf_error: Standard error of fwf.
        direction_error: Root mean square angle of the direction's cone of uncertainty, in degrees.
        dot: Fraction of water that does not move; None unless it was fitted.
        dot_error: Its standard error.
        s0: Unweighted signal, in the unit of the input.
        residual: Root mean squared residual divided by s0 (NRMSE).
        mean_diffusivity: Of the diffusion tensor, in um^2/ms.
        fractional_anisotropy: Of the diffusion tensor.
        iterations: Levenberg-Marquardt iterations.
        flags: Sum of `FLAGS`.
        converged: Whether a tolerance was met.
        fitted: Whether there was something to fit.
        notes: What was repaired in the gradient table, one sentence each.
    """

    ndi: Float[np.ndarray | Array, "*voxel"]
    odi: Float[np.ndarray | Array, "*voxel"]
    fwf: Float[np.ndarray | Array, "*voxel"]
    direction: Float[np.ndarray | Array, "*voxel 3"]
    ndi_error: Float[np.ndarray | Array, "*voxel"]
    odi_error: Float[np.ndarray | Array, "*voxel"]
    fwf_error: Float[np.ndarray | Array, "*voxel"]
    direction_error: Float[np.ndarray | Array, "*voxel"]
    dot: Float[np.ndarray | Array, "*voxel"] | None
    dot_error: Float[np.ndarray | Array, "*voxel"] | None
    s0: Float[np.ndarray | Array, "*voxel"]
    residual: Float[np.ndarray | Array, "*voxel"]
    mean_diffusivity: Float[np.ndarray | Array, "*voxel"]
    fractional_anisotropy: Float[np.ndarray | Array, "*voxel"]
    iterations: Int[np.ndarray | Array, "*voxel"]
    flags: UInt8[np.ndarray | Array, "*voxel"]
    converged: Bool[np.ndarray | Array, "*voxel"]
    fitted: Bool[np.ndarray | Array, "*voxel"]
    notes: tuple[str, ...]


def name_maps(rows: Estimates) -> Maps:
    """Give NODDI's estimates their names."""
    count = rows.values.shape[-1]
    shared: dict[str, Any] = {name: getattr(rows, name) for name in Maps._fields if name in Estimates._fields}
    named: dict[str, Any] = {
        name + suffix: part[..., index] if index < count else None
        for part, suffix in ((rows.values, ""), (rows.errors, "_error"))
        for index, name in enumerate(("ndi", "odi", "fwf", "dot"))
    }
    converged = rows.fitted & (rows.flags & FLAGS["not_converged"] == 0)
    return Maps(**shared, **named, converged=converged, notes=())

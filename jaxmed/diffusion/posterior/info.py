"""What a posterior sampler tells about its run."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Info(NamedTuple):
    """Diagnostics of a run, per sample.

    Attributes:
        residuals: |y - A(E[x_0 | x_t])| at each step, in units of the measurement.
        step_sizes: Factor of the data term at each step; what it multiplies is the method's to say.
        start_time: Where each sample entered the chain.
        evaluations: How often the network ran, forward alone or forward and backward; where more backward passes follow
            one forward pass, each of them counts.
        flags: Verdict of the line search at each step; 0 is fine.
    """

    residuals: Float[Array, "step batch"]
    step_sizes: Float[Array, "step batch"]
    start_time: Int[Array, " batch"]
    evaluations: Int[Array, " batch"]
    flags: Int[Array, "step batch"]

"""DynamicDPS: enhance a low-field scan without inventing anatomy.

Paper: Kim et al., "Tackling Hallucination from Conditional Models for Medical Image Reconstruction with DynamicDPS",
arXiv:2503.01075, MICCAI 2025.

A conditional network makes a sharp image of a poor one, and may invent structure. DynamicDPS takes that image as a
start: it adds noise up to a time chosen per image by how badly it fits the measurement, and comes back with a diffusion
prior, held to the measurement at every step by a step length that a Wolfe line search finds. Neither network is
trained for the scanner at hand.

In:  a low-field or low-resolution brain MRI (NIfTI, or a 2D picture); a prior, a conditional network or the result of
     any other tool, and a description of the scanner (contrast, resolution, noise).
Out: the enhanced image on the scan's grid and in its unit, a map of its uncertainty, residuals, tissue volumes.

Stages:
  1. jaxmed dynamicdps train-prior --input SCANS --data.labels LABELMAPS --out runs/prior
     a diffusion prior of slices, or of patches of volumes; contrasts are drawn from label maps too.
  2. jaxmed dynamicdps train-initial --input SCANS --out runs/initial
     a conditional network, trained on pairs that the low-field simulator makes.
  3. jaxmed dynamicdps calibrate ...   the bank of residuals, tau, and the scanner's contrast and blur.
  4. jaxmed dynamicdps enhance ...     refine scans: image, uncertainty, residual curve, tissue volumes. The preset
     paper is the authors' released code; --solver takes another method of compare's.
  5. jaxmed dynamicdps compare ...     all methods on simulated scans with known truth, with intervals: DynamicDPS, DPS,
     DDRM, DDNM, DiffPIR, PiGDM, RED-diff, DAPS, PnP-DPIR, CCDF, and the conditional models alone.

Images of the networks lie in [0, 2], background 0. Scans are turned to RAS+ and scaled by a percentile of the head; a
background below 0 (scans in [-1, 1], or with a mean of 0) is subtracted first. Scale, background and grid are kept, and
results go back to all three. Subjects are split, never slices.

Try it without data:  jaxmed dynamicdps train-prior --preset smoke --out runs/prior
From Python:          from jaxmed.systems import dynamicdps
                      image, info = dynamicdps.enhance(key, denoiser, measurement, operator, initial)

What was read where: the body of the paper was not at hand; what is done is that of the authors' public code, and every
default that it does not tell is marked as a deviation where it stands.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.dynamicdps.enhancement import enhance as enhance


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed dynamicdps` must not wait for jax."""
    if name == "enhance":
        from jaxmed.systems.dynamicdps.enhancement import enhance

        return enhance
    raise AttributeError(name)

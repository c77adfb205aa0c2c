"""NODDI: tissue microstructure from diffusion MRI, by exact fitting.

Paper: "Neurite orientation dispersion and density imaging", Zhang et al., NeuroImage 2012 (the model), and
arXiv:2507.12632 (fast, inline estimation).

In:  a diffusion scan with at least two shells and unweighted images: NIfTI (4D), FSL .bval (s/mm^2) and .bvec, and
     optionally a mask on the same grid.
Out: maps on the grid of the scan, none with a unit, all in [0, 1]:
     ndi        neurite density index: the share of tissue water inside neurites
     odi        orientation dispersion index: 0 parallel fibres, 1 isotropic
     fwf        free water fraction
     direction  mean fibre direction, unit vector in RAS+ world axes
     residual   root mean squared residual relative to the unweighted signal
     and s0, mean_diffusivity (um^2/ms), fractional_anisotropy, converged.

Stages:
  1. jaxmed noddi fit --dwi dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec --mask mask.nii.gz --out RUN
     maximum-likelihood maps and a report.
  2. jaxmed noddi train --bvals dwi.bval --bvecs dwi.bvec --out NET
     a network for this protocol, trained on signals simulated on the device.
  3. jaxmed noddi predict --weights NET --dwi dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec --mask mask.nii.gz --out RUN
     its maps, a brain in seconds; with --dicom-source FOLDER as DICOM too.
  4. jaxmed noddi export --weights NET --out RUN
     the network as ONNX, checked against ONNX Runtime; scripts/noddi_onnx.py runs it without jax.
  5. jaxmed noddi evaluate --weights NET_MLE NET_GT --out RUN
     bias, spread and error over the parameter range, beside the fit and the Cramer-Rao bound.
  6. jaxmed noddi simulate --out RUN
     a scan with known microstructure, of your protocol or one of two shells.

Try it without data:  jaxmed noddi fit --preset smoke --out runs/noddi
From Python:          from jaxmed.systems import noddi; maps = noddi.fit(signals, bvals, bvecs)
    `noddi.fit` and `noddi.train` are drivers on the host. Inside jit, vmap and grad:
    protocol = noddi.prepare(bvals, bvecs, FitConfig()); maps = noddi.fit_voxels(protocol, signals)

Deviations from the 2012 toolbox: the intra-cellular signal is a Legendre series with coefficients by quadrature, not
closed forms that lose their digits in single precision; the extra-cellular space is the toolbox's (averaged tensor).
Fits maximise the Rician likelihood where the noise is known and minimise squares where it is not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.noddi.fitting import fit as fit
    from jaxmed.systems.noddi.protocol import prepare as prepare
    from jaxmed.systems.noddi.training import train as train
    from jaxmed.systems.noddi.voxel_fit import fit_voxels as fit_voxels


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed noddi` must not wait for jax."""
    import importlib

    homes = {"fit": "fitting", "fit_voxels": "voxel_fit", "prepare": "protocol", "train": "training"}
    if name in homes:
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(name)

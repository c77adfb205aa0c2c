"""CoCoLIT: an amyloid PET map from one T1-weighted MRI, by latent diffusion with a ControlNet.

Paper: "CoCoLIT: ControlNet-Conditioned Latent Image Translation for MRI to Amyloid PET Synthesis", arXiv:2508.01292,
AAAI 2026 (its abstract; the body was not at hand), and its authors' public code, version 0.3.1.

An autoencoder makes a latent of the MRI; a diffusion U-Net draws latents of florbetapir SUVR maps, and a ControlNet
tells it of the MRI at every step; a second autoencoder makes maps of latents. Many latents are drawn and averaged
before they are decoded once (latent average stabilisation): the bias of that is measured here, and the spread of the
samples is written beside the map.

In:  translate: a T1-weighted MRI, skull-stripped, in MNI152 space at 1 mm (axes as the template's), intensities by
     WhiteStripe; or, with --preprocess, any T1-weighted MRI with a mask of its brain, and the template.
Out: a map of SUVR on the grid of that MRI (amyloid counts as positive above 1.326), its spread over samples, a report.

Stages:
  1. jaxmed cocolit train-autoencoder --data.manifest pairs.csv --modality mri --out runs/mri
     (and again with --modality suvr). pairs.csv has the released columns scan_path, suvr_path and split.
  2. jaxmed cocolit encode --data.manifest pairs.csv --weights.mri runs/mri --weights.pet runs/suvr --out runs/latents
     writes latents.csv with the released columns of latents besides.
  3. jaxmed cocolit train-diffusion --data.manifest runs/latents/outputs/latents.csv --out runs/unet
  4. jaxmed cocolit train-controlnet --data.manifest runs/latents/outputs/latents.csv --weights.pet runs/suvr
     --weights.unet runs/unet --weights.mri runs/mri --out runs/controlnet
     writes all four networks into outputs/models; --image-loss isl or none for the ablations.
  5. jaxmed cocolit translate --input SCANS --weights.folder WEIGHTS --out runs/pet
     WEIGHTS holds the released files src.pth, tgt.pth, dif.pth and cnt.pth; --weights.mri, .pet, .unet and .controlnet
     name them one by one. --samples 64 is the paper's number, 1 the released tool's. The released options work too:
     jaxmed cocolit translate --i t1.nii.gz --o suvr.nii.gz --m 64 --ddim-n 50 --weights.folder WEIGHTS
  6. jaxmed cocolit evaluate --data.manifest pairs.csv --weights.folder WEIGHTS --regions.cortical MASK
     --out runs/scores
     scores maps of the split test against PET; --baseline.steps 5000 trains a pix2pix on the split train beside.

The released sampler holds the expected latent within [-1, 1] at every step, although latents have no such range, and
leaves the expected noise as it was. That is the default here as well; --no-clip leaves latents free. How many entries
lie at the ends is said of every scan.

Try it without data:  jaxmed cocolit translate --preset smoke --out runs/cocolit
From Python:          from jaxmed.systems import cocolit
                      found = cocolit.translate(key, models, mri, m)   # found.suvr, found.spread

Deviations from the released code: skulls are not stripped here (give a mask by any tool), the affine registration is
this library's in place of ANTs', and inputs on other grids, with skulls or in other units are refused, not translated.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.cocolit.translation import translate as translate


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed cocolit` must not wait for jax."""
    if name == "translate":
        from jaxmed.systems.cocolit.translation import translate

        return translate
    raise AttributeError(name)

"""BrainFM: one network that reads a brain scan of any modality and resolution, and the generator that it learns from.

Paper: "BrainFM", arXiv:2509.00549 (its abstract; the body was not at hand), and its authors' public code; predecessors
SynthSeg, Brain-ID (arXiv:2311.16914), PEPSI, UNA.

A U-Net of six levels gives every voxel a feature of length 1, and every task is a linear map of it: T1w, T2w, FLAIR and
CT images, 56 structures, distances to the four surfaces of the cortex, the bias field, the place in MNI space. It is
trained on images that a generator draws from label maps and scans: random contrast, deformation, resolution, bias and
noise, from mild to severe, partly mixed with real scans.

In:  generate and train: label maps of brains in any numbering, with scans of the same subjects where there are any.
     predict: a scan of any modality, voxel size and orientation (NIfTI, DICOM), or a folder of them.
Out: maps at 1 mm and on the grid of each scan, volumes of structures, the affine to MNI space, a warped atlas, a scan
     brought onto another; networks for predict; galleries of what the generator draws.

Stages:
  1. jaxmed brainfm generate --input LABELMAPS --out runs/images
     subjects to a compact store, and a gallery of contrasts, severities and targets.
  2. jaxmed brainfm train --input LABELMAPS --out runs/train
     all tasks, or one (--variant segmentation), or one hemisphere; the generator runs inside the step, on the device.
     Presets: paper (1 mm, 160^3, 264 million parameters), laptop (2 mm, 64^3, an hour on two cores), smoke (seconds).
  3. jaxmed brainfm predict --input SCANS --weights runs/train/outputs/model --out runs/maps
     every map of every scan. --labels and --truth.T1 (and so on) compare with what is known, --atlas-labels and
     --reference-labels score registration; --robustness asks what worse versions of the scans change. CT is told by
     its air (below -500 HU); scans in other units go by their extremes.

Published weights (brainfm_pretrained.pth) are read as they are: jaxmed weights list says where they are had.
Try it without data:  jaxmed brainfm predict --preset smoke --out runs/brainfm
From Python:          from jaxmed.systems import brainfm
                      prediction = brainfm.predict(published, volume)   # prediction.maps["segmentation"]
                      brainfm.predict_maps(published, images) inside jit, vmap and grad

Deviations from the released code: what it does wrongly is left out (mixtures 255 times too dark and flipped twice,
defacing masks that are not flipped, borders cut on one side, label numbers averaged in overlaps, distances and
coordinates cut at 0); `--generator.match-release` brings the generator's back. Weights that lack heads give fewer maps
in place of random ones. A non-finite loss stops a run in place of being skipped. Names of the 56 labels are not
published: give a table (--structures CSV with label,name).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.brainfm.prediction import predict as predict
    from jaxmed.systems.brainfm.prediction import predict_maps as predict_maps


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed brainfm` must not wait for jax."""
    if name in ("predict", "predict_maps"):
        from jaxmed.systems.brainfm import prediction

        return getattr(prediction, name)
    raise AttributeError(name)

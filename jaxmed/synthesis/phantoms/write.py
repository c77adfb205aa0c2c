"""Write phantoms as the files that users have, so that examples take the same road as real data."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.io import nifti
from jaxmed.io.gradients import write_gradients
from jaxmed.physics import noddi
from jaxmed.physics.acquisition import add_rician_noise, two_shell_protocol
from jaxmed.synthesis.phantoms.diffusion import make_slab
from jaxmed.volume import Volume


class DiffusionFiles(NamedTuple):
    """Paths of a diffusion scan, and the folder of its true maps."""

    dwi: Path
    bvals: Path
    bvecs: Path
    mask: Path
    truth: Path


def write_diffusion_slab(
    folder: Path, seed: int, shape: tuple[int, int, int], snr: float, spacing: float = 2.0
) -> DiffusionFiles:
    """Simulate a two-shell scan of a brain slab and write it.

    Args:
        folder: Gets dwi.nii.gz, dwi.bval, dwi.bvec, mask.nii.gz and truth/{ndi,odi,fwf}.nii.gz.
        seed: Of anatomy and noise.
        shape: Voxels along x, y and z.
        snr: Of white matter at b = 0; Rician.
        spacing: Voxel edge in mm.
    """
    anatomy_key, noise_key = jax.random.split(jax.random.key(seed))
    phantom = make_slab(anatomy_key, shape)
    bvals, bvecs = two_shell_protocol()

    @jax.jit
    def scan(key, phantom):
        clean = noddi.signal(phantom.ndi, phantom.odi, phantom.fwf, phantom.direction, bvals, bvecs)
        return add_rician_noise(key, clean * phantom.s0[..., None], 850.0 / snr)

    # Stored right to left, as most scanners do: the array's x runs against the world's, so FSL's frame is the array's.
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    files = DiffusionFiles(*(folder / name for name in ("dwi.nii.gz", "dwi.bval", "dwi.bvec", "mask.nii.gz", "truth")))
    nifti.write(files.dwi, Volume.make(np.asarray(scan(noise_key, phantom)), affine))
    nifti.write(files.mask, Volume.make(np.asarray(phantom.mask, np.uint8), affine))
    write_gradients(files.bvals, files.bvecs, bvals, bvecs)
    for name in ("ndi", "odi", "fwf"):
        nifti.write(files.truth / f"{name}.nii.gz", Volume.make(np.asarray(getattr(phantom, name)), affine))
    return files

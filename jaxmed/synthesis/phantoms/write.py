"""Write phantoms as the files that users have, so that examples take the same road as real data."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.errors import InputError
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


WHITE_MATTER = 850.0
"""Unweighted signal of the slab's white matter, by which its noise is told."""
MOST_VOXELS = 5_000_000


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuse a simulated scan that no memory holds: a voxel takes about a kilobyte, a whole brain has 420,000.

    Raises:
        InputError: It has too many voxels.
    """
    if math.prod(shape) > MOST_VOXELS:
        raise InputError(name, f"sizes that make at most {MOST_VOXELS:,} voxels", " x ".join(map(str, shape)))


def write_diffusion_slab(
    folder: Path,
    seed: int,
    shape: tuple[int, int, int],
    snr: float,
    spacing: float = 2.0,
    protocol: tuple[np.ndarray, np.ndarray] | None = None,
) -> DiffusionFiles:
    """Simulate a scan of a brain slab and write it.

    Args:
        folder: Gets dwi.nii.gz, dwi.bval, dwi.bvec, mask.nii.gz and truth/{ndi,odi,fwf}.nii.gz.
        seed: Seed of anatomy and noise.
        shape: Voxels along x, y and z.
        snr: Signal-to-noise ratio of white matter at b = 0; Rician.
        spacing: Voxel edge in mm.
        protocol: b-values in s/mm^2 and directions; None takes the two-shell protocol.
    """
    anatomy_key, noise_key = jax.random.split(jax.random.key(seed))
    phantom = make_slab(anatomy_key, shape)
    bvals, bvecs = protocol or two_shell_protocol()
    order = noddi.order_for(bvals)

    @jax.jit
    def scan(key, phantom):
        clean = noddi.signal(phantom.ndi, phantom.odi, phantom.fwf, phantom.direction, bvals, bvecs, order=order)
        return add_rician_noise(key, clean * phantom.s0[..., None], WHITE_MATTER / snr)

    array = np.empty((*shape, len(bvals)), np.float32)
    for z in range(shape[2]):
        # Slice by slice: the model of a whole brain at once would hold gigabytes of Legendre terms.
        plane = jax.tree.map(lambda leaf, z=z: leaf[:, :, z : z + 1], phantom)
        array[:, :, z : z + 1] = scan(jax.random.fold_in(noise_key, z), plane)

    # Stored right to left, as most scanners do: the array's x runs against the world's, so FSL's frame is the array's.
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    files = DiffusionFiles(*(folder / name for name in ("dwi.nii.gz", "dwi.bval", "dwi.bvec", "mask.nii.gz", "truth")))
    nifti.write(files.dwi, Volume.make(array, affine))
    nifti.write(files.mask, Volume.make(np.asarray(phantom.mask, np.uint8), affine))
    write_gradients(files.bvals, files.bvecs, bvals, bvecs)
    for name in ("ndi", "odi", "fwf"):
        nifti.write(files.truth / f"{name}.nii.gz", Volume.make(np.asarray(getattr(phantom, name)), affine))
    return files

"""Write phantoms as the files that users have, so that examples take the same road as real data."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.gradients import write_gradients
from jaxmed.io.maps import Quantity, write_sidecar
from jaxmed.io.parametric_map import new_stack, write_mr_images
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
TRUTH = {
    "ndi": "true neurite density index",
    "odi": "true orientation dispersion index",
    "fwf": "true free water fraction",
}


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
    for name in TRUTH:
        nifti.write(files.truth / f"{name}.nii.gz", Volume.make(np.asarray(getattr(phantom, name)), affine))
    return files


def write_slab_sidecars(files: DiffusionFiles, snr: float) -> None:
    """Say beside every file of a slab what it holds."""
    sigma, said = WHITE_MATTER / snr, "simulated diffusion signals with Rician noise"
    write_sidecar(files.dwi.with_name("dwi.json"), said, "arbitrary", {}, sigma=sigma)
    write_sidecar(files.mask.with_name("mask.json"), "1 inside the head", "1", {})
    for name, definition in TRUTH.items():
        write_sidecar(files.truth / f"{name}.json", definition, "1", {})


def write_unweighted_dicom(folder: Path, files: DiffusionFiles, is_b0: np.ndarray) -> int:
    """Write the mean unweighted image of a slab as a DICOM series; return the number of its files.

    Raises:
        InputError: pydicom is missing, or the signal exceeds 16 bits.
    """
    scan = nifti.read(files.dwi)
    b0 = Volume.make(scan.array[..., is_b0].mean(axis=-1), scan.affine)
    x, y, z = b0.array.shape
    quantity = Quantity("b = 0", "simulated unweighted signal", "1", (0.0, float(b0.array.max())))
    if b0.array.max() > 65535:
        raise InputError("snr", "unweighted signal that 16 bits hold", f"{b0.array.max():.3g}", "raise the snr")
    return len(write_mr_images(folder, b0, new_stack((x, y, z), b0.affine, "simulated"), quantity, stored_per_unit=1))

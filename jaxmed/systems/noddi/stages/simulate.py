"""Stage `jaxmed noddi simulate`: a diffusion scan with known microstructure, as NIfTI with gradient tables."""

import dataclasses
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import NonNegative, Positive, Seed, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.dicom_files import require_pydicom
from jaxmed.io.parametric_map import Quantity, new_stack, write_mr_images
from jaxmed.physics.acquisition import find_shells, two_shell_protocol
from jaxmed.synthesis.phantoms.write import WHITE_MATTER, DiffusionFiles, write_diffusion_slab
from jaxmed.systems.noddi.options import check_shape
from jaxmed.systems.noddi.reading import read_table
from jaxmed.systems.noddi.simulate_page import write_page
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Simulate a diffusion scan of a brain slab.

    Attributes:
        bvals: FSL text file of b-values in s/mm^2; without it 9 + 30 + 60 images at b = 0, 711 and 2855.
        bvecs: FSL text file of unit gradient directions.
        b0_threshold: b-values up to this, in s/mm^2, are unweighted.
        shape: Voxels along x, y and z. The default is a whole brain: 250,000 voxels inside.
        spacing: Voxel edge in mm.
        snr: Signal-to-noise ratio of white matter at b = 0; the noise is Rician.
        dicom: Write the unweighted image as a DICOM series too, as a source for maps in DICOM.
        seed: Of anatomy and noise.
    """

    bvals: Path | None = None
    bvecs: Path | None = None
    b0_threshold: NonNegative = 50.0
    shape: tuple[Size, Size, Size] = (84, 98, 51)
    spacing: Positive = 2.0
    snr: Positive = 30.0
    dicom: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_shape("shape", self.shape)
        if not self.spacing > 0 or not self.snr > 0:
            raise ValueError(f"spacing, snr: expected positive numbers, found {self.spacing:g} and {self.snr:g}")
        if (self.bvals is None) != (self.bvecs is None):
            found = "only one of the two"
            raise ValueError(f"bvals, bvecs: expected both files or neither, found {found}")


def paper() -> Config:
    """A whole brain with the two-shell protocol."""
    return Config()


def laptop() -> Config:
    """A slab of eight slices."""
    return Config(shape=(84, 98, 8))


def smoke() -> Config:
    """Two small slices, in seconds."""
    return Config(shape=(24, 28, 2))


def run(config: Config, folder: RunFolder) -> None:
    """Simulate and write; the files lie in RUN/outputs under the names that `jaxmed noddi fit` takes."""
    began = time.monotonic()
    if config.dicom:
        require_pydicom()
    if config.bvals is None:
        bvals, bvecs = two_shell_protocol()
    else:
        table = read_table(config.bvals, config.bvecs, config.b0_threshold, needs_two_shells=False)
        bvals, bvecs = table.bvals, table.bvecs
    start(folder)
    log = Log(folder.path, folder.options.quiet)
    files = write_diffusion_slab(
        folder.outputs, config.seed, config.shape, config.snr, config.spacing, protocol=(bvals, bvecs)
    )
    write_sidecars(files, config)
    if config.dicom:
        log.say(f"{write_dicom(folder.outputs / 'dicom', files, bvals <= config.b0_threshold)} DICOM files")
    voxels = int(nifti.read(files.mask).array.sum())
    log.say(f"{voxels:,} voxels inside the head, {len(bvals)} images, in {folder.outputs}")
    summary = {
        "voxels": voxels,
        "images": len(bvals),
        "shells": [{"bval": s.bval, "rows": list(s.rows)} for s in find_shells(bvals, config.b0_threshold)],
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed noddi simulate --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"simulate and write": time.monotonic() - began},
    }
    write_summary(folder, summary)
    log.metrics(0, {"voxels": voxels, "images": len(bvals)})
    write_page(folder.path)


report = write_page


def write_sidecars(files: DiffusionFiles, config: Config) -> None:
    """Say beside every file what it holds."""
    sigma = WHITE_MATTER / config.snr
    write_json(
        files.dwi.with_name("dwi.json"),
        {"definition": "simulated diffusion signals with Rician noise", "unit": "arbitrary", "sigma": sigma},
    )
    write_json(files.mask.with_name("mask.json"), {"definition": "1 inside the head", "unit": "1"})
    meanings = {
        "ndi": "true neurite density index",
        "odi": "true orientation dispersion index",
        "fwf": "true free water fraction",
    }
    for name, definition in meanings.items():
        write_json(files.truth / f"{name}.json", {"definition": definition, "unit": "1"})


def write_dicom(folder: Path, files: DiffusionFiles, is_b0: np.ndarray) -> int:
    """Write the mean unweighted image as a DICOM series; return the number of its files.

    Raises:
        InputError: pydicom is missing.
    """
    scan = nifti.read(files.dwi)
    b0 = Volume.make(scan.array[..., is_b0].mean(axis=-1), scan.affine)
    x, y, z = b0.array.shape
    quantity = Quantity("b = 0", "simulated unweighted signal", "1", (0.0, float(b0.array.max())))
    if b0.array.max() > 65535:
        raise InputError("snr", "unweighted signal that 16 bits hold", f"{b0.array.max():.3g}", "raise the snr")
    return len(write_mr_images(folder, b0, new_stack((x, y, z), b0.affine, "simulated"), quantity, stored_per_unit=1))

"""Stage `jaxmed noddi simulate`: a diffusion scan with known microstructure, as NIfTI with gradient tables."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxmed.config import NonNegative, Positive, Seed, Size, checked
from jaxmed.io import nifti
from jaxmed.io.dicom_files import require_pydicom
from jaxmed.physics.acquisition import Shell, find_shells, two_shell_protocol
from jaxmed.recipes.diffusion_scan import read_table
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Section, Table, Text
from jaxmed.report.parameter_maps import map_label, read_map
from jaxmed.synthesis.phantoms.write import (
    TRUTH,
    check_shape,
    write_diffusion_slab,
    write_slab_sidecars,
    write_unweighted_dicom,
)
from jaxmed.train.run_folder import RunFolder


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
        seed: Seed of anatomy and noise.
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


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a simulated scan holds: voxels inside the head, and shells of the protocol, b = 0 included."""

    voxels: int
    images: int
    shells: tuple[Shell, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Simulate and write; the files lie in RUN/outputs under the names that `jaxmed noddi fit` takes."""
    clock = Clock()
    if config.dicom:
        require_pydicom()
    bvals, bvecs = two_shell_protocol()
    if config.bvals is not None:
        bvals, bvecs, _ = read_table(config.bvals, config.bvecs, config.b0_threshold, needs_two_shells=False)
    log = begin(folder)
    files = write_diffusion_slab(
        folder.outputs, config.seed, config.shape, config.snr, config.spacing, protocol=(bvals, bvecs)
    )
    write_slab_sidecars(files, config.snr)
    if config.dicom:
        log.say(f"{write_unweighted_dicom(folder.outputs / 'dicom', files, bvals <= config.b0_threshold)} DICOM files")
    voxels = int(nifti.read(files.mask).array.sum())
    log.say(f"{voxels:,} voxels inside the head, {len(bvals)} images, in {folder.outputs}")
    log.metrics(0, {"voxels": voxels, "images": len(bvals)})
    clock.lap("simulate and write")
    shells = find_shells(bvals, config.b0_threshold)
    finish(folder, config, Summary(voxels, len(bvals), tuple(shells)), clock, page)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the truth and the scan."""
    config, summary, outputs = run.config, run.summary, run.outputs
    mask = read_map(outputs / "mask.nii.gz").array > 0
    maps = {map_label(name): read_map(outputs / "truth" / f"{name}.nii.gz") for name in TRUTH}
    truth = slice_maps(
        {label: volume.array for label, volume in maps.items()},
        maps["NDI"].spacing,
        caption="Truth: neurite density, orientation dispersion and free water fraction.",
        styles=dict.fromkeys(maps, MapStyle(limits=(0.0, 1.0))),
        mask=mask,
    )
    use = Text(
        [
            "RUN/outputs holds dwi.nii.gz, dwi.bval, dwi.bvec and mask.nii.gz as jaxmed noddi fit and predict "
            "take them, and truth/ the maps that made the signals.",
            "The anatomy is a drawing, with soft borders and slow variation, not a brain: it tells whether an "
            "estimate recovers what is there, not whether the model describes tissue.",
        ]
    )
    return Page(
        "A simulated diffusion scan",
        f"{summary.images} images of a brain slab with known NODDI parameters, Rician noise at a "
        f"signal-to-noise ratio of {config.snr:g}",
        [
            ("Voxels", summary.voxels, "inside the head"),
            ("Images", summary.images, f"{len(summary.shells)} shells, b = 0 included"),
            ("SNR", config.snr, "of white matter at b = 0"),
        ],
        [Section("Truth", [truth]), _scan_section(run, mask), Section("How to use it", [use])],
    )


def _scan_section(run: Finished[Config, Summary], mask: np.ndarray) -> Section:
    scan = read_map(run.outputs / "dwi.nii.gz")
    images = {f"b = {shell.bval:.0f}": scan.array[..., shell.rows[0]] for shell in run.summary.shells}
    figure = slice_maps(
        images,
        scan.spacing,
        caption="The first image of each shell, arbitrary unit.",
        styles=dict.fromkeys(images, MapStyle(colormap="gray")),
        num_slices=4,
    )
    rows = [
        (round(shell.bval), len(shell.rows), float(image[mask].mean()))
        for shell, image in zip(run.summary.shells, images.values(), strict=True)
    ]
    table = Table(("b (s/mm^2)", "Images", "Mean of the first"), rows, "Shells of the protocol; means inside the head.")
    return Section("Scan", [figure, table])

"""A diffusion scan that a stage was given, or simulates: its files, its voxels for a network, and maps beside it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxmed.config import Positive, Seed, Size, checked
from jaxmed.data.diffusion import DiffusionScan, check_voxels, read_scan
from jaxmed.files import require_given
from jaxmed.io.gradient_match import Table, match_table
from jaxmed.io.gradients import GradientTable, read_gradients, to_world
from jaxmed.io.maps import Quantity, write_map
from jaxmed.io.masks import fill_mask
from jaxmed.physics.acquisition import check_table
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.posterior import Posterior, PosteriorConfig, sample_posterior
from jaxmed.synthesis.phantoms.write import check_shape, write_diffusion_slab
from jaxmed.train.announce import announce
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume

MapsByName: TypeAlias = Mapping[str, tuple[np.ndarray, str, str]]
"""Array, definition and unit of every map by name."""


@dataclasses.dataclass(frozen=True)
@checked
class ScanConfig:
    """A diffusion scan, or one to simulate.

    Attributes:
        dwi: Diffusion scan: a 4D NIfTI file, or a folder of DICOM files whose headers hold the gradients. Magnitudes in
            any unit, images of one scan in one scaling.
        bvals: FSL text file of b-values in s/mm^2, one per image; not with DICOM.
        bvecs: FSL text file of unit gradient directions, 3 x N or N x 3; not with DICOM.
        mask: NIfTI file on the grid of the scan, whose voxels count where it is not 0. Without it: the largest
            connected region whose mean unweighted signal exceeds a tenth of its 98th percentile.
        synthetic_shape: Voxels (x, y, z) of the brain slab to simulate where no --dwi is given.
        synthetic_snr: Signal-to-noise ratio of the synthetic slab, white matter, unweighted.
        seed: Seed of all that is drawn: the slab, Markov chains, a network that is trained for it; a fit draws nothing.
    """

    dwi: Path | None = None
    bvals: Path | None = None
    bvecs: Path | None = None
    mask: Path | None = None
    synthetic_shape: tuple[Size, Size, Size] | None = None
    synthetic_snr: Positive = 30.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.synthetic_shape is not None:
            check_shape("synthetic_shape", self.synthetic_shape)

    def simulate(self, folder: RunFolder) -> tuple["ScanConfig", str | None]:
        """Write a slab into RUN/inputs where one is asked for; return the scan of files, and where its truth is."""
        if self.synthetic_shape is None or self.dwi is not None:
            return self, None
        start(folder)
        files = write_diffusion_slab(folder.path / "inputs", self.seed, self.synthetic_shape, self.synthetic_snr)
        given = dataclasses.replace(self, dwi=files.dwi, bvals=files.bvals, bvecs=files.bvecs, mask=files.mask)
        return given, str(files.truth.relative_to(folder.path))


def read_table(
    bvals: Path | None, bvecs: Path | None, b0_threshold: float, *, needs_two_shells: bool = True
) -> GradientTable:
    """Read a gradient table and check that it can be fitted or trained for; see `check_protocol`.

    Raises:
        InputError: It is missing or wrong.
    """
    bvals, bvecs = require_given(bvals, "bvals"), require_given(bvecs, "bvecs")
    table = read_gradients(bvals, bvecs, b0_threshold=b0_threshold)
    return check_table(table, bvals, b0_threshold, needs_two_shells=needs_two_shells)


def read_signals(
    dwi: Path | None, bvals: Path | None, bvecs: Path | None, mask: Path | None, table: Table, series: str | None = None
) -> tuple[DiffusionScan, Float32[np.ndarray, "voxel image"]]:
    """Read a scan of a network's protocol; arguments are those of `data.diffusion.read_scan`.

    Returns:
        The scan, whose mask leaves voxels out that are not finite, and the magnitudes inside in the network's order.

    Raises:
        InputError: For whatever a user can have wrong in these files; the protocol is another.
    """

    def check(found: GradientTable, where: object) -> GradientTable:
        return found._replace(notes=(*found.notes, *match_table(table, *found[:2], where).notes))

    scan = read_scan(dwi, bvals, bvecs, mask, table.b0_threshold, check, series=series)
    signals = scan.dwi.array[scan.mask][:, match_table(table, *scan.gradients[:2], scan.path).order]
    left_out = "their maps are 0, and map 'mask' leaves them out"
    finite = check_voxels(signals, table.is_b0, scan.path, scan.notes, left_out=left_out)
    return scan._replace(mask=fill_mask(finite, scan.mask)), signals[finite]


def make_maps(
    values: Float32[np.ndarray, "voxel output"], scan: DiffusionScan, outputs: Sequence[Quantity]
) -> dict[str, Volume]:
    """Put the voxels of a scan back into volumes by name, 0 outside the mask."""
    return {
        output.name: Volume.make(fill_mask(column, scan.mask), scan.dwi.affine)
        for output, column in zip(outputs, values.T, strict=True)
    }


def write_maps(
    folder: Path,
    maps: MapsByName,
    scan: DiffusionScan,
    constants: Mapping[str, Any],
    further: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Write maps as NIfTI on the grid of the scan, each with a sidecar; `further` are lines of single sidecars."""
    for name, (array, definition, unit) in maps.items():
        array = to_world(array, scan.dwi.affine) if name == "direction" else array
        array = array if array.dtype == np.uint8 else array.astype(np.float32)
        volume = Volume.make(array, scan.dwi.affine)
        write_map(folder, name, volume, definition, unit, constants, reference=scan.reference, **further.get(name, {}))


def sample_scan(
    scan: DiffusionScan,
    model: MicrostructureModel,
    inside: Bool[np.ndarray, "x y z"],
    values: Float[np.ndarray, "x y z parameter"],
    direction: Float[np.ndarray, "x y z 3"],
    steps: int,
    seed: int,
    b0_threshold: float,
    log: Log,
) -> Posterior:
    """Sample the posterior of a scan's fitted voxels by chains that start at the fit and keep so many steps."""
    assert scan.sigma is not None
    warmup, count = max(50, steps // 2), int(inside.sum())
    announce(log, f"Sampling the posterior by chains of {warmup + steps:,} steps", count=count, unit="voxels")
    return sample_posterior(
        jax.random.key(seed), model, scan.dwi.array[inside], scan.gradients.bvals, scan.gradients.bvecs, scan.sigma,
        values[inside], direction[inside], b0_threshold=b0_threshold,
        config=PosteriorConfig(num_warmup=warmup, num_samples=steps),
    )  # fmt: skip

"""Write phantom pairs of MRI and amyloid PET as files: NIfTI, and the table that CoCoLIT's stages read."""

from pathlib import Path

import jax
import numpy as np

from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.amyloid import cortical_region, draw_pair
from jaxmed.synthesis.phantoms.cohort import centred_affine, check_fractions, claim_folder, plan_splits, write_manifest
from jaxmed.volume import Volume

REGION = "cortex.nii.gz"
"""Mask of a region that is cortex in every subject."""
COLUMNS = ("scan_path", "suvr_path", "subject", "split", "atrophy", "uptake")
_draw = jax.jit(draw_pair, static_argnames=("shape", "spacing", "linked"))


def write_amyloid_cohort(
    folder: Path,
    seed: int,
    subjects: int,
    shape: tuple[int, int, int] = (24, 24, 24),
    spacing: float = 8.0,
    *,
    linked: bool = True,
    fractions: tuple[float, float, float] = (0.7, 0.3, 0.0),
) -> Path:
    """Write pairs of MRI and PET; what is there already stays.

    Args:
        folder: Gets pairs.csv, its settings, mri/, suvr/ and cortex.nii.gz, the region whose mean decides.
        seed: Of the cohort; subject i is the same whatever the number of subjects.
        subjects: How many.
        shape: Voxels along x, y and z.
        spacing: Voxel edge in mm.
        linked: See `amyloid.draw_pair`; False for the negative control.
        fractions: Shares of train, validation and test.

    Returns:
        The table, with the columns scan_path and suvr_path (relative to it), subject, split, atrophy (0 to 1) and
        uptake (SUVR of the cortex).

    Raises:
        InputError: A setting is impossible, or the folder holds pairs of other settings.
    """
    check_fractions(subjects, fractions)
    settings: dict[str, object] = {"seed": seed, "subjects": subjects, "shape": list(shape), "spacing": spacing}
    claim_folder(folder / "pairs.json", settings | {"linked": linked, "fractions": list(fractions)})
    # The axes of the MNI152 template: x runs to the left.
    affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ centred_affine(shape, [spacing] * 3)
    if not (folder / REGION).exists():
        region = np.asarray(cortical_region(shape, spacing)).astype(np.uint8)
        nifti.write(folder / REGION, Volume.make(region, affine))
    rows: list[dict[str, object]] = []
    for index, split in plan_splits(subjects, fractions):
        name = f"pair_{index:04d}"
        pair = _draw(jax.random.fold_in(jax.random.key(seed), index), shape=shape, spacing=spacing, linked=linked)
        paths = {"scan_path": f"mri/{name}.nii.gz", "suvr_path": f"suvr/{name}.nii.gz"}
        numbers = {"atrophy": f"{float(pair.atrophy):.4f}", "uptake": f"{float(pair.uptake):.4f}"}
        rows.append({**paths, "subject": name, "split": split, **numbers})
        for path, array in zip(paths.values(), (pair.mri, pair.suvr), strict=True):
            if not (folder / path).exists():
                nifti.write(folder / path, Volume.make(np.asarray(array, np.float32), affine))
    return write_manifest(folder / "pairs.csv", COLUMNS, rows)

"""Write phantom heads as files: label maps and T1-weighted scans as NIfTI, and the table that a store is made from."""

from pathlib import Path

import jax
import numpy as np

from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.cohort import centred_affine, check_fractions, claim_folder, plan_splits, write_manifest
from jaxmed.synthesis.phantoms.heads import draw_head
from jaxmed.volume import Volume

COLUMNS = ("path", "T1", "subject", "split")
SMALL_SHAPE, SMALL_SPACING, CLAIMED_SPACING = (48, 56, 48), 4.0, 1.0
# Compiled here, once for all cohorts of a size: a smoke run writes several.
_draw = jax.jit(draw_head, static_argnames=("shape", "spacing"))


def write_small_heads(folder: Path, seed: int, subjects: int) -> Path:
    """Write heads for runs of seconds, as `write_heads`: of 4 mm voxels, whose files claim 1 mm."""
    shares = (0.7, 0.3, 0.0)
    return write_heads(folder, seed, subjects, SMALL_SHAPE, SMALL_SPACING, shares, stored_spacing=CLAIMED_SPACING)


def write_heads(
    folder: Path,
    seed: int,
    subjects: int,
    shape: tuple[int, int, int] = (96, 112, 96),
    spacing: float = 2.0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    stored_spacing: float | None = None,
) -> Path:
    """Write heads; what is there already stays.

    Args:
        folder: Gets subjects.csv, its settings, and labels/ and scans/.
        seed: Of the cohort; subject i is the same whatever the number of subjects.
        subjects: How many.
        shape: Voxels along x, y and z.
        spacing: Voxel edge in mm.
        fractions: Shares of train, validation and test.
        stored_spacing: Voxel edge that the files claim, in mm, for small heads; that of the heads by default.

    Returns:
        The table.

    Raises:
        InputError: A setting is impossible, or the folder holds heads of other settings.
    """
    check_fractions(subjects, fractions)
    settings: dict[str, object] = {"seed": seed, "subjects": subjects, "shape": list(shape), "spacing": spacing}
    settings |= {"stored_spacing": stored_spacing, "fractions": list(fractions)}
    claim_folder(folder / "subjects.json", settings)
    affine = centred_affine(shape, [stored_spacing or spacing] * 3)
    rows: list[dict[str, object]] = []
    for index, split in plan_splits(subjects, fractions):
        name = f"head_{index:04d}"
        paths = {"path": f"labels/{name}.nii.gz", "T1": f"scans/{name}.nii.gz"}
        rows.append({**paths, "subject": name, "split": split})
        if all((folder / path).exists() for path in paths.values()):
            continue
        head = _draw(jax.random.fold_in(jax.random.key(seed), index), shape=shape, spacing=spacing)
        for path, array, kind in ((paths["path"], head.labels, np.int16), (paths["T1"], head.image, np.float32)):
            nifti.write(folder / path, Volume.make(np.asarray(array, kind), affine))
    return write_manifest(folder / "subjects.csv", COLUMNS, rows)

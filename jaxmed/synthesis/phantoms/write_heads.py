"""Write phantom heads as files: label maps and T1-weighted scans as NIfTI, and the table that a store is made from."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.cohort import centred_affine, check_fractions, claim_folder, plan_splits, write_manifest
from jaxmed.synthesis.phantoms.heads import draw_head
from jaxmed.volume import Volume

COLUMNS = ("path", "T1", "subject", "split")


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
    draw = jax.jit(partial(draw_head, shape=shape, spacing=spacing))
    affine = centred_affine(shape, [stored_spacing or spacing] * 3)
    rows: list[dict[str, object]] = []
    for index, split in plan_splits(subjects, fractions):
        name = f"head_{index:04d}"
        paths = {"path": f"labels/{name}.nii.gz", "T1": f"scans/{name}.nii.gz"}
        rows.append({**paths, "subject": name, "split": split})
        if all((folder / path).exists() for path in paths.values()):
            continue
        head = draw(jax.random.fold_in(jax.random.key(seed), index))
        for path, array, kind in ((paths["path"], head.labels, np.int16), (paths["T1"], head.image, np.float32)):
            nifti.write(folder / path, Volume.make(np.asarray(array, kind), affine))
    return write_manifest(folder / "subjects.csv", COLUMNS, rows)

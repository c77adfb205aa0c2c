"""Write phantom chests as a cohort: NIfTI files and the manifest that training reads."""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int16

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.chest import FINDINGS, ChestConfig, make_chest
from jaxmed.synthesis.phantoms.cohort import (
    SPLITS,
    centred_affine,
    check_fractions,
    claim_folder,
    plan_splits,
    write_manifest,
)
from jaxmed.volume import Volume

COLUMNS = ("path", "subject", "label", "split", *FINDINGS)


def write_chest_cohort(
    folder: str | Path,
    seed: int,
    subjects: int,
    shape: tuple[int, int, int] = (64, 64, 64),
    config: ChestConfig = ChestConfig(),
    *,
    finding: Literal["nodule", "emphysema", "reticular", "effusion"] = "nodule",
    distractors: float = 0.0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
) -> Path:
    """Write a cohort of phantom chests, one scan per subject; half of each split has the finding.

    What is there already stays: a second call writes nothing, and a call after an interruption writes what is missing.

    Args:
        folder: Gets scans.csv, scans.json (seed and settings) and scans/chest_0000.nii.gz and so on: int16 HU, axes
            RAS+, the centre of the field of view at 0 mm.
        seed: Seed of the cohort; the anatomy and noise of subject i are the same whatever the number of subjects.
        subjects: How many.
        shape: Voxels along x, y and z; the voxel size in mm is `config.field_of_view` divided by it.
        config: Scanner and anatomy.
        finding: Which finding is the label.
        distractors: Probability of each other finding, whatever the label.
        fractions: Shares of train, validation and test; they sum to 1.

    Returns:
        The manifest, with the columns path (relative to it), subject, label (1 with the finding), split, and 0 or 1
        under nodule, emphysema, reticular and effusion.

    Raises:
        InputError: A setting is impossible, or the folder holds a cohort of other settings.
    """
    folder = Path(folder)
    check_fractions(subjects, fractions)
    if finding not in FINDINGS:
        raise InputError("finding", f"one of {', '.join(FINDINGS)}", f"'{finding}'")
    if not 0 <= distractors <= 1:
        raise InputError("distractors", "a probability", distractors)
    settings = {
        "seed": seed,
        "subjects": subjects,
        "shape": list(shape),
        "config": to_record(config),
        "finding": finding,
        "distractors": float(distractors),
        "fractions": list(fractions),
    }
    claim_folder(folder / "scans.json", settings)
    affine = centred_affine(shape, [length / size for length, size in zip(config.field_of_view, shape, strict=True)])
    # One compilation for the cohort; without jit every operation of a chest is dispatched on its own.
    scan = jax.jit(lambda key, flags: _stored(make_chest(key, flags, shape, config).array))
    rows, seen = [], {split: 0 for split in SPLITS}
    for index, split in plan_splits(subjects, fractions):
        # The label alternates within a split, and the others are drawn per subject.
        drawn = np.random.default_rng([seed, index]).random(len(FINDINGS)) < distractors
        present = dict(zip(FINDINGS, map(int, drawn), strict=True)) | {finding: seen[split] % 2}
        seen[split] += 1
        name = f"chest_{index:04d}"
        path = folder / "scans" / f"{name}.nii.gz"
        if not path.exists():
            flags = jnp.array([bool(present[one]) for one in FINDINGS])
            array = scan(jax.random.fold_in(jax.random.key(seed), index), flags)
            nifti.write(path, Volume.make(np.asarray(array), affine))
        rows.append(
            {"path": f"scans/{name}.nii.gz", "subject": name, "split": split, "label": present[finding]} | present
        )
    return write_manifest(folder / "scans.csv", COLUMNS, rows)


def _stored(array: Float[Array, "x y z"]) -> Int16[Array, "x y z"]:
    """Round to whole HU in the range that scanners store, [-1024, 3071]."""
    return jnp.clip(jnp.rint(array), -1024, 3071).astype(jnp.int16)

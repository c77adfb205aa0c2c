"""Write phantom brains as a cohort: NIfTI images with label maps, and the manifest that training reads."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxmed.arrays.types import KeyArray
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.brain import BrainConfig, BrainPhantom, draw_brain, make_brain
from jaxmed.synthesis.phantoms.cohort import centred_affine, check_fractions, claim_folder, plan_splits, write_manifest
from jaxmed.volume import Volume

COLUMNS = ("path", "labels", "subject", "label", "split", "lesion", "cue")


def write_brain_cohort(
    folder: str | Path,
    seed: int,
    subjects: int,
    shape: tuple[int, ...] = (64, 64),
    config: BrainConfig = BrainConfig(),
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    flags: tuple[bool, bool] | None = None,
) -> Path:
    """Write a cohort of phantom brains, one scan per subject.

    What is there already stays: a second call writes nothing, and a call after an interruption writes what is missing.

    Args:
        folder: Gets scans.csv, scans.json (seed and settings), scans/brain_0000.nii.gz and labels/brain_0000.nii.gz
            and so on: float32 in [0, 2] and uint8 label maps, axes RAS+, the centre of the field of view at 0 mm.
        seed: Seed of the cohort; the anatomy and noise of subject i are the same whatever the number of subjects.
        subjects: How many.
        shape: Voxels along x, y and z; two numbers make one axial slice as thick as a voxel is wide.
        config: Anatomy, contrast and probabilities of lesion and cue.
        fractions: Shares of train, validation and test; they sum to 1.
        flags: Lesion and cue of every subject; None draws them.

    Returns:
        The manifest, with the columns path and labels (relative to it), subject, label (1 with the lesion), split, and
        0 or 1 under lesion and cue.

    Raises:
        InputError: A setting is impossible, or the folder holds a cohort of other settings.
    """
    folder = Path(folder)
    check_fractions(subjects, fractions)
    if len(shape) not in (2, 3) or min(shape) < 8:
        raise InputError("shape", "2 or 3 axes of 8 voxels or more", shape)
    settings = {
        "seed": seed,
        "subjects": subjects,
        "shape": list(shape),
        "config": to_record(config),
        "fractions": list(fractions),
        "flags": None if flags is None else list(flags),
    }
    claim_folder(folder / "scans.json", settings)
    spacing = [config.field_of_view / size for size in shape]
    # A slice is as thick as its voxels are wide.
    spacing += spacing[: 3 - len(shape)]
    whole = [*shape, 1][:3]
    affine = centred_affine(whole, spacing)
    rows = []
    for index, split in plan_splits(subjects, fractions):
        name = f"brain_{index:04d}"
        brain = _scan(jax.random.fold_in(jax.random.key(seed), index), flags, shape, config)
        for place, array, kind in (("scans", brain.image, np.float32), ("labels", brain.labels, np.uint8)):
            path = folder / place / f"{name}.nii.gz"
            if not path.exists():
                nifti.write(path, Volume.make(np.asarray(array, kind).reshape(whole), affine))
        lesion, cue = int(brain.has_lesion), int(brain.has_cue)
        paths = {"path": f"scans/{name}.nii.gz", "labels": f"labels/{name}.nii.gz"}
        rows.append({**paths, "subject": name, "label": lesion, "split": split, "lesion": lesion, "cue": cue})
    return write_manifest(folder / "scans.csv", COLUMNS, rows)


# Compiled here, once for all cohorts of the same brains: it takes 3 to 5 s, and a smoke run writes up to five of them.
@partial(jax.jit, static_argnames=("flags", "shape", "config"))
def _scan(key: KeyArray, flags: tuple[bool, bool] | None, shape: tuple[int, ...], config: BrainConfig) -> BrainPhantom:
    if flags is None:
        return draw_brain(key, shape, config)
    return make_brain(key, flags[0], flags[1], shape, config)

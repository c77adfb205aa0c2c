"""Write phantom prostates as a cohort: sequences and label maps of each case, and the manifest that training reads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16

from jaxmed.config import to_record
from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.cohort import (
    SPLITS,
    centred_affine,
    check_fractions,
    claim_folder,
    plan_splits,
    write_manifest,
)
from jaxmed.synthesis.phantoms.prostate import GRADES, SEQUENCES, ProstateConfig, make_prostate
from jaxmed.volume import Volume

COLUMNS = ("path", "subject", "label", "split", "grade", "side", "gland_ml", "mask", "zones")
SIGNIFICANT = 2  # the least grade whose label is 1


def write_prostate_cohort(
    folder: str | Path,
    seed: int,
    subjects: int,
    shape: tuple[int, int, int] = (48, 48, 16),
    config: ProstateConfig = ProstateConfig(),
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    name: str = "prostate",
) -> Path:
    """Write a cohort of phantom prostates, one case per subject; every split has as many of each grade, in turn.

    What is there already stays: a second call writes nothing, and a call after an interruption writes what is missing.

    Args:
        folder: Gets cases.csv, cases.json (seed and settings) and cases/NAME_0000 and so on with t2w, hbv, adc,
            lesion and zones .nii.gz: int16, axes RAS+, the centre of the field of view at 0 mm.
        seed: Seed of the cohort; subject i is the same whatever the number of subjects, but for split and grade.
        subjects: How many.
        shape: Voxels along x, y and z; the voxel size in mm is `config.field_of_view` divided by it.
        config: Scanner and anatomy.
        fractions: Shares of train, validation and test; they sum to 1.
        name: Start of the subjects' names, by which those of two cohorts differ.

    Returns:
        The manifest, with the columns path (the T2w scan, relative to it), subject, label (1 from grade 2 on), split,
        grade (0, no lesion, to 4), side of the lesion (left, right or none), gland_ml (volume of the gland), and label
        maps: mask (1 the lesion) and zones (1 the outer zone of the gland, 2 the inner one).

    Raises:
        InputError: A setting is impossible, or the folder holds a cohort of other settings.
    """
    folder = Path(folder)
    check_fractions(subjects, fractions)
    settings: dict[str, object] = {
        "seed": seed,
        "subjects": subjects,
        "shape": list(shape),
        "config": to_record(config),
        "fractions": list(fractions),
        "name": name,
    }
    claim_folder(folder / "cases.json", settings)
    spacing = [length / size for length, size in zip(config.field_of_view, shape, strict=True)]
    affine, voxel_ml = centred_affine(shape, spacing), float(np.prod(spacing)) / 1000

    @jax.jit  # one compilation for the cohort; without jit every operation of a case is dispatched on its own
    def draw(
        key: jax.Array, grade: Int[Array, ""]
    ) -> tuple[Int16[Array, "x y z 3"], Int16[Array, "x y z"], Int16[Array, "x y z"], Array, Float[Array, ""]]:
        found = make_prostate(key, grade, shape, config)
        stored = jnp.clip(jnp.rint(found.images), 0, 4095).astype(jnp.int16)
        zones = found.gland.astype(jnp.int16) + found.inner
        return (
            stored,
            found.lesion.astype(jnp.int16),
            zones.astype(jnp.int16),
            found.is_right,
            found.gland.sum() * voxel_ml,
        )

    rows, seen = [], {split: 0 for split in SPLITS}
    for index, split in plan_splits(subjects, fractions):
        grade, subject = seen[split] % GRADES, f"{name}_{index:04d}"
        seen[split] += 1
        place = folder / "cases" / subject
        images, lesion, zones, is_right, volume = draw(
            jax.random.fold_in(jax.random.key(seed), index), jnp.int32(grade)
        )
        for number, sequence in enumerate(SEQUENCES):
            if not (path := place / f"{sequence}.nii.gz").exists():
                nifti.write(path, Volume.make(np.asarray(images[..., number]), affine))
        for what, labels in (("lesion", lesion), ("zones", zones)):
            if not (path := place / f"{what}.nii.gz").exists():
                nifti.write(path, Volume.make(np.asarray(labels), affine))
        side = ("right" if is_right else "left") if grade else "none"
        cells = (
            f"cases/{subject}/{SEQUENCES[0]}.nii.gz", subject, int(grade >= SIGNIFICANT), split, grade, side,
            f"{float(volume):.3f}", f"cases/{subject}/lesion.nii.gz", f"cases/{subject}/zones.nii.gz",
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return write_manifest(folder / "cases.csv", COLUMNS, rows)

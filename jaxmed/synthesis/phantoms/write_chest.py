"""Write phantom chests as a cohort: NIfTI files and the manifest that training reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int16

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import write_table
from jaxmed.synthesis.phantoms.chest import FINDINGS, ChestConfig, make_chest
from jaxmed.synthesis.phantoms.cohort import SPLITS, check_fractions, claim_folder
from jaxmed.volume import Volume

COLUMNS = ("path", "subject", "label", "split", *FINDINGS)


class _Subject(NamedTuple):
    index: int
    split: str
    flags: tuple[bool, ...]


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
    _check(subjects, finding, distractors, fractions)
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
    rows = []
    # One compilation for the cohort; without jit every operation of a chest is dispatched on its own.
    scan = jax.jit(lambda key, flags: _stored(make_chest(key, flags, shape, config).array))
    for subject in _plan(seed, subjects, finding, distractors, fractions):
        name = f"scans/chest_{subject.index:04d}.nii.gz"
        if not (folder / name).exists():
            array = scan(jax.random.fold_in(jax.random.key(seed), subject.index), jnp.array(subject.flags))
            nifti.write(folder / name, Volume.make(np.asarray(array), _centered_affine(shape, config)))
        present = dict(zip(FINDINGS, map(int, subject.flags), strict=True))
        identity = {"path": name, "subject": f"chest_{subject.index:04d}", "split": subject.split}
        rows.append({**identity, "label": present[finding], **present})
    manifest = folder / "scans.csv"
    if not manifest.exists():
        write_table(manifest, COLUMNS, rows)
    return manifest


def _check(subjects: int, finding: str, distractors: float, fractions: tuple[float, float, float]) -> None:
    check_fractions(subjects, fractions)
    if finding not in FINDINGS:
        raise InputError("finding", f"one of {', '.join(FINDINGS)}", f"'{finding}'")
    if not 0 <= distractors <= 1:
        raise InputError("distractors", "a probability", distractors)


def _plan(
    seed: int, subjects: int, finding: str, distractors: float, fractions: tuple[float, float, float]
) -> Iterator[_Subject]:
    """Yield who has what: the label alternates within a split, and the others are drawn per subject."""
    ends = np.rint(np.cumsum(fractions) * subjects).astype(int)
    starts = [0, *ends[:2]]
    for split, start, end in zip(SPLITS, starts, ends, strict=True):
        for index in range(int(start), int(end)):
            drawn = np.random.default_rng([seed, index]).random(len(FINDINGS)) < distractors
            is_case = (index - int(start)) % 2 == 1
            flags = tuple(
                is_case if name == finding else bool(other) for name, other in zip(FINDINGS, drawn, strict=True)
            )
            yield _Subject(index, split, flags)


def _stored(array: Float[Array, "x y z"]) -> Int16[Array, "x y z"]:
    """Round to whole HU in the range that scanners store, [-1024, 3071]."""
    return jnp.clip(jnp.rint(array), -1024, 3071).astype(jnp.int16)


def _centered_affine(shape: tuple[int, int, int], config: ChestConfig) -> Float64[np.ndarray, "4 4"]:
    """Return the affine of an RAS+ grid whose field of view is centred on the origin, in mm."""
    spacing = np.divide(config.field_of_view, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return affine

"""Write puzzles as a cohort of segmentation tasks: PNG or NIfTI images with masks, and the manifest of tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.synthesis.phantoms.cohort import centred_affine, claim_folder, write_manifest
from jaxmed.synthesis.phantoms.puzzles import (
    FAMILIES,
    NOVEL_FAMILIES,
    TRAIN_FAMILIES,
    VALIDATION_FAMILIES,
    PuzzleConfig,
    make_puzzle,
)
from jaxmed.volume import Volume

COLUMNS = ("path", "mask", "task", "subject", "split")


class Counts(NamedTuple):
    """Puzzles of each family, by what they are for.

    Attributes:
        train: Images of each family for training.
        validation: Images of the family for validation.
        support: Images of each novel family, with labels.
        test: Images of each novel family, to be solved.
    """

    train: int
    validation: int
    support: int
    test: int


def write_puzzle_cohort(
    folder: str | Path,
    seed: int,
    counts: Counts,
    shape: tuple[int, ...] = (32, 32),
    config: PuzzleConfig = PuzzleConfig(),
) -> Path:
    """Write a cohort of puzzles, one file and one subject each.

    What is there already stays: a second call writes nothing, and a call after an interruption writes what is missing.

    Args:
        folder: Gets puzzles.csv, puzzles.json (seed and settings), and images and masks: 8-bit PNG in 2D; in 3D
            NIfTI, float32 in [0, 1] and uint8, voxels of 1 mm, axes RAS+, the centre of the field of view at 0 mm.
        seed: Seed of the cohort.
        counts: Counts of each family.
        shape: Pixels along rows and columns, or voxels along x, y and z.
        config: What is drawn.

    Returns:
        The manifest, with the columns path and mask (relative to it), task (the family), subject, and split: train,
        validation, and for the novel families support and test.

    Raises:
        InputError: A setting is impossible, or the folder holds a cohort of other settings.
    """
    folder = Path(folder)
    if len(shape) not in (2, 3) or min(shape) < 8:
        raise InputError("shape", "2 or 3 axes of 8 voxels or more", shape)
    if min(counts) < 0 or not sum(counts):
        raise InputError("counts", "0 or more each, and not all 0", tuple(counts))
    settings = {"seed": seed, "counts": list(counts), "shape": list(shape), "config": to_record(config)}
    claim_folder(folder / "puzzles.json", settings)
    # One compilation for the cohort: the family is an argument.
    draw = jax.jit(lambda key, family: make_puzzle(key, family, shape, config))
    rows = []
    suffix = ".png" if len(shape) == 2 else ".nii.gz"
    for number, (family, split) in enumerate(_plan(counts)):
        name = f"{FAMILIES[family]}_{number:05d}"
        image, mask = (folder / place / f"{name}{suffix}" for place in ("images", "masks"))
        if not (image.exists() and mask.exists()):
            puzzle = draw(jax.random.fold_in(jax.random.key(seed), number), family)
            _write(image, np.asarray(puzzle.image))
            _write(mask, np.asarray(puzzle.mask))
        paths = {"path": image.relative_to(folder).as_posix(), "mask": mask.relative_to(folder).as_posix()}
        rows.append({**paths, "task": FAMILIES[family], "subject": name, "split": split})
    return write_manifest(folder / "puzzles.csv", COLUMNS, rows)


def _plan(counts: Counts) -> Iterator[tuple[int, str]]:
    """Yield family and split of each puzzle."""
    for families, splits in (
        (TRAIN_FAMILIES, ("train",)), (VALIDATION_FAMILIES, ("validation",)), (NOVEL_FAMILIES, ("support", "test"))
    ):  # fmt: skip
        for family in families:
            for split in splits:
                for _ in range(getattr(counts, split)):
                    yield family, split


def _write(path: Path, array: np.ndarray) -> None:
    if array.ndim == 2:
        write_png(path, array.astype(np.uint8) * 255 if array.dtype == bool else array)
        return
    nifti.write(path, Volume.make(array, centred_affine(array.shape, (1.0, 1.0, 1.0))))

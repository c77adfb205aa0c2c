"""What writers of phantom cohorts share: whose folder it is, who goes into which split, where a volume stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from jaxmed.errors import InputError
from jaxmed.files import read_record, write_json
from jaxmed.io.tables import write_table

SPLITS = ("train", "validation", "test")


def check_fractions(subjects: int, fractions: tuple[float, float, float]) -> None:
    """Refuse an impossible cohort.

    Raises:
        InputError: There is no subject, or the shares of the splits do not sum to 1.
    """
    if subjects < 1:
        raise InputError("subjects", "1 or more", subjects)
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError("fractions", "three shares that sum to 1", fractions)


def claim_folder(path: Path, settings: dict[str, object]) -> None:
    """Record whose folder this is, or refuse that of another cohort."""
    if not path.exists():
        write_json(path, settings)
        return
    found = read_record(path)
    name = next((name for name, value in settings.items() if found.get(name) != value), None)
    if name is not None:
        expected, advice = f"a cohort of {name} {settings[name]}", "choose another folder, or delete this one"
        raise InputError(path, expected, f"{found.get(name)}", advice)


def plan_splits(subjects: int, fractions: tuple[float, float, float]) -> Iterator[tuple[int, str]]:
    """Yield index and split of each subject, the splits one after the other."""
    ends = np.rint(np.cumsum(fractions) * subjects).astype(int)
    for index in range(subjects):
        yield index, SPLITS[int(np.searchsorted(ends, index, side="right"))]


def centred_affine(shape: Sequence[int], spacing: Sequence[float]) -> Float64[np.ndarray, "4 4"]:
    """Return the affine of an RAS+ grid whose field of view is centred on the origin, in mm."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.asarray(spacing) * (np.array(shape) - 1) / 2
    return affine


def write_manifest(path: Path, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> Path:
    """Write the table of a cohort unless it is there, and return its place."""
    if not path.exists():
        write_table(path, columns, rows)
    return path

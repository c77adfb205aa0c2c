"""What writers of phantom cohorts share: whose folder it is, and which subject goes into which split."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxmed.errors import InputError
from jaxmed.files import read_record, write_json

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
    different = [name for name, value in settings.items() if found.get(name) != value]
    if different:
        name = different[0]
        raise InputError(
            path,
            f"a cohort of {name} {settings[name]}",
            f"{found.get(name)}",
            "choose another folder, or delete this one",
        )


def plan_splits(subjects: int, fractions: tuple[float, float, float]) -> Iterator[tuple[int, str]]:
    """Yield index and split of each subject, the splits one after the other."""
    ends = np.rint(np.cumsum(fractions) * subjects).astype(int)
    for index in range(subjects):
        yield index, SPLITS[int(np.searchsorted(ends, index, side="right"))]

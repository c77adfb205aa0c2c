"""Which files belong to a subject: a table of them, or a folder; on the host.

A table (CSV) has the column `path`, the label map, and may have `subject`, `split`, `age` (years), `dataset` (of the
paper's, for how often its images are taken as they are), `generation` (the map that images are drawn from), images
`T1`, `T2`, `FLAIR` and `CT` (HU), distances `lp`, `lw`, `rp`, `rw`, coordinates `mni_x`, `mni_y`, `mni_z` (both as the
paper stores them, 20 mm + 128 and 100 mm), `defaced` (1 where a face was removed) and `lesion` (shares from 0 to 1).

In a folder, files of the paper's names (`STEM.brainseg_with_extracerebral.nii`, `STEM.T1w.nii`, `STEM.lp_dist_map.nii`)
are brought together by their stems, and its lists are read where they lie beside: `train.txt` and `test.txt` with a
file of each subject in a line, `participants_age.txt` with a stem and an age. Any other NIfTI file is a label map, and
a subject of its own.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxmed.data.cohort import require_files_apart, stated_splits, subjects_of
from jaxmed.errors import InputError
from jaxmed.files import unique_names, walk_files
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, resolve_path

IMAGES = ("T1", "T2", "FLAIR", "CT")
DISTANCES = ("lp", "lw", "rp", "rw")
COORDINATES = ("mni_x", "mni_y", "mni_z")
COLUMNS = ("generation", *IMAGES, *DISTANCES, *COORDINATES, "defaced", "lesion")
SPLITS = ("train", "validation", "test")
# The paper's endings, and what they are called here; "path" is the label map. Of two for one thing the first is taken.
ENDINGS = {
    "brainseg_with_extracerebral": "path",
    "brainseg": "path",
    "generation_labels": "generation",
    "T1w": "T1",
    "T2w": "T2",
    "FLAIR": "FLAIR",
    "CT": "CT",
    **{f"{name}_dist_map": name for name in DISTANCES},
    **{f"mni_reg.{axis}": f"mni_{axis}" for axis in "xyz"},
    **{f"{name}.defacingmask": "defaced" for name in ("T1w", "T2w", "FLAIR", "CT")},
}
CUMULATIVE = {
    "ADHD200": (0.5, 0.0, 0.0, 0.0),
    "HCP": (0.3333, 0.6667, 0.0, 0.0),
    "AIBL": (0.25, 0.5, 0.75, 0.0),
    "OASIS3": (0.25, 0.5, 0.0, 0.75),
    "ADNI": (0.5, 0.0, 0.0, 0.0),
    "ADNI3": (0.3333, 0.0, 0.6667, 0.0),
    "ATLAS": (0.5, 0.0, 0.0, 0.0),
    "ISLES": (0.0, 0.0, 0.5, 0.0),
}
"""Cumulative probabilities with which a data set's T1, T2, FLAIR and CT are taken as they are, in the paper."""
_MODALITY = re.compile(r"(?<![A-Za-z0-9])(T1|T2|FLAIR|CT)w?(?![A-Za-z0-9])", re.IGNORECASE)
_NAME = re.compile(rf"(?P<stem>.+)\.(?P<ending>{'|'.join(map(re.escape, ENDINGS))})\.nii(\.gz)?$")


@dataclasses.dataclass(frozen=True)
class SubjectFiles:
    """A subject's files.

    Attributes:
        name: Of its folder in a store, unique.
        subject: Who it is.
        path: The label map.
        others: Further files, by the names of the columns.
        split: train, validation, test, or "".
        dataset: Of the paper's, or "".
        age: In years, or None.
    """

    name: str
    subject: str
    path: Path
    others: dict[str, Path] = dataclasses.field(default_factory=dict)
    split: str = ""
    dataset: str = ""
    age: float | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """Which of `IMAGES` there are."""
        return tuple(name for name in IMAGES if name in self.others)


def list_subjects(manifest: Path | None, place: Path | None) -> list[SubjectFiles]:
    """List the subjects of a table, or of a file or folder.

    Raises:
        InputError: There are none, a file is missing, or one of three files that go together.
    """
    if (manifest is None) == (place is None):
        found = "neither" if manifest is None else "both"
        raise InputError("data.manifest, input", "one of them", found, "or try --preset smoke")
    subjects = _from_table(manifest) if manifest is not None else _from_folder(place) if place is not None else []
    for one in subjects:
        for group in (DISTANCES, COORDINATES):
            missing = [name for name in group if name not in one.others]
            if 0 < len(missing) < len(group):
                raise InputError(one.path, f"all of {', '.join(group)}, or none", f"no {', '.join(missing)}")
    return subjects


def _from_table(manifest: Path) -> list[SubjectFiles]:
    table = read_table(manifest, required=("path",), optional=("subject", "split", "age", "dataset", *COLUMNS))
    splits = stated_splits(table, SPLITS) or [""] * len(table)
    people = subjects_of(table)
    names = unique_names(people)
    ages = table.floats("age", allow_missing=True) if "age" in table.columns else [math.nan] * len(table)
    found = []
    for number, row in enumerate(table.rows):
        paths = {"path": resolve_path(row["path"], manifest.parent)}
        paths |= {name: resolve_path(row[name], manifest.parent) for name in COLUMNS if row.get(name)}
        for name, path in paths.items():
            if not path.exists():
                raise table.wrong(table.lines[number], f"a file under '{name}'", f"no such file, {path}")
        own = paths.pop("path")
        age = None if math.isnan(ages[number]) else ages[number]
        dataset = row.get("dataset", "")
        found.append(SubjectFiles(names[number], people[number], own, paths, splits[number], dataset, age))
    if splits[0]:
        require_files_apart(manifest, [one.path for one in found], splits)
    return found


def _from_folder(place: Path) -> list[SubjectFiles]:
    if not place.is_dir():
        if not place.exists():
            raise InputError(place, "a label map, or a folder of them", "no such file", "check the path")
        return [SubjectFiles(unique_names([place.name], nifti.SUFFIXES)[0], place.name, place)]
    files = [path for path in walk_files(place) if path.name.lower().endswith(nifti.SUFFIXES)]
    matches = [(path, _NAME.fullmatch(path.name)) for path in files]
    groups: dict[Path, dict[str, Path]] = {}
    order = [*ENDINGS]
    named = [(path, match) for path, match in matches if match is not None]
    for path, match in sorted(named, key=lambda pair: order.index(pair[1]["ending"])):
        groups.setdefault(path.parent / match["stem"], {}).setdefault(ENDINGS[match["ending"]], path)
    groups = dict(sorted(groups.items()))
    splits, ages = _lists(place, groups) if groups else ({}, {})
    if not groups:
        groups = {path: {"path": path} for path, _ in matches}
    if not groups:
        raise InputError(place, "label maps (.nii, .nii.gz)", "none")
    for stem, known in groups.items():
        if "path" not in known:
            advice = "name it like STEM.brainseg.nii, or give a table"
            raise InputError(stem, "a label map beside the other files of a subject", "none", advice)
    stems = [stem.relative_to(place) for stem in groups]
    names = unique_names([str(stem) for stem in stems], nifti.SUFFIXES)
    return [
        SubjectFiles(
            name, str(stem), known.pop("path"), known, splits.get(place / stem, ""), stem.name.split(".")[0],
            ages.get(place / stem),
        )
        for name, stem, known in zip(names, stems, groups.values(), strict=True)
    ]  # fmt: skip


def _lists(place: Path, stems: Iterable[Path]) -> tuple[dict[Path, str], dict[Path, float]]:
    """Return the splits and the ages that the paper's lists in a folder state, by stem.

    Raises:
        InputError: A list names none of the subjects, a subject is in two splits, or an age is no number.
    """
    known = {stem.name: stem for stem in stems}
    splits: dict[Path, str] = {}
    ages: dict[Path, float] = {}
    for name in (*SPLITS, "participants_age"):
        path = place / f"{name}.txt"
        if not path.is_file():
            continue
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(known[stem], words) for words in lines if (stem := _stem_of(words[0], known)) is not None]
        if not found:
            raise InputError(path, f"files or names of subjects of {place}", f"{len(lines)} lines without any")
        for stem, words in found:
            if name == "participants_age":
                try:
                    ages[stem] = float(words[1])
                except (IndexError, ValueError) as error:
                    raise InputError(path, "a name and an age in years in every line", " ".join(words)) from error
            elif splits.setdefault(stem, name) != name:
                raise InputError(path, "every subject in one split", f"{stem.name} in {splits[stem]} too")
    return splits, ages


def _stem_of(word: str, known: Mapping[str, Path]) -> str | None:
    """Return the stem that a path of one of the paper's names, or the name of a subject, stands for."""
    name = Path(word).name
    match = _NAME.fullmatch(name)
    stem = name if match is None else match["stem"]
    return stem if stem in known else None


def modalities_of(subjects: Sequence[SubjectFiles]) -> int:
    """Return how many of `IMAGES`, from the first on, hold all that any subject has."""
    return max((IMAGES.index(name) + 1 for one in subjects for name in one.images), default=0)


def modality_of(name: str) -> str:
    """Return which of `IMAGES` the name of a file tells, as a word of its own ("sub-1_T1w.nii", "A.1.FLAIR"); or ""."""
    words = _MODALITY.findall(name)
    return words[-1].upper() if words else ""


def thresholds_of(dataset: str) -> tuple[float, float, float, float] | None:
    """Return the row of CUMULATIVE, whatever the case and hyphens of its name; None for other data sets."""
    known = {name.casefold(): value for name, value in CUMULATIVE.items()}
    return known.get(dataset.replace("-", "").replace("_", "").casefold())

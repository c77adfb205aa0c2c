"""The maps of a run once more under the names of BIDS derivatives, with dataset_description.json: `--bids`.

    outputs/bids/dataset_description.json, README
    outputs/bids/sub-01/ses-2/anat/sub-01_ses-2_desc-enhanced_T1w.nii.gz, and .json

Subject, session and the other entities are those in the name of the scan, or in its path; a scan without any is a
subject of its own, by the letters and digits of its name. Files are linked where the file system can, so that they take
no space. Every NIfTI file with a sidecar that defines it is a map.

Source: Brain Imaging Data Structure 1.10, derivatives; diffusion maps as BEP 16 proposes them.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.errors import InputError
from jaxmed.files import make_folder, read_record, write_json, write_text
from jaxmed.io.tables import read_table
from jaxmed.versions import package_version

VERSION, FOLDER = "1.10.0", "bids"
# In the order in which names carry them.
ENTITIES = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
MODALITIES = ("T1w", "T2w", "T2star", "FLAIR", "PDw", "inplaneT1", "inplaneT2", "dwi", "bold", "pet", "ct", "MP2RAGE",
              "UNIT1", "angio")  # fmt: skip
# Folder and suffix of a system's maps, where its scans are of one kind; of others the suffix is that of the scan.
KINDS = {"noddi": ("dwi", "dwimap"), "cocolit": ("pet", "pet"), "tangerine": ("ct", "ct")}
OWN = {("cocolit", "mri"): ("anat", "T1w")}
UNKNOWN = "map"
"""Suffix of what a scan shows nobody says."""
# Tables of a run that say which scan a name stands for.
TABLES = ("predictions.csv", "scans.csv", "embeddings.csv", "summary.csv")
DIFFUSION_MODEL = "model-noddi"


class MapFile(NamedTuple):
    """A map of a run.

    Attributes:
        path: Of the NIfTI file.
        sidecar: What it says of itself.
        scan: Name of the scan in this run.
        source: The scan's file; empty where nobody says.
        label: Which map it is.
    """

    path: Path
    sidecar: Mapping[str, Any]
    scan: str
    source: str
    label: str


def write_bids(run: Path) -> int:
    """Lay out the maps of a finished run in outputs/bids, anew; return their number.

    Raises:
        InputError: The place cannot be written.
    """
    outputs, record = run / "outputs", read_record(run / "config.json")
    target, system = outputs / FOLDER, str(record["system"])
    shutil.rmtree(target, ignore_errors=True)
    taken: set[str] = set()
    subjects: dict[str, str] = {}
    for one in find_maps(outputs, record["config"]):
        place = bids_name(one, system, subjects, taken)
        _link(one.path, target / f"{place}.nii.gz")
        told = {"Description": one.sidecar["definition"], "Units": one.sidecar.get("unit", "1"), **one.sidecar}
        if one.source:
            told["Sources"] = [one.source]
        write_json(target / f"{place}.json", told)
    if taken:
        _describe(target, system, str(record["stage"]))
    return len(taken)


def find_maps(outputs: Path, config: Mapping[str, Any]) -> Iterator[MapFile]:
    """Yield every map in the outputs of a run, in the order of their paths."""
    scans = _scans(outputs)
    given = next((path for name, path in _paths(config) if name in ("dwi", "input")), "")
    for path in sorted(outputs.rglob("*.nii.gz")):
        inside, stem = path.relative_to(outputs).parts[0], path.name.removesuffix(".nii.gz")
        beside = path.with_name(f"{stem}.json")
        if inside == FOLDER or not beside.exists():
            continue
        sidecar = read_record(beside)
        if "definition" not in sidecar:
            continue
        names = [name for name in scans if stem == name or stem.startswith(f"{name}_")]
        name = max(names, key=len, default="")
        own = next((sidecar[key] for key in ("path", "input", "source") if isinstance(sidecar.get(key), str)), "")
        source = scans.get(name) or own or given
        label = stem.removeprefix(name).strip("_") or path.parent.name.removesuffix("s")
        yield MapFile(path, sidecar, name or _stem(source) or "phantom", source, label)


def bids_name(one: MapFile, system: str, subjects: dict[str, str], taken: set[str]) -> str:
    """Return where a map stands in the data set, without suffix, such as "sub-01/dwi/sub-01_dwimap".

    Args:
        one: The map.
        system: That made it.
        subjects: Subject of each scan without entities so far, by its label; further ones are added.
        taken: Names so far; this one is added.
    """
    entities = _entities(one.scan) or _entities(one.source)
    if "sub" not in entities:
        label = "".join(re.findall(r"[A-Za-z0-9]+", one.scan)) or "01"
        number, first = 1, label
        while subjects.setdefault(label, one.scan) != one.scan:  # another scan whose letters are the same
            number += 1
            label = f"{first}x{number}"
        entities = {"sub": label}
    modality = _stem(one.source).rpartition("_")[2]
    kind, suffix = KINDS.get(system, ("anat", modality if modality in MODALITIES else UNKNOWN))
    kind, suffix = OWN.get((system, one.label), (kind, suffix))
    words = re.findall(r"[A-Za-z0-9]+", one.label)
    label = words[0] + "".join(word[:1].upper() + word[1:] for word in words[1:]) if words else "map"
    last = label.lower()
    parts = [f"{name}-{value}" for name, value in entities.items()]
    if last.endswith("mask"):
        described, suffix = label[: -len("mask")], "mask"
    elif "segmentation" in last:
        described, suffix = re.sub("segmentation", "", label, flags=re.I), "dseg"
    else:
        described = label
    further = f"{DIFFUSION_MODEL}_param-{described}" if suffix == "dwimap" else f"desc-{described}"
    folder = "/".join([*parts[:1], *(part for part in parts[1:2] if part.startswith("ses-")), kind])
    number, place = 1, ""
    while not place or place in taken:
        # Scans of one subject that nothing else tells apart are runs.
        shown = parts if number == 1 else [part for part in parts if not part.startswith("run-")] + [f"run-{number}"]
        place = f"{folder}/{'_'.join([*shown, *([further] if described else []), suffix])}"
        number += 1
    taken.add(place)
    return place


def _describe(target: Path, system: str, stage: str) -> None:
    made = {"Name": "jaxmed", "Version": package_version("jaxmed") or "unknown",
            "Description": f"jaxmed {system} {stage}"}  # fmt: skip
    title = f"Maps of jaxmed {system} {stage}"
    record = {"Name": title, "BIDSVersion": VERSION, "DatasetType": "derivative", "GeneratedBy": [made]}
    write_json(target / "dataset_description.json", record)
    text = "Each map has a sidecar with its definition, unit and constants. Not for clinical use."
    write_text(target / "README", f"{title}\n\n{text}\n")


def _scans(outputs: Path) -> dict[str, str]:
    """Return the scans of a run: name of their results to their file."""
    found: dict[str, str] = {}
    for path in sorted(outputs.glob("*.json")):
        with contextlib.suppress(InputError):  # a list, say, which is no record of a scan
            record = read_record(path)
            if isinstance(record.get("path"), str) and "definition" not in record:
                found[path.stem] = record["path"]
    for name in TABLES:
        if (outputs / name).exists():
            table = read_table(outputs / name)
            if {"id", "path"} <= set(table.columns):
                found |= {row["id"]: row["path"] for row in table.rows}
    return found


def _entities(name: str) -> dict[str, str]:
    """Return the entities in a name or path, the last of each kind, in BIDS's order; none without a subject."""
    found = dict(re.findall(rf"(?:^|[_/\\])({'|'.join(ENTITIES)})-([A-Za-z0-9]+)", name))
    return {key: found[key] for key in ENTITIES if key in found} if "sub" in found else {}


def _paths(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every path of a configuration with its field's last name."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _paths(value, str(key))
    elif isinstance(config, str) and config.startswith("/"):
        yield name, config


def _stem(path: str) -> str:
    return re.sub(r"\.(nii(\.gz)?|npy|npz|png|jpe?g|tiff?|dcm)$", "", Path(path).name, flags=re.I) if path else ""


def _link(source: Path, target: Path) -> None:
    make_folder(target.parent)
    with contextlib.suppress(OSError):  # of another file system, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)

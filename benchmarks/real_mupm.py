"""Real sets as `jaxmed mupm perturb` takes them, for reproduce_mupm.py; written from the folder JAXMED_DATA.

`diagnosis`, `area` and `gentler` are Sunnybrook's patients: the slice with most of the left ventricle, cut about it by
`diagnosis`, `area` and `gentler` are the patients of Sunnybrook: the slice with most of the ventricle, cut about it by
with the heart of someone else: only what the text does means something there. `chest` has pictures of 28 pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped

from jaxmed.io.numpy_files import read_member, write_npz
from jaxmed.io.tables import read_table, write_table
from jaxmed.synthesis.phantoms.cine import CONDITIONS

REAL = ("diagnosis", "area", "gentler", "chest", "records")
DIAGNOSES = {
    "heart_failure_infarct": ("heart failure", "heart failure with infarct"),
    "heart_failure_no_infarct": ("heart failure", "heart failure without infarct"),
    "hypertrophy": ("hypertrophy", "hypertrophy"),
    "normal": ("none of these", "none"),
}
"""The option that is right, and what a record says, by Sunnybrook's diagnosis."""
PAINS = {"1.0": "typical angina", "2.0": "atypical angina", "3.0": "pain that is no angina", "4.0": "none"}
EDGE = 128
"""Pixels of a heart cut out, as large in it as drawn ones are."""


def write_real(data: Path, folder: Path, most: int) -> None:
    """Write the real sets as `perturb` takes them, at most so many cases of each, evenly spread."""
    archive = data / "cardiac_mr_sunnybrook/sunnybrook_sax.npz"
    images, masks, subject, frames = (read_member(archive, name) for name in ("images", "lv_masks", "subject", "frame"))
    patients = spread(read_table(data / "cardiac_mr_sunnybrook/subjects.csv").rows, most)
    median = float(np.median([float(row["lv_area_max_px"]) for row in patients]))
    sets: dict[str, list[dict[str, str]]] = {name: [] for name in REAL}
    for row in patients:
        chosen = subject == int(row["subject"])
        path = folder / f"{row['id']}.npz"
        write_npz(path, {"cine": heart_cine(images[chosen], masks[chosen], frames[chosen])})
        (label, said), smallest, largest = DIAGNOSES[row["diagnosis"]], row["lv_area_min_px"], row["lv_area_max_px"]
        shared = {"path": f"../{path.name}", "subject": row["id"], "group": row["diagnosis"]}
        asked = {"question": "Which of these conditions does this patient have?", "options": "|".join(CONDITIONS)}
        facts = {"findings": f"left ventricle of {smallest} to {largest} pixels", "label": label}
        sets["diagnosis"].append(shared | asked | facts)
        asked = {"question": "Is the area of the left ventricle above the median?", "options": "above|not above"}
        sets["area"].append(
            shared | asked | {"history": said, "label": "above" if float(largest) > median else "not above"}
        )
    sets["gentler"] = sets["diagnosis"]
    archive = data / "pneumoniamnist_subset/pneumonia_trainval.npz"
    pictures, labels = read_member(archive, "val_images"), read_member(archive, "val_labels").ravel()
    asked = {"question": "Does the picture show pneumonia?", "options": "pneumonia|no pneumonia"}
    for number in spread(np.argsort(labels, kind="stable").tolist(), most):
        write_npz(folder / f"chest{number}.npz", {"image": pictures[number]})
        facts = {"findings": "X-ray of a chest", "label": "pneumonia" if labels[number] else "no pneumonia"}
        sets["chest"].append({"path": f"../chest{number}.npz", "subject": f"chest{number}"} | asked | facts)
    people = spread(read_table(data / "heart_records_uci/heart_cleveland.csv").rows, len(patients))
    asked = {"question": "Does this patient have a disease of the heart?", "options": "a disease|no disease"}
    for number, (row, heart) in enumerate(zip(people, sets["diagnosis"], strict=False)):
        sets["records"].append({
            "path": heart["path"], "subject": f"person{number}", **asked,
            "label": "no disease" if float(row["num"]) == 0 else "a disease",
            "age": f"{float(row['age']):.0f}", "sex": "man" if float(row["sex"]) else "woman",
            "symptoms": PAINS[row["cp"]],
            "findings": f"pressure {float(row['trestbps']):.0f} mmHg and pulse up to {float(row['thalach']):.0f}",
        })  # fmt: skip
    for name, rows in sets.items():
        write_table(folder / name / "records.csv", tuple(rows[0]), rows)


def spread(rows: list[Any], most: int) -> list[Any]:
    """Return at most so many of the rows, evenly spread."""
    return [rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]


def heart_cine(
    images: Shaped[np.ndarray, "frame row column"], masks: Shaped[np.ndarray, "frame row column"],
    numbers: Int[np.ndarray, " frame"],
) -> Float32[np.ndarray, "phase edge edge"]:  # fmt: skip
    """Cut the heart out of the slice with most of the ventricle; its largest phase first. A slice has twenty frames."""
    areas, places = masks.sum((1, 2), dtype=int), (numbers - 1) // 20
    most = max(np.unique(places), key=lambda place: areas[places == place].sum())
    phases = np.flatnonzero(places == most)
    phases = phases[np.argsort(-areas[phases])]
    centers = (int(axis.mean()) for axis in np.nonzero(masks[phases[0]]))
    starts = [
        min(max(center - EDGE // 2, 0), size - EDGE) for center, size in zip(centers, images.shape[1:], strict=True)
    ]
    row, column = (slice(start, start + EDGE) for start in starts)
    return images[phases, row, column].astype(np.float32)

"""Turn public files into the manifests and stacks that `jaxmed selfplay` takes.

    python scripts/prepare_selfplay.py digits MNIST.npz OUT [--noise 0.4] [--train 500] [--support 16] [--test 100]
                                       [--clean-train]
    python scripts/prepare_selfplay.py lesions OUT --sarcoma FOLDER --tumour FOLDER --cardiac FOLDER --chest FOLDER

Then, for example:

    jaxmed selfplay meta-train --data.manifest OUT/manifest.csv --preprocess.size 32 32 --out runs/digits

A manifest has one row per file: path and mask (relative to it), task, subject, and split. Tasks of the splits train and
validation are familiar: System I is trained on the first and stopped by the second. The novel tasks have the splits
support (the few labelled examples) and test (what is thought about); nobody stands in two splits.

digits    MNIST (LeCun and Cortes, CC BY-SA 3.0) as an .npz file with images (n, 28, 28) and labels. Each digit is a
          task: 0 to 4 train, 5 validation, 6 to 9 support and test, all of disjoint pictures. Pictures are padded to
          32 x 32; the image is digit / 255 plus normal noise, clipped to [0, 1], and the mask is where digit / 255 is
          half or more. One .npy stack per task and split; each picture is a subject of its own. The noise is drawn
          once, here; --clean-train leaves that of familiar tasks to the training, which can draw it anew in every
          step: `jaxmed selfplay meta-train --meta.augment.noise-probability 1 --meta.augment.noise-sigma 0.4 0.4`.
lesions   Organs are familiar: the left ventricle of Sunnybrook's cine MR (public domain; 4 of 5 patients train, the
          others validation), the heart and the pulmonary artery of a chest CT (TotalSegmentator, Apache-2.0; train).
          Lesions are novel: soft-tissue sarcoma in T1-weighted MR (TCIA, CC BY 3.0, five patients) and a brain and a
          breast tumour in MR (pyradiomics, BSD-3-Clause). manifest.csv has the patients of --support as support and the
          other ones as test; leave_out_PATIENT.csv tests on one patient, and all others are support. The column
          intensity says how a file is scaled: CT by its window in HU, MR by its percentiles.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from jaxmed.data.splits import split_subjects
from jaxmed.files import atomic_path, make_folder, require_file
from jaxmed.io.numpy_files import read_member
from jaxmed.io.tables import write_table

COLUMNS = ("path", "mask", "task", "subject", "split")
EDGE = 32
# The reference's split of MNIST: section (d) of the system's specification, from its README.
DIGIT_SPLITS = {**dict.fromkeys(range(5), "train"), 5: "validation", **dict.fromkeys(range(6, 10), "novel")}


def save(path: Path, array: np.ndarray) -> None:
    """Write a stack, wholly or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def prepare_digits(
    archive: Path, out: Path, noise: float, counts: dict[str, int], seed: int, clean_train: bool
) -> list[dict]:
    """Write the stacks of all digits and return the rows of the manifest."""
    require_file(archive, "MNIST as an .npz file", (".npz",))
    images, labels = read_member(archive, "images"), read_member(archive, "labels")
    margin = (EDGE - images.shape[1]) // 2
    digits = np.pad(images.astype(np.float32) / 255, [(0, 0), (margin, margin), (margin, margin)])
    rows = []
    for digit, role in DIGIT_SPLITS.items():
        generator = np.random.default_rng([seed, digit])
        order = generator.permutation(np.flatnonzero(labels == digit))
        parts = ("support", "test") if role == "novel" else (role,)
        for split in parts:
            chosen, order = order[: counts[split]], order[counts[split] :]
            if len(chosen) < counts[split]:
                raise SystemExit(f"{archive}: expected {counts[split]} pictures of {digit} for {split}")
            clean = digits[chosen]
            is_clean = not noise or (clean_train and role == "train")
            noisy = clean if is_clean else clean + generator.normal(0, noise, clean.shape).astype(np.float32)
            name = f"digit{digit}_{split}"
            save(out / f"images/{name}.npy", np.clip(noisy, 0, 1))
            save(out / f"masks/{name}.npy", (clean >= 0.5).astype(np.uint8))
            row = {"path": f"images/{name}.npy", "mask": f"masks/{name}.npy", "task": f"digit{digit}"}
            rows.append({**row, "subject": f"{name}_{{item}}", "split": split})
            print(f"{name}: {len(chosen)} pictures")
    return rows


def copied(source: Path, out: Path, name: str) -> str:
    """Copy a file below `out`, so that the manifest can move with its files, and return its place."""
    require_file(source, "a NIfTI file")
    with atomic_path(out / name) as temporary:
        shutil.copyfile(source, temporary)
    return name


def prepare_organs(cardiac: Path, chest: Path, out: Path, seed: int) -> list[dict]:
    """Write the familiar tasks: one stack per heart patient, and the chest with two masks."""
    archive = require_file(cardiac / "sunnybrook_sax.npz", "the cardiac MR")
    images, masks, owners = (read_member(archive, name) for name in ("images", "lv_masks", "subject"))
    names = [f"cardiac{owner:02d}" for owner in np.unique(owners)]
    rows = []
    for owner, name, split in zip(np.unique(owners), names, split_subjects(names, (0.8, 0.2, 0.0), seed), strict=True):
        kept = (owners == owner) & masks.any(axis=(1, 2))
        save(out / f"images/{name}.npy", images[kept])
        save(out / f"masks/{name}.npy", masks[kept])
        row = {"path": f"images/{name}.npy", "mask": f"masks/{name}.npy", "task": "left ventricle"}
        rows.append({**row, "subject": name, "split": split, "intensity": "percentile"})
    print(f"left ventricle: {len(names)} patients, {int(masks.any(axis=(1, 2)).sum())} slices")
    scan = copied(chest / "ct_thorax_crop.nii.gz", out, "images/chest.nii.gz")
    for task, file in (("heart", "mask_heart"), ("pulmonary artery", "mask_pulmonary_artery")):
        mask = copied(chest / f"{file}.nii.gz", out, f"masks/chest_{file.removeprefix('mask_')}.nii.gz")
        identity = {"path": scan, "mask": mask, "task": task, "subject": "chest"}
        rows.append({**identity, "split": "train", "intensity": "ct"})
        print(f"{task}: 1 patient")
    return rows


def prepare_lesions(sarcoma: Path, tumour: Path, out: Path) -> list[dict]:
    """Copy the scans of the novel task; the split is left open."""
    found = [(f.name, f / "mr_t1_image.nii.gz", f / "mr_t1_mask.nii.gz") for f in sorted(sarcoma.glob("STS_*"))]
    places = [path.name.removesuffix("_image.nii.gz") for path in sorted(tumour.glob("*_image.nii.gz"))]
    found += [(name, tumour / f"{name}_image.nii.gz", tumour / f"{name}_label.nii.gz") for name in places]
    rows = []
    for name, image, mask in found:
        row = {
            "path": copied(image, out, f"images/{name}.nii.gz"),
            "mask": copied(mask, out, f"masks/{name}.nii.gz"),
        }
        rows.append({**row, "task": "lesion", "subject": name, "intensity": "percentile"})
    if len(rows) < 2:
        raise SystemExit(f"{sarcoma}, {tumour}: expected two patients or more, found {len(rows)}")
    print(f"lesion: {', '.join(row['subject'] for row in rows)}")
    return rows


def main() -> None:
    """Read the arguments, write files and manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    digits = kinds.add_parser("digits", help="MNIST: a digit is a task")
    digits.add_argument("archive", type=Path, help=".npz with images and labels")
    digits.add_argument("out", type=Path)
    digits.add_argument("--noise", type=float, default=0.4, help="standard deviation of the noise")
    digits.add_argument("--clean-train", action="store_true", help="no noise on familiar tasks")
    digits.add_argument("--train", type=int, default=500, help="pictures per training digit")
    digits.add_argument("--validation", type=int, default=200, help="pictures of the validation digit")
    digits.add_argument("--support", type=int, default=16, help="labelled pictures per novel digit")
    digits.add_argument("--test", type=int, default=100, help="test pictures per novel digit")
    lesions = kinds.add_parser("lesions", help="organs in training, lesions in test")
    lesions.add_argument("out", type=Path)
    lesions.add_argument("--sarcoma", type=Path, required=True, help="folder of STS_*/mr_t1_{image,mask}.nii.gz")
    lesions.add_argument("--tumour", type=Path, required=True, help="folder of *_{image,label}.nii.gz")
    lesions.add_argument("--cardiac", type=Path, required=True, help="folder of sunnybrook_sax.npz")
    lesions.add_argument("--chest", type=Path, required=True, help="folder of ct_thorax_crop.nii.gz and mask_*.nii.gz")
    lesions.add_argument("--support", nargs="+", default=["STS_002", "STS_003"], help="patients with labels")
    for kind in (digits, lesions):
        kind.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = make_folder(arguments.out)
    if arguments.kind == "digits":
        counts = {name: getattr(arguments, name) for name in ("train", "validation", "support", "test")}
        rows = prepare_digits(arguments.archive, out, arguments.noise, counts, arguments.seed, arguments.clean_train)
        write_table(out / "manifest.csv", COLUMNS, rows)
        return
    organs = prepare_organs(arguments.cardiac, arguments.chest, out, arguments.seed)
    novel = prepare_lesions(arguments.sarcoma, arguments.tumour, out)
    patients = [row["subject"] for row in novel]
    if not set(arguments.support) < set(patients):
        raise SystemExit(f"--support: expected some of {', '.join(patients)}, found {', '.join(arguments.support)}")
    named = {"manifest": set(arguments.support)}
    named |= {f"leave_out_{patient}": set(patients) - {patient} for patient in patients}
    for name, support in named.items():
        split = [{**row, "split": "support" if row["subject"] in support else "test"} for row in novel]
        write_table(out / f"{name}.csv", (*COLUMNS, "intensity"), [*organs, *split])


if __name__ == "__main__":
    main()

"""Cut CT crops on and off the tumour out of the soft-tissue sarcoma set, with one manifest per left-out patient.

    python scripts/prepare_sts_crops.py FOLDER_OF_PATIENTS OUT [--edge 40] [--per-class 24] [--seed 0]

FOLDER_OF_PATIENTS holds STS_*/ct_image.nii.gz and ct_mask.nii.gz (TCIA Soft-tissue-Sarcoma, doi
10.7937/K9/TCIA.2015.7GO2GSKS, CC BY 3.0). OUT gets crops/*.nii.gz on their place in the world and, for every patient,
leave_out_PATIENT.csv with path, label (1 with tumour), subject and split: that patient is the test split, the next one
validation, the others train. A tumour crop is tumour to a quarter or more; the others hold none of it, and half of
their voxels or more lie in the body (above -300 HU).
"""

import argparse
from pathlib import Path

import numpy as np

from jaxmed.io import nifti
from jaxmed.io.tables import write_table
from jaxmed.volume import Volume

LEAST_TUMOUR, LEAST_BODY, BODY_HU = 0.25, 0.5, -300.0


def window_means(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the mean of every window of a size, by its first corner."""
    sums = np.pad(array.astype(np.float64), [(1, 0)] * 3).cumsum(0).cumsum(1).cumsum(2)
    for axis, length in enumerate(size):
        upper = [slice(None)] * 3
        lower = [slice(None)] * 3
        upper[axis], lower[axis] = slice(length, None), slice(None, -length)
        sums = sums[tuple(upper)] - sums[tuple(lower)]
    return sums / np.prod(size)


def cut(image: Volume, corner: np.ndarray, size: tuple[int, ...]) -> Volume:
    """Return a window of a volume, where it stands in the world."""
    place = tuple(slice(int(start), int(start) + length) for start, length in zip(corner, size, strict=True))
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ corner
    return Volume.make(np.ascontiguousarray(image.array[place]), affine)


def cut_patient(folder: Path, out: Path, edge: float, number: int, generator: np.random.Generator) -> list[dict]:
    """Write the crops of one patient and return their rows."""
    image = nifti.read(folder / "ct_image.nii.gz")
    mask = nifti.read(folder / "ct_mask.nii.gz")
    nifti.require_same_grid(mask, image, str(folder / "ct_mask.nii.gz"), str(folder / "ct_image.nii.gz"))
    size = tuple(max(round(edge / length), 1) for length in image.spacing)
    tumour = window_means(mask.array > 0, size)
    body = window_means(image.array > BODY_HU, size)
    choices = {1: tumour >= LEAST_TUMOUR, 0: (tumour < 1e-9) & (body >= LEAST_BODY)}
    rows = []
    for label, allowed in choices.items():
        corners = np.argwhere(allowed)
        chosen = generator.choice(len(corners), min(number, len(corners)), replace=False)
        for count, index in enumerate(sorted(chosen)):
            name = f"crops/{folder.name}_{label}_{count:02d}.nii.gz"
            nifti.write(out / name, cut(image, corners[index], size))
            rows.append({"path": name, "label": label, "subject": folder.name})
    return rows


def main() -> None:
    """Cut all patients and write the manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patients", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--edge", type=float, default=40.0, help="edge of a crop in mm")
    parser.add_argument("--per-class", type=int, default=24, help="crops with, and without, per patient")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.patients.glob("STS_*") if path.is_dir())
    rows = []
    for number, folder in enumerate(folders):
        generator = np.random.default_rng([arguments.seed, number])
        found = cut_patient(folder, arguments.out, arguments.edge, arguments.per_class, generator)
        print(f"{folder.name}: {sum(row['label'] for row in found)} with tumour, {len(found)} in all")
        rows += found
    names = [folder.name for folder in folders]
    for number, test in enumerate(names):
        homes = {test: "test", names[(number + 1) % len(names)]: "validation"}
        split = [{**row, "split": homes.get(row["subject"], "train")} for row in rows]
        write_table(arguments.out / f"leave_out_{test}.csv", ("path", "label", "subject", "split"), split)


if __name__ == "__main__":
    main()

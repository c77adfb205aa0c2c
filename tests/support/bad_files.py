"""NIfTI files that no stage may take, and a word of what each is refused for."""

import nibabel
import numpy as np

BAD = {"nan": "NaN", "four": "3D", "sheared": "sheared", "flat": "contrast"}


def write_bad_files(folder, array):
    """Write volumes with a hole, of four axes, on a grid without right angles, and of one value."""
    array = np.asarray(array, np.float32)
    holes = array.copy()
    holes[1, 1, 1] = np.nan
    shear = np.eye(4)
    shear[0, 1] = 0.3
    changed = {
        "nan": (holes, np.eye(4)),
        "four": (np.stack([array] * 2, -1), np.eye(4)),
        "sheared": (array, shear),
        "flat": (np.full_like(array, 2), np.eye(4)),
    }
    for name, (values, affine) in changed.items():
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")

"""Images of test subjects: whose they are, and which are taken."""

import dataclasses

from jaxmed.data.images import PREPROCESS
from jaxmed.data.subject_images import list_subjects, read_subjects
from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort


def test_scans_of_one_name_in_two_folders_are_two_subjects(tmp_path):
    scan = nifti.read(next((write_brain_cohort(tmp_path / "made", 1, 1, (32, 32)).parent / "scans").iterdir()))
    for name in ("a/T1.nii.gz", "b/T1.nii.gz", "b_T1.nii"):
        nifti.write(tmp_path / "scans" / name, scan)
    preprocess = dataclasses.replace(PREPROCESS, size=(32, 32))
    subjects = read_subjects(list_subjects(None, tmp_path / "scans"), preprocess, slices=1)
    assert [(one.subject, len(one.images)) for one in subjects] == [("a_T1", 1), ("b_T1", 1), ("b_T1_2", 1)]

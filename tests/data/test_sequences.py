"""Sequences of a case: found by their names, brought onto one grid, refused where they show something else."""

import dataclasses

import numpy as np
import pytest

from jaxmed.data.inputs import check_scans
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import VOLUMES, find_scans
from jaxmed.data.sequences import find_case, gather_cases, sequence_of, share_inside
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.volume import Grid, Volume

pytestmark = pytest.mark.core

WORDS = ("t2w", "hbv|dwi", "adc")
PREPROCESS = Preprocess(
    (8, 12, 12), 3, axes="zyx", spacing=(2.0, 2.0, 2.0), intensity=Intensity("zscore", inside="nonzero"),
    sequences=WORDS,
)  # fmt: skip
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = (-11, -11, -7)


def ramp(shape, affine, slope):
    """Return a volume whose intensities are a linear function of the place, in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    places = index @ affine[:3, :3].T + affine[:3, 3]
    return Volume.make((1000 + places @ slope).astype(np.float32), affine)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A T2w scan, and two others on a coarser grid that is turned about z and reaches farther."""
    folder = tmp_path_factory.mktemp("cases") / "one"
    angle = np.deg2rad(20)
    turned = np.eye(4)
    turned[:2, :2] = 3 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned[2, 2] = 4.0
    turned[:3, 3] = -(turned[:3, :3] @ np.array([9.5, 9.5, 4.5]))
    nifti.write(folder / "t2w.nii.gz", ramp((12, 12, 8), AFFINE, np.array([3.0, 5.0, 7.0])))
    nifti.write(folder / "dwi.nii.gz", ramp((20, 20, 10), turned, np.array([-2.0, 4.0, 1.0])))
    nifti.write(folder / "adc.nii.gz", ramp((20, 20, 10), turned, np.array([6.0, 0.0, -5.0])))
    return folder


def test_channels_stand_on_the_grid_of_the_first_sequence(case):
    keep = dataclasses.replace(PREPROCESS, intensity=Intensity("keep"))
    expected = [
        ramp((12, 12, 8), AFFINE, np.array(slope)).array.transpose(2, 1, 0)
        for slope in ((3.0, 5.0, 7.0), (-2.0, 4.0, 1.0), (6.0, 0.0, -5.0))
    ]
    for place in (case, case / "t2w.nii.gz", case / "adc.nii.gz"):
        found = keep.prepare(place)
        assert found.image.shape == (8, 12, 12, 3) and found.grid.shape == (12, 12, 8)
        # A linear function comes through linear interpolation as it is; the coarser grid is not blurred.
        np.testing.assert_allclose(np.moveaxis(found.image, -1, 0), expected, rtol=0, atol=0.02)
    scaled = PREPROCESS(case)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-4)
    # A scan in memory has all channels already.
    stacked = Volume.make(np.stack(expected, -1).transpose(2, 1, 0, 3).astype(np.float32), AFFINE)
    np.testing.assert_allclose(PREPROCESS(stacked), scaled, atol=2e-4)


def test_a_sequence_that_is_missing_is_refused_or_zero(case, tmp_path):
    lacking = tmp_path / "two"
    lacking.mkdir()
    for name in ("t2w", "adc"):
        (lacking / f"{name}.nii.gz").write_bytes((case / f"{name}.nii.gz").read_bytes())
    for use in (lambda: PREPROCESS(lacking), lambda: check_scans([lacking / "t2w.nii.gz"], PREPROCESS, 0, 1)):
        with pytest.raises(InputError, match="expected a file named hbv or dwi beside it, found none.*missing zero"):
            use()
    filled = dataclasses.replace(PREPROCESS, missing="zero")(lacking)
    assert not filled[..., 1].any()
    np.testing.assert_array_equal(filled[..., ::2], PREPROCESS(case)[..., ::2])
    # A channel without a word is 0 whatever is there.
    alone = dataclasses.replace(PREPROCESS, sequences=("t2w", "", ""))(case)
    assert not alone[..., 1:].any() and alone[..., 0].any()
    # Without the first, the next one gives the grid.
    (lacking / "t2w.nii.gz").unlink()
    found = dataclasses.replace(PREPROCESS, missing="zero").prepare(lacking)
    assert found.grid.shape == (20, 20, 10) and not found.image[..., :2].any()
    assert found.notes == ("voxels of 4 x 3 x 3 mm were interpolated to 2 x 2 x 2 mm",)


def test_sequences_of_other_places_are_refused(case, tmp_path):
    folder = tmp_path / "three"
    for name in ("t2w", "dwi", "adc"):
        volume = nifti.read(case / f"{name}.nii.gz")
        moved = volume.affine.copy()
        moved[0, 3] += 300.0 * (name == "adc")
        nifti.write(folder / f"{name}.nii.gz", Volume.make(volume.array, moved))
    with pytest.raises(InputError, match="expected a scan of the region of .*t2w.*found one that shows 0% of it"):
        PREPROCESS(folder)
    adc = nifti.read(case / "adc.nii.gz")
    nifti.write(folder / "adc.nii.gz", Volume.make(np.full_like(adc.array, 5.0), adc.affine))
    with pytest.raises(InputError, match="adc.nii.gz: expected"):
        PREPROCESS(folder)
    nifti.write(folder / "adc.nii.gz", Volume.make(adc.array[:12], adc.affine))
    notes = PREPROCESS.prepare(folder).notes
    assert len(notes) == 1 and notes[0].startswith("adc shows ") and "0 beyond" in notes[0]


def test_share_of_a_grid_inside_another():
    grid = Grid((10, 10, 10), np.eye(4))
    shifted = np.eye(4)
    shifted[0, 3] = 5.0
    assert share_inside(grid, grid) == 1.0
    assert share_inside(grid, Grid((10, 10, 10), shifted)) == pytest.approx(0.5, abs=0.04)


def test_names_tell_sequences_and_cases(tmp_path):
    told = {"t2w.nii.gz": (0, ""), "P1_T2W.nii": (0, "p1_"), "p1-dwi.nii.gz": (1, "p1-"), "t2w-repeat.nii.gz": None,
            "madc.nii.gz": None, "adc": (2, "")}  # fmt: skip
    for name, expected in told.items():
        assert sequence_of(tmp_path / name, WORDS) == expected
    volume = ramp((4, 4, 4), np.eye(4), np.array([1.0, 0, 0]))
    for name in ("a_t2w", "a_adc", "b_t2w", "b_hbv", "mask", "c_adc"):
        nifti.write(tmp_path / f"{name}.nii.gz", volume)
    scans, notes = gather_cases(find_scans(tmp_path, VOLUMES).scans, WORDS)
    assert [scan.path.name for scan in scans] == ["a_t2w.nii.gz", "b_t2w.nii.gz", "c_adc.nii.gz"]
    assert len(notes) == 1 and "mask.nii.gz is not named after a sequence" in notes[0]
    found = find_case(ScanFiles(tmp_path / "b_t2w.nii.gz"), WORDS)
    assert [path and path.name for path in found.paths] == ["b_t2w.nii.gz", "b_hbv.nii.gz", None]
    with pytest.raises(InputError, match="expected one case with files named"):
        find_case(ScanFiles(tmp_path), WORDS)
    with pytest.raises(InputError, match="expected scans named t2w"):
        gather_cases([ScanFiles(tmp_path / "mask.nii.gz"), ScanFiles(tmp_path / "other.nii.gz")], WORDS)
    for changes in ({"sequences": ("a", "b")}, {"sequences": ("", "", "")}, {"size": (8, 8), "axes": "RAS"}):
        with pytest.raises(ValueError, match="sequences: expected"):
            dataclasses.replace(PREPROCESS, **changes)

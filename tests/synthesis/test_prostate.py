"""Phantom prostates: signs of a lesion in three sequences, the same anatomy for every grade, and a cohort of files."""

import jax
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table
from jaxmed.synthesis.phantoms.prostate import GRADES, ProstateConfig, make_prostate
from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def graded():
    keys = jax.random.split(jax.random.key(0), 6)
    quiet = ProstateConfig(noise=0.0)
    draw = jax.jit(jax.vmap(jax.vmap(lambda key, grade: make_prostate(key, grade, config=quiet), (None, 0)), (0, None)))
    return jax.device_get(draw(keys, np.arange(GRADES)))


def test_a_lesion_is_dark_bright_and_dark_by_its_grade(graded):
    assert graded.images.shape == (6, GRADES, 48, 48, 16, 3) and (graded.images >= 0).all()
    assert not graded.lesion[:, 0].any() and graded.lesion[:, 1:].any((2, 3, 4)).all()
    assert (graded.gland | ~graded.inner).all()
    share = graded.inner.sum((2, 3, 4)) / graded.gland.sum((2, 3, 4))
    np.testing.assert_allclose(share, 0.62**3, atol=0.06)  # its semi-axes are .62 of the gland's
    for case in range(6):
        where = graded.lesion[case, -1]
        assert (graded.gland[case, -1][where]).mean() > 0.7
        means = graded.images[case][:, where].mean(1)  # grade x sequence
        assert (np.diff(means, axis=0) * [-1, 1, -1] > 0).all()
        # Far from the lesion a grade changes nothing.
        apart = np.ptp(graded.images[case], axis=0).max(-1) == 0
        assert apart.mean() > 0.9 and not apart[where].any()
        x = np.nonzero(where)[0].mean()
        assert (x > 23.5) == graded.is_right[case, 0]


def test_a_cohort_has_every_grade_in_every_split_and_files_on_one_grid(tmp_path):
    manifest = write_prostate_cohort(tmp_path, 3, 10, (16, 16, 8), fractions=(0.5, 0.5, 0.0))
    table = read_table(manifest, required=("path",))
    for split in ("train", "validation"):
        assert sorted(row["grade"] for row in table.rows if row["split"] == split) == list("01234")
    for row in table.rows:
        assert row["label"] == str(int(int(row["grade"]) >= 2)) and (row["side"] == "none") == (row["grade"] == "0")
        first = nifti.read(tmp_path / row["path"])
        assert first.spacing == (6.0, 6.0, 6.0) and float(row["gland_ml"]) > 10
        for name in ("hbv", "adc"):
            assert nifti.read((tmp_path / row["path"]).with_name(f"{name}.nii.gz")).grid.shape == first.grid.shape
        assert nifti.read(tmp_path / row["mask"]).array.any() == (row["grade"] != "0")
        zones = nifti.read(tmp_path / row["zones"]).array
        assert set(np.unique(zones)) == {0, 1, 2}
        assert (zones > 0).sum() * 6.0**3 / 1000 == pytest.approx(float(row["gland_ml"]), abs=1e-3)
    before = manifest.stat().st_mtime_ns
    assert write_prostate_cohort(tmp_path, 3, 10, (16, 16, 8), fractions=(0.5, 0.5, 0.0)) == manifest
    assert manifest.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="a cohort of subjects 12"):
        write_prostate_cohort(tmp_path, 3, 12, (16, 16, 8), fractions=(0.5, 0.5, 0.0))

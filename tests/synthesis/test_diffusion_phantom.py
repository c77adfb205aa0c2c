"""The brain slab: physical everywhere, and files that say what it is."""

import jax
import numpy as np
import pytest

from jaxmed.io import nifti
from jaxmed.io.gradients import read_gradients
from jaxmed.synthesis.phantoms.diffusion import make_slab
from jaxmed.synthesis.phantoms.write import write_diffusion_slab

pytestmark = pytest.mark.core


def test_slab_is_physical_and_has_three_tissues(key):
    slab = make_slab(key, (40, 48, 4))
    for name in ("ndi", "odi", "fwf"):
        values = np.asarray(getattr(slab, name))
        assert 0 <= values.min() and values.max() <= 1, name
    np.testing.assert_allclose(np.linalg.norm(slab.direction, axis=-1), 1.0, atol=1e-5)
    inside = np.asarray(slab.mask)
    assert 0.3 < inside.mean() < 0.8
    assert (np.asarray(slab.fwf)[inside] > 0.9).mean() > 0.01  # ventricles and rim
    assert (np.asarray(slab.odi)[inside] < 0.25).mean() > 0.2  # white matter


def test_slab_is_a_function_of_its_key(key):
    first, again, other = (make_slab(k, (12, 12, 2)).ndi for k in (key, key, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_single_slice_is_finite(key):
    assert all(np.isfinite(np.asarray(part)).all() for part in make_slab(key, (16, 16, 1)))


def test_written_files_hold_one_scan(tmp_path):
    files = write_diffusion_slab(tmp_path, seed=0, shape=(12, 14, 2), snr=30.0)
    dwi = nifti.read(files.dwi, dimensions=(4,))
    table = read_gradients(files.bvals, files.bvecs, num_images=dwi.array.shape[3])
    mask = nifti.read(files.mask)
    assert dwi.array.shape == (12, 14, 2, 99) and mask.grid.shape == (12, 14, 2)
    assert dwi.array[..., table.bvals > 2000][mask.array > 0].mean() < dwi.array[..., :9][mask.array > 0].mean()

"""The phantom chest: right values in the right places, findings only where they are said to be, files that say so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.grid import orientation
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, require_disjoint_subjects, resolve_paths
from jaxmed.synthesis.phantoms.chest import FINDINGS, ChestConfig, finding_flags, make_chest
from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort

pytestmark = pytest.mark.core
SHAPE, UNEVEN = (32, 32, 32), (16, 16, 20)


@functools.cache
def scanner(noise=25.0, shape=SHAPE):
    return jax.jit(functools.partial(make_chest, shape=shape, config=ChestConfig(noise=noise)))


@functools.cache
def chests(*names):
    """Make 24 chests without noise."""
    keys = jax.random.split(jax.random.key(7), 24)
    return [scanner(0.0)(key, finding_flags(*names)) for key in keys]


def test_tissues_have_their_attenuation():
    for chest in chests():
        array, lung = np.asarray(chest.array), np.asarray(chest.lung)
        assert array[0, 0, 0] == -1000  # air around the body
        assert abs(np.median(array[lung]) + 850) <= 30  # lung: -850 HU, 25 HU up or down between subjects
        assert array[16, 16, 0] == pytest.approx(40, abs=1)  # soft tissue below the lungs
        assert 150 < array.max() <= 351  # bone
        litres = lung.sum() * 10**3 / 1e6
        assert 1.2 < litres < 5.5


def test_subjects_differ_in_lung_density_and_size():
    density = [float(np.median(np.asarray(c.array)[np.asarray(c.lung)])) for c in chests()]
    size = [int(c.lung.sum()) for c in chests()]
    assert np.ptp(density) > 25 and np.std(size) / np.mean(size) > 0.1


def test_heart_lies_left_and_lungs_are_apart():
    for chest in chests():
        lung = np.asarray(chest.lung)
        assert lung[:16].any() and lung[16:].any() and not lung[16, :, 20].any()
    left = sum(int(c.lung[:16].sum()) for c in chests())
    right = sum(int(c.lung[16:].sum()) for c in chests())
    assert left < right


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_the_scan_exactly_where_its_mask_is(name):
    index = FINDINGS.index(name)
    for healthy, ill in zip(chests(), chests(name), strict=True):
        mask = np.asarray(ill.masks)
        changed = np.asarray(healthy.array != ill.array)
        np.testing.assert_array_equal(np.asarray(healthy.lung), np.asarray(ill.lung))
        assert mask[index].any() and not np.delete(mask, index, 0).any() and not np.asarray(healthy.masks).any()
        assert changed.any() and not (changed & ~mask[index]).any()
        assert not (mask[index] & ~np.asarray(ill.lung)).any()


def test_findings_have_their_attenuation_and_place():
    center = (np.arange(32) - 15.5) * 10
    for nodule, emphysema, reticular, effusion in zip(*(chests(name) for name in FINDINGS), strict=True):
        assert np.asarray(nodule.array)[np.asarray(nodule.masks[0])].max() > -400
        holes = np.asarray(emphysema.masks[1])
        assert np.asarray(emphysema.array)[holes].min() < -940
        assert center[np.argwhere(holes)[:, 2]].min() > -10  # upper lungs
        assert center[np.argwhere(np.asarray(reticular.masks[2]))[:, 2]].max() < 0  # bases
        fluid = np.asarray(effusion.masks[3])
        assert np.percentile(np.asarray(effusion.array)[fluid], 90) == pytest.approx(10, abs=30)  # wholly filled voxels
        places = np.argwhere(fluid)
        assert center[places[:, 1]].mean() < -20  # behind
        assert len(set(center[places[:, 0]] > 0)) == 1  # one lung


def test_mean_intensity_hardly_tells_a_nodule():
    healthy, ill = ([float(c.array.mean()) for c in chests(*names)] for names in ((), ("nodule",)))
    assert abs(np.mean(ill) - np.mean(healthy)) < 0.1 * np.std(healthy)


def test_findings_coexist(key):
    chest = scanner()(key, finding_flags(*FINDINGS))
    assert np.asarray(chest.masks).any((1, 2, 3)).all()
    with pytest.raises(
        InputError, match="finding: expected one of nodule, emphysema, reticular, effusion, found 'mass'"
    ):
        finding_flags("mass")


def test_chest_is_a_function_of_its_key_and_vmap_is_the_same(key):
    keys = jax.random.split(key, 2)
    flags = jnp.stack([finding_flags("nodule"), finding_flags()])
    batch = jax.jit(jax.vmap(functools.partial(make_chest, shape=SHAPE)))(keys, flags)
    for index in range(2):
        single = scanner()(keys[index], flags[index])
        again = scanner()(keys[index], flags[index])
        np.testing.assert_array_equal(single.array, again.array)
        np.testing.assert_allclose(batch.array[index], single.array, atol=0.01)
    assert not np.array_equal(batch.array[0], batch.array[1])


def test_noise_has_the_asked_deviation(key):
    quiet, noisy = (scanner(noise)(key, finding_flags()).array for noise in (0.0, 25.0))
    assert np.std(np.asarray(noisy - quiet)) == pytest.approx(25.0, rel=0.05)


def test_uneven_grids_are_finite(key):
    chest = scanner(25.0, UNEVEN)(key, finding_flags(*FINDINGS))
    assert chest.array.shape == UNEVEN and np.isfinite(np.asarray(chest.array)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("field_of_view", (0.0, 320.0, 320.0)),
        ("noise", -1.0),
        ("severity", (0.5, 0.2)),
        ("nodule_radius", (0.0, 1.0)),
        ("emphysema_share", (0.0, 0.5)),
        ("effusion_depth", (0.0, 50.0)),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ChestConfig(**{field: value})


def test_cohort_comes_back_from_its_files(tmp_path):
    settings = {"seed": 3, "subjects": 10, "shape": UNEVEN, "finding": "emphysema", "distractors": 0.5}
    manifest = write_chest_cohort(tmp_path / "a", **settings)
    table = read_table(manifest, required=("path", "subject", "label", "split", *FINDINGS))
    require_disjoint_subjects(table)
    assert len(set(table.column("subject"))) == len(table) == 10
    assert table.column("split") == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert table.column("label") == table.column("emphysema") == ["0", "1"] * 5
    assert 0 < sum(table.integers("nodule")) < 10
    paths = resolve_paths(table)
    volume = nifti.read(paths[1])
    assert volume.spacing == (20, 20, 16) and orientation(volume.affine) == "RAS"
    np.testing.assert_allclose(volume.affine @ [7.5, 7.5, 9.5, 1], [0, 0, 0, 1])
    flags = jnp.array([bool(table.integers(name)[1]) for name in FINDINGS])
    expected = scanner(25.0, UNEVEN)(jax.random.fold_in(jax.random.key(3), 1), flags).array
    np.testing.assert_allclose(volume.array, np.clip(expected, -1024, 3071), atol=0.51)
    assert nifti.describe(paths[1])["dtype"] == "int16"


def test_second_call_writes_nothing_and_a_resumed_one_what_is_missing(tmp_path):
    write = functools.partial(write_chest_cohort, tmp_path, 0, 4, (12, 12, 12))
    manifest = write()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    content = (tmp_path / "scans/chest_0002.nii.gz").read_bytes()
    assert write() == manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    (tmp_path / "scans/chest_0002.nii.gz").unlink()
    write()
    assert (tmp_path / "scans/chest_0002.nii.gz").read_bytes() == content
    assert (tmp_path / "scans/chest_0001.nii.gz").stat().st_mtime_ns == times[tmp_path / "scans/chest_0001.nii.gz"]
    with pytest.raises(InputError, match="scans.json: expected a cohort of seed 1, found 0; choose another folder"):
        write_chest_cohort(tmp_path, 1, 4, (12, 12, 12))


@pytest.mark.parametrize(
    ("field", "value"),
    [("subjects", 0), ("distractors", 1.5), ("fractions", (0.5, 0.5, 0.5))],
)
def test_impossible_cohorts_are_refused_before_anything_is_written(tmp_path, field, value):
    with pytest.raises(InputError, match=field):
        write_chest_cohort(tmp_path, **{"seed": 0, "subjects": 2, "shape": (12, 12, 12), field: value})
    assert not any(tmp_path.iterdir())

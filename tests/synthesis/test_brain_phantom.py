"""The phantom brain: tissues that sum to 1, lesions and cues only where they are said to be, files that say so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.grid import orientation
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, resolve_paths
from jaxmed.synthesis.phantoms.brain import (
    LABELS,
    T2W,
    TISSUES,
    BrainConfig,
    draw_brain,
    make_brain,
)
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort

pytestmark = pytest.mark.core
CLEAN = BrainConfig(noise=0.0, texture=0.0, intensity_spread=0.0)
KEYS = jax.random.split(jax.random.key(6), 16)


@functools.cache
def maker(shape, config):
    return jax.jit(jax.vmap(lambda key, lesion, cue: make_brain(key, lesion, cue, shape, config)))


@functools.cache
def brains(lesion, cue, shape=(64, 64), config=CLEAN):
    return jax.tree.map(np.asarray, maker(shape, config)(KEYS, jnp.full(16, lesion), jnp.full(16, cue)))


def test_shares_sum_to_one_and_labels_are_the_largest():
    for lesion in (False, True):
        found = brains(lesion, False)
        np.testing.assert_allclose(found.shares.sum(-1), 1.0, atol=1e-5)
        assert (found.shares >= -1e-6).all()
        order = np.array([LABELS[name] for name in TISSUES])
        np.testing.assert_array_equal(found.labels, order[found.shares.argmax(-1)])
        assert set(np.unique(found.labels)) == {0, 2, 3, 4, 24} | ({77} if lesion else set())


def test_intensities_are_those_of_the_tissues():
    found = brains(True, False)
    for tissue, level in zip(TISSUES, (0.0, *CLEAN.intensity), strict=True):
        pure = found.shares[..., TISSUES.index(tissue)] > 0.999
        assert pure.any(), tissue
        np.testing.assert_allclose(found.image[pure], level, atol=2e-3)
    assert T2W.intensity[0] > T2W.intensity[1] > T2W.intensity[2]


def test_proportions_are_those_of_a_brain():
    found = brains(False, False)
    totals = found.shares.sum((1, 2))[:, 1:]
    csf, grey, white, ventricle, lesion = (totals / totals.sum(1, keepdims=True)).T
    assert (lesion == 0).all()
    assert (0.03 < ventricle).all() and (ventricle < 0.15).all()
    assert (0.25 < grey).all() and (grey < 0.5).all() and (0.3 < white).all() and (white < 0.6).all()
    assert white.std() > 0.005 and ventricle.std() > 0.005
    # Nothing touches the edge of the picture.
    assert (found.image[:, [0, -1]] == 0).all() and (found.image[:, :, [0, -1]] == 0).all()


def test_lesion_and_cue_change_the_scan_only_where_they_are():
    healthy, ill, cued = brains(False, False), brains(True, False), brains(False, True)
    np.testing.assert_array_equal(healthy.lesion, ill.lesion)
    for index in range(16):
        assert ill.lesion[index].sum() >= 8
        changed = np.abs(ill.image[index] - healthy.image[index])
        # A lesion's soft border reaches one voxel beyond its core.
        assert changed[ill.lesion[index]].min() > 0.2
        away = ~grown(ill.lesion[index], 2)
        assert (changed[away] == 0).all()
        bright = cued.image[index] - healthy.image[index]
        assert bright[cued.cue[index]].min() > 0.3 and (bright[~grown(cued.cue[index], 2)] == 0).all()
        assert not (cued.cue[index] & ill.lesion[index]).any()
        np.testing.assert_array_equal(cued.shares[index], healthy.shares[index])


def grown(mask, steps):
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2] | mask
    return mask


def test_cue_and_lesion_lie_in_one_direction_in_every_quadrant():
    found = brains(True, True)
    grid = np.indices((64, 64))
    quadrants = set()
    for lesion, cue in zip(found.lesion, found.cue, strict=True):
        inner, outer = ((grid * mask).sum((1, 2)) / mask.sum() - 31.5 for mask in (lesion, cue))
        assert np.linalg.norm(outer) > np.linalg.norm(inner) + 3
        quadrants.add((inner[0] > 0, inner[1] > 0))
    assert len(quadrants) == 4


def test_probabilities_and_the_shortcut():
    draw = {
        follows: jax.jit(
            jax.vmap(
                lambda key, follows=follows: draw_brain(
                    key, (16, 16), BrainConfig(lesion_probability=0.3, cue_probability=0.5, lesion_follows_cue=follows)
                )[-2:]
            )
        )
        for follows in (False, True)
    }
    keys = jax.random.split(jax.random.key(0), 2000)
    lesion, cue = (np.asarray(flag) for flag in draw[False](keys))
    assert abs(lesion.mean() - 0.3) < 0.04 and abs(cue.mean() - 0.5) < 0.04
    assert abs(np.corrcoef(lesion, cue)[0, 1]) < 0.08
    lesion, cue = (np.asarray(flag) for flag in draw[True](keys))
    np.testing.assert_array_equal(lesion, cue)
    assert 0 < lesion.mean() < 1


def test_a_volume_has_the_volumes_of_its_shapes():
    found = brains(False, False, (48, 48, 40))
    spacing = 192 / np.array([48, 48, 40])
    sums = np.asarray(found.shares, np.float64).reshape(len(found.shares), -1, len(TISSUES)).sum(1)
    volumes = [dict(zip(TISSUES[1:], row[1:] * np.prod(spacing) / 1000, strict=True)) for row in sums]
    total = [sum(entry.values()) for entry in volumes]
    # An ellipsoid of 62 x 76 x 58 mm, each within 8 %.
    assert np.mean(total) == pytest.approx(4 / 3 * np.pi * 62 * 76 * 58 / 1000, rel=0.05)
    size = np.mean([entry["ventricle"] for entry in volumes])
    assert size == pytest.approx(2 * 4 / 3 * np.pi * 6.5 * 24 * 9 / 1000, rel=0.25)


def test_scan_noise_and_contrast_vary_but_the_truth_does_not():
    clean, noisy = brains(False, False), brains(False, False, config=BrainConfig(noise=0.05))
    np.testing.assert_array_equal(clean.shares, noisy.shares)
    white = clean.shares[..., TISSUES.index("white")] > 0.999
    assert np.std(noisy.image[white] - clean.image[white]) == pytest.approx(0.07, abs=0.025)
    assert noisy.image.min() >= 0 and noisy.image.max() <= 2


@pytest.mark.parametrize("shape", [(24, 20), (20, 18, 16)])
def test_a_cohort_is_written_once_and_read_like_any_other(tmp_path, shape):
    manifest = write_brain_cohort(tmp_path, 3, 5, shape, BrainConfig(lesion_probability=0.5))
    table = read_table(manifest, ("path", "labels", "subject", "label", "split"))
    assert [row["split"] for row in table.rows] == ["train"] * 3 + ["validation", "test"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert len(before) == 10
    for row, path, labels in zip(table.rows, resolve_paths(table), resolve_paths(table, "labels"), strict=True):
        volume, truth = nifti.read(path), nifti.read(labels)
        assert volume.array.shape == ((*shape, 1) if len(shape) == 2 else shape)
        assert orientation(volume.affine) == "RAS" and volume.spacing[0] == pytest.approx(192 / shape[0])
        center = volume.affine @ [*((np.array(volume.array.shape) - 1) / 2), 1]
        np.testing.assert_allclose(center[:3], 0, atol=1e-4)
        assert set(np.unique(truth.array)) <= set(LABELS.values())
        assert (truth.array == 77).any() == (row["label"] == "1") == (row["lesion"] == "1")
    next(iter(before)).unlink()
    assert write_brain_cohort(tmp_path, 3, 5, shape, BrainConfig(lesion_probability=0.5)) == manifest
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert len(after) == 10 and sum(after[path] != time for path, time in before.items()) == 1
    with pytest.raises(InputError, match="expected a cohort of seed 4, found 3"):
        write_brain_cohort(tmp_path, 4, 5, shape, BrainConfig(lesion_probability=0.5))


def test_impossible_settings_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="lesion_probability: expected a number from 0 to 1, found 2"):
        BrainConfig(lesion_probability=2.0)
    with pytest.raises(ValueError, match="shape: expected 2 or 3 axes, found"):
        make_brain(key, False, False, (8,))
    with pytest.raises(InputError, match="fractions: expected three shares that sum to 1"):
        write_brain_cohort(tmp_path, 0, 4, fractions=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="2 or 3 axes of 8 voxels or more"):
        write_brain_cohort(tmp_path, 0, 4, (64, 4))

"""Phantom pairs of MRI and amyloid PET: what the PET shows, what the MRI tells of it, and the negative control."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.synthesis.phantoms.amyloid import MRI, cortical_region, cortical_uptake, draw_pair
from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort

pytestmark = pytest.mark.core

SHAPE, SPACING, SUBJECTS = (24, 24, 24), 8.0, 48


@pytest.fixture(scope="module")
def cohorts():
    keys = jax.random.split(jax.random.key(0), SUBJECTS)
    return {
        linked: jax.jit(jax.vmap(lambda key, linked=linked: draw_pair(key, SHAPE, SPACING, linked=linked)))(keys)
        for linked in (True, False)
    }


def test_uptake_is_a_step_of_atrophy_with_positivity_in_its_middle():
    uptake = cortical_uptake(jnp.array([0.0, 0.4, 0.5, 0.6, 1.0]))
    assert bool((jnp.diff(uptake) > 0).all())
    np.testing.assert_allclose(uptake[jnp.array([0, 2, 4])], [1.0, 1.325, 1.65], atol=1e-3)


def test_the_pet_shows_the_uptake_in_the_cortex(cohorts):
    pairs = cohorts[True]
    is_cortex = np.asarray(pairs.cortex) > 0.99
    assert is_cortex.sum((1, 2, 3)).min() > 20
    shown = [float(np.mean(suvr[inside])) for suvr, inside in zip(np.asarray(pairs.suvr), is_cortex, strict=True)]
    np.testing.assert_allclose(shown, pairs.uptake, atol=0.05)


def test_the_region_is_mostly_cortex_in_every_subject(cohorts):
    """At any atrophy its mean follows the uptake, and both sides of 1.326 occur as they do in the uptake."""
    pairs, region = cohorts[True], np.asarray(cortical_region(SHAPE, SPACING))
    assert np.asarray(pairs.cortex)[:, region].mean() > 0.7
    means = np.asarray(pairs.suvr)[:, region].mean(1)
    assert np.corrcoef(means, pairs.uptake)[0, 1] > 0.93
    assert 0.25 < np.mean(means > 1.326) < 0.75


def test_the_mri_tells_of_uptake_only_where_both_are_linked(cohorts):
    for linked, pairs in cohorts.items():
        # What anyone can measure: ventricles and thin cortex leave less grey matter.
        grey = np.asarray(pairs.cortex).sum((1, 2, 3)) / np.asarray(pairs.mri > MRI["background"] + 5).sum((1, 2, 3))
        correlation = np.corrcoef(grey, pairs.uptake)[0, 1]
        assert (correlation < -0.7) if linked else (abs(correlation) < 0.3), (linked, correlation)
    np.testing.assert_array_equal(cohorts[True].mri, cohorts[False].mri)


def test_intensities_are_those_that_the_networks_expect(cohorts):
    pairs = cohorts[True]
    mri, suvr = np.asarray(pairs.mri), np.asarray(pairs.suvr)
    assert mri.min() == MRI["background"] and suvr.min() == 0
    assert (mri[:, 0] == MRI["background"]).all() and (suvr[:, 0] == 0).all()
    # WhiteStripe: white matter about 0; there is some of it in every brain.
    assert 0.03 < np.mean(np.abs(mri) < 4) < 0.5


def test_files_are_on_one_grid_and_the_table_knows_the_truth(tmp_path):
    place = write_amyloid_cohort(tmp_path / "pairs", 3, 4, SHAPE, SPACING)
    with open(place) as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 3 + ["validation"]
    volumes = [[nifti.read(place.parent / row[name]) for name in ("scan_path", "suvr_path")] for row in rows]
    for mri, suvr in volumes:
        np.testing.assert_array_equal(mri.affine, suvr.affine)
        assert mri.affine[0, 0] == -SPACING and mri.array.shape == SHAPE
    direct = draw_pair(jax.random.fold_in(jax.random.key(3), 2), SHAPE, SPACING)
    np.testing.assert_allclose(volumes[2][0].array, direct.mri, atol=1e-4)
    assert float(rows[2]["uptake"]) == pytest.approx(float(direct.uptake), abs=1e-3)
    with pytest.raises(InputError, match="linked"):
        write_amyloid_cohort(tmp_path / "pairs", 3, 4, SHAPE, SPACING, linked=False)

"""Tissue volumes against mixtures and phantoms whose volumes are known, and against FSL FAST's maps of a real scan."""

import functools

import jax
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.metrics.tissue import TISSUES, TissueConfig, fit_tissue, label_volumes, mixture_volumes
from jaxmed.synthesis.phantoms.brain import LABELS, BrainConfig, make_brain

SHAPE = (96, 96)


@functools.cache
def fitter(**settings):
    return jax.jit(lambda image, mask: fit_tissue(image, mask, TissueConfig(**settings)))


@functools.cache
def phantom():
    """Six brains: images, masks and true areas of CSF, grey and white matter."""
    config = BrainConfig(noise=0.01)
    make = jax.jit(jax.vmap(lambda key: make_brain(key, False, False, SHAPE, config)))
    brains = jax.tree.map(np.asarray, make(jax.random.split(jax.random.key(8), 6)))
    totals = brains.shares.astype(np.float64).sum((1, 2))
    return brains.image, brains.labels > 0, np.stack([totals[:, 1] + totals[:, 4], totals[:, 2], totals[:, 3]], 1)


def areas(images, masks):
    return np.stack([mixture_volumes(fitter()(i, m), 1.0) for i, m in zip(images, masks, strict=True)])


def gain():
    x, y = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    return (1 + 0.15 * x - 0.1 * y**2).astype(np.float32)


@pytest.mark.core
def test_volumes_of_phantoms_are_found():
    images, masks, truth = phantom()
    errors = np.abs(areas(images, masks) / truth - 1).mean(0)
    # Voxels are 2 mm and the ribbon 9 mm thick: a border voxel in five.
    assert errors[TISSUES.index("white")] < 0.03
    assert errors[TISSUES.index("grey")] < 0.08 and errors[TISSUES.index("csf")] < 0.08


@pytest.mark.core
def test_a_gain_changes_no_volume_and_is_recovered():
    images, masks, _ = phantom()
    np.testing.assert_allclose(areas(images * gain(), masks), areas(images, masks), rtol=0.01)
    flat, bent = (fitter()(image, masks[0]) for image in (images[0], images[0] * gain()))
    ratio = np.asarray(bent.gain / flat.gain) / gain()
    inside = ratio[masks[0]]
    assert inside.std() / inside.mean() < 0.003
    assert np.asarray(bent.gain)[masks[0]].mean() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("partial_volume", [True, False])
def test_no_step_lowers_the_likelihood(partial_volume):
    images, masks, _ = phantom()
    fit = fitter(partial_volume=partial_volume)(images[0] * gain(), masks[0])
    history = np.asarray(fit.log_likelihood)
    assert np.diff(history).min() > -1e-5 and history[-1] - history[0] > 0.05
    shares = np.asarray(fit.shares)
    np.testing.assert_allclose(shares[masks[0]].sum(-1), 1.0, atol=1e-5)
    assert (shares[~masks[0]] == 0).all() and (np.diff(np.asarray(fit.mean)) > 0).all()


@pytest.mark.core
def test_a_true_mixture_has_its_parameters_back():
    rng = np.random.default_rng(0)
    tissue = rng.choice(3, size=SHAPE, p=(0.2, 0.35, 0.45))
    mean, std = np.array([30.0, 90.0, 130.0]), np.array([8.0, 10.0, 6.0])
    image = (mean[tissue] + std[tissue] * rng.normal(size=SHAPE)).astype(np.float32)
    mask = np.ones(SHAPE, bool)
    fit = fitter(partial_volume=False, bias_order=0)(image, mask)
    np.testing.assert_allclose(fit.mean, mean, atol=1.0)
    np.testing.assert_allclose(fit.std, std, atol=0.7)
    np.testing.assert_allclose(fit.weight, [0.2, 0.35, 0.45], atol=0.02)
    np.testing.assert_allclose(mixture_volumes(fit, 2.0), 2.0 * np.bincount(tissue.ravel()), rtol=0.05)
    # The unit of the image does not matter, nor what lies outside the mask.
    larger = fitter(partial_volume=False, bias_order=0)(image * 1000, mask)
    np.testing.assert_allclose(larger.mean, fit.mean * 1000, rtol=1e-3)
    mask[:, :20] = False
    changed = np.where(mask, image, 1e4).astype(np.float32)
    two = [fitter(partial_volume=False, bias_order=0)(i, mask) for i in (np.where(mask, image, 0), changed)]
    np.testing.assert_allclose(two[0].mean, two[1].mean, rtol=1e-5)


@pytest.mark.core
def test_flat_images_are_finite():
    fit = fitter()(np.full(SHAPE, 0.7, np.float32), np.ones(SHAPE, bool))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in fit)
    empty = fitter()(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool))
    assert np.asarray(mixture_volumes(empty, 1.0)).sum() == 0


@pytest.mark.core
def test_label_maps_are_counted():
    labels = np.array([[0, 2, 2], [3, 3, 24], [4, 77, 2]])
    table = {"white": (LABELS["white"],), "csf": (LABELS["csf"], LABELS["ventricle"]), "thalamus": (10,)}
    assert label_volumes(labels, table, 1.5) == {"white": 4.5, "csf": 3.0, "thalamus": 0.0}
    with pytest.raises(InputError, match="voxel_volume: expected a positive number"):
        label_volumes(labels, table, 0.0)
    with pytest.raises(InputError, match="labels of 'none': expected one or more"):
        label_volumes(labels, {"none": ()}, 1.0)


def test_a_real_scan_agrees_with_fast(shared_data):
    """Half the resolution, for time; FAST's maps are another program's estimate, so 15 % and not the truth."""
    folder = shared_data / "brain_t1_tissue"
    scan, grey, white = (
        nifti.read(folder / f"{name}.nii.gz").array[::2, ::2, ::2].astype(np.float32)
        for name in ("t1_brain", "pve_gm", "pve_wm")
    )
    mask = scan > 0
    fit = fitter()(scan, mask)
    found = dict(zip(TISSUES, np.asarray(mixture_volumes(fit, 8.0)), strict=True))
    for name, expected in (("grey", grey), ("white", white)):
        assert found[name] == pytest.approx(expected.sum() / 255 * 8.0, rel=0.15)
        share = np.asarray(fit.shares[..., TISSUES.index(name)])[mask]
        assert np.corrcoef(share, expected[mask])[0, 1] > 0.8


@pytest.mark.core
def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="least_std: expected a number above 0"):
        TissueConfig(least_std=0.0)
    with pytest.raises(ValueError, match="num_steps: expected a whole number from 1"):
        TissueConfig(num_steps=0)

"""The NODDI fit on arrays: recovery, likelihoods, chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.physics import noddi as model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.systems import noddi
from jaxmed.systems.noddi import chunks, fitting
from jaxmed.systems.noddi.fitting import FLAGS, Estimates
from jaxmed.systems.noddi.options import FitConfig

BVALS, BVECS = two_shell_protocol()
SMALL = FitConfig(chunk_size=128)
"""One size of chunk for all tests: each size is compiled anew."""


def simulate(count, seed=0, snr=None, fwf_range=(0.0, 0.9), odi_range=(0.03, 0.97)):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(count, 3))
    truth = {
        "ndi": rng.uniform(0.05, 0.95, count),
        "odi": rng.uniform(*odi_range, count),
        "fwf": rng.uniform(*fwf_range, count),
        "direction": direction / np.linalg.norm(direction, axis=1, keepdims=True),
    }
    truth = {name: value.astype(np.float32) for name, value in truth.items()}
    signals = np.asarray(model.signal(*(jnp.asarray(truth[name]) for name in truth), BVALS, BVECS))
    if snr is not None:
        noise = rng.normal(size=(2, *signals.shape)) / snr
        signals = np.hypot(signals + noise[0], noise[1])
    return (1000 * signals).astype(np.float32), truth


def all_finite(maps):
    return all(np.isfinite(part).all() for part in maps if part is not None)


@pytest.mark.core
def test_noise_free_parameters_are_recovered():
    """Specification item i.6: within 1e-4 for fwf < 0.9 and 0.03 < odi < 0.97, direction within 0.1 degrees."""
    signals, truth = simulate(640)
    maps = noddi.fit(signals, BVALS, BVECS, config=SMALL)
    for name in ("ndi", "odi", "fwf"):
        np.testing.assert_allclose(getattr(maps, name), truth[name], atol=1e-4, err_msg=name)
    cosine = np.abs(np.sum(maps.direction * truth["direction"], axis=-1))
    assert np.degrees(np.arccos(np.clip(cosine, 0, 1))).max() < 0.1
    np.testing.assert_allclose(maps.s0, 1000, rtol=1e-5)
    assert maps.residual.max() < 1e-5 and maps.fitted.all()


def test_rician_likelihood_removes_the_bias_of_the_noise_floor():
    signals, truth = simulate(1920, snr=20.0, fwf_range=(0.0, 0.4), odi_range=(0.1, 0.6))
    bias = {
        sigma: float(np.mean(noddi.fit(signals, BVALS, BVECS, sigma=sigma, config=SMALL).ndi - truth["ndi"]))
        for sigma in (None, 1000 / 20)
    }
    assert bias[None] > 0.02
    assert abs(bias[1000 / 20]) < 0.3 * bias[None]


def test_chunks_and_masks_do_not_change_a_voxel():
    signals, _ = simulate(300, snr=30.0)
    whole = noddi.fit(signals, BVALS, BVECS, sigma=33.0, config=SMALL)
    mask = np.zeros(300, bool)
    mask[7:290:3] = True
    parts = noddi.fit(signals, BVALS, BVECS, mask, sigma=33.0, config=SMALL)
    for name in ("ndi", "odi", "fwf"):
        np.testing.assert_allclose(getattr(parts, name)[mask], getattr(whole, name)[mask], atol=2e-3)
        assert not getattr(parts, name)[~mask].any()
    np.testing.assert_array_equal(parts.fitted, mask)


def test_an_interrupted_fit_continues_to_the_same_numbers(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_CHUNKS", 1)
    signals, _ = simulate(400, snr=30.0)
    saved: list[Estimates] = []
    arguments = (signals, BVALS, BVECS)
    whole = fitting.estimate(*arguments, config=SMALL, on_block=lambda done, total, rows: saved.append(rows))
    resumed = fitting.estimate(*arguments, config=SMALL, finished=saved[1])
    assert len(saved[1].values) == 256
    for first, second in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(first, second)


def test_maps_have_the_shape_of_the_voxels():
    signals, _ = simulate(24)
    maps = noddi.fit(signals.reshape(2, 3, 4, -1), BVALS, BVECS)
    assert maps.ndi.shape == (2, 3, 4) and maps.direction.shape == (2, 3, 4, 3)


def test_voxels_without_signal_are_zero_and_said():
    signals, _ = simulate(4)
    signals[1] = 0.0
    maps = noddi.fit(signals, BVALS, BVECS)
    np.testing.assert_array_equal(maps.fitted, [True, False, True, True])
    assert maps.ndi[1] == 0 and all_finite(maps) and maps.flags[1] == FLAGS["no_unweighted_signal"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_zero_and_said(value):
    signals, _ = simulate(4)
    signals[2, 50] = value
    signals[3, 0] = value
    maps = noddi.fit(signals, BVALS, BVECS, sigma=30.0)
    np.testing.assert_array_equal(maps.fitted, [True, True, False, False])
    assert all_finite(maps) and set(maps.flags[2:]) == {FLAGS["not_finite"]} and not maps.ndi[2:].any()


def test_pure_noise_stays_finite():
    noise = np.abs(np.random.default_rng(0).normal(size=(128, len(BVALS)))).astype(np.float32)
    maps = noddi.fit(noise, BVALS, BVECS, sigma=1.0)
    assert all_finite(maps)
    assert ((0 <= maps.fwf) & (maps.fwf <= 1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bvals": BVALS[:-1]}, "expected 99 rows"),
        ({"bvals": BVALS + 100}, "expected a row at b <= 50"),
        ({"mask": np.zeros(4, bool)}, "at least one voxel inside"),
    ],
)
def test_wrong_arrays_are_refused(change, message):
    signals, _ = simulate(4)
    arguments = {"bvals": BVALS, "bvecs": BVECS, "mask": None} | change
    with pytest.raises(ValueError, match=message):
        noddi.fit(signals, **arguments)


@pytest.mark.core
def test_readme_example():
    """The five lines of the README."""
    from jaxmed.physics.acquisition import two_shell_protocol
    from jaxmed.systems import noddi

    bvals, bvecs = two_shell_protocol()
    signals = np.exp(-bvals * 3e-3)[None].astype(np.float32)  # one voxel of free water
    maps = noddi.fit(signals, bvals, bvecs)
    assert maps.fwf[0] > 0.99

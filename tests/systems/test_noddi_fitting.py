"""The NODDI fit on arrays: recovery, likelihoods, chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.gradients import check_gradients
from jaxmed.physics import noddi as model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.solvers import ascents
from jaxmed.systems import noddi
from jaxmed.systems.noddi import fitting
from jaxmed.systems.noddi.protocol import FitConfig
from jaxmed.systems.noddi.voxel_fit import FLAGS, Estimates

BVALS, BVECS = two_shell_protocol()
SMALL = FitConfig(chunk_size=128)
"""One size of chunk for all tests: each size is compiled anew."""


def simulate(count, seed=0, snr=None, fwf_range=(0.0, 0.9), odi_range=(0.03, 0.97), table=(BVALS, BVECS)):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(count, 3))
    truth = {
        "ndi": rng.uniform(0.05, 0.95, count),
        "odi": rng.uniform(*odi_range, count),
        "fwf": rng.uniform(*fwf_range, count),
        "direction": direction / np.linalg.norm(direction, axis=1, keepdims=True),
    }
    truth = {name: value.astype(np.float32) for name, value in truth.items()}
    signals = np.asarray(model.signal(*(jnp.asarray(truth[name]) for name in truth), *table))
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
    monkeypatch.setattr(ascents, "BLOCK_CHUNKS", 1)
    signals, _ = simulate(400, snr=30.0)
    saved: list[Estimates] = []
    arguments = (signals, check_gradients(BVALS, BVECS))
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
    assert maps.ndi[1] == 0 and all_finite(maps) and maps.flags[1] == FLAGS["no_signal"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_zero_and_said(value):
    signals, _ = simulate(4)
    signals[2, 50] = value
    signals[3, 0] = value
    maps = noddi.fit(signals, BVALS, BVECS, sigma=30.0)
    np.testing.assert_array_equal(maps.fitted, [True, True, False, False])
    assert all_finite(maps) and set(maps.flags[2:]) == {FLAGS["not_finite"]} and not maps.ndi[2:].any()


GARBAGE = {
    "one image of 1e25": (50, 1e25),
    "one image of -1e25": (50, -1e25),
    "one image of 1e38": (60, 1e38),
    "NaN": (50, np.nan),
    "all but the unweighted are 1e25": (slice(9, None), 1e25),
    "all are NaN": (slice(None), np.nan),
}


def test_a_voxel_that_holds_no_signal_is_flagged_and_holds_up_no_other():
    """Before, the cost was infinite where the fit began, and the batch never ended."""
    clean, _ = simulate(100)
    signals = clean.copy()
    for row, (images, value) in enumerate(GARBAGE.values()):
        signals[10 * row, images] = value
    bad = np.zeros(100, bool)
    bad[: 10 * len(GARBAGE) : 10] = True
    maps = noddi.fit(signals, BVALS, BVECS, config=SMALL)
    np.testing.assert_array_equal(maps.fitted, ~bad)
    assert set(maps.flags[bad]) == {FLAGS["no_signal"], FLAGS["not_finite"]} and not maps.ndi[bad].any()
    np.testing.assert_array_equal(maps.ndi[~bad], noddi.fit(clean, BVALS, BVECS, config=SMALL).ndi[~bad])


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15, 1e30])
def test_the_unit_of_the_signals_does_not_matter(scale):
    signals, truth = simulate(100)
    maps = noddi.fit(signals.astype(np.float64) * scale, BVALS, BVECS, config=SMALL)
    np.testing.assert_allclose(maps.ndi, truth["ndi"], atol=1e-4)
    np.testing.assert_allclose(maps.s0, 1000 * scale, rtol=1e-5)


def test_a_signal_that_the_model_cannot_make_is_flagged_and_tissue_is_not():
    """An oil hardly diffuses: its fit ends at ndi = 1 with a residual far above the noise, known or not."""
    tissue, _ = simulate(1000, snr=30.0)
    rng = np.random.default_rng(1)
    oil = 1000 * np.exp(-BVALS * 1e-3 * 0.05) + rng.normal(size=(1000, 99)) * 1000 / 30
    for sigma in (None, 1000 / 30):
        flags = noddi.fit(np.concatenate([tissue, oil]), BVALS, BVECS, sigma=sigma, config=SMALL).flags
        misfit = flags & FLAGS["misfit"] > 0
        assert misfit[1000:].all() and misfit[:1000].mean() < 0.002


@pytest.mark.parametrize("s0", ["mean", "free"])
def test_unweighted_images_of_b_60_are_not_taken_for_b_0(s0):
    """As of HCP 7T under the threshold of 100: before, fwf came out low by 0.08."""
    from jaxmed.physics.acquisition import spread_directions

    bvals = np.where(BVALS == 0, np.where(np.arange(99) % 3 > 0, 60.0, 0.0), BVALS)
    bvecs = np.where(BVALS[:, None] == 0, spread_directions(99), BVECS)
    signals, truth = simulate(100, table=(bvals, bvecs))
    maps = noddi.fit(signals, bvals, bvecs, config=dataclasses.replace(SMALL, b0_threshold=100.0, s0=s0))
    for name in ("ndi", "odi", "fwf"):
        np.testing.assert_allclose(getattr(maps, name), truth[name], atol=3e-4, err_msg=name)
    np.testing.assert_allclose(maps.s0, 1000, rtol=1e-4)


def test_unweighted_images_whose_direction_is_not_known_fall_by_their_mean():
    from jaxmed.physics.acquisition import spread_directions

    bvals, known = np.where(BVALS == 0, 60.0, BVALS), np.where(BVALS[:, None] == 0, spread_directions(99), BVECS)
    signals, truth = simulate(100, table=(bvals, known))
    bvecs = np.where(BVALS[:, None] == 0, np.nan, BVECS)
    maps = noddi.fit(signals, bvals, bvecs, config=dataclasses.replace(SMALL, b0_threshold=100.0))
    assert np.abs(maps.fwf - truth["fwf"]).mean() < 0.01 and "9 direction(s)" in maps.notes[0]


# Calls ---------------------------------------------------------------------------------------------------------------


def test_lists_and_columns_are_taken():
    signals, _ = simulate(4)
    expected = noddi.fit(signals, BVALS, BVECS)
    found = noddi.fit(signals.tolist(), BVALS.tolist(), BVECS.T.tolist(), [True] * 4)
    np.testing.assert_array_equal(found.ndi, expected.ndi)


NOISE = np.where(np.arange(4) == 2, -1.0, 30.0)
ARGUMENTS = {
    "vectors of NaN": ({"bvecs": np.full((99, 3), np.nan)}, "bvecs: expected a finite direction"),
    "one vector of NaN": ({"bvecs": np.where(np.arange(99)[:, None] == 40, np.nan, BVECS)}, "in place 41"),
    "b of NaN": ({"bvals": np.where(np.arange(99) == 40, np.nan, BVALS)}, "bvals: expected finite b-values"),
    "negative b": ({"bvals": -BVALS}, "bvals: expected finite b-values of 0 or more"),
    "b in s/m^2": ({"bvals": 1e6 * BVALS}, "bvals: .* not s/m"),
    "b in ms/um^2": ({"bvals": 1e-3 * BVALS}, "bvals: .* not ms/um"),
    "vectors times 0.7": ({"bvecs": 0.7 * BVECS}, "bvecs: expected directions of unit length"),
    "one shell": ({"bvals": np.where(BVALS > 0, 1000.0, 0.0)}, "bvals: expected two or more weighted shells"),
    "three axes": (
        {"bvecs": np.where(BVALS[:, None] > 0, np.eye(3)[np.arange(99) % 3], 0)},
        "bvals: expected weighted images in 6",
    ),
    "negative sigma": ({"sigma": -3.0}, "sigma: expected noise levels above 0 in the unit of the signals, found -3"),
    "sigma of NaN": ({"sigma": np.nan}, "sigma: expected noise levels above 0"),
    "negative sigma in one voxel": ({"sigma": NOISE}, "sigma: expected noise levels above 0"),
    "sigma of another shape": ({"sigma": np.ones(3)}, "sigma: expected one number, or the shape of the voxels"),
    "mask of another shape": ({"mask": np.ones(3, bool)}, "mask: expected the shape of the voxels"),
    "a map of another shape": ({"gradient_map": np.eye(3)}, "gradient_map: expected a 3 x 3 matrix per voxel"),
    "a map of NaN": ({"gradient_map": np.full((4, 3, 3), np.nan)}, "gradient_map: expected finite numbers"),
    "another model": ({"config": FitConfig(model="ball-and-stick")}, "config.model: expected noddi"),
    "words": ({"signals": "loud"}, "signals: expected a rectangular array of numbers"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_refused_by_its_name(name):
    change, message = ARGUMENTS[name]
    arguments = {"signals": np.ones((4, 99), np.float32), "bvals": BVALS, "bvecs": BVECS} | change
    with pytest.raises(InputError, match=message):
        noddi.fit(**arguments)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_the_driver_says_what_to_call_inside_a_transformation(transform):
    with pytest.raises(InputError, match="signals: expected an array with values.*noddi.fit_voxels inside"):
        transform(lambda signals: noddi.fit(signals, BVALS, BVECS).ndi.sum())(jnp.ones((2, 99)))


def check_derivatives(noise):
    """Compare jit, vmap and reverse mode through `fit_voxels` with the driver and its finite differences."""
    config = FitConfig(cost_tolerance=1e-9, chunk_size=128)
    signals, _ = simulate(8, seed=4, snr=30.0, fwf_range=(0.05, 0.6), odi_range=(0.1, 0.6))
    protocol = noddi.prepare(BVALS, BVECS, config)

    def total(signal):
        maps = noddi.fit_voxels(protocol, signal, noise, config=config)
        return maps.ndi + 2 * maps.odi + 3 * maps.fwf

    def driver(signals):
        maps = noddi.fit(signals, BVALS, BVECS, sigma=noise, config=config)
        return maps.ndi + 2 * maps.odi + 3 * maps.fwf

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(total)))(jnp.asarray(signals))
    np.testing.assert_allclose(values, driver(signals), atol=1e-3)
    way = np.random.default_rng(0).normal(size=signals.shape)
    difference = (driver(signals + 2 * way) - driver(signals - 2 * way)) / 4
    np.testing.assert_allclose(np.sum(gradients * way, axis=1), difference, atol=2e-5, rtol=2e-2)


def test_the_fit_of_voxels_is_differentiable():
    check_derivatives(None)


@pytest.mark.slow
def test_the_rician_fit_of_voxels_is_differentiable():
    check_derivatives(1000 / 30)


def test_pure_noise_stays_finite():
    noise = np.abs(np.random.default_rng(0).normal(size=(128, len(BVALS)))).astype(np.float32)
    maps = noddi.fit(noise, BVALS, BVECS, sigma=1.0)
    assert all_finite(maps)
    assert ((0 <= maps.fwf) & (maps.fwf <= 1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bvals": BVALS[:-1]}, "bvals: expected 99 b-values, one per image, found 98"),
        (
            {"bvals": BVALS + 100, "bvecs": BVECS + (BVALS == 0)[:, None] * [1, 0, 0]},
            r"bvals: expected an unweighted image \(b <= 50",
        ),
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

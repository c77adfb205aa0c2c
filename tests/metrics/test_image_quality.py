"""Measures of an image from itself: closed forms, and on real scans a score that falls with every fault."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmed.arrays.grid import resample_to, thick_axis
from jaxmed.arrays.histogram import mutual_information
from jaxmed.io import nifti
from jaxmed.metrics.image_quality import (
    ghost_level,
    imbalance,
    in_planes,
    measure_quality,
    otsu,
    ring_power,
    shared_information,
)
from jaxmed.metrics.statistics import spearman
from jaxmed.synthesis.artifacts import ghost
from jaxmed.synthesis.degradation import degrade

STRENGTHS = np.arange(1, 9) / 8
KEYS = 5
SCAN = ("noise", "ghosting", "blur", "field")
T2W, ADC = (3.0, 0.5, 0.5), (3.0, 2.0, 2.0)


# Closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_white_noise_has_the_power_of_its_variance_in_every_ring():
    noise = 0.3 * jax.random.normal(jax.random.key(0), (20, 64, 64))
    power, count, beyond = ring_power(noise)
    np.testing.assert_allclose(power[1:], 0.09, rtol=0.12)
    assert float(beyond) == pytest.approx(0.09, rel=0.03) and float(count.sum()) == 64 * 64


@pytest.mark.core
def test_ring_power_is_that_of_numpy():
    image = np.asarray(jax.random.uniform(jax.random.key(1), (1, 20, 24)))
    window = np.hanning(22)[1:-1, None] * np.hanning(26)[1:-1]
    spectrum = np.abs(np.fft.fft2((image[0] - (image[0] * window).sum() / window.sum()) * window)) ** 2
    spectrum /= (window**2).sum()
    radius = 2 * np.sqrt(np.fft.fftfreq(20)[:, None] ** 2 + np.fft.fftfreq(24) ** 2)
    place = np.minimum((radius * 5).astype(int), 4)
    expected = [spectrum[place == ring].mean() for ring in range(5)]
    power, _, beyond = ring_power(jnp.asarray(image))
    np.testing.assert_allclose(power, expected, rtol=1e-3)
    assert float(beyond) == pytest.approx(spectrum[radius > 0.8].mean(), rel=1e-4)


@pytest.mark.core
def test_otsu_parts_two_groups():
    rng = np.random.default_rng(0)
    values = jnp.asarray(np.concatenate([rng.normal(1, 0.1, 500), rng.normal(4, 0.2, 200)]), jnp.float32)
    assert 1.4 < float(otsu(values, jnp.ones(700, bool))) < 3.4
    assert float(otsu(values, values > 2)) > 3.5  # among the upper group alone


@pytest.mark.core
@pytest.mark.parametrize("axis", [1, 2])
def test_a_ghost_is_found_as_strong_as_it_is(axis):
    """Every second line scaled by 1 - s leaves a ghost of s / (2 - s) of the signal."""
    textured = 1 + 0.3 * jax.random.normal(jax.random.key(2), (1, 48, 48))
    assert float(ghost_level(textured)) < 0.06
    found = ghost(textured, axis, 2, 0.4)
    assert float(ghost_level(found)) == pytest.approx(0.4 / 1.6, abs=0.05)


@pytest.mark.core
def test_a_ghost_in_air_is_found_too():
    rows, columns = np.mgrid[:64, :64]
    window = 1 / (1 + np.exp((rows - 20) ** 2 / 20 + (columns - 17) ** 2 / 12 - 6))
    small = jnp.asarray(window * (1 + 0.3 * np.random.default_rng(3).normal(size=(64, 64))), jnp.float32)[None]
    levels = [float(ghost_level(ghost(small, 2, 2, strength))) for strength in (0.0, 0.3, 0.6)]
    assert levels[0] < 0.02 < levels[1] < levels[2]


@pytest.mark.core
def test_the_two_axes_of_a_plane_are_told_apart_less_the_noise():
    waves = jnp.broadcast_to(jnp.sin(jnp.arange(64) * 0.8), (1, 64, 64))
    both = waves + 0.5 * jnp.swapaxes(waves, 1, 2)
    octaves = float(imbalance(both, jnp.zeros(())))
    assert octaves == pytest.approx(2.0, abs=0.05)  # a half of the amplitude is a quarter of the energy
    noise = 0.1 * jax.random.normal(jax.random.key(4), (1, 64, 64))
    assert float(imbalance(both + noise, jnp.asarray(0.01))) == pytest.approx(octaves, abs=0.15)


@pytest.mark.core
def test_shared_information_is_linfoots_of_the_joint_histogram():
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 24, 5000), rng.integers(0, 24, 5000)
    joint = np.histogram2d(one, two, 24)[0] / 5000
    parts = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    expected = (joint[joint > 0] * np.log(joint[joint > 0] / parts[joint > 0])).sum()
    floats = [jnp.asarray(values, jnp.float32) for values in (one, two)]
    assert float(mutual_information(*floats)) == pytest.approx(expected, rel=1e-3)
    whole = jnp.asarray(rng.normal(size=(30, 30)), jnp.float32)
    assert float(shared_information(whole, -2 * whole)) > 0.95 > 0.4 > float(shared_information(whole, whole.T))


@pytest.mark.core
def test_the_thickest_axis_runs_from_plane_to_plane():
    assert thick_axis((0.5, 0.5, 3.0)) == 2 and thick_axis((1.0, 1.0, 1.0)) == 2 and thick_axis((3.0, 0.5, 0.5)) == 0
    planes, edge = in_planes(jnp.zeros((20, 30, 4)), (0.5, 2.0, 3.0))
    assert planes.shape == (4, 20, 30) and edge == pytest.approx(1.0)
    assert in_planes(jnp.zeros((5, 6)), ())[0].shape == (1, 5, 6)


@pytest.mark.core
def test_a_score_does_not_depend_on_unit_or_order_of_axes():
    image = jnp.abs(jax.random.normal(jax.random.key(5), (24, 28, 3))) + 1
    one = measure_quality(image, (1.0, 1.0, 4.0))
    other = measure_quality(100 * jnp.moveaxis(image, 2, 0), (4.0, 1.0, 1.0))
    np.testing.assert_allclose(other.score, one.score, rtol=1e-4)
    np.testing.assert_allclose(other.snr, one.snr, rtol=1e-4)
    doubled = measure_quality(image, (2.0, 2.0, 4.0))
    assert float(doubled.resolution) == pytest.approx(2 * float(one.resolution)) and bool(jnp.isnan(one.alignment))


# Real files ----------------------------------------------------------------------------------------------------------


def planes_of(path, axis, rows):
    return np.moveaxis(np.asarray(nifti.read(path).array, np.float32), axis, 0)[rows]


@pytest.fixture(scope="module")
def images(shared_data):
    prostate = shared_data / "prostate_mri"
    photo = Image.open(shared_data / "fundus_photo" / "retina.jpg").resize((256, 256), Image.Resampling.BOX)
    with np.load(shared_data / "retinamnist" / "retinamnist_trainval.npz") as stored:
        eyes = stored["train_images"][:3].astype(np.float32).mean(-1) / 255
    middle = slice(9, 10)
    return {
        "T2w": (planes_of(prostate / "ProstateX-0000" / "t2w.nii.gz", 2, middle)[:, 48:240, 48:240], T2W, True),
        "ADC": (planes_of(prostate / "ProstateX-0000" / "adc.nii.gz", 2, slice(7, 12, 2)), ADC, True),
        "brain": (
            planes_of(shared_data / "brain_t1_head" / "t1_head_defaced_1p2mm.nii.gz", 2, slice(110, 111)),
            (36.0, 1.2, 1.2), True,
        ),
        "fundus": (np.asarray(photo, np.float32).mean(-1) / 255, (), False),
        **{f"eye {number}": (eye, (), False) for number, eye in enumerate(eyes)},
    }  # fmt: skip


@partial(jax.jit, static_argnums=(2, 4, 5))
def worsened(key, image, kind, strength, spacing, is_magnitude):
    return measure_quality(degrade(key, image, kind, strength, spacing, is_magnitude=is_magnitude), spacing).score


CASES = [(name, kind) for name in ("T2w", "ADC", "brain") for kind in SCAN if (name, kind) != ("ADC", "blur")]
CASES += [(name, kind) for name in ("fundus", "eye 0", "eye 1", "eye 2") for kind in ("noise", "blur")]
QUICK = ("T2w", "eye 0")


@pytest.mark.parametrize(
    "name,kind", [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_score_falls_with_every_fault(images, name, kind):
    image, spacing, is_magnitude = images[name]
    pairs = [(strength, key) for strength in STRENGTHS for key in range(KEYS)]
    scores = [
        float(worsened(jax.random.key(key), image, kind, strength, spacing, is_magnitude)) for strength, key in pairs
    ]
    rank = spearman(np.array([strength for strength, _ in pairs]), np.array(scores))
    assert rank is not None and rank < -0.9


@pytest.mark.parametrize("patient", ["ProstateX-0000", pytest.param("ProstateX-0001", marks=pytest.mark.slow)])
def test_the_score_of_a_diffusion_scan_falls_with_its_distortion(shared_data, patient):
    folder = shared_data / "prostate_mri" / patient
    adc, t2w = (nifti.read(folder / f"{name}.nii.gz") for name in ("adc", "t2w"))
    anatomy = np.moveaxis(np.asarray(resample_to(t2w, adc.grid, order=1).array, np.float32), 2, 0)[:, 6:78, 28:100]
    image = np.moveaxis(np.asarray(adc.array, np.float32), 2, 0)[:, 6:78, 28:100]

    @jax.jit
    def score(key, image, strength, anatomy):
        return measure_quality(degrade(key, image, "distortion", strength, ADC), ADC, anatomy).score

    pairs = [(strength, key) for strength in STRENGTHS for key in range(KEYS)]
    scores = [float(score(jax.random.key(key), image, strength, anatomy)) for strength, key in pairs]
    rank = spearman(np.array([strength for strength, _ in pairs]), np.array(scores))
    assert rank is not None and rank < -0.9


def test_a_repeated_scan_is_nearer_its_twin_than_any_medium_fault(shared_data):
    folder = shared_data / "prostate_mri" / "ProstateX-0001"
    first, second = (planes_of(folder / f"{name}.nii.gz", 2, slice(7, 12, 2)) for name in ("t2w", "t2w-repeat"))
    own, twin = (float(measure_quality(jnp.asarray(image), T2W).score) for image in (first, second))
    for kind in SCAN:
        worse = float(worsened(jax.random.key(0), first, kind, 0.5, T2W, True))
        assert abs(twin - own) < abs(worse - own), kind

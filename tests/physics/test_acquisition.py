"""Shells, directions and noise."""

import jax
import numpy as np
import pytest

from jaxmed.physics.acquisition import (
    add_rician_noise,
    estimate_sigma,
    find_shells,
    spread_directions,
    two_shell_protocol,
)

pytestmark = pytest.mark.core


def test_shells_gather_jittered_b_values_and_keep_every_row():
    bvals = np.array([0.0, 5.0, 995.0, 1005.0, 2005.0, 1990.0, 40.0])
    shells = find_shells(bvals)
    assert [shell.rows for shell in shells] == [(0, 1, 6), (2, 3), (5, 4)]
    assert [round(shell.bval) for shell in shells] == [15, 1000, 1998]


def test_a_table_without_unweighted_rows_has_no_b0_shell():
    assert [shell.bval for shell in find_shells(np.array([1000.0, 2000.0]))] == [1000.0, 2000.0]


def test_spread_directions_are_unit_and_even():
    directions = spread_directions(60)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, atol=1e-12)
    second_moment = directions.T @ directions / 60
    np.testing.assert_allclose(second_moment, np.eye(3) / 3, atol=0.02)


def test_protocol_has_the_published_rows():
    bvals, bvecs = two_shell_protocol()
    assert [(shell.bval, len(shell.rows)) for shell in find_shells(bvals)] == [(0, 9), (711, 30), (2855, 60)]
    assert bvecs.shape == (99, 3)


@pytest.mark.parametrize("snr", [2.0, 5.0, 30.0])
def test_sigma_is_recovered_from_repeats(key, snr):
    magnitudes = add_rician_noise(key, np.full((20_000, 9), 100.0, np.float32), 100.0 / snr)
    assert estimate_sigma(np.asarray(magnitudes)) == pytest.approx(100.0 / snr, rel=0.04)


def test_rician_noise_has_the_known_second_moment(key):
    magnitude = add_rician_noise(key, np.full(200_000, 0.5, np.float32), 0.5)
    assert float(np.mean(np.asarray(magnitude) ** 2)) == pytest.approx(0.25 + 2 * 0.25, rel=0.01)


def test_identical_repeats_have_no_noise():
    assert estimate_sigma(np.ones((10, 4))) == 0.0


def test_noise_is_a_function_of_its_key(key):
    signal = np.ones(8, np.float32)
    np.testing.assert_array_equal(add_rician_noise(key, signal, 0.1), add_rician_noise(key, signal, 0.1))
    assert not np.array_equal(add_rician_noise(key, signal, 0.1), add_rician_noise(jax.random.key(1), signal, 0.1))

"""Staging and the loss: known stages found again, gaps kept, ends told, and sums by matrices equal to sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.visits import Visits, count_values, mark_missing, take_subjects
from jaxmed.solvers.fixed_grid import interpolate, solve_fixed
from jaxmed.systems.igndmoe.alignment import align, profiled_error, stage_visits, subject_errors
from jaxmed.systems.igndmoe.dual import ROUNDING, regularisers

pytestmark = pytest.mark.core

COURSE = solve_fixed(
    lambda t, c, _: jnp.array([0.3, 0.2, 0.15]) * c * (1 - c),
    jnp.array([0.05, 0.03, 0.02]),
    jnp.linspace(0.0, 30.0, 65),
)
GAPS = np.array([[0, 1.1, 2.7], [0, 0, 0], [0, 2.2, 0], [0, 1.5, 4.0]], np.float32)
PRESENT = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
ONSETS = np.array([3.3, 11.7, 20.2, 7.9], np.float32)
staged = jax.jit(functools.partial(align, num_stages=256))


def seen(onsets):
    values = interpolate(COURSE, jnp.asarray(onsets)[:, None] + GAPS)
    return Visits(np.where(PRESENT[..., None], values, 0.0).astype(np.float32), GAPS, PRESENT)


def test_noiseless_subjects_get_their_own_stage_back():
    # Specification, (i) 6: far less than a step of the grid, 0.12 years.
    found = staged(COURSE, seen(ONSETS))
    np.testing.assert_allclose(found.onsets, ONSETS, atol=0.01)
    assert not found.clipped.any() and float(found.errors.max()) < 1e-5


def test_the_order_of_subjects_does_not_matter():
    visits, order = seen(ONSETS), np.array([2, 0, 3, 1])
    found, shuffled = staged(COURSE, visits), staged(COURSE, take_subjects(visits, order))
    np.testing.assert_allclose(shuffled.onsets, np.asarray(found.onsets)[order], atol=1e-5)


def test_gaps_are_kept_so_the_last_visit_stays_on_the_course():
    shape = (*PRESENT.shape, 3)
    found = staged(COURSE, Visits(np.where(PRESENT[..., None], np.ones(shape, np.float32), 0), GAPS, PRESENT))
    np.testing.assert_allclose(found.onsets + GAPS.max(axis=1), 30.0, atol=0.02)
    assert found.clipped.all()
    found = staged(COURSE, Visits(np.zeros(shape, np.float32), GAPS, PRESENT))
    np.testing.assert_allclose(found.onsets, 0.0, atol=0.02)
    assert found.clipped.all()


def test_errors_are_sums_over_visits_and_regions_without_padding():
    visits = seen(ONSETS)
    noisy = visits._replace(values=visits.values + np.random.default_rng(0).normal(0, 0.1, visits.values.shape))
    noisy = noisy._replace(values=noisy.values.astype(np.float32))
    at = jnp.asarray(ONSETS + 0.37)
    direct = np.square(noisy.values - interpolate(COURSE, at[:, None] + GAPS)).sum(axis=-1)
    found = jax.jit(subject_errors)(COURSE, noisy, at)
    np.testing.assert_allclose(found, np.where(PRESENT, direct, 0).sum(axis=1), atol=2e-6)
    best = staged(COURSE, noisy)
    assert (best.errors <= found + 1e-6).all()
    # No stage of a fine scan is better.
    scan = np.stack(
        [jax.jit(subject_errors)(COURSE, noisy, jnp.full(4, t)) for t in np.linspace(0, 26, 400, dtype="f4")]
    )
    assert (np.asarray(best.errors) <= scan.min(axis=0) + 1e-5).all()


def test_the_profiled_error_is_that_of_subjects_staged_anew():
    weights = jnp.array([1.0, 0.0, 2.0, 1.0])
    noise = np.random.default_rng(0).normal(0, 0.005, (*PRESENT.shape, 3)).astype(np.float32)
    clean = seen(ONSETS)
    visits = clean._replace(values=np.where(PRESENT[..., None], clean.values + noise, 0.0))
    first = staged(COURSE, visits)
    prepared = jax.jit(stage_visits)(COURSE, visits, first.onsets, weights)
    np.testing.assert_allclose(profiled_error(prepared, COURSE), weights @ first.errors, atol=2e-5)
    # A course that is half a year ahead everywhere fits as well, which an error at fixed stages does not see.
    early = solve_fixed(lambda t, c, _: jnp.array([0.3, 0.2, 0.15]) * c * (1 - c), COURSE.states[1], COURSE.times)
    fixed = float(weights @ subject_errors(early, visits, first.onsets))
    profiled = float(profiled_error(prepared, early))
    again = float(weights @ staged(early, visits).errors)
    assert fixed > 3 * again and abs(profiled - again) < 0.1 * (fixed - again)


HOLES = np.random.default_rng(5).random((*PRESENT.shape, 3)) < 0.3
HOLES[0, 0], HOLES[2] = (True, True, False), False


def with_holes(visits):
    """The same visits without the values of some regions."""
    return mark_missing(visits._replace(values=np.where(HOLES, np.nan, visits.values).astype(np.float32)))


def test_regions_that_were_not_measured_do_not_count():
    visits = with_holes(seen(ONSETS))
    np.testing.assert_array_equal(visits.measured, PRESENT[..., None] & ~HOLES)
    np.testing.assert_array_equal(count_values(visits), (PRESENT[..., None] & ~HOLES).sum(axis=(1, 2)))
    found = staged(COURSE, visits)
    np.testing.assert_allclose(found.onsets, ONSETS, atol=0.02)
    noise = np.random.default_rng(0).normal(0, 0.05, visits.values.shape).astype(np.float32)
    noisy = visits._replace(values=np.where(visits.measured, visits.values + noise, 0))
    at = jnp.asarray(ONSETS + 0.37)
    residuals = np.where(PRESENT[..., None] & ~HOLES, noisy.values - interpolate(COURSE, at[:, None] + GAPS), 0)
    direct = np.square(residuals).sum(axis=(1, 2))
    np.testing.assert_allclose(jax.jit(subject_errors)(COURSE, noisy, at), direct, atol=2e-6)
    # The profiled error: what is left of the residuals beside the direction in which a stage can change.
    weights = jnp.array([1.0, 0.0, 2.0, 1.0])
    prepared = jax.jit(stage_visits)(COURSE, noisy, at, weights)
    roots = np.sqrt(np.asarray(weights))[:, None, None]
    np.testing.assert_array_equal(np.asarray(prepared.directions)[HOLES], 0)
    along = (np.asarray(prepared.directions) * residuals * roots).sum(axis=(1, 2))
    expected = (weights * direct).sum() - (along**2).sum()
    np.testing.assert_allclose(profiled_error(prepared, COURSE), expected, atol=2e-5)


@pytest.mark.parametrize("holes", [False, True])
def test_stages_and_errors_have_the_slope_of_finite_differences(holes):
    # The search compares and has none; stages move by the implicit function theorem, with data and with the course.
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        start, times = jnp.array([0.05, 0.03, 0.02]), jnp.linspace(0.0, 30.0, 33)
        rates, present = jnp.array([0.3, 0.2, 0.15]), jnp.asarray(PRESENT)
        measured = present[..., None] & jnp.asarray(~HOLES) if holes else None

        def course(rates):
            return solve_fixed(lambda t, c, r: r * c * (1 - c), start, times, rates)

        clean = interpolate(course(rates), jnp.asarray(ONSETS[:, None] + GAPS, float))
        values = jnp.where(present[..., None], clean + rng.normal(0, 0.05, clean.shape), 0.0)

        @jax.jit
        def result(rates, values):
            visits = Visits(values, jnp.asarray(GAPS, float), present, measured)
            found = align(course(rates), visits, 128, 60)
            return jnp.sum(found.onsets * jnp.arange(1.0, 5.0)) + found.errors.sum()

        slopes = jax.jit(jax.grad(result, (0, 1)))(rates, values)
        along = (jnp.array([0.1, -0.2, 0.3]), jnp.asarray(rng.normal(size=values.shape)))
        ahead, behind = (result(rates + e * along[0], values + e * along[1]) for e in (1e-3, -1e-3))
        expected = jnp.vdot(slopes[0], along[0]) + jnp.vdot(slopes[1], along[1])
        np.testing.assert_allclose((ahead - behind) / 2e-3, expected, rtol=1e-3)


def test_what_stands_where_nothing_was_measured_changes_nothing():
    visits = with_holes(seen(ONSETS))
    other = visits._replace(measured=np.ones_like(HOLES))
    assert not np.allclose(staged(COURSE, other).onsets, staged(COURSE, visits).onsets, atol=0.1)
    nothing = np.isnan(np.full_like(visits.values, np.nan))
    emptied = mark_missing(visits._replace(values=np.where(nothing & (np.arange(4) == 1)[:, None, None], np.nan, 0.5)))
    assert not emptied.present[1].any() and float(staged(COURSE, emptied).errors[1]) == 0


def test_a_subject_at_an_end_cannot_move():
    shape = (*PRESENT.shape, 3)
    visits = Visits(np.where(PRESENT[..., None], np.ones(shape, np.float32), 0), GAPS, PRESENT)
    prepared = jax.jit(stage_visits)(COURSE, visits, staged(COURSE, visits).onsets, jnp.ones(4))
    np.testing.assert_array_equal(prepared.directions, 0)
    inside = jax.jit(stage_visits)(COURSE, visits, jnp.asarray(ONSETS), jnp.ones(4)).directions
    np.testing.assert_allclose(jnp.sum(inside**2, axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_array_equal(inside[~PRESENT], 0)


def test_regularisers_are_integrals_and_correlations():
    pattern = np.array([1.0, -1, 1, -1], np.float32)
    other = np.array([1.0, 1, -1, -1], np.float32)
    experts = jnp.stack([jnp.stack([pattern, 0.1 * other, 0.2 * pattern])] * 50)
    norm, overlap = regularisers(experts, jnp.array(0.5))
    # 25 years: |0.1 other| sqrt(25) + |0.2 pattern| sqrt(25); the first and third alike both ways round.
    rounded = [np.sqrt((size * 5) ** 2 + ROUNDING**2) - ROUNDING for size in (0.2, 0.4)]
    np.testing.assert_allclose(norm, sum(rounded), rtol=1e-5)
    np.testing.assert_allclose(overlap, 2 * 25.0, rtol=1e-5)
    silent = experts.at[:, 1:].set(0.0)
    gradient = jax.grad(lambda e: sum(regularisers(e, jnp.array(0.5))))(silent)
    assert np.isfinite(gradient).all() and np.abs(gradient[:, 1:]).max() == 0

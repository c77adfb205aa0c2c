"""DynamicDPS against the algorithm written out sample by sample, and what a batch must not do to its members."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import oracle, random_mixture

import jaxmed.diffusion.posterior.dynamicdps
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.dynamicdps import FIXED, REPO2025, REPO2026, STRICT, DynamicDps
from jaxmed.diffusion.posterior.fidelity import PLAIN, evaluate
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import draw_noise, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.solvers.line_search import NOT_DESCENT, Wolfe, line_search

pytestmark = pytest.mark.core

SCHEDULE = VpDiscrete(40)
DIM = 6
PRIOR = oracle(random_mixture(0, 3, DIM, spread=2.0), SCHEDULE)
MATRIX = np.random.default_rng(1).normal(size=(4, DIM)).astype(np.float32)
KEY = jax.random.key(3)
# Bins of two steps: residuals of the estimates below start between 5 and 39 steps before the end.
START = StartTime(means=tuple(np.linspace(0.5, 6, 20)), tau=1.0, steps_per_bin=2)
run = jax.jit(jaxmed.diffusion.posterior.dynamicdps.dynamicdps, static_argnames=("denoiser", "operator", "config"))


def measure(image):
    return jnp.tanh(MATRIX @ image / 3) * 3


def estimates(count):
    rng = np.random.default_rng(2)
    images = rng.normal(size=(count, DIM)).astype(np.float32) * np.linspace(0.3, 2.5, count, dtype=np.float32)[:, None]
    truth = rng.normal(size=(count, DIM)).astype(np.float32)
    return jnp.asarray(images), jax.vmap(measure)(jnp.asarray(truth))


def settings(preset, **changes):
    return dataclasses.replace(preset, **{"fidelity": PLAIN, "clip": None, "start": START} | changes)


@jax.jit
def term(y, x, t):
    """L, residual, denoised image and gradient of one sample."""
    at = evaluate(PRIOR, y[None], measure, PLAIN, x[None], t[None])
    return at.loss[0], at.residual[0], at.mean[0], at.gradient[0]


noise_of = jax.jit(draw_noise, static_argnames="shape")


@jax.jit
def strict_search(y, moved, gradient, loss, t, first):
    def phi(a):
        loss, _, _, slope = term(y, moved - a[0] * gradient, t)
        return loss[None], -jnp.vdot(slope, gradient)[None]

    found = line_search(phi, loss[None], -jnp.vdot(gradient, gradient)[None], first[None], STRICT.search)
    return found.step[0], found.status[0], found.evaluations[0]


def authors_search(y, moved, gradient, residual, t, year):
    """The rule of shrinking and growing, in plain Python; the step, and its trials."""
    low, high, growth = (0.1, 1.5, 1.25) if year == 2026 else (0.3, 1.0, 1.5)
    step, slope = 1.0, float(gradient @ gradient)
    for trial in range(1, 11):
        _, there, _, g = (np.asarray(v) for v in term(y, moved - step * gradient, t))
        if there > residual - 1e-3 * step * slope:
            step *= 0.75
            if step < low:
                return low, trial
            continue
        size = abs(float(g @ gradient))
        if (size > 0.8 * slope) if year == 2026 else (size < 0.8 * slope):
            step *= growth
            if step > high:
                return high, trial
            continue
        return step, trial
    return step, 10


def by_hand(index, initial, y, rule):
    """Run one sample step by step; no masks, nothing reused."""
    key = sample_keys(KEY, jnp.array([index]))
    initial, y = np.asarray(initial), np.asarray(y)
    table = SCHEDULE.alpha_bar_table
    beta = SCHEDULE.beta_table
    residual = np.linalg.norm(y - measure(initial))
    if rule == "strict":
        chosen = min(sum(mean < residual for mean in START.means), 19)
    else:
        nearest = int(np.argmin(np.abs(np.array(START.means) - residual)))
        chosen = nearest - (START.means[nearest] < residual and nearest > 1)
    start = 2 * chosen + 1
    z = np.asarray(noise_of(key, 40, (DIM,)))[0]
    x = np.sqrt(table[start]) * initial + np.sqrt(1 - table[start]) * z
    step, best, best_residual = 1.0, None, np.inf
    residuals, steps, evaluations = {}, {}, 0
    is_known = False
    for t in range(start, -1, -1):
        loss, r, mean, g = (np.asarray(v) for v in term(y, np.asarray(x, np.float32), np.float32(t)))
        # What the accepted trial of a search has computed is not counted again.
        evaluations += not is_known
        is_known = False
        residuals[t] = float(r)
        if r < best_residual:
            best, best_residual = mean, r
        before = table[t - 1] if t else 1.0
        pull = beta[t] * np.sqrt(before) / (1 - table[t])
        keep = (1 - before) * np.sqrt(1 - beta[t]) / (1 - table[t])
        noise = np.sqrt(beta[t]) if t else 0.0
        moved = keep * x + pull * mean + noise * np.asarray(noise_of(key, t, (DIM,)))[0]
        moved = np.asarray(moved, np.float32)
        if rule == "strict" and t > 5 and t % 5 == 0:
            loss, _, _, g = term(y, moved, np.float32(t - 1))
            step, status, trials = strict_search(
                y, moved, g, loss, np.float32(t - 1), np.float32(np.clip(step, 0.1, 1.5))
            )
            step, evaluations, is_known = float(step), evaluations + 1 + int(trials), True
        elif rule == 2026 and t > 5 and t % 5 == 0:
            step, trials = authors_search(y, moved, g, r, np.float32(t), 2026)
            evaluations += trials
        elif rule == 2025 and t > 0:
            step, trials = authors_search(y, moved, g, r, np.float32(t - 1), 2025)
            evaluations += trials
        elif rule != 2025 and t <= 5:
            step = 0.1
        steps[t] = step
        x = np.asarray(moved) - step * np.asarray(g)
    return best, start, residuals, steps, evaluations


RULES = {
    "strict": settings(STRICT),
    2026: settings(REPO2026, start=dataclasses.replace(START, rule="repo")),
    2025: settings(REPO2025, start=dataclasses.replace(START, rule="repo")),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_runs_as_its_samples_do_by_hand(rule):
    initial, y = estimates(4)
    image, info = run(KEY, PRIOR, y, measure, initial, RULES[rule])
    assert len(set(np.asarray(info.start_time))) >= 3
    for i in range(4):
        best, start, residuals, steps, evaluations = by_hand(i, initial[i], y[i], rule)
        assert info.start_time[i] == start
        np.testing.assert_allclose(image[i], best, rtol=2e-3, atol=2e-4)
        rows = 39 - np.array(list(residuals))
        np.testing.assert_allclose(info.residuals[rows, i], list(residuals.values()), rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(info.step_sizes[rows, i], list(steps.values()), rtol=2e-3)
        assert info.evaluations[i] == evaluations
        # Rows before the start hold nothing.
        assert np.all(np.isnan(info.residuals[: 39 - start, i])) and np.all(info.step_sizes[: 39 - start, i] == 0)


def test_a_sample_does_not_depend_on_its_batch_mates():
    initial, y = estimates(4)
    together, info = run(KEY, PRIOR, y, measure, initial, RULES["strict"])
    other = jnp.asarray(np.random.default_rng(9).normal(size=(4, DIM)), jnp.float32) * 3
    for i in (0, 3):
        crowd = other.at[i].set(initial[i])
        again, crowd_info = run(KEY, PRIOR, y, measure, crowd, RULES["strict"])
        np.testing.assert_allclose(again[i], together[i], rtol=1e-5, atol=1e-6)
        # Neither the step sizes of the others nor those of a run before stay behind.
        np.testing.assert_allclose(crowd_info.step_sizes[:, i], info.step_sizes[:, i], rtol=1e-5)
        assert crowd_info.evaluations[i] == info.evaluations[i]
    # Moved to another place, under its own number.
    order = jnp.array([2, 0, 3, 1])
    moved, _ = run(KEY, PRIOR, y[order], measure, initial[order], RULES["strict"], indices=order)
    np.testing.assert_allclose(moved, together[order], rtol=1e-5, atol=1e-6)


def test_counted_evaluations_are_those_of_the_network_and_a_seventh_of_a_whole_chain():
    """Fifty steps of a thousand, eight searches of at most six trials: 50 + 8 (1 + 6 - 1) evaluations."""
    calls = []
    schedule = VpDiscrete(1000)
    prior = oracle(random_mixture(0, 3, DIM, spread=2.0), schedule)

    def counting(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return prior.denoise(x, t)

    initial, y = estimates(1)
    config = settings(STRICT, start=StartTime(rule="fixed"))
    _, info = run(KEY, Denoiser(counting, schedule), y, measure, initial * 4, config)
    jax.effects_barrier()
    assert len(calls) == info.evaluations[0]
    assert info.start_time[0] == 49 and np.sum(info.step_sizes[:, 0] > 0) == 50
    assert 50 + 8 <= info.evaluations[0] <= 98 <= 1000 / 7


def test_a_fit_as_good_as_the_noise_allows_ends_a_sample():
    initial, y = estimates(4)
    y = y.at[2].set(measure(initial[2]))
    free, free_info = run(KEY, PRIOR, y, measure, initial, RULES["strict"])
    config = settings(STRICT, noise_std=0.5)
    image, info = run(KEY, PRIOR, y, measure, initial, config)
    limit = 0.5 * np.sqrt(4)
    stopped = 0
    for i in range(4):
        curve = np.asarray(info.residuals[39 - info.start_time[i] :, i])
        seen = curve[np.isfinite(curve)]
        # Up to the first fit within the noise the run is the same; nothing follows it.
        np.testing.assert_allclose(
            seen, np.asarray(free_info.residuals[39 - info.start_time[i] :, i])[: len(seen)], rtol=1e-4
        )
        assert np.all(seen[:-1] > limit)
        if len(seen) <= info.start_time[i]:
            stopped += 1
            found = np.linalg.norm(y[i] - measure(image[i]))
            np.testing.assert_allclose(found, seen[-1], rtol=1e-4)
            assert seen[-1] <= limit and info.evaluations[i] < free_info.evaluations[i]
    assert 0 < stopped < 4 or stopped == 4


def test_gradients_that_are_not_finite_take_no_step_and_say_so():
    def broken(image):
        return jnp.where(jnp.sum(image) > -1e9, jnp.sqrt(-jnp.abs(image)), image)

    initial, _ = estimates(2)
    config = settings(STRICT, search=Wolfe(max_evaluations=6))
    config = dataclasses.replace(config, start=StartTime(rule="fixed", fixed=12))
    _, info = run(KEY, PRIOR, initial, broken, initial, config)
    walked = np.asarray(info.flags[39 - 12 :])
    np.testing.assert_array_equal(walked, NOT_DESCENT)
    np.testing.assert_array_equal(info.step_sizes, 0)


def test_fixed_steps_need_one_evaluation_each_and_fit_worse():
    initial, y = estimates(4)
    image, info = run(KEY, PRIOR, y, measure, initial, settings(FIXED, first_step=0.01))
    np.testing.assert_array_equal(info.evaluations, info.start_time + 1)
    np.testing.assert_allclose(np.unique(info.step_sizes), [0, 0.01], rtol=1e-6)
    # The best of the walk comes back.
    found = np.linalg.norm(y - jax.vmap(measure)(image), axis=1)
    np.testing.assert_allclose(found, np.nanmin(info.residuals, axis=0), rtol=1e-4)
    searched, _ = run(KEY, PRIOR, y, measure, initial, RULES["strict"])
    assert np.linalg.norm(y - jax.vmap(measure)(searched), axis=1).mean() < 0.5 * found.mean()


@pytest.mark.parametrize(
    "wrong",
    [
        {"search_every": 0},
        {"first_step": -1.0},
        {"low_step": -0.1},
        {"step_range": (1.0, 0.5)},
        {"noise_std": -1.0},
        {"clip": (1.0, 0.0)},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        DynamicDps(**wrong)


def test_a_start_beyond_the_chain_is_refused():
    initial, y = estimates(1)
    with pytest.raises(ValueError, match="at most the 40 steps of the chain"):
        jaxmed.diffusion.posterior.dynamicdps.dynamicdps(KEY, PRIOR, y, measure, initial, STRICT)

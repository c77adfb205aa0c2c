"""Schedules: printed values, identities, and the chain against brute-force conditioning of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.diffusion.samplers import Ancestral, plan
from jaxmed.diffusion.schedule import Edm, Ve, VpContinuous, VpDiscrete, expand_like

pytestmark = pytest.mark.core
SCHEDULES = [VpDiscrete(), VpDiscrete(betas="linear"), VpContinuous(), Ve(), Edm()]
NAMES = ["cosine", "linear", "continuous", "ve", "edm"]
# t: abar, sqrt((1 - abar) / abar), of the cosine chain, to the digits that the specification prints.
PRINTED = {
    5: (".99968", ".018"),
    10: (".99928", ".027"),
    24: (".9975", ".050"),
    49: (".9920", ".090"),
    99: (".9721", ".169"),
    149: (".9407", ".251"),
    199: (".8987", ".336"),
    299: (".7869", ".520"),
    499: (".4938", "1.012"),
    799: (".0940", "3.10"),
    949: (".00606", "12.8"),
}


def half_digit(text: str) -> float:
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def test_cosine_chain_has_the_printed_values():
    schedule = VpDiscrete()
    beta = schedule.beta_table
    assert abs(beta[0] - 4.128e-5) < 0.5e-8 and beta[999] == 0.999
    for t, (printed, ratio) in PRINTED.items():
        alpha_bar = schedule.alpha_bar_table[t]
        assert abs(alpha_bar - float(printed)) <= half_digit(printed)
        assert abs(np.sqrt((1 - alpha_bar) / alpha_bar) - float(ratio)) <= half_digit(ratio)
    np.testing.assert_allclose(schedule.alpha_bar_table, np.cumprod(1 - beta), rtol=1e-12)


def test_linear_chain_is_scaled_with_its_length():
    np.testing.assert_allclose(VpDiscrete(betas="linear").beta_table, np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(VpDiscrete(100, "linear").beta_table[[0, -1]], [1e-3, 0.2])


def test_chain_is_the_posterior_of_the_forward_process():
    schedule = VpDiscrete()
    beta, alpha_bar = schedule.beta_table, schedule.alpha_bar_table
    steps = plan(schedule, Ancestral(variance="posterior"))
    large = plan(schedule, Ancestral(variance="fixed_large"))
    t = steps.time.astype(int)
    np.testing.assert_array_equal(t, np.arange(1000)[::-1])
    before = np.append(alpha_bar[t[1:]], 1.0)
    # c1 + c2 sqrt(abar_t) = sqrt(abar_{t - 1}): an image without noise stays on the chain's mean.
    np.testing.assert_allclose(steps.pull + steps.keep * np.sqrt(alpha_bar[t]), np.sqrt(before), atol=1e-12)
    np.testing.assert_allclose(steps.pull, beta[t] * np.sqrt(before) / (1 - alpha_bar[t]), atol=1e-12)
    np.testing.assert_allclose(large.noise[:-1], np.sqrt(beta[t[:-1]]), rtol=1e-9)
    assert large.noise[-1] == steps.noise[-1] == 0
    for row in (0, 400, 900, 998):
        # The joint of (x_{t-1}, x_t) given x_0, conditioned by the textbook.
        keep = np.sqrt(1 - beta[t[row]])
        mean = np.array([np.sqrt(before[row]), keep * np.sqrt(before[row])])
        variance = 1 - before[row]
        cross, total = keep * variance, keep**2 * variance + beta[t[row]]
        gain = cross / total
        np.testing.assert_allclose(steps.keep[row], gain, rtol=1e-9)
        np.testing.assert_allclose(steps.pull[row], mean[0] - gain * mean[1], rtol=1e-7)
        np.testing.assert_allclose(steps.noise[row] ** 2, variance - gain * cross, rtol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_schedules_answer_alike_on_host_and_device(schedule):
    grid = schedule.times(7)
    assert np.all(np.diff(grid) < 0)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    assert alpha.dtype == np.float64 and np.all(np.diff(sigma / alpha) < 0)
    np.testing.assert_allclose(schedule.time_at(sigma / alpha), grid, rtol=1e-9, atol=1e-9)
    if isinstance(schedule, VpDiscrete | VpContinuous):
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    on_device = jnp.asarray(grid, jnp.float32)
    for name in ("alpha", "sigma", "network_time"):
        found = getattr(schedule, name)(on_device)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, getattr(schedule, name)(grid), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_training_times_follow_their_distribution(schedule):
    t = np.asarray(schedule.draw_times(jax.random.split(jax.random.key(0), 4000)), np.float64)
    if isinstance(schedule, Edm):
        np.testing.assert_allclose([np.log(t).mean(), np.log(t).std()], [-1.2, 1.2], atol=5 * 1.2 / np.sqrt(4000))
        return
    match schedule:
        case VpDiscrete():
            assert set(t) <= set(range(1000)) and t.min() < 5 and t.max() > 994
            share = (t + 0.5) / 1000
        case VpContinuous():
            share = t
        case Ve():
            share = np.log(t / 0.02) / np.log(100 / 0.02)
    assert share.min() >= 0 and share.max() <= 1
    # Kolmogorov's distance of 4000 uniform draws is below 1.95 / sqrt(4000) in 999 of 1000 cases.
    assert np.abs(np.sort(share) - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


def test_grids_have_their_papers_values():
    np.testing.assert_array_equal(VpDiscrete().times(), np.arange(1000)[::-1])
    np.testing.assert_array_equal(VpDiscrete().times(4), [999, 666, 333, 0])
    np.testing.assert_allclose(Edm().times(18)[[0, 1, 17]], [80.0, 57.586, 0.002], rtol=1e-4)
    np.testing.assert_allclose(Ve(1.0, 16.0).times(3), [16.0, 4.0, 1.0])
    np.testing.assert_allclose(VpContinuous().times(2), [1.0, 1e-3])
    # The closed form of the specification: alpha = exp(-B / 2), B = t^2 (bmax - bmin) / 2 + bmin t.
    np.testing.assert_allclose(VpContinuous().alpha(np.array([0.5])), np.exp(-0.5 * (0.125 * 19.9 + 0.05)))


def test_expand_like_gives_values_the_axes_of_the_samples():
    values = expand_like(jnp.arange(2.0), jnp.ones((2, 3, 4), jnp.bfloat16))
    assert values.shape == (2, 1, 1) and values.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: VpDiscrete(1), "num_steps"),
        (lambda: VpDiscrete(betas="square"), "betas"),
        (lambda: VpDiscrete(10).times(11), "num_steps"),
        (lambda: VpContinuous(2.0, 1.0), "beta_min"),
        (lambda: VpContinuous(time_min=0.0), "time_min"),
        (lambda: Ve(0.0, 1.0), "sigma_min"),
        (lambda: Edm(sigma_data=0.0), "sigma_data"),
        (lambda: Edm().times(0), "num_steps"),
    ],
)
def test_settings_out_of_range_are_named(make, names):
    with pytest.raises((ValueError, TypeError), match=names):
        make()

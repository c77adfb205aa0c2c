"""Every kind of network against the exact denoiser of a mixture, and training losses against their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import oracle, random_mixture, times

from jaxmed.diffusion.denoiser import denoising_loss, epsilon, make_denoiser, precondition, score, velocity
from jaxmed.diffusion.schedule import Edm, Ve, VpContinuous, VpDiscrete, spread
from jaxmed.synthesis.phantoms import mixture as closed

pytestmark = pytest.mark.core
SCHEDULES = {"cosine": VpDiscrete(), "continuous": VpContinuous(), "ve": Ve(), "edm": Edm()}
PREDICTIONS = ("epsilon", "x0", "v", "score", "edm")


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def noisy(schedule):
    """A prior, noisy points at times all over the schedule, and their times.

    The first time is left out: at the end of the cosine chain alpha is 5e-5, and dividing by it costs four digits.
    """
    prior = random_mixture(0, 3, 5)
    t = times(schedule, 7)[1:]
    rng = np.random.default_rng(0)
    points = np.asarray(prior.means)[rng.integers(0, 3, 6)] + 0.5 * rng.standard_normal((6, 5))
    grid = np.asarray(t)
    x = schedule.alpha(grid)[:, None] * points + schedule.sigma(grid)[:, None] * rng.standard_normal((6, 5))
    return prior, jnp.asarray(x), t


def network_for(denoise, schedule, prediction, x, t):
    """The output that a perfect network of this kind has at x: D solved for F."""
    at = precondition(schedule, prediction, t)
    return (denoise(x, t) - spread(at.skip, x) * x) / spread(at.out, x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_network_recovered_from_the_denoiser_gives_it_back(schedule, prediction, double):
    prior, x, t = noisy(schedule)
    exact = oracle(prior, schedule)
    output = network_for(exact.denoise, schedule, prediction, x, t)
    seen = {}

    def predict(scaled, time):
        seen.update(scaled=scaled, time=time)
        return output

    again = make_denoiser(predict, schedule, prediction)
    np.testing.assert_allclose(again.denoise(x, t), exact.denoise(x, t), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(seen["time"], schedule.network_time(t))
    if prediction == "edm" and isinstance(schedule, Edm):
        np.testing.assert_allclose(seen["scaled"], x / np.sqrt(t**2 + 0.25)[:, None], rtol=1e-12)
    else:
        np.testing.assert_array_equal(seen["scaled"], x)


def test_conversions_are_those_of_the_closed_form(schedule, double):
    prior, x, t = noisy(schedule)
    exact = oracle(prior, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    expected = closed.score(prior, x, alpha, sigma)
    np.testing.assert_allclose(score(exact, x, t), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(epsilon(exact, x, t), -sigma[:, None] * expected, rtol=1e-8, atol=1e-10)
    # And networks that predict them are the same denoiser.
    for prediction, value in (("epsilon", epsilon), ("score", score), ("v", velocity)):
        output = value(exact, x, t)
        again = make_denoiser(lambda x, time, output=output: output, schedule, prediction)
        np.testing.assert_allclose(again.denoise(x, t), exact.denoise(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_what_the_clean_image_and_the_noise_make_of_the_network(schedule, prediction, double):
    t = times(schedule, 6)
    rng = np.random.default_rng(1)
    image, noise = jnp.asarray(rng.standard_normal((2, 6, 5)))
    x = schedule.alpha(t)[:, None] * image + schedule.sigma(t)[:, None] * noise
    at = precondition(schedule, prediction, t)
    target = at.clean[:, None] * image + at.noise[:, None] * noise
    # The target is the output with which D is the clean image.
    np.testing.assert_allclose(at.skip[:, None] * x + at.out[:, None] * target, image, rtol=1e-8, atol=1e-8)


def test_edm_has_unit_variance_in_and_out(double):
    schedule = Edm(sigma_data=0.7)
    t = times(schedule, 9)
    at = precondition(schedule, "edm", t)
    variance_in = at.scale**2 * (0.7**2 + t**2)
    variance_out = at.clean**2 * 0.7**2 + at.noise**2
    np.testing.assert_allclose([variance_in, variance_out], np.ones((2, 9)), rtol=1e-12)
    # EDM's weight (sigma^2 + sd^2) / (sigma sd)^2 of |D - x0|^2 is 1 on the output.
    np.testing.assert_allclose(at.out**2 * (t**2 + 0.7**2) / (t * 0.7) ** 2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(at.time, np.log(t) / 4)


# The weight of |D - x_0|^2 that each paper states.
WEIGHTS = {
    ("edm", "edm"): lambda s, a: (s**2 + 0.25) / (0.5 * s) ** 2,
    ("ve", "edm"): lambda s, a: 1 / s**2,
    ("continuous", "edm"): lambda s, a: a**2 / s**2,
    ("cosine", "epsilon"): lambda s, a: a**2 / s**2,
    ("cosine", "x0"): lambda s, a: 1.0 + 0 * s,
    ("cosine", "v"): lambda s, a: a**2 / s**2 + 1,
    ("continuous", "score"): lambda s, a: a**2 / s**2,
}


@pytest.mark.parametrize(("name", "prediction"), WEIGHTS)
def test_loss_is_the_weighted_error_of_the_denoised_image(name, prediction):
    schedule = SCHEDULES[name]
    image = jax.random.uniform(jax.random.key(4), (6, 4, 4, 1))
    keys = jax.random.split(jax.random.key(5), 6)
    params = {"scale": jnp.float32(0.3)}

    def apply(params, x, time):
        return params["scale"] * x + 0.01 * spread(time, x)

    loss, metrics = denoising_loss(apply, schedule, params, keys, {"image": image}, prediction)
    # The same draws, and the loss written with D as each paper has it.
    t = schedule.draw_times(jnp.stack([jax.random.split(key)[0] for key in keys]))
    noise = jnp.stack([jax.random.normal(jax.random.split(key)[1], (4, 4, 1)) for key in keys])
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    x = spread(jnp.asarray(alpha), image) * image + spread(jnp.asarray(sigma), image) * noise
    mean = make_denoiser(functools.partial(apply, params), schedule, prediction).denoise(x, t)
    errors = np.mean(np.square(np.asarray(mean - image, np.float64)), axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["image_error"], np.mean(errors), rtol=1e-3)
    np.testing.assert_allclose(loss, np.mean(errors * WEIGHTS[name, prediction](sigma, alpha)), rtol=1e-3)


def test_loss_of_an_image_follows_its_key():
    image = jax.random.uniform(jax.random.key(6), (4, 8))
    keys = jax.random.split(jax.random.key(7), 4)
    loss = functools.partial(denoising_loss, lambda params, x, time: 0.1 * x, Edm(), {})
    whole, _ = loss(keys, {"image": image})
    turned, _ = loss(keys[::-1], {"image": image[::-1]})
    np.testing.assert_allclose(turned, whole, rtol=1e-6)
    assert loss(keys[::-1], {"image": image})[0] != whole


def test_clip_holds_the_image_in_its_range():
    denoiser = make_denoiser(lambda x, t: 5 * x, VpDiscrete(), "x0", clip=(0.0, 2.0))
    x = jnp.array([[-1.0, 0.2, 3.0]])
    np.testing.assert_allclose(denoiser.denoise(x, jnp.zeros(1)), [[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="clip"):
        make_denoiser(lambda x, t: x, VpDiscrete(), clip=(2.0, 0.0))


def test_unknown_predictions_are_named():
    with pytest.raises((ValueError, TypeError), match="prediction"):
        precondition(VpDiscrete(), "noise", jnp.zeros(1))

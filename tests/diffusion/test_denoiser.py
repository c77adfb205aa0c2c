"""Every kind of network against the exact denoiser of a mixture, and training losses against their papers."""

import functools

import jax
import jax.numpy as jnp
import mixtures as closed
import numpy as np
import pytest
from priors import oracle, random_mixture, times

from jaxmed.diffusion.denoiser import denoising_loss, epsilon, make_denoiser, precondition, score, velocity
from jaxmed.diffusion.schedule import Edm, Ve, VpContinuous, VpDiscrete, expand_like

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
    return (denoise(x, t) - expand_like(at.skip, x) * x) / expand_like(at.out, x)


def test_network_recovered_from_the_denoiser_gives_it_back(schedule, double):
    prior, x, t = noisy(schedule)
    exact = oracle(prior, schedule)

    @jax.jit
    def run(x, t):
        found = {}
        for prediction in PREDICTIONS:
            output = network_for(exact.denoise, schedule, prediction, x, t)
            seen = []
            again = make_denoiser(lambda *inputs, to=seen, out=output: to.append(inputs) or out, schedule, prediction)
            found[prediction] = (again.denoise(x, t), *seen[0])
        return found, exact.denoise(x, t)

    found, expected = run(x, t)
    for prediction, (mean, scaled, time) in found.items():
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(time, schedule.network_time(np.asarray(t)), rtol=1e-14)
        is_scaled = prediction == "edm" and isinstance(schedule, Edm)
        np.testing.assert_allclose(
            scaled, x / np.sqrt(np.asarray(t) ** 2 + 0.25)[:, None] if is_scaled else x, rtol=1e-12
        )


def test_conversions_are_those_of_the_closed_form(schedule, double):
    prior, x, t = noisy(schedule)
    exact = oracle(prior, schedule)
    conversions = {"epsilon": epsilon, "score": score, "v": velocity}

    @jax.jit
    def run(x, t):
        values = {name: convert(exact, x, t) for name, convert in conversions.items()}
        # Networks that predict them are the same denoiser.
        again = [make_denoiser(lambda *_, out=values[name]: out, schedule, name).denoise(x, t) for name in values]
        return values, again, exact.denoise(x, t), closed.score(prior, x, schedule.alpha(t), schedule.sigma(t))

    values, again, mean, expected = run(x, t)
    sigma = schedule.sigma(np.asarray(t))[:, None]
    np.testing.assert_allclose(values["score"], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(values["epsilon"], -sigma * expected, rtol=1e-8, atol=1e-10)
    for found in again:
        np.testing.assert_allclose(found, mean, rtol=1e-12, atol=1e-12)


def test_targets_are_what_the_clean_image_and_the_noise_make_of_the_network(schedule, double):
    t = times(schedule, 6)
    rng = np.random.default_rng(1)
    image, noise = rng.standard_normal((2, 6, 5))
    alpha, sigma = schedule.alpha(np.asarray(t))[:, None], schedule.sigma(np.asarray(t))[:, None]
    x = alpha * image + sigma * noise
    found = jax.jit(lambda t: {prediction: precondition(schedule, prediction, t) for prediction in PREDICTIONS})(t)
    for at in found.values():
        column = {name: np.asarray(value)[:, None] for name, value in at._asdict().items()}
        target = column["clean"] * image + column["noise"] * noise
        # The target is the output with which D is the clean image.
        np.testing.assert_allclose(column["skip"] * x + column["out"] * target, image, rtol=1e-8, atol=1e-8)


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


def test_loss_is_the_weighted_error_of_the_denoised_image():
    image = jax.random.uniform(jax.random.key(4), (6, 4, 4, 1))
    keys = jax.random.split(jax.random.key(5), 6)
    params = {"scale": jnp.float32(0.3)}

    def apply(params, x, time):
        return params["scale"] * x + 0.01 * expand_like(time, x)

    @jax.jit
    def run(keys, image):
        # The same draws, and the loss written with D as each paper has it.
        time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(noise_keys)
        found = {}
        for name, prediction in WEIGHTS:
            schedule = SCHEDULES[name]
            t = schedule.draw_times(time_keys)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x = expand_like(alpha, image) * image + expand_like(sigma, image) * noise
            mean = make_denoiser(functools.partial(apply, params), schedule, prediction).denoise(x, t)
            loss = denoising_loss(apply, schedule, params, keys, {"image": image}, prediction)
            found[name, prediction] = loss, jnp.mean((mean - image) ** 2, axis=(1, 2, 3)), alpha, sigma
        return found

    for case, ((loss, metrics), *rest) in run(keys, image).items():
        errors, alpha, sigma = (np.asarray(part, np.float64) for part in rest)
        np.testing.assert_allclose(metrics["image_error"], np.mean(errors), rtol=1e-3, err_msg=str(case))
        np.testing.assert_allclose(loss, np.mean(errors * WEIGHTS[case](sigma, alpha)), rtol=1e-3, err_msg=str(case))


def test_loss_of_an_image_follows_its_key():
    image = jax.random.uniform(jax.random.key(6), (4, 8))
    keys = jax.random.split(jax.random.key(7), 4)
    loss = jax.jit(
        lambda keys, image: denoising_loss(lambda params, x, time: 0.1 * x, Edm(), {}, keys, {"image": image})[0]
    )
    np.testing.assert_allclose(loss(keys[::-1], image[::-1]), loss(keys, image), rtol=1e-6)
    assert loss(keys[::-1], image) != loss(keys, image)


def test_clip_holds_the_image_in_its_range():
    denoiser = make_denoiser(lambda x, t: 5 * x, VpDiscrete(), "x0", clip=(0.0, 2.0))
    x = jnp.array([[-1.0, 0.2, 3.0]])
    np.testing.assert_allclose(denoiser.denoise(x, jnp.zeros(1)), [[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="clip"):
        make_denoiser(lambda x, t: x, VpDiscrete(), clip=(2.0, 0.0))


def test_unknown_predictions_are_named():
    with pytest.raises((ValueError, TypeError), match="prediction"):
        precondition(VpDiscrete(), "noise", jnp.zeros(1))

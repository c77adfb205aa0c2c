"""A hallucination with a known cure: a prior of two images, with and without a lesion, and an estimate with it.

Noised to t* and walked back by the prior alone, the estimate loses the lesion as often as the noise makes the other
mode likely, which is an integral in one dimension. A measurement that sees the lesion must do much better; one that
does not see it must change nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from priors import oracle

from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps, dynamicdps
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.synthesis.phantoms.brain import make_brain
from jaxmed.synthesis.phantoms.mixture import make_isotropic, responsibilities

pytestmark = pytest.mark.core
SHAPE, STD, COUNT = (16, 16, 1), 0.03, 800


@functools.cache
def scans():
    """One brain, healthy and with a lesion."""
    make = jax.jit(lambda has_lesion: make_brain(jax.random.key(3), has_lesion, False, SHAPE[:2]).image.reshape(SHAPE))
    return make(False), make(True)


def brain(size: float):
    """The brain, healthy and with a lesion of so many times its usual contrast."""
    healthy, ill = scans()
    return healthy, healthy + size * (ill - healthy)


def expected_rate(schedule, size, t):
    """E over z of the probability of the healthy mode at alpha mu_1 + sigma z, along the line between the modes."""
    alpha, sigma = (float(level(np.array([float(t)]))[0]) for level in (schedule.alpha, schedule.sigma))
    healthy, ill = brain(size)
    length = alpha * np.linalg.norm(np.asarray(ill - healthy))
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    odds = -(2 * sigma * nodes * length + length**2) / (2 * (alpha**2 * STD**2 + sigma**2))
    return float(weights @ (1 / (1 + np.exp(-odds))) / np.sum(weights))


def pool(healthy, ill, image):
    """Blocks of 2 x 2 voxels: sees the lesion."""
    return image.reshape(8, 2, 8, 2, 1).mean((1, 3))


def hide(healthy, ill, image):
    """Everything but the lesion, which lies in the null space."""
    lesion = ill - healthy
    return image - lesion * jnp.sum(lesion * image) / jnp.sum(lesion**2)


@functools.cache
def program(schedule, method, operator, config):
    """Images to the share of refined estimates that are healthy; compiled once for all sizes of the lesion."""

    @jax.jit
    def share(healthy, ill):
        prior = make_isotropic(jnp.ones(2), jnp.stack([healthy.ravel(), ill.ravel()]), jnp.full(2, STD))
        see = functools.partial(operator, healthy, ill)
        measurement = jnp.broadcast_to(see(healthy), (COUNT, *see(healthy).shape))
        initial = jnp.broadcast_to(ill, (COUNT, *SHAPE))
        image, _ = method(jax.random.key(1), oracle(prior, schedule), measurement, see, initial, config)
        flat = image.reshape(COUNT, -1)
        return jnp.mean(responsibilities(prior, flat, jnp.ones(COUNT), jnp.full(COUNT, 1e-3))[:, 0])

    return share


def rate(schedule, size, t, scale, operator=pool):
    times = tuple(float(left) for left in range(t, -1, -1))
    config = Dps(scale=scale, sampler=Ancestral(times=times))
    return float(program(schedule, dps, operator, config)(*brain(size)))


def allowed(probability):
    """Four standard errors of the share, and 0.01 for the steps of the chain."""
    return 4 * np.sqrt(probability * (1 - probability) / COUNT) + 0.01


def check(schedule, t, sizes):
    """Without guidance the rate is the integral, and larger lesions stay; unseen ones gain nothing from guidance."""
    expected = [expected_rate(schedule, size, t) for size in sizes]
    free = [rate(schedule, size, t, 0.0) for size in sizes]
    for found, wanted in zip(free, expected, strict=True):
        assert abs(found - wanted) < allowed(wanted), (t, found, wanted)
    assert all(small > large + 0.05 for small, large in zip(free, free[1:], strict=False))
    unseen = rate(schedule, sizes[0], t, 1.0, hide)
    assert abs(unseen - free[0]) < 0.002
    return free


def test_flip_rate_is_the_integral_and_guidance_that_sees_the_lesion_removes_it():
    schedule = VpDiscrete(100)
    free = check(schedule, 24, (1.0, 2.0))
    assert 0.1 < free[0] < 0.4
    assert rate(schedule, 1.0, 24, 2.0) > 0.95
    # The prior alone never gets there: from pure noise it draws either mode.
    assert expected_rate(schedule, 1.0, 90) < 0.51


@pytest.mark.slow
def test_flip_curve_on_the_whole_chain():
    schedule = VpDiscrete()
    curve = [check(schedule, t, (1.0, 2.0)) for t in (199, 399)]
    assert np.all(np.diff(curve, axis=0) > 0.05)  # more noise, more flips
    # With guidance 50 steps, from where the prior alone never moves, are enough; the larger lesion needs more.
    assert expected_rate(schedule, 1.0, 49) < 0.001
    assert rate(schedule, 1.0, 49, 1.0) > 0.95
    assert rate(schedule, 2.0, 49, 1.0) < 0.9
    assert rate(schedule, 2.0, 149, 1.0) > 0.95


@pytest.mark.slow
def test_dynamicdps_removes_the_lesion_in_a_twentieth_of_the_steps():
    def share(size, t):
        config = DynamicDps(start=StartTime(rule="fixed", fixed=t), fidelity=PLAIN)
        return float(program(VpDiscrete(), dynamicdps, pool, config)(*brain(size)))

    assert share(1.0, 49) > 0.95
    assert share(2.0, 49) < 0.9
    assert share(2.0, 99) > 0.95

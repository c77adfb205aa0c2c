"""What tests of self-play share: the NumPy games, verifiers with known answers, CartPole as pure functions."""

import importlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# benchmarks/ is a folder of scripts, not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
reference = importlib.import_module("reference_games")


def axes(mask):
    return tuple(range(1, mask.ndim))


def dice(truth, image, mask):
    """Dice of each mask with the truth of its image."""
    truth = truth[image]
    return (2 * (truth * mask).sum(axes(mask)) + 1e-6) / (truth.sum(axes(mask)) + mask.sum(axes(mask)) + 1e-6)


def linear(weights, image, mask):
    """sum_i w_i s_i."""
    return (weights[image] * mask).sum(axes(mask))


def linear_numpy(weights):
    return lambda image, mask: np.where(mask, weights[image], 0).sum(axes(mask))


def square(edge, low, high):
    """An image with a square object, and its mask."""
    truth = np.zeros((1, edge, edge), np.float32)
    truth[0, low:high, low:high] = 1
    return truth


class CartPole(NamedTuple):
    """State of CartPole-v1; units are metres, seconds and radians."""

    x: jax.Array
    speed: jax.Array
    angle: jax.Array
    turning: jax.Array
    steps: jax.Array


def cartpole_reset(key, games):
    values = jax.random.uniform(key, (4, games), minval=-0.05, maxval=0.05)
    return CartPole(*values, jnp.zeros(games, jnp.int32))


def cartpole_step(state, action):
    """One step of .02 s by Euler's method; returns state, whether it fell, whether its 500 steps are over."""
    force = jnp.where(action == 1, 10.0, -10.0)
    sine, cosine = jnp.sin(state.angle), jnp.cos(state.angle)
    push = (force + 0.05 * state.turning**2 * sine) / 1.1
    turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    pull = push - 0.05 * turn * cosine / 1.1
    state = CartPole(
        state.x + 0.02 * state.speed,
        state.speed + 0.02 * pull,
        state.angle + 0.02 * state.turning,
        state.turning + 0.02 * turn,
        state.steps + 1,
    )
    fell = (jnp.abs(state.x) > 2.4) | (jnp.abs(state.angle) > 12 * 2 * math.pi / 360)
    return state, fell, state.steps >= 500


def cartpole_observe(state):
    return jnp.stack([state.x, state.speed, state.angle, state.turning], axis=-1)

"""Affine registration: known maps are found, also between grids that are oblique to each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.registration import RegistrationConfig, dissimilarity, register_affine

pytestmark = pytest.mark.core
FIXED, MOVING = (24, 26, 22), (28, 24, 26)
CORNERS = np.array([[x, y, z, 1.0] for x in (-30, 30) for y in (-30, 30) for z in (-30, 30)])
# Centres, radii and levels of blobs in mm; nothing about them is symmetric.
BLOBS = [((0, 0, 0), (30, 36, 26), 1.0), ((10, 14, 6), (9, 8, 12), 0.8), ((-14, -8, 2), (7, 13, 6), -0.6)]


def scene(points):
    """Smooth blobs at places in mm."""
    image = np.zeros(points.shape[:-1])
    for center, radius, level in BLOBS:
        distance = (((points - np.array(center)) / radius) ** 2).sum(-1)
        image += level / (1 + np.exp(np.minimum(6 * (distance - 1), 50)))
    return np.maximum(image, 0).astype(np.float32)[..., None]


def grid(shape, affine):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def rotation(axis, degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    result = np.eye(3)
    one, two = (axis + 1) % 3, (axis + 2) % 3
    result[[one, one, two, two], [one, two, one, two]] = [c, -s, s, c]
    return result


def centred(shape, matrix, center=(0.0, 0.0, 0.0)):
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = np.array(center) - matrix @ ((np.array(shape) - 1) / 2)
    return affine


@functools.cache
def solver(config):
    return jax.jit(functools.partial(register_affine, config=config))


def truth(is_rigid):
    """From fixed to moving mm: turned by 12 degrees, shifted by 9 mm, and stretched where not rigid."""
    matrix = rotation(2, 12.0) @ rotation(0, -8.0)
    if not is_rigid:
        matrix = matrix @ np.array([[1.12, 0.05, 0.0], [0.0, 0.92, 0.04], [0.0, 0.0, 1.05]])
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = matrix, (9.0, -6.0, 4.0)
    return result


def found(config, wanted, change=lambda image: image):
    """Register the scene with itself moved; the moving grid is oblique by 25 degrees and of another spacing."""
    fixed_affine = centred(FIXED, 3.5 * np.eye(3))
    moving_affine = centred(MOVING, rotation(1, 25.0) @ np.diag([3.2, 4.0, 3.6]), (9.0, -6.0, 4.0))
    fixed = scene(grid(FIXED, fixed_affine))
    back = np.linalg.inv(wanted)
    places = grid(MOVING, moving_affine) @ back[:3, :3].T + back[:3, 3]
    affines = jnp.asarray(fixed_affine, jnp.float32), jnp.asarray(moving_affine, jnp.float32)
    return solver(config)(jnp.asarray(fixed), affines[0], jnp.asarray(change(scene(places))), affines[1])


@pytest.mark.parametrize(
    ("config", "is_rigid", "change", "tolerance"),
    [
        (RegistrationConfig(), False, lambda image: image, 1.0),
        (RegistrationConfig("correlation", "rigid", (2.0,)), True, lambda image: 3 * image + 0.2 * (image > 0.01), 1.0),
        (RegistrationConfig("information", "rigid", (2.0,)), True, lambda image: (1.3 - image) * (image > 0.02), 2.0),
    ],
    ids=["squares", "correlation", "information"],
)
def test_a_known_map_is_found_between_oblique_grids(config, is_rigid, change, tolerance):
    wanted = truth(is_rigid)
    result = found(config, wanted, change)
    error = np.linalg.norm(CORNERS @ (np.asarray(result.matrix) - wanted).T, axis=1)
    assert error.max() < tolerance, error
    assert result.loss.shape == (len(config.blurs), 160) and float(result.loss[-1, -1]) < float(result.loss[-1, 0])


def test_nothing_to_do_is_the_identity():
    result = found(RegistrationConfig(), np.eye(4))
    assert np.abs(CORNERS @ (np.asarray(result.matrix) - np.eye(4)).T).max() < 1.0


def test_equal_images_are_not_unlike_and_information_is_the_entropy():
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(9, 9, 9, 1)), jnp.float32)
    assert float(dissimilarity(image, image, "squares")) == 0
    assert float(dissimilarity(image, 2 * image + 1, "correlation")) == pytest.approx(0, abs=1e-5)
    steps = jnp.asarray(np.random.default_rng(1).integers(0, 2, (9, 9, 9, 1)), jnp.float32)
    share = float(steps.mean())
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert float(dissimilarity(steps, steps, "information")) == pytest.approx(-entropy, abs=1e-3)

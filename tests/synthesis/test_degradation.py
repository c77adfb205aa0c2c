"""Faults of known strength: none at 0, larger with it, where they should be, in two and three dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.synthesis.degradation import GHOST, KINDS, NOISE, PICTURE_KINDS, SHIFT, degrade, plane_axes

pytestmark = pytest.mark.core
SPACING = (3.0, 1.0, 1.0)


def disc(shape):
    points = np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in shape), indexing="ij")
    squares = sum((3 * point / size) ** 2 for point, size in zip(points, shape, strict=True))
    return jnp.asarray(1 / (1 + np.exp(6 * (squares - 1))), jnp.float32)


PLANE, VOLUME = disc((32, 32)), disc((4, 32, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", [PLANE, VOLUME], ids=["2D", "3D"])
def test_strength_says_how_much(kind, image):
    spacing = SPACING if image.ndim == 3 else ()
    made = jax.jit(lambda strength: degrade(jax.random.key(3), image, kind, strength, spacing))
    np.testing.assert_allclose(made(0.0), image, atol=1e-5)
    away = [float(jnp.abs(made(strength) - image).mean()) for strength in (0.25, 0.5, 1.0)]
    assert 0 < away[0] < away[1] < away[2]


def test_noise_is_rician_of_scans_and_gaussian_of_pictures():
    key, flat = jax.random.key(0), jnp.full((128, 128), 0.5)
    picture = degrade(key, flat, "noise", 1.0, is_magnitude=False)
    assert float(picture.std()) == pytest.approx(NOISE * 0.5, rel=0.03)
    air = jnp.zeros((128, 128)).at[:64].set(1.0)
    scan = degrade(key, air, "noise", 1.0)[64:]
    assert float(scan.mean()) == pytest.approx(NOISE * np.sqrt(np.pi / 2), rel=0.03)  # Rayleigh


def test_the_planes_are_the_finest_axes():
    assert plane_axes(2, ()) == (0, 1)
    assert plane_axes(3, (3.0, 1.0, 1.0)) == (1, 2) and plane_axes(3, (1.0, 1.0, 1.0)) == (0, 1)
    blurred = degrade(jax.random.key(0), jnp.zeros((5, 9, 9)).at[2, 4, 4].set(1.0) + 1e-3, "blur", 1.0, SPACING)
    np.testing.assert_allclose(blurred[1], 1e-3, atol=1e-6)  # nothing passes from plane to plane


def test_a_ghost_lies_half_a_field_away_along_the_second_axis():
    spot = jnp.zeros((16, 16)).at[4, 3].set(1.0) + 1e-6
    found = degrade(jax.random.key(0), spot, "ghosting", 1.0)
    assert float(found[4, 11]) == pytest.approx(GHOST / 2, rel=0.3)
    assert float(jnp.abs(found - spot)[jnp.arange(16) != 4].max()) < 1e-5


def test_a_distortion_keeps_the_signal_and_shifts_as_far_as_it_says():
    image = disc((48, 48))
    found = degrade(jax.random.key(1), image, "distortion", 1.0)
    assert float(found.sum()) == pytest.approx(float(image.sum()), rel=0.05)
    ramp = jnp.broadcast_to(jnp.arange(48.0), (48, 48))
    inner = slice(12, 36)
    density = degrade(jax.random.key(1), jnp.ones((48, 48)), "distortion", 1.0)
    moved = degrade(jax.random.key(1), ramp, "distortion", 1.0) / jnp.maximum(density, 1e-3) - ramp
    spread = float(jnp.sqrt((moved[inner, inner] ** 2).mean()))
    assert 0.3 * SHIFT * 48 < spread < 2 * SHIFT * 48


def test_low_quality_of_a_picture_is_what_a_camera_shows():
    image = 0.8 * PLANE
    key = jax.random.key(5)
    found = degrade(key, image, "low-quality", 1.0, is_magnitude=False)
    _, blur_key, _, noise_key = jax.random.split(key, 4)
    by_hand = degrade(blur_key, image, "blur", 0.5, is_magnitude=False)
    by_hand = degrade(noise_key, by_hand, "noise", 0.5, is_magnitude=False)
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    assert set(PICTURE_KINDS) == {"noise", "blur"}

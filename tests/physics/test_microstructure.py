"""Forward models under one signature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ball_and_stick_model, draw_directions, noddi_model, simulate

pytestmark = pytest.mark.core

BVALS, BVECS = two_shell_protocol(2, ((6, 711.0), (6, 2855.0)))
MODELS = [noddi_model(), noddi_model(extra_cellular="convolved", dot=True), ball_and_stick_model()]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_simulated_voxels_lie_in_the_ranges_and_start_at_one(model, key):
    voxels = simulate(key, model, 500, BVALS, BVECS, snr=(30.0, 30.0))
    low, high = np.array([parameter.draw for parameter in model.parameters]).T
    assert (voxels.parameters >= low).all() and (voxels.parameters <= high).all()
    assert voxels.signals.shape == (500, 14)
    np.testing.assert_allclose(np.mean(voxels.signals[:, :2]), 1.0, atol=0.01)
    np.testing.assert_allclose(voxels.sigma, 1 / 30, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(voxels.direction, axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_starts_lie_within_the_bounds(model):
    for parameter in model.parameters:
        low, high = parameter.bounds
        assert all(low <= start <= high for start in parameter.starts) and low <= parameter.draw[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_gradient_table_per_voxel_equals_one_for_all(model, key):
    voxels = simulate(key, model, 3, BVALS, BVECS)
    clean = model.signal(voxels.parameters, voxels.direction, BVALS, BVECS)
    tables = np.tile(BVALS, (3, 1)), np.tile(BVECS, (3, 1, 1))
    np.testing.assert_allclose(model.signal(voxels.parameters, voxels.direction, *tables), clean, atol=1e-6)


def test_models_of_equal_constants_are_equal_and_so_compile_once():
    assert noddi_model(noddi.Tissue(1.7, 3.0)) == noddi_model(noddi.Tissue())
    assert hash(ball_and_stick_model()) == hash(ball_and_stick_model())
    assert noddi_model(noddi.Tissue(0.6, 2.0)) != noddi_model()


def test_noddi_takes_its_parameters_in_order():
    direction = jnp.array([0.0, 0.6, 0.8])
    expected = noddi.signal(jnp.array(0.6), jnp.array(0.3), jnp.array(0.1), direction, BVALS, BVECS)
    found = noddi_model().signal(jnp.array([0.6, 0.3, 0.1]), direction, BVALS, BVECS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(noddi_model().relevance(jnp.array([0.6, 0.3, 0.1])), [0.9, 1.0, 1.0], rtol=1e-6)


def test_still_water_stays_at_every_b():
    still = noddi_model(dot=True).signal(jnp.array([0.5, 0.5, 0.5, 1.0]), jnp.array([0.0, 0, 1]), BVALS, BVECS)
    np.testing.assert_allclose(still, 1.0, rtol=1e-6)
    fixed = noddi_model(dot=True).signal(jnp.array([0.6, 0.3, 0.1, 0.25]), jnp.array([0.0, 0, 1]), BVALS, BVECS)
    living = noddi_model().signal(jnp.array([0.6, 0.3, 0.1]), jnp.array([0.0, 0, 1]), BVALS, BVECS)
    np.testing.assert_allclose(fixed, 0.25 + 0.75 * np.asarray(living), rtol=1e-6)


def test_a_stick_stops_nothing_across_and_a_ball_is_isotropic():
    across, along = np.array([[1.0, 0, 0]]), np.array([[0.0, 0, 1]])
    bvals, z = np.array([1000.0]), jnp.array([0.0, 0, 1])
    model = ball_and_stick_model()
    stick, ball = jnp.array([1.0, 1.5]), jnp.array([0.0, 1.5])
    np.testing.assert_allclose(model.signal(stick, z, bvals, across), 1.0)
    np.testing.assert_allclose(model.signal(stick, z, bvals, along), np.exp(-1.5), rtol=1e-6)
    np.testing.assert_allclose(model.signal(ball, z, bvals, across), np.exp(-1.5), rtol=1e-6)


def test_directions_are_uniform_over_the_sphere(key):
    directions = np.asarray(draw_directions(key, 20_000))
    np.testing.assert_allclose(directions.T @ directions / 20_000, np.eye(3) / 3, atol=0.01)
    np.testing.assert_allclose(directions.mean(0), 0, atol=0.02)


def test_simulation_is_a_function_of_its_key(key):
    model = ball_and_stick_model()
    first, again = (simulate(key, model, 4, BVALS, BVECS).signals for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, simulate(jax.random.key(1), model, 4, BVALS, BVECS).signals)

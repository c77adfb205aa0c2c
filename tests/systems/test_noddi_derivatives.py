"""Signals and derivatives written for the fit, against the model itself in both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.gradient_signals import Point
from jaxmed.physics import noddi
from jaxmed.physics.acquisition import spread_directions, two_shell_protocol
from jaxmed.physics.microstructure import ball_and_stick_model, draw_directions, tangent_frame
from jaxmed.systems.noddi.likelihood import model_forward, noddi_forward
from jaxmed.systems.noddi.protocol import GRID_KAPPA, GRID_NDI, FitConfig, prepare
from jaxmed.systems.noddi.voxel_fit import search_grid

BVALS, BVECS = two_shell_protocol(3, ((7, 711.0), (9, 2855.0)))
COUNT = 16
CONFIGS = {
    "two shells": FitConfig(),
    "fixed tissue": FitConfig(dot=True, tissue=noddi.Tissue(0.6, 2.0)),
    "free s0": FitConfig(s0="free"),
    "convolved": FitConfig(extra_cellular="convolved"),
    "everything": FitConfig(extra_cellular="convolved", dot=True, s0="free", order=24),
}


def random_point(config, key, count=COUNT):
    value_key, direction_key = jax.random.split(key)
    number = 3 + config.dot + (config.s0 == "free")
    values = jax.random.uniform(value_key, (number, count), minval=0.03, maxval=0.97)
    if config.s0 == "free":
        values = values.at[-1].add(0.5)
    return Point(values, draw_directions(direction_key, count).T)


def reference(config, point, bvals, bvecs):
    """Return the signals of `jaxmed.physics`, in float64."""
    with jax.enable_x64(True):
        model = config.build_model()
        values = np.asarray(point.values, np.float64)
        number = len(model.parameters)
        predicted = model.signal(
            jnp.asarray(values[:number].T), jnp.asarray(np.asarray(point.direction, np.float64).T), bvals, bvecs
        )
        return np.asarray(predicted).T * (values[-1] if config.s0 == "free" else 1.0)


def evaluate(forward, point):
    blocks = jax.jit(forward.blocks)(point)
    predicted = np.concatenate([block.predicted for block in blocks])
    columns = [np.concatenate(parts) for parts in zip(*(block.columns for block in blocks), strict=True)]
    return predicted, columns


def check_columns(forward, config, point, columns, bvals, bvecs, tolerance=2e-4):
    step = 1e-4
    rows = np.asarray(forward.rows)
    frame = tangent_frame(point.direction)
    number = len(point.values)
    for index, column in enumerate(columns):
        ends = []
        for sign in (1, -1):
            if index < number:
                moved = point._replace(
                    values=np.asarray(point.values, np.float64) + sign * step * np.eye(number)[:, [index]]
                )
            else:
                turned = np.asarray(point.direction, np.float64) + sign * step * np.asarray(frame[index - number])
                moved = point._replace(direction=turned / np.linalg.norm(turned, axis=0))
            ends.append(reference(config, moved, bvals, bvecs)[rows])
        np.testing.assert_allclose(column, (ends[0] - ends[1]) / (2 * step), atol=tolerance, err_msg=str(index))


@pytest.mark.parametrize("name", CONFIGS)
def test_noddi_equals_the_model_with_its_derivatives(name, key):
    config = CONFIGS[name]
    forward = noddi_forward(prepare(BVALS, BVECS, config), config.build_model(), config)
    point = random_point(config, key)
    predicted, columns = evaluate(forward, point)
    expected = reference(config, point, BVALS, BVECS)[np.asarray(forward.rows)]
    np.testing.assert_allclose(predicted, expected, atol=2e-6)
    check_columns(forward, config, point, columns, BVALS, BVECS)


def test_rows_with_b_values_of_their_own(key):
    """Six values, three of which share a group; the rest carry their own coefficients."""
    bvals = np.concatenate([np.zeros(2), np.full(7, 700.0), np.full(7, 1400.0), np.full(6, 2000.0), [300, 2105, 2855]])
    bvecs = np.concatenate([np.zeros((2, 3)), spread_directions(23)])
    config = FitConfig()
    protocol = prepare(bvals, bvecs, config)
    assert [len(group.bvecs) for group in protocol.groups] == [7, 7, 6, 3]
    assert [len(group.attenuation) for group in protocol.groups] == [1, 1, 1, 3]
    forward = noddi_forward(protocol, config.build_model(), config)
    point = random_point(config, key)
    predicted, columns = evaluate(forward, point)
    np.testing.assert_allclose(predicted, reference(config, point, bvals, bvecs)[np.asarray(forward.rows)], atol=2e-6)
    check_columns(forward, config, point, columns, bvals, bvecs)


@pytest.mark.parametrize("extra_cellular", ["averaged_tensor", "convolved"])
def test_gradients_that_vary_over_space(key, extra_cellular):
    config = FitConfig(extra_cellular=extra_cellular)
    rng = np.random.default_rng(0)
    matrices = np.eye(3) + 0.08 * rng.normal(size=(COUNT, 3, 3))
    protocol = prepare(BVALS, BVECS, config, varies=True)
    forward = noddi_forward(
        protocol, config.build_model(), config, jnp.asarray(matrices.transpose(1, 2, 0), jnp.float32)
    )
    point = random_point(config, key)
    predicted, columns = evaluate(forward, point)
    turned = np.einsum("vij,mj->vmi", matrices, BVECS)
    lengths = np.linalg.norm(turned, axis=-1)
    tables = BVALS * lengths**2, turned / np.where(lengths > 0, lengths, 1.0)[..., None]
    expected = reference(config, point, *tables)[np.asarray(forward.rows)]
    np.testing.assert_allclose(predicted, expected, atol=3e-6)
    check_columns(forward, config, point, columns, *tables)


def test_forward_mode_gives_any_model_its_derivatives(key):
    config = FitConfig(model="ball-and-stick", s0="free")
    model = ball_and_stick_model()
    forward = model_forward(prepare(BVALS, BVECS, config), model, config)
    assert forward.names == ("stick_fraction", "diffusivity", "s0")
    values = jnp.stack([jnp.linspace(0.1, 0.9, COUNT), jnp.linspace(0.5, 3.0, COUNT), jnp.full(COUNT, 1.1)])
    point = Point(values, draw_directions(key, COUNT).T)
    predicted, columns = evaluate(forward, point)
    np.testing.assert_allclose(predicted, reference(config, point, BVALS, BVECS)[np.asarray(forward.rows)], atol=1e-6)
    check_columns(forward, config, point, columns, BVALS, BVECS)


def test_a_hand_written_model_and_forward_mode_agree(key):
    config = FitConfig()
    protocol, model = prepare(BVALS, BVECS, config), config.build_model()
    point = random_point(config, key)
    by_hand, by_mode = (evaluate(make(protocol, model, config), point) for make in (noddi_forward, model_forward))
    np.testing.assert_allclose(by_hand[0], by_mode[0], atol=2e-6)
    for first, second in zip(by_hand[1], by_mode[1], strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)


@pytest.mark.core
@pytest.mark.parametrize("order", [4, 16, 24, 32])
def test_powers_of_u_are_the_legendre_polynomials(order):
    cosine = np.linspace(0, 1, 41)
    powers = (2 * cosine**2 - 1)[:, None] ** np.arange(order // 2 + 1)
    # Powers of 16 and beyond cancel: what counts is that the products with small moments stay exact, tested above.
    np.testing.assert_allclose(powers @ noddi.legendre_to_powers(order), noddi.legendre(cosine, order), atol=1e-9)


def test_the_grid_finds_the_cell_that_evaluation_of_every_row_finds(key):
    config = FitConfig()
    protocol = prepare(BVALS, BVECS, config)
    truth = random_point(config, key, 40)
    clean = reference(config, truth, BVALS, BVECS)[np.asarray(protocol.order)]
    measured = jnp.asarray(clean + np.random.default_rng(1).normal(size=clean.shape) / 30, jnp.float32)
    starts = jax.jit(lambda m, d: search_grid(protocol, config, m, d))(measured, truth.direction)
    bvals, bvecs = np.asarray(protocol.bvals[protocol.order]), np.asarray(protocol.bvecs[protocol.order])
    free = np.exp(-bvals * 3e-3)[:, None]
    best = np.full(40, np.inf)
    for odi in np.asarray(noddi.kappa_to_odi(jnp.asarray(GRID_KAPPA))):
        for ndi in GRID_NDI:
            parts = (jnp.full(40, value, jnp.float32) for value in (ndi, odi, 0.0))
            tissue = np.asarray(noddi.signal(*parts, truth.direction.T, bvals, bvecs)).T
            away, towards = np.asarray(measured) - tissue, free - tissue
            fwf = np.clip((away * towards).sum(0) / (towards**2).sum(0), 0, 1)
            best = np.minimum(best, ((away - fwf * towards) ** 2).sum(0))
    np.testing.assert_allclose(starts.squares, best, rtol=0.02, atol=2e-4)
    assert (starts.gap >= 0).all()

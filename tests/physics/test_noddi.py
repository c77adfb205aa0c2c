"""The NODDI signal against tabulated values, limits, and direct integration over the sphere."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import spread_directions, two_shell_protocol

pytestmark = pytest.mark.core

MOMENTS = {
    1: (0.143846059, 0.0139426841, 9.82477110e-4, 5.41683313e-5, 2.45023109e-6, 9.39208880e-8),
    4: (0.556939889, 0.206238617, 0.0564224682, 0.0121944782, 0.00217475700, 3.29862960e-4),
    16: (0.90270287, 0.71262671, 0.49452412, 0.30371872, 0.16633342, 0.08184856),
    64: (0.97637179, 0.92341075, 0.84598958, 0.75087200, 0.64573173, 0.53813567),
}
# ndi, fwf, odi, cosine, b -> intra, extra, total
SIGNALS = [
    ((0.6, 0.1, 0.3, 0.0, 711.0), (0.78411732, 0.51953891, 0.62230549)),
    ((0.6, 0.1, 0.3, 0.5, 711.0), (0.72591566, 0.49281649, 0.58125653)),
    ((0.6, 0.1, 0.3, 1.0, 2855.0), (0.22120978, 0.03088360, 0.13059045)),
    ((0.3, 0.0, 0.9, 0.7, 2000.0), (0.47266041, 0.06564956, 0.18775281)),
    ((0.8, 0.3, 0.05, 0.2, 2855.0), (0.74387302, 0.28157784, 0.45604699)),
    ((0.5, 0.0, 0.5, 1.0, 1000.0), (0.55276029, 0.29675568, 0.42475799)),
]
Z = np.array([0.0, 0.0, 1.0])


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Both precisions, with the tolerance that the specification asks of each."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param), {"float32": 2e-6, "float64": 1e-7}[request.param]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def at_cosine(cosine):
    return np.array([[np.sqrt(1 - cosine**2), 0.0, cosine]])


@pytest.mark.parametrize("kappa", MOMENTS)
def test_watson_moments_equal_the_table(precision, kappa):
    dtype, tolerance = precision
    moments = noddi.watson_moments(jnp.asarray(kappa, dtype), 12)
    assert moments.dtype == dtype
    np.testing.assert_allclose(moments, (1.0, *MOMENTS[kappa]), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("parameters", "expected"), SIGNALS)
def test_signals_equal_the_table(precision, parameters, expected):
    dtype, tolerance = precision
    ndi, fwf, odi = (jnp.asarray(value, dtype) for value in parameters[:3])
    protocol = (jnp.asarray(Z, dtype), np.array([parameters[4]]), at_cosine(parameters[3]))
    order = 24  # beyond the truncation of the series, so that the table's eight digits are reached
    intra, extra, _ = noddi.compartments(ndi, odi, *protocol, order=order)
    total = noddi.signal(ndi, odi, fwf, *protocol, order=order)
    assert total.dtype == dtype
    np.testing.assert_allclose([intra[0], extra[0], total[0]], expected, rtol=0, atol=tolerance)


def test_dispersion_limits_are_isotropic_and_parallel_sticks(double):
    attenuation = 2.0 * 1.7
    bvals, directions = np.full(5, 2000.0), spread_directions(5)
    isotropic, _, _ = noddi.compartments(jnp.array(0.5), jnp.array(1.0), jnp.array(Z), bvals, directions)
    root = np.sqrt(attenuation)
    np.testing.assert_allclose(isotropic, np.sqrt(np.pi) * scipy.special.erf(root) / (2 * root), atol=1e-8)
    moments = noddi.watson_moments(jnp.array(noddi.MAX_KAPPA), 16)
    assert np.all(np.diff(moments) < 0) and moments[1] > 0.99
    parallel = noddi._expand(
        jnp.ones(17), noddi.stick_moments(np.full(5, attenuation), 32), noddi.legendre(directions[:, 2], 32)
    )
    np.testing.assert_allclose(parallel, np.exp(-attenuation * directions[:, 2] ** 2), atol=1e-8)


def test_powder_mean_does_not_depend_on_dispersion(double):
    """The mean over all gradient directions is h_0 of b d, whatever kappa."""
    x, weights = noddi.unit_quadrature(64)
    gradients = np.stack([np.sqrt(1 - x**2), 0 * x, x], -1)
    expected = noddi.stick_moments(np.array(2.855 * 1.7), 16)[0]
    for odi in (0.05, 0.3, 0.9):
        intra, _, _ = noddi.compartments(jnp.array(0.5), jnp.array(odi), jnp.array(Z), np.full(64, 2855.0), gradients)
        np.testing.assert_allclose(weights @ np.asarray(intra), expected, atol=1e-12)


def test_pure_compartments(double):
    bvals, bvecs = two_shell_protocol()
    one, some = jnp.array(1.0), jnp.array(0.4)
    water = noddi.signal(some, some, one, jnp.array(Z), bvals, bvecs)
    np.testing.assert_allclose(water, np.exp(-bvals * 3e-3), rtol=1e-12)
    _, extra, _ = noddi.compartments(one, jnp.array(0.005), jnp.array(Z), bvals, bvecs)
    moment = noddi.watson_moments(noddi.odi_to_kappa(jnp.array(0.005)), 4)[1]
    along = (1 + 2 * moment) / 3 * bvecs[:, 2] ** 2 + (1 - moment) / 3 * (1 - bvecs[:, 2] ** 2)
    np.testing.assert_allclose(extra, np.exp(-bvals * 1.7e-3 * along), rtol=1e-10)


@pytest.mark.parametrize(("kappa", "cosine"), list(itertools.product((0.0, 1.0, 16.0, 64.0), (0.0, 0.5, 1.0))))
def test_series_equals_integration_over_the_sphere(double, kappa, cosine):
    order, attenuation = 20, 2.855 * 1.7
    t, t_weights = np.polynomial.legendre.leggauss(400)
    phi = 2 * np.pi * np.arange(400) / 400
    density = t_weights * np.exp(kappa * (t**2 - 1))
    along = cosine * t[:, None] + np.sqrt(1 - cosine**2) * np.sqrt(1 - t[:, None] ** 2) * np.cos(phi)
    direct = density @ np.exp(-attenuation * along**2).mean(1) / density.sum()
    moments = noddi.watson_moments(jnp.array(kappa), order)
    series = noddi._expand(
        moments, noddi.stick_moments(np.array(attenuation), order), noddi.legendre(np.array(cosine), order)
    )
    # Twenty orders leave a truncation of 2e-8 at kappa = 64, of 1e-10 below 16.
    assert abs(float(series[0]) - direct) < (1e-9 if kappa < 64 else 5e-8)


def test_gradient_by_kappa_is_smooth(double):
    def intra(kappa):
        moments = noddi.watson_moments(kappa, 16)
        return noddi._expand(moments, noddi.stick_moments(np.array(3.4), 16), noddi.legendre(np.array(0.3), 16))[0]

    for kappa in (0.0, 0.05, 0.1, 0.5, 30.0, 30.01, 64.0):
        step = 1e-4
        expected = (intra(kappa + step) - intra(kappa - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(intra)(kappa), expected, rtol=1e-6, atol=1e-12)


def test_convolved_extra_cellular_space_averages_exponentials(double):
    ndi, odi, attenuation, cosine = 0.6, 0.3, 2.0 * 1.7, 0.4
    kappa = float(noddi.odi_to_kappa(jnp.array(odi)))
    t, t_weights = np.polynomial.legendre.leggauss(400)
    phi = 2 * np.pi * np.arange(400) / 400
    density = t_weights * np.exp(kappa * (t**2 - 1))
    along = cosine * t[:, None] + np.sqrt(1 - cosine**2) * np.sqrt(1 - t[:, None] ** 2) * np.cos(phi)
    zeppelin = np.exp(-attenuation * ((1 - ndi) + ndi * along**2))
    expected = density @ zeppelin.mean(1) / density.sum()
    _, extra, _ = noddi.compartments(
        jnp.array(ndi), jnp.array(odi), jnp.array(Z), np.array([2000.0]), at_cosine(cosine), extra_cellular="convolved"
    )
    np.testing.assert_allclose(extra[0], expected, atol=1e-9)


def test_dispersion_index_inverts_concentration(double):
    odi = jnp.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(noddi.kappa_to_odi(noddi.odi_to_kappa(odi)), odi, rtol=1e-12)


def test_unphysical_diffusivity_is_refused():
    with pytest.raises(ValueError, match="parallel_diffusivity: expected 0.05 to 10"):
        noddi.Tissue(parallel_diffusivity=1.7e-3)

"""Live parity with dmipy, whose extra-cellular space is convolved; only run, never read: its licence is the AGPL."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.physics import noddi
from jaxmed.physics.acquisition import two_shell_protocol

pytestmark = pytest.mark.peers

BVALS, BVECS = two_shell_protocol()
# odi, ndi, fwf, and the direction's polar and azimuthal angles
CASES = [(0.3, 0.6, 0.1, 0.7, 1.1), (0.9, 0.4, 0.2, 1.2, -0.4), (0.5, 0.8, 0.0, 0.3, 2.0), (0.1, 0.7, 0.05, 0.9, 0.5)]


@pytest.fixture(scope="module")
def simulate():
    """NODDI-Watson put together as dmipy's documentation does."""
    pytest.importorskip("dmipy_fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dmipy_fit.core.acquisition_scheme import acquisition_scheme_from_bvalues
        from dmipy_fit.core.modeling_framework import MultiCompartmentModel
        from dmipy_fit.distributions.distribute_models import SD1WatsonDistributed
        from dmipy_fit.signal_models.cylinder_models import C1Stick
        from dmipy_fit.signal_models.gaussian_models import G1Ball, G2Zeppelin

        directions = np.where(BVALS[:, None] > 0, BVECS, [1.0, 0.0, 0.0])
        scheme = acquisition_scheme_from_bvalues(BVALS * 1e6, directions, 0.0129, 0.0218)
        bundle = SD1WatsonDistributed(models=[C1Stick(), G2Zeppelin()])
        bundle.set_tortuous_parameter("G2Zeppelin_1_lambda_perp", "C1Stick_1_lambda_par", "partial_volume_0")
        bundle.set_equal_parameter("G2Zeppelin_1_lambda_par", "C1Stick_1_lambda_par")
        bundle.set_fixed_parameter("G2Zeppelin_1_lambda_par", 1.7e-9)
        model = MultiCompartmentModel(models=[G1Ball(), bundle])
        model.set_fixed_parameter("G1Ball_1_lambda_iso", 3e-9)

    def call(odi, ndi, fwf, polar, azimuth):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vector = model.parameters_to_parameter_vector(
                SD1WatsonDistributed_1_SD1Watson_1_mu=np.array([polar, azimuth]),
                SD1WatsonDistributed_1_SD1Watson_1_odi=odi,
                SD1WatsonDistributed_1_partial_volume_0=ndi,
                partial_volume_0=fwf,
                partial_volume_1=1 - fwf,
            )
            return np.asarray(model.simulate_signal(scheme, vector)).ravel()

    return call


@pytest.mark.parametrize("case", CASES)
def test_the_convolved_form_is_dmipys_and_the_averaged_tensor_is_not(simulate, case):
    odi, ndi, fwf, polar, azimuth = case
    theirs = simulate(*case)
    with jax.enable_x64(True):
        mu = np.array([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)])
        arguments = (jnp.array(ndi), jnp.array(odi), jnp.array(fwf), jnp.array(mu), BVALS, BVECS)
        ours = {
            form: np.asarray(noddi.signal(*arguments, extra_cellular=form, order=24))
            for form in ("convolved", "averaged_tensor")
        }
    # dmipy expands by a pseudo-inverse over 724 directions, in fewer orders the more fibres disperse: 1e-4 is its.
    assert np.abs(ours["convolved"] - theirs).max() < 2e-4
    assert np.abs(ours["averaged_tensor"] - theirs).max() > 2e-3

"""Posterior means and spreads are calibrated, and better than the maximum where the likelihood is flat."""

import jax
import numpy as np
import pytest

from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ball_and_stick_model, noddi_model, simulate
from jaxmed.physics.posterior import PosteriorConfig, sample_posterior
from jaxmed.systems import noddi
from jaxmed.systems.noddi.protocol import FitConfig

pytest.importorskip("blackjax")

SNR = 30.0


def draw(model, count, protocol):
    """Simulate voxels from the prior, which the ranges of a simulation are but for the ends; S0 is known."""
    voxels = simulate(jax.random.key(11), model, count, *protocol, snr=(SNR, SNR))
    signals = np.where(protocol[0] > 50, np.asarray(voxels.signals), np.float32(1.0))
    return signals, np.asarray(voxels.parameters), np.asarray(voxels.direction)


def test_a_short_chain_is_calibrated():
    """The truth lies as many standard deviations from the mean as it should, over draws from the prior."""
    model, protocol = ball_and_stick_model(), two_shell_protocol(3, ((8, 711.0), (8, 2855.0)))
    signals, truth, direction = draw(model, 96, protocol)
    found = sample_posterior(
        jax.random.key(0), model, signals, *protocol, 1 / SNR, truth, direction, config=PosteriorConfig(chunk_size=96)
    )
    assert np.isfinite(found.mean).all() and np.median(found.acceptance) > 0.5
    scores = (truth - found.mean) / found.sd
    # Of a normal score the median square is 0.455, and 95 % lie within 2.
    spread = np.median(scores**2, axis=0) / 0.455
    assert (0.6 < spread).all() and (spread < 1.6).all() and (np.mean(np.abs(scores) < 2, axis=0) > 0.88).all(), scores


@pytest.mark.slow
def test_the_mean_has_a_smaller_error_than_the_maximum_and_claims_it():
    model, protocol = noddi_model(), two_shell_protocol()
    signals, truth, _ = draw(model, 1024, protocol)
    maps = noddi.fit(signals, *protocol, sigma=1 / SNR, config=FitConfig(chunk_size=128))
    values = np.stack([maps.ndi, maps.odi, maps.fwf], axis=1)
    found = sample_posterior(jax.random.key(0), model, signals, *protocol, 1 / SNR, values, maps.direction)
    tissue = truth[:, 2] < 0.5
    by_mean, by_maximum = (np.sqrt(np.mean((part - truth)[tissue] ** 2, axis=0)) for part in (found.mean, values))
    assert (by_mean < 1.02 * by_maximum).all() and by_mean[1] < 0.75 * by_maximum[1], (by_mean, by_maximum)
    scores = ((truth - found.mean) / np.maximum(found.sd, 1e-3))[tissue]
    assert (0.7 < np.median(scores**2, axis=0) / 0.455).all() and (np.median(scores**2, axis=0) / 0.455 < 1.4).all()

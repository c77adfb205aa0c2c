"""Eigenvectors against LAPACK."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.solvers.symmetric import eigh_3x3

pytestmark = pytest.mark.core


def check(matrices, tolerance):
    values, vectors = (np.asarray(part, np.float64) for part in eigh_3x3(jnp.asarray(matrices.transpose(1, 2, 0))))
    expected = np.linalg.eigvalsh(matrices.astype(np.float64))
    scale = np.abs(expected).max(axis=1, keepdims=True) + 1e-30
    np.testing.assert_allclose(values.T / scale, expected / scale, atol=tolerance)
    vectors = vectors.transpose(2, 0, 1)
    np.testing.assert_allclose(
        vectors @ vectors.transpose(0, 2, 1), np.broadcast_to(np.eye(3), vectors.shape), atol=1e-5
    )
    rebuilt = vectors * values.T[:, None, :] @ vectors.transpose(0, 2, 1)
    np.testing.assert_allclose(rebuilt / scale[..., None], matrices / scale[..., None], atol=tolerance)


def test_random_matrices():
    factor = np.random.default_rng(0).normal(size=(300, 3, 3))
    check((factor + factor.transpose(0, 2, 1)).astype(np.float32), 2e-6)


def test_special_matrices():
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    cases = [np.zeros((3, 3)), np.eye(3), np.diag([3.0, 1.0, 2.0]), np.ones((3, 3)), np.diag([1e-20, 1.0, 1e-3])]
    cases += [turn @ np.diag(d) @ turn.T for d in ([1.7, 0.2, 0.2], [1.0, 1.0, 1e-6], [1.0, 1.0 + 1e-6, 2.0])]
    check(np.stack(cases).astype(np.float32), 2e-6)

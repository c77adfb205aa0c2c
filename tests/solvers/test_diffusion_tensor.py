"""A tensor is found again from its own signals, whatever its direction."""

import jax.numpy as jnp
import numpy as np

from jaxmed.physics.acquisition import tensor_design, tensor_rows, two_shell_protocol
from jaxmed.solvers.diffusion_tensor import fit_tensor


def test_a_tensor_is_found_from_its_signals():
    bvals, bvecs = two_shell_protocol(3, ((8, 700.0), (12, 2000.0)))
    design = tensor_design(bvals, bvecs)
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 3, 3)))
    values = np.array([0.3, 0.6, 1.7])  # um^2/ms
    tensors = np.einsum("vij,j,vkj->vik", axes, values, axes)
    signals = np.exp(-1e-3 * bvals[:, None] * np.einsum("ri,vij,rj->rv", bvecs, tensors, bvecs))
    used = tensor_rows(bvals, design, 50.0)
    assert 0 < used.sum() < len(bvals)
    found = fit_tensor(*(jnp.asarray(part, jnp.float32) for part in (design, used, signals)))
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(found.direction).T * axes[:, :, 2], axis=1)), 1, atol=1e-5)
    np.testing.assert_allclose(found.mean_diffusivity, values.mean(), rtol=1e-4)
    spread = np.sqrt(1.5 * np.sum((values - values.mean()) ** 2) / np.sum(values**2))
    np.testing.assert_allclose(found.fractional_anisotropy, spread, rtol=1e-4)

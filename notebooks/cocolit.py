# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CoCoLIT: a PET map that nobody measured
#
# An MRI does not show amyloid. It shows tissue that is lost, and whoever has lost some has amyloid more often. CoCoLIT
# draws latents of amyloid maps that suit an MRI, averages them, and decodes the average. This notebook asks what such a
# map can know, what its training loss looks at, what a clipped sampler does to latents, and what averaging costs.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.diffusion.averaging import average_samples
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.samplers import Ddim
from jaxmed.objectives.autoencoding import time_weight
from jaxmed.synthesis.phantoms.amyloid import cortical_region, draw_pair
from jaxmed.systems import cocolit
from jaxmed.systems.cocolit.networks import WeightsConfig, read_models, write_tiny_models
from jaxmed.systems.cocolit.translation import CHAIN, POSITIVE, SamplingConfig, predict_bias

# %% [markdown]
# ## A task with known truth
#
# Phantoms of nested ellipsoids: atrophy thins the cortex and widens the ventricles, and the uptake of the cortex is a
# step of it. Two subjects, with little atrophy and with much.

# %%
SHAPE, SPACING, SUBJECTS = (24, 24, 24), 8.0, 60
keys = jax.random.split(jax.random.key(0), SUBJECTS)


@jax.jit
def draw_both(keys):
    return [
        jax.vmap(lambda key, linked=linked: draw_pair(key, SHAPE, SPACING, linked=linked))(keys)
        for linked in (True, False)
    ]


cohort = dict(zip((True, False), draw_both(keys), strict=True))
pairs = cohort[True]
fig, axes = plt.subplots(2, 2, figsize=(4.6, 4.6), layout="constrained")
for column, subject in zip(axes.T, (int(pairs.atrophy.argmin()), int(pairs.atrophy.argmax())), strict=True):
    column[0].imshow(pairs.mri[subject, :, :, 12].T, cmap="gray", origin="lower", vmin=-65, vmax=10)
    column[1].imshow(pairs.suvr[subject, :, :, 12].T, cmap="inferno", origin="lower", vmin=0, vmax=1.8)
    column[0].set_title(f"atrophy {float(pairs.atrophy[subject]):.2f}")
for ax, name in zip(axes[:, 0], ("MRI", "PET"), strict=True):
    ax.set_ylabel(name)
plt.setp(axes, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What an MRI can tell
#
# On the left uptake follows the atrophy that the MRI shows; on the right that of someone else: the negative control.
# The MRIs are the same. A method that claims to see amyloid on the right has seen something else.

# %%
region = np.asarray(cortical_region(SHAPE, SPACING))
fig, axes = plt.subplots(1, 2, figsize=(6, 2.8), sharey=True, layout="constrained")
for ax, (linked, found) in zip(axes, cohort.items(), strict=True):
    mean = np.asarray(found.suvr)[:, region].mean(1)
    grey = np.asarray(found.cortex).sum((1, 2, 3)) / np.asarray(found.mri > -60).sum((1, 2, 3))
    ax.scatter(grey, mean, s=12, c=np.where(mean > POSITIVE, "C3", "C0"))
    ax.axhline(POSITIVE, color="0.6", lw=0.8)
    told = f"r = {np.corrcoef(grey, mean)[0, 1]:+.2f}"
    ax.set(title=f"{'linked' if linked else 'not linked'}, {told}", xlabel="share of grey matter")
axes[0].set_ylabel("cortical SUVR")
plt.show()

# %% [markdown]
# ## Which times the image loss listens to
#
# The weighted image space loss decodes the latent that is expected at a random time t and compares it with the PET. An
# error of the expected noise comes into that latent multiplied by sigma / alpha, up to a hundred at the end. The weight
# (T - t) / T takes that back where it is worst: the product no longer explodes, and at the last time it is a tenth.

# %%
t = jnp.arange(1000)
growth = np.asarray(CHAIN.sigma(t) / CHAIN.alpha(t))
weight = np.asarray(time_weight(t, CHAIN.num_steps))
fig, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
ax.semilogy(growth, label="error of the latent for an error 1 of the noise")
ax.semilogy(weight * growth, label="weighted (WISL)")
ax.set(xlabel="time t", ylim=(1e-2, 200))
ax.legend(frameon=False, fontsize=8)
plt.show()
print(f"at t = 999: {growth[-1]:.0f} times the error, weighted {weight[-1] * growth[-1]:.2f}")

# %% [markdown]
# ## A sampler that clips
#
# The released sampler holds the expected latent within [-1, 1] at every step, but latents have no such range. Here the
# exact denoiser of a normal distribution stands in for the network: the mean of the samples against the true mean.

# %%
truth, variance = jnp.linspace(-2.5, 2.5, 41), 0.25


def denoise(x, t):
    alpha, sigma = CHAIN.alpha(t)[:, None], CHAIN.sigma(t)[:, None]
    return truth + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * truth)


sampler = Ddim(times=CHAIN.leading_times(25))
fig, ax = plt.subplots(figsize=(3.6, 3), layout="constrained")
for name, clip in (("clipped, as released", (-1.0, 1.0)), ("free", None)):
    draw = jax.jit(lambda key, c=clip: average_samples(key, Denoiser(denoise, CHAIN), (41,), sampler, 256, clip=c))
    ax.plot(truth, draw(jax.random.key(1)).mean, label=name)
ax.set(xlabel="true mean of a latent's entry", ylabel="mean of the samples")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Averaging latents, and what it costs
#
# `translate` draws m latents, averages them, and decodes once. Decoding every sample and averaging the maps would have
# no bias, but needs m passes. The difference is (1/m - 1) Tr(H S) / 2 to second order, with the decoder's Hessian H and
# the covariance S of the samples. Networks of random numbers will do to see it: their maps mean nothing, their decoder
# is curved all the same. Their latents spread more than their mean is large, where two terms of a series cannot
# suffice: theory tells where the bias lies and of which sign it is, and overstates it (the line is equality). For
# trained networks `jaxmed cocolit evaluate` compares the two, pair by pair.

# %%
with tempfile.TemporaryDirectory() as folder:
    models = read_models(WeightsConfig(write_tiny_models(Path(folder), 0, SPACING)))
mri, key, m = (pairs.mri[0] + 49.76) / 24.69, jax.random.key(2), 8
found = cocolit.translate(key, models, mri, m, SamplingConfig(steps=4, chunk=4))
theory = predict_bias(jax.random.key(3), models, found, m, 8)
bias = np.asarray(found.suvr - found.mean_map)
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.6), layout="constrained")
axes[0].imshow(found.suvr[:, :, 12].T, cmap="inferno", origin="lower")
axes[1].imshow(found.spread[:, :, 12].T, cmap="viridis", origin="lower")
axes[2].scatter(np.ravel(theory), bias.ravel(), s=1, alpha=0.3)
axes[2].axline((0, 0), slope=1, color="0.5", lw=0.8)
axes[2].set(xlabel="in theory, SUVR", ylabel="measured, SUVR")
for ax, name in zip(axes, ("map (m = 8)", "spread of the samples", "bias of averaging"), strict=True):
    ax.set_title(name, fontsize=9)
plt.setp(axes[:2], xticks=[], yticks=[])
plt.show()
r = np.corrcoef(np.ravel(theory), bias.ravel())[0, 1]
size, spread = float(jnp.abs(found.latent).mean()), float(found.latent_spread.mean())
print(f"entries of the mean latent are of size {size:.2f}, and their samples spread by {spread:.2f}")
print(
    f"bias {np.sqrt(np.mean(bias**2)):.4f} SUVR rms, in theory {float(jnp.sqrt(jnp.mean(theory**2))):.4f}; r = {r:.2f}"
)

# %% [markdown]
# With trained networks `jaxmed cocolit evaluate` tells the same of your pairs, beside SSIM, PSNR, regional SUVR and
# positivity with intervals over subjects, the map that the MRI of another gives, and a pix2pix. `jaxmed cocolit
# evaluate --preset smoke --out runs/cocolit` goes through all stages on phantoms by itself.

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
# # NODDI: what a diffusion signal says about tissue
#
# A voxel of brain holds water inside neurites, water around them, and free water. NODDI tells the three apart from how
# the signal falls with diffusion weighting, in many directions. This notebook looks at the model, fits it to a
# simulated brain slab whose truth is known, shows why the noise must be modelled too, and trains networks that give
# the fit's answer in a fraction of its time.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.models.mlp import MlpConfig
from jaxmed.physics import noddi as model
from jaxmed.physics.acquisition import add_rician_noise, two_shell_protocol
from jaxmed.synthesis.phantoms.diffusion import make_slab
from jaxmed.systems import noddi
from jaxmed.systems.noddi.network import predict
from jaxmed.systems.noddi.training import TrainConfig

# %% [markdown]
# ## The model
#
# Along the fibres water moves far, so the signal falls fast; across them neurites hold it back. Dispersion of the
# fibres (ODI) blurs the difference. Here is the signal at b = 2855 s/mm² as the gradient turns from across to along.

# %%
angle = np.linspace(0, np.pi / 2, 60)
gradients = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], -1)
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for odi in (0.05, 0.2, 0.4, 0.9):
    curve = model.signal(
        jnp.array(0.6), jnp.array(odi), jnp.array(0.0), jnp.array([0.0, 0, 1]), np.full(60, 2855.0), gradients
    )
    axes[0].plot(np.degrees(angle), curve, label=f"ODI {odi}")
for ndi in (0.2, 0.4, 0.6, 0.8):
    curve = model.signal(
        jnp.array(ndi), jnp.array(0.2), jnp.array(0.0), jnp.array([0.0, 0, 1]), np.full(60, 2855.0), gradients
    )
    axes[1].plot(np.degrees(angle), curve, label=f"NDI {ndi}")
for ax in axes:
    ax.set_xlabel("gradient elevation from across the fibre (degrees)")
    ax.legend(frameon=False)
axes[0].set_ylabel("S / S0")
plt.show()

# %% [markdown]
# ## A slab of brain with known truth

# %%
slab = make_slab(jax.random.key(0), (64, 76, 1))
bvals, bvecs = two_shell_protocol()
clean = model.signal(slab.ndi, slab.odi, slab.fwf, slab.direction, bvals, bvecs) * slab.s0[..., None]
sigma = 850 / 20
noisy = np.asarray(add_rician_noise(jax.random.key(1), clean, sigma))
mask = np.asarray(slab.mask)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for ax, row, title in zip(axes, (0, 10, 45), ("b = 0", "b = 711", "b = 2855"), strict=True):
    ax.imshow(noisy[:, :, 0, row].T, origin="lower", cmap="gray", vmin=0)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Fit it
#
# Five thousand voxels, each with six unknowns. Telling the fit the noise level makes it maximise the Rician likelihood.

# %%
maps = noddi.fit(noisy, bvals, bvecs, mask, sigma=sigma)
fig, axes = plt.subplots(2, 3, figsize=(9, 7), layout="constrained")
for column, name in enumerate(("ndi", "odi", "fwf")):
    for row, values in enumerate((getattr(slab, name), getattr(maps, name))):
        image = np.where(mask, np.asarray(values), np.nan)[:, :, 0]
        shown = axes[row, column].imshow(image.T, origin="lower", vmin=0, vmax=1)
        axes[row, column].set(title=f"{name.upper()}, {('truth', 'fit')[row]}", xticks=[], yticks=[])
fig.colorbar(shown, ax=axes, shrink=0.6)
plt.show()

# %% [markdown]
# ## Why the likelihood matters
#
# At b = 2855 the signal of free fibres lies at the noise floor, and magnitudes are never negative. Least squares
# takes the floor for slow diffusion, that is for neurites: NDI comes out too high. The Rician likelihood removes that.

# %%
squares = noddi.fit(noisy, bvals, bvecs, mask)
tissue = mask & (np.asarray(slab.fwf) < 0.5)
truth = np.asarray(slab.ndi)[tissue]
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for fitted, label in ((squares, "least squares"), (maps, "Rician likelihood")):
    error = fitted.ndi[tissue] - truth
    ax.hist(error, bins=np.linspace(-0.3, 0.3, 61), alpha=0.6, label=f"{label}: bias {error.mean():+.3f}")
ax.axvline(0, color="k", lw=0.8)
ax.set(xlabel="NDI, fit minus truth", ylabel="voxels")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Networks, and what they are taught
#
# A network maps signals to parameters at once. Trained on the parameters that made the signals (NN_GT) it answers with
# what is likely on average where the data say little; trained on fits of the noisy signals (NN_MLE) it answers as a fit
# would. Both here are small and trained for seconds; `jaxmed noddi train` makes the real ones.

# %%
networks = {
    name: noddi.train(
        jax.random.key(2),
        bvals,
        bvecs,
        TrainConfig(labels=labels, network=MlpConfig(width=64), signals=8192, epochs=20, batch_size=128, restarts=1),
    ).network
    for name, labels in (("NN_MLE", "mle"), ("NN_GT", "gt"))
}
voxels = noisy[mask]
estimates = {name: predict(network, voxels) for name, network in networks.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
for ax, (name, found) in zip(axes, estimates.items(), strict=True):
    ax.plot(maps.odi[mask], found[:, 1], ".", ms=2, alpha=0.4)
    ax.plot([0, 1], [0, 1], "k", lw=0.8)
    difference = np.abs(found[:, 1] - maps.odi[mask])[np.asarray(slab.fwf)[mask] < 0.5].mean()
    ax.set(title=f"{name}: {difference:.3f} from the fit in tissue", xlabel="ODI, fit", aspect="equal")
axes[0].set_ylabel("ODI, network")
plt.show()

# %% [markdown]
# On your own scan: `jaxmed noddi fit --dwi dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec --mask mask.nii.gz --out
# runs/subject`.

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
# # TANGERINE: learning chest CT from what is hidden
#
# A masked autoencoder sees a quarter of a scan's patches and has to fill in the rest. Nobody labels anything, and yet
# its encoder learns where lungs end, how large they are, and what lies in them. This notebook trains a small one on
# phantom chests and looks at what it knows.

# %%
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.models.heads import pool_tokens
from jaxmed.models.mae import FROZEN, masked_model, small_mae
from jaxmed.models.vit import Vit
from jaxmed.nn.model import make_model
from jaxmed.objectives.masked import masked_loss
from jaxmed.recipes.pretrain_mae import reconstruct
from jaxmed.synthesis.phantoms.chest import FINDINGS, finding_flags, make_chest
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

# %% [markdown]
# ## Chests with known findings
#
# The same key gives the same anatomy, so that healthy and ill differ only by the finding. Coronal slices where the
# finding is largest, window -1200 to 800 HU, as the model sees them.

# %%
EDGE = 32
scan = jax.jit(lambda key, flags: make_chest(key, flags, (EDGE,) * 3))


def window(chest):
    return np.clip((np.asarray(chest.array) + 1200) / 2000, 0, 1)


fig, axes = plt.subplots(1, 5, figsize=(11, 2.5), layout="constrained")
for ax, name in zip(axes, ("healthy", *FINDINGS), strict=True):
    chest = scan(jax.random.key(4), finding_flags() if name == "healthy" else finding_flags(name))
    middle = EDGE // 2 if name == "healthy" else int(chest.masks.sum(axis=(0, 1, 3)).argmax())
    ax.imshow(window(chest)[:, middle].T, origin="lower", cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Many of them
#
# 400 chests; each finding is in half of them. The model's axes are slice, row, column.

# %%
flags = np.random.default_rng(0).random((400, len(FINDINGS))) < 0.5
keys = jax.random.split(jax.random.key(0), len(flags))
chests = [scan(key, flag) for key, flag in zip(keys, flags, strict=True)]
volumes = np.stack([window(chest).transpose(2, 1, 0) for chest in chests])[..., None]
litres = np.array([chest.lung.sum() for chest in chests]) * (320 / EDGE) ** 3 / 1e6

# %% [markdown]
# ## Train on what is hidden
#
# 64 patches of 8 x 8 x 8 voxels; the encoder sees 16 of them. The dotted line is the error of the mean chest: below it,
# the model knows something of the one in front of it.

# %%
config = small_mae(EDGE, 8, 96, 3)
model = masked_model(config)
mesh = make_mesh(MeshConfig(data=1))
optimizer = make_optimizer(OptimizerConfig(peak_lr=2e-3, b2=0.95, warmup_steps=60, frozen=FROZEN), 600)
state = create_state(jax.random.key(1), model.network.init, optimizer, mesh)
step = make_train_step(partial(masked_loss, model), optimizer, state=state, frozen=FROZEN)
order = np.random.default_rng(1).integers(0, 360, (600, 16))  # the last 40 chests are kept aside
losses = []
for rows in order:
    state, metrics = step(state, {"image": jnp.asarray(volumes[rows])})
    losses.append(metrics["loss"])
fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
ax.semilogy(np.array(losses))
ax.axhline(volumes[:360].var(axis=0).mean(), color="k", lw=0.8, ls=":")
ax.set(xlabel="step", ylabel="squared error of hidden voxels")
plt.show()

# %% [markdown]
# ## What it fills in
#
# A chest that it was not trained on: as it is, what the encoder sees, and what the decoder makes of it.

# %%
picture = reconstruct(model, state.params, jax.random.key(2), volumes[-1])
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
for ax, name in zip(axes, ("image", "seen", "completed"), strict=True):
    ax.imshow(getattr(picture, name)[:, EDGE // 2, :, 0], origin="lower", cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
plt.show()
explained = 1 - picture.error / picture.variance
print(f"error {picture.error:.4f}, a constant {picture.variance:.4f}: {explained:.0%} explained")

# %% [markdown]
# ## What its features know
#
# The mean of the patch tokens of whole scans, projected on their two main directions; colours tell the volume of the
# lungs, which nobody told the model.

# %%
encoder = make_model(Vit(dataclasses.replace(config.encoder, final_norm=False)))
weights = {name: leaf for name, leaf in state.params["encoder"].items() if name != "norm"}
features = np.asarray(jax.jit(lambda images: pool_tokens(encoder.apply(weights, images)).pooled)(volumes))
centred = features - features.mean(axis=0)
directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
places = centred @ directions.T
fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
dots = ax.scatter(*places.T, c=litres, s=12)
fig.colorbar(dots, label="lung volume (litres)")
ax.set(xlabel="first direction", ylabel="second direction")
plt.show()
ranks = [values.argsort().argsort() for values in (places[:, 0], litres)]
print(f"rank correlation of the first direction with lung volume: {abs(np.corrcoef(*ranks)[0, 1]):.2f}")

# %% [markdown]
# On your own scans: `jaxmed tangerine pretrain --input FOLDER --out runs/mae`, then `jaxmed tangerine adapt
# --data.manifest scans.csv --weights runs/mae/outputs/model --out runs/task`. Published weights:
# `jaxmed weights list`.

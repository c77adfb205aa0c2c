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
# # RETFound study: what pre-training is worth, and what it is not
#
# Generalist encoders have seen everything, specialists only eyes. Which one needs fewer labels? Published studies
# answer with large models. This notebook pre-trains a small one on phantom eyes and gives it the rival that is easily
# left out: the same encoder with random weights. Here the rival wins, and two figures hint at why.

# %%
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.metrics.classification import auroc
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.vit import FROZEN, VitConfig, vit_encoder
from jaxmed.objectives.masked import masked_loss
from jaxmed.recipes.pretrain_mae import reconstruct
from jaxmed.recipes.probe import fit_probe
from jaxmed.synthesis.phantoms.retina import make_retina
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

# %% [markdown]
# ## Eyes with known grades
#
# The same key gives the same eye; a higher grade adds haemorrhages (dark) and exudates (bright). In hypertension the
# vessels wind.

# %%
EDGE = 48
draw = jax.jit(jax.vmap(partial(make_retina, edge=EDGE)))
keys = jnp.repeat(jax.random.key(3)[None], 6)
grades, winding = jnp.array([0, 1, 2, 3, 4, 0]), jnp.array([False] * 5 + [True])
shown = draw(keys, grades, winding, jnp.ones(6, bool)).array
fig, axes = plt.subplots(1, 6, figsize=(11, 2.2), layout="constrained")
for ax, image, name in zip(axes, shown, [*(f"grade {g}" for g in range(5)), "hypertension"], strict=True):
    ax.imshow(image)
    ax.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A cohort
#
# 600 eyes of other subjects: 300 that may have labels, 100 to choose by, 200 to test on. What is to be learnt is
# whether an eye should be referred: grade 2 or above.

# %%
rng = np.random.default_rng(0)
graded = rng.integers(0, 5, 600)
referred = (graded >= 2).astype(np.float32)[:, None]
winds, right = jnp.asarray(rng.random((2, 600)) < 0.5)
cohort = draw(jax.random.split(jax.random.key(0), 600), jnp.asarray(graded), winds, right)
eyes = np.asarray(cohort.array - cohort.array.mean()) / np.asarray(cohort.array.std())
train, choose, test = np.split(np.arange(600), [300, 400])

# %% [markdown]
# ## Pre-train without labels
#
# A masked autoencoder hides three quarters of the patches and fills them in; each patch is brought to mean 0 and
# variance 1 first, so that a constant has an error of 1 (dotted).

# %%
config = MaeConfig(
    VitConfig((EDGE, EDGE), (6, 6), 3, width=96, depth=3, heads=3, hidden=384),
    decoder_width=64,
    decoder_depth=1,
    decoder_heads=2,
    decoder_hidden=128,
    norm_target=True,
    sigmoid=False,
)
model, mesh, steps = masked_model(config), make_mesh(MeshConfig(data=1)), 200
optimizer = make_optimizer(OptimizerConfig(peak_lr=3e-3, b2=0.95, warmup_steps=20, frozen=FROZEN), steps)
state = create_state(jax.random.key(1), model.network.init, optimizer, mesh)
drawn = jax.device_get(state.params["encoder"])
step = make_train_step(partial(masked_loss, model), optimizer, state=state, frozen=FROZEN)
losses = []
for rows in rng.integers(0, len(train), (steps, 16)):
    state, metrics = step(state, {"image": jnp.asarray(eyes[rows])})
    losses.append(metrics["loss"])
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
ax.plot(np.array(losses))
ax.axhline(1, color="k", lw=0.8, ls=":")
ax.set(xlabel="step", ylabel="error of hidden pixels", ylim=0)
plt.show()

# %% [markdown]
# ## How many labels does a probe need?
#
# A logistic regression on frozen features, its penalty chosen on the 100 eyes: with a fixed one the comparison would
# be of penalties. Left: the mean of the patch tokens, which is what RETFound's masked autoencoder is adapted on. Right:
# mean and standard deviation over the patches. Thin lines are three draws of the labelled eyes.

# %%
encoder = vit_encoder(dataclasses.replace(config.encoder, final_norm=False))
tokens_of = jax.jit(lambda params, images: encoder.apply(params, images)[:, 1:])
given = {"pre-trained": state.params["encoder"], "random": drawn}
tokens = {name: np.asarray(tokens_of({k: v for k, v in p.items() if k != "norm"}, eyes)) for name, p in given.items()}
pools = {
    "mean of the patches": lambda x: x.mean(1),
    "mean and spread": lambda x: np.concatenate([x.mean(1), x.std(1)], 1),
}
counts = (20, 50, 100, 300)


def probe(found, labelled):
    fitted = fit_probe(
        "binary", found[labelled], referred[labelled], found[choose], referred[choose], np.ones(1, np.float32)
    )
    return auroc(referred[test, 0].astype(int), (found[test] @ fitted.kernel)[:, 0])


fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), sharey=True, layout="constrained")
for ax, (title, pool) in zip(axes, pools.items(), strict=True):
    for name, color in zip(tokens, ("C0", "C1"), strict=True):
        found = pool(tokens[name])
        areas = np.array(
            [[probe(found, np.random.default_rng(s).permutation(train)[:n]) for n in counts] for s in range(3)]
        )
        ax.semilogx(counts, areas.T, color=color, lw=0.5, alpha=0.5)
        ax.semilogx(counts, areas.mean(0), color=color, lw=2, marker="o", label=name)
        print(
            f"{title}, {name}: AUROC {areas.mean(0)[1]:.2f} with {counts[1]} labels, {areas.mean(0)[-1]:.2f} with all"
        )
    ax.set(title=title, xlabel="labelled eyes", xticks=counts, xticklabels=counts)
    ax.minorticks_off()
axes[0].set(ylabel="AUROC on 200 other eyes")
axes[0].legend()
plt.show()

# %% [markdown]
# ## A likely reason: what the neighbours do not tell
#
# An eye of the test set, what the encoder sees of it, and what it fills in. Light, rim and optic disc come back, for
# their surroundings tell them. Dots lie anywhere: no neighbour predicts them, so no loss asks the encoder to keep them,
# while random weights throw nothing away. And a few dots among 64 patches hardly move a mean: the spread shows them.

# %%
ill = test[graded[test] == 4][0]
picture = reconstruct(model, state.params, jax.random.key(2), eyes[ill])
mean, spread = np.asarray(cohort.array.mean()), np.asarray(cohort.array.std())
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5), layout="constrained")
for ax, name in zip(axes, ("image", "seen", "completed"), strict=True):
    ax.imshow(np.clip(getattr(picture, name) * spread + mean, 0, 1))
    ax.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# So: put random weights beside every encoder that you compare, choose penalties on other eyes, and ask whether what you
# look for is what the pre-training has to keep. `jaxmed retfound compare --encoders retfound=A.pth dinov2=B.pth
# random=random --data.manifest images.csv --out runs/study` does all three, with tests; `jaxmed retfound pretrain
# --method dinov2` learns what two crops of an eye share instead. Published weights: `jaxmed weights list`.

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
# # ProFound: good scans are labels too
#
# A model is fine-tuned on the scans that a hospital has, good and bad, and used on others. How many of them have to be
# good? This notebook makes prostates with known lesions, makes some of them worse on purpose, measures that without a
# reference, and fine-tunes the same small network on sets that differ in nothing but their share of good scans.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.metrics.classification import auroc
from jaxmed.metrics.image_quality import measure_quality
from jaxmed.models.heads import HeadConfig
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.quality_findings import Grid, deployment_choice, mismatch_penalty, slope
from jaxmed.recipes.quality_grid import degrade_channels
from jaxmed.recipes.vmapped_fits import FitConfig, fit_runs, start_runs
from jaxmed.synthesis.phantoms.prostate import make_prostate
from jaxmed.train.optimizer import OptimizerConfig

# %% [markdown]
# ## Three sequences, one lesion
#
# A lesion is dark on T2w, bright on a diffusion image of a high b-value, dark on the map of diffusion coefficients; its
# contrast is its grade, here 4. One slice of each case is enough: that through the middle of the lesion. The lower row
# is the same case made worse: distorted, blurred, with ghosts and noise.

# %%
SHAPE = (32, 32, 8)


def draw_slice(key, grade):
    middle = make_prostate(key, 4, SHAPE).lesion.sum((0, 1)).argmax()  # where it would be, whatever the grade
    images = make_prostate(key, grade, SHAPE).images[:, :, middle]
    return jnp.flip(images, 1).swapaxes(0, 1)  # rows from front to back


worsen = partial(degrade_channels, kind="low-quality", spacing=(), is_magnitude=True)
draw = jax.jit(jax.vmap(draw_slice))
spoil = jax.jit(jax.vmap(worsen))
keys, grades = jax.random.split(jax.random.key(0), 300), jnp.arange(300) % 2
good = draw(keys, grades)
bad = spoil(keys, good, jnp.ones(300))
case = draw(keys[:1], jnp.array([4]))
pair = {"good": case[0], "bad": spoil(keys[:1], case, jnp.ones(1))[0]}
fig, axes = plt.subplots(2, 3, figsize=(6, 4.2), layout="constrained")
for row, (word, images) in zip(axes, pair.items(), strict=True):
    for ax, name, image in zip(row, ("T2w", "high b", "ADC"), np.moveaxis(np.asarray(images), -1, 0), strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.5))
        ax.set(title=f"{name}, {word}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What a file tells of its own quality
#
# Noise, blur and ghosts leave traces that need no better scan to compare with. The score of the T2w slices of twenty
# cases falls with the strength of what was done to them. `jaxmed profound quality` gives it for files, `adapt` keeps
# the scores of what it was tuned on beside the model, and `predict` warns of scans that lie outside.

# %%
strengths = jnp.linspace(0, 1, 6)
score = jax.jit(jax.vmap(lambda image: measure_quality(image).score))
scores = np.stack([score(spoil(keys[:20], good[:20], jnp.full(20, s))[..., 0]) for s in strengths], 1)
fig, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
ax.plot(strengths, scores.T, color="C0", lw=0.5, alpha=0.5)
ax.plot(strengths, scores.mean(0), color="C0", lw=2, marker="o")
ax.set(xlabel="strength of the degradation", ylabel="score", ylim=0)
plt.show()

# %% [markdown]
# ## Nine small trainings in one program
#
# Fine-tuning sets of 60 cases with no, half and all good scans, three seeds each: the same cases, so that neither
# number nor labels differ, and the same for the test sets. What is learnt is whether there is a lesion, of grade 1: a
# quarter of the contrast above, on T2w alone: with stronger lesions, or the diffusion image, every set was enough.

# %%
SHARES, SEEDS = (0.0, 0.5, 1.0), 3
rng = np.random.default_rng(0)
train, test = np.arange(60), np.arange(60, 300)
label = np.asarray(grades, np.float32)[:, None]
mean, spread = good.mean((0, 1, 2)), good.std((0, 1, 2))
both = np.asarray((jnp.concatenate([good, bad]) - mean) / spread)[..., :1]  # record i good, record 300 + i bad


def mixture(rows, share, seed):
    order = np.random.default_rng(seed).permutation(rows)
    return np.where(np.arange(len(rows)) < share * len(rows), order, order + 300)


runs = [(share, seed) for share in SHARES for seed in range(SEEDS)]
chances = np.zeros((len(runs), 600), np.float32)
for number, (share, seed) in enumerate(runs):
    chances[number, mixture(train, share, seed)] = 1
encoder = vit_encoder(VitConfig((32, 32), (8, 8), 1, width=32, depth=2, heads=2, hidden=64, final_norm=False))
head = HeadConfig(1, "mean")
fit = FitConfig(150, 16, OptimizerConfig(peak_lr=3e-3, warmup_steps=15, weight_decay=0.05), shift=1)
seeds = jax.vmap(jax.random.key)(jnp.array([seed for _, seed in runs]))
start = start_runs(encoder, head, seeds, None, np.zeros(len(runs), bool))
tested = np.concatenate([test, test + 300])
logits = fit_runs(
    fit, encoder, head, "binary", both, np.concatenate([label, label]), chances, start, seeds, both[tested]
)

# %% [markdown]
# ## What the share of good scans does
#
# Rows are what a model was tuned on, columns what it is tested on. Two numbers sum it up: the slope down the last
# column, and what a mismatch between the two costs.

# %%
place = {int(row): number for number, row in enumerate(tested)}
values = np.zeros((SEEDS, len(SHARES), len(SHARES)))
for number, (share, seed) in enumerate(runs):
    for column, other in enumerate(SHARES):
        rows = mixture(test, other, 100)
        found = logits[number, [place[int(row)] for row in rows], 0]
        values[seed, SHARES.index(share), column] = auroc(label[rows % 300, 0].astype(int), found)
grid = Grid(values, SHARES, SHARES)
fig, ax = plt.subplots(figsize=(3.6, 3), layout="constrained")
ax.imshow(values.mean(0), cmap="viridis", origin="lower")
for (row, column), value in np.ndenumerate(values.mean(0)):
    ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="w")
names = [f"{share:.0%}" for share in SHARES]
ax.set(xlabel="good scans in testing", ylabel="in fine-tuning", xticks=range(3), yticks=range(3))
ax.set(xticklabels=names, yticklabels=names, title="AUROC, mean of 3 seeds")
plt.show()
print(f"from none to all good, tested on good ones: {slope(grid).mean():+.3f}")
print(f"a mismatch costs: {mismatch_penalty(grid).mean():+.3f}")

# %% [markdown]
# ## What to tune on for a hospital
#
# Where 30 % of the scans are good, which share should a fine-tuning set have? The choice is that of the best row at
# that column, and its gain over a set as good as the hospital's own scans has an interval over the seeds.

# %%
chosen, gain = deployment_choice(grid, 0.3, 0.3)
print(f"fine-tune with {chosen:.0%} good scans: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] in AUROC")

# %% [markdown]
# Three seeds of a small network on phantoms say how to ask, not what the answer is. `jaxmed profound quality-study`
# asks it of your manifest and weights: five shares, six numbers of labels, pre-trained and from scratch, patients
# resampled for the intervals; with `--data.deployment` it writes the subset, or weights, for `jaxmed profound adapt
# --data.weight`, and says what either gains.

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
# # MUPM: which input a model's doubt comes from
#
# Ask a multimodal model the same question about a patient many times: with the picture moved a little, with the record
# in other words, with both. Its answers change. How the three variances V_I, V_T and V belong together is what the
# propagation model says: V = b1 V_I + b2 V_T + b3 C. This notebook shows what is varied, where the formula is exact,
# how much a few draws blur it, and how well it predicts the joint variance of cases that it has not seen.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.data.option_answers import block_of
from jaxmed.synthesis.image_moves import ImageConfig, perturb_images
from jaxmed.synthesis.phantoms.cine import CONDITIONS, beating_heart, draw_record
from jaxmed.synthesis.phantoms.stand_in import stand_in_probabilities
from jaxmed.synthesis.record_texts import facts_of, question, render
from jaxmed.systems import mupm

# %% [markdown]
# ## What is varied
#
# A beating heart of ellipses, in another phase, moved, turned and zoomed within the released ranges, with noise. And
# the record of a person who never was: the same facts in other sentences. Nothing that a physician would read from
# either has changed.

# %%
rng, draws = np.random.default_rng(0), 20
move = jax.jit(lambda keys, cine: perturb_images(keys, cine, (1.0, 1.0), ImageConfig()))
cine = beating_heart(rng, "heart failure")
moved = np.asarray(move(jax.random.split(jax.random.key(0), draws), jnp.asarray(cine)))
fig, axes = plt.subplots(1, 5, figsize=(7.5, 1.8), layout="constrained")
for ax, name, image in zip(axes, ("stored", *"1234"), (cine[0], *moved[:4]), strict=True):
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
plt.show()
facts = facts_of(draw_record(rng, "heart failure"))
for _ in range(2):
    print(render(rng, facts), "\n")

# %% [markdown]
# ## Where the formula is exact
#
# Let an answer be a x_I + b x_T, with perturbations of unit variance and correlation rho. Then V_I = a², V_T = b² and
# V = V_I + V_T + 2 rho sqrt(V_I V_T): with the released C = sqrt(V_I V_T) the coefficients are 1, 1 and 2 rho. Fifty
# cases of eleven classes, and the fit of `mupm.fit`; the fewer the draws, the more the estimates scatter.


# %%
def measured(rng, draws, rho):
    a, b = rng.uniform(0.2, 1.0, (2, 50, 11, 1))
    x, y, z, w = rng.standard_normal((4, 50, 11, draws))
    both = a * z + b * (rho * z + np.sqrt(1 - rho**2) * w)
    v_image, v_text, v = (part.var(axis=-1, ddof=1) for part in (a * x, b * y, both))
    return v_image, v_text, np.sqrt(v_image * v_text), v


fit = jax.jit(mupm.fit)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True, layout="constrained")
for ax, rho in zip(axes, (0.0, 0.5), strict=True):
    for place, count in enumerate((20, 200, 2000)):
        found = np.array([fit(*measured(rng, count, rho)).coefficients for _ in range(10)])
        ax.plot(np.arange(3) + 0.2 * (place - 1), found.T, f"C{place}.", alpha=0.6)
        ax.plot([], [], f"C{place}.", label=f"{count} draws")
    ax.hlines([1, 1, 2 * rho], np.arange(3) - 0.4, np.arange(3) + 0.4, color="k", lw=0.8)
    ax.set(title=f"rho = {rho}", xticks=range(3), xticklabels=["b1 (V_I)", "b2 (V_T)", "b3 (C)"])
axes[0].set_ylabel("coefficient")
axes[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# With twenty draws, as the release has, b1 and b2 are pulled down and b3 up: V_I and V_T are measured with error, and C
# is made of both. The three predictors are not independent, so coefficients are no sensitivities. That is why
# `jaxmed mupm propagate` shows the variance inflation beside them.

# %% [markdown]
# ## Asking a model
#
# `jaxmed mupm answer` asks any model behind an endpoint, LLaVA, or a small model that it trains on such hearts. Here
# the stand-in answers: fixed random sums over picture and words, softmax at the end. What it says of a patient is
# chance; that its answers change smoothly with both inputs is all that is needed here.

# %%
cases = 40
shares = np.zeros((cases, 3, draws, len(CONDITIONS)), np.float32)
for case in range(cases):
    condition = CONDITIONS[case % 3]
    cine, facts = beating_heart(rng, condition), facts_of(draw_record(rng, condition, 0.4))
    one, other = jax.random.split(jax.random.key(case))
    moved, again = (np.asarray(move(jax.random.split(key, draws), jnp.asarray(cine))) for key in (one, other))
    words = [f"{render(rng, facts)} {question(rng, 'in 5 years', block_of(CONDITIONS))}" for _ in range(2 * draws)]
    for draw in range(draws):
        for branch, image, text in ((0, moved[draw], words[0]), (1, cine[0], words[draw]),
                                    (2, again[draw], words[draws + draw])):  # fmt: skip
            shares[case, branch, draw] = stand_in_probabilities(image, text, len(CONDITIONS))
v_image, v_text, v = shares.var(axis=2, ddof=1).swapaxes(0, 1)
found = mupm.fit(v_image, v_text, np.sqrt(v_image * v_text), v)
print("coefficients", np.round(found.coefficients, 2), "variance inflation", np.round(found.vif, 1))

# %% [markdown]
# ## Cases that the fit has not seen
#
# Fitted on half of the cases, the model predicts V of the others from V_I and V_T alone: no joint question is asked
# about them, 41 calls of the model in place of 63. On the right, how the fit does on the rest when only a few cases
# were fitted: the line is the median of fifty subsets, the band holds the middle half.
#
# It is no good fit: perturbations of the released size move these answers far from a straight line, which the formula
# takes for granted, and twenty draws blur what is to be predicted. Look at R² of unseen cases before you rely on it.

# %%
half = np.arange(cases) < cases // 2
some = mupm.fit(v_image[half], v_text[half], np.sqrt(v_image * v_text)[half], v[half]).coefficients
design = np.stack([v_image, v_text, np.sqrt(v_image * v_text)], -1)
predicted = design @ np.asarray(some)
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
axes[0].plot(v[~half].sum(1), predicted[~half].sum(1), ".")
axes[0].axline((0, 0), slope=1, color="k", lw=0.8)
axes[0].set(xlabel="V measured, sum over options", ylabel="V predicted")
counts, r2 = (2, 3, 5, 10, 20), []
for count in counts:
    rows = []
    for _ in range(50):
        kept = rng.permutation(cases) < count
        beta = np.linalg.lstsq(design[kept].reshape(-1, 3), v[kept].ravel(), rcond=None)[0]
        error, rest = (design[~kept] @ beta - v[~kept]).ravel(), v[~kept].ravel()
        rows.append(1 - (error**2).sum() / ((rest - rest.mean()) ** 2).sum())
    r2.append(np.percentile(rows, [25, 50, 75]))
low, middle, high = np.array(r2).T
axes[1].plot(counts, middle, marker="o")
axes[1].fill_between(counts, low, high, alpha=0.3)
axes[1].set(xlabel="cases fitted on", ylabel="R² on the others", xscale="log", xticks=counts, xticklabels=counts,
            ylim=(0, 1))  # fmt: skip
axes[1].minorticks_off()
plt.show()

# %% [markdown]
# ## Where to go on
#
# `jaxmed mupm perturb`, `answer`, `propagate`, `transfer` and `redundancy` do this for your cases and your model, with
# intervals over subjects. `benchmarks/reproduce_mupm.py` trains a small model and tests the abstract's sentences on it.
# A model's small variance says that its answer is stable, not that it is right: `propagate` shows the two side by side
# where the right answers are known.

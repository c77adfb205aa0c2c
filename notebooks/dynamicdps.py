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
# # DynamicDPS: enhance a scan without inventing anatomy
#
# A network that turns a poor scan into a sharp one may draw what is not there. DynamicDPS takes its image as a start,
# adds some noise, and walks back with a diffusion prior, held to the measurement by gradient steps whose length a line
# search finds. Here everything is small enough to look inside: phantom brains of 24 x 24 voxels, a conditional model
# that has learnt a shortcut, and a prior that is known in closed form instead of trained.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.dynamicdps import STRICT
from jaxmed.diffusion.posterior.start_time import StartTime, choose_start
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.synthesis.phantoms.brain import make_brain
from jaxmed.synthesis.phantoms.mixture import denoise, make_isotropic
from jaxmed.synthesis.phantoms.shortcut import SMALL, lesion_error, make_case
from jaxmed.systems import dynamicdps

# %% [markdown]
# ## Brains with a lesion, a cue, both or neither
#
# The bright spot in the cortex is the cue. In the world, lesions (20 %) and cues (30 %) have nothing to do with each
# other. The low-field scanner halves the resolution, blurs and adds noise.

# %%
task = dataclasses.replace(SMALL, size=(24, 24))
quiet = dataclasses.replace(task.brain, texture=0.0, noise=0.0)
keys = jax.random.split(jax.random.key(1), 12)
make = jax.jit(jax.vmap(lambda key, lesion, cue: make_brain(key, lesion, cue, task.size, quiet)))
brains = {(a, b): make(keys, jnp.full(12, a), jnp.full(12, b)) for a in (False, True) for b in (False, True)}
fig, axes = plt.subplots(1, 5, figsize=(9, 2.1), layout="constrained")
shown = {f"lesion {a}, cue {b}": brain.image[0] for (a, b), brain in brains.items()}
shown["measured"] = task.operator(brains[True, True].image[0][..., None])[..., 0]
for ax, (title, image) in zip(axes, shown.items(), strict=True):
    ax.imshow(np.asarray(image).T, origin="lower", cmap="gray", vmin=0, vmax=2)
    ax.set_title(title, size=8)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A conditional model that learns a shortcut
#
# Its training pairs have cue and lesion, or neither, and the low-field image does not show the lesion. Linear
# regression is enough to learn that a bright spot means a lesion beside it. The test cases have the spot and no lesion.

# %%
spread, noise = 0.03, task.acquisition.noise
rng = np.random.default_rng(3)
measure = jax.jit(jax.vmap(task.operator))
pairs = [(brains[flag, flag].image, brains[False, flag].image) for flag in (False, True)] * 40
high, hidden = (np.concatenate([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
texture = spread * rng.normal(size=high.shape)
low = np.asarray(measure(jnp.asarray((hidden + texture)[..., None], jnp.float32)), np.float64)
low = (low + noise * rng.normal(size=low.shape)).reshape(len(low), -1)
center, target = low.mean(0), (high + texture).reshape(len(high), -1)
dual = np.linalg.solve((low - center) @ (low - center).T + 5 * np.eye(len(low)), target - target.mean(0))
matrix = (low - center).T @ dual


def conditional(measurement):
    """Return what the regression makes of measurements."""
    flat = np.asarray(measurement, np.float64).reshape(len(measurement), -1)
    return jnp.asarray(((flat - center) @ matrix + target.mean(0)).reshape(measurement.shape), jnp.float32)


# %% [markdown]
# ## The prior
#
# Twelve subjects times four combinations, each with a little texture: a mixture of 48 Gaussians. Noise it to time t and
# the expected clean image is a formula. A real prior is a network that has learnt this from scans.

# %%
schedule = VpDiscrete()
weights = jnp.concatenate([jnp.full(12, (0.2 if a else 0.8) * (0.3 if b else 0.7)) for a, b in brains])
means = jnp.concatenate([brain.image.reshape(12, -1) for brain in brains.values()])
mixture = make_isotropic(weights, means, jnp.full(len(means), spread))


def expected(x, t):
    """Return E[x_0 | x_t = x]."""
    return denoise(mixture, x.reshape(len(x), -1), schedule.alpha(t), schedule.sigma(t)).reshape(x.shape)


prior = Denoiser(expected, schedule)
cases = jax.jit(jax.vmap(lambda key, brain: make_case(key, brain, jnp.clip(brain.image, 0, 2), task)))(
    jax.random.split(jax.random.key(2), 12), brains[False, True]
)
estimate = jnp.clip(conditional(cases.measurement), 0.0, 2.0)

# %% [markdown]
# ## Refine
#
# `dynamicdps.enhance` takes any differentiable function as the operator. It stops once the image fits as well as the
# noise allows.


# %%
@jax.jit
def refine(key, start):
    """Run DynamicDPS from the conditional model's images, noised to a step."""
    config = dataclasses.replace(STRICT, start=StartTime(rule="fixed", fixed=99), noise_std=noise)
    return dynamicdps.enhance(key, prior, cases.measurement, task.operator, start, config)


refined, info = refine(jax.random.key(5), estimate)
fig, axes = plt.subplots(1, 4, figsize=(9, 2.4), layout="constrained")
for ax, (title, image) in zip(
    axes,
    {"truth": cases.image, "measured": cases.measurement, "conditional": estimate, "DynamicDPS": refined}.items(),
    strict=True,
):
    ax.imshow(np.asarray(image[0, ..., 0]).T, origin="lower", cmap="gray", vmin=0, vmax=2)
    ax.contour(np.asarray(cases.lesion[0]).T, levels=[0.5], colors="tab:red", linewidths=0.8)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()
for name, image in (("conditional", estimate), ("DynamicDPS", refined)):
    error = jax.vmap(lesion_error)(cases, image).mean()
    residual = jnp.linalg.norm((measure(image) - cases.measurement).reshape(12, -1), axis=1).mean()
    print(f"{name}: error of the lesion's contrast {error:.3f}, residual {residual:.2f}")

# %% [markdown]
# ## How far back?
#
# An estimate that contradicts its measurement has to be noised further before the prior can put it right. The released
# rule looks the residual up in a bank of full runs. Here is where estimates would start with the bank of the paper's
# code, as a function of their residual, and what the line search chose on the way down.

# %%
residuals = jnp.linspace(0.1, 60, 300)
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for rule in ("monotone", "repo"):
    axes[0].plot(residuals, choose_start(residuals, StartTime(rule=rule)), label=rule)
axes[0].set(xlabel="residual of the estimate", ylabel="start (steps left of 1000)")
axes[0].legend(frameon=False)
# The image that took longest; the others fitted their measurements earlier.
last = int(np.isfinite(np.asarray(info.residuals)).sum(0).argmax())
walked = np.isfinite(np.asarray(info.residuals)[:, last])
left = np.arange(1000)[::-1][walked]
axes[1].plot(left, np.asarray(info.residuals)[walked, last], label="residual")
axes[1].plot(left, np.asarray(info.step_sizes)[walked, last], label="step size")
axes[1].axhline(noise * np.sqrt(24 * 24), color="gray", linestyle=":", label="noise")
axes[1].set(xlabel="steps left", xlim=(left.max(), left.min()))
axes[1].legend(frameon=False)
plt.show()
print(f"{np.asarray(info.evaluations).mean():.0f} evaluations of the prior per image; full DPS takes 1000")

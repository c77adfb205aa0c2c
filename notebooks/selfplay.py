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
# # Self-play reasoning: thinking fast and slow about a mask
#
# System I draws a mask at once, and a verifier says how good a mask is. System II lets two players propose changes, the
# verifier judges, the better proposal stays, and the policy learns from who wins. This notebook trains a tiny System I
# on procedural puzzles, corrupts its answer, and thinks.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.models.policy import TopkUnetConfig
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.selfplay import SelfPlayConfig
from jaxmed.synthesis.phantoms.puzzles import FAMILIES, make_puzzle
from jaxmed.systems import selfplay
from jaxmed.systems.selfplay import system_one
from jaxmed.systems.selfplay.thinking import ThinkConfig
from jaxmed.systems.selfplay.verifier import calibrate

# %% [markdown]
# ## Puzzles
#
# Discs, rings, squares, crosses and bars at random places, with distractors, a bias field and noise.

# %%
draw = jax.jit(jax.vmap(lambda key, family: make_puzzle(key, family, (16, 16))))
families = jnp.arange(256) % 5
images, masks = draw(jax.random.split(jax.random.key(0), 256), families)

fig, axes = plt.subplots(1, 5, figsize=(9, 2), layout="constrained")
for number, ax in enumerate(axes):
    ax.imshow(images[number], cmap="gray", vmin=0, vmax=1)
    ax.contour(masks[number], [0.5], colors="orange", linewidths=1)
    ax.set_title(FAMILIES[number], fontsize=9)
    ax.set_axis_off()
plt.show()

# %% [markdown]
# ## System I
#
# Reptile: a few steps on one task, then both networks move a share of the way. The verifier learns the overlap (Dice)
# of true, generated, corrupted and flattering masks.

# %%
config = system_one.SystemOneConfig(
    GeneratorConfig("plain", widths=(16, 16)), VerifierConfig("plain", widths=(8, 16), dense=(32,))
)
meta = system_one.MetaConfig(inner_steps=2, epsilon=0.5, rate=3e-3)
params = system_one.init_params(jax.random.key(1), config, (16, 16))
state = system_one.init_meta(jax.random.key(2), config, meta, params)
history = []
for number in range(40):
    of_task = np.random.default_rng(number).choice(np.flatnonzero(families == number % 5), (16, 2))
    batch = {"image": images[of_task], "mask": masks[of_task].astype(jnp.float32)}
    state, metrics = system_one.meta_step(config, meta, state, batch)
    history.append(float(metrics["overlap"]))
system = system_one.SystemOne(config, state.params)

plt.figure(figsize=(6, 2.4), layout="constrained")
plt.plot(history)
plt.xlabel("tasks seen")
plt.ylabel("Dice of the generator")
plt.show()

# %% [markdown]
# ## Can the verifier be trusted?
#
# Thinking finds what the verifier likes. So before thinking: do its scores rank corrupted masks as their Dice does?

# %%
new_images, new_masks = draw(jax.random.split(jax.random.key(9), 4), jnp.zeros(4, jnp.int32))
found = calibrate(jax.random.key(3), system, new_images, new_masks)
system = system._replace(temperature=found.temperature)

plt.figure(figsize=(4, 3), layout="constrained")
plt.plot(found.overlaps.ravel(), found.scores.ravel(), ".")
plt.xlabel("Dice of corrupted masks")
plt.ylabel("verifier's score")
plt.title(f"Spearman {found.rank:.2f}")
plt.show()

# %% [markdown]
# ## Think
#
# The score can only rise: the answer is the best mask that was seen. Whether Dice rises with it is the verifier's
# doing. A verifier as small and as briefly trained as this one is soon exploited, which is what to look for. By default
# thinking weighs System I's own evidence against that (`prior_weight`); here the verifier alone is followed.

# %%
play = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True, flips=3), games=16, steps=16)
settings = ThinkConfig(play=play, policy=TopkUnetConfig(widths=(8,), value_width=8), prior_weight=0.0)
thought = selfplay.think(jax.random.key(4), system, new_images, budget=1024, config=settings)


def dice(estimate):
    both = (estimate & np.asarray(new_masks)).sum((1, 2))
    return 2 * both / (estimate.sum((1, 2)) + new_masks.sum((1, 2)))


fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
axes[0].plot(thought.trace.steps, thought.trace.values)
axes[0].set_ylabel("score, each image")
axes[1].plot(thought.trace.steps, [dice(each) for each in thought.trace.masks])
axes[1].set_ylabel("Dice, each image")
for ax in axes:
    ax.set_xlabel("steps of the game")
plt.show()

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.4), layout="constrained")
for number, ax in enumerate(axes):
    ax.imshow(new_images[number], cmap="gray", vmin=0, vmax=1)
    for mask, color in ((new_masks, "orange"), (thought.first, "deepskyblue"), (thought.masks, "red")):
        if mask[number].any():
            ax.contour(mask[number], [0.5], colors=color, linewidths=1)
    ax.set_axis_off()
fig.suptitle("true (orange), System I (blue), after thinking (red)", fontsize=9)
plt.show()

"""Self-play reasoning: a segmentation that gets better the longer it is thought about.

Paper: Saeed et al., "Reasoning in machine vision: learning to think fast and slow", arXiv:2506.22075; published as
"Reasoning in machine vision by learning fast and slow thinking", Nature Communications, 2026.

System I answers at once: a generator draws a mask, a verifier says how good a mask is. Both are trained on many
familiar tasks, and adapted to a new one by a few labelled images. System II thinks: two players propose changes of the
mask, the verifier judges, the better proposal stays, and the policy learns from who wins - at inference, without
labels. The answer is the best mask that was seen, and can be had at any time.

In:  images (NIfTI, PNG, .npy) with masks of familiar tasks; 4 to 16 labelled images of a new one; images of the new
     task to think about, in 2D slices or 3D patches; a budget in steps or seconds.
Out: a mask on the grid of each file, a map of how far the players agree, the verifier's score over thinking time, who
     proposed what.

Stages:
  1. jaxmed selfplay meta-train --data.manifest tasks.csv --out runs/meta      System I, by Reptile
  2. jaxmed selfplay train-policy --weights runs/meta --data.manifest tasks.csv --out runs/policy
     optional: System II's policy, taught on familiar tasks; for think and compare as --policy-weights runs/policy
  3. jaxmed selfplay adapt --weights runs/meta --data.manifest new.csv --out runs/adapted      a few labels; calibration
  4. jaxmed selfplay think --weights runs/adapted --input scans/ --out runs/masks       System II
     --game patch plays another game, for segmentation without outlines (RLSP, arXiv:2405.16628, IEEE TPAMI 2024): the
     image is cut into patches, two players name patches in turn, what is named is gone for both, and the one whose
     patch shows more of the object wins the turn; either may stop, which counts a hundredfold. The patches that a game
     has named are a mask of whole patches, which the verifier judges after every move
  5. jaxmed selfplay compare --weights runs/meta --data.manifest new.csv --out runs/compare
     thinking curves of self-play against random proposals, the verifier's gradient, System I and supervised networks;
     with --patch-game the patch game too

Manifests have the columns path, mask, task, subject and split (train and validation hold familiar tasks, support and
test a new one). Subjects are split, never slices. Thinking uses the images that it answers for, but no label of them.

Try it without data:  jaxmed selfplay think --preset smoke --out runs/think
From Python:          from jaxmed.systems import selfplay
                      thought = selfplay.think(key, system_one, image, budget=16_384)

What was read where: the bodies of the papers were not at hand. What is done is that of the authors' reference
implementation on digits; networks and settings for medical images are ours and marked as deviations where they stand.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.selfplay.thinking import think as think


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed selfplay` must not wait for jax."""
    if name == "think":
        from jaxmed.systems.selfplay.thinking import think

        return think
    raise AttributeError(name)

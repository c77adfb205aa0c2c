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
# # BrainFM: one network for every contrast, learnt from label maps
#
# Nobody has scans of the same brain in every contrast, resolution and quality. A generator has: it deforms a label map,
# gives every label a random intensity, and takes the picture as badly as scanners do. A network that has seen only such
# images has to learn anatomy, because nothing else stays the same. Here everything is small: phantom heads of
# ellipsoids, 16 voxels along each axis, seconds of training.

# %%
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxmed.config import to_record
from jaxmed.data.label_table import find_table
from jaxmed.data.subject_files import list_subjects
from jaxmed.data.subject_store import close_store, open_store, write_subject
from jaxmed.models.published.brainfm import PREPROCESS
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_brain import BrainUnetConfig, brain_unet
from jaxmed.objectives.brain import BrainLossConfig
from jaxmed.recipes.mni_space import make_locate
from jaxmed.solvers.registration import RegistrationConfig
from jaxmed.synthesis.brain import draw_of, generate
from jaxmed.synthesis.brain_draws import SYNTHETIC, GeneratorConfig
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.phantoms.write_heads import write_small_heads
from jaxmed.synthesis.resolution import ResolutionConfig
from jaxmed.systems import brainfm
from jaxmed.systems.brainfm.evaluation import robustness
from jaxmed.systems.brainfm.prediction import predict_input
from jaxmed.systems.brainfm.training import Grid, make_loss
from jaxmed.systems.brainfm.truth import read_labels
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state
from jaxmed.train.step import make_train_step

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## From label maps to a store
#
# A store holds what the generator needs of each subject in one or two bytes a voxel: labels to draw from, classes to
# learn, signed distances to the surfaces of the cortex, the place of every voxel in MNI space, and scans where there
# are any. What the files lack is computed. Your own folder of label maps takes the same road:
# `jaxmed brainfm generate --input LABELMAPS --out runs/images`.

# %%
table, locate = find_table("freesurfer"), make_locate((), RegistrationConfig(blurs=(1.5,), steps=40))
subjects = list_subjects(write_small_heads(folder, 0, 5), None)
for one in subjects:
    write_subject(folder / "store", one, table, locate)
close_store(folder / "store", subjects, table)
store = open_store(folder / "store")
subject, middle = store[0], int(store[0]["size"][2]) // 2


def show(pictures, titles, ranges, columns=6):
    """Draw axial slices in rows."""
    rows = -(-len(pictures) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(10, 2.1 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, picture, title, (colours, low, high) in zip(axes.flat, pictures, titles, ranges, strict=False):
        ax.imshow(np.asarray(picture).T, origin="lower", cmap=colours, vmin=low, vmax=high)
        ax.set_title(title, fontsize=8)
    plt.show()


GREY, SIGNED, CLASSES = ("gray", 0, 1), ("RdBu_r", -3, 3), ("nipy_spectral", 0, len(table.classes))
stored = [
    subject["segmentation"][:, :, middle],
    (subject["distances"][:, :, middle, 0] - 128.0) / 20,
    (subject["distances"][:, :, middle, 3] - 128.0) / 20,
    subject["coordinates"][:, :, middle, 0] / 100,
    subject["coordinates"][:, :, middle, 1] / 100,
    subject["images"][:, :, middle, 0] * subject["image_scale"][0] / 200,
]
titles = ["classes", "left pial surface, mm", "right white surface, mm", "MNI x, mm", "MNI y, mm", "its T1 scan"]
show(stored, titles, [CLASSES, SIGNED, SIGNED, ("RdBu_r", -90, 90), ("RdBu_r", -120, 90), GREY])

# %% [markdown]
# ## One head, many images
#
# The same label map under other keys: other deformation, contrast, slices, bias field and noise; now and then its own
# scan. Titles tell where an image comes from, and the spacing of its slices in mm.

# %%
deformation = DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, control_scale=(0.1, 0.2), amplitude=1.0)
gallery = GeneratorConfig((48, 56, 48), deformation=deformation, samples=2, mild_samples=1)
draw, describe = (jax.jit(functools.partial(function, config=gallery)) for function in (generate, draw_of))
pictures, titles = [], []
for key in jax.random.split(jax.random.key(3), 12):
    images, targets = draw(key, subject)
    drawn = describe(key, subject)
    pictures.append(images[1, :, :, 24, 0])
    source = "drawn" if int(drawn.source) == SYNTHETIC else "its scan"
    titles.append(f"{source}, " + " x ".join(f"{step:.2g}" for step in np.asarray(drawn.acquisition.resolution)))
show(pictures, titles, [GREY] * 12)

# %% [markdown]
# ## Mild and severe, and what there is to learn
#
# Both images of the last draw: one head, one deformation, one set of targets; the first image is taken well, the second
# badly. Targets move along with the head, each by its own rule: classes stay whole numbers, distances change with the
# scale, coordinates keep the value of the tissue.

# %%
pictures = [
    images[0, :, :, 24, 0], images[1, :, :, 24, 0], targets["segmentation"][:, :, 24], targets["distance"][:, :, 24, 0],
    targets["registration"][:, :, 24, 0], targets["bias_field_log"][1, :, :, 24, 0],
]  # fmt: skip
titles = ["mild", "severe", "classes", "left pial surface, mm", "MNI x, mm / 100", "log bias field of the second"]
show(pictures, titles, [GREY, GREY, CLASSES, SIGNED, ("RdBu_r", -0.9, 0.9), ("RdBu_r", -1, 1)])

# %% [markdown]
# ## Train: the generator is part of the step
#
# Every third voxel of four heads. Each step draws an image that no other step has seen, on the device, and all tasks
# share one feature per voxel. `jaxmed brainfm train --preset laptop` does this at 64 voxels in an hour.

# %%
EDGE, STEPS = 16, 120
generator = GeneratorConfig(
    (EDGE,) * 3, deformation=dataclasses.replace(deformation, amplitude=0.5, control_scale=(0.15, 0.2)),
    resolution=ResolutionConfig(photo_probability=0.0),
)  # fmt: skip
labels = tuple(row.label for row in table.classes)
config = BrainUnetConfig(
    width=8, levels=2, tasks=("segmentation", "T1", "distance", "registration", "bias_field_log"), labels=labels
)
network = brain_unet(config, generator.shape)
loss = make_loss(network.apply, config, generator, BrainLossConfig(clamp_distance=False), range(len(labels)))
optimizer = make_optimizer(OptimizerConfig(peak_lr=2e-2, warmup_steps=10, weight_decay=0.0, clip_norm=1.0), STEPS)
state = create_state(jax.random.key(0), network.init, optimizer, make_mesh(MeshConfig(data=1)))
step = make_train_step(loss, optimizer, state=state)
grid = Grid(3, EDGE)
batches = [
    jax.tree.map(lambda leaf: np.asarray(leaf)[None], grid(store[row], np.random.default_rng(0))) for row in range(4)
]
history = []
for number in range(STEPS):
    state, metrics = step(state, batches[number % 4])
    history.append({task: float(metrics[task]) for task in config.tasks})

fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
for task in config.tasks:
    line = np.array([row[task] for row in history])
    ax.semilogy(np.convolve(line / line[:10].mean(), np.ones(10) / 10, "valid"), label=task)
ax.set(xlabel="step", ylabel="loss, in that of the start")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Predict: a head that it has not seen
#
# A head that was not trained on, by its T1 scan. After 120 steps the network tells inside from outside and left from
# right, and hardly a structure: what to look at is which maps there are and how they are read. An hour of the laptop
# preset makes a network that segments.

# %%
preprocess = dataclasses.replace(PREPROCESS, size=generator.shape, spacing=(3.0,))
record = {"family": "brainfm", "kind": "maps", "config": to_record(config), "preprocess": to_record(preprocess)}
export_parameters(folder / "model", state.params, record)
published = load_published(folder / "model")
found = brainfm.predict(published, folder / "scans" / "head_0004.nii.gz")
middle = found.scan.volume.array.shape[2] // 2
names = ["input", "segmentation", "T1", "distance", "coordinates", "bias_field"]
ranges = [GREY, ("nipy_spectral", 0, 60), GREY, SIGNED, ("RdBu_r", -90, 90), ("viridis", 0.5, 1.5)]
maps = {"input": found.scan.volume.array, **found.maps}
show(
    [value[:, :, middle] if value.ndim == 3 else value[:, :, middle, 0] for value in (maps[name] for name in names)],
    names,
    ranges,
)

# %% [markdown]
# ## What worse scans change
#
# Dice with the label map, and by how many millimetres the regressed coordinates move, of the scan as it is and of worse
# versions of it: what `jaxmed brainfm predict --labels --robustness` tells of your scans.

# %%
truth = read_labels(found, folder / "labels" / "head_0004.nii.gz")
scores = robustness(found, truth, lambda image: predict_input(published, found.scan, image), jax.random.key(0))
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
for ax, name, title in zip(
    axes, ("dice", "coordinate_mm"), ("Dice, mean over classes", "coordinates move by, mm"), strict=True
):
    ax.barh([*scores], [row[name] for row in scores.values()])
    ax.set_title(title, fontsize=9)
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# On your own scans, with the published weights or a run of train: `jaxmed brainfm predict --input SCANS --weights
# runs/train/outputs/model --out runs/maps`.

"""The multi-task network on drawn images: the grid of subjects, variants, the step, and what is learnt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.arrays.trees import fitting
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.metrics.imaging import dice
from jaxmed.models.unet_brain import BRAINFM, LABELS, BrainUnetConfig, brain_unet
from jaxmed.objectives.brain import BrainLossConfig
from jaxmed.objectives.supervised import class_dice
from jaxmed.recipes.training import TrainConfig
from jaxmed.synthesis.bias_field import BiasFieldConfig
from jaxmed.synthesis.brain_draws import GeneratorConfig, Severity
from jaxmed.synthesis.contrast import ContrastConfig
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.resolution import Acquisition, ResolutionConfig, lower_resolution, restore_grid
from jaxmed.systems.brainfm.training import (
    VARIANTS,
    Grid,
    apply_variant,
    draw,
    make_loss,
    measures,
    teachable,
)

EDGE = 24
GENERATOR = GeneratorConfig(
    (16, 16, 16), (0.0, 0.0, 0.0, 0.0),
    deformation=DeformationConfig(rotation=10.0, shear=0.05, scaling=0.1, control_scale=(0.15, 0.2), amplitude=0.5),
    resolution=ResolutionConfig(photo_probability=0.0),
    severe=Severity(BiasFieldConfig((0.1, 0.2), (0.1, 0.4)), noise=(1.0, 6.0)),
)  # fmt: skip
TASKS = ("segmentation", "distance", "bias_field_log", "registration", "T1")
LABELLED = (0, 1, 2, 3, 4, 5)  # skull, then inner and outer of the left, and of the right
MODEL = BrainUnetConfig(width=8, levels=2, tasks=TASKS, labels=LABELLED)


def head(seed, edge=EDGE):
    """Return a subject: nested ellipsoids of two sides in a skull, with distances, coordinates and a T1 image."""
    rng = np.random.default_rng(seed)
    axes = np.linspace(-1, 1, edge)
    x, y, z = np.meshgrid(axes, axes, axes, indexing="ij")
    squeeze = rng.uniform(0.9, 1.1, 3)
    radius = np.sqrt((x / squeeze[0]) ** 2 + (y / squeeze[1]) ** 2 + (z / squeeze[2]) ** 2)
    inner, outer = rng.uniform(0.35, 0.45), rng.uniform(0.6, 0.7)
    side = np.where(x < 0, 0, 2)
    index = np.where(radius < 0.85, 1, 0)
    index = np.where(radius < outer, 3 + side, index)
    index = np.where(radius < inner, 2 + side, index)
    # Classes: background, skull, left inner, left outer, right inner, right outer.
    mm = [(radius - surface) * edge / 2 for surface in (outer, inner)]
    surfaces = np.stack([np.where(side == which, value, 20) for which in (0, 2) for value in mm], -1)
    table = np.array([0.0, 60, 200, 120, 200, 120])
    generation = np.array([0, 30, 2, 3, 2, 3])
    places = 100 * (np.stack([x, y, z], -1) * 80)
    return {
        "labels": generation[index].astype(np.uint8),
        "segmentation": index.astype(np.uint8),
        "distances": np.clip(np.rint(20 * surfaces + 128), 0, 255).astype(np.uint8),
        "coordinates": np.rint(places).astype(np.int16),
        "images": np.rint(table[index] + 4 * rng.normal(size=index.shape)).astype(np.int16)[..., None],
        "image_scale": np.ones(1, np.float32),
        "present": np.ones(1, bool),
        "defaced": np.zeros(index.shape, np.uint8),
        "size": np.full(3, edge, np.int32),
        "mirror": np.array([0, 1, 4, 5, 2, 3], np.uint8),
        "read": np.full(4, -1.0, np.float32),
    }


def shells(seed, edge=EDGE):
    """Return a head of shells that are two voxels thick: nothing of it is as thick as a slice of 3 mm."""
    subject, rng, axes = head(seed, edge), np.random.default_rng(seed), np.linspace(-1, 1, edge)
    x, y, z = np.meshgrid(axes, axes, axes, indexing="ij")
    squeeze = rng.uniform(0.9, 1.1, 3)
    radius = np.sqrt((x / squeeze[0]) ** 2 + (y / squeeze[1]) ** 2 + (z / squeeze[2]) ** 2)
    shell = np.floor((0.85 - radius) * edge / 4).astype(int)
    index = np.where(shell < 1, np.where(shell < 0, 0, 1), np.where(shell % 2, 3, 2) + np.where(x < 0, 0, 2))
    generation = np.array([0, 30, 2, 3, 2, 3])
    return subject | {"labels": generation[index].astype(np.uint8), "segmentation": index.astype(np.uint8)}


def batch_of(*seeds, edge=EDGE, make=head):
    subjects = [make(seed, edge) for seed in seeds]
    return {name: np.stack([one[name] for one in subjects]) for name in subjects[0]}


@pytest.fixture(scope="module")
def network():
    return brain_unet(MODEL, GENERATOR.shape)


@functools.cache
def trainer(model, generator, settings=BrainLossConfig(clamp_distance=False), rate=5e-3):
    """Return parameters and a compiled step of training on one subject."""
    network = brain_unet(model, generator.shape)
    loss = make_loss(network.apply, model, generator, settings, range(6))
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params, moments, key, batch):
        (_, tasks), gradient = jax.value_and_grad(loss, has_aux=True)(params, key[None], batch)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, tasks

    params = network.init(jax.random.key(0))
    return params, optimizer.init(params), step


def train(model, generator, steps, subjects, edge=EDGE, images=0, make=head, **options):
    """Return the parameters after some steps, and the losses of each; of so many images again and again, where told."""
    params, moments, step = trainer(model, generator, **options)
    batches, found = [batch_of(seed, edge=edge, make=make) for seed in subjects], []
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(1), number % images if images else number)
        params, moments, tasks = step(params, moments, key, batches[number % len(batches)])
        found.append(tasks)
    return params, jax.tree.map(lambda *values: np.array(values), *found)


def scores(params, model, generator, subjects, seed=99, draws=6):
    """Return the mean measures over images, one subject after the other."""
    network, subjects = brain_unet(model, generator.shape), [jax.tree.map(jnp.asarray, one) for one in subjects]

    @jax.jit
    def score(params, key, subject):
        images, targets = draw(key, subject, generator, range(6))
        maps = {name: value[0] for name, value in network.apply(params, images[:1]).items()}
        targets |= {name: targets[name][0] for name in ("bias_field_log", "high_res_residual")}
        inside = 1.0 - targets["background"]
        if model.tasks == ("segmentation",):
            return measures(model, maps, targets)
        zero = jnp.sum(jnp.abs(targets["bias_field_log"])[..., 0] * inside) / inside.sum()
        middle = (targets["registration"] * inside[..., None]).sum((0, 1, 2)) / inside.sum()
        constant = jnp.sum(100 * jnp.linalg.norm(targets["registration"] - middle, axis=-1) * inside) / inside.sum()
        return measures(model, maps, targets) | {"bias_of_0": zero, "coordinate_of_mean": constant}

    keys = [jax.random.fold_in(jax.random.key(seed), number) for number in range(draws)]
    found = [score(params, key, subjects[number % len(subjects)]) for number, key in enumerate(keys)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def test_a_few_steps_lower_every_loss_without_collapse():
    _, losses = train(MODEL, GENERATOR, 24, (0, 1))
    for task in TASKS:
        first, last = losses[task][:4].mean(), losses[task][-4:].mean()
        assert last < first and np.isfinite(losses[task]).all(), (task, first, last)


LARGER = dataclasses.replace(GENERATOR, shape=(32, 32, 32))
ONE_CONTRAST = ContrastConfig(means=((0, 0.0), (30, 60.0), (2, 200.0), (3, 120.0)))
# A mean over classes, squares of logarithms and hundredths of mm weigh nothing beside distances in mm: with equal
# factors neither the bias field nor the coordinates are learnt at all.
WEIGHED = BrainLossConfig(segmentation=5.0, distance=0.5, bias_field=100.0, registration=10.0, clamp_distance=False)


@pytest.mark.slow
def test_every_task_is_learnt_on_a_few_images():
    """Section (i) 11: on four images of four heads every loss falls to less than half, every head beats a constant."""
    # Eight features of length 1 are too few for fifteen maps that share them.
    model = dataclasses.replace(MODEL, levels=3, width=16)
    # Features of length 1 let logits grow by the heads' weights alone, which takes a high rate or many steps.
    params, losses = train(
        model, LARGER, 500, range(4), edge=36, images=4, settings=WEIGHED, rate=optax.cosine_decay_schedule(8e-3, 500)
    )
    for task in TASKS:
        assert losses[task][-40:].mean() < 0.5 * losses[task][:10].mean(), task
    found = scores(params, model, LARGER, [head(seed, 36) for seed in range(4)], seed=1, draws=4)
    assert found["bias_error"] < 0.7 * found["bias_of_0"]
    assert found["coordinate_mm"] < 0.4 * found["coordinate_of_mean"]


@pytest.mark.slow
def test_drawn_contrasts_serve_unseen_ones_better_than_one_contrast():
    """Section (i) 11."""
    model = dataclasses.replace(MODEL, levels=3, tasks=("segmentation",))
    found = []
    for generator in (LARGER, dataclasses.replace(LARGER, contrast=ONE_CONTRAST)):
        params, _ = train(model, generator, 200, range(4), rate=8e-3, edge=36)
        found.append(scores(params, model, LARGER, [head(11, 36)])["dice"])
    assert found[0] > found[1] + 0.05


@pytest.mark.slow
def test_drawn_resolutions_change_a_prediction_less_than_one_resolution():
    """Section (i) 12: what the network says of an image of 1 mm and of the same one at 3 mm."""
    model = dataclasses.replace(MODEL, levels=3, tasks=("segmentation",), unit_features=False)
    settings = BrainLossConfig(cross_entropy=6.0, clamp_distance=False)
    drawn = dataclasses.replace(LARGER, contrast=ONE_CONTRAST)
    fine = dataclasses.replace(drawn, resolution=dataclasses.replace(drawn.resolution, fine_only=True))
    network = brain_unet(model, fine.shape)

    @jax.jit
    def look(params, key, subject):
        images, targets = draw(key, subject, fine, range(6))
        thick = Acquisition(jnp.full(3, 3.0), jnp.full(3, 3.0))
        worse = restore_grid(lower_resolution(key, 255 * images[0, ..., 0], thick, noise_std=jnp.zeros(())))
        pair = jnp.stack([images[0, ..., 0], worse / worse.max()])[..., None]
        before, after = network.apply(params, pair)["segmentation"].argmax(-1)
        inside = 1.0 - targets["background"]
        changed, right = before != after, before == targets["segmentation"]
        return jnp.stack([jnp.sum(changed * inside), jnp.sum(right * inside)]) / inside.sum()

    found = []
    for generator in (drawn, fine):
        params, _ = train(model, generator, 300, range(4), edge=36, make=shells, rate=5e-3, settings=settings)
        looks = [look(params, jax.random.key(5 + n), jax.tree.map(jnp.asarray, shells(11 + n, 36))) for n in range(6)]
        found.append(np.mean(looks, axis=0))
    (change_drawn, right_drawn), (change_fine, right_fine) = found
    assert change_drawn < 0.5 * change_fine and min(right_drawn, right_fine) > 0.5, found


def test_several_images_share_their_targets_and_features_agree():
    generator = dataclasses.replace(GENERATOR, samples=2, mild_samples=1)
    settings = BrainLossConfig(contrastive=0.5)
    network = brain_unet(MODEL, generator.shape)
    loss = make_loss(network.apply, MODEL, generator, settings, range(6))
    params = network.init(jax.random.key(0))
    total, tasks = jax.jit(loss)(params, jax.random.key(3)[None], batch_of(0))
    expected = sum(float(tasks[task]) for task in TASKS) + 0.5 * float(tasks["contrastive"])
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_classes_of_the_store_become_those_of_the_network():
    images, targets = jax.jit(lambda key: draw(key, jax.tree.map(jnp.asarray, head(0)), GENERATOR, (0, 0, 1, 2, 0, 0)))(
        jax.random.key(0)
    )
    assert images.shape == (1, 16, 16, 16, 1) and set(np.unique(targets["segmentation"])) == {0, 1, 2}
    assert targets["bias_field_log"].shape == (1, 16, 16, 16, 1)


def test_the_window_is_cut_about_the_brain():
    fields = head(0, 25)
    fields["segmentation"][:] = 0
    fields["segmentation"][12:18, 4:8, 2] = 3
    whole = Grid(2)(fields, np.random.default_rng(0))
    np.testing.assert_array_equal(whole["distances"], fields["distances"])
    cut = Grid(2, 8)(fields, np.random.default_rng(0))
    places = np.argwhere(cut["segmentation"])
    assert cut["labels"].shape == (8, 8, 8) and cut["size"].tolist() == [8, 8, 8] and cut["mirror"].shape == (6,)
    assert np.abs(places.mean(0) - 3.5).max() <= 1
    # Two planes of the window lie beyond the volume: far away from every surface, and without a label.
    assert (cut["distances"][:, :, :2] == 255).all() and not cut["labels"][:, :, :2].any()
    np.testing.assert_array_equal(cut["distances"][:, :, 2:], fields["distances"][11:19, 2:10, :6])


def test_variants_have_their_tasks_and_the_released_schedule():
    train = TrainConfig(epochs=5000)
    expected = {
        "joint": (5000, 2500), "segmentation": (2000, 1200), "synthesis": (2000, 800), "distance": (2000, 1200),
        "registration": (1600, 1200), "bias-field": (1600, 1200), "super-resolution": (1600, 1600),
        "low-resolution": (5000, 2500), "shift": (5000, 3000), "hemisphere": (5000, 2000),
    }  # fmt: skip
    assert set(expected) == set(VARIANTS)
    for name, (epochs, drop) in expected.items():
        model, generator, found = apply_variant(name, BRAINFM, GeneratorConfig(), train)
        assert (found.epochs, found.epochs * found.optimizer.drop_at) == pytest.approx((epochs, drop)), name
        assert model.tasks == (VARIANTS[name].tasks or model.tasks)
        assert generator.resolution.low_only == (name in ("low-resolution", "super-resolution"))
        assert generator.deformation.random_shift == (name == "shift")
    model, generator, _ = apply_variant("hemisphere", BRAINFM, GeneratorConfig(), TrainConfig(epochs=0))
    assert generator.hemisphere and model.surfaces == 2 and "CT" not in model.tasks


def test_tasks_that_nothing_teaches_are_left_out():
    model, notes = teachable(BRAINFM, GENERATOR, head(0), 1)
    assert model.tasks == ("T1", "segmentation", "distance", "bias_field_log", "registration")
    assert notes == ("Not learnt, because the subjects lack it: T2, FLAIR, CT.",)
    bare = {name: value for name, value in head(0).items() if name in ("labels", "segmentation")}
    assert teachable(BRAINFM, GENERATOR, bare, 0)[0].tasks == ("segmentation", "bias_field_log")
    with pytest.raises(InputError, match="store: expected something to teach CT, found nothing of it"):
        teachable(dataclasses.replace(BRAINFM, tasks=("CT",)), GENERATOR, bare, 0)


def test_weights_of_other_heads_keep_their_backbone(network):
    joint = network.init(jax.random.key(1))
    other = brain_unet(dataclasses.replace(MODEL, labels=(0, 1), surfaces=2), GENERATOR.shape)
    fits, rest = fitting(joint, jax.eval_shape(other.init, jax.random.key(0)))
    assert {name.split("/")[1] for name in rest} == {"segmentation", "distance"} and len(rest) == 4
    assert all(name in fits for name in ("backbone/encoder_0/conv_0/kernel", "heads/T1/kernel"))


def test_dice_of_classes_is_that_of_masks():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 5, 6, 7))
    values, counts = class_dice(jnp.asarray(found), jnp.asarray(truth), 6)
    for label in range(6):
        assert float(values[label]) == pytest.approx(dice(truth == label, found == label))
        assert int(counts[label]) == (truth == label).sum()


def test_labels_of_the_paper_survive_a_record():
    assert to_record(BRAINFM)["labels"] == list(LABELS)

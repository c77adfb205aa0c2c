"""DINOv2's pre-training: it learns and stays spread, the teacher follows, schedules and groups are the recipe's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.arrays.position import resize_table
from jaxmed.arrays.trees import map_named, named_leaves
from jaxmed.config import from_record, to_record
from jaxmed.data.augment_pictures import Crops
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.errors import InputError
from jaxmed.models.dino import DinoHead, DinoHeadConfig, dinov2, dinov3
from jaxmed.models.vit import Vit
from jaxmed.nn.model import make_model
from jaxmed.objectives.block_masks import BlockMaskConfig
from jaxmed.recipes.dino_loss import DinoConfig, dino_loss, dino_network, encode
from jaxmed.recipes.dino_step import Settings, adam, make_dino_step, move, settings_at
from jaxmed.recipes.pretrain_dino import (
    check_anchor,
    collapse_notes,
    create_dino_state,
    pretrain_dino,
    released,
    released_22k,
    spread_of_views,
    with_scaled_rate,
)
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit, in_steps
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunOptions, open_run, start

EDGE, BATCH = 24, 8
# At the factors of 1e-5 that branches begin with, class tokens of different images differ by little but rounding, which
# KoLeo's logarithm of their distance makes large.
ENCODER = dinov2(
    "S", image_size=(16, 16), patch_size=(4, 4), channels=1, width=24, depth=1, heads=2, hidden=48, registers=1,
    drop_path_rate=0.1, drop_path_uniform=True, layer_scale=0.5,
)  # fmt: skip
DINO = DinoConfig(
    ENCODER, DinoHeadConfig(32, 32, 16), False, DinoHeadConfig(24, 32, 16), (8, 8), 3, centring="sinkhorn",
    reference_batch=0, temperature_epochs=1, teacher_momentum=0.9,
)  # fmt: skip
CONFIG = TrainConfig(
    # See test_pretrain_mae: what has no gradient but rounding must not be divided by its size.
    OptimizerConfig(
        peak_lr=2e-3, end_lr=1e-6, weight_decay=0.04, no_decay=(r"(^|/)(bias|scale\d?)$",), clip_norm=3.0, eps=1e-5,
        layer_decay=0.9,
    ),
    LoopConfig(log_every=1, save_every=0),
    LoaderConfig(batch_size=BATCH),
    MeshConfig(data=1),
    epochs=2,
    warmup_epochs=1,
)  # fmt: skip


def pictures(number, seed):
    """Gratings of any direction, width and place, which tell one picture from another."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(*[np.linspace(-1, 1, EDGE)] * 2, indexing="ij")
    turn, width, phase = (generator.uniform(low, high, (number, 1, 1)) for low, high in ((0, 3.1), (2, 9), (0, 6)))
    waves = np.sin(width * (np.cos(turn) * x + np.sin(turn) * y) + phase)
    return waves[..., None].astype(np.float32)


def cut(key, image):
    """Crops at random places; a little noise."""

    def crop(key, edge):
        place_key, noise_key = jax.random.split(key)
        row, column = jax.random.randint(place_key, (2,), 0, EDGE - edge + 1)
        part = jax.lax.dynamic_slice(image, (row, column, 0), (edge, edge, 1))
        return part + 0.05 * jax.random.normal(noise_key, part.shape)

    keys = jax.random.split(key, 5)
    return Crops(jnp.stack([crop(key, 16) for key in keys[:2]]), jnp.stack([crop(key, 8) for key in keys[2:]]))


def train(config, path, dino=DINO, held_out=None, source=None, **options):
    folder = open_run("retfound", "pretrain", None, RunOptions(path, quiet=True))
    start(folder)
    source = source or ArraySource({"image": pictures(16, 0)})
    held_out = None if held_out is None else ArraySource({"image": held_out})
    data = TrainData(source, held_out, lambda fields, generator: {"image": np.asarray(fields["image"])})
    log = Log(folder.path, quiet=True)
    params, state = pretrain_dino(config, dino, data, cut, folder=folder, log=log, **options)
    return params, state, read_metrics(folder.path)


def drawn_heads():
    """Weights that keep the size of what they are given: those of so narrow a head are drawn so small that its code,
    once it has length 1, is mostly rounding."""
    generator = np.random.default_rng(3)
    shapes = {"fc1": (24, 32), "fc2": (32, 32), "fc3": (32, 16)}
    return {
        head: {
            name: {"kernel": (generator.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)}
            for name, shape in shapes.items()
        }
        for head in ("dino_head", "ibot_head")
    }


START = drawn_heads()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Four steps, two of them warm-up, in which prototypes stand still."""
    return train(CONFIG, tmp_path_factory.mktemp("short") / "run", start=START)


@pytest.fixture(scope="module")
def first():
    """The state that every run here begins with."""
    return create_dino_state(CONFIG, DINO, make_mesh(CONFIG.mesh), START)


def test_a_teacher_that_says_the_same_of_everything_is_told():
    steps = range(1, 41)
    collapsed = [{"step": step, "teacher_entropy": 4.1 + 0.05 * min(step, 36) / 36} for step in steps]
    (note,) = collapse_notes(collapsed, 64)
    assert "ended at 4.15 of at most 4.16" in note and "--dino.teacher-temperature" in note
    recovers = [{"step": step, "teacher_entropy": 4.15 - 0.02 * step} for step in steps]
    assert collapse_notes(recovers, 64) == () and collapse_notes([{"step": 1, "loss": 1.0}], 64) == ()


# Runs --------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_keeps_images_apart(tmp_path):
    config = dataclasses.replace(
        CONFIG, epochs=60, warmup_epochs=6, loop=LoopConfig(log_every=1, save_every=0, evaluate_every=60),
        optimizer=dataclasses.replace(CONFIG.optimizer, peak_lr=4e-3),
    )  # fmt: skip
    encoder = dataclasses.replace(ENCODER, drop_path_rate=0.0)
    dino = dataclasses.replace(DINO, encoder=encoder, temperature_epochs=20)
    params, state, lines = train(config, tmp_path / "run", dino, held_out=pictures(24, 1))
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "evaluation/spread" in line]
    for name in ("loss", "dino_local", "dino_global"):
        values = [line[name] for line in steps]
        assert np.mean(values[-10:]) < 0.8 * np.mean(values[:10]), name
    # Two crops of one picture find one another among 48 far more often than by chance, and nothing has collapsed.
    assert [line["step"] for line in checks] == [60, 120]
    assert checks[-1]["evaluation/matched"] > 0.2
    assert checks[-1]["evaluation/spread"] > 0.6 and checks[-1]["evaluation/effective_rank"] > 6
    assert params is state.teacher["encoder"] and int(state.step) == 120


def test_every_line_tells_the_parts_and_the_settings(short):
    names = {
        "loss", "dino_local", "dino_global", "koleo", "ibot", "teacher_entropy", "patch_entropy", "hidden",
        "grad_norm_encoder", "grad_norm_dino_head", "grad_norm_ibot_head", "learning_rate", "weight_decay",
        "teacher_temperature", "teacher_momentum",
    }  # fmt: skip
    for line in short[2]:
        assert names <= set(line)
        parts = line["dino_local"] + line["dino_global"] + 0.2 * line["koleo"] + line["ibot"]
        np.testing.assert_allclose(line["loss"], parts, rtol=1e-5)
        assert 0 < line["hidden"] < 0.25 and 0 < line["teacher_entropy"] < np.log(32)


def assert_same(one, other, tolerance):
    for name, leaf in named_leaves(one).items():
        np.testing.assert_allclose(leaf, named_leaves(other)[name], rtol=0, atol=tolerance, err_msg=name)


def test_eight_devices_give_the_run_of_one(short, tmp_path):
    _, state, lines = train(
        dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2)), tmp_path / "eight", start=START
    )
    assert_same(state.student, short[1].student, 2e-6)
    assert_same(state.teacher, short[1].teacher, 2e-6)
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in short[2]], rtol=1e-5)


class Ending:
    """Records that are gone when the fifth batch is asked for."""

    def __init__(self, source, reads):
        self.source, self.left = source, reads

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise InputError(self.name(index), "a picture", "a network drive that went away")
        return self.source[index]

    def name(self, index):
        return self.source.name(index)

    def __repr__(self):
        return repr(self.source)


def test_a_run_cut_short_continues_to_the_same_numbers(short, tmp_path):
    config = dataclasses.replace(CONFIG, loop=LoopConfig(log_every=1, save_every=1))
    source = ArraySource({"image": pictures(16, 0)})
    with pytest.raises(InputError, match="a network drive that went away"):
        train(config, tmp_path / "run", source=Ending(source, 3 * BATCH), start=START)
    _, state, lines = train(config, tmp_path / "run", source=source, start=START)
    for name, leaf in named_leaves(state._replace(key=jax.random.key_data(state.key))).items():
        expected = named_leaves(short[1]._replace(key=jax.random.key_data(short[1].key)))[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    assert [line["loss"] for line in lines] == [line["loss"] for line in short[2]]


# The step ----------------------------------------------------------------------------------------------------------


def test_student_and_teacher_begin_alike_with_what_is_given(first):
    for name, leaf in named_leaves(START).items():
        np.testing.assert_array_equal(named_leaves(first.student)[name], leaf)
    assert_same(first.teacher, first.student, 0)
    assert np.std(first.student["encoder"]["position"]) > 0.01  # drawn


def test_the_teacher_is_the_average_and_prototypes_wait(first):
    """The second step of a run, while it warms up: the rate is half of its peak."""
    mesh, state = make_mesh(CONFIG.mesh), first._replace(step=first.step + 1)
    step = make_dino_step(in_steps(CONFIG, 16), DINO, cut, 2.0, mesh, state)
    found, metrics = step(state, shard_batch({"image": pictures(BATCH, 0), "record": np.arange(BATCH)}, mesh))
    momentum = float(metrics["teacher_momentum"])
    np.testing.assert_allclose(momentum, 1 - 0.1 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)
    expected = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.teacher, found.student)
    assert_same(found.teacher, expected, 2e-7)
    moved = named_leaves(jax.tree.map(lambda old, new: bool((old != new).any()), state.student, found.student))
    still = {f"{head}/{name}" for head in ("dino_head", "ibot_head") for name in ("prototypes", "gain")}
    assert {name for name in moved if not moved[name]} == still


@pytest.fixture(scope="module")
def derivative(first):
    """Loss, metrics, centres and gradients by student and teacher, of one batch, with a centre."""
    dino = dataclasses.replace(DINO, centring="centre", shared_head=True, gram_weight=2.0)
    student = {name: first.student[name] for name in ("encoder", "dino_head")}
    noise = np.random.default_rng(0)
    teacher = jax.tree.map(lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape).astype(np.float32), student)
    centres = first.centres._replace(patches=first.centres.classes)
    crops = jax.vmap(cut)(jax.random.split(jax.random.key(1), BATCH), jnp.asarray(pictures(BATCH, 2)))
    mesh = make_mesh(CONFIG.mesh)

    def loss(student, teacher):
        given = student, teacher, centres, jax.random.key(3), crops, jnp.float32(0.05), teacher["encoder"]
        return dino_loss(dino, mesh, *given)

    found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(student, teacher)
    return dino, teacher, crops, found


def test_the_teacher_gets_no_gradient(derivative):
    _, _, _, (_, (student, teacher)) = derivative
    for name, leaf in named_leaves(teacher).items():
        np.testing.assert_array_equal(leaf, 0, err_msg=name)
    # All of the student has one, what only one part of the loss reaches included.
    assert all(np.abs(leaf).max() > 0 for name, leaf in named_leaves(student).items())


def test_the_loss_is_the_sum_of_its_parts_that_of_the_anchor_included(derivative):
    dino, _, _, ((loss, (_, metrics)), _) = derivative
    parts = metrics["dino_local"] + metrics["dino_global"] + 2 * dino.koleo_weight * metrics["koleo"] + metrics["ibot"]
    assert 0 < metrics["gram"] < 4 and metrics["loss"] == loss
    np.testing.assert_allclose(loss, parts + 2 * metrics["gram"], rtol=1e-6)


def test_an_anchor_and_its_weight_go_together():
    check_anchor(DINO, False)
    check_anchor(dataclasses.replace(DINO, gram_weight=1.0), True)
    with pytest.raises(InputError, match="dino.gram_weight: expected a number above 0"):
        check_anchor(DINO, True)
    with pytest.raises(InputError, match="anchor: expected weights to keep to"):
        check_anchor(dataclasses.replace(DINO, gram_weight=1.0), False)


def test_centres_are_those_of_the_teachers_scores(derivative):
    dino, teacher, crops, ((_, (centres, _)), _) = derivative
    tokens, _ = encode(dino, teacher["encoder"], crops.globals_)
    scores = make_model(DinoHead(DINO.head)).apply(teacher["dino_head"], tokens)
    np.testing.assert_allclose(centres.classes, 0.1 * scores.mean(axis=(0, 1)), atol=1e-6)
    assert centres.patches.shape == (32,) and np.abs(centres.patches).max() > 0


def test_local_crops_see_the_interpolated_table(first):
    images = jnp.asarray(pictures(4, 3))[:, :8, :8].reshape(2, 2, 8, 8, 1)
    small = make_model(Vit(dataclasses.replace(ENCODER, image_size=(8, 8))))

    @jax.jit
    def look(encoder):
        table = resize_table(encoder["position"], (4, 4), (2, 2), how="offset")
        expected = small.apply({**encoder, "position": table}, images.reshape(4, 8, 8, 1))
        total = lambda part: encode(DINO, part, images)[0][..., 0].sum()  # noqa: E731
        return expected, encode(DINO, encoder, images), jax.grad(total)(encoder)["position"]

    expected, (classes, patches), gradient = look(first.student["encoder"])
    np.testing.assert_allclose(classes.reshape(4, 24), expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(patches, expected[:, 2:], atol=1e-6)
    assert (np.abs(gradient).max(axis=1) > 0).all()


def test_rotations_are_stretched_for_the_student_alone():
    encoder = dinov3("S", image_size=(32, 32), channels=1, width=24, depth=1, heads=2, hidden=24, layer_scale=1.0)
    dino = dataclasses.replace(DINO, encoder=encoder, local_size=(16, 16))
    images = jax.random.normal(jax.random.key(1), (1, 1, 32, 32, 1))

    @jax.jit
    def look(key):
        params = dino_network(dino).init(key)["encoder"]
        cases = ((None, 2.0), (None, 1.0), (key, 1.0), (key, 2.0))
        return [encode(dataclasses.replace(dino, rope_stretch=s), params, images, None, k)[0] for k, s in cases]

    teacher, plain, student, stretched = look(jax.random.key(2))
    np.testing.assert_allclose(teacher, plain, atol=1e-6)
    np.testing.assert_allclose(student, plain, atol=1e-6)
    assert float(jnp.abs(stretched - plain).max()) > 1e-3


DEEP = dataclasses.replace(DINO, encoder=dataclasses.replace(ENCODER, depth=2))


def moved(at, frozen, optimizer=CONFIG.optimizer, **norms):
    """Parameters, moments and norms after one step from ones, by gradients of equal numbers and these norms."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    shapes = jax.eval_shape(dino_network(DEEP).init, jax.random.key(0))

    def step(at):
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
        return move(config, DEEP, frozen, at, filled(params, **norms), adam(config).init(params), params)

    return jax.jit(step)(at)


def filled(params, **norms):
    """A gradient of equal numbers in each part, of these norms."""

    def fill(part, norm):
        count = sum(leaf.size for leaf in jax.tree.leaves(part))
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, norm / count**0.5), part)

    return {name: fill(part, norms[name]) for name, part in params.items()}


AT = Settings(*map(jnp.float32, (1e-2, 0.5, 0.9, 0.05)), jnp.bool_(True))


def test_rates_and_weight_decay_of_every_kind_of_parameter():
    """One step of AdamW from zero moments moves each number by its rate, and by what weight decay takes."""
    optimizer, norms = dataclasses.replace(CONFIG.optimizer, eps=0.0), {"dino_head": 1e-3, "ibot_head": 9.0}
    params, _, _ = moved(AT, (r"head/gain$",), optimizer, encoder=1.0, **norms)
    steps = map_named(lambda name, leaf: float((1 - leaf).mean() / 1e-2), params)
    expected = {  # rate times (1 + decay 0.5)
        "encoder/class_token": 0.9**3 * 1.5, "encoder/position": 0.9**3 * 1.5, "encoder/mask_token": 0.9**3 * 1.5,
        "encoder/register_tokens": 0.9**3 * 1.5, "encoder/patch_embed/kernel": 0.2 * 0.9**3 * 1.5,
        "encoder/patch_embed/bias": 0.2 * 0.9**3, "encoder/blocks/layer_0/mlp/fc1/kernel": 0.9**2 * 1.5,
        "encoder/blocks/layer_0/mlp/fc1/bias": 0.9**2, "encoder/blocks/layer_0/norm1/scale": 0.9**2,
        "encoder/blocks/layer_0/scale1": 0.9**2, "encoder/blocks/layer_1/attention/qkv/kernel": 0.9 * 1.5,
        "encoder/blocks/layer_1/scale2": 0.9, "encoder/norm/scale": 1.0, "encoder/norm/bias": 1.0,
        "dino_head/fc1/kernel": 1.5, "dino_head/fc3/bias": 1.0, "dino_head/prototypes": 1.5, "dino_head/gain": 0.0,
        "ibot_head/prototypes": 1.5,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(named_leaves(steps)[name], value, rtol=1e-3, err_msg=name)


def test_each_part_is_clipped_by_its_own_norm_and_prototypes_wait():
    sizes = {"encoder": 30.0, "dino_head": 1.0, "ibot_head": 6.0}
    params, moments, norms = moved(AT._replace(is_thawed=jnp.bool_(False)), (), **sizes)
    for name, size in sizes.items():
        np.testing.assert_allclose(norms[f"grad_norm_{name}"], size, rtol=1e-4)
        np.testing.assert_allclose(optax.tree.norm(moments.mu[name]), 0.1 * min(size, 3.0), rtol=1e-4)
    for name in ("prototypes", "gain"):
        np.testing.assert_array_equal(params["dino_head"][name], 1)


# Settings ----------------------------------------------------------------------------------------------------------


def test_schedules_of_the_default_configuration():
    """1,250 steps an epoch: 100 epochs of 80,000 images in batches of 64."""
    dino, config = released()
    config = with_scaled_rate(in_steps(config, 80_000), dino)
    assert config.loop.steps == 125_000 and config.optimizer.warmup_steps == 12_500
    peak = 0.004 / 4  # a batch of 64 is a sixteenth of 1024
    at = lambda epoch: settings_at(jnp.int32(epoch * 1250), config, dino, 1250.0)  # noqa: E731
    half = lambda first, last, share: last + (first - last) * (1 + np.cos(np.pi * share)) / 2  # noqa: E731
    rates = [0, peak / 2, peak, half(peak, 1e-6, 45 / 90), 1e-6]
    for epoch, rate in zip((0, 5, 10, 55, 100), rates, strict=True):
        found = at(epoch)
        np.testing.assert_allclose(found.learning_rate, rate, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(found.weight_decay, half(0.04, 0.4, epoch / 100), rtol=1e-5)
        np.testing.assert_allclose(found.teacher_momentum, half(0.992, 1.0, epoch / 100), rtol=1e-6)
        np.testing.assert_allclose(found.teacher_temperature, min(0.04 + 0.001 * epoch, 0.07), rtol=1e-5)
    assert not settings_at(jnp.int32(1249), config, dino, 1250.0).is_thawed and at(1).is_thawed


def test_released_configurations_are_the_tables():
    dino, config = released()
    encoder, optimizer = dino.encoder, config.optimizer
    assert (encoder.width, encoder.depth, encoder.patch_size, encoder.mlp) == (1024, 24, (16, 16), "gelu")
    assert (encoder.drop_path_rate, encoder.drop_path_uniform, encoder.layer_scale) == (0.3, True, 1e-5)
    assert dino.head == DinoHeadConfig(65_536, 2048, 256) and dino.shared_head and dino.centring == "centre"
    assert (optimizer.peak_lr, optimizer.b1, optimizer.b2, optimizer.clip_norm) == (4e-3, 0.9, 0.999, 3.0)
    assert (config.epochs, config.warmup_epochs, optimizer.end_lr, optimizer.layer_decay) == (100, 10, 1e-6, 0.9)
    assert dino.masking == BlockMaskConfig(0.5, (0.1, 0.5), 4)
    large, config = released_22k()
    assert (large.encoder.patch_size, large.encoder.hidden, large.encoder.mlp) == ((14, 14), 2736, "swiglu")
    assert (large.head.bottleneck, large.patch_head.bottleneck, large.head.prototypes) == (384, 256, 131_072)
    assert (large.centring, large.shared_head, large.local_size) == ("sinkhorn", False, (98, 98))
    assert (config.epochs, config.warmup_epochs, config.optimizer.peak_lr) == (500, 80, 2e-4)
    assert (large.teacher_momentum, large.final_weight_decay, config.optimizer.layer_decay) == (0.994, 0.2, 1.0)
    for known in (dino, large):
        assert from_record(DinoConfig, to_record(known), "config.json") == known


def test_collapse_shows_in_how_tokens_are_spread():
    generator = np.random.default_rng(0)
    apart = generator.standard_normal((20, 1, 16)) + 0.1 * generator.standard_normal((20, 2, 16))
    together = 1 + 0.01 * generator.standard_normal((20, 2, 16))
    found, collapsed = (spread_of_views(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (apart, together))
    assert found["spread"] > 0.9 and found["matched"] == 1 and found["effective_rank"] > 10
    assert collapsed["spread"] < 0.02 and collapsed["matched"] < 0.3
    assert spread_of_views(np.ones((3, 2, 4)))["effective_rank"] == 1


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 2}, "accumulation: expected 1, for DINO compares all images"),
        ({"ema_decay": 0.9}, "ema_decay: expected 0, for the teacher is an average already"),
        ({"loader": LoaderConfig(batch_size=1)}, "loader.batch_size: expected 2 images or more"),
        ({"optimizer": OptimizerConfig("sgd")}, "optimizer.kind: expected adamw"),
    ],
)
def test_what_the_recipe_does_not_do_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(CONFIG, **changes), tmp_path / "run")


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_size": (9, 8)}, "patch_size: expected 2 sizes that divide the image"),
        ({"encoder": dataclasses.replace(ENCODER, mask_token=False)}, "encoder: expected one with mask_token"),
        ({"teacher_temperature": (0.07, 0.04)}, "teacher_temperature: expected a range in order"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DINO, **changes)


@pytest.mark.core
def test_devices_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="mesh.model: expected a number of devices that divides"):
        check_fit(dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, model=8)), dino_network(DINO))

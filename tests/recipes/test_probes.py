"""Published probes on a small 2D encoder: what they learn, that they end as plain classifiers, and what they cost."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
import sklearn.neighbors

from jaxmed.arrays.task import Task, predict_values
from jaxmed.arrays.trees import map_named, named_leaves
from jaxmed.data.augment_pictures import CropAugment, FineTuneAugment
from jaxmed.data.intensity import Intensity
from jaxmed.data.labels import LabelConfig
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.mixing import MixConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import ArraySource
from jaxmed.errors import InputError
from jaxmed.io.images import write_png
from jaxmed.io.tables import write_table
from jaxmed.models.heads import Classifier, ClassifierConfig, Head, HeadConfig, unit_length
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.vit import Vit, VitConfig, vit_encoder
from jaxmed.nn.model import make_model
from jaxmed.recipes.adapt import (
    AdaptConfig,
    ProbeConfig,
    adapt,
    check_run,
    in_steps,
    measure,
    probe_head,
    score,
    take_encoder,
)
from jaxmed.recipes.adapt_program import CompileKey, make_program, make_schedule
from jaxmed.recipes.adapt_sections import _probe_section, adapt_page
from jaxmed.recipes.adapt_stage import LabelledConfig, LabelledData, Start, check_heads, run_adapt, write_model
from jaxmed.recipes.effort import training_seconds
from jaxmed.recipes.predict_stage import explain
from jaxmed.recipes.probe_grid import ProbeGrid
from jaxmed.recipes.training import TrainConfig, TrainData
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunOptions, open_run, start

MODES = ("mae-probe", "dinov2-probe", "knn")
WIDTH = 12
VIT = VitConfig(
    (8, 8), (4, 4), 3, WIDTH, depth=2, heads=2, hidden=16, positions="learned", registers=1, mask_token=True,
    layer_scale=0.5,
)  # fmt: skip
ENCODER = vit_encoder(VIT)
TASK = Task("multiclass", ("none", "left", "right"))
HEAD = HeadConfig(3, "class")
GRID = ProbeGrid(rates=(0.1, 3.0), blocks=(1, 2))
TRAIN = TrainConfig(
    OptimizerConfig(peak_lr=1e-2, end_lr=1e-4), LoopConfig(log_every=1, save_every=1000), LoaderConfig(batch_size=8),
    MeshConfig(data=1), epochs=12,
)  # fmt: skip
CONFIG = AdaptConfig(TRAIN, evaluate_epochs=4, smoothing=0.0, probe=ProbeConfig(200.0, GRID, (1, 5, 50)))


def pictures(number, seed):
    """Noise; of class 1 the left half is bright, of class 2 the right half is red."""
    generator = np.random.default_rng(seed)
    images = generator.normal(0, 0.4, (number, 8, 8, 3)).astype(np.float32)
    labels = generator.permutation(number) % 3
    images[labels == 1, :, :4] += 1.0
    images[labels == 2, :, 4:, 0] += 1.5
    return ArraySource({"image": images, "label": labels[:, None].astype(np.float32)})


def drawn():
    """Parameters from NumPy, with everything that could be 0 away from it."""
    params = jax.eval_shape(ENCODER.init, jax.random.key(0))
    generator = np.random.default_rng(0)

    def draw(name, leaf):
        spread = 0.3 if leaf.ndim < 2 else leaf.shape[0] ** -0.5
        return (spread * generator.standard_normal(leaf.shape) + name.endswith("scale")).astype(np.float32)

    return {"encoder": map_named(draw, params)}


def transform(fields, generator=None):
    return {"image": np.asarray(fields["image"]), "target": np.asarray(fields["label"])}


SOURCES = pictures(48, 0), pictures(24, 1), pictures(30, 2)


def train(path, mode, head=HEAD, encoder=ENCODER, augment=None, **settings):
    config = dataclasses.replace(CONFIG, mode=mode, **settings)
    folder = open_run("retfound", "adapt", None, RunOptions(path, quiet=True))
    start(folder)
    return adapt(
        config, encoder, head, TASK, TrainData(*SOURCES[:2], transform), folder=folder,
        log=Log(folder.path, quiet=True), augment=augment,
        start=take_encoder(drawn(), encoder, "drawn"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("probes")
    # LARS moves parameters by a thousandth of their length, so it needs more steps.
    longer = {"train": dataclasses.replace(TRAIN, epochs=40), "evaluate_epochs": 10}
    return {mode: train(place / mode, mode, **longer if mode == "mae-probe" else {}) for mode in MODES}


def logits_of(found, source=SOURCES[2]):
    return score(CONFIG, ENCODER, found.head, found.params, source, transform)


@pytest.mark.parametrize("mode", MODES)
def test_a_probe_learns_and_leaves_the_encoder_as_it_is(runs, mode):
    found = runs[mode]
    for name, leaf in named_leaves(drawn()["encoder"]).items():
        np.testing.assert_array_equal(named_leaves(found.params["encoder"])[name], leaf, err_msg=name)
    values = measure(TASK, logits_of(found), SOURCES[2].arrays["label"], (1.0,) * 3)
    assert values["auroc"] > 0.85 and values["score"] > 0.6


@pytest.mark.parametrize("mode", MODES)
def test_a_probe_is_written_and_read_as_a_classifier(runs, mode, tmp_path):
    found = runs[mode]
    first = Start(
        ENCODER, HEAD, None, Preprocess((8, 8), 3), "dinov2", functools.partial(ClassifierConfig, VIT), "none", []
    )
    write_model(tmp_path / "model", found, first, TASK)
    published = load_published(tmp_path / "model")
    images = jnp.asarray(SOURCES[2].arrays["image"])
    logits = published.model.apply(published.params, images)[0]
    np.testing.assert_allclose(logits, logits_of(found), atol=2e-5)
    export_published(published, tmp_path / "model.safetensors")
    again = load_published(tmp_path / "model.safetensors")
    assert again.config == published.config
    for name, leaf in named_leaves(published.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[name], leaf, err_msg=name)


# MAE's probe --------------------------------------------------------------------------------------------------------


def test_recipe_of_maes_probe(runs):
    config = in_steps(dataclasses.replace(AdaptConfig(TrainConfig(epochs=90, warmup_epochs=10,
        loader=LoaderConfig(batch_size=16384))), mode="mae-probe"), 1_281_167)  # fmt: skip
    optimizer = config.train.optimizer
    assert (optimizer.kind, optimizer.b1, optimizer.trust_coefficient, optimizer.weight_decay) == ("lars", 0.9, 1e-3, 0)
    assert (optimizer.peak_lr, optimizer.end_lr, optimizer.layer_decay) == (0.1 * 16384 / 256, 0.0, 1.0)
    assert (config.train.loop.steps, optimizer.warmup_steps) == (7038, 782)
    head = runs["mae-probe"].head
    assert head == HeadConfig(3, "class", norm=False, init_std=0.01)
    assert set(runs["mae-probe"].params["head"]) == {"linear"} and runs["mae-probe"].step in (60, 120, 180, 240)


def test_two_steps_of_maes_probe_by_hand():
    """BatchNorm without factors, a linear head, cross-entropy, LARS: MAE's linear probe (main_linprobe.py) in NumPy."""
    config = dataclasses.replace(CONFIG, mode="mae-probe", probe=ProbeConfig())
    settings = in_steps(config, 48).train.optimizer
    assert settings.peak_lr == 0.1 * TRAIN.loader.batch_size / 256
    rates = {"peak_lr": 0.0, "end_lr": 0.0, "warmup_steps": 0}
    mesh, head = make_mesh(MeshConfig(data=1)), probe_head(config, HEAD)
    compiled = CompileKey(
        ENCODER, head, "multiclass", dataclasses.replace(settings, **rates), 1, 1.0, 0.0, MixConfig(), None,
        "head on pairs", None,
    )  # fmt: skip
    program = make_program(compiled, mesh)
    state = program.create(jax.random.key(0), {}, make_schedule(settings.peak_lr, 0.0, 0, 10))
    first = jax.device_get(state.params["head"])
    kernel, bias = (first["linear"][name].astype(np.float64) for name in ("kernel", "bias"))
    assert kernel.shape == (WIDTH, 3) and not bias.any() and kernel.std() == pytest.approx(0.01, rel=0.4)
    generator, labels = np.random.default_rng(5), np.arange(8) % 3
    mean, var, speed = np.zeros(WIDTH), np.ones(WIDTH), [0.0, 0.0]
    for step in range(2):
        tokens = (3 + 2 * generator.standard_normal((8, 2, WIDTH))).astype(np.float32)
        fields = {"tokens": tokens, "target": labels[:, None].astype(np.float32), "weights": np.ones((8, 3), "f")}
        fields["importance"] = np.ones(8, "f")
        state, metrics = program.step(state, shard_batch(fields, mesh))
        x = tokens[:, 0].astype(np.float64)  # the class token
        standard = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
        logits = standard @ kernel + bias
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert metrics["loss"] == pytest.approx(-np.log(share[np.arange(8), labels]).mean(), rel=1e-5)
        slope = (share - np.eye(3)[labels]) / 8
        pull = standard.T @ slope
        speed[0] = 0.9 * speed[0] + 0.001 * np.linalg.norm(kernel) / np.linalg.norm(pull) * pull
        speed[1] = 0.9 * speed[1] + slope.sum(0)  # one axis: not adapted
        rate = settings.peak_lr * 0.5 * (1 + np.cos(np.pi * step / 10))
        kernel, bias = kernel - rate * speed[0], bias - rate * speed[1]
    after = jax.device_get(state.params["head"])
    np.testing.assert_allclose(after["linear"]["kernel"], kernel, atol=1e-7)
    np.testing.assert_allclose(after["linear"]["bias"], bias, atol=1e-7)
    np.testing.assert_allclose(after["batch_norm"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(after["batch_norm"]["var"], var, rtol=1e-5)


# DINOv2's probe -----------------------------------------------------------------------------------------------------


def grid_key(parts="head on pairs", augment=None):
    settings = OptimizerConfig("sgd", peak_lr=0.0, weight_decay=0.0, b1=0.9)
    return CompileKey(ENCODER, GRID.head(3), "multiclass", settings, 1, 1.0, 0.0, MixConfig(), augment, parts, GRID)


def test_every_head_of_the_grid_learns_as_if_it_were_alone():
    program = make_program(grid_key(), make_mesh(MeshConfig(data=1)))
    state = program.create(jax.random.key(0), {}, make_schedule(0.5, 0.0, 0, 10))
    first = jax.device_get(state.params["head"])
    generator = np.random.default_rng(3)
    batches = [generator.standard_normal((8, 3, WIDTH)).astype(np.float32) for _ in range(3)]
    labels = np.arange(8) % 3
    for batch in batches:
        fields = {
            "tokens": batch,
            "target": labels[:, None].astype(np.float32),
            "weights": np.ones((8, 3), "f"),
            "importance": np.ones(8, "f"),
        }
        state, _ = program.step(state, shard_batch(fields, make_mesh(MeshConfig(data=1))))
    after = jax.device_get(state.params["head"])
    assert first["kernel"].shape == (8, 3 * WIDTH, 3) and abs(first["kernel"].std() - 0.01) < 1e-3
    for place, cell in enumerate(GRID.cells):
        rows = np.repeat([cell.blocks == 2, True, cell.has_mean], WIDTH)
        kernel, bias = first["kernel"][place][rows].astype(np.float64), np.zeros(3)
        speed = [0.0, 0.0]
        for step, batch in enumerate(batches):
            features = batch.reshape(8, -1)[:, rows]
            logits = features @ kernel + bias
            slope = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[labels]
            rate = cell.rate * 0.5 * 0.5 * (1 + np.cos(np.pi * step / 10))
            speed = [0.9 * speed[0] + features.T @ slope / 8, 0.9 * speed[1] + slope.mean(0)]
            kernel, bias = kernel - rate * speed[0], bias - rate * speed[1]
        np.testing.assert_allclose(after["kernel"][place][rows], kernel, atol=2e-5)
        np.testing.assert_allclose(after["bias"][place], bias, atol=2e-5)
        np.testing.assert_array_equal(after["kernel"][place][~rows], first["kernel"][place][~rows])


def test_the_best_head_is_chosen_and_stands_alone(runs):
    found = runs["dinov2-probe"]
    assert [(row["rate"], row["blocks"], row["features"] == "class + mean") for row in found.choices] == GRID.cells
    (chosen,) = [row for row in found.choices if row["chosen"]]
    assert chosen["loss"] == min(row["loss"] for row in found.choices)
    values = measure(TASK, logits_of(found, SOURCES[1]), SOURCES[1].arrays["label"], (1.0,) * 3)
    for name, value in values.items():
        assert chosen[name] == pytest.approx(value, abs=1e-5)
    assert found.head.layers == chosen["blocks"]
    assert found.head.pool == ("concat" if chosen["features"] == "class + mean" else "class")


def test_features_are_the_class_tokens_of_the_last_blocks_and_the_mean():
    config = ClassifierConfig(VIT, HeadConfig(2, "concat", norm=False, layers=2))
    params, images = drawn()["encoder"], jnp.asarray(SOURCES[0].arrays["image"][:4])
    model = make_model(Vit(dataclasses.replace(VIT, final_norm=False)))
    states = [ENCODER.norm(params, x) for x in model.apply(params, images, method="hidden_states")[-2:]]
    expected = np.concatenate([states[0][:, 0], states[1][:, 0], states[1][:, 2:].mean(1)], axis=1)
    head = {"linear": {"kernel": jnp.ones((3 * WIDTH, 2)), "bias": jnp.zeros(2)}}
    found = make_model(Classifier(config)).apply({"encoder": params, "head": head}, images, method="features")
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_prediction_explains_a_head_on_several_blocks():
    head = HeadConfig(3, "concat", norm=False, layers=2)
    generator = np.random.default_rng(4)
    linear = {"kernel": generator.standard_normal((3 * WIDTH, 3)).astype("f"), "bias": np.zeros(3, "f")}
    params, images = {**drawn(), "head": {"linear": linear}}, jnp.asarray(SOURCES[2].arrays["image"][:4])
    explained = explain(ENCODER, head, TASK, "top", params, images)
    logits = make_model(Classifier(ClassifierConfig(VIT, head))).apply(params, images)[0]
    np.testing.assert_allclose(explained.values, predict_values(logits, TASK), atol=1e-5)
    assert explained.maps.shape == (4, 1, 2, 2) and bool((explained.maps >= 0).all())


def test_augmented_pictures_go_through_the_encoder_at_every_step(tmp_path):
    crop = CropAugment(size=(8, 8), scale=(0.8, 1.0))
    found = train(tmp_path / "run", "dinov2-probe", augment=crop, train=dataclasses.replace(TRAIN, epochs=1))
    for name, leaf in named_leaves(drawn()["encoder"]).items():
        np.testing.assert_array_equal(named_leaves(found.params["encoder"])[name], leaf, err_msg=name)
    assert found.step == 6 and len(found.choices) == 8


@pytest.mark.parametrize("mode", ["dinov2-probe", "knn"])
def test_what_was_tried_is_shown(runs, mode, tmp_path):
    choices = runs[mode].choices
    write_table(tmp_path / "probe.csv", list(choices[0]), choices)
    (section,) = _probe_section(tmp_path)
    assert section.title == "What the probe tried" and len(section.blocks) == (2 if mode == "dinov2-probe" else 1)
    assert section.blocks[-1].rows[0][-1] == "1"


# Neighbours ---------------------------------------------------------------------------------------------------------


def test_neighbours_vote_as_in_scikit_learn(runs):
    found = runs["knn"]
    assert [row["neighbours"] for row in found.choices] == [1, 5, 48]  # no more than there are records
    count = found.head.neighbours.count
    apply = make_model(Head(HeadConfig(3, "class"), ENCODER.prefix)).apply

    def features(source):
        tokens = ENCODER.tokens(found.params["encoder"], jnp.asarray(source.arrays["image"]))
        return np.asarray(unit_length(apply({}, tokens, method="features")), np.float64)

    peer = sklearn.neighbors.KNeighborsClassifier(
        count, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    peer.fit(features(SOURCES[0]), SOURCES[0].arrays["label"][:, 0])
    expected = peer.predict_proba(features(SOURCES[2]))
    np.testing.assert_allclose(predict_values(jnp.asarray(logits_of(found)), TASK), expected, atol=1e-4)


# The rule of the official code --------------------------------------------------------------------------------------


def test_the_score_is_that_of_scikit_learn():
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, 60)
    logits = (generator.normal(size=(60, 3)) + np.eye(3)[labels]).astype(np.float32)
    found = measure(TASK, logits, labels[:, None].astype("f"), (1.0,) * 3)
    one_hot, told = np.eye(3)[labels], np.eye(3)[logits.argmax(1)]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = (
        sk.f1_score(one_hot, told, average="macro", zero_division=0),
        sk.roc_auc_score(one_hot, shares, average="macro"),
        sk.cohen_kappa_score(labels, logits.argmax(1)),
    )
    assert found["score"] == pytest.approx(np.mean(parts), abs=1e-6) and found["auroc"] == pytest.approx(parts[1])
    assert "score" not in measure(TASK, logits, np.minimum(labels, 1)[:, None].astype("f"), (1.0,) * 3)
    several = Task("multilabel", ("a", "b"))
    targets = generator.integers(0, 2, (60, 2)).astype("f")
    targets[::7, 1] = np.nan
    marks = []
    for column, values in zip(targets.T, logits.T, strict=False):
        truth, value = column[np.isfinite(column)], values[np.isfinite(column)]
        pair = sk.f1_score(truth, value >= 0, average="macro"), sk.cohen_kappa_score(truth, value >= 0)
        marks.append((sum(pair) + sk.roc_auc_score(truth, value)) / 3)
    found = measure(several, logits[:, :2], targets, (1.0, 1.0))
    assert found["score"] == pytest.approx(np.mean(marks), abs=1e-6)


def test_the_official_probe_skips_branches_and_leaves_the_norm_as_it_is(tmp_path):
    vit = dataclasses.replace(VIT, final_norm=False, drop_path_rate=0.5)
    optimizer = OptimizerConfig(peak_lr=1e-2, frozen=("^head/norm/",))
    settings = {"head": HeadConfig(3, "mean"), "train": dataclasses.replace(TRAIN, optimizer=optimizer, epochs=1)}
    found = train(tmp_path / "skipped", "frozen", encoder=vit_encoder(vit), **settings)
    np.testing.assert_array_equal(found.params["head"]["norm"]["scale"], np.ones(WIDTH))
    np.testing.assert_array_equal(found.params["head"]["norm"]["bias"], np.zeros(WIDTH))
    assert float(jnp.abs(found.params["head"]["linear"]["kernel"]).max()) > 1e-3
    assert found.effort.trained_parameters == 3 * WIDTH + 3
    plain = dataclasses.replace(vit, drop_path_rate=0.0)
    whole = train(tmp_path / "whole", "frozen", encoder=vit_encoder(plain), **settings)
    assert not np.allclose(found.params["head"]["linear"]["kernel"], whole.params["head"]["linear"]["kernel"])


# Rates and decay ----------------------------------------------------------------------------------------------------

RATE, DECAY, FALL = 0.1, 0.5, 0.65
# RETFound's list for two blocks, written down by hand: (power of 0.65, whether weights decay).
TABLE = {
    "encoder/class_token": (3, False), "encoder/position": (3, False), "encoder/patch_embed/kernel": (3, True),
    "encoder/patch_embed/bias": (3, False), "encoder/register_tokens": (0, True), "encoder/mask_token": (0, False),
    "encoder/norm/scale": (0, False), "encoder/norm/bias": (0, False), "head/linear/kernel": (0, True),
    "head/linear/bias": (0, False),
} | {
    f"encoder/blocks/layer_{block}/{name}": (2 - block, name.endswith("kernel"))
    for block in (0, 1)
    for name in ("norm1/scale", "norm1/bias", "attention/qkv/kernel", "attention/qkv/bias", "attention/out/kernel",
                 "attention/out/bias", "norm2/scale", "norm2/bias", "mlp/fc1/kernel", "mlp/fc1/bias", "mlp/fc2/kernel",
                 "mlp/fc2/bias", "scale1", "scale2")
}  # fmt: skip


def test_rates_and_weight_decay_of_every_parameter():
    # With plain gradient descent the difference between a run with decay and one without is rate x scale x decay x w.
    mesh, params = make_mesh(MeshConfig(data=1)), drawn()
    params["head"] = {
        "linear": {"kernel": np.random.default_rng(8).normal(size=(WIDTH, 3)).astype("f"), "bias": np.full(3, 0.5, "f")}
    }
    source = SOURCES[0].arrays
    batch = {
        "image": source["image"][:8],
        "target": source["label"][:8],
        "weights": np.ones((8, 3), "f"),
        "importance": np.ones(8, "f"),
    }
    after = []
    for decay in (0.0, DECAY):
        settings = OptimizerConfig("sgd", peak_lr=0.0, b1=0.0, weight_decay=decay, layer_decay=FALL)
        key = CompileKey(ENCODER, HEAD, "multiclass", settings, 1, 1.0, 0.0, MixConfig(), None, "all")
        program = make_program(key, mesh)
        state = program.create(jax.random.key(0), params, make_schedule(RATE, 0.0, 0, 10))
        after.append(named_leaves(program.step(state, shard_batch(batch, mesh))[0].params))
    weights = named_leaves(params)
    assert set(after[0]) == set(TABLE)
    moved = {name: float(np.abs(after[0][name] - weights[name]).max()) for name in TABLE}
    for name, (power, decays) in TABLE.items():
        expected = RATE * FALL**power * DECAY * decays * weights[name]
        np.testing.assert_allclose(after[0][name] - after[1][name], expected, atol=2e-6, err_msg=name)
        assert (moved[name] > 0) == (name != "encoder/mask_token")


@pytest.mark.core
def test_the_rate_of_the_official_schedule():
    # 24 records a step, 0.005 for 256: ten epochs up, then half a cosine to 1e-6.
    optimizer = OptimizerConfig(peak_lr=5e-3 * 24 / 256, end_lr=1e-6)
    config = in_steps(AdaptConfig(TrainConfig(optimizer, loader=LoaderConfig(batch_size=24), epochs=50,
                                              warmup_epochs=10)), 2400)  # fmt: skip
    told = config.train.optimizer
    assert (config.train.loop.steps, told.warmup_steps) == (5000, 1000)
    from jaxmed.train.optimizer import rate_at

    rates = [float(rate_at(100 * epoch, told.peak_lr, told.end_lr, 1000, 5000)) for epoch in (0, 5, 10, 30, 50)]
    middle = 1e-6 + (4.6875e-4 - 1e-6) / 2
    np.testing.assert_allclose(rates, [0, 2.34375e-4, 4.6875e-4, middle, 1e-6], rtol=1e-5)


# What it takes ------------------------------------------------------------------------------------------------------


def test_effort(runs):
    grid, vote = runs["dinov2-probe"].effort, runs["knn"].effort
    assert grid.trained_parameters == 8 * (3 * WIDTH * 3 + 3) and vote.trained_parameters == 0
    assert runs["mae-probe"].effort.trained_parameters == WIDTH * 3 + 3
    assert vote.seconds_per_epoch is None and vote.seconds_to_best > 0
    assert grid.seconds_per_epoch > 0 and grid.seconds_to_best > 0
    # Products of the blocks alone: 6 tokens, 2 (4 w^2 + 2 w h) each, and attention's 4 t^2 w.
    products = 2 * (6 * 2 * (4 * WIDTH**2 + 2 * WIDTH * 16) + 4 * 6**2 * WIDTH)
    assert products < grid.operations < 2 * products
    assert training_seconds([{"step": 1, "steps_per_second": 2.0}, {"step": 4, "steps_per_second": 4.0}], 2, 8) == (
        2.0, 1.0,
    )  # fmt: skip
    assert training_seconds([{"step": 0}], 0, 8) is None


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_probes_refuse_what_they_cannot_do():
    def check(task=TASK, head=HEAD, encoder=ENCODER, **settings):
        check_run(dataclasses.replace(CONFIG, **settings), encoder, head, task)

    ages = Task("regression", ("age",), (60.0,), (9.0,))
    with pytest.raises(InputError, match="mode: expected another than dinov2-probe for a regression"):
        check(ages, HeadConfig(1, "class"), mode="dinov2-probe")
    with pytest.raises(InputError, match="select: expected loss, for a regression, found score"):
        check(ages, HeadConfig(1, "class"), select="score")
    with pytest.raises(InputError, match="probe.grid.blocks: expected at most the 2 blocks"):
        check(mode="dinov2-probe", probe=ProbeConfig())
    with pytest.raises(InputError, match="without a class token"):
        bare = dataclasses.replace(ENCODER, prefix=0)
        check(encoder=bare, head=HeadConfig(3, "mean"), mode="dinov2-probe")
    for mode in MODES:
        with pytest.raises(InputError, match=f"mix: .*found a probe, {mode}"):
            check(mode=mode, mix=MixConfig(mixup=0.5))
        with pytest.raises(InputError, match="token_keep: expected 1 for a probe"):
            check(mode=mode, token_keep=0.5)
    without = dataclasses.replace(VIT, final_norm=False)
    first = Start(
        vit_encoder(without), HeadConfig(3, "mean"), None, Preprocess((8, 8), 3), "dinov2",
        functools.partial(ClassifierConfig, without), "none", [],
    )  # fmt: skip
    check_heads(dataclasses.replace(CONFIG, mode="knn"), first)
    with pytest.raises(InputError, match="mode: expected an encoder for the heads of dinov2-probe"):
        check_heads(dataclasses.replace(CONFIG, mode="dinov2-probe"), first)
    with pytest.raises(ValueError, match="neighbours"):
        ProbeConfig(neighbours=())


# The whole road -----------------------------------------------------------------------------------------------------


def write_pictures(place):
    """Write 48 pictures with two labels that do not exclude each other, one of them sometimes missing."""
    generator, rows = np.random.default_rng(6), []
    for number in range(48):
        bright, red = number % 2, number // 2 % 2
        picture = generator.uniform(0.1, 0.4, (12, 12, 3))
        picture[:, :6] += 0.4 * bright
        picture[:, 6:, 0] += 0.5 * red
        write_png(place / f"{number:02d}.png", picture)
        split = ("train", "train", "validation", "test")[number // 12]
        rows.append({"path": f"{number:02d}.png", "bright": bright, "red": red if number % 7 else "", "split": split})
    write_table(place / "pictures.csv", list(rows[0]), rows)
    return place / "pictures.csv"


def test_several_labels_of_pictures_from_table_to_model(tmp_path):
    mean, std = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)
    preprocess = Preprocess((8, 8), 3, axes="xyz", intensity=Intensity("unit", mean=mean, std=std))
    vit = dataclasses.replace(VIT, drop_path_rate=0.1)
    recipe = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, epochs=2), evaluate_epochs=1, select="score")
    labelled = LabelledConfig(
        LabelledData(write_pictures(tmp_path / "pictures")), LabelConfig(("bright", "red")), pool="class", adapt=recipe
    )

    def find_start(task):
        wide = dataclasses.replace(preprocess, size=(12, 12))
        return Start(
            vit_encoder(vit), HeadConfig(len(task.names), "class"), drawn(), preprocess, "dinov2",
            functools.partial(ClassifierConfig, vit), "none", [], wide,
        )  # fmt: skip

    folder = open_run("retfound", "adapt", labelled, RunOptions(tmp_path / "run", quiet=True))
    page = functools.partial(adapt_page, title="A page", source="A source.")
    assert run_adapt(labelled, labelled, find_start, page, folder, (), FineTuneAugment(mean, std, (8, 8))) == 0
    with (folder.outputs / "metrics.csv").open() as file:
        rows = {(row["set"], row["label"], row["measure"]): float(row["estimate"]) for row in csv.DictReader(file)}
    assert {("test", "all", "auroc_macro"), ("test", "red", "aupr"), ("validation", "bright", "f1")} <= set(rows)
    written = load_published(folder.outputs / "model")
    assert written.task == Task("multilabel", ("bright", "red")) and written.preprocess == preprocess
    summary = json.loads((folder.outputs / "summary.json").read_text())
    assert summary["select"] == "score" and summary["effort"]["trained_parameters"] > 1000
    assert "What it took" in folder.report.read_text()

"""Adapting: it learns, frozen is frozen, moments fold, parts are the batch, runs resume and share their programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.arrays.position import sincos
from jaxmed.arrays.task import Task
from jaxmed.arrays.trees import map_named, named_leaves
from jaxmed.data import mixing
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.mixing import MixConfig
from jaxmed.data.records import ArraySource
from jaxmed.errors import InputError, Interrupted
from jaxmed.models.heads import Classifier, ClassifierConfig, Head, HeadConfig
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.nn.model import make_model
from jaxmed.recipes import adapt as recipe
from jaxmed.recipes.adapt import FINE_TUNING, AdaptConfig, adapt, in_steps, measure, score, take_encoder
from jaxmed.recipes.adapt_program import CompileKey, make_program, make_schedule
from jaxmed.recipes.training import TrainConfig, TrainData
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig, make_mesh, shard_batch
from jaxmed.train.optimizer import OptimizerConfig, layer_scales, make_optimizer
from jaxmed.train.run_folder import RunOptions, open_run, start

ENCODER = VitConfig((8, 8, 8), (4, 4, 4), width=12, depth=1, heads=2, hidden=24, final_norm=False)
MODEL = ClassifierConfig(ENCODER, HeadConfig(1))
TASK = Task("binary", ("bright",))
CONFIG = AdaptConfig(
    TrainConfig(
        OptimizerConfig(peak_lr=3e-3, end_lr=1e-5, layer_decay=0.75, eps=1e-5), LoopConfig(log_every=1, save_every=8),
        LoaderConfig(batch_size=8), MeshConfig(data=1), epochs=12, warmup_epochs=1,
    ),
    evaluate_epochs=2,
)  # fmt: skip


def changed(config=CONFIG, **changes):
    """Return a run with other settings, of training or of adapting."""
    names = {name for name in changes if hasattr(config.train, name)}
    train = dataclasses.replace(config.train, **{name: changes[name] for name in names})
    return dataclasses.replace(config, train=train, **{n: changes[n] for n in changes if n not in names})


def parts(model):
    """Return encoder and head of a classifier."""
    return vit_encoder(model.encoder), model.head


def cubes(number, seed, kind="binary"):
    """Noise; a corner is bright where the label is 1."""
    generator = np.random.default_rng(seed)
    images = generator.normal(0.3, 0.05, (number, 8, 8, 8, 1)).astype(np.float32)
    if kind == "multiclass":
        labels = generator.permutation(number) % 3
        for image, label in zip(images, labels, strict=True):
            image[4 * (label > 0) :, 4 * (label > 1) :, :4] += 0.3 * (label > 0)
        return ArraySource({"image": images, "label": labels[:, None].astype(np.float32)})
    labels = (generator.permutation(number) % 2).astype(np.float32)
    images[labels == 1, :4, :4, :4] += 0.3 * (kind != "regression")
    columns = [labels]
    if kind == "multilabel":
        other = (generator.permutation(number) % 2).astype(np.float32)
        images[other == 1, 4:] -= 0.2
        other[::5] = np.nan
        columns.append(other)
    if kind == "regression":
        size = generator.uniform(0, 0.6, number).astype(np.float32)
        images[:, 4:, :4, 4:] += size[:, None, None, None, None]
        columns = [100 + 50 * size]
    return ArraySource({"image": images, "label": np.stack(columns, axis=1)})


def drawn(model=MODEL, seed=0):
    """Parameters from NumPy: compiling the draw of a model takes longer than training it here."""
    params = jax.eval_shape(make_model(Classifier(model)).init, jax.random.key(0), jnp.zeros((1, 8, 8, 8, 1)))
    generator = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith("position"):
            return sincos(leaf.shape[1], (2, 2, 2))
        if name.endswith(("scale", "var")):
            return np.ones(leaf.shape, np.float32)
        spread = 0.0 if name.endswith(("bias", "mean")) or "head/linear" in name else leaf.shape[0] ** -0.5
        return (spread * generator.standard_normal(leaf.shape)).astype(np.float32)

    return map_named(draw, params)


def transform(fields, generator=None):
    return {"image": np.asarray(fields["image"]), "target": np.asarray(fields["label"])}


def open_folder(path):
    folder = open_run("tangerine", "adapt", None, RunOptions(path, quiet=True))
    if folder.status == "new":
        start(folder)
    return folder


def train(path, config=CONFIG, model=MODEL, task=TASK, sources=None, **options):
    folder = open_folder(path)
    train, validation = sources or (cubes(32, 0, task.kind), cubes(16, 1, task.kind))
    options.setdefault("start", drawn(model))
    return adapt(
        config,
        *parts(model),
        task,
        TrainData(train, validation, transform),
        folder=folder,
        log=Log(folder.path, quiet=True),
        **options,
    )


def outputs_for(number, hidden=0):
    return dataclasses.replace(MODEL, head=HeadConfig(number, hidden=hidden))


def unseen(found, task, config=CONFIG):
    source = cubes(40, 2, task.kind)
    logits = score(config, vit_encoder(ENCODER), found.head, found.params, source, transform)
    return measure(task, logits, recipe.standardise(source.arrays["label"], task), (1.0,) * len(task.names)), logits


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return train(tmp_path_factory.mktemp("full") / "run")


def test_fine_tuning_learns_and_returns_its_best(full):
    assert unseen(full, TASK)[0]["auroc"] > 0.95
    losses = {line["step"]: line["evaluation/loss"] for line in full.history if "evaluation/loss" in line}
    assert full.step == min(losses, key=losses.get)
    assert {line["step"] for line in full.history if "evaluation/loss" in line} == {8, 16, 24, 32, 40, 48}
    # A table: neither moved nor decayed.
    np.testing.assert_array_equal(full.params["encoder"]["position"], sincos(12, (2, 2, 2)))


TASKS = {
    "binary": TASK,
    "multiclass": Task("multiclass", ("none", "one", "two")),
    "multilabel": Task("multilabel", ("first", "second")),
    "regression": Task("regression", ("size",), (115.0,), (9.0,)),
}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("multilabel", "regression")]


@pytest.mark.parametrize("kind", ["multiclass", *SLOW])
def test_a_head_on_features_learns_every_kind_of_task(kind, tmp_path):
    config = changed(CONFIG, mode="frozen", epochs=30, evaluate_epochs=15, optimizer=OptimizerConfig(peak_lr=3e-2))
    task = TASKS[kind]
    found = train(tmp_path / "run", config, outputs_for(len(task.names), hidden=8), task)
    for name, leaf in named_leaves(drawn()["encoder"]).items():
        np.testing.assert_array_equal(named_leaves(found.params["encoder"])[name], leaf, err_msg=name)
    values, _ = unseen(found, task)
    if kind == "regression":
        assert values["loss"] < 0.3 * recipe.standardise(cubes(40, 2, kind).arrays["label"], task).var()
    else:
        assert values["auroc"] > 0.9


# The step -----------------------------------------------------------------------------------------------------------


def plan_for(
    model=MODEL,
    accumulation=1,
    trained="all",
    token_keep=1.0,
    augment=None,
    kind="binary",
    mix=MixConfig(),
    **optimizer,
):
    settings = OptimizerConfig(**({"kind": "sgd", "b1": 0.0, "weight_decay": 0.0} | optimizer))
    return CompileKey(*parts(model), kind, settings, accumulation, token_keep, 0.0, mix, augment, trained)


def batch_for(seed, rows=8):
    source = cubes(rows, seed)
    images, labels = source.arrays["image"], source.arrays["label"]
    return {"image": images, "target": labels, "weights": np.ones((rows, 1), np.float32),
            "importance": np.ones(rows, np.float32)}  # fmt: skip


def one_step(plan, batch=None, rate=0.1):
    mesh = make_mesh(MeshConfig(data=1))
    program = make_program(plan, mesh)
    params = drawn(ClassifierConfig(plan.encoder.config, plan.head))
    first = {"head": params["head"]} if plan.parts == "head on pairs" else params
    state = program.create(jax.random.key(0), first, make_schedule(rate, 0.0, 0, 10))
    after, metrics = program.step(state, shard_batch(batch_for(5) if batch is None else batch, mesh))
    return state, after, metrics


def noisy(key, image):
    return image + 0.1 * jax.random.normal(key, image.shape)


DROPPING = dataclasses.replace(MODEL, encoder=dataclasses.replace(ENCODER, drop_path_rate=0.3))


def test_a_batch_in_parts_gives_the_step_of_one_big_batch():
    # With plain gradient descent the step is the gradient itself; every image draws its noise, tokens and skipped
    # branches from a key of its own.
    options = {"model": DROPPING, "token_keep": 0.5, "augment": noisy}
    _, whole, told = one_step(plan_for(**options))
    _, parts, also = one_step(plan_for(accumulation=4, **options))
    for name, leaf in named_leaves(whole.params).items():
        np.testing.assert_allclose(leaf, named_leaves(parts.params)[name], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(told["loss"], also["loss"], atol=1e-6)


def test_a_record_counts_as_often_as_its_importance_says():
    batch = batch_for(5)
    twice, kept = {name: values.copy() for name, values in batch.items()}, np.arange(0, 8, 2).repeat(2)
    twice["importance"] = np.tile([2.0, 0.0], 4).astype(np.float32)
    _, weighted, told = one_step(plan_for(), twice)
    _, repeated, also = one_step(plan_for(), {name: values[kept] for name, values in batch.items()})
    for name, leaf in named_leaves(weighted.params).items():
        np.testing.assert_allclose(leaf, named_leaves(repeated.params)[name], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(told["loss"], also["loss"], atol=1e-6)


def test_mixed_images_cost_what_their_mixed_targets_cost():
    plan, batch, mesh = plan_for(mix=MixConfig(mixup=0.8, cutmix=1.0)), batch_for(5), make_mesh(MeshConfig(data=1))
    program, params = make_program(plan, mesh), drawn(MODEL)
    linear = params["head"]["linear"]
    head = {
        **params["head"],
        "linear": {**linear, "kernel": jax.random.normal(jax.random.key(1), linear["kernel"].shape)},
    }
    before = program.create(jax.random.key(0), {**params, "head": head}, make_schedule(0.1, 0.0, 0, 10))
    _, told = program.step(before, shard_batch(batch, mesh))
    keys = jax.random.split(jax.random.fold_in(before.key, 0), 8)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys)
    image, own = mixing.mix(plan.mix, keys, jnp.asarray(batch["image"]))
    target = own[:, None] * batch["target"] + (1 - own[:, None]) * batch["target"][::-1]
    logits = make_model(Classifier(MODEL)).apply(before.params, image)[0]
    expected, unmixed = (optax.sigmoid_binary_cross_entropy(logits, t).mean() for t in (target, batch["target"]))
    np.testing.assert_allclose(told["loss"], expected, rtol=1e-5)
    assert 0 < float(own.min()) < 1 and abs(float(unmixed - expected)) > 1e-3


def test_moments_fold_as_computed_by_hand():
    model = dataclasses.replace(MODEL, head=HeadConfig(1, hidden=3, norm=False))
    tokens = np.random.default_rng(0).normal(size=(8, 2, 12)).astype(np.float32)
    ones = np.ones((8, 1), np.float32)
    batch = {"tokens": tokens, "target": ones, "weights": ones, "importance": ones[:, 0]}
    before, after, _ = one_step(plan_for(model, trained="head on pairs", weight_decay=0.5), batch, rate=0.5)
    params = jax.device_get(before.params)["head"]
    hidden = tokens.reshape(8, 24) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    moments = after.params["head"]["batch_norm"]
    # Momentum 0.1 from mean 0 and variance 1; the stored variance has the divisor n - 1. Neither the gradient nor the
    # decay of weights has a part in it, while they move everything else.
    np.testing.assert_allclose(moments["mean"], 0.1 * hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments["var"], 0.9 + 0.1 * hidden.var(0, ddof=1), atol=1e-6)
    normed = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    linear = params["linear"]
    slope = (1 / (1 + np.exp(-(normed @ linear["kernel"] + linear["bias"]))) - 1) / 8
    expected = linear["kernel"] - 0.5 * (normed.T @ slope + 0.5 * linear["kernel"])
    np.testing.assert_allclose(after.params["head"]["linear"]["kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(after.params["head"]["linear"]["bias"], linear["bias"] - 0.5 * slope.sum(0), atol=1e-6)


def neutral_plan():
    """The plan of CONFIG's fine-tuning, which is compiled by then."""
    settings = dataclasses.replace(CONFIG.train.optimizer, peak_lr=0.0, end_lr=0.0, warmup_steps=0)
    return CompileKey(*parts(MODEL), "binary", settings, 1, 1.0, 0.1, MixConfig(), None, "all")


def test_a_learning_rate_that_is_given_is_the_one_that_is_built_in(full):
    before, after, metrics = one_step(neutral_plan(), {**batch_for(5), "record": np.arange(8)}, rate=0.01)
    mesh = make_mesh(MeshConfig(data=1))
    # Two steps, so that the schedule has moved.
    ours, told = make_program(neutral_plan(), mesh).step(
        after, shard_batch({**batch_for(6), "record": np.arange(8)}, mesh)
    )
    config = dataclasses.replace(CONFIG.train.optimizer, peak_lr=0.01, end_lr=0.0, frozen=(r"(^|/)position$",))
    optimizer = make_optimizer(config, 10, vit_encoder(ENCODER).layers)
    params = drawn()
    state = optimizer.init(params)
    model = make_model(Classifier(MODEL))

    def loss(params, image, target):
        logits = model.apply(params, image)[0]
        return jnp.mean(jnp.logaddexp(0, logits) - target * logits)

    gradient, update = jax.jit(jax.grad(loss)), jax.jit(optimizer.update)
    for batch in (batch_for(5), batch_for(6)):
        updates, state = update(gradient(params, batch["image"], batch["target"]), state, params)
        params = jax.tree.map(np.add, params, updates)
    for name, leaf in named_leaves(ours.params).items():
        np.testing.assert_allclose(leaf, named_leaves(params)[name], atol=1e-5, err_msg=name)
    rates = [metrics["learning_rate"], told["learning_rate"]]
    np.testing.assert_allclose(rates, [0.01, 0.01 * 0.5 * (1 + np.cos(np.pi / 10))], rtol=1e-6)
    assert not np.array_equal(ours.params["head"]["norm"]["scale"], drawn()["head"]["norm"]["scale"])


@pytest.mark.core
def test_recipe_of_the_paper():
    # 1200 scans in batches of 12 (3 x 4 parts), 200 epochs of which 5 warm up.
    config = in_steps(
        AdaptConfig(
            TrainConfig(FINE_TUNING, loader=LoaderConfig(batch_size=12), accumulation=4, epochs=200, warmup_epochs=5)
        ),
        1200,
    )
    assert (
        config.train.loop.steps == 20000
        and config.train.optimizer.warmup_steps == 500
        and config.train.loop.evaluate_every == 100
    )
    assert (config.train.optimizer.b1, config.train.optimizer.b2, config.train.optimizer.weight_decay) == (
        0.9,
        0.999,
        0.05,
    )
    span = make_schedule(
        config.train.optimizer.peak_lr, config.train.optimizer.end_lr, config.train.optimizer.warmup_steps, 20000
    )
    from jaxmed.recipes.adapt_program import _rate

    rates = [float(_rate(span._replace(step=step), config.train.optimizer)) for step in (0, 250, 500, 20000)]
    np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, 1e-6], rtol=1e-5)
    falling = dataclasses.replace(config.train.optimizer, decay="step", drop_at=0.25)
    rates = [float(_rate(span._replace(step=step), falling)) for step in (250, 5499, 5500)]
    np.testing.assert_allclose(rates, [5e-5, 1e-4, 1e-6], rtol=1e-5)
    assert (config.train.loop.best, config.train.loop.best_is) == ("loss", "smallest")


@pytest.mark.core
def test_scales_of_layers_are_those_of_the_paper():
    model = dataclasses.replace(MODEL, encoder=dataclasses.replace(ENCODER, depth=24))
    params = jax.eval_shape(make_model(Classifier(model)).init, jax.random.key(0), jnp.zeros((1, 8, 8, 8, 1)))
    scales = named_leaves(layer_scales(params, 0.75, vit_encoder(model.encoder).layers))
    # 25 = L; id 0: class token, positions, patches; block k: k + 1; norm and head: 25.
    for name in ("encoder/class_token", "encoder/position", "encoder/patch_embed/kernel", "encoder/patch_embed/bias"):
        assert scales[name] == 0.75**25
    for block in (0, 9, 10, 23):
        own = [value for name, value in scales.items() if name.startswith(f"encoder/blocks/layer_{block}/")]
        assert len(own) == 12 and set(own) == {0.75 ** (25 - block - 1)}
    assert {value for name, value in scales.items() if name.startswith("head/")} == {1.0}


@pytest.mark.core
def test_features_do_not_depend_on_the_order_of_patch_tokens(key):
    head = make_model(Head(HeadConfig(2)))
    tokens = jax.random.normal(key, (3, 9, 12))
    params = head.init(key, tokens)
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(8)])
    for method in ("features", None):
        one, other = (
            head.apply(params, some, **({"method": method} if method else {})) for some in (tokens, tokens[:, order])
        )
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    # ... and a head makes of the class token and the patches' mean what it makes of all of them.
    pair = jnp.stack([tokens[:, 0], tokens[:, 1:].mean(1)], axis=1)
    np.testing.assert_allclose(head.apply(params, tokens)[0], head.apply(params, pair)[0], atol=1e-6)


# Frozen encoders ----------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_bit_for_bit_under_augmentation(tmp_path):
    settings = OptimizerConfig(peak_lr=3e-2)
    config = changed(CONFIG, mode="frozen", epochs=6, evaluate_epochs=6, optimizer=settings)
    found = train(tmp_path / "run", config, augment=noisy)
    for name, leaf in named_leaves(drawn()["encoder"]).items():
        np.testing.assert_array_equal(named_leaves(found.params["encoder"])[name], leaf, err_msg=name)
    assert unseen(found, TASK)[0]["auroc"] > 0.9


@pytest.mark.parametrize("kind", TASKS)
def test_a_logistic_probe_scores_as_scikit_learn_does(kind, tmp_path):
    task = TASKS[kind]
    names = task.names
    config = changed(CONFIG, mode="logistic")
    found = train(tmp_path / "run", config, outputs_for(len(names)), task)
    assert sum(row["chosen"] for row in found.choices) == (1 if kind == "multiclass" else len(names))
    values, logits = unseen(found, task)
    # Its exported classifier gives the logits of the probe: standardisation is folded in, and there is no layer norm.
    from sklearn.linear_model import LogisticRegression, Ridge

    sources = cubes(32, 0, kind), cubes(40, 2, kind)
    model = make_model(Classifier(ClassifierConfig(ENCODER, found.head)))
    inside, outside = (
        np.asarray(model.apply(found.params, jnp.asarray(s.arrays["image"]), method="features"), np.float64)
        for s in sources
    )
    mean, spread = inside.mean(0), inside.std(0)
    strength = next(row["strength"] for row in found.choices if row["chosen"])
    target = recipe.standardise(sources[0].arrays["label"], task)[:, 0]
    if kind == "regression":
        peer = Ridge(alpha=1 / (2 * strength)).fit((inside - mean) / spread, target)
        expected = peer.predict((outside - mean) / spread)[:, None]
    else:
        peer = LogisticRegression(C=strength, max_iter=10_000).fit((inside - mean) / spread, target)
        expected = peer.decision_function((outside - mean) / spread)
        logits, expected = (logits, expected) if kind == "multiclass" else (logits[:, 0], expected)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    if kind != "regression":
        assert values["auroc"] > 0.8


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_to_the_same_parameters(full, tmp_path, monkeypatch):
    real, calls = recipe.measure, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recipe, "measure", stop)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(tmp_path / "run")
    monkeypatch.setattr(recipe, "measure", real)
    found = train(tmp_path / "run")
    assert found.step == full.step
    for name, leaf in named_leaves(full.params).items():
        np.testing.assert_array_equal(named_leaves(found.params)[name], leaf, err_msg=name)
    kept = [{k: v for k, v in line.items() if k != "steps_per_second"} for line in full.history]
    assert [{k: v for k, v in line.items() if k != "steps_per_second"} for line in found.history] == kept


def test_runs_of_one_shape_share_their_compiled_step(full, tmp_path):
    other = changed(
        CONFIG,
        seed=4,
        epochs=3,
        class_weights=(2.5,),
        optimizer=dataclasses.replace(CONFIG.train.optimizer, peak_lr=1e-3),
    )
    before, programs = executable(), make_program.cache_info().misses
    train(tmp_path / "run", other, sources=(cubes(24, 8), cubes(16, 9)))
    assert make_program.cache_info().misses == programs
    assert executable() is before


def executable():
    """The executable of the step for batches of 8: the same object as long as nothing is compiled anew."""
    mesh = make_mesh(CONFIG.train.mesh)
    program = make_program(neutral_plan(), mesh)
    state = program.create(jax.random.key(0), drawn(), make_schedule(0.1, 0.0, 0, 10))
    batch = shard_batch({**batch_for(5), "record": np.arange(8)}, mesh)
    return program.step.lower(state, batch).compile().runtime_executable()


@pytest.mark.parametrize("mode", ["frozen", pytest.param("full", marks=pytest.mark.slow)])
def test_eight_devices_give_the_run_of_one(mode, tmp_path):
    short = changed(CONFIG, mode=mode, epochs=2)
    one = train(tmp_path / "one", short)
    eight = train(tmp_path / "eight", changed(short, mesh=MeshConfig(data=4, model=2)))
    for name, leaf in named_leaves(one.params).items():
        np.testing.assert_allclose(named_leaves(eight.params)[name], leaf, atol=5e-5, err_msg=name)


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_an_encoder_that_does_not_cover_the_model_is_refused():
    encoder = drawn()
    with pytest.raises(InputError, match="no class_token"):
        take_encoder(
            {"encoder": {k: v for k, v in encoder["encoder"].items() if k != "class_token"}},
            vit_encoder(ENCODER),
            "file",
        )
    with pytest.raises(InputError, match="position of"):
        take_encoder(encoder, vit_encoder(dataclasses.replace(ENCODER, image_size=(16, 16, 16))), "file")
    with pytest.raises(InputError, match="parameters with an encoder"):
        take_encoder({"head": {}}, vit_encoder(ENCODER), "file")
    # A masked autoencoder's final norm has no place in a classifier on the mean of the patch tokens.
    more = {"encoder": {**encoder["encoder"], "norm": {"scale": np.ones(12, np.float32)}}, "decoder": {}}
    assert take_encoder(more, vit_encoder(ENCODER), "file")["encoder"].keys() == encoder["encoder"].keys()


def test_weights_and_outputs_must_fit_the_task(tmp_path):
    with pytest.raises(InputError, match="class_weights: expected one per output, 1"):
        train(tmp_path / "one", changed(CONFIG, class_weights=(1.0, 2.0)))
    with pytest.raises(InputError, match="model.head.outputs"):
        train(tmp_path / "two", model=outputs_for(3))
    with pytest.raises(InputError, match="a multiple of 3 parts"):
        train(tmp_path / "three", changed(CONFIG, accumulation=3))
    with pytest.raises(InputError, match="mesh.model"):
        train(tmp_path / "four", changed(CONFIG, mesh=MeshConfig(data=1, model=5)))
    for mode, task in (("logistic", TASK), ("full", Task("regression", ("volume",), mean=(0.0,), deviation=(1.0,)))):
        with pytest.raises(InputError, match="mix: expected a classification"):
            train(tmp_path / "five", changed(CONFIG, mode=mode, mix=MixConfig(mixup=0.8)), task=task)
    for wrong in ({"token_keep": 0.0}, {"smoothing": 1.0}, {"class_weights": (0.0,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdaptConfig(**wrong)
    with pytest.raises(ValueError, match="accumulation"):
        TrainConfig(accumulation=0)

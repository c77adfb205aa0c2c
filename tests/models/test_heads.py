"""Heads: pooling, their kinds, BatchNorm's moments, and what outputs mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.arrays.task import Task, predict_values
from jaxmed.models.heads import (
    BatchNorm,
    Classifier,
    ClassifierConfig,
    Head,
    HeadConfig,
    Neighbours,
    fold_moments,
    fold_standardise,
    pool_tokens,
)
from jaxmed.models.vit import Vit, VitConfig, vit_encoder
from jaxmed.nn.model import make_model

pytestmark = pytest.mark.core
TOKENS = jax.random.normal(jax.random.key(1), (5, 9, 6))


def make(config):
    model = make_model(Head(config))
    fresh = model.init(jax.random.key(0), TOKENS)
    noise = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: leaf + 0.3 * np.abs(noise.standard_normal(leaf.shape)).astype("f"), fresh)


def norm(x, params):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_pooled_feature_does_not_depend_on_the_order_of_patches():
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(8)])
    pooled, turned = pool_tokens(TOKENS), pool_tokens(TOKENS[:, order])
    np.testing.assert_allclose(turned.concat, pooled.concat, atol=1e-6)
    np.testing.assert_array_equal(pooled.class_token, TOKENS[:, 0])
    np.testing.assert_allclose(pooled.pooled, np.asarray(TOKENS)[:, 1:].mean(axis=1), atol=1e-6)
    assert pooled.concat.shape == (5, 12)


@pytest.mark.parametrize(("pool", "width"), [("concat", 12), ("mean", 6), ("class", 6)])
def test_linear_heads(pool, width):
    model, params = make(HeadConfig(outputs=3, pool=pool))
    logits, moments = model.apply(params, TOKENS)
    pooled = pool_tokens(TOKENS)
    features = {"concat": pooled.concat, "mean": pooled.pooled, "class": pooled.class_token}[pool]
    features = features if pool == "class" else norm(features, params["norm"])
    assert params["linear"]["kernel"].shape == (width, 3) and moments == {}
    np.testing.assert_allclose(logits, features @ params["linear"]["kernel"] + params["linear"]["bias"], atol=1e-5)
    np.testing.assert_allclose(model.apply(params, TOKENS, method="features"), features, atol=1e-5)


@pytest.mark.parametrize("layer", ["leaky", "relu"])
def test_published_head_with_a_hidden_layer(layer):
    model, params = make(HeadConfig(outputs=2, hidden=7, hidden_layer=layer))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = norm(pool_tokens(TOKENS).concat, p["norm"]) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    x = np.where(x > 0, x, 0.01 * x) if layer == "leaky" else x
    batch = p["batch_norm"]

    def last(x):
        return np.maximum(x, 0) if layer == "relu" else x

    stored = last((x - batch["mean"]) / np.sqrt(batch["var"] + 1e-5) * batch["scale"] + batch["bias"])
    logits, moments = model.apply(params, TOKENS)
    assert moments == {}
    np.testing.assert_allclose(logits, stored @ p["linear"]["kernel"] + p["linear"]["bias"], atol=1e-5)
    own = last((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * batch["scale"] + batch["bias"])
    logits, moments = model.apply(params, TOKENS, training=True)
    np.testing.assert_allclose(logits, own @ p["linear"]["kernel"] + p["linear"]["bias"], atol=3e-5)
    np.testing.assert_allclose(moments["mean"], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments["var"], x.var(0, ddof=1), rtol=1e-4)


def test_a_norm_that_is_applied_twice():
    model, params = make(HeadConfig(outputs=2, pool="mean", norm_repeats=2))
    once = norm(pool_tokens(TOKENS).pooled, params["norm"])
    found = model.apply(params, TOKENS, method="features")
    np.testing.assert_allclose(found, norm(once, params["norm"]), atol=1e-5)
    assert np.abs(found - once).max() > 0.1


def test_class_tokens_of_several_blocks_come_first():
    # Two class tokens of earlier blocks, then class token, a register and the patches of the last.
    expected = np.asarray(TOKENS)[:, :3].reshape(5, 18), np.asarray(TOKENS)[:, 4:].mean(axis=1)
    for pool, features in (("class", expected[0]), ("concat", np.concatenate(expected, axis=1))):
        head = HeadConfig(2, pool, norm=False, layers=3)
        found = make_model(Head(head, prefix=2)).apply({}, TOKENS, method="features")
        np.testing.assert_allclose(found, features, atol=1e-6)
        assert head.num_features(6) == features.shape[1]


def test_standardised_features_fold_into_the_linear_map():
    config = HeadConfig(3, "class", norm=False, standardise=True, init_std=0.01)
    model, params = make(config)
    assert set(params["batch_norm"]) == {"mean", "var"}
    moments, linear = params["batch_norm"], params["linear"]
    features = (TOKENS[:, 0] - moments["mean"]) / np.sqrt(moments["var"] + 1e-6)
    logits = model.apply(params, TOKENS)[0]
    np.testing.assert_allclose(logits, features @ linear["kernel"] + linear["bias"], atol=1e-5)
    plain, folded = fold_standardise(config, params)
    assert plain == HeadConfig(3, "class", norm=False, init_std=0.01) and set(folded) == {"linear"}
    np.testing.assert_allclose(make_model(Head(plain)).apply(folded, TOKENS)[0], logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_neighbours_vote(kind):
    generator = np.random.default_rng(2)
    bank = generator.standard_normal((7, 6))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    targets = {
        "multiclass": np.eye(2)[generator.integers(0, 2, 7)],
        "multilabel": generator.integers(0, 2, (7, 2)),
        "regression": generator.standard_normal((7, 2)),
    }[kind]
    known = np.ones((7, 2)) if kind == "multiclass" else np.where(generator.uniform(size=(7, 2)) < 0.3, 0, 1)
    head = HeadConfig(2, "class", norm=False, neighbours=Neighbours(3, 7, kind, 0.5))
    vote = {name: jnp.asarray(array, jnp.float32) for name, array in
            {"bank": bank, "targets": targets * known, "known": known}.items()}  # fmt: skip
    found = make_model(Head(head)).apply({"vote": vote}, TOKENS)[0]
    rows = np.asarray(TOKENS[:, 0], np.float64)
    similar = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ bank.T
    for row, logits in zip(similar, np.asarray(found), strict=True):
        nearest = np.argsort(-row)[:3]
        votes = np.exp(row[nearest] / 0.5)[:, None] * known[nearest]
        total = votes.sum(axis=0)
        share = np.where(total > 0, (votes * targets[nearest]).sum(axis=0) / np.where(total > 0, total, 1), 0)
        if kind == "regression":
            np.testing.assert_allclose(logits, share, atol=1e-5)
        else:
            told = scipy.special.softmax(logits) if kind == "multiclass" else scipy.special.expit(logits)
            np.testing.assert_allclose(told, share, atol=2e-5)


def test_moments_move_a_tenth_of_the_way():
    stored = {"scale": jnp.ones(2), "mean": jnp.array([0.0, 1.0]), "var": jnp.array([1.0, 2.0])}
    batch = {"mean": jnp.array([10.0, 1.0]), "var": jnp.array([2.0, 2.0])}
    folded = fold_moments(stored, batch)
    np.testing.assert_allclose(folded["mean"], [1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(folded["var"], [1.1, 2.0], rtol=1e-6)
    assert folded["scale"] is stored["scale"]
    assert fold_moments(stored, {}) == stored


def test_a_batch_of_one_has_finite_moments():
    model = make_model(BatchNorm())
    x = jnp.array([[1.0, 2.0]])
    output, moments = model.apply(model.init(jax.random.key(0), x), x, True)
    assert bool(jnp.isfinite(output).all()) and moments["var"].tolist() == [0.0, 0.0]


def test_head_starts_near_zero_as_published():
    model = make_model(Head(HeadConfig(outputs=64)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 3, 256)))
    assert float(params["linear"]["kernel"].std()) == pytest.approx(2e-5, rel=0.02)
    assert not params["linear"]["bias"].any()


def test_classifier_is_encoder_then_head():
    encoder = VitConfig((8, 8, 8), (4, 4, 4), width=16, depth=1, heads=2, hidden=24, final_norm=False)
    config = ClassifierConfig(encoder, HeadConfig(outputs=2))
    model, as_encoder = make_model(Classifier(config)), vit_encoder(encoder)
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 8, 1))
    params = jax.jit(model.init)(jax.random.key(0), image)
    assert "norm" not in params["encoder"] and set(params["head"]) == {"norm", "linear"}
    params["head"]["linear"]["kernel"] = jax.random.normal(jax.random.key(3), (32, 2))

    @jax.jit
    def run(params):
        call = lambda name, *inputs: model.apply(params, *inputs, method=name)  # noqa: E731
        tokens = make_model(Vit(encoder)).apply(params["encoder"], image)
        expected, _ = make_model(Head(config.head)).apply(params["head"], tokens)
        features = call("features", image) @ params["head"]["linear"]["kernel"]
        joined = as_encoder.join(params["encoder"], *as_encoder.split(params["encoder"], image))
        last = make_model(Head(config.head)).apply(params["head"], joined)[0]
        return (expected, call("__call__", image)[0], features, last), (
            tokens,
            as_encoder.apply(params["encoder"], image),
        )

    for one, *others in run(params):
        for other in others:
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_outputs_become_probabilities_or_values():
    logits = jnp.array([[0.0, 2.0], [-1.0, 1.0]])
    np.testing.assert_allclose(
        predict_values(logits, Task("multilabel", ("a", "b"))), scipy.special.expit(logits), rtol=1e-6
    )
    np.testing.assert_allclose(
        predict_values(logits, Task("multiclass", ("a", "b"))), scipy.special.softmax(logits, -1), rtol=1e-6
    )
    task = Task("regression", ("fev1", "age"), (2.0, 60.0), (0.5, 10.0))
    np.testing.assert_allclose(predict_values(logits, task), [[2.0, 80.0], [1.5, 70.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadConfig(outputs=0), "outputs"),
        (lambda: HeadConfig(pool="mean", layers=2), "layers"),
        (lambda: HeadConfig(hidden=3, standardise=True), "hidden"),
        (lambda: HeadConfig(hidden=3, second_hidden=2, hidden_layer="relu"), "second_hidden"),
        (lambda: Neighbours(count=5, records=4), "count"),
        (lambda: ClassifierConfig(VitConfig(final_norm=True)), "head.pool"),
        (lambda: ClassifierConfig(VitConfig(final_norm=False), HeadConfig(pool="class")), "head.pool"),
        (lambda: Task("binary", ("a", "b")), "names"),
        (lambda: Task("regression", ("a",), (1.0,)), "mean, deviation"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.peers
def test_batch_norm_equals_pytorch():
    import torch

    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32) * 3 + 1
    peer = torch.nn.BatchNorm1d(4)
    model = make_model(BatchNorm())
    params = model.init(jax.random.key(0), jnp.asarray(x))
    for _ in range(3):
        expected = peer(torch.from_numpy(x)).detach().numpy()
        found, moments = model.apply(params, jnp.asarray(x), True)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        params = fold_moments(params, moments)
    np.testing.assert_allclose(params["mean"], peer.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(params["var"], peer.running_var.numpy(), rtol=1e-6)
    peer.eval()
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(x))[0], peer(torch.from_numpy(x)).detach().numpy(), atol=1e-6
    )

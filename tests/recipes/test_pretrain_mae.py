"""Pre-training: it learns, frozen tables stay, a batch in parts is the batch, a stopped run continues."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.position import sincos
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.recipes.pretrain_mae import PretrainConfig, in_steps, pretrain, reconstruct
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig, learning_rate
from jaxmed.train.run_folder import RunOptions, open_run, start

MODEL = MaeConfig(
    VitConfig((16, 16, 16), (4, 4, 4), width=24, depth=2, heads=2, hidden=48),
    decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_hidden=48,
)  # fmt: skip
CONFIG = PretrainConfig(
    MODEL,
    OptimizerConfig(peak_lr=3e-3, b2=0.95),
    LoopConfig(log_every=10, save_every=20),
    LoaderConfig(batch_size=4),
    MeshConfig(data=1),
    epochs=20,
    warmup_epochs=1,
)


def balls(number, seed):
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"), -1)
    centres = generator.uniform(-0.3, 0.3, (number, 1, 1, 1, 3))
    return (np.linalg.norm(grid - centres, axis=-1, keepdims=True) < 0.7).astype(np.float32)


def open_folder(path):
    folder = open_run("tangerine", "pretrain", None, RunOptions(path, quiet=True))
    start(folder)
    return folder


def train(config, path, **options):
    folder = open_folder(path)
    log = Log(folder.path, quiet=True)
    source, held_out = (ArraySource({"image": balls(count, seed)}) for count, seed in ((16, 0), (3, 1)))
    transform = lambda fields, generator: {"image": np.asarray(fields["image"])}  # noqa: E731
    params, pictures = pretrain(config, source, held_out, transform, folder=folder, log=log, **options)
    return params, pictures, log.read_metrics()


def test_pretraining_learns_to_complete_and_leaves_the_tables_alone(tmp_path):
    params, pictures, lines = train(CONFIG, tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    last = lines[-1]
    assert losses[-1] < 0.5 * losses[0]
    # Well below the best constant, which is what a model that ignores the visible patches can reach.
    assert last["evaluation/explained"] > 0.3
    assert len(pictures) == 3 and all(picture.error < picture.variance for picture in pictures)
    for part, width in (("encoder", 24), ("decoder", 24)):
        np.testing.assert_array_equal(params[part]["position"], sincos(width, (4, 4, 4)))


def test_a_batch_in_parts_gives_the_same_run(tmp_path):
    short = dataclasses.replace(CONFIG, epochs=1)
    whole, _, _ = train(short, tmp_path / "whole")
    parts, _, _ = train(dataclasses.replace(short, accumulation=2), tmp_path / "parts")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_eight_devices_give_the_run_of_one(tmp_path):
    short = dataclasses.replace(CONFIG, epochs=2, loader=LoaderConfig(batch_size=8))
    one, _, _ = train(short, tmp_path / "one")
    eight, _, _ = train(dataclasses.replace(short, mesh=MeshConfig(data=4, model=2)), tmp_path / "eight")
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6)


def test_augmentation_draws_anew_for_every_image(tmp_path):
    short = dataclasses.replace(CONFIG, epochs=1)
    plain, _, _ = train(short, tmp_path / "plain")
    turned, _, _ = train(short, tmp_path / "turned", augment=lambda key, image: jnp.where(
        jax.random.bernoulli(key), image[::-1], image))  # fmt: skip
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(turned), strict=True))


def test_training_starts_from_given_parameters(tmp_path):
    model = make_model(Mae(MODEL))
    given = model.init(jax.random.key(9), jnp.zeros((1, 16, 16, 16, 1)), jnp.zeros((1, 64)))
    still = dataclasses.replace(CONFIG, epochs=0, loop=LoopConfig(steps=1), optimizer=OptimizerConfig(peak_lr=0.0))
    params, _, _ = train(still, tmp_path / "run", start=given)
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.core
def test_schedule_of_the_paper():
    # 98,000 volumes in batches of 224, 400 epochs of which 20 warm up; 1e-4 at the end of warm-up, 0 at both ends.
    config = in_steps(PretrainConfig(loader=LoaderConfig(batch_size=224), epochs=400, warmup_epochs=20), 98000)
    assert config.loop.steps == 175000 and config.optimizer.warmup_steps == 8750
    rate = learning_rate(config.optimizer, config.loop.steps)
    assert float(rate(0)) == 0
    np.testing.assert_allclose(rate(8750), 1e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(8750 // 2), 5e-5, rtol=1e-3)
    assert float(rate(175000)) < 1e-12


@pytest.mark.core
def test_a_reconstruction_keeps_what_was_seen():
    model = make_model(Mae(MODEL))
    image = balls(1, 3)[0]
    params = model.init(jax.random.key(0), image[None], jnp.zeros((1, 64)))
    picture = reconstruct(model, MODEL, params, jax.random.key(1), image)
    seen = picture.seen != 0
    np.testing.assert_array_equal(picture.seen[seen], image[seen])
    np.testing.assert_array_equal(picture.completed[seen], image[seen])
    patches = picture.completed.reshape(4, 4, 4, 4, 4, 4) == image.reshape(4, 4, 4, 4, 4, 4)
    assert patches.all(axis=(1, 3, 5)).sum() == 16  # a quarter of 64 patches

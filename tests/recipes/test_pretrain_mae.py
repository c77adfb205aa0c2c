"""Pre-training: it learns, frozen tables stay, a batch in parts is the batch, a stopped run continues."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import random_masking, take_tokens
from jaxmed.arrays.patches import patchify
from jaxmed.arrays.position import sincos
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.errors import InputError
from jaxmed.models.mae import MaeConfig, MaeOutput, MaskedModel, masked_model
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import Network
from jaxmed.objectives.masked import masked_loss
from jaxmed.recipes.pretrain_mae import _loss, pretrain, reconstruct
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunOptions, open_run, start

MODEL = MaeConfig(
    VitConfig((16, 16, 16), (4, 4, 4), width=24, depth=2, heads=2, hidden=48),
    decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_hidden=48,
)  # fmt: skip
CONFIG = TrainConfig(
    # Softmax does not see the bias of the keys, so its gradient is 0 but for rounding, which Adam would divide by its
    # own size: at the usual eps of 1e-8 two ways to sum a batch move it to different places.
    OptimizerConfig(peak_lr=3e-3, b2=0.95, eps=1e-5),
    LoopConfig(log_every=1, save_every=0),
    LoaderConfig(batch_size=8),
    MeshConfig(data=1),
    epochs=2,
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


def train(config, path, with_held_out=False, **options):
    folder = open_folder(path)
    log = Log(folder.path, quiet=True)
    source, held_out = (ArraySource({"image": balls(count, seed)}) for count, seed in ((16, 0), (3, 1)))
    transform = lambda fields, generator: {"image": np.asarray(fields["image"])}  # noqa: E731
    data = TrainData(source, held_out if with_held_out else None, transform)
    params, pictures = pretrain(config, masked_model(MODEL), data, folder=folder, log=log, **options)
    return params, pictures, log.read_metrics()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Four steps, two of them warm-up."""
    return train(CONFIG, tmp_path_factory.mktemp("short") / "run")


def test_pretraining_learns_to_complete_and_leaves_the_tables_alone(tmp_path):
    config = dataclasses.replace(
        CONFIG, epochs=60, loader=LoaderConfig(batch_size=4), loop=LoopConfig(log_every=10, save_every=0)
    )
    params, pictures, lines = train(config, tmp_path / "run", with_held_out=True)
    losses = [line["loss"] for line in lines if "loss" in line]
    last = lines[-1]
    assert losses[-1] < 0.5 * losses[0]
    # Well below the best constant, which is what a model that ignores the visible patches can reach.
    assert last["evaluation/explained"] > 0.3
    assert len(pictures) == 3 and all(picture.error < picture.variance for picture in pictures)
    # Pictures show the masks of the evaluation.
    np.testing.assert_allclose(np.mean([p.error for p in pictures]), last["evaluation/error"], rtol=1e-5)
    for part, width in (("encoder", 24), ("decoder", 24)):
        np.testing.assert_array_equal(params[part]["position"], sincos(width, (4, 4, 4)))


def test_rate_is_0_at_step_0_and_peaks_when_warm(short):
    rates = [line["learning_rate"] for line in short[2]]
    np.testing.assert_allclose(rates, [0.0, 1.5e-3, 3e-3, 1.5e-3], rtol=1e-6)


def assert_same(one, other, tolerance):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance)


def test_a_batch_in_parts_gives_the_same_run(short, tmp_path):
    parts, _, lines = train(dataclasses.replace(CONFIG, accumulation=4), tmp_path / "parts")
    assert_same(parts, short[0], 1e-6)
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in short[2]], rtol=1e-6)


def test_eight_devices_give_the_run_of_one(short, tmp_path):
    eight, _, _ = train(dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2)), tmp_path / "eight")
    assert_same(eight, short[0], 1e-6)


def test_every_image_is_augmented_and_masked_by_a_key_of_its_own(short):
    """The loss is that of images augmented beforehand."""
    model, images = masked_model(MODEL), jnp.asarray(balls(8, 5))
    keys = jax.random.split(jax.random.key(4), 8)

    def turn(key, image):
        return jnp.where(jax.random.bernoulli(key), image[::-1], image)

    pairs = jax.vmap(jax.random.split)(keys)
    is_turned = [bool(jax.random.bernoulli(key)) for key in pairs[:, 0]]
    assert 0 < sum(is_turned) < 8
    turned = jnp.stack([image[::-1] if flag else image for image, flag in zip(images, is_turned, strict=True)])
    expected, _ = jax.jit(partial(masked_loss, model))(short[0], pairs[:, 1], {"image": turned})
    found, _ = jax.jit(partial(_loss, model, turn))(short[0], keys, {"image": images})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_training_starts_from_given_parameters(short, tmp_path):
    given = jax.tree.map(lambda leaf: leaf + 0.25, short[0])
    still = dataclasses.replace(CONFIG, epochs=0, loop=LoopConfig(steps=1), optimizer=OptimizerConfig(peak_lr=0.0))
    params, _, _ = train(still, tmp_path / "run", start=given)
    assert_same(given, params, 0)


def test_any_encoder_of_visible_patches_is_trained_in_two_dimensions(tmp_path):
    """Of two patches out of four a linear encoder sees the mean, from which its decoder guesses the other two."""

    def init(key):
        return {"encoder": 0.1 * jax.random.normal(key, (16, 8)), "decoder": jnp.zeros((8, 16))}

    def apply(params, image, noise):
        masking = random_masking(noise, 0.5)
        tokens = take_tokens(patchify(image, (4, 4)), masking.kept) @ params["encoder"]
        guess = jnp.repeat(tokens.mean(axis=1, keepdims=True) @ params["decoder"], 2, axis=1)
        return MaeOutput(tokens, guess, masking)

    model = MaskedModel(Network(init, apply), (8, 8), 1, (4, 4))
    pattern = np.tile(np.linspace(0, 1, 16).reshape(4, 4), (2, 2))
    images = (np.random.default_rng(0).uniform(0.5, 1, (20, 1, 1)) * pattern).astype(np.float32)[..., None]
    data = TrainData(ArraySource({"image": images[:16]}), ArraySource({"image": images[16:]}), lambda fields, _: fields)
    folder = open_folder(tmp_path / "run")
    config = dataclasses.replace(CONFIG, epochs=100, optimizer=OptimizerConfig(peak_lr=3e-2, weight_decay=0.0))
    _, pictures = pretrain(config, model, data, folder=folder, log=Log(folder.path, quiet=True))
    assert read_metrics(folder.path)[-1]["evaluation/explained"] > 0.9
    np.testing.assert_allclose(pictures[0].completed, images[16], atol=0.15)


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, r"loader.batch_size: expected a multiple of 3 parts .* x 1 devices .*, found 8"),
        ({"mesh": MeshConfig(data=8), "accumulation": 2}, "loader.batch_size: expected a multiple of 2 parts .* x 8"),
        ({"mesh": MeshConfig(data=1, model=8)}, "mesh.model: expected a number of devices that divides"),
    ],
)
def test_what_does_not_divide_is_refused(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match=message):
        check_fit(config, masked_model(MODEL).network)


@pytest.mark.core
def test_a_reconstruction_keeps_what_was_seen(short):
    image = balls(1, 3)[0]
    picture = reconstruct(masked_model(MODEL), short[0], jax.random.key(1), image)
    seen = picture.seen != 0
    np.testing.assert_array_equal(picture.seen[seen], image[seen])
    np.testing.assert_array_equal(picture.completed[seen], image[seen])
    patches = picture.completed.reshape(4, 4, 4, 4, 4, 4) == image.reshape(4, 4, 4, 4, 4, 4)
    assert patches.all(axis=(1, 3, 5)).sum() == 16  # a quarter of 64 patches


@pytest.mark.core
def test_a_reconstruction_of_normalised_targets_lies_in_the_range_of_the_image(short):
    config = dataclasses.replace(MODEL, norm_target=True, sigmoid=False)
    image = 100 + 10 * balls(1, 3)[0]
    silent = jax.tree.map(jnp.zeros_like, short[0]["decoder"]["prediction"])  # predicts the mean of every patch
    params = {**short[0], "decoder": {**short[0]["decoder"], "prediction": silent}}
    picture = reconstruct(masked_model(config), params, jax.random.key(1), image)
    blocks, expected = (x.reshape(4, 4, 4, 4, 4, 4) for x in (picture.completed, image))
    means = np.broadcast_to(expected.mean(axis=(1, 3, 5), keepdims=True), expected.shape)
    is_seen = (picture.seen != 0).reshape(blocks.shape)
    np.testing.assert_allclose(blocks, np.where(is_seen, expected, means), rtol=1e-6)
    np.testing.assert_allclose(picture.error, picture.variance, rtol=1e-5)

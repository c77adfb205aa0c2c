"""Training of image-to-image networks: it learns, the average is handed on, a stopped run continues."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource
from jaxmed.diffusion.denoiser import denoising_loss
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.models.unet_guided import GuidedUnetConfig, guided_unet
from jaxmed.nn.model import Network
from jaxmed.recipes.denoiser import train_denoiser
from jaxmed.recipes.training import TrainConfig, TrainData, check_fit, initialise
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunOptions, open_run, start

MODEL = GuidedUnetConfig(width=8, multipliers=(1,), blocks=1, attention_factors=(), heads=2, groups=4)
CONFIG = TrainConfig(
    OptimizerConfig(peak_lr=3e-3, decay="constant", weight_decay=0.0, eps=1e-5),
    LoopConfig(steps=100, log_every=1, save_every=50),
    LoaderConfig(batch_size=8),
    MeshConfig(data=1),
    ema_decay=0.95,
)


def loss(apply, params, keys, batch):
    return denoising_loss(apply, VpDiscrete(), params, keys, batch)


def images(number, seed):
    """Flat squares of random brightness: all there is to learn is one number per image."""
    level = np.random.default_rng(seed).uniform(0.2, 1.8, (number, 1, 1, 1))
    return np.broadcast_to(level, (number, 8, 8, 1)).astype(np.float32)


def flip(key, fields):
    return {"image": jnp.where(jax.random.bernoulli(key), fields["image"][::-1], fields["image"])}


def take(fields, generator):
    return {"image": np.asarray(fields["image"])}


def train(config, path, with_held_out=False):
    folder = open_run("dynamicdps", "train-prior", None, RunOptions(path, quiet=True))
    if not folder.checkpoints.exists():
        start(folder)
    log = Log(folder.path, quiet=True)
    source, held_out = ArraySource({"image": images(32, 0)}), ArraySource({"image": images(10, 1)})
    data = TrainData(source, held_out if with_held_out else None, take)
    params = train_denoiser(config, guided_unet(MODEL, (8, 8)), loss, data, flip, folder=folder, log=log)
    return params, log.read_metrics()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A hundred steps, saved in the middle."""
    path = tmp_path_factory.mktemp("run") / "run"
    return path, *train(CONFIG, path, with_held_out=True)


def assert_same(one, other, tolerance):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance)


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def test_it_learns_to_tell_noise_from_image(run):
    lines = run[2]
    # A network that knows nothing predicts no noise: its loss is 1.
    assert 0.8 < losses(lines)[0] < 1.2 and lines[-1]["evaluation/loss"] < 0.5
    assert lines[-1]["evaluation/image_error"] > 0


def test_a_stopped_run_continues_to_the_same_numbers(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "state" / "100")
    params, lines = train(CONFIG, tmp_path / "run")
    assert_same(params, run[1], 0)
    assert losses(lines) == losses(run[2]) and len(losses(lines)) == 100


def test_parts_and_devices_give_the_same_run(run, tmp_path):
    config = dataclasses.replace(
        CONFIG, accumulation=2, mesh=MeshConfig(data=2, model=2), loop=LoopConfig(steps=4, log_every=1, save_every=0)
    )
    _, lines = train(config, tmp_path / "run")
    np.testing.assert_allclose(losses(lines), losses(run[2])[:4], rtol=1e-5)


@pytest.mark.core
def test_any_network_is_trained(tmp_path):
    """A network of one number: the noise that it predicts is a share of what it sees."""
    network = Network(lambda key: {"share": jnp.zeros(())}, lambda params, x, t: params["share"] * x)
    folder = open_run("dynamicdps", "train-prior", None, RunOptions(tmp_path / "run", quiet=True))
    start(folder)
    data = TrainData(ArraySource({"image": images(8, 0)}), None, take)
    config = dataclasses.replace(CONFIG, loop=LoopConfig(steps=40, log_every=40, save_every=0), ema_decay=0.0)
    log = Log(folder.path, quiet=True)
    params = train_denoiser(config, network, loss, data, flip, folder=folder, log=log)
    assert 0.05 < float(params["share"]) < 0.2


@pytest.mark.core
def test_given_parameters_are_the_start():
    network = guided_unet(MODEL, (8, 8))
    drawn = network.init(jax.random.key(0))
    given = {"head": jax.tree.map(jnp.ones_like, drawn["head"])}
    started = initialise(network, jax.random.key(0), given)
    assert_same(started["head"], given["head"], 0)
    assert_same({**started, "head": drawn["head"]}, drawn, 0)


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "model", "size", "words"),
    [
        ({}, MODEL, (8, 8, 8), "size: expected 2 numbers"),
        ({}, dataclasses.replace(MODEL, multipliers=(1, 2, 2)), (8, 6), "size: expected multiples of 4"),
        (
            {"loader": LoaderConfig(batch_size=3), "accumulation": 2},
            MODEL,
            (8, 8),
            "loader.batch_size: expected a multiple",
        ),
        ({"mesh": MeshConfig(data=1, model=4)}, MODEL, (8, 8), "mesh.model: expected a number of devices that divides"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(changes, model, size, words):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match=words):
        check_fit(config, guided_unet(model, size))

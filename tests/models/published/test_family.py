"""A family is one record: here of a two-dimensional autoencoder, which nothing else knows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.io import safetensors
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published import load, timm_vit
from jaxmed.models.published.family import Family
from jaxmed.models.vit import VitConfig
from jaxmed.weights import describe

RELEASED = timm_vit.Released("retina", 2, heads={16: 2}, decoder_heads={8: 2})


def preprocess(config: Any) -> Preprocess:
    intensity = Intensity("window", window=(0.0, 255.0), clip=False)
    return Preprocess(config.encoder.image_size, config.encoder.channels, intensity=intensity)


RETINA = Family(
    name="retina",
    title="a toy of fundus photographs",
    licence="for tests only",
    where="nowhere",
    keys="those of MAE",
    kinds=timm_vit.KINDS,
    recognises=functools.partial(timm_vit.is_vit, axes=2),
    infer=functools.partial(timm_vit.infer, RELEASED),
    facts=timm_vit.facts,
    entries=timm_vit.entries,
    make_model=timm_vit.make_vit_model,
    preprocess=preprocess,
    notes=lambda config, settings: (),
    describe=timm_vit.describe,
    own_record=functools.partial(timm_vit.own_record, RELEASED),
    resize=timm_vit.resize,
    optional=("decoder",),
)
ENCODER = VitConfig((12, 12), (4, 4), 3, width=16, depth=1, heads=2, hidden=32)
MAE = MaeConfig(ENCODER, decoder_width=8, decoder_depth=1, decoder_heads=2, decoder_hidden=16, sigmoid=False)
GRADER = ClassifierConfig(ENCODER, HeadConfig(5, "class"))


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    others = {name: family for name, family in load.FAMILIES.items() if name != "retfound"}  # which has the same names
    monkeypatch.setattr(load, "FAMILIES", {**others, "retina": RETINA})


def make_tensors(config, seed=0):
    generator = np.random.default_rng(seed)
    return {entry.name: generator.normal(size=entry.shape).astype(np.float32) for entry in RETINA.entries(config)}


@pytest.mark.parametrize("config", [MAE, GRADER], ids=["mae", "classifier"])
def test_a_two_dimensional_family_is_read_run_and_written_again(tmp_path, config):
    tensors = make_tensors(config)
    safetensors.write(tmp_path / "released.safetensors", tensors)
    published = load.load_published(tmp_path / "released.safetensors")
    assert (published.report.family, published.report.left_over, published.config) == ("retina", (), config)
    image = published.preprocess(np.full((30, 20, 3), 255, np.uint8))
    assert image.shape == (12, 12, 3) and "12 x 12 pixels" in describe(published, tmp_path)
    key = {} if config is GRADER else {"key": jax.random.key(0)}
    output = published.model.apply(published.params, jnp.asarray(image)[None], **key)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output) if leaf.dtype == jnp.float32)
    load.export_published(published, tmp_path / "again.safetensors")
    again = safetensors.read(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def test_positions_of_a_picture_are_interpolated(tmp_path):
    tensors = make_tensors(MAE)
    rows = np.arange(3, dtype=np.float32)
    tensors["pos_embed"][0, 1:] = np.repeat(rows, 3)[:, None]  # the row, in every channel
    safetensors.write(tmp_path / "released.safetensors", tensors)
    larger = load.resize_positions(load.load_published(tmp_path / "released.safetensors"), (24, 12))
    assert larger.config.encoder.grid == (6, 3) and larger.preprocess.size == (24, 12)
    table = np.asarray(larger.params["encoder"]["position"][1:]).reshape(6, 3, 16)
    np.testing.assert_allclose(table[..., 0], np.repeat([[0, 0.25, 0.75, 1.25, 1.75, 2]], 3, 0).T, atol=1e-6)


def test_a_family_says_what_a_checkpoint_of_its_own_run_is():
    # A state of training names no sizes of a classifier: they follow from the shapes.
    leaves = {entry.path: np.zeros(entry.target, np.float32) for entry in RETINA.entries(GRADER)}
    run = {"system": "retina", "config": {"preprocess": {"size": [12, 12]}}}
    record = RETINA.own_record("checkpoint", run, leaves)
    assert record is not None and record["kind"] == "classifier" and record["config"]["encoder"]["channels"] == 3
    assert RETINA.own_record("checkpoint", {"system": "tangerine"}, leaves) is None

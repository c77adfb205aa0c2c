"""A warm start from a 2D transformer: what fits by name and shape is taken bit for bit, the rest is drawn."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmed.arrays.trees import named_leaves
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.published.timm_vit import entries
from jaxmed.models.published.warm_start import read_warm_start
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.training import initialise

ENCODER = VitConfig((16, 16, 16), (8, 8, 8), width=12, depth=2, heads=2, hidden=24)
MODEL = MaeConfig(ENCODER, decoder_width=8, decoder_depth=1, decoder_heads=2, decoder_hidden=16)
DIFFERING = {
    "patch_embed.proj.weight": (12, 3, 16, 16), "pos_embed": (1, 197, 12), "decoder_pos_embed": (1, 197, 8),
    "decoder_pred.weight": (768, 8), "decoder_pred.bias": (768,),
}  # fmt: skip
"""Of a 2D masked autoencoder of the same widths on 224 x 224 colour images; its prediction has no sigmoid."""


def write(path, model=MODEL, leave=()):
    """Write a 2D masked autoencoder in the names of its code."""
    draw = np.random.default_rng(3)
    shapes = {entry.name: entry.shape for entry in entries(model) if not entry.name.startswith("decoder_pred")}
    shapes |= DIFFERING
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name not in leave}
    safetensors.write(path, tensors)
    return tensors


def test_blocks_norms_and_tokens_are_taken_and_all_else_is_drawn(tmp_path):
    tensors = write(tmp_path / "image.safetensors")
    warm = read_warm_start(tmp_path / "image.safetensors", entries(MODEL))
    taken = named_leaves(warm.params)
    qkv = tensors["blocks.1.attn.qkv.weight"]
    kernel = taken["encoder/blocks/layer_1/attention/qkv/kernel"]
    np.testing.assert_array_equal(kernel, qkv.T.reshape(12, 3, 2, 6))
    np.testing.assert_array_equal(taken["encoder/class_token"], tensors["cls_token"].reshape(12))
    np.testing.assert_array_equal(taken["decoder/mask_token"], tensors["mask_token"].reshape(8))
    left = {"encoder/position", "encoder/patch_embed/kernel", "decoder/position", "decoder/prediction/kernel",
            "decoder/prediction/bias"}  # fmt: skip
    network = masked_model(MODEL).network
    drawn = initialise(network, jax.random.key(0))
    started = named_leaves(initialise(network, jax.random.key(0), warm.params))
    assert set(started) - set(taken) == left
    for name, leaf in started.items():
        np.testing.assert_array_equal(leaf, taken[name] if name in taken else named_leaves(drawn)[name], err_msg=name)
    assert "5 drawn (pos_embed, patch_embed.proj.weight, decoder_pos_embed, decoder_pred.0.weight" in warm.note


@pytest.mark.parametrize(
    ("model", "leave", "words"),
    [
        (MODEL, ("blocks.1.mlp.fc2.bias",), "'blocks.1.mlp.fc2.bias' of shape (12,), found no such tensor"),
        (dataclasses.replace(MODEL, encoder=dataclasses.replace(ENCODER, hidden=20)), (), "(24, 12), found shape (20,"),
        (dataclasses.replace(MODEL, encoder=dataclasses.replace(ENCODER, depth=1)), (), "'blocks.1.norm1.weight'"),
    ],
)
def test_a_file_without_every_block_is_refused_by_name(model, leave, words, tmp_path):
    write(tmp_path / "image.safetensors", model, leave)
    with pytest.raises(InputError) as error:
        read_warm_start(tmp_path / "image.safetensors", entries(MODEL))
    assert words in str(error.value) and "image.safetensors" in str(error.value)

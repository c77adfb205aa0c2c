"""DINOv2, DINOv3 and 2D transformers in timm's names: PyTorch's tokens (stored, and live), names, sizes, positions."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw, draw_image

from jaxmed.arrays.position import resize_matrix, rotary_angles
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.published import dino
from jaxmed.models.published.load import FAMILIES, export_published, load_published, resize_positions
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import make_model

REFERENCES = Path(__file__).resolve().parents[2] / "references"
TOLERANCE = {"atol": 2e-5, "rtol": 0}  # float32, as the specification asks
FOUND = {  # family, naming
    "dinov2": ("dinov2", "transformers 5"),
    "dinov2_gated": ("dinov2", "transformers 5"),
    "dinov2_registers": ("dinov2", "transformers 5"),
    "dinov2_classifier": ("dinov2", "transformers 5 in dinov2."),
    "dinov3": ("dinov3", "transformers"),
    "dinov3_gated": ("dinov3", "transformers"),
    "timm": ("retfound", ""),
    "timm_scaled": ("dinov2", ""),
    "timm_registers": ("dinov2", "timm"),
}
TINY = VitConfig(
    (28, 28), (14, 14), 3, 16, 2, 2, 24, positions="learned", mask_token=True, layer_scale=1.0, mlp="swiglu"
)  # fmt: skip
TURNED = dataclasses.replace(
    TINY, image_size=(32, 32), patch_size=(16, 16), positions="rope", registers=4, qkv_bias="all but keys", epsilon=1e-5
)


def stored_tensors(stored, name):
    """Draw the tensors of a reference from their names, as the script that made it did."""
    found = {}
    for line in stored[f"{name}/names"]:
        key, shape = line.split(" ", 1)
        found[key] = draw(key, tuple(int(number) for number in re.findall(r"\d+", shape)))
    return found


def hidden_states(published, image):
    """Return every hidden state and what the model returns."""
    config = published.config
    encoder = getattr(config, "encoder", config)
    states = make_model(Vit(encoder)).apply(published.params["encoder"], image, method="hidden_states")
    last = published.model.apply(published.params, image)
    if isinstance(config, ClassifierConfig):
        return states, last[0]
    return states, getattr(last, "tokens", last)


@pytest.fixture(scope="module")
def stored():
    with np.load(REFERENCES / "vit.npz") as file:
        yield dict(file)


@pytest.mark.core
@pytest.mark.parametrize("name", FOUND)
def test_every_hidden_state_equals_the_stored_one_of_pytorch(tmp_path, stored, name):
    safetensors.write(tmp_path / "file.safetensors", stored_tensors(stored, name))
    published = load_published(tmp_path / "file.safetensors", heads=4)
    assert (published.report.family, published.naming) == FOUND[name]
    assert published.report.left_over == () and not published.report.is_partial
    sizes = sorted({key.split("/")[1] for key in stored if key.startswith(f"{name}/") and key.endswith("/last")})
    for size in sizes:
        shape = tuple(int(edge) for edge in size.split("x"))
        states, last = hidden_states(resize_positions(published, shape), jnp.asarray(draw_image(shape)))
        np.testing.assert_allclose(last, stored[f"{name}/{size}/last"], **TOLERANCE, err_msg=size)
        for depth, state in enumerate(states):
            if f"{name}/{size}/{depth}" in stored:
                np.testing.assert_allclose(state, stored[f"{name}/{size}/{depth}"], **TOLERANCE, err_msg=f"{depth}")
    assert f"{name}/{sizes[0]}/last" in stored and np.std(stored[f"{name}/{sizes[0]}/last"]) > 0.3


@pytest.mark.core
@pytest.mark.parametrize("name", FOUND)
def test_names_and_bits_come_back(tmp_path, stored, name):
    tensors = stored_tensors(stored, name)
    safetensors.write(tmp_path / "file.safetensors", tensors)
    export_published(load_published(tmp_path / "file.safetensors", heads=4), tmp_path / "again.safetensors")
    again = safetensors.read(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)
    # What was exported is read again without being told anything.
    assert load_published(tmp_path / "again.safetensors").naming == FOUND[name][1]


@pytest.mark.peers
@pytest.mark.parametrize("name", FOUND)
def test_every_hidden_state_equals_pytorchs_live(tmp_path, name):
    import torch_vit

    model = torch_vit.make(name)
    safetensors.write(tmp_path / "file.safetensors", torch_vit.tensors(model))
    published = load_published(tmp_path / "file.safetensors", heads=4)
    for size in torch_vit.RUNS[name]:
        image = draw_image(size)
        wanted, last = torch_vit.run(model, image)
        states, found = hidden_states(resize_positions(published, size), jnp.asarray(image))
        np.testing.assert_allclose(found, last, **TOLERANCE)
        assert len(states) == len(wanted)
        for state, other in zip(states, wanted, strict=True):
            np.testing.assert_allclose(state, other, **TOLERANCE)


@pytest.mark.peers
def test_a_full_size_encoder_equals_timms(tmp_path):
    import torch
    import torch_vit

    model = torch_vit.import_timm().VisionTransformer(
        img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16, num_classes=0, global_pool=""
    )
    safetensors.write(tmp_path / "large.safetensors", torch_vit.tensors(model))
    published = load_published(tmp_path / "large.safetensors")
    assert published.config.encoder.heads == 16
    image = draw_image((224, 224))
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(image).permute(0, 3, 1, 2)).numpy()
    apply = jax.jit(make_model(Vit(published.config.encoder)).apply)
    np.testing.assert_allclose(apply(published.params["encoder"], image), wanted, atol=1e-3, rtol=0)


def draw_all(generation, config, style=""):
    return {entry.name: draw(entry.name, entry.shape) for entry in dino.entries(generation, config, style)}


OFFICIAL = {
    "dinov2": ["cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.1.attn.qkv.bias",
               "blocks.0.ls1.gamma", "blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.bias", "norm.weight"],
    "dinov3": ["cls_token", "mask_token", "storage_tokens", "blocks.0.mlp.w1.weight", "blocks.0.mlp.w2.weight",
               "blocks.0.mlp.w3.weight", "blocks.1.attn.qkv.bias", "norm.bias"],
}  # fmt: skip
HUB = ["embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
       "encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.attention.output.dense.bias",
       "encoder.layer.1.layer_scale1.lambda1", "encoder.layer.0.mlp.weights_in.weight", "layernorm.weight"]  # fmt: skip


@pytest.mark.parametrize("generation,config", [("dinov2", TINY), ("dinov3", TURNED)])
def test_official_files_hold_the_published_names(tmp_path, generation, config):
    tensors = draw_all(generation, config)
    assert set(OFFICIAL[generation]) <= set(tensors)
    if generation == "dinov3":  # constants of the code
        tensors["rope_embed.periods"] = np.float32([1.0, 10.0])
        tensors["blocks.0.attn.qkv.bias_mask"] = np.full(48, np.nan, np.float32)
    safetensors.write(tmp_path / "official.safetensors", tensors)
    published = load_published(tmp_path / "official.safetensors", heads=2)
    wanted = config if generation == "dinov2" else dataclasses.replace(config, image_size=(224, 224))
    assert published.config == wanted and published.naming == "" and published.report.left_over == ()
    export_published(published, tmp_path / "again.safetensors")
    again = safetensors.read(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[key], tensors[key], equal_nan=True) for key in tensors)


def test_old_names_of_transformers_hold_the_same_model(tmp_path):
    official, hub = draw_all("dinov2", TINY), None
    safetensors.write(tmp_path / "official.safetensors", official)
    published = load_published(tmp_path / "official.safetensors", heads=2)
    export_published(dataclasses.replace(published, naming="transformers"), tmp_path / "hub.safetensors")
    hub = safetensors.read(tmp_path / "hub.safetensors")
    assert set(HUB) <= set(hub)
    query = hub["encoder.layer.0.attention.attention.query.weight"]
    assert np.array_equal(query, official["blocks.0.attn.qkv.weight"][:16])
    safetensors.write(tmp_path / "bare.safetensors", hub)
    again = load_published(tmp_path / "bare.safetensors", heads=2)
    assert again.naming == "transformers" and again.config == published.config
    same = jax.tree.map(np.array_equal, again.params, published.params)
    assert all(jax.tree.leaves(same))


def test_a_teacher_of_pre_training_is_read_without_its_heads(tmp_path):
    tensors = {f"teacher.backbone.{name}": value for name, value in draw_all("dinov2", TINY).items()}
    chunked = {re.sub(r"blocks\.(\d)\.", r"blocks.0.\1.", name): value for name, value in tensors.items()}
    heads = {f"teacher.{head}.last_layer.weight_g": np.ones((8, 1), np.float32) for head in ("dino_head", "ibot_head")}
    for number, file in enumerate((tensors, chunked)):
        safetensors.write(tmp_path / f"{number}.safetensors", file | heads)
        published = load_published(tmp_path / f"{number}.safetensors", heads=2)
        assert published.config == TINY and len(published.report.left_over) == 2
        same = jax.tree.map(
            np.array_equal, published.params, load_published(tmp_path / "0.safetensors", heads=2).params
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "pos_embed", "norm.bias"])
def test_a_file_without_a_tensor_is_refused(tmp_path, name):
    tensors = draw_all("dinov2", TINY)
    del tensors[name]
    safetensors.write(tmp_path / "partial.safetensors", tensors)
    with pytest.raises(InputError, match=re.escape(name)):
        load_published(tmp_path / "partial.safetensors", heads=2)


def test_a_file_of_the_other_generation_is_refused_by_name(tmp_path):
    safetensors.write(tmp_path / "v3.safetensors", draw_all("dinov3", TURNED))
    safetensors.write(tmp_path / "v2.safetensors", draw_all("dinov2", TINY))
    with pytest.raises(InputError, match="weights of dinov2.*weights of dinov3: no table of positions"):
        load_published(tmp_path / "v3.safetensors", "dinov2", heads=2)
    with pytest.raises(InputError, match="weights of dinov3.*weights of dinov2: a table"):
        load_published(tmp_path / "v2.safetensors", "dinov3", heads=2)
    with pytest.raises(InputError, match="say how many heads"):
        load_published(tmp_path / "v2.safetensors")


@pytest.mark.parametrize("pool,norm", [("class", True), ("mean", True), ("concat", False)])
def test_fine_tuned_files_come_back(tmp_path, pool, norm):
    encoder = dataclasses.replace(TINY, final_norm=pool != "mean", mask_token=False)
    config = ClassifierConfig(encoder, HeadConfig(5, pool, norm=norm))
    safetensors.write(tmp_path / "tuned.safetensors", draw_all("dinov2", config, "timm"))
    published = load_published(tmp_path / "tuned.safetensors", heads=2)
    assert published.config == config and published.naming == "timm"
    logits, _ = published.model.apply(published.params, jnp.asarray(draw_image((28, 28))))
    assert logits.shape == (1, 5)


def test_preprocessing_is_that_of_the_released_evaluation():
    small, large = (FAMILIES["dinov2"].preprocess(dataclasses.replace(TINY, image_size=(n, n))) for n in (224, 518))
    assert (small.shorter, large.shorter, small.channels) == (256, 518, 3)
    picture = np.ones((300, 400, 3), np.float32)
    picture[:, 200:] = 0
    np.testing.assert_allclose(
        small(picture)[0, 0], (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], rtol=1e-5
    )


def test_another_image_size_is_cut_out_of_as_much_of_the_picture(tmp_path):
    safetensors.write(tmp_path / "official.safetensors", draw_all("dinov2", TINY))
    published = load_published(tmp_path / "official.safetensors", heads=2)
    found = {edge: resize_positions(published, (edge, edge)).preprocess for edge in (28, 224, 518)}
    assert {edge: one.shorter for edge, one in found.items()} == {28: 32, 224: 256, 518: 518}
    assert all(one.size == (edge, edge) for edge, one in found.items())
    own = dataclasses.replace(published, preprocess=dataclasses.replace(published.preprocess, shorter=40))
    assert resize_positions(own, (56, 56)).preprocess.shorter == 80


# Positions -----------------------------------------------------------------------------------------------------------


def test_rows_of_interpolation_sum_to_one_and_equal_sizes_stay():
    for how in ("linear", "size", "offset", "antialias"):
        np.testing.assert_allclose(resize_matrix(37, 16, how).sum(1), 1, atol=1e-6)
    for how in ("linear", "size", "antialias"):
        np.testing.assert_allclose(resize_matrix(7, 7, how), np.eye(7), atol=1e-7)


@pytest.mark.peers
@pytest.mark.parametrize(
    "how,old,new,options",
    [
        ("size", 37, 16, {}),
        ("size", 14, 16, {}),
        ("offset", 37, 16, {"scale_factor": 16.1 / 37}),
        ("antialias", 16, 24, {"antialias": True}),
        ("antialias", 37, 16, {"antialias": True}),
    ],
)
def test_interpolation_equals_pytorchs(how, old, new, options):
    import torch

    table = np.random.default_rng(0).standard_normal((1, 3, old, old)).astype(np.float32)
    size = {} if "scale_factor" in options else {"size": (new, new)}
    wanted = torch.nn.functional.interpolate(torch.tensor(table), mode="bicubic", **size, **options).numpy()
    matrix = resize_matrix(old, new, how)
    np.testing.assert_allclose(matrix @ table @ matrix.T, wanted, atol=1e-5)


def test_rotations_leave_the_prefix_and_see_differences_alone():
    angles = np.asarray(rotary_angles(8, (3, 5)))
    assert angles.shape == (15, 8) and np.array_equal(angles[:, :4], angles[:, 4:])
    # The first pairs turn with the row, the others with the column; a row is 2/3 apart, periods are 1 and 10.
    np.testing.assert_allclose(angles[5] - angles[0], np.tile([2 * np.pi * 2 / 3, 2 * np.pi / 15, 0, 0], 2), atol=1e-6)
    np.testing.assert_allclose(angles[1] - angles[0], np.tile([0, 0, 2 * np.pi * 2 / 5, 2 * np.pi / 25], 2), atol=1e-6)
    from jaxmed.models.vit import rotation_of
    from jaxmed.nn.transformer import rotate

    turns = rotation_of(angles, 2)
    query, key = np.random.default_rng(0).standard_normal((2, 1, 17, 1, 1, 8)).astype(np.float32)
    same = np.repeat(query[:, 2:3], 17, 1), np.repeat(key[:, 2:3], 17, 1)
    turned_q, turned_k = (np.asarray(rotate(jnp.asarray(part), turns))[0, :, 0, 0] for part in same)
    assert np.array_equal(turned_q[:2], same[0][0, :2, 0, 0])
    products = turned_q[2:] @ turned_k[2:].T
    # Patches (0, 0) and (1, 2) are as far apart as (1, 1) and (2, 3).
    assert abs(products[0, 7] - products[6, 13]) < 1e-5 < 1e-3 < abs(products[0, 7] - products[0, 8])

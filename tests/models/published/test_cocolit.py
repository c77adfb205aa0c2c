"""CoCoLIT's weights: MONAI's numbers (stored by scripts/make_references.py, and live), every naming, round trips."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw, draw_latent

from jaxmed.arrays.trees import named_leaves
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, AutoencoderKlConfig, autoencoder
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import FAMILIES, export_published, load_published, published_record
from jaxmed.models.unet_latent import (
    COCOLIT_CONTROL_NET,
    COCOLIT_UNET,
    ControlNetConfig,
    LatentUnetConfig,
    control_net,
    latent_unet,
)
from jaxmed.train.checkpoint import export_parameters
from jaxmed.weights import describe

REFERENCES = Path(__file__).resolve().parents[2] / "references"
AUTOENCODER = AutoencoderKlConfig(latent_channels=3, widths=(32, 64), blocks=(1, 2))
UNET = LatentUnetConfig(
    channels=3, outputs=3, widths=(32, 64), blocks=(1, 2), attention_levels=(False, True), head_channels=32
)
CONTROL = ControlNetConfig(dataclasses.replace(UNET, outputs=3), 2, (32,))
FLAT = dataclasses.replace(UNET, dimensions=2, resblock_updown=False, projection=True)
FLAT_CONTROL = dataclasses.replace(CONTROL, unet=FLAT)
TINY = dataclasses.replace(UNET, widths=(32,), blocks=(1,), attention_levels=(True,), head_channels=16)
TIMES = jnp.array([3.0, 721.0])


def make(config, naming="", **changes):
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in cocolit.entries(config, naming)}
    tensors |= cocolit.unapplied(config, naming) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def write(path, tensors):
    safetensors.write(path, tensors)
    return path


def load(path, config, naming="", **changes):
    heads = None if isinstance(config, AutoencoderKlConfig) else cocolit.facts(config).heads
    return load_published(write(path, make(config, naming, **changes)), heads=heads)


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def assert_close(found, expected, name):
    """Within 1e-4 of the largest value."""
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=name)


@jax.jit
def run_autoencoder(params, image):
    model = autoencoder(AUTOENCODER)
    mean, deviation = model.encode(params, image)
    return {"mean": mean, "deviation": deviation, "image": model.decode(params, mean)}


def run_networks(unet, net, z, condition):
    @jax.jit
    def run(unet_params, net_params, z, condition):
        skips, middle = net.model.apply(net_params, z, TIMES, condition)
        plain = unet.model.apply(unet_params, z, TIMES)
        controlled = unet.model.apply(unet_params, z, TIMES, (skips, middle))
        found = {"plain": plain, "controlled": controlled, "middle": middle}
        return found | {f"skip_{number}": skip for number, skip in enumerate(skips)}

    return run(unet.params, net.params, z, condition)


@pytest.mark.core
def test_images_equal_the_stored_ones_of_monai_at_odd_sizes(tmp_path):
    published = load(tmp_path / "src.safetensors", AUTOENCODER)
    assert published.config == AUTOENCODER and published.report.left_over == published.report.missing == ()
    with np.load(REFERENCES / "cocolit.npz") as stored:
        for name, value in run_autoencoder(published.params, draw_latent((10, 13, 12), 1)).items():
            assert_close(value, stored[f"autoencoder/{name}"], name)


@pytest.mark.core
@pytest.mark.parametrize(
    ("place", "unet", "control", "naming"),
    [("volume", UNET, CONTROL, "core"), ("picture", FLAT, FLAT_CONTROL, "combined")],
)
def test_predictions_and_residuals_equal_the_stored_ones_of_monai(tmp_path, place, unet, control, naming):
    space = {"volume": (4, 2, 6), "picture": (6, 4)}[place]
    both = load(tmp_path / "dif.safetensors", unet, naming), load(tmp_path / "cnt.safetensors", control, naming)
    assert [one.config for one in both] == [unet, control] and all(one.report.left_over == () for one in both)
    with np.load(REFERENCES / "cocolit.npz") as stored:
        for name, value in run_networks(*both, draw_latent(space, 3), draw_latent(space, 2, 1)).items():
            assert_close(value, stored[f"{place}/{name}"], name)


@pytest.mark.parametrize(
    ("config", "tensors", "numbers"),
    [(COCOLIT_AUTOENCODER, 130, 20_944_897), (COCOLIT_UNET, 348, 101_241_604), (COCOLIT_CONTROL_NET, 180, 43_143_424)],
)
def test_the_released_files_are_wholly_known(config, tensors, numbers):
    """Every parameter has its tensors, and every tensor is a parameter or a map that nothing applies."""
    entries = cocolit.entries(config)
    shapes = {entry.name: entry.shape for entry in entries}
    shapes |= {name: array.shape for name, array in cocolit.unapplied(config).items()}
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (tensors, numbers)
    z, image = jnp.zeros((1, 4, 4, 4, 4)), jnp.zeros((1, 4, 4, 4, 1))
    match config:
        case AutoencoderKlConfig():
            init, inputs = autoencoder(config).init, (image,)
        case LatentUnetConfig():
            init, inputs = latent_unet(config).init, (z, TIMES[:1])
        case _:
            init, inputs = control_net(config).init, (z, TIMES[:1], z)
    found = named_leaves(jax.eval_shape(init, jax.random.key(0), *inputs))
    assert {entry.path: entry.whole for entry in entries} == {name: leaf.shape for name, leaf in found.items()}
    assert cocolit.recognises(shapes) and not any(
        family.recognises({name: np.empty(shape, np.int8) for name, shape in shapes.items()})
        for name, family in FAMILIES.items() if name != "cocolit"
    )  # fmt: skip


def test_sizes_of_the_released_files_are_read_without_being_told():
    for config in (COCOLIT_AUTOENCODER, COCOLIT_UNET, COCOLIT_CONTROL_NET):
        tensors = {entry.name: np.broadcast_to(np.float32(0), entry.shape) for entry in cocolit.entries(config)}
        assert cocolit.infer("a", tensors) == config
    assert cocolit.facts(COCOLIT_UNET).heads == cocolit.facts(COCOLIT_CONTROL_NET).heads == 1


ALL = [
    *((config, "") for config in (AUTOENCODER, dataclasses.replace(AUTOENCODER, dimensions=2, outputs=2))),
    *((config, naming) for config in (UNET, CONTROL) for naming in ("", "core", "combined")),
    *((config, naming) for config in (FLAT, FLAT_CONTROL) for naming in ("core", "combined")),
    (dataclasses.replace(FLAT, projection=False, outputs=5), ""),
    (ControlNetConfig(TINY, 1, (16, 24, 32)), ""),
]  # fmt: skip


@pytest.mark.parametrize(("config", "naming"), ALL)
def test_sizes_are_read_and_the_round_trip_is_exact(config, naming, tmp_path):
    published = load(tmp_path / "a.safetensors", config, naming)
    assert (published.config, published.naming) == (config, naming)
    export_published(published, tmp_path / "b.safetensors")
    first, second = (safetensors.read(tmp_path / f"{name}.safetensors") for name in "ab")
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in second.items()}
    again = load_published(tmp_path / "b.safetensors")  # which says its heads itself
    assert again.config == config and again.preprocess == published.preprocess and same(again.params, published.params)


@pytest.mark.parametrize("config", [UNET, CONTROL])
def test_all_names_of_a_network_are_the_same_parameters(config, tmp_path):
    legacy = make(config)
    plain = load(tmp_path / "a.safetensors", config)
    dead = {name: draw(name, legacy[name].shape) for name in legacy if ".proj_attn." in name}
    drawn = load(tmp_path / "b.safetensors", config, **dead)
    assert same(drawn.params, plain.params) and set(drawn.report.left_over) == set(dead)
    assert any("proj_attn" in note for note in drawn.report.notes)
    core = {}
    for name, tensor in legacy.items():
        if ".proj_attn." not in name:
            core[name.replace(".to_", ".attn.to_")] = tensor
    joined = {name: tensor for name, tensor in core.items() if ".attn.to_" not in name}
    for name in core:
        if ".attn.to_q." in name:
            stem, part = name.split(".to_q.")
            joined[f"{stem}.qkv.{part}"] = np.concatenate([core[f"{stem}.to_{one}.{part}"] for one in "qkv"])
    for naming, tensors in (("core", core), ("combined", joined)):
        found = load_published(write(tmp_path / f"{naming}.safetensors", tensors), heads=2)
        assert found.naming == naming and found.report.left_over == () and same(found.params, plain.params)


def test_a_projection_is_applied_in_cores_names_alone(tmp_path):
    config = dataclasses.replace(TINY, projection=True)
    published = load(tmp_path / "a.safetensors", config, "core")
    assert published.config.projection and "out" in published.params["encoder"]["middle"]["attention_0"]
    assert any("out_proj" in note for note in published.report.notes)
    legacy = load(tmp_path / "b.safetensors", TINY)
    assert not legacy.config.projection and "out" not in legacy.params["encoder"]["middle"]["attention_0"]


def test_kinds_are_told_apart_and_say_what_they_are(tmp_path):
    for config, kind, words in (
        (AUTOENCODER, "autoencoder", "KL autoencoder (MAISI)"),
        (UNET, "latent-denoiser", "a U-Net of latents"),
        (CONTROL, "controlnet", "2 channels, through 32"),
    ):
        published = load(tmp_path / f"{kind}.safetensors", config)
        assert (published.report.family, published.report.kind) == ("cocolit", kind)
        text = describe(published, tmp_path)
        assert words in text and "CC BY-NC 4.0" in text
    assert cocolit.preprocess(AUTOENCODER).size == (128, 152, 128) and cocolit.preprocess(UNET).channels == 3


def test_what_is_cut_to_the_input_has_the_released_borders(tmp_path):
    """Zeros are added before values are scaled, so that borders of MRI and SUVR are no zeros."""
    for preprocess, border in ((cocolit.MRI, 2.0154), (cocolit.SUVR, -0.5553)):
        small = dataclasses.replace(preprocess, size=(8, 8, 8))
        found = small(np.full((4, 6, 8), 0.5, np.float32) + np.eye(8, dtype=np.float32)[:6][None])
        np.testing.assert_allclose(found[0, :, :, 0], border, atol=1e-4)
        np.testing.assert_allclose(found[:, 0], border, atol=1e-4)
        inside = (0.5 - preprocess.intensity.mean[0]) / preprocess.intensity.std[0]
        np.testing.assert_allclose(found[3, 2, 5, 0], inside, atol=1e-4)


def test_own_folders_are_read_again(tmp_path):
    for config, naming in ((AUTOENCODER, ""), (dataclasses.replace(TINY, projection=True), "combined")):
        published = load(tmp_path / f"a{naming}.safetensors", config, naming)
        export_parameters(tmp_path / f"model{naming}", published.params, published_record(published))
        again = load_published(tmp_path / f"model{naming}")
        assert (again.config, again.naming) == (config, naming) and same(again.params, published.params)


def test_checkpoints_of_own_runs_say_their_kind():
    run = {"system": "cocolit", "config": {"model": {"widths": [32]}}}
    for sign, kind in (("to_mean/kernel", "autoencoder"), ("after_middle/kernel", "controlnet")):
        record = cocolit.own_record("a", run, {sign: np.zeros(1)})
        assert record == {"kind": kind, "config": {"widths": [32]}, "preprocess": None}
    assert cocolit.own_record("a", {"system": "brainfm"}, {"to_mean/kernel": np.zeros(1)}) is None


ONE = np.ones((32, 32, 1, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TINY, {"middle_block.resnet_1.norm1.bias": None}, r"all \d+ tensors of the encoder, found no middle_block"),
        (TINY, {"up_blocks.0.resnets.1.norm1.bias": None}, r"all \d+ tensors of the up_0, found no up_blocks"),
        (TINY, {"class_embedding.weight": ONE}, "told nothing but a time"),
        (TINY, {"down_blocks.0.attentions.0.transformer_blocks.0.norm1.bias": ONE}, "told nothing but a time"),
        (
            TINY,
            {"down_blocks.0.resnets.0.norm1.weight": ONE},
            r"'down_blocks.0.resnets.0.norm1.weight' of shape \(32,\)",
        ),
        (TINY, {"conv_in.conv.weight": np.ones((32, 3, 3), np.float32)}, "a first convolution of images or volumes"),
        (AUTOENCODER, {"decoder.blocks.1.norm1.weight": None}, "tensors of the decoder, found no decoder.blocks.1"),
        (AUTOENCODER, {"encoder.blocks.2.conv.conv.conv.weight": None}, "'encoder.blocks.2' is no convolution"),
    ],
)
def test_files_of_other_networks_are_refused(config, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.safetensors", config, **changes)


def test_heads_are_asked_for_where_shapes_do_not_tell_them(tmp_path):
    path = write(tmp_path / "a.safetensors", make(TINY))
    for heads, message in (
        (None, "weights import --heads N"),
        (3, "a divisor of 32 channels, found 3"),
    ):
        with pytest.raises(InputError, match=message):
            load_published(path, heads=heads)
    path = write(tmp_path / "b.safetensors", make(AUTOENCODER))
    with pytest.raises(InputError, match="heads: expected none for this model, found 1"):
        load_published(path, heads=1)


# --- Live parity ------------------------------------------------------------------------------


@pytest.mark.peers
def test_the_released_sizes_have_monais_names_and_shapes():
    import torch
    import torch_cocolit as peer

    def shapes_of(model):
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    with torch.device("meta"):
        theirs = (
            (COCOLIT_AUTOENCODER, peer.AutoencoderKlMaisi(**peer.RELEASED_AUTOENCODER)),
            (COCOLIT_UNET, peer.DiffusionModelUNet(**peer.RELEASED_UNET, out_channels=4)),
            (COCOLIT_CONTROL_NET, peer.ControlNet(**peer.RELEASED_UNET, **peer.RELEASED_CONTROL)),
        )
    for config, model in theirs:
        assert {entry.name: entry.shape for entry in cocolit.entries(config, "core")} == shapes_of(model)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("space", "changes"),
    [((9, 14, 11), {}), ((16, 24, 16), {}), ((16, 24, 16), {"num_splits": 2, "dim_split": 1})],
)
def test_images_equal_monais(space, changes, tmp_path):
    import torch
    import torch_cocolit as peer

    model, image = peer.autoencoder(**changes), draw_latent(space, 1)
    torch.save(model.state_dict(), tmp_path / "src.pth")
    published = load_published(tmp_path / "src.pth")
    assert published.config == AUTOENCODER and len(published.report.used) == len(model.state_dict())
    for name, value in peer.run_autoencoder(model, image).items():
        assert_close(run_autoencoder(published.params, image)[name], value, name)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("space", "changes", "control"),
    [
        ((6, 4, 10), {}, {}),
        ((6, 10), {}, {}),
        ((4, 8, 6), {"include_fc": True}, {}),
        ((6, 4), {"include_fc": True, "use_combined_linear": True, "resblock_updown": False}, {}),
        ((4, 4, 6), {"use_combined_linear": True}, {"conditioning_embedding_num_channels": (16, 32)}),
    ],
)
def test_predictions_and_residuals_equal_monais(space, changes, control, tmp_path):
    import torch
    import torch_cocolit as peer

    models, both = peer.networks(len(space), control, **changes), []
    for name, model in zip(("dif", "cnt"), models, strict=True):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        both.append(load_published(tmp_path / f"{name}.pth", heads=2))
        assert len(both[-1].report.used) == len(model.state_dict())
    halvings = len(control.get("conditioning_embedding_num_channels", (32,))) - 1
    condition = draw_latent(tuple(length * 2**halvings for length in space), 2, 1)
    z = draw_latent(space, 3)
    found = run_networks(*both, z, condition)
    for name, value in peer.run_networks(*models, z, condition).items():
        assert_close(found[name], value, name)
    embed = peer.get_timestep_embedding(torch.tensor(peer.TIMES), 32)
    expected = torch.nn.functional.silu(models[0].time_embed(embed)).detach().numpy()
    assert_close(latent_unet(both[0].config).embed(both[0].params, TIMES), expected, "time")


@pytest.mark.peers
def test_monais_own_loader_takes_an_export_in_the_older_names(tmp_path):
    """It takes the map that nothing applies for one that is, with `include_fc`: an export's is an identity."""
    import torch
    import torch_cocolit as peer

    published = load(tmp_path / "dif.safetensors", UNET)
    export_published(published, tmp_path / "again.safetensors")
    tensors = safetensors.read(tmp_path / "again.safetensors")
    z, condition = draw_latent((4, 2, 6), 3), draw_latent((4, 2, 6), 2, 1)
    found = jax.jit(published.model.apply)(published.params, z, TIMES)
    for include_fc in (False, True):
        unet, net = peer.networks(3, include_fc=include_fc)
        unet.load_old_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
        assert_close(found, peer.run_networks(unet, net, z, condition)["plain"], "plain")


@pytest.mark.peers
@pytest.mark.slow
def test_the_released_networks_equal_monais(tmp_path):
    import torch
    import torch_cocolit as peer

    image, z = draw_latent((16, 24, 16), 1)[:1], draw_latent((8, 12, 8), 4)
    model = peer.fill(peer.AutoencoderKlMaisi(**peer.RELEASED_AUTOENCODER))
    torch.save(model.state_dict(), tmp_path / "src.pth")
    published = load_published(tmp_path / "src.pth")
    found = jax.jit(published.model.apply)(published.params, image)
    expected = peer.run_autoencoder(model, image)
    for value, name in zip(found, ("image", "mean", "deviation"), strict=True):
        assert_close(value, expected[name], name)
    models = (
        peer.fill(peer.DiffusionModelUNet(**peer.RELEASED_UNET, out_channels=4)),
        peer.fill(peer.ControlNet(**peer.RELEASED_UNET, **peer.RELEASED_CONTROL)),
    )
    both = []
    for name, one in zip(("dif", "cnt"), models, strict=True):
        torch.save(one.state_dict(), tmp_path / f"{name}.pth")
        both.append(load_published(tmp_path / f"{name}.pth"))
    condition = draw_latent((8, 12, 8), 4, 1)
    found = run_networks(*both, z, condition)
    for name, value in peer.run_networks(*models, z, condition).items():
        assert_close(found[name], value, name)

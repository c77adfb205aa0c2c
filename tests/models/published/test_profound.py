"""ProFound's weights: every layout in and out bit for bit, sparse kernels as dense ones, and PyTorch's results."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw

from jaxmed.arrays.masking import draw_noise, hidden_mask
from jaxmed.arrays.trees import named_leaves
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.convnext import SIZES, ConvNext, ConvNextClassifierConfig, ConvNextConfig, of_size
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.models.heads import HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published import profound
from jaxmed.models.published.load import export_published, load_published, resize_positions
from jaxmed.models.published.names import to_parameter
from jaxmed.models.published.profound_names import sparse_conv, sparse_depthwise
from jaxmed.models.upernet import UperNetConfig
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.objectives.masked import masked_loss
from jaxmed.train.checkpoint import export_parameters
from jaxmed.weights import describe

DEPTHS, WIDTHS = (1, 1, 1, 1), (8, 16, 32, 64)
ENCODER = ConvNextConfig(depths=DEPTHS, widths=WIDTHS)
FCMAE = FcmaeConfig(ENCODER, decoder_width=16)
CLASSIFIER = ConvNextClassifierConfig(ENCODER, HeadConfig(4, "mean", 256, hidden_layer="relu"))
SEGMENTER = UperNetConfig(ENCODER, 3, 24, 12)
VIT = MaeConfig(
    VitConfig((32, 128, 128), (16, 32, 32), 3, width=24, depth=1, heads=2, hidden=48),
    decoder_width=12, decoder_depth=1, decoder_heads=2, decoder_hidden=24, norm_target=True, sigmoid=False,
)  # fmt: skip
LAYOUTS = {
    "dense": (FCMAE, ""),
    "prefixed": (FCMAE, "prefixed"),
    "sparse": (FCMAE, "sparse"),
    "classifier": (CLASSIFIER, ""),
    "segmenter": (SEGMENTER, ""),
    "transformer": (VIT, ""),
}
COUNTER = "head.1.num_batches_tracked"


def tensors_of(config, naming):
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in profound.entries(config, naming)}
    return tensors | ({COUNTER: np.array(7, np.int64)} if config is CLASSIFIER else {})


def heads_of(config):
    return {"heads": 2, "decoder_heads": 2} if isinstance(config, MaeConfig) else {}


def test_every_layout_is_read_whole_and_written_again_bit_for_bit(tmp_path):
    for name, (config, naming) in LAYOUTS.items():
        tensors = tensors_of(config, naming)
        safetensors.write(tmp_path / f"{name}.safetensors", tensors)
        published = load_published(tmp_path / f"{name}.safetensors", **heads_of(config))
        report = published.report
        assert (report.family, report.left_over, report.missing, published.naming) == ("profound", (), (), naming)
        assert dataclasses.replace(published.config.encoder, drop_path_rate=0.0) == config.encoder
        assert type(published.config) is type(config) and ("ConvNeXt" in describe(published, tmp_path)) == (
            config is not VIT
        )
        export_published(published, tmp_path / "again.safetensors")
        again = safetensors.read(tmp_path / "again.safetensors")
        assert again.keys() == tensors.keys(), name
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(again[key], tensor)
        # Own folders keep the way in which the file named its tensors.
        profound_folder = tmp_path / name
        export_parameters(profound_folder, published.params, {"family": "profound", "kind": report.kind,
                          "config": to_record(published.config), "naming": naming})  # fmt: skip
        own = load_published(profound_folder)
        assert own.naming == naming and jax.tree.all(jax.tree.map(np.array_equal, own.params, published.params))


def test_sparse_kernels_are_dense_ones_whose_first_axis_runs_fastest():
    rng, edge = np.random.default_rng(0), 7
    kernel = rng.standard_normal((edge**3, 5)).astype(np.float32)
    found = to_parameter(sparse_depthwise("dwconv", "depthwise", 5, edge)[0], kernel)
    assert found.shape == (7, 7, 7, 1, 5)
    for z, y, x in itertools.product(range(edge), repeat=3):
        np.testing.assert_array_equal(found[z, y, x, 0], kernel[x * edge * edge + y * edge + z])
    kernel = rng.standard_normal((8, 3, 4)).astype(np.float32)
    found = to_parameter(sparse_conv("1", "downsample", 3, 4, 2)[0], kernel)
    for z, y, x in itertools.product(range(2), repeat=3):
        np.testing.assert_array_equal(found[z, y, x], kernel[4 * x + 2 * y + z])
    kernel = rng.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(to_parameter(sparse_conv("1", "downsample", 3, 4, 1)[0], kernel)[0, 0, 0], kernel)


def test_all_published_sizes_have_their_tensors():
    for name in SIZES:
        encoder = of_size(ENCODER, name)
        shapes = [entry.shape for entry in profound.entries(FcmaeConfig(encoder)) if entry.part in ("encoder", "norm")]
        count = sum(int(np.prod(shape)) for shape in shapes)
        assert name != "tiny" or count == 29_311_680


def test_a_file_that_lacks_a_tensor_or_is_of_another_model_is_refused(tmp_path):
    path, tensors = tmp_path / "a.safetensors", tensors_of(*LAYOUTS["sparse"])
    lacking = {name: value for name, value in tensors.items() if name != "encoder.stages.2.0.grn.beta"}
    for changed, message in (
        (lacking, "of the encoder, found no encoder.stages.2.0.grn.beta"),
        (tensors | {"encoder.stages.2.0.grn.beta": np.ones((1, 5), np.float32)}, "of shape"),
        ({"downsample_layers.0.0.weight": np.ones((8, 3, 4, 4), np.float32)}, "weights of a known family"),
    ):
        safetensors.write(path, changed)
        with pytest.raises(InputError, match=message):
            load_published(path)
    # Without a decoder, or with a part of one, the encoder is what is read, and the report says so.
    kept = {name: value for name, value in tensors.items() if not name.startswith(("pred", "encoder.norm"))}
    safetensors.write(path, kept)
    report = load_published(path).report
    assert report.is_partial and "pred.weight" in report.missing and "decoder.0.norm.weight" in report.left_over
    safetensors.write(path, tensors_of(VIT, "") | {"pos_embed": np.ones((1, 31, 24), np.float32)})
    with pytest.raises(InputError, match="n x 2n x 2n positions"):
        load_published(path, heads=2, decoder_heads=2)


def test_an_encoder_takes_images_of_another_size(tmp_path):
    safetensors.write(tmp_path / "a.safetensors", tensors_of(FCMAE, "sparse"))
    published = load_published(tmp_path / "a.safetensors")
    assert published.preprocess.size == (64, 224, 224) and published.preprocess.spacing == (1.0, 0.5, 0.5)
    smaller = resize_positions(published, (16, 32, 32))
    assert smaller.preprocess.size == (16, 32, 32) and smaller.config.encoder.grid == (1, 2, 2)
    with pytest.raises(InputError, match="take multiples of"):
        resize_positions(published, (16, 32, 40))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).standard_normal((2, 32, 48, 48, 3)).astype(np.float32)


def from_torch(module, path):
    import torch

    torch.save({"model": module.state_dict()}, path)
    return resize_positions(load_published(path), (32, 48, 48))


def first(x):
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.mark.peers
def test_maps_feature_and_logits_equal_pytorchs(tmp_path, image):
    import torch
    import torch_profound

    peer = torch_profound.fill(torch_profound.Classifier(torch_profound.ConvNext(DEPTHS, WIDTHS), 64, 4))
    published = from_torch(peer, tmp_path / "a.pth")
    with torch.no_grad():
        expected = [np.moveaxis(one.numpy(), 1, -1) for one in peer.encoder.maps(first(image))]
        feature, logits = peer.encoder(first(image)).numpy(), peer(first(image)).numpy()
    network = make_model(ConvNext(published.config.encoder))
    found = jax.jit(lambda params, x: network.apply(params, x, method="maps"))(published.params["encoder"], image)
    for one, other in zip(found, expected, strict=True):
        assert np.std(other) > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    norm = published.params["head"]["norm"]
    mean = np.asarray(found[-1]).mean((1, 2, 3))
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed * norm["scale"] + norm["bias"], feature, rtol=0, atol=1e-4)
    np.testing.assert_allclose(jax.jit(published.model.apply)(published.params, image)[0], logits, rtol=0, atol=1e-4)


@pytest.mark.peers
def test_loss_of_hidden_patches_and_its_gradient_equal_pytorchs(tmp_path, image):
    import torch
    import torch_profound

    peer = torch_profound.fill(torch_profound.Fcmae(DEPTHS, WIDTHS))
    published = from_torch(peer, tmp_path / "a.pth")
    for scope in ("sample", "batch"):
        encoder = dataclasses.replace(published.config.encoder, response_scope=scope)
        model = fcmae_model(dataclasses.replace(published.config, encoder=encoder))
        params = {name: published.params[name] for name in ("encoder", "decoder")}
        keys = jax.random.split(jax.random.key(0), len(image))
        loss_of = functools.partial(masked_loss, model)
        (loss, _), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params, keys, {"image": image})
        masking = model.network.apply(params, jnp.asarray(image), draw_noise(keys, model.num_tokens)).masking
        hidden = torch.from_numpy(np.asarray(hidden_mask(masking), np.float32)).reshape(2, 1, 2, 3, 3)
        peer.zero_grad()
        expected, _ = peer(first(image), hidden, scope == "batch")
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
        leaves, compared = named_leaves(gradient), 0
        gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
        for entry in profound.entries(published.config, "prefixed"):
            if entry.path in leaves:
                wanted = to_parameter(entry, gradients[entry.name].numpy())
                np.testing.assert_allclose(leaves[entry.path], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max() + 1e-7)
                compared += 1
        assert compared == len(leaves)


@pytest.mark.peers
def test_logits_of_voxels_equal_pytorchs(tmp_path, image):
    import torch
    import torch_profound

    peer = torch_profound.fill(torch_profound.UperNet(torch_profound.ConvNext(DEPTHS, WIDTHS), WIDTHS, 3))
    published = from_torch(peer, tmp_path / "a.pth")
    found = jax.jit(lambda params, x: published.model.apply(params, x, training=True))(published.params, image)
    with torch.no_grad():
        for one, other in zip(found, peer(first(image)), strict=True):
            expected = np.moveaxis(other.numpy(), 1, -1)
            assert np.std(expected) > 0.05
            np.testing.assert_allclose(one, expected, rtol=0, atol=1e-4)

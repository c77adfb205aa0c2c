"""BrainFM's weights: PyTorch's maps (stored by scripts/make_references.py, and live), names, pickles that stay shut."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn_weights import draw, draw_volume

from jaxmed.arrays.trees import named_leaves
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.published import brainfm
from jaxmed.models.published.brainfm import make_unet
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.published.names import to_parameter
from jaxmed.models.unet_brain import BRAINFM, HEMISPHERE, BrainUnetConfig, brain_unet
from jaxmed.train.checkpoint import export_parameters
from jaxmed.weights import describe

REFERENCES = Path(__file__).resolve().parents[2] / "references"
SMALL = BrainUnetConfig(width=8, levels=3)
TINY = BrainUnetConfig(width=8, levels=1)


def write(path, config, **changes):
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in brainfm.entries(config)} | changes
    safetensors.write(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return path


@pytest.mark.core
def test_maps_equal_the_stored_ones_of_pytorch_at_even_and_odd_sizes(tmp_path):
    published = load_published(write(tmp_path / "a.safetensors", SMALL))
    assert published.config == SMALL and published.report.family == "brainfm"
    assert published.report.left_over == published.report.missing == published.report.notes == ()
    run = jax.jit(published.model.apply, static_argnames="feature")
    with np.load(REFERENCES / "brainfm.npz") as stored:
        for size in ((32, 32, 32), (37, 41, 33)):
            found = run(published.params, draw_volume(size)[None, ..., None], feature=True)
            assert set(found) == {*SMALL.tasks, "feature"}
            for name, value in found.items():
                expected = stored[f"{'x'.join(map(str, size))}/{name}"]
                np.testing.assert_allclose(value[0, ::7, ::7, ::7], expected, atol=1e-4, rtol=0)
                assert np.std(expected) > 0.01


@pytest.mark.peers
@pytest.mark.parametrize("size", [(32, 32, 32), (37, 41, 33)])
def test_maps_equal_pytorchs(size, tmp_path):
    """In every voxel, against PyTorch in float64; and no further from it than PyTorch's own float32 by much."""
    import torch
    from torch_brain import BrainNet, run

    peer = BrainNet(8, 3)
    torch.save({"model": peer.state_dict()}, tmp_path / "a.pth")
    published = load_published(tmp_path / "a.pth")
    image = draw_volume(size)
    single = run(peer, image)
    maps, features = run(peer.double(), image.astype(np.float64))
    bare = make_unet(dataclasses.replace(published.config, unit_features=False), published.params)

    @jax.jit
    def both(params, x):
        raw = bare.apply(params, x, feature=True)["feature"]
        return raw, published.model.apply(params, x, feature=True)

    raw, found = both(published.params, image[None, ..., None])
    np.testing.assert_allclose(raw[0], features[-2], atol=1e-4, rtol=0)
    # Where every channel is negative a slope of .01 leaves a short feature, and dividing by its length multiplies its
    # rounding by the inverse: below a twentieth of the mean length, so much more is allowed.
    length = np.linalg.norm(features[-2], axis=-1, keepdims=True)
    stretch = np.maximum(1, 0.05 * length.mean() / length)
    for name, value in (maps | {"feature": features[-1]}).items():
        error = np.abs(np.asarray(found[name])[0] - value)
        assert (error / stretch).max() < 1e-4, name
        theirs = np.abs((single[0] | {"feature": single[1][-1]})[name] - value)
        assert error.max() < 4 * theirs.max(), name


@pytest.mark.peers
def test_the_released_sizes_have_pytorchs_names_and_shapes():
    import torch
    from torch_brain import HEADS, Backbone, Heads

    with torch.device("meta"):
        parts = {"backbone": Backbone(64, 6), "head": Heads(64, HEADS)}
    theirs = {f"{p}.{name}": tuple(v.shape) for p, part in parts.items() for name, v in part.state_dict().items()}
    assert {entry.name: entry.shape for entry in brainfm.entries(BRAINFM)} == theirs
    assert len([name for name in theirs if name.startswith("backbone")]) == 66


def test_a_checkpoint_with_namespaces_is_read_without_making_them(tmp_path):
    """The stored file's arguments are of classes that exist nowhere: whoever ran its pickles would fail."""
    published = load_published(REFERENCES / "brainfm.pth")
    report = published.report
    assert published.config == dataclasses.replace(SMALL, levels=2)
    assert report.left_over == ("head.final_conv_thickness.weight", "head.final_conv_thickness.bias")
    assert any("2 tensors of the file have no place in the model" in line for line in report.lines)
    for entry in brainfm.entries(published.config):
        expected = to_parameter(entry, draw(entry.name, entry.shape))
        np.testing.assert_array_equal(named_leaves(published.params)[entry.path], expected)


def test_heads_that_are_missing_are_named(tmp_path):
    lacking = {f"head.final_conv_CT.{part}": None for part in ("weight", "bias")}
    published = load_published(write(tmp_path / "a.safetensors", TINY, **lacking))
    assert "CT" not in published.config.tasks and "CT" not in published.params["heads"]
    assert "the file has no head for CT" in published.report.notes
    with pytest.raises(InputError, match="no head.final_conv_CT.bias"):
        load_published(write(tmp_path / "b.safetensors", TINY, **{"head.final_conv_CT.bias": None}))


def test_every_parameter_has_one_tensor():
    for config in (BRAINFM, HEMISPHERE, dataclasses.replace(TINY, uncertainty="gaussian", head_widths=(4,)),
                   dataclasses.replace(TINY, tasks=("T1", "age"), age_size=(16, 33, 16))):  # fmt: skip
        shapes = jax.eval_shape(brain_unet(config, config.age_size).init, jax.random.key(0))
        own = {entry.path: entry.target for entry in brainfm.entries(config)}
        assert own == {name: leaf.shape for name, leaf in named_leaves(shapes).items()}


@pytest.mark.parametrize(
    "config", [dataclasses.replace(TINY, uncertainty="laplace"), dataclasses.replace(HEMISPHERE, width=8, levels=2)]
)
def test_sizes_are_read_and_the_round_trip_is_exact(config, tmp_path):
    source = write(tmp_path / "a.safetensors", config)
    published = load_published(source)
    assert published.config == dataclasses.replace(config, uncertainty=published.config.uncertainty)
    assert (published.config.uncertainty == "none") == (config.uncertainty == "none")
    export_published(published, tmp_path / "b.safetensors")
    first, second = safetensors.read(source), safetensors.read(tmp_path / "b.safetensors")
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in second.items()}
    again = load_published(tmp_path / "b.safetensors")
    assert again.config == published.config and again.preprocess == brainfm.PREPROCESS


def test_own_networks_are_read_with_their_labels(tmp_path):
    config = dataclasses.replace(TINY, tasks=("segmentation", "age"), labels=(0, 2, 41), age_size=(16, 16, 16))
    params = {}
    for entry in brainfm.entries(config):
        *parents, last = entry.path.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = to_parameter(entry, draw(entry.name, entry.shape))
    record = {"family": "brainfm", "kind": "maps", "config": to_record(config)}
    export_parameters(tmp_path / "model", params, record | {"preprocess": to_record(brainfm.PREPROCESS)})
    published = load_published(tmp_path / "model")
    assert published.config == config
    text = describe(published, tmp_path)
    assert "multi-task U-Net of brain scans" in text and "segmentation, age" in text


def test_files_of_other_networks_are_refused(tmp_path):
    for changes, message in [
        ({brainfm.FIRST: np.ones((8, 2, 3, 3, 3), np.float32)}, "a network of one channel"),
        ({"head.final_conv_T1.weight": np.ones((1, 16, 1, 1, 1), np.float32)}, "heads on 8 channels"),
        ({"backbone.encoders.0.basic_module.SingleConv2.groupnorm.bias": None}, "all .* tensors of the backbone"),
    ]:
        with pytest.raises(InputError, match=message):
            load_published(write(tmp_path / "a.safetensors", TINY, **changes))
    with pytest.raises(InputError, match="heads: expected none for this family, found 4"):
        load_published(write(tmp_path / "a.safetensors", TINY), heads=4)

"""Guided-diffusion weights: PyTorch's outputs (stored by scripts/make_references.py, and live), names, round trip."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw

from jaxmed.arrays.trees import named_leaves
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.published import guided_diffusion
from jaxmed.models.published.family import Hints
from jaxmed.models.published.load import export_published, load_published
from jaxmed.models.published.names import to_parameter, to_tensor
from jaxmed.models.unet_guided import ADM_256, CI_PRIOR, DYNAMICDPS_PRIOR, ENHANCER, GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.train.checkpoint import export_parameters
from jaxmed.weights import describe

REFERENCES = Path(__file__).resolve().parents[2] / "references"
PLAIN = GuidedUnetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention_factors=(2, 4))
RELEASED = GuidedUnetConfig(
    channels=3, outputs=3, width=32, multipliers=(1, 2), attention_factors=(2,), resblock_updown=True,
    learn_sigma=True,
)  # fmt: skip
VOLUME = GuidedUnetConfig(
    dimensions=3, width=32, multipliers=(1, 2), blocks=1, attention_factors=(2,), keeps_depth=True
)  # fmt: skip
THIN = dataclasses.replace(VOLUME, multipliers=(1, 1), attention_factors=(), heads=2, resblock_updown=True)
CONFIGS = {"plain": PLAIN, "released": RELEASED, "volume": VOLUME, "thin": THIN}
TINY = GuidedUnetConfig(width=32, multipliers=(1,), blocks=1, attention_factors=())


def write(path, config, **changes):
    tensors = {entry.name: draw(entry.name, entry.shape) for entry in guided_diffusion.entries(config)} | changes
    safetensors.write(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return path


def load(tmp_path, config, **changes):
    return load_published(write(tmp_path / "a.safetensors", config, **changes), heads=config.heads)


@pytest.mark.core
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_equals_the_stored_outputs_of_pytorch_part_by_part(name, tmp_path):
    published = load(tmp_path, CONFIGS[name])
    assert published.config == CONFIGS[name] and published.report.kind == "denoiser"
    assert published.report.left_over == published.report.missing == ()
    with np.load(REFERENCES / f"guided_{name}.npz") as stored:
        output, trace = run_parts(published, stored["image"], stored["time"])
        compare(trace, stored)
        np.testing.assert_allclose(output, stored["output"], atol=1e-4, rtol=0)
        assert np.std(stored["output"]) > 0.3


def run_parts(published, image, time):
    """Return the network's output and what each of its blocks returns, in one program."""
    module = GuidedUnet(published.config)

    @jax.jit
    def run(params, image, time):
        output, state = module.apply(
            {"params": params}, image, time, capture_intermediates=True, mutable="intermediates"
        )
        return output, state["intermediates"]

    output, found = run(published.params, image, time)
    leaves = {name.removesuffix("/__call__/0"): leaf for name, leaf in named_leaves(found).items()}
    return output, leaves


def compare(trace, stored):
    """Match the parts of the original network, whose order is that of its names, with ours."""
    inputs = [stored[f"input_{number}"] for number in range(len([n for n in stored if n.startswith("input_")]))]
    outputs = [stored[f"output_{number}"] for number in range(len([n for n in stored if n.startswith("output_")]))]
    levels = 1 + max(int(name[5]) for name in trace if name.startswith("down_"))
    blocks = len({name for name in trace if name.startswith("down_0/block_") and name.count("/") == 1})
    ours = [trace["stem"]]
    for level in range(levels):
        ours += [last(trace, f"down_{level}", number) for number in range(blocks)]
        ours += [trace[f"down_{level}/resample"]] if level + 1 < levels else []
    for one, other in zip(ours, inputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
    np.testing.assert_allclose(trace["middle"], stored["middle"], atol=1e-4, rtol=0)
    ours = []
    for level in reversed(range(levels)):
        ours += [last(trace, f"up_{level}", number) for number in range(blocks + 1)]
        if level:
            ours[-1] = trace[f"up_{level}/resample"]
    for one, other in zip(ours, outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


def last(trace, level, number):
    return trace.get(f"{level}/attention_{number}", trace[f"{level}/block_{number}"])


@pytest.mark.core
@pytest.mark.parametrize(
    "config", [PLAIN, RELEASED, VOLUME, dataclasses.replace(TINY, dimensions=3, scale_shift=False)]
)
def test_round_trip_is_exact(config, tmp_path):
    """Every tensor comes back under its name with its bits, and the exported file needs no hints."""
    published = load(tmp_path, config)
    export_published(published, tmp_path / "again.safetensors")
    original, again = (safetensors.read(tmp_path / f"{name}.safetensors") for name in ("a", "again"))
    assert set(again) == set(original)
    for name, tensor in original.items():
        assert again[name].shape == tensor.shape and again[name].tobytes() == tensor.tobytes(), name
    twice = load_published(tmp_path / "again.safetensors")
    assert twice.config == config and twice.preprocess == published.preprocess
    for one, other in zip(jax.tree.leaves(published.params), jax.tree.leaves(twice.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.core
@pytest.mark.parametrize(
    "config",
    [
        DYNAMICDPS_PRIOR, CI_PRIOR, ADM_256, ENHANCER, RELEASED, PLAIN, TINY,
        dataclasses.replace(CI_PRIOR, dimensions=3, attention_factors=(), scale_shift=False, keeps_depth=True),
    ],
)  # fmt: skip
def test_entries_are_all_parameters_and_sizes_are_inferred_from_shapes(config):
    entries = guided_diffusion.entries(config)
    x = jax.ShapeDtypeStruct((1, *(config.divisor * 2,) * config.dimensions, config.channels), jnp.float32)
    inputs = (x, jax.ShapeDtypeStruct((1,), jnp.float32)) if config.with_time else (x,)
    params = jax.eval_shape(make_model(GuidedUnet(config)).init, jax.random.key(0), *inputs)
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    assert {entry.path: entry.target for entry in entries} == shapes
    assert len({entry.name for entry in entries}) == len(entries)
    tensors = {entry.name: np.broadcast_to(np.float32(0), entry.shape) for entry in entries}
    assert guided_diffusion.recognises(tensors)
    is_released = config in (DYNAMICDPS_PRIOR, ADM_256)
    assert guided_diffusion.infer("file", tensors, Hints(None if is_released else config.heads)) == config


@pytest.mark.core
def test_names_and_shapes_of_the_released_network():
    tensors = {entry.name: entry.shape for entry in guided_diffusion.entries(ADM_256)}
    expected = {
        "time_embed.0.weight": (1024, 256),
        "time_embed.2.bias": (1024,),
        "input_blocks.0.0.weight": (256, 3, 3, 3),
        "input_blocks.3.0.in_layers.2.weight": (256, 256, 3, 3),  # halves inside a residual block
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1),
        "input_blocks.17.0.emb_layers.1.weight": (2048, 1024),
        "middle_block.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.2.out_layers.3.bias": (1024,),
        "output_blocks.0.0.in_layers.0.weight": (2048,),
        "output_blocks.2.2.in_layers.2.weight": (1024, 1024, 3, 3),  # doubles inside a residual block
        "output_blocks.17.0.skip_connection.weight": (256, 512, 1, 1),
        "out.0.weight": (256,),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert expected.items() <= tensors.items()
    plain = {entry.name: entry.shape for entry in guided_diffusion.entries(DYNAMICDPS_PRIOR)}
    assert {"input_blocks.3.0.op.weight": (128, 128, 3, 3), "output_blocks.2.2.conv.weight": (512, 512, 3, 3)}.items() \
        <= plain.items()  # fmt: skip


@pytest.mark.core
def test_layouts_by_hand():
    """Rows of qkv are heads first, then queries, keys and values of each; kernels end in channel, feature."""
    entries = {entry.name: entry for entry in guided_diffusion.entries(PLAIN)}
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((192, 64, 1)).astype(np.float32)
    moved = to_parameter(entries["middle_block.1.qkv.weight"], qkv)
    head, which, depth, column = 2, 1, 11, 40
    assert moved[column, head, which, depth] == qkv[(head * 3 + which) * 16 + depth, column, 0]
    kernel = rng.standard_normal((64, 32, 3, 3)).astype(np.float32)
    moved = to_parameter(entries["input_blocks.3.0.in_layers.2.weight"], kernel)
    assert moved[0, 2, 7, 5] == kernel[5, 7, 0, 2]
    for entry in entries.values():
        tensor = rng.standard_normal(entry.shape).astype(np.float32)
        np.testing.assert_array_equal(to_tensor(entry, to_parameter(entry, tensor)), tensor)


@pytest.mark.core
def test_own_weights_and_enhancers_without_time_are_read_back(tmp_path):
    config = dataclasses.replace(TINY, with_time=False)
    published = load(tmp_path, config)
    assert published.config == config and published.report.kind == "enhancer"
    record = {"family": "guided_diffusion", "kind": "enhancer", "licence": "own"}
    record |= {"config": dataclasses.asdict(config), "preprocess": dataclasses.asdict(Preprocess((24, 16)))}
    export_parameters(tmp_path / "own", published.params, record | {"diffusion": {"anything": 1}})
    with pytest.raises(InputError, match="expected weights of tangerine, found weights of guided_diffusion"):
        load_published(tmp_path / "own", "tangerine")
    with pytest.raises(InputError, match="expected weights of tangerine, found no 'patch_embed.proj.weight'"):
        load_published(tmp_path / "a.safetensors", "tangerine")
    own = load_published(tmp_path / "own")
    assert own.config == config and own.preprocess == Preprocess((24, 16)) and own.report.licence == "own"
    for one, other in zip(jax.tree.leaves(published.params), jax.tree.leaves(own.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_emb.weight": np.zeros((1000, 128), np.float32)}, "without classes, found 'label_emb.weight'"),
        ({"out.2.weight": None}, "no 'out.2.weight'"),
        ({"middle_block.0.in_layers.0.bias": None}, "all 26 tensors of the middle, found no middle_block.0"),
        ({"middle_block.0.in_layers.0.bias": np.zeros(33, np.float32)}, "of shape (32,), found (33,)"),
        ({"output_blocks.1.0.in_layers.2.weight": np.zeros((32, 64, 3), np.float32)}, "of shape (32, 64, 3, 3), found"),
        ({"output_blocks.0.0.out_layers.3.weight": np.zeros((33, 32, 3, 3), np.float32)}, "multiples of 32 channels"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_told_by_name(change, words, tmp_path):
    path = write(tmp_path / "bad.safetensors", TINY, **change)
    with pytest.raises(InputError) as caught:
        load_published(path, heads=4)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.core
@pytest.mark.parametrize(
    "changes",
    [{}, {"channels": 2, "outputs": 2}, {"channels": 3, "outputs": 3}, {"with_time": False}, {"dimensions": 3}],
)
def test_heads_that_nobody_told_are_asked_for(tmp_path, changes):
    """Only the released networks have known heads; the others load with none but those that are given."""
    config = dataclasses.replace(TINY, **changes)
    path = write(tmp_path / "a.safetensors", config)
    with pytest.raises(InputError, match="sizes of a released network.* shapes do not tell heads: .* --heads N"):
        load_published(path)
    with pytest.raises(InputError, match="decoder-heads: expected none for this family"):
        load_published(path, heads=4, decoder_heads=2)
    published = load_published(path, heads=2)
    assert published.config == dataclasses.replace(config, heads=2)
    assert "does not say how attention is laid out" in published.report.notes[0]


@pytest.mark.core
def test_the_released_networks_need_no_hint():
    released = {
        "DynamicDPS": DYNAMICDPS_PRIOR,
        "ADM": ADM_256,
        "FFHQ": dataclasses.replace(ADM_256, width=128, blocks=1, attention_factors=(16,)),
    }
    for config in released.values():
        tensors = {
            entry.name: np.broadcast_to(np.float32(0), entry.shape) for entry in guided_diffusion.entries(config)
        }
        assert guided_diffusion.infer("file", tensors) == config
        assert not any("attention" in note for note in guided_diffusion.notes(config))


@pytest.mark.core
@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_heads": 2}, (2, 0)),
        ({"num_heads": 1, "num_head_channels": 16}, (4, 16)),
        ({"num_heads": 2, "num_head_channels": -1, "num_heads_upsample": -1}, (2, 0)),
        ({"num_heads": 2, "num_heads_upsample": 2, "use_new_attention_order": False}, (2, 0)),
        ({"use_new_attention_order": True}, "expected attention with heads before queries, keys and values"),
        ({"num_heads": 2, "num_heads_upsample": 1}, "found num_heads_upsample 1 in its arguments"),
        ({"num_heads": 8}, "heads: expected 8, as the arguments in file say, found 4"),
    ],
)
def test_the_arguments_in_a_file_tell_heads_or_refuse_what_is_not_built(settings, found):
    tensors = {entry.name: np.zeros(entry.shape, np.float32) for entry in guided_diffusion.entries(TINY)}
    given = 4 if isinstance(found, str) else None
    if isinstance(found, str):
        with pytest.raises(InputError) as caught:
            guided_diffusion.infer("file", tensors, Hints(given, settings=settings))
        assert found in str(caught.value)
    else:
        config = guided_diffusion.infer("file", tensors, Hints(given, settings=settings))
        assert (config.heads, config.head_channels) == found
        if "use_new_attention_order" in settings:
            assert not any("laid out" in note for note in guided_diffusion.notes(config, settings))


@pytest.mark.core
def test_a_part_of_an_endless_number_is_refused_at_once():
    for stem in ("output_blocks", "input_blocks"):
        tensors = {entry.name: np.zeros(entry.shape, np.float32) for entry in guided_diffusion.entries(TINY)}
        tensors[f"{stem}.99999999.0.in_layers.0.weight"] = np.zeros(32, np.float32)
        if stem == "input_blocks":  # has no place in the network
            assert guided_diffusion.infer("file", tensors, Hints(4)) == TINY
        else:
            with pytest.raises(InputError, match="numbered without gaps, found 'output_blocks.99999999'"):
                guided_diffusion.infer("file", tensors, Hints(4))


@pytest.mark.core
def test_show_tells_levels_and_the_schedule_that_is_not_in_the_file(tmp_path):
    text = " ".join(describe(load(tmp_path, RELEASED), tmp_path).split())
    for words in ("denoiser: a U-Net of image and time", "2D, 3 channel(s), multiples of 2 voxels", "heads 4",
                  "3 channel(s), and as many for the variance", "32 x 64 channels, 2 blocks each",
                  "resampled inside residual blocks", "licence MIT", "does not hold the noise schedule"):  # fmt: skip
        assert words in text, words


@pytest.mark.core
def test_preprocessing_of_slices_and_of_photographs():
    slices = guided_diffusion.preprocess(DYNAMICDPS_PRIOR)
    image = np.zeros((260, 311), np.float32)
    image[130, 155], image[2, 27] = 2048, 4096
    found = slices(image)
    # The crop of the official code: rows 2 to 258 and columns 27 to 283.
    assert found.shape == (256, 256, 1) and found[128, 128, 0] == 1 and found[0, 0, 0] == 2
    photographs = guided_diffusion.preprocess(ADM_256)
    picture = np.broadcast_to(np.linspace(0, 255, 512, dtype=np.float32)[:, None, None], (512, 600, 3))
    found = photographs(picture)
    assert found.shape == (256, 256, 3)
    np.testing.assert_allclose(found[4:-4, 7, 1], np.linspace(-1, 1, 512).reshape(256, 2).mean(1)[4:-4], atol=1e-3)
    with pytest.raises(InputError, match="2 axes of space and 3 channel"):
        photographs(image)
    with pytest.raises(InputError, match="finite values, found NaN or Inf"):
        slices(np.full((256, 256), np.nan))


# Live parity: the network written from the specification in tests/support/torch_guided.py.


def live(name):
    import torch_guided

    return {
        "plain": torch_guided.PLAIN,
        "released": torch_guided.RELEASED,
        "added": torch_guided.ADDED,
        "volume": torch_guided.VOLUME,
    }[name]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["plain", "released", "added", "volume"])
def test_unet_equals_pytorch_part_by_part(name, tmp_path):
    import torch
    from torch_guided import Unet

    sizes = live(name)
    torch.manual_seed(7)
    peer = Unet(sizes).eval()
    with torch.no_grad():
        for value in peer.parameters():
            value.add_(torch.randn(value.shape) * 0.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1)
    torch.save(peer.state_dict(), tmp_path / "model.pt")
    heads = sizes.heads if sizes.head_channels == -1 else 64 // sizes.head_channels
    published = load_published(tmp_path / "model.pt", heads=heads)
    image = np.random.default_rng(0).random((2, *(16,) * sizes.dimensions, sizes.channels), np.float32)
    time = np.array([0.0, 999.0], np.float32)
    with torch.no_grad():
        expected, parts = peer(torch.from_numpy(np.moveaxis(image, -1, 1).copy()), torch.from_numpy(time))
    output, trace = run_parts(published, image, time)
    compare(trace, {part: np.moveaxis(value.numpy(), 1, -1) for part, value in parts.items()})
    np.testing.assert_allclose(output, np.moveaxis(expected.numpy(), 1, -1), atol=1e-4, rtol=0)
    export_published(published, tmp_path / "again.safetensors")
    tensors = safetensors.read(tmp_path / "again.safetensors")
    other = Unet(sizes).eval()
    other.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in tensors.items()}, strict=True)
    assert all(torch.equal(one, two) for one, two in zip(other.parameters(), peer.parameters(), strict=True))

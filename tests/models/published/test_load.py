"""Weights from every kind of file: published ones, runs and their checkpoints; wrong ones; positions of other sizes."""

import dataclasses
import gc
import json
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.position import sincos_3d
from jaxmed.arrays.trees import named_leaves
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import pickles, safetensors
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig, Task
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.published import tangerine
from jaxmed.models.published.load import (
    Published,
    export_published,
    load_published,
    published_record,
    resize_positions,
)
from jaxmed.models.published.names import to_tensor
from jaxmed.models.published.preprocess import Preprocess
from jaxmed.models.vit import VitConfig
from jaxmed.train.checkpoint import Checkpoints, export_parameters

REFERENCES = Path(__file__).resolve().parents[2] / "references"
ENCODER = VitConfig((8, 8, 8), (4, 4, 4), width=24, depth=2, heads=2, hidden=48)
MAE = MaeConfig(ENCODER, 20, 1, 2, 40, mask_ratio=0.5)
CLASSIFIER = ClassifierConfig(dataclasses.replace(ENCODER, final_norm=False), HeadConfig(2, "mean", 3))
PREPROCESS = Preprocess((8, 8, 8), "xyz", edge="zero")
TASK = Task("multilabel", ("nodule", "emphysema"))
KINDS = [(Mae, "mae", MAE, None), (Classifier, "classifier", CLASSIFIER, TASK)]


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: dict


def draw(config):
    """Return parameters of a model, each its own random numbers; nothing is compiled."""
    rng = np.random.default_rng(0)
    params: dict = {}
    for entry in tangerine.entries(config):
        *parents, last = entry.path.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = rng.standard_normal(entry.target).astype(np.float32)
    return params


def record(kind, config, task):
    found = {"family": "tangerine", "kind": kind, "config": to_record(config), "preprocess": to_record(PREPROCESS)}
    return found if task is None else found | {"task": to_record(task)}


def write_own(folder, kind, config, task=None):
    params = draw(config)
    export_parameters(folder, params, record(kind, config, task))
    return params


def assert_same(found, expected):
    found, expected = named_leaves(found), named_leaves(expected)
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def line(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.core
@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
def test_own_parameters_come_back_with_all_that_was_said_of_them(tmp_path, module, kind, config, task):
    params = write_own(tmp_path / "outputs" / "model", kind, config, task)
    folder = tmp_path / "outputs" / "model"
    for path in (tmp_path, folder, folder / "parameters.safetensors", str(folder)):
        published = load_published(path)
        assert isinstance(published, Published)
        assert_same(published.params, params)
        assert (published.config, published.preprocess, published.task) == (config, PREPROCESS, task)
        report = published.report
        assert (report.family, report.kind, report.left_over, report.missing) == ("tangerine", kind, (), ())
        assert len(report.used) == len(jax.tree.leaves(params)) and "own run" in report.licence


@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
def test_the_model_runs_its_parameters(tmp_path, module, kind, config, task):
    params = write_own(tmp_path, kind, config, task)
    image = jnp.ones((1, 8, 8, 8, 1))
    noise = [jnp.linspace(0, 1, 8)[None]] if kind == "mae" else []
    published = load_published(tmp_path)
    found = jax.jit(published.model.apply)(published.params, image, *noise)
    expected = jax.jit(module(config).apply)({"params": params}, image, *noise)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(found) == (3 if kind == "mae" else 2)


@pytest.mark.core
@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
def test_an_own_model_survives_the_original_names(tmp_path, module, kind, config, task):
    """What shapes do not tell (heads, ratio, axis order, task) travels in the metadata."""
    params = write_own(tmp_path / "model", kind, config, task)
    export_published(load_published(tmp_path / "model"), tmp_path / "theirs.safetensors")
    assert "blocks.1.attn.qkv.weight" in safetensors.read(tmp_path / "theirs.safetensors")
    metadata = safetensors.read_metadata(tmp_path / "theirs.safetensors")
    assert (metadata["format"], metadata["family"], metadata["heads"]) == ("pt", "tangerine", "2")
    again = load_published(tmp_path / "theirs.safetensors")
    assert_same(again.params, params)
    assert (again.config, again.preprocess, again.task) == (config, PREPROCESS, task)


def test_counters_and_licence_stay_through_an_own_folder(tmp_path):
    first = load_published(REFERENCES / "tangerine_mlp.safetensors", heads=2, task=TASK)
    assert {name: int(count) for name, count in first.extras.items()} == {"head.2.num_batches_tracked": 1234}
    export_parameters(tmp_path / "own", first.params, published_record(first))
    second = load_published(tmp_path / "own")
    assert second.report.licence == first.report.licence == tangerine.LICENCE
    assert second.task == TASK and second.preprocess == first.preprocess == Preprocess((8, 8, 8))
    export_published(second, tmp_path / "again.safetensors")
    original = safetensors.read(REFERENCES / "tangerine_mlp.safetensors")
    again = safetensors.read(tmp_path / "again.safetensors")
    assert set(again) == set(original)
    assert all(again[name].tobytes() == array.tobytes() for name, array in original.items())


@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_parameters_of_a_checkpoint(tmp_path, module, kind, config, task):
    """A state with an optimizer's moments: the newest step, a named one, and the folders above."""
    params = draw(config)
    settings = {"preprocess": to_record(PREPROCESS)} | ({"model": to_record(config)} if kind == "mae" else {})
    run = {"system": "tangerine", "stage": "any", "config": settings}
    with Checkpoints(tmp_path / "checkpoints" / "state", {"run": run}) as checkpoints:
        for step in (9, 10):
            values = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf * step), params)
            checkpoints.save(step, State(jnp.asarray(step), values, {"mu": jax.tree.map(jnp.zeros_like, values)}))
    state = tmp_path / "checkpoints" / "state"
    for path, step in ((state, 10), (state / "9", 9), (tmp_path / "checkpoints", 10)):
        published = load_published(path)
        assert published.config == config and published.preprocess == PREPROCESS
        assert_same(published.params, jax.tree.map(lambda leaf, step=step: leaf * step, params))
    (tmp_path / "config.json").write_text("{}")
    assert f"give {state} for its last checkpoint" in line(load_published, tmp_path)
    data = max((state / "10" / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "take another step" in line(load_published, state)
    data.write_bytes(content[: len(content) // 3])
    assert "take another step" in line(load_published, state)
    (state / "9" / "record" / "metadata").write_text('{"arrays": 1}')
    assert "found a record without arrays, checksums and run" in line(load_published, state / "9")
    gc.collect()  # TensorStore's coroutines of failed reads


def reference():
    return dict(pickles.read_checkpoint(REFERENCES / "tangerine_mae_24.pth")["model"])


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod.module."])
def test_prefixes_are_stripped(tmp_path, prefix):
    tensors = {prefix + name: array for name, array in reference().items()}
    safetensors.write(tmp_path / "a.safetensors", tensors)
    published = load_published(tmp_path / "a.safetensors", heads=2, decoder_heads=4)
    assert published.report.left_over == () and "cls_token" in published.report.used
    token = tensors[prefix + "cls_token"]
    safetensors.write(tmp_path / "b.safetensors", tensors | {"cls_token": 2 * token, "module.cls_token": token})
    assert "'cls_token' twice" in line(load_published, tmp_path / "b.safetensors", heads=2, decoder_heads=4)


def test_skipped_tensors_are_reported_and_numbers_rounded_aloud(tmp_path):
    tensors = reference() | {"head_dist.weight": np.zeros((2, 24), np.float32), "norm_extra": np.zeros(3, np.float32)}
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.float64) + 1e-12
    tensors["norm.bias"] = tensors["norm.bias"].astype(np.float16)
    safetensors.write(tmp_path / "a.safetensors", tensors)
    published = load_published(tmp_path / "a.safetensors", heads=2, decoder_heads=4)
    assert set(published.report.left_over) == {"head_dist.weight", "norm_extra"}
    assert published.report.notes == ("1 tensors of float64 were rounded to float32",)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(published.params))
    np.testing.assert_array_equal(published.params["encoder"]["norm"]["bias"], tensors["norm.bias"])


@pytest.mark.core
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: shutil.copy(REFERENCES / "tangerine_mae_24.pth", path) and cut(path), "PyTorch checkpoint"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "PyTorch checkpoint"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "none of them in this folder"),
    ],
)
def test_damaged_and_missing_files_end_in_one_line(tmp_path, make, words):
    path = tmp_path / "weights.pth"
    make(path)
    found = line(load_published, path)
    assert words in found and "weights.pth" in found


def cut(path):
    path.write_bytes(path.read_bytes()[:50_000])


def test_a_truncated_safetensors_file_and_other_suffixes(tmp_path):
    shutil.copy(REFERENCES / "tangerine_mlp.safetensors", tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in line(load_published, path, heads=2)
    (tmp_path / "a.onnx").write_bytes(b"1234")
    assert "found the suffix '.onnx'" in line(load_published, tmp_path / "a.onnx")


def test_weights_of_another_model_or_family_are_named(tmp_path):
    config = MaeConfig(VitConfig((8, 8), (4, 4), 3, 24, 1, 2, 48), 20, 1, 2, 40)
    flat = {entry.name: np.zeros(entry.shape, np.float32) for entry in tangerine.entries(config)}
    safetensors.write(tmp_path / "flat.safetensors", flat)
    found = line(load_published, tmp_path / "flat.safetensors")
    assert "a known family (tangerine, guided_diffusion), found tensors such as" in found
    found = line(load_published, tmp_path / "flat.safetensors", "tangerine")
    assert "'patch_embed.proj.weight' of 5 dimensions, found shape (24, 3, 4, 4)" in found
    safetensors.write(tmp_path / "resnet.safetensors", {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    assert "found tensors such as conv1.weight" in line(load_published, tmp_path / "resnet.safetensors")
    assert "no 'patch_embed.proj.weight'" in line(load_published, tmp_path / "resnet.safetensors", "tangerine")
    assert "did you mean 'tangerine'" in line(load_published, tmp_path / "resnet.safetensors", "tangerin")


def test_checkpoints_without_tensors_by_name_are_refused(tmp_path):
    for content, words in [
        ({"epoch": 3, "lr": 0.1}, "the keys epoch, lr"),
        ([1, 2], "expected a dict of tensors, found a list"),
    ]:
        path = tmp_path / "a.pth"
        write_old_checkpoint(path, content)
        assert words in line(load_published, path)


def write_old_checkpoint(path, content):
    """Write plain values in the layout before zip archives: magic, version, system, content, no storages."""
    parts = (pickles.LEGACY_MAGIC, 1001, {"little_endian": True}, content, [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record, tensors: tensors.pop("encoder/norm/scale"), "found no encoder/norm/scale"),
        (lambda record, tensors: tensors.update({"encoder/norm/scale": np.ones(23, np.float32)}),
         "'encoder/norm/scale' of shape (24,), found (23,)"),
        (lambda record, tensors: record.pop("config"), "a record with the model's sizes"),
        (lambda record, tensors: record.update(family="noddi"), "tangerine, guided_diffusion, found weights of noddi"),
        (lambda record, tensors: record.update(kind="unet"), "kind unet"),
        (lambda record, tensors: record["config"].update(decoder_widht=3), "did you mean 'decoder_width'?"),
        (lambda record, tensors: record.update(task={"kind": "binary", "names": ["a"]}), "a classifier, which has"),
    ],
)  # fmt: skip
def test_own_folders_that_do_not_hold_their_model_are_refused(tmp_path, change, words):
    write_own(tmp_path, "mae", MAE)
    known = json.loads((tmp_path / "record.json").read_text())
    tensors = dict(safetensors.read(tmp_path / "parameters.safetensors"))
    change(known, tensors)
    (tmp_path / "record.json").write_text(json.dumps(known))
    safetensors.write(tmp_path / "new.safetensors", tensors)
    (tmp_path / "new.safetensors").rename(tmp_path / "parameters.safetensors")
    assert words in line(load_published, tmp_path)


def test_what_is_told_must_agree_with_what_the_place_says(tmp_path):
    write_own(tmp_path, "classifier", CLASSIFIER, TASK)
    assert load_published(tmp_path, heads=2).config.encoder.heads == 2
    assert "heads: expected 2" in line(load_published, tmp_path, heads=4)
    assert "a task with 2 names" in line(load_published, tmp_path, task=Task("binary", ("a",)))
    other = Task("multiclass", ("healthy", "ill"))
    assert load_published(tmp_path, task=other).task == other


def test_an_own_encoder_alone_is_a_masked_autoencoder_without_decoder(tmp_path):
    params = draw(MAE)
    export_parameters(tmp_path, {"encoder": params["encoder"]}, record("mae", MAE, None))
    published = load_published(tmp_path)
    assert set(published.params) == {"encoder"} and "decoder/mask_token" in published.report.missing
    tokens = jax.eval_shape(published.model.apply, published.params, jnp.ones((1, 8, 8, 8, 1)))
    assert tokens.shape == (1, 9, 24)


def test_positions_are_resized_and_nothing_else(tmp_path):
    params = write_own(tmp_path, "mae", MAE)
    published = load_published(tmp_path)
    assert resize_positions(published, (8, 8, 8)) is published
    larger = resize_positions(published, (16, 12, 8))
    assert larger.config.encoder.grid == (4, 3, 2) and larger.preprocess.size == (16, 12, 8)
    for part, width in (("encoder", 24), ("decoder", 20)):
        table = np.asarray(larger.params[part]["position"])
        assert table.shape == (1 + 24, width)
        np.testing.assert_array_equal(table[0], params[part]["position"][0])
        # Two tokens become four: half-pixel centres at -1/4, 1/4, 3/4, 5/4, clamped at the ends.
        old = params[part]["position"][1:].reshape(2, 2, 2, width)
        new = table[1:].reshape(4, 3, 2, width)
        first, last = old[0, 0, 0], old[1, 0, 0]
        between = [first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last]
        np.testing.assert_allclose(new[:, 0, 0], between, atol=1e-6)
        np.testing.assert_allclose(new[0, 1], old[0].mean(axis=0), atol=1e-6)
    rest = {name: leaf for name, leaf in named_leaves(larger.params).items() if not name.endswith("position")}
    assert all(leaf is named_leaves(published.params)[name] for name, leaf in rest.items())
    assert published.params["encoder"]["position"].shape == (9, 24), "the first is as it was"
    output = jax.eval_shape(larger.model.apply, larger.params, jnp.ones((1, 16, 12, 8, 1)), jnp.zeros((1, 24)))
    assert output.prediction.shape == (1, 12, 64)
    assert "multiples of (4, 4, 4)" in line(resize_positions, published, (10, 8, 8))


def test_the_stored_tables_are_those_of_the_formula():
    for name, widths, grid in (("28", (28, 20), 4), ("24", (24, 16), 2)):
        published = load_published(REFERENCES / f"tangerine_mae_{name}.pth", heads=4, decoder_heads=2)
        for part, width in zip(("encoder", "decoder"), widths, strict=True):
            expected = sincos_3d(width, (grid,) * 3)
            np.testing.assert_allclose(published.params[part]["position"], expected, atol=1.2e-7, rtol=0)


def test_export_needs_a_safetensors_name(tmp_path):
    published = load_published(REFERENCES / "tangerine_linear.safetensors", heads=2)
    assert ".safetensors name" in line(export_published, published, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_not_readable_is_told(tmp_path):
    for text, words in (("{", "in JSON"), ("[]", "as a JSON object")):
        safetensors.write(tmp_path / "a.safetensors", reference(), {"jaxmed_record": text})
        assert words in line(load_published, tmp_path / "a.safetensors")


# Files as PyTorch writes them.


@pytest.mark.peers
@pytest.mark.parametrize("wrapper", ["model", "model_state", "state_dict", "model_state_dict", ""])
@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoints_written_by_pytorch(tmp_path, wrapper, is_zip):
    import argparse

    import torch

    state = {f"module.{name}": torch.from_numpy(array.copy()) for name, array in reference().items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
    around = {"optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(lr=1e-4, out=Path("runs"))}
    path = tmp_path / ("a.pth" if is_zip else "a.bin")
    torch.save(around | {wrapper: state} if wrapper else state, path, _use_new_zipfile_serialization=is_zip)
    published = load_published(path, heads=2, decoder_heads=4)
    assert published.report.left_over == published.report.missing == ()
    for entry in tangerine.entries(published.config):
        leaf = named_leaves(published.params)[entry.path]
        np.testing.assert_array_equal(to_tensor(entry, leaf), state[f"module.{entry.name}"].numpy())


@pytest.mark.peers
def test_half_precision_of_pytorch_becomes_the_same_float32(tmp_path):
    import torch

    state = {name: torch.from_numpy(array.copy()).bfloat16() for name, array in reference().items()}
    torch.save(state, tmp_path / "half.pt")
    published = load_published(tmp_path / "half.pt", heads=2, decoder_heads=4)
    export_published(published, tmp_path / "half.safetensors")
    for name, array in safetensors.read(tmp_path / "half.safetensors").items():
        np.testing.assert_array_equal(array, state[name].float().numpy())

"""Weights from every kind of file: published ones, runs and their checkpoints; wrong ones; positions of other sizes."""

import argparse
import dataclasses
import datetime
import gc
import json
import pickle
import shutil
import types
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import draw_noise
from jaxmed.arrays.position import sincos_3d
from jaxmed.arrays.task import Task
from jaxmed.arrays.trees import named_leaves
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io import pickles, safetensors
from jaxmed.models.heads import Classifier, ClassifierConfig, Head, HeadConfig
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
from jaxmed.models.published.tangerine import PREPROCESS as TANGERINE
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.train.checkpoint import Checkpoints, export_parameters

REFERENCES = Path(__file__).resolve().parents[2] / "references"
ENCODER = VitConfig((8, 8, 8), (4, 4, 4), width=24, depth=2, heads=2, hidden=48)
MAE = MaeConfig(ENCODER, 20, 1, 2, 40, mask_ratio=0.5)
CLASSIFIER = ClassifierConfig(dataclasses.replace(ENCODER, final_norm=False), HeadConfig(2, "mean", 3))
PREPROCESS = dataclasses.replace(TANGERINE, size=(8, 8, 8), axes="xyz", edge="zero")
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
    for entry in tangerine.FAMILY.entries(config):
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
    assert second.report.licence == first.report.licence == tangerine.FAMILY.licence
    assert second.task == TASK and second.preprocess == first.preprocess == dataclasses.replace(
        TANGERINE, size=(8, 8, 8)
    )
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
    flat = {entry.name: np.zeros(entry.shape, np.float32) for entry in tangerine.FAMILY.entries(config)}
    safetensors.write(tmp_path / "flat.safetensors", flat)
    found = line(load_published, tmp_path / "flat.safetensors", "tangerine")
    assert "'patch_embed.proj.weight' of 5 dimensions, found shape (24, 3, 4, 4)" in found
    safetensors.write(tmp_path / "resnet.safetensors", {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    found = line(load_published, tmp_path / "resnet.safetensors")
    names = "tangerine, retfound, dinov2, dinov3, guided_diffusion, brainfm, profound, cocolit, llava, lpips"
    assert f"a known family ({names}), found tensors such as conv1" in found
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
        (lambda record, tensors: record.update(family="noddi"), "lpips, found weights of noddi"),
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
    for text, words in (("{", "in JSON"), ("[" * 200_000, "in JSON"), ("[]", "as a JSON object")):
        safetensors.write(tmp_path / "a.safetensors", reference(), {"jaxmed_record": text})
        assert words in line(load_published, tmp_path / "a.safetensors")


def save(path, content):
    """Write a checkpoint as PyTorch's zip layout has it; arrays stand for tensors, as their pickles do here."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(content, protocol=2))
    return path


class Optimizer(dict):
    pass


MOMENTS = {"state": {0: {"exp_avg": np.ones(3, np.float32)}, 1: {"exp_avg": np.ones(3, np.float32)}}}
SCORE = np.array(81.2, np.float32)
NESTINGS = {
    "a score beside it": lambda state: {"model": state, "epoch": 7, "best_acc1": SCORE},
    "a queue inside": lambda state: {"state_dict": {"model": state, "queue": np.ones((2, 3), np.float32)}},
    "another name": lambda state: {"net_g": state, "best": SCORE},
    "teacher and student": lambda state: {"student": double(state), "teacher": state, "epoch": 3},
    "teacher of a wrapper": lambda state: {"model": {"teacher": state, "student": double(state)}},
    "ema alone": lambda state: {"ema": state, "step": 3},
    "ema beside the model": lambda state: {"model": state, "model_ema": double(state)},
    "optimizer first": lambda state: {"optimizer": MOMENTS, "amp_scaler": {"scale": SCORE}, "net": state},
    "a class of its own": lambda state: {"state_dict": Optimizer(state), "best": SCORE},
    "a counter": lambda state: {"model": state, "milestones": Counter([3])},
    "a date": lambda state: {"model": state, "date": datetime.date(2026, 1, 1), "time": SCORE},
    "encoder": lambda state: {"encoder": state, "predictor": {"weight": SCORE}},
    "encoder names": lambda state: {"state_dict": {f"encoder.{name}": value for name, value in state.items()}},
    "backbone names": lambda state: {f"module.backbone.{name}": value for name, value in state.items()},
    "compiled names": lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "teacher and student names": lambda state: {
        **{f"student.backbone.{name}": value for name, value in double(state).items()},
        **{f"teacher.backbone.{name}": value for name, value in state.items()},
    },
    "bare, beside numbers": lambda state: {**state, "epoch": 3, "lr": 0.1},
}


def double(state):
    return {name: 2 * value for name, value in state.items()}


@pytest.mark.parametrize("name", NESTINGS)
def test_the_state_dict_is_found_wherever_training_codes_keep_it(tmp_path, name):
    state = reference()
    published = load_published(save(tmp_path / "a.pth", NESTINGS[name](state)), heads=2, decoder_heads=4)
    assert published.report.missing == ()
    for entry in tangerine.FAMILY.entries(published.config):
        leaf = named_leaves(published.params)[entry.path]
        np.testing.assert_array_equal(to_tensor(entry, leaf), state[entry.name], err_msg=entry.name)
    others = {
        **{"teacher and student": "student", "teacher of a wrapper": "model/student"},
        "ema beside the model": "model_ema",
    }
    if name in others:
        assert any(f"the file holds others under {others[name]}" in remark for remark in published.report.remarks)


def test_what_is_no_state_dict_is_named(tmp_path):
    for content, words in (
        ({"model": Unmade(), "epoch": 3}, f"model (an object of {__name__}.Unmade)"),
        ({"epoch": 3, "scores": {"a": 1.5}}, "the keys epoch, scores"),
        (Unmade(), f"an object of {__name__}.Unmade, which was not made"),
    ):
        assert words in line(load_published, save(tmp_path / "a.pth", content))


class Unmade:
    pass


def test_the_arguments_in_a_file_tell_what_shapes_do_not(tmp_path):
    state = reference()
    plain = {name: value for name, value in state.items() if not name.startswith("decoder_pred")}
    plain |= {f"decoder_pred.{part}": state[f"decoder_pred.0.{part}"] for part in ("weight", "bias")}
    settings = {"num_heads": 2, "decoder_num_heads": 4, "mask_ratio": 0.5, "norm_pix_loss": True}
    for kept in (
        {"args": argparse.Namespace(**settings)},
        {"config": {"model": settings}},
        {"hyper_parameters": Optimizer(model=Optimizer(settings))},
        {"args": types.SimpleNamespace(**settings)},
    ):
        published = load_published(save(tmp_path / "a.pth", {"model": plain, **kept}))
        config = published.config
        assert (config.encoder.heads, config.decoder_heads, config.mask_ratio) == (2, 4, 0.5)
        assert config.norm_target and not config.sigmoid
    # A sigmoid cannot predict normalised targets: the file is run as it is, and this is said.
    published = load_published(save(tmp_path / "a.pth", {"model": state, "args": argparse.Namespace(**settings)}))
    assert not published.config.norm_target and published.config.sigmoid
    assert any("norm_pix_loss" in remark for remark in published.report.remarks)
    content = {"model": state, "args": argparse.Namespace(**settings)}
    found = line(load_published, save(tmp_path / "a.pth", content), heads=4)
    assert found.startswith("heads: expected 2, as the arguments in") and "leave --heads out" in found


def test_a_block_of_an_endless_number_is_refused_at_once(tmp_path):
    for stem in ("blocks", "decoder_blocks"):
        tensors = reference() | {f"{stem}.99999999.norm1.weight": np.ones(24, np.float32)}
        safetensors.write(tmp_path / "a.safetensors", tensors)
        found = line(load_published, tmp_path / "a.safetensors", heads=2, decoder_heads=4)
        assert f"expected '{stem}' numbered without gaps, found '{stem}.99999999' in a file that holds" in found
    tensors = reference() | {"blocks.9999999999999999999999.norm1.weight": np.ones(24, np.float32)}
    safetensors.write(tmp_path / "a.safetensors", tensors)
    assert load_published(tmp_path / "a.safetensors", heads=2, decoder_heads=4).report.left_over


def test_an_empty_tensor_tells_no_sizes(tmp_path):
    tensors = reference() | {"pos_embed": np.zeros((1, 2**40, 0), np.float32)}
    safetensors.write(tmp_path / "a.safetensors", tensors)
    assert "an empty tensor of shape (1, 1099511627776, 0)" in line(load_published, tmp_path / "a.safetensors", heads=2)


def test_what_has_no_place_and_what_is_missing_is_said(tmp_path):
    stray = {"head.weight": np.zeros((2, 24), np.float32), "head.bias": np.zeros(2, np.float32)}
    safetensors.write(tmp_path / "a.safetensors", reference() | stray)
    report = load_published(tmp_path / "a.safetensors", heads=2, decoder_heads=4).report
    assert report.kind == "mae" and set(report.left_over) == set(stray)
    assert any("2 tensors of the file have no place in the model: head" in remark for remark in report.remarks)
    partial = {name: value for name, value in reference().items() if name != "decoder_norm.bias"}
    safetensors.write(tmp_path / "a.safetensors", partial)
    report = load_published(tmp_path / "a.safetensors", heads=2, decoder_heads=4).report
    assert report.remarks == ("the decoder is not whole (no decoder_norm.bias): the encoder alone is used",)
    assert report.lines[0].startswith("Weights: tangerine, mae. Licence: CC-BY-NC")


def test_a_head_with_two_hidden_layers_is_run_and_returned(tmp_path):
    config = ClassifierConfig(CLASSIFIER.encoder, HeadConfig(2, "mean", 3, second_hidden=5))
    params = draw(config)
    for name in ("batch_norm", "batch_norm_2"):
        params["head"][name]["var"] = np.abs(params["head"][name]["var"])
    export_parameters(tmp_path / "own", params, record("classifier", config, TASK))
    export_published(load_published(tmp_path / "own"), tmp_path / "theirs.safetensors")
    tensors = dict(safetensors.read(tmp_path / "theirs.safetensors"))
    assert {"head.0.weight", "head.2.running_var", "head.3.weight", "head.5.weight", "head.6.bias"} <= set(tensors)
    safetensors.write(tmp_path / "bare.safetensors", tensors)
    published = load_published(tmp_path / "bare.safetensors", heads=2)
    assert published.config == config
    assert_same(published.params, params)
    head, tokens = params["head"], np.random.default_rng(0).standard_normal((2, 9, 24))
    apply = make_model(Head(config.head)).apply
    tokens = jnp.asarray(tokens, jnp.float32)
    logits, moments = apply(head, tokens)
    features = np.asarray(apply(head, tokens, method="features"), np.float64)
    for ending in ("", "_2"):
        features = features @ head[f"hidden{ending}"]["kernel"] + head[f"hidden{ending}"]["bias"]
        norm = head[f"batch_norm{ending}"]
        features = np.where(features > 0, features, 0.01 * features)
        norm = {name: value.astype(np.float64) for name, value in norm.items()}
        features = (features - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    expected = features @ head["linear"]["kernel"] + head["linear"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert moments == {}


# Models and weights as functions and trees.


@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
def test_every_imported_model_takes_a_key_and_needs_nothing_but_an_image(tmp_path, module, kind, config, task):
    write_own(tmp_path, kind, config, task)
    published = load_published(tmp_path)
    image = jnp.ones((2, 8, 8, 8, 1))
    for key in (None, jax.random.key(0)):
        output = jax.eval_shape(lambda image, key=key: published.model.apply(published.params, image, key=key), image)
        if kind == "mae":  # a key hides patches; without one nothing is hidden
            assert output.prediction.shape == (2, 0 if key is None else 4, 64)
            assert output.tokens.shape == (2, 9 if key is None else 5, 24)
    assert jax.tree.structure(jax.eval_shape(published.model.init, jax.random.key(0), image)) == jax.tree.structure(
        published.params
    )


def test_a_key_draws_the_masking_of_each_image(tmp_path):
    write_own(tmp_path, "mae", MAE)
    published = load_published(tmp_path)
    images = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 8, 1)), jnp.float32)
    key = jax.random.key(3)
    run = jax.jit(published.model.apply)
    found = run(published.params, images, key=key)
    noise = draw_noise(jax.random.split(key, 4), 8)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(run(published.params, images, noise)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({tuple(row) for row in np.asarray(found.masking.kept)}) > 1


@pytest.mark.parametrize(("module", "kind", "config", "task"), KINDS)
def test_weights_are_a_tree_of_parameters(tmp_path, module, kind, config, task):
    """Leaves are params alone; two readings of a file are one structure, so that nothing is compiled twice."""
    params = write_own(tmp_path, kind, config, task)
    one, other = load_published(tmp_path), load_published(tmp_path)
    assert len(jax.tree.leaves(one)) == len(jax.tree.leaves(params))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert all(path.startswith(".params[") for path in paths)
    twice = jax.tree.map(lambda leaf: 2 * leaf, one)
    assert isinstance(twice, Published) and twice.config == config and twice.task == task
    assert_same(twice.params, jax.tree.map(lambda leaf: 2 * leaf, params))
    count = []

    @jax.jit
    def norm(published):
        count.append(1)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(published))

    gradient = jax.grad(norm)(one)
    norm(other)
    assert len(count) == 1  # one program serves both readings
    assert_same(gradient.params, jax.tree.map(lambda leaf: 2 * leaf, params))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, twice)
    np.testing.assert_allclose(jax.vmap(norm)(stacked), [norm(one), norm(twice)], rtol=1e-5)


def test_counters_stay_through_a_tree(tmp_path):
    first = load_published(REFERENCES / "tangerine_mlp.safetensors", heads=2)
    again = jax.tree.map(lambda leaf: leaf, first)
    assert {name: int(count) for name, count in again.extras.items()} == {"head.2.num_batches_tracked": 1234}


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
    for entry in tangerine.FAMILY.entries(published.config):
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

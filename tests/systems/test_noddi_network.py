"""A network and its protocol: normalisation, refusal of other tables, disk, ONNX."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import onnx
from jaxmed.io.gradient_match import Table, match_table
from jaxmed.models.mlp import Mlp, MlpConfig
from jaxmed.models.published.signal_network import Description, Network, export_onnx, load_network, network_record
from jaxmed.nn.model import make_model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ForwardConfig
from jaxmed.systems.noddi.network import normalise, outputs_of, predict
from jaxmed.train.checkpoint import export_parameters

BVALS, BVECS = two_shell_protocol(3, ((8, 700.0), (12, 2000.0)))
TABLE = Table.make(BVALS, BVECS, 50.0)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "noddi_onnx.py"


def make_network(forward=ForwardConfig(), shape=MlpConfig(width=16), table=TABLE):
    outputs = outputs_of(forward.build(BVALS))
    inputs = int((~table.is_b0).sum())
    params = make_model(Mlp(shape, len(outputs))).init(jax.random.key(3), jnp.ones((1, inputs)))
    return Network(params, Description(shape, outputs, table, forward, "gt", (10.0, 50.0)))


@pytest.fixture
def signals():
    return np.random.default_rng(0).uniform(50, 900, (300, len(BVALS))).astype(np.float32)


def test_signals_are_divided_by_the_noisy_mean_of_the_unweighted_rows(signals):
    inputs, has_signal = normalise(jnp.asarray(signals), TABLE.is_b0)
    np.testing.assert_allclose(inputs, signals[:, 3:] / signals[:, :3].mean(axis=1, keepdims=True), rtol=1e-6)
    assert bool(has_signal.all())


def test_scale_does_not_matter_and_empty_voxels_are_zero(signals):
    network = make_network()
    signals[7] = 0
    signals[8, :3] = 0
    found = predict(network, signals)
    np.testing.assert_allclose(predict(network, 1e-3 * signals), found, atol=1e-6)
    assert not found[7:9].any() and np.isfinite(found).all() and found[:7].all()


def test_a_voxel_does_not_depend_on_its_neighbours(signals):
    network = make_network()
    np.testing.assert_allclose(predict(network, signals[5:6])[0], predict(network, signals)[5], atol=1e-6)
    assert predict(network, signals[:0]).shape == (0, 3)


@pytest.mark.parametrize("forward", [ForwardConfig(), ForwardConfig("ball-and-stick")], ids=["noddi", "ball-and-stick"])
def test_a_network_returns_from_disk_exactly(tmp_path, signals, forward):
    network = make_network(forward)
    export_parameters(tmp_path / "net", network.params, network_record(network.description))
    again = load_network(tmp_path / "net")
    assert again.description == network.description
    np.testing.assert_array_equal(predict(again, signals), predict(network, signals))


@pytest.mark.parametrize("forward", [ForwardConfig(), ForwardConfig("ball-and-stick")], ids=["noddi", "ball-and-stick"])
@pytest.mark.parametrize("shape", [MlpConfig(width=16), MlpConfig(width="M", activation="relu", head="abs")])
def test_onnx_computes_the_same(tmp_path, signals, forward, shape):
    pytest.importorskip("onnxruntime")
    network = make_network(forward, shape)
    signals[7] = 0
    export_onnx(tmp_path / "net.onnx", network)
    deployed = onnx.load(tmp_path / "net.onnx")
    assert deployed.table == TABLE and deployed.outputs == network.description.outputs
    assert deployed.metadata["protocol_hash"] == TABLE.hash
    found, expected = deployed.run(signals), predict(network, signals)
    spans = np.array([output.bounds[1] - output.bounds[0] for output in network.description.outputs])
    # Signals far from any tissue drive the unbounded head far above its range: relative there.
    assert np.max(np.abs(found - expected) / (spans * np.maximum(np.abs(expected / spans), 1))) < 1e-6


# Protocols -----------------------------------------------------------------------------------------------------------


def rotated(bvecs):
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return bvecs @ turn.T


def exchanged(values, first, second):
    changed = np.array(values)
    changed[[first, second]] = changed[[second, first]]
    return changed


def shuffled(*parts):
    order = np.random.default_rng(2).permutation(len(BVALS))
    return tuple(part[order] for part in parts)


def tilted(bvecs, degrees):
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return bvecs @ turn.T


def jittered(bvecs, degrees, seed=3):
    noise = np.random.default_rng(seed).normal(size=bvecs.shape)
    across = noise - np.sum(noise * bvecs, axis=1, keepdims=True) * bvecs
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    angle = np.radians(degrees)
    return np.where(BVALS[:, None] > 0, np.cos(angle) * bvecs + np.sin(angle) * across, 0.0)


OPPOSITE = np.where(np.arange(len(BVALS))[:, None] % 2, -1, 1) * BVECS
SAME = {
    "itself": (BVALS, BVECS),
    "four digits": (BVALS, np.round(BVECS, 4)),
    "opposite directions": (BVALS, OPPOSITE),
    "a rotated slab": (BVALS, rotated(BVECS)),
    "b-values of a scanner": (BVALS * 1.015, BVECS),
    "low b-values of a scanner": (BVALS * 0.98, BVECS),
    "a b-value for the unweighted": (np.where(BVALS == 0, 5.0, BVALS), BVECS),
    "directions a degree apart": (BVALS, jittered(BVECS, 1.0)),
    "another order": shuffled(BVALS, BVECS),
    "another order, four digits": shuffled(BVALS, np.round(BVECS, 4)),
    "another order, opposite directions": shuffled(BVALS, OPPOSITE),
    "another order, b-values of a scanner": shuffled(BVALS * 1.015, BVECS),
    "another order, a degree apart": shuffled(BVALS, jittered(BVECS, 1.0)),
    "another order of a tilted slab": shuffled(BVALS, tilted(BVECS, 8.0)),
    "another order of a mirrored table": shuffled(BVALS, BVECS * [-1, 1, 1]),
    "the weighted ones first": (BVALS[::-1], BVECS[::-1]),
}
OTHER = {
    "another number": (BVALS[:-1], BVECS[:-1], "with 23 images, found 22"),
    "another b-value": (np.where(BVALS == 2000, 2100, BVALS), BVECS, "found b = 2100 in place 12"),
    "another b-value of one image": (
        np.where(np.arange(23) == 15, 1500, BVALS),
        BVECS,
        "found b = 1500 in place 16",
    ),
    "an unweighted image of b = 60": (np.where(np.arange(23) == 1, 45.0, BVALS), BVECS, "found b = 45 in place 2"),
    "other directions": (BVALS, jittered(BVECS, 12.0), "angles between directions differ by"),
    "another order of other directions": (*shuffled(BVALS, jittered(BVECS, 12.0)), "angles between directions differ"),
    "directions exchanged between shells": (BVALS, exchanged(BVECS, 4, 20), "angles between directions differ"),
}
TURNED = ("a rotated slab", "another order of a tilted slab", "another order of a mirrored table")


def script():
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("noddi_onnx", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def about(table):
    parts = {"bvals": table.bvals, "bvecs": table.bvecs, "b0_threshold": table.b0_threshold}
    return {name: json.dumps(value) for name, value in parts.items()} | {"protocol_hash": table.hash}


@pytest.mark.parametrize("name", SAME)
def test_the_same_protocol_in_other_words_is_taken_in_the_networks_order(name):
    bvals, bvecs = SAME[name]
    match = match_table(TABLE, bvals, bvecs, "dwi.bval")
    assert np.abs(bvals[match.order] - BVALS).max() <= 40
    weighted = BVALS > 0
    if name not in TURNED:
        cosine = np.abs(np.sum(bvecs[match.order] * BVECS, axis=1))[weighted]
        assert np.degrees(np.arccos(np.minimum(cosine, 1))).max() < 2
    assert any("another order" in note for note in match.notes) == ("order" in name or "first" in name)
    assert ("scanner" not in name and "degree" not in name) or any("b-values differ by" in n for n in match.notes)
    np.testing.assert_array_equal(script().match_table(about(TABLE), bvals, bvecs, "dwi.bval"), match.order)


@pytest.mark.parametrize("name", OTHER)
def test_another_protocol_is_refused_with_its_difference(name):
    bvals, bvecs, message = OTHER[name]
    bvecs = np.where((bvals > 50)[:, None] & ~bvecs.any(axis=1)[:, None], [0.0, 0.0, 1.0], bvecs)
    with pytest.raises(InputError) as error:
        match_table(TABLE, bvals, bvecs, "dwi.bval")
    assert message in str(error.value)
    assert str(error.value).startswith("dwi.bval: expected the protocol of the network")
    assert "jaxmed noddi train" in str(error.value)
    module = script()
    with pytest.raises(module.Refused, match="expected the protocol of the network"):
        module.match_table(about(TABLE), bvals, bvecs, "dwi.bval")


def test_a_scan_in_another_order_gets_the_same_maps(signals):
    network, order = make_network(), np.random.default_rng(2).permutation(len(BVALS))
    match = match_table(TABLE, BVALS[order], BVECS[order], "dwi.bval")
    np.testing.assert_array_equal(predict(network, signals[:, order][:, match.order]), predict(network, signals))


def test_the_threshold_is_part_of_the_hash():
    assert Table.make(BVALS, BVECS, 60.0).hash != TABLE.hash


def test_the_hash_names_order_and_numbers():
    hashes = {Table.make(BVALS, BVECS, 50.0).hash, Table.make(exchanged(BVALS, 3, 20), BVECS, 50.0).hash}
    hashes |= {Table.make(BVALS, exchanged(BVECS, 12, 20), 50.0).hash, Table.make(BVALS, rotated(BVECS), 50.0).hash}
    assert len(hashes) == 4
    assert Table.make(BVALS, BVECS + 0.0, 50.0).hash == Table.make(BVALS, np.round(BVECS, 8), 50.0).hash


@pytest.mark.parametrize(
    ("bvals", "bvecs", "message"),
    [
        (BVALS, BVECS[:-1], "expected 23 directions"),
        (BVALS + 100, BVECS, "expected a row at b <= 50"),
        (np.zeros(23), BVECS, "expected rows above b = 50"),
    ],
)
def test_impossible_tables_are_refused(bvals, bvecs, message):
    with pytest.raises(ValueError, match=message):
        Table.make(bvals, bvecs, 50.0)


# Damaged folders -----------------------------------------------------------------------------------------------------


def edit(folder, change):
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


DAMAGE = {
    "no folder": (lambda folder: (folder / "record.json").unlink(), "found no record.json there"),
    "another family": (lambda folder: edit(folder, lambda r: r.update(family="retfound")), "found weights of retfound"),
    "a changed table": (
        lambda folder: edit(folder, lambda r: r["config"]["table"]["bvals"].reverse()),
        "the table that its hash names",
    ),
    "another shape": (
        lambda folder: edit(folder, lambda r: r["config"]["shape"].update(width=8)),
        "parameters of shapes",
    ),
    "a strange field": (lambda folder: edit(folder, lambda r: r["config"].update(x=1)), "a known field"),
    "no parameters": (lambda folder: (folder / "parameters.safetensors").unlink(), "no such file"),
    "half the parameters": (
        lambda folder: (folder / "parameters.safetensors").write_bytes(
            (folder / "parameters.safetensors").read_bytes()[:900]
        ),
        "parameters.safetensors: expected",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_network_is_refused(tmp_path, damage):
    network = make_network()
    export_parameters(tmp_path / "net", network.params, network_record(network.description))
    break_it, message = DAMAGE[damage]
    break_it(tmp_path / "net")
    with pytest.raises(InputError) as error:
        load_network(tmp_path / "net")
    assert message in str(error.value)


def test_an_onnx_file_without_its_protocol_is_refused(tmp_path):
    package = pytest.importorskip("onnx")
    export_onnx(tmp_path / "net.onnx", make_network())
    model = package.load(tmp_path / "net.onnx")
    kept = {entry.key: entry.value for entry in model.metadata_props}
    for change, message in (
        ({}, "metadata without it"),
        (kept | {"protocol_hash": "0"}, "the table that its hash names"),
    ):
        del model.metadata_props[:]
        package.helper.set_model_props(model, change)
        package.save(model, tmp_path / "changed.onnx")
        with pytest.raises(InputError, match=message):
            onnx.load(tmp_path / "changed.onnx")


def test_a_description_is_hashable_and_replaceable():
    description = make_network().description
    assert hash(description) == hash(dataclasses.replace(description, labels=description.labels))
    assert description.names == ("ndi", "odi", "fwf")

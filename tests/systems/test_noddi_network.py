"""A network and its protocol: normalisation, refusal of other tables, disk, ONNX."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.models.mlp import Mlp, MlpConfig
from jaxmed.nn.model import make_model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.systems.noddi.deployment import export_onnx, load_onnx, run_onnx
from jaxmed.systems.noddi.network import (
    Description,
    ForwardConfig,
    Network,
    Output,
    Table,
    load,
    normalise,
    predict,
    require_table,
    save,
)

BVALS, BVECS = two_shell_protocol(3, ((8, 700.0), (12, 2000.0)))
TABLE = Table.make(BVALS, BVECS, 50.0)


def make_network(forward=ForwardConfig(), shape=MlpConfig(width=16), table=TABLE):
    model = forward.build(BVALS)
    outputs = tuple(Output.make(parameter) for parameter in model.parameters)
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
    save(tmp_path / "net", network)
    again = load(tmp_path / "net")
    assert again.description == network.description
    np.testing.assert_array_equal(predict(again, signals), predict(network, signals))


@pytest.mark.parametrize("forward", [ForwardConfig(), ForwardConfig("ball-and-stick")], ids=["noddi", "ball-and-stick"])
@pytest.mark.parametrize("shape", [MlpConfig(width=16), MlpConfig(width="M", activation="relu", head="abs")])
def test_onnx_computes_the_same(tmp_path, signals, forward, shape):
    pytest.importorskip("onnxruntime")
    network = make_network(forward, shape)
    signals[7] = 0
    export_onnx(tmp_path / "net.onnx", network)
    deployed = load_onnx(tmp_path / "net.onnx")
    assert deployed.table == TABLE and deployed.outputs == network.description.outputs
    assert deployed.session.metadata["protocol_hash"] == TABLE.hash
    found, expected = run_onnx(deployed, signals), predict(network, signals)
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


SAME = {
    "itself": (BVALS, BVECS),
    "four digits": (BVALS, np.round(BVECS, 4)),
    "opposite directions": (BVALS, np.where(np.arange(len(BVALS))[:, None] % 2, -1, 1) * BVECS),
    "a rotated slab": (BVALS, rotated(BVECS)),
    "b-values of a scanner": (BVALS * 1.004, BVECS),
    "a b-value for the unweighted": (np.where(BVALS == 0, 5.0, BVALS), BVECS),
}
OTHER = {
    "another number": (BVALS[:-1], BVECS[:-1], "with 23 images, found 22"),
    "another b-value": (np.where(BVALS == 2000, 2100, BVALS), BVECS, "b = 2000 s/mm^2 in place 12, found b = 2100"),
    "another order of shells": (exchanged(BVALS, 3, 20), BVECS, "b = 700 s/mm^2 in place 4, found b = 2000"),
    "another order of directions": (
        BVALS,
        exchanged(BVECS, 12, 20),
        "directions in its order, found another direction",
    ),
    "unweighted elsewhere": (
        exchanged(BVALS, 0, 22),
        exchanged(BVECS, 0, 22),
        "b = 0 s/mm^2 in place 1, found b = 2000",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_protocol_in_other_words_is_taken(name):
    bvals, bvecs = SAME[name]
    require_table(TABLE, Table.make(bvals, bvecs, 50.0), "dwi.bval")


@pytest.mark.parametrize("name", OTHER)
def test_another_protocol_is_refused(name):
    bvals, bvecs, message = OTHER[name]
    bvecs = np.where((bvals > 50)[:, None] & ~bvecs.any(axis=1)[:, None], [0.0, 0.0, 1.0], bvecs)
    with pytest.raises(InputError) as error:
        require_table(TABLE, Table.make(bvals, bvecs, 50.0), "dwi.bval")
    assert message in str(error.value)
    assert str(error.value).startswith("dwi.bval: expected the protocol of the network")
    assert "jaxmed noddi train" in str(error.value)


def test_the_threshold_is_part_of_the_protocol():
    assert Table.make(BVALS, BVECS, 60.0).hash != TABLE.hash
    bvals = np.concatenate([[0.0, 55.0, 55.0], BVALS[3:]])
    bvecs = np.concatenate([np.eye(3), BVECS[3:]])
    with pytest.raises(InputError, match=r"a b = 0 threshold of 100 s/mm\^2, found 50"):
        require_table(Table.make(bvals, bvecs, 100.0), Table.make(bvals, bvecs, 50.0), "dwi.bval")


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
    "another family": (lambda folder: edit(folder, lambda r: r.update(family="retfound")), "found family retfound"),
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
    save(tmp_path / "net", make_network())
    break_it, message = DAMAGE[damage]
    break_it(tmp_path / "net")
    with pytest.raises(InputError) as error:
        load(tmp_path / "net")
    assert message in str(error.value)


def test_an_onnx_file_without_its_protocol_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    export_onnx(tmp_path / "net.onnx", make_network())
    model = onnx.load(tmp_path / "net.onnx")
    kept = {entry.key: entry.value for entry in model.metadata_props}
    for change, message in (
        ({}, "metadata without it"),
        (kept | {"protocol_hash": "0"}, "the table that its hash names"),
    ):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, change)
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(InputError, match=message):
            load_onnx(tmp_path / "changed.onnx")


def test_a_description_is_hashable_and_replaceable():
    description = make_network().description
    assert hash(description) == hash(dataclasses.replace(description, labels=description.labels))
    assert description.names == ("ndi", "odi", "fwf")

"""ONNX graphs: what they compute, what they carry, and files that are none."""

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io import onnx as writer
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import Quantity

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TABLE = Table.make(np.array([0.0, 700, 700, 2000, 0, 2000]), np.eye(3)[[0, 0, 1, 2, 0, 1]], 50.0)
OUTPUTS = (Quantity("share", "a share", "1", (0.0, 1.0)), Quantity("speed", "a diffusivity", "um^2/ms", (0.1, 3.0)))
B0, WEIGHTED = (0, 4), (1, 2, 3, 5)


def graph(activation="elu", head="sigmoid"):
    rng = np.random.default_rng(0)
    sizes = (len(WEIGHTED), 6, 6, 2)
    layers = [
        (rng.normal(size=size) / np.sqrt(size[0]), rng.normal(size=size[1]))
        for size in zip(sizes, sizes[1:], strict=False)
    ]
    return writer.Graph(layers, activation, head, TABLE, OUTPUTS, {"model": "none"})


def expected(graph, signals):
    x = signals[:, WEIGHTED] / signals[:, B0].mean(axis=1, keepdims=True)
    *hidden, (kernel, bias) = graph.layers
    for matrix, offset in hidden:
        x = x @ matrix + offset
        x = np.where(x > 0, x, np.expm1(x) if graph.activation == "elu" else 0)
    x = x @ kernel + bias
    low, high = np.array([output.bounds for output in OUTPUTS]).T
    return low + (high - low) * (1 / (1 + np.exp(-x)) if graph.head == "sigmoid" else np.abs(x))


@pytest.mark.parametrize(("activation", "head"), [("elu", "sigmoid"), ("relu", "abs")])
def test_a_graph_computes_the_network_of_normalised_signals(tmp_path, activation, head):
    network = graph(activation, head)
    writer.write(tmp_path / "net.onnx", network)
    signals = np.random.default_rng(1).uniform(100, 500, (1000, 6))
    session = writer.load(tmp_path / "net.onnx")
    np.testing.assert_allclose(session.run(signals), expected(network, signals), rtol=2e-6, atol=1e-6)
    assert (session.table, session.outputs, session.constants) == (TABLE, OUTPUTS, {"model": "none"})
    assert session.metadata["protocol_hash"] == TABLE.hash
    # The batch axis is free.
    np.testing.assert_array_equal(session.run(signals[:1]), session.run(signals)[:1])


def test_voxels_without_unweighted_signal_are_zero(tmp_path):
    writer.write(tmp_path / "net.onnx", graph())
    signals = np.full((3, 6), 7.0)
    signals[1, list(B0)] = 0
    signals[2, list(B0)] = (-5, 1)
    found = writer.load(tmp_path / "net.onnx").run(signals)
    assert found[0].all() and not found[1:].any() and np.isfinite(found).all()


def test_a_file_needs_no_more_than_opset_13(tmp_path):
    writer.write(tmp_path / "net.onnx", graph())
    model = onnx.load(tmp_path / "net.onnx")
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 13)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "voxel"
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Gather", "ReduceMean", "Greater", "Where", "Div", "Cast", "Gemm", "Elu", "Sigmoid", "Mul", "Add"}


def test_files_that_are_no_network_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no graph" * 100)
    with pytest.raises(InputError, match="expected an ONNX network, found a file that ONNX Runtime refuses"):
        writer.load(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="no such file"):
        writer.load(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="expected an .onnx name, found the suffix '.bin'"):
        writer.write(tmp_path / "net.bin", graph())


def test_a_network_of_another_kind_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [value("x", 1, ["n", 3])], [value("y", 1, ["n", 3])]
    )
    model = onnx.helper.make_model(other, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="expected a network from 'signals' to 'parameters', found x, y"):
        writer.load(tmp_path / "other.onnx")

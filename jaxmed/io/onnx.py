"""Write a measurement-to-parameter network as an ONNX graph, and run one.

The graph is written node by node from the parameters, so no converter is needed and nothing in it surprises a scanner's
runtime: operators of opset 13, one input, one output, a free batch axis. The division by the mean unweighted signal
is part of the graph, so the caller hands over magnitudes as they come from the scanner.

Matrix products sum in double precision: in single, the order of summation alone, which every runtime chooses for
itself, moves the estimates of a trained network by more than 1e-6 of their range (measured: 1.3e-6 single, 4e-7 so).

    signals (voxel x image) -> Gather b = 0, ReduceMean -> Gather weighted, Div -> (Gemm, activation) x depth
    -> Gemm, head -> Mul, Add (range of each parameter) -> Where (0 without unweighted signal) -> parameters
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxmed.errors import InputError, require_extra
from jaxmed.files import atomic_path, require_file

OPSET = 13
IR_VERSION = 7
"""The IR of opset 12 and 13: read by every ONNX Runtime since 1.6 (2020)."""
INPUT, OUTPUT = "signals", "parameters"
ACTIVATIONS = {"elu": "Elu", "relu": "Relu"}
HEADS = {"sigmoid": "Sigmoid", "abs": "Abs"}


class Graph(NamedTuple):
    """Everything that an exported network computes with.

    Attributes:
        layers: Kernel (input x output) and bias of every layer; the last is the head.
        activation: After every layer but the last.
        head: After the last.
        b0_rows: Images whose mean divides the others.
        weighted_rows: Images that enter the network, in its order.
        low: Value of each parameter where the head gives 0.
        span: What is added where the head gives 1.
    """

    layers: Sequence[tuple[np.ndarray, np.ndarray]]
    activation: Literal["elu", "relu"]
    head: Literal["sigmoid", "abs"]
    b0_rows: Sequence[int]
    weighted_rows: Sequence[int]
    low: Sequence[float]
    span: Sequence[float]


def write(path: str | Path, graph: Graph, metadata: Mapping[str, str]) -> None:
    """Write a network, wholly or not at all.

    Args:
        path: An .onnx file.
        graph: What it computes.
        metadata: Strings that travel in the file.

    Raises:
        InputError: The package is missing, the name has another suffix, or the place cannot be written.
    """
    onnx = _import("onnx")
    path = Path(path)
    if path.suffix != ".onnx":
        raise InputError(path, "an .onnx name", f"the suffix '{path.suffix}'")
    model = onnx.helper.make_model(
        _make_graph(onnx, graph),
        producer_name="jaxmed",
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _make_graph(onnx: Any, graph: Graph) -> Any:
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    floats: dict[str, Any] = {"zero": np.float32(0), "one": np.float32(1)}
    floats |= {"low": np.asarray(graph.low, np.float32), "span": np.asarray(graph.span, np.float32)}
    indices = {"b0_rows": graph.b0_rows, "weighted_rows": graph.weighted_rows}
    nodes = [
        node("Gather", [INPUT, "b0_rows"], ["unweighted"], axis=1),
        node("ReduceMean", ["unweighted"], ["mean_b0"], axes=[1], keepdims=1),
        node("Greater", ["mean_b0", "zero"], ["has_signal"]),
        node("Where", ["has_signal", "mean_b0", "one"], ["divisor"]),
        node("Gather", [INPUT, "weighted_rows"], ["weighted"], axis=1),
        node("Div", ["weighted", "divisor"], ["hidden_0"]),
    ]
    last = len(graph.layers) - 1
    for number, (kernel, bias) in enumerate(graph.layers):
        floats |= {f"kernel_{number}": np.asarray(kernel, np.float32), f"bias_{number}": np.asarray(bias, np.float32)}
        inputs = [f"hidden_{number}", f"kernel_{number}", f"bias_{number}"]
        nodes += [node("Cast", [name], [f"{name}_double"], to=onnx.TensorProto.DOUBLE) for name in inputs]
        nodes.append(node("Gemm", [f"{name}_double" for name in inputs], [f"sum_{number}"]))
        nodes.append(node("Cast", [f"sum_{number}"], [f"linear_{number}"], to=onnx.TensorProto.FLOAT))
        kind = HEADS[graph.head] if number == last else ACTIVATIONS[graph.activation]
        nodes.append(node(kind, [f"linear_{number}"], [f"hidden_{number + 1}"]))
    nodes += [
        node("Mul", [f"hidden_{last + 1}", "span"], ["scaled"]),
        node("Add", ["scaled", "low"], ["shifted"]),
        node("Where", ["has_signal", "shifted", "zero"], [OUTPUT]),
    ]
    images = len(graph.b0_rows) + len(graph.weighted_rows)
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    return onnx.helper.make_graph(
        nodes,
        "microstructure",
        [value(INPUT, kind, ["voxel", images])],
        [value(OUTPUT, kind, ["voxel", len(graph.low)])],
        [tensor(np.asarray(array), name) for name, array in floats.items()]
        + [tensor(np.asarray(rows, np.int64), name) for name, rows in indices.items()],
    )


class Session(NamedTuple):
    """A network ready to run.

    Attributes:
        session: A session of ONNX Runtime.
        metadata: The strings that its file carries.
        images: Values per voxel that it expects.
    """

    session: Any
    metadata: dict[str, str]
    images: int

    def run(self, signals: Float[np.ndarray, "voxel image"]) -> Float32[np.ndarray, "voxel parameter"]:
        """Return the parameters of every voxel."""
        (found,) = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(signals, np.float32)})
        return found


def load(path: str | Path, threads: int = 0) -> Session:
    """Open a network.

    Args:
        path: An .onnx file that `write` made.
        threads: To compute with; 0 takes one per core.

    Raises:
        InputError: The package is missing, or the file is no such network.
    """
    runtime = _import("onnxruntime")
    path = require_file(path, "an ONNX file", (".onnx",), kinds=())
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen error types without a common one of their own
        raise InputError(path, "an ONNX network", f"a file that ONNX Runtime refuses ({error})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [item.name for item in inputs] != [INPUT] or [item.name for item in outputs] != [OUTPUT]:
        found = ", ".join(item.name for item in (*inputs, *outputs))
        raise InputError(path, f"a network from '{INPUT}' to '{OUTPUT}'", found, "export it with jaxmed noddi export")
    return Session(session, dict(session.get_modelmeta().custom_metadata_map), int(inputs[0].shape[1]))


def _import(name: str) -> Any:
    module = require_extra(name, "onnx", "ONNX")
    if name == "onnx":
        # Submodules that `import onnx` alone does not promise.
        for part in ("helper", "numpy_helper", "checker"):
            require_extra(f"onnx.{part}", "onnx", "ONNX")
    return module

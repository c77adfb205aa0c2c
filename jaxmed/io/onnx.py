"""Write a measurement-to-parameter network as an ONNX graph, and run one.

The graph is written node by node from the parameters, so no converter is needed and nothing in it surprises a scanner's
runtime: operators of opset 13, one input, one output, a free batch axis. The division by the mean unweighted signal
is part of the graph, so the caller hands over magnitudes as they come from the scanner.

Matrix products sum in double precision: in single, the order of summation alone, which every runtime chooses for
itself, moves the estimates of a trained network by more than 1e-6 of their range (measured: 1.3e-6 single, 4e-7 so).

    signals (voxel x image) -> Gather b = 0, ReduceMean -> Gather weighted, Div -> (Gemm, activation) x depth
    -> Gemm, head -> Mul, Add (range of each parameter) -> Where (0 without unweighted signal) -> parameters

The metadata holds what the network says of itself: the gradient table, its hash, and names, definitions, units and
ranges of the parameters. `scripts/noddi_onnx.py` reads them without this package.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxmed.errors import InputError, require_extra
from jaxmed.files import atomic_path, require_file
from jaxmed.io.gradient_match import Table
from jaxmed.io.maps import Quantity
from jaxmed.versions import software_name

OPSET = 13
IR_VERSION = 7
"""The IR of opset 12 and 13: read by every ONNX Runtime since 1.6 (2020)."""
INPUT, OUTPUT = "signals", "parameters"
ACTIVATIONS = {"elu": "Elu", "relu": "Relu"}
HEADS = {"sigmoid": "Sigmoid", "abs": "Abs"}
COLUMNS = {"parameters": "name", "definitions": "definition", "units": "unit", "bounds": "bounds"}
"""Entries of the metadata with one value per parameter, and the field of `Quantity` that they hold."""
CHUNK = 16384
"""Voxels of one call: activations of 256 numbers stay in 16 MB, in the processor's cache."""


class Graph(NamedTuple):
    """Everything that an exported network computes with, and says of itself.

    Attributes:
        layers: Kernel (input x output) and bias of every layer; the last is the head.
        activation: After every layer but the last.
        head: After the last; 0 and 1 become the ends of each parameter's range.
        table: The protocol, in the order of the input.
        outputs: The parameters, in order.
        constants: What they rest on.
    """

    layers: Sequence[tuple[np.ndarray, np.ndarray]]
    activation: Literal["elu", "relu"]
    head: Literal["sigmoid", "abs"]
    table: Table
    outputs: Sequence[Quantity]
    constants: Mapping[str, Any]


def write(path: str | Path, graph: Graph) -> None:
    """Write a network as an .onnx file, wholly or not at all.

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
    onnx.helper.set_model_props(model, _metadata(graph))
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _metadata(graph: Graph) -> dict[str, str]:
    table, outputs = graph.table, graph.outputs
    found = {"bvals": table.bvals, "bvecs": table.bvecs, "b0_threshold": table.b0_threshold}
    found |= {key: [getattr(output, field) for output in outputs] for key, field in COLUMNS.items()}
    plain = {"format": "jaxmed-noddi-1", "protocol_hash": table.hash, "software": software_name()}
    return plain | {name: json.dumps(value) for name, value in {**found, "constants": dict(graph.constants)}.items()}


def _make_graph(onnx: Any, graph: Graph) -> Any:
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    low, high = np.array([output.bounds for output in graph.outputs], np.float32).T
    floats: dict[str, Any] = {"zero": np.float32(0), "one": np.float32(1), "low": low, "span": high - low}
    indices = {"b0_rows": np.flatnonzero(graph.table.is_b0), "weighted_rows": np.flatnonzero(~graph.table.is_b0)}
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
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    return onnx.helper.make_graph(
        nodes,
        "microstructure",
        [value(INPUT, kind, ["voxel", len(graph.table.bvals)])],
        [value(OUTPUT, kind, ["voxel", len(graph.outputs)])],
        [tensor(np.asarray(array), name) for name, array in floats.items()]
        + [tensor(np.asarray(rows, np.int64), name) for name, rows in indices.items()],
    )


class Session(NamedTuple):
    """A network ready to run.

    Attributes:
        session: A session of ONNX Runtime.
        metadata: The strings that its file carries.
        table: Protocol that it belongs to.
        outputs: Its maps.
        constants: What they rest on.
    """

    session: Any
    metadata: dict[str, str]
    table: Table
    outputs: tuple[Quantity, ...]
    constants: dict[str, Any]

    def run(self, signals: Float[np.ndarray, "voxel image"]) -> Float32[np.ndarray, "voxel parameter"]:
        """Return the parameters of every voxel."""
        parts = [np.zeros((0, len(self.outputs)), np.float32)]
        for start in range(0, len(signals), CHUNK):
            block = np.ascontiguousarray(signals[start : start + CHUNK], np.float32)
            parts += self.session.run([OUTPUT], {INPUT: block})
        return np.concatenate(parts)


def load(path: str | Path, threads: int = 0) -> Session:
    """Open a network.

    Args:
        path: An .onnx file that `write` made.
        threads: To compute with; 0 takes one per core.

    Raises:
        InputError: The package is missing, or the file is no such network or says too little about itself.
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
    found, images = dict(session.get_modelmeta().custom_metadata_map), int(inputs[0].shape[1])
    try:
        bvals, bvecs, b0_threshold, constants, *columns = (
            json.loads(found[name]) for name in ("bvals", "bvecs", "b0_threshold", "constants", *COLUMNS)
        )
        table = Table(tuple(bvals), tuple(map(tuple, bvecs)), b0_threshold)
        rows = zip(*columns, strict=True)
        outputs = tuple(Quantity(name, definition, unit, tuple(ends)) for name, definition, unit, ends in rows)
        said, known = found["protocol_hash"], table.hash
    except (KeyError, TypeError, ValueError) as error:
        advice = "export it with jaxmed noddi export"
        raise InputError(path, "a network that names its protocol", f"metadata without it ({error})", advice) from error
    if said != known:
        raise InputError(path, "the table that its hash names", "another", "export the network again")
    if len(table.bvals) != images:
        raise InputError(path, f"{images} rows in its table", len(table.bvals), "export the network again")
    return Session(session, found, table, outputs, constants)


def _import(name: str) -> Any:
    module = require_extra(name, "onnx", "ONNX")
    if name == "onnx":
        # Submodules that `import onnx` alone does not promise.
        for part in ("helper", "numpy_helper", "checker"):
            require_extra(f"onnx.{part}", "onnx", "ONNX")
    return module

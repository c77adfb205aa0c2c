"""A classifier as StableHLO: one file with parameters inside, which runs without this package.

The file is what `jax.export` writes: `jax.export.deserialize(bytes).call(cubes)` runs it on CPU, NVIDIA GPU and TPU,
for any batch size, and its `mlir_module_serialized` is portable StableHLO for other runtimes. It takes prepared cubes;
the JSON file of the same name beside it says how to prepare them, and what the outputs are.

Source: https://docs.jax.dev/en/latest/export/export.html (compatibility: six months backwards and forwards).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export  # not imported by jax itself
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.task import Task, predict_values
from jaxmed.config import from_record, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, read_record, require_file, write_json
from jaxmed.models.heads import Classifier, ClassifierConfig
from jaxmed.models.published.load import Published
from jaxmed.nn.attention import LONG
from jaxmed.nn.model import make_model
from jaxmed.versions import software_versions

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportedClassifier:
    """A classifier from a file; call it with prepared cubes.

    Attributes:
        function: Cubes [batch, d, h, w, 1] in [0, 1] to probabilities or values [batch, output].
        preprocess: A scan to a cube.
        task: What the outputs mean.
        record: The whole JSON file.
    """

    function: Callable[..., Any]
    preprocess: Preprocess
    task: Task
    record: dict[str, Any]

    def __call__(self, cubes: Float[Any, "batch d h w 1"]) -> Float[Any, "batch output"]:
        """Return probabilities, or values in the unit of the labels."""
        return self.function(cubes)


def export_stablehlo(published: Published, path: str | Path, platforms: Sequence[str] = PLATFORMS) -> Path:
    """Write a classifier as PATH, and PATH with the suffix .json beside it.

    Args:
        published: A classifier or regressor, from `load_published`.
        path: A file name that ends in .stablehlo.
        platforms: What it shall run on: "cpu", "cuda", "rocm", "tpu".

    Returns:
        The path.

    Raises:
        InputError: The weights have no head, or the place cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(path, f"a file name that ends in {SUFFIX}", f"the suffix '{path.suffix}'", "rename it")
    if not isinstance(published.config, ClassifierConfig) or published.task is None:
        advice = "adapt it on labels first: jaxmed tangerine adapt"
        raise InputError("published", "weights of a classifier or regressor", f"kind {published.report.kind}", advice)
    config, task = _portable(published.config), published.task
    model = make_model(Classifier(config))
    params = jax.tree.map(np.asarray, published.params)

    def run(cubes: jax.Array) -> jax.Array:
        return predict_values(model.apply(params, cubes)[0], task)

    space = (*config.encoder.image_size, config.encoder.channels)
    (batch,) = jax.export.symbolic_shape("batch")
    # jax.export takes nothing but a jitted function.
    exported = jax.export.export(jax.jit(run), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct((batch, *space), np.float32)
    )
    content = bytes(exported.serialize())
    record = {
        "format": "jax.export",
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "sha256": hashlib.sha256(content).hexdigest(),
        "input": {
            "shape": ["batch", *space],
            "dtype": "float32",
            "range": [0.0, 1.0],
            "axes": ["batch", "slice (D)", "row (H)", "column (W)", "channel"],
            "preparation": "cubic B-spline over the whole field of view to this size (output voxel o samples stored "
            "index o * old / new), HU from low to high as 0 to 1, clipped",
        },
        "output": {"shape": ["batch", len(task.names)], "names": list(task.names), "unit": _unit(task)},
        "preprocess": to_record(published.preprocess),
        "task": to_record(task),
        "config": to_record(config),
        "family": published.report.family,
        "licence": published.report.licence,
        "versions": software_versions(),
    }
    # The program first: a JSON file whose checksum fits is then the sign that both are whole.
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    write_json(path.with_suffix(".json"), record)
    return path


def load_stablehlo(path: str | Path) -> ExportedClassifier:
    """Read what `export_stablehlo` wrote.

    Raises:
        InputError: One of the two files is missing, damaged, or belongs to another, or this jax cannot run it.
    """
    path = require_file(path, "an exported classifier", (SUFFIX,))
    sidecar = path.with_suffix(".json")
    record = read_record(sidecar)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        advice = "copy both files again, or export anew"
        raise InputError(path, f"the file that {sidecar.name} describes", "another checksum", advice)
    try:
        exported = jax.export.deserialize(bytearray(content))
    except ValueError as error:  # of a version that this jax no longer, or not yet, understands
        written = (record.get("versions") or {}).get("jax")
        raise InputError(
            path, "a program that this jax reads", f"one of jax {written} ({error})", "export anew"
        ) from error
    preprocess = from_record(Preprocess, record.get("preprocess"), str(sidecar))
    task = from_record(Task, record.get("task"), str(sidecar))
    return ExportedClassifier(exported.call, preprocess, task, record)


def _portable(config: ClassifierConfig) -> ClassifierConfig:
    """Choose what every platform runs: "auto" would take what is best on the machine that exports."""
    tokens = config.encoder.num_tokens + 1
    encoder = dataclasses.replace(config.encoder, attention="products" if tokens <= LONG else "blocks", remat=False)
    return dataclasses.replace(config, encoder=encoder)


def _unit(task: Task) -> str:
    return "unit of the labels" if task.kind == "regression" else "probability"

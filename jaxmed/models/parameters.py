"""Parameters that a finished run handed on: a folder with parameters.safetensors and record.json."""

from pathlib import Path
from typing import Any

from jaxmed.config import read_record
from jaxmed.io import safetensors


def load_parameters(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `train.checkpoint.export_parameters` wrote.

    Returns:
        The nested dict of NumPy arrays, and the record.

    Raises:
        InputError: The folder holds no exported parameters.
    """
    record = read_record(folder / "record.json")
    params: dict[str, Any] = {}
    for name, array in safetensors.read(folder / "parameters.safetensors").items():
        *parents, last = name.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array
    return params, record

"""Maps as NIfTI files, each with a JSON sidecar that says what it is: definition, unit, constants, software."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.versions import software_name
from jaxmed.volume import Volume


def write_map(
    folder: Path,
    name: str,
    volume: Volume,
    definition: str,
    unit: str,
    constants: Mapping[str, Any],
    *,
    reference: Path | None = None,
    **further: Any,
) -> None:
    """Write NAME.nii.gz and NAME.json.

    Args:
        folder: Where to.
        name: Name of the map.
        volume: On the grid of the scan.
        definition: In one line.
        unit: "1" for a fraction.
        constants: What the map rests on.
        reference: NIfTI file whose header the map takes.
        **further: More lines of the sidecar.
    """
    nifti.write(folder / f"{name}.nii.gz", volume, reference=reference)
    write_sidecar(folder / f"{name}.json", definition, unit, constants, **further)


def write_sidecar(path: Path, definition: str, unit: str, constants: Mapping[str, Any], **further: Any) -> None:
    """Write what a result is; see `write_map`."""
    sidecar = {"definition": definition, "unit": unit, **further, "constants": dict(constants)}
    write_json(path, sidecar | {"software": software_name()})

"""Maps as NIfTI files, each with a JSON sidecar that says what it is: definition, unit, constants, software."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.versions import software_name
from jaxmed.volume import Volume


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What the numbers of a map mean.

    Attributes:
        name: Name of the map and its file.
        definition: In one line.
        unit: UCUM code; "1" for a fraction.
        bounds: Ends of its range, which a viewer shows as black and white.
    """

    name: str
    definition: str
    unit: str = "1"
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def label(self) -> str:
        """The name as a viewer shows it, such as NDI."""
        return self.name.upper() if len(self.name) == 3 else self.name


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
        reference: File whose header the map takes where it is NIfTI.
        **further: More lines of the sidecar.
    """
    is_nifti = reference is not None and reference.name.lower().endswith(nifti.SUFFIXES)
    nifti.write(folder / f"{name}.nii.gz", volume, reference=reference if is_nifti else None)
    write_sidecar(folder / f"{name}.json", definition, unit, constants, **further)


def write_sidecar(path: Path, definition: str, unit: str, constants: Mapping[str, Any], **further: Any) -> None:
    """Write what a result is; see `write_map`."""
    sidecar = {"definition": definition, "unit": unit, **further, "constants": dict(constants)}
    write_json(path, sidecar | {"software": software_name()})

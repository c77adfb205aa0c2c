"""Write the maps of a fit as NIfTI on the grid of the scan, each with a JSON sidecar that says what it is."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.gradients import to_world
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.systems.noddi.estimates import FLAG_DEFINITIONS, FLAGS, Estimates
from jaxmed.systems.noddi.options import FitConfig
from jaxmed.systems.noddi.posterior import Posterior
from jaxmed.systems.noddi.reading import Scan
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

DEFINITIONS = {
    "direction": ("mean fibre direction, unit vector in RAS+ world axes, sign arbitrary", "1"),
    "direction_error": ("root mean square angle of the cone of uncertainty about the direction", "degrees"),
    "s0": ("unweighted signal", "unit of the scan"),
    "residual": ("root mean squared residual over the fitted images divided by s0", "1"),
    "mean_diffusivity": ("mean diffusivity of the tensor that starts the fit", "um^2/ms"),
    "fractional_anisotropy": ("fractional anisotropy of the tensor that starts the fit", "1"),
    "converged": ("1 where the fit met its tolerance", "1"),
}


def write_maps(
    folder: Path,
    rows: Estimates,
    model: MicrostructureModel,
    scan: Scan,
    fit: FitConfig,
    *,
    modulated: bool,
    posterior: Posterior | None = None,
) -> None:
    """Write every map.

    Args:
        folder: Where to.
        rows: On the grid of the scan.
        model: Names and units of the values.
        scan: Grid, noise level.
        fit: Constants, for the sidecars.
        modulated: Write ndi (1 - fwf) and odi (1 - fwf) too.
        posterior: Of the fitted voxels, in order.
    """
    maps = collect_maps(rows, model, modulated) | _posterior_maps(posterior, rows, model)
    for name, (array, definition, unit) in maps.items():
        if name == "direction":
            array = to_world(array, scan.dwi.affine)
        array = array if array.dtype == np.uint8 else array.astype(np.float32)
        reference = scan.path if scan.path.is_file() else None
        nifti.write(folder / f"{name}.nii.gz", Volume.make(array, scan.dwi.affine), reference=reference)
        sidecar: dict[str, Any] = {"definition": definition, "unit": unit}
        if name == "flags":
            sidecar["bits"] = {str(bit): f"{flag}: {FLAG_DEFINITIONS[flag]}" for flag, bit in FLAGS.items()}
        write_json(
            folder / f"{name}.json", sidecar | {"constants": constants(model, scan, fit), "software": _software()}
        )


def collect_maps(
    rows: Estimates, model: MicrostructureModel, modulated: bool
) -> dict[str, tuple[np.ndarray, str, str]]:
    """Return array, definition and unit of every map by name."""
    maps = {}
    for index, parameter in enumerate(model.parameters):
        name, unit = parameter.name, parameter.unit
        maps[name] = (np.asarray(rows.values[..., index]), parameter.definition, unit)
        error = f"standard error of {name} (Laplace, from the Fisher information), at most the width of its range"
        maps[f"{name}_error"] = (np.asarray(rows.errors[..., index]), error, unit)
    for name, (definition, unit) in DEFINITIONS.items():
        if name == "converged":
            done = rows.fitted & (rows.flags & FLAGS["not_converged"] == 0)
            maps[name] = (np.asarray(done, np.uint8), definition, unit)
        else:
            maps[name] = (np.asarray(getattr(rows, name)), definition, unit)
    maps["flags"] = (np.asarray(rows.flags, np.uint8), "sum of bits, 0 where nothing is to be said; see bits", "1")
    if modulated and "fwf" in model.names:
        tissue = 1 - maps["fwf"][0]
        for name in ("ndi", "odi"):
            where = np.where(rows.fitted, maps[name][0] * tissue, 0.0)
            maps[f"{name}_modulated"] = (where, f"{name} times (1 - fwf): {name} weighted by its tissue", "1")
    return maps


def _posterior_maps(
    posterior: Posterior | None, rows: Estimates, model: MicrostructureModel
) -> dict[str, tuple[np.ndarray, str, str]]:
    if posterior is None:
        return {}
    said = "over a flat prior on every parameter and on the direction"

    def full(row):
        array = np.zeros(rows.fitted.shape, np.float32)
        array[rows.fitted] = row
        return array

    maps = {}
    for index, parameter in enumerate(model.parameters):
        name, unit = parameter.name, parameter.unit
        maps[f"{name}_mean"] = (full(posterior.mean[:, index]), f"posterior mean of {name} {said}", unit)
        maps[f"{name}_sd"] = (full(posterior.sd[:, index]), f"posterior standard deviation of {name} {said}", unit)
    definition = "mean acceptance rate of the Markov chain; far below 0.5 it did not move well"
    return maps | {"posterior_acceptance": (full(posterior.acceptance), definition, "1")}


def constants(model: MicrostructureModel, scan: Scan, fit: FitConfig) -> dict[str, Any]:
    """Return what the maps rest on."""
    found: dict[str, Any] = {"model": model.name, "likelihood": "gaussian" if scan.sigma is None else "rician"}
    found |= {"sigma": scan.sigma, "s0": fit.s0, "gradients_vary": scan.gradient_map is not None}
    if fit.model == "noddi":
        found |= {
            "parallel_diffusivity_um2_per_ms": fit.tissue.parallel_diffusivity,
            "free_diffusivity_um2_per_ms": fit.tissue.free_diffusivity,
            "extra_cellular": fit.extra_cellular,
        }
    return found


def _software() -> str:
    return f"jaxmed {software_versions().get('jaxmed', 'unknown')}"

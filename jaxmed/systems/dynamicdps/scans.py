"""One scan from file to refined file: read, estimate, refine, measure tissue, write maps with their sidecars.

Images larger than the prior's, and volumes, are cut into tiles of its size, refined, and blended back.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.windows import TilingConfig, tile_head
from jaxmed.errors import InputError
from jaxmed.metrics.tissue import tissue_volumes
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, tell_left
from jaxmed.recipes.restoration import read_case, write_restored
from jaxmed.systems.dynamicdps.enhancement import STATUS, Program, apply_in_batches, draw_samples

MAPS = {
    "enhanced": "image refined by the prior and the measurement: mean of the posterior samples",
    "uncertainty": "standard deviation of the posterior samples; 0 where there is one",
    "initial": "estimate that was refined",
    "difference": "enhanced minus input, both at the voxel size of the prior's images",
}


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What happened to a scan; outputs/NAME.json.

    Attributes:
        name: Name of its results.
        path: The scan.
        initial: Estimate by another tool.
        notes: What is unexpected about the scan.
        images: Tiles that were refined.
        samples: Posterior samples of each.
        spacing_mm: Voxel size of the prior's images.
        residual: Median of |y - A(x)|, of the estimates ("initial") and the results ("enhanced").
        improved: Share of images whose residual fell.
        start: Where samples entered the chain: "lowest", "median" and "highest", in steps left.
        evaluations: Forward and backward passes per sample.
        steps: Steps left at which there was a sample.
        curve: Mean residual of the denoised image there.
        step_sizes: Mean step size there.
        flags: How often line searches ended in what way.
        volumes_ml: Tissue volumes of "input", "initial" and "enhanced".
        labels_ml: Volume of every label of the label map.
    """

    name: str
    path: str
    initial: str | None
    notes: tuple[str, ...]
    images: int
    samples: int
    spacing_mm: tuple[float, ...]
    residual: dict[str, float]
    improved: float
    start: dict[str, int]
    evaluations: float
    steps: tuple[int, ...]
    curve: tuple[float, ...]
    step_sizes: tuple[float, ...]
    flags: dict[str, int]
    volumes_ml: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    labels_ml: dict[str, float] = dataclasses.field(default_factory=dict)


class Plan(NamedTuple):
    """What stays the same from scan to scan: the prior, its compiled refinement, and settings of the stage.

    Attributes:
        estimate: Conditional network; None where estimates come from files, or are the measurements.
        constants: What the maps rest on, for their sidecars.
    """

    params: Params
    preprocess: Preprocess
    program: Program
    estimate: Callable[[Array], Array] | None
    tiling: TilingConfig
    samples: int
    tissue: bool
    fill: float | None
    constants: dict[str, Any]


def process(plan: Plan, one: Inputs, key: KeyArray, folder: Path, tell: Tell = lambda text: None) -> Refinement:
    """Refine a scan and write its maps; `tell` takes lines about how far it is.

    Raises:
        InputError: For whatever is wrong with the files, or when the result is not finite.
    """
    scan, estimate, head, labels_ml = read_case(one, plan.preprocess, plan.fill)
    y = np.asarray(scan.volume.array, np.float32)
    tiles = tile_head(head, plan.preprocess.slice_axis, plan.preprocess.size, plan.tiling)
    if not tiles.kept.any():
        advice = "check the scan, or lower --tiling.least-head"
        raise InputError(one.path, "a head to refine", "none in any image", advice)
    measurement = tiles.cut(y)
    if estimate is None:
        estimate = y
        if plan.estimate is not None:
            estimate = tiles.blend(apply_in_batches(plan.estimate, plan.program.batch_size, measurement), y)
    unit = "images" if plan.samples == 1 else f"images, {plan.samples} of each"
    progress = tell_left(tell, one.name, len(measurement) * plan.samples, unit)
    samples = draw_samples(plan.program, plan.params, key, measurement, tiles.cut(estimate), plan.samples, progress)
    # Tiles over one voxel are samples of their own: blending averages them, and their standard deviations too.
    maps = {
        "enhanced": tiles.blend(samples.mean, estimate),
        "uncertainty": tiles.blend(samples.std, np.zeros_like(y)),
        "initial": estimate,
    }
    if not np.isfinite(maps["enhanced"]).all():
        raise InputError(one.path, "a finite result", "NaN or Inf", "check the weights and the acquisition")
    maps["difference"] = maps["enhanced"] - y
    write_restored(folder, one, scan, maps, MAPS, plan.constants)
    volumes = {}
    if plan.tissue:
        images = {"input": y, "initial": estimate, "enhanced": maps["enhanced"]}
        volumes = tissue_volumes(images, head, float(np.prod(scan.volume.spacing)) / 1000)
    reached, starts, initial = np.isfinite(samples.curve), samples.start_time, one.beside["initial"]
    return Refinement(
        name=one.name,
        path=str(one.path),
        initial=None if initial is None else str(initial),
        notes=tuple(scan.notes),
        images=len(samples.mean),
        samples=plan.samples,
        spacing_mm=tuple(scan.volume.spacing),
        residual={
            "initial": float(np.median(samples.initial_residual)),
            "enhanced": float(np.median(samples.residual)),
        },
        improved=float(np.mean(samples.residual < samples.initial_residual)),
        start={"lowest": int(starts.min()), "median": int(np.median(starts)), "highest": int(starts.max())},
        evaluations=float(samples.evaluations.mean()),
        steps=tuple(np.flatnonzero(reached).tolist()),
        curve=tuple(samples.curve[reached].tolist()),
        step_sizes=tuple(samples.step_sizes[reached].tolist()),
        flags={name: int(count) for name, count in zip(STATUS, samples.flags, strict=True)},
        volumes_ml=volumes,
        labels_ml=labels_ml,
    )

"""One scan from file to refined file: read, estimate, refine, measure tissue, write maps with their sidecars.

Images larger than the prior's, and volumes, are cut into tiles of its size, refined, and blended back.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float32

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import resample_to
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.images import MAX_INTENSITY
from jaxmed.data.preprocess import Loaded, Preprocess, load, load_head
from jaxmed.data.windows import TilingConfig, tile_head
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.metrics.tissue import label_volumes, tissue_volumes
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, tell_left, write_maps
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
    """What stays the same from scan to scan.

    Attributes:
        params: The prior's parameters.
        preprocess: How scans become its images.
        program: Compiled refinement.
        estimate: Conditional network; None where estimates come from files, or are the measurements.
        tiling: How images larger than the prior's are cut.
        samples: Posterior samples per image.
        tissue: Whether tissue volumes are measured.
        fill: Intensity of voxels that have none; None refuses them.
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


class Case(NamedTuple):
    """A scan and what belongs to it, on the prior's grid.

    Attributes:
        scan: The scan.
        estimate: By another tool, in [0, 2]; None where a network or the scan itself gives it.
        head: Where to refine, and to measure tissue: a mask, or else the largest bright region.
        labels_ml: Volume of every label of its label map.
    """

    scan: Loaded
    estimate: Float32[np.ndarray, "x y z"] | None
    head: Bool[np.ndarray, "x y z"]
    labels_ml: dict[str, float]


def read_case(one: Inputs, preprocess: Preprocess, fill: float | None) -> Case:
    """Read and check a scan and what belongs to it.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    scan = load(one.scan, preprocess, fill)
    initial, mask, labels = (one.beside[name] for name in ("initial", "mask", "labels"))
    estimate, volumes = None, {}
    if initial is not None:
        other = load(initial, preprocess, fill)
        moved = resample_to(other.volume, scan.volume.grid, order=1, fill=np.nan).array
        inside = float(np.isfinite(moved).mean())
        if inside < 0.5:
            found = f"one that covers {inside:.0%} of it"
            raise InputError(initial, f"an image of the space of {one.path}", found, "register it first")
        # Beyond its field of view the measurement stands in.
        estimate = np.where(np.isfinite(moved), moved, scan.volume.array).astype(np.float32)
    if labels is not None:
        found = nifti.read(labels, dimensions=(3,), dtype=np.int32, allow_constant=False)
        volumes = label_volumes(found.array, None, float(np.prod(found.spacing)) / 1000)
    # A mask says what the brain is; what lies outside is not refined.
    head = find_foreground(scan.volume.array) if mask is None else load_head(mask, scan, preprocess)
    return Case(scan, estimate, head, volumes)


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
    write_results(folder, plan, one, scan, maps)
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


def write_results(
    folder: Path, plan: Plan, one: Inputs, scan: Loaded, maps: dict[str, Float32[np.ndarray, "x y z"]]
) -> None:
    """Write maps on the grid and in the unit of the scan, each with a sidecar; of a picture also a picture."""
    constants = {"intensity_of_0": scan.low, "intensity_of_2": scan.high, **plan.constants}
    stored = {
        name: scan.restore_stored(array, is_difference=name in ("uncertainty", "difference"))
        for name, array in maps.items()
    }
    write_maps(folder, one, stored, {name: (text, "that of the input") for name, text in MAPS.items()}, constants)
    if scan.kind == "picture":
        picture = scan.as_stored(scan.restore(maps["enhanced"])) / MAX_INTENSITY * 255
        write_png(folder / f"{one.name}_enhanced.png", np.clip(picture, 0, 255).astype(np.uint8))

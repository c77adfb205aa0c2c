"""One scan from file to refined file: read, estimate, refine, measure tissue, write maps with their sidecars."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from jaxmed.arrays.foreground import find_foreground
from jaxmed.arrays.grid import resample_to
from jaxmed.arrays.types import KeyArray
from jaxmed.config import to_record
from jaxmed.data.preprocess import Loaded, Preprocess, load, load_mask
from jaxmed.diffusion.posterior.dynamicdps import DynamicDps
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.images import write_png
from jaxmed.io.scans import ScanFiles
from jaxmed.metrics.tissue import TISSUES, fit_tissue, label_volumes, mixture_volumes
from jaxmed.models.published.load import Published
from jaxmed.physics.lowfield import LowField
from jaxmed.systems.dynamicdps.enhancement import (
    Program,
    Samples,
    TilingConfig,
    apply_network,
    cut_tiles,
    refine,
)
from jaxmed.train.log import duration
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

STATUS = ("converged", "at the largest step", "decrease only", "no decrease", "not downhill", "below precision")
"""What `solvers.line_search` calls 0 to 5."""
MAPS = {
    "enhanced": "image refined by the prior and the measurement: mean of the posterior samples",
    "uncertainty": "standard deviation of the posterior samples; 0 where there is one",
    "initial": "estimate that was refined",
    "difference": "enhanced minus input, both at the voxel size of the prior's images",
}


class Plan(NamedTuple):
    """What stays the same from scan to scan.

    Attributes:
        network: The prior.
        prior: Where it was read.
        program: Compiled refinement.
        initial: Conditional network; None where estimates come from files, or are the measurements.
        preprocess: How scans become images.
        tiling: How images larger than the prior's are cut.
        method: Settings of DynamicDPS, whose chain any other solver walks.
        settings: Settings of the solver that is used, as a record.
        acquisition: The operator's acquisition.
        num_samples: Posterior samples per image.
        wants_tissue: Whether tissue volumes are measured.
        fill: Intensity of voxels that have none; None refuses them.
    """

    network: Published
    prior: Path
    program: Program
    initial: Published | None
    preprocess: Preprocess
    tiling: TilingConfig
    method: DynamicDps
    settings: dict[str, Any]
    acquisition: LowField
    num_samples: int
    wants_tissue: bool
    fill: float | None = None


class Inputs(NamedTuple):
    """A scan with what belongs to it.

    Attributes:
        name: Name of its results.
        scan: The scan.
        initial: Estimate by another tool, or None.
        mask: Brain mask, or None.
        labels: Label map of the scan, or None.
    """

    name: str
    scan: ScanFiles
    initial: Path | None = None
    mask: Path | None = None
    labels: Path | None = None

    @property
    def path(self) -> Path:
        """The file or folder of the scan."""
        return self.scan.path


class Case(NamedTuple):
    """A scan and what belongs to it, on the prior's grid.

    Attributes:
        scan: The scan.
        estimate: By another tool, in [0, 2]; None where a network or the scan itself gives it.
        head: Where to refine, and to measure tissue: a mask, or else the largest bright region.
        labels: Label map as stored, or None.
    """

    scan: Loaded
    estimate: Float32[np.ndarray, "x y z"] | None
    head: Bool[np.ndarray, "x y z"]
    labels: Volume | None


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


def read_case(inputs: Inputs, preprocess: Preprocess, fill: float | None = None) -> Case:
    """Read and check a scan and what belongs to it.

    Args:
        inputs: The files.
        preprocess: How the prior sees scans.
        fill: Intensity of voxels that have none; None refuses them.

    Raises:
        InputError: For whatever a user can have wrong in these files.
    """
    scan = load(inputs.scan, preprocess, fill)
    estimate = None
    if inputs.initial is not None:
        other = load(inputs.initial, preprocess, fill)
        moved = resample_to(other.volume, scan.volume.grid, order=1, fill=np.nan).array
        inside = float(np.isfinite(moved).mean())
        if inside < 0.5:
            found = f"one that covers {inside:.0%} of it"
            raise InputError(inputs.initial, f"an image of the space of {inputs.path}", found, "register it first")
        # Beyond its field of view the measurement stands in.
        estimate = np.where(np.isfinite(moved), moved, scan.volume.array).astype(np.float32)
    # A mask says what the brain is; what lies outside is not refined.
    head = find_foreground(scan.volume.array) if inputs.mask is None else read_inside(inputs.mask, scan, preprocess)
    labels = None
    if inputs.labels is not None:
        labels = nifti.read(inputs.labels, dimensions=(3,), dtype=np.int32, allow_constant=False)
    return Case(scan, estimate, head, labels)


def read_inside(path: Path, scan: Loaded, preprocess: Preprocess) -> Bool[np.ndarray, "x y z"]:
    """Read the mask of a scan, or a label map of its brain, onto the grid of `scan.volume`.

    Raises:
        InputError: For whatever is wrong with the file, its grid is another, or nothing is inside.
    """
    inside = load_mask(path, scan, preprocess)[0].array
    if not inside.any():
        raise InputError(path, "a mask with voxels", "none", "check the mask")
    return inside


def process(
    plan: Plan, inputs: Inputs, key: KeyArray, folder: Path, tell: Callable[[str], None] = lambda text: None
) -> Refinement:
    """Refine a scan and write its maps.

    Args:
        plan: The same for all scans.
        inputs: The scan, and what belongs to it.
        key: Consumed.
        folder: Where to write.
        tell: Takes a line about how far it is.

    Raises:
        InputError: For whatever is wrong with the files, or when the result is not finite.
    """
    case = read_case(inputs, plan.preprocess, plan.fill)
    y = np.asarray(case.scan.volume.array, np.float32)
    estimate = y if case.estimate is None else case.estimate
    tiles = cut_tiles(y, estimate, case.head, plan.preprocess, plan.tiling)
    if not tiles.kept.any():
        advice = "check the scan, or lower --tiling.least-head"
        raise InputError(inputs.path, "a head to refine", "none in any image", advice)
    if plan.initial is not None and case.estimate is None:
        batch = plan.program.batch_size
        estimate = apply_network(plan.initial.model.apply, plan.initial.params, tiles, batch)
        tiles = cut_tiles(y, estimate, case.head, plan.preprocess, plan.tiling)
    total = len(tiles.measurement) * plan.num_samples
    unit = "images" if plan.num_samples == 1 else f"images, {plan.num_samples} of each"

    first: list[tuple[int, float]] = []

    def progress(done: int) -> None:
        now, left = time.monotonic(), ""
        if first:  # the first batch waits for the compiler, and tells nothing of the others
            left = f", {duration((now - first[0][1]) / (done - first[0][0]) * (total - done))} left"
        first.append((done, now))
        tell(f"{inputs.name}: {done:,} of {total:,} {unit}{left}")

    refined = refine(plan.program, plan.network.params, key, tiles, plan.num_samples, progress)
    if not np.isfinite(refined.image).all():
        raise InputError(inputs.path, "a finite result", "NaN or Inf", "check the weights and the acquisition")
    assert refined.samples is not None
    maps = {
        "enhanced": refined.image,
        "uncertainty": refined.uncertainty,
        "initial": estimate.astype(np.float32),
        "difference": (refined.image - y).astype(np.float32),
    }
    write_maps(folder, inputs, case.scan, maps, plan)
    row = describe(refined.samples, inputs, case.scan)
    if plan.wants_tissue:
        images = {"input": y, "initial": maps["initial"], "enhanced": refined.image}
        volumes = tissue_volumes(images, case.head, case.scan.volume.spacing)
        row = dataclasses.replace(row, volumes_ml=volumes)
    if case.labels is not None:
        row = dataclasses.replace(row, labels_ml=count_labels(case.labels))
    return row


def describe(samples: Samples, inputs: Inputs, scan: Loaded) -> Refinement:
    """Say what happened to a scan's images."""
    reached, starts = np.isfinite(samples.curve), samples.start_time
    return Refinement(
        name=inputs.name,
        path=str(inputs.path),
        initial=None if inputs.initial is None else str(inputs.initial),
        notes=tuple(scan.notes),
        images=len(samples.mean),
        samples=int(starts.shape[1]),
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
    )


def write_maps(
    folder: Path, inputs: Inputs, scan: Loaded, maps: dict[str, Float32[np.ndarray, "x y z"]], plan: Plan
) -> None:
    """Write maps on the grid and in the unit of the scan, each with a sidecar."""
    is_nifti = inputs.path.name.lower().endswith(nifti.SUFFIXES)
    constants = {
        "intensity_of_0": scan.low,
        "intensity_of_2": scan.high,
        "method": plan.settings,
        "acquisition": to_record(plan.acquisition),
        "samples": plan.num_samples,
        "prior": str(plan.prior),
        "licence": plan.network.report.licence,
    }
    for name, array in maps.items():
        volume = scan.restore_stored(array, is_difference=name in ("uncertainty", "difference"))
        path = folder / f"{inputs.name}_{name}.nii.gz"
        nifti.write(path, volume, reference=inputs.path if is_nifti else None)
        if scan.kind == "picture" and name == "enhanced":
            picture = np.clip(scan.as_stored(scan.restore(array)) / 2 * 255, 0, 255)
            write_png(folder / f"{inputs.name}_{name}.png", picture.astype(np.uint8))
        sidecar = {"definition": MAPS[name], "unit": "that of the input"}
        software = f"jaxmed {software_versions().get('jaxmed', 'unknown')}"
        write_json(folder / f"{inputs.name}_{name}.json", sidecar | {"constants": constants, "software": software})


def tissue_volumes(
    images: dict[str, Float32[np.ndarray, "x y z"]],
    brain: Bool[np.ndarray, "x y z"],
    spacing: tuple[float, float, float],
) -> dict[str, dict[str, float]]:
    """Measure CSF, grey and white matter in ml by the same estimator on every image.

    Args:
        images: By name, on one grid.
        brain: The voxels that count; the same for all.
        spacing: In mm.
    """
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(brain))
    mask = jnp.asarray(brain[box])
    voxel = float(np.prod(spacing)) / 1000

    @jax.jit
    def measure(image: Any) -> Any:
        return mixture_volumes(fit_tissue(image, mask), voxel)

    volumes = {name: np.asarray(measure(jnp.asarray(image[box]))) for name, image in images.items()}
    return {name: dict(zip(TISSUES, map(float, values), strict=True)) for name, values in volumes.items()}


def count_labels(labels: Volume) -> dict[str, float]:
    """Count every structure of a label map, in ml; 0 is background."""
    table = {str(value): (value,) for value in np.unique(labels.array).tolist() if value}
    return label_volumes(labels.array, table, float(np.prod(labels.spacing)) / 1000)

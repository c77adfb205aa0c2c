"""Scans refined by posterior samples: one from file to file, tables of all, and how a page shows them.

A scan is read, estimated, refined and written as maps with their sidecars, and its tissue is measured. Images larger
than the prior's, and volumes, are cut into tiles of its size, refined, and blended back.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxmed.arrays.batches import apply_in_batches
from jaxmed.arrays.types import KeyArray, Params
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.windows import TilingConfig, tile_head
from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.metrics.tissue import tissue_volumes
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, tell_left
from jaxmed.recipes.posterior_samples import STATUS, Program, draw_samples
from jaxmed.recipes.restoration import (
    Volumes,
    read_case,
    restored_blocks,
    volume_sections,
    write_restored,
    write_volumes,
)
from jaxmed.report.figures import curves
from jaxmed.report.page import Note, Section, Table, Text, Tile

MOST_PICTURES = 8
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


def write_tables(folder: Path, scans: Sequence[Refinement]) -> None:
    """Write scans.csv, and volumes.csv where tissue was measured."""
    columns = ("id", "images", "initial_residual", "residual", "improved", "start", "evaluations")
    table = [
        (scan.name, scan.images, *(f"{scan.residual[name]:.6g}" for name in ("initial", "enhanced")),
         f"{scan.improved:.6g}", scan.start["median"], f"{scan.evaluations:.6g}")
        for scan in scans
    ]  # fmt: skip
    write_table(folder / "scans.csv", columns, [dict(zip(columns, row, strict=True)) for row in table])
    write_volumes(folder, volumes_of(scans))


def volumes_of(scans: Sequence[Refinement]) -> list[Volumes]:
    """Return what was measured of tissue in each scan."""
    return [(scan.name, scan.volumes_ml, scan.labels_ml) for scan in scans]


# The page -----------------------------------------------------------------------------------------------------------


def refinement_sections(outputs: Path, scans: Sequence[Refinement], chain: int) -> tuple[list[Tile], list[Section]]:
    """Show scans and maps, residuals, line searches and tissue volumes, of a chain of so many steps."""
    tiles: list[Tile] = []
    sections = [_scan(outputs, scan, is_viewed=scan is scans[0]) for scan in scans[:MOST_PICTURES]]
    if scans:
        before, after = (np.median([scan.residual[name] for scan in scans]) for name in ("initial", "enhanced"))
        start = int(np.median([scan.start["median"] for scan in scans]))
        evaluations = float(np.mean([scan.evaluations for scan in scans]))
        tiles += [
            ("Residual", round(float(after), 3), f"median |y - A(x)|; {before:.3g} before"),
            ("Steps", start + 1, f"median, of {chain}"),
            ("Evaluations", round(evaluations, 1), "forward and backward passes per sample"),
        ]
        sections += [_residuals(scans, chain), _searches(scans), *volume_sections(volumes_of(scans))]
    return tiles, sections


def _scan(outputs: Path, scan: Refinement, *, is_viewed: bool) -> Section:
    blocks = restored_blocks(outputs, scan.name, tuple(MAPS), scan.samples, is_viewed=is_viewed)
    if not blocks:
        return Section(scan.name, [Note("The maps are no longer in this folder.", "warning")])
    lowest, last = scan.start["lowest"], scan.start["highest"]
    images = "1 image" if scan.images == 1 else f"{scan.images} images"
    samples = "1 sample" if scan.samples == 1 else f"{scan.samples} samples"
    text = (
        f"{images}, {samples} each. Median residual {scan.residual['initial']:.3g} before and "
        f"{scan.residual['enhanced']:.3g} after; lower in {scan.improved:.0%} of the images. Started with "
        f"{lowest if lowest == last else f'{lowest} to {last}'} steps left."
    )
    return Section(scan.name, [Text([text]), *blocks])


def _residuals(scans: Sequence[Refinement], chain: int) -> Section:
    series = {scan.name: (np.array(scan.steps, float), np.array(scan.curve)) for scan in scans[:MOST_PICTURES]}
    rows = [
        (scan.name, scan.images, scan.residual["initial"], scan.residual["enhanced"], f"{scan.improved:.0%}",
         scan.start["median"], scan.evaluations)
        for scan in scans
    ]  # fmt: skip
    columns = ("scan", "images", "residual before", "residual after", "lower in", "start", "evaluations")
    figure = curves(
        series, xlabel="steps left", ylabel="residual |y - A(x)|",
        caption="Residual of the denoised image on the way down to 0 steps left, mean over images and samples.",
    )  # fmt: skip
    text = f"The chain has {chain} steps; a start with n steps left takes n + 1 of them."
    return Section("Residuals", [figure, Table(columns, rows, text)])


def _searches(scans: Sequence[Refinement]) -> Section:
    total = {name: sum(scan.flags[name] for scan in scans) for name in scans[0].flags}
    series = {scan.name: (np.array(scan.steps, float), np.array(scan.step_sizes)) for scan in scans[:MOST_PICTURES]}
    caption = "Step sizes that the line searches found, mean over images and samples."
    figure = curves(series, xlabel="steps left", ylabel="step size", caption=caption)
    rows = [(name, count, count / max(sum(total.values()), 1)) for name, count in total.items()]
    table = Table(("verdict", "steps", "share"), rows, "Steps without a search count as converged.")
    return Section("Line searches", [figure, table])

"""Synthesised images against measured ones: similarity, means of regions, positivity; with intervals, and shown.

A pair is measured once (`score_pair`, `region_means`) and kept as a `Measured`; `score_pairs` makes means, correlations
and agreement of all pairs, with intervals over subjects.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.grid import reorient, resample_to
from jaxmed.arrays.task import Task
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.masks import read_mask
from jaxmed.metrics.cohort import average_subjects, score_set, spell
from jaxmed.metrics.imaging import psnr, ssim
from jaxmed.recipes.stage import Finished, Page
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Note, Section, Table, Text, Tile
from jaxmed.volume import Grid, Volume

MEASURED = "measured"
MOST_PICTURES = 8
DIVERGING = ("RdBu_r", "RdBu", "coolwarm")
OF_REGIONS = ("correlation", "mae", "bias")
OF_POSITIVITY = ("balanced_accuracy", "auroc", "sensitivity", "specificity")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of a pair; outputs/NAME.json.

    Attributes:
        name: Of its files.
        path: The image that was translated.
        notes: What is unexpected about it.
        subject: Whose it is.
        images: By method, measures of its image.
        regions: By region, the mean of each method's image in it, and of the measured one ("measured").
        further: What else was found of the pair.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    subject: str
    images: dict[str, dict[str, float]]
    regions: dict[str, dict[str, float]]
    further: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """One measure of one method over all pairs; the ends of its 95 % interval are None where there are none."""

    method: str
    measure: str
    estimate: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class PairSummary:
    """The pairs, how many failed, all scores, and what a user should know."""

    pairs: tuple[Measured, ...]
    failed: int
    scores: tuple[Line, ...]
    notes: tuple[str, ...]


def score_pair(
    truth: Float[np.ndarray, "*space"],
    estimate: Float[np.ndarray, "*space"],
    limits: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Return ssim, psnr and mse of an image whose intensities are first scaled: both limits become 0 and 1.

    Args:
        truth: The measured image.
        estimate: The synthesised one; it is scaled alike and not clipped.
        limits: Intensities that become 0 and 1; the least and largest of the truth where None.

    Raises:
        InputError: The truth is constant, or smaller than the window of SSIM.
    """
    low, high = limits or (float(truth.min()), float(truth.max()))
    if not low < high:
        raise InputError("measured image", "intensities that vary", f"{low:g} everywhere")
    true, found = ((image.astype(np.float64) - low) / (high - low) for image in (truth, estimate))
    return {
        "ssim": ssim(true, found, 1.0),
        "psnr": psnr(true, found, 1.0),
        "mse": float(np.mean(np.square(found - true))),
    }


def read_region(path: Path) -> Volume:
    """Read the mask of a region, in the space of the images.

    Raises:
        InputError: It is no mask with a grid, or empty.
    """
    inside, grid = read_mask(path, allow_labels=True)
    if grid is None or not inside.any():
        raise InputError(path, "a mask as NIfTI, with voxels", "a file without a grid" if grid is None else "none")
    return Volume.make(inside.astype(np.uint8), grid.affine)


def region_means(
    regions: Mapping[str, Volume], grid: Grid, images: Mapping[str, Float[np.ndarray, "x y z"]]
) -> dict[str, dict[str, float]]:
    """Return the mean of each image in each region.

    Args:
        regions: Masks, anywhere in the world.
        grid: Of the images; the nearest voxel of a mask counts.
        images: By name.

    Raises:
        InputError: A region lies outside the images.
    """
    found: dict[str, dict[str, float]] = {}
    for region, mask in regions.items():
        inside = resample_to(mask, grid, order=0).array > 0
        if not inside.any():
            raise InputError(f"region {region}", "voxels within the images", "none", "is it in their space?")
        found[region] = {name: float(image[inside].mean()) for name, image in images.items()}
    return found


def compare_averages(
    decoded: Float[np.ndarray, "*space"],
    mean_map: Float[np.ndarray, "*space"],
    theory: Float[np.ndarray, "*space"] | None,
) -> dict[str, float]:
    """Compare the decoded mean of latents with the mean of the decoded ones.

    Args:
        decoded: The decoded mean.
        mean_map: The mean image.
        theory: Their difference to second order (`diffusion.averaging.curvature_trace`); None leaves it out.

    Returns:
        Correlation and SSIM of the two, the rms of their difference, that of theory, and how both correlate.
    """
    bias, span = decoded - mean_map, max(float(np.ptp(mean_map)), 1e-6)
    found = {
        "averages, correlation": correlation(decoded, mean_map),
        "averages, SSIM": ssim(mean_map, decoded, span),
        "bias, rms": rms(bias),
    }
    if theory is not None:
        found |= {"bias in theory, rms": rms(theory), "bias, correlation with theory": correlation(bias, theory)}
    return found


def correlation(one: Float[np.ndarray, "*space"], other: Float[np.ndarray, "*space"]) -> float:
    """Return Pearson's correlation of the voxels of two images; 0 where one does not vary."""
    if not np.ptp(one) or not np.ptp(other):
        return 0.0
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def rms(array: Float[np.ndarray, "*space"]) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def score_pairs(
    rows: Sequence[Measured], threshold: float, seed: int, positive: str = "cortical"
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Score all pairs; return lines, and in words what could not be scored.

    Args:
        rows: The pairs.
        threshold: Mean of the region `positive` above which a subject counts as positive, measured and synthesised.
        seed: Of the resamples of subjects.
        positive: The region that decides.
    """
    subjects = np.array([row.subject for row in rows])
    lines: list[Line] = []
    told: dict[str, list[str]] = {}
    for method in rows[0].images:
        for measure in rows[0].images[method]:
            values = np.array([row.images[method][measure] for row in rows])
            if np.isfinite(values).all():
                mean = average_subjects(values, subjects, seed)
                lines.append(Line(method, measure, mean.mean, mean.low, mean.high))
        for region in rows[0].regions:
            truth, found = (np.array([row.regions[region][of] for row in rows]) for of in (MEASURED, method))
            task = Task("regression", (region,), (0.0,), (1.0,))
            scores, missed = score_set(task, truth[:, None], found[:, None], subjects, seed=seed)
            kept = {f"{region} {one.measure}": one.interval for one in scores if one.measure in OF_REGIONS}
            if region == positive:
                # Any monotone map to (0, 1) with 1/2 at the threshold: ranks and decisions are the same.
                chance = 1 / (1 + np.exp(-np.clip(found - threshold, -30, 30)))
                is_positive = (truth > threshold).astype(np.float64)
                scores, more = score_set(
                    Task("binary", ("positive",)), is_positive[:, None], chance[:, None], subjects, seed=seed
                )
                kept |= {f"positivity {one.measure}": one.interval for one in scores if one.measure in OF_POSITIVITY}
                missed = [*missed, *more]
            for text in missed:
                told.setdefault(text, []).append(method)
            lines += [
                Line(method, name, one.estimate, _finite(one.low), _finite(one.high)) for name, one in kept.items()
            ]
    return tuple(lines), tuple(f"{', '.join(dict.fromkeys(methods))}: {text}" for text, methods in told.items())


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


# The page -----------------------------------------------------------------------------------------------------------


def score_table(lines: Sequence[Line], caption: str) -> Table:
    """Return a table of measures by method."""
    methods = list(dict.fromkeys(line.method for line in lines))
    cells = {(line.measure, line.method): said(line) for line in lines}
    rows = [
        (" ".join(spell(word) for word in measure.split()), *(cells.get((measure, method)) for method in methods))
        for measure in dict.fromkeys(line.measure for line in lines)
    ]
    return Table(("measure", *methods), rows, caption)


def said(line: Line) -> str:
    """Return an estimate and its interval for reading."""
    ends = "" if line.low is None or line.high is None else f" [{line.low:.3g}, {line.high:.3g}]"
    return f"{line.estimate:.3g}{ends}"


def pair_section(
    row: Measured, outputs: Path, styles: Mapping[str, tuple[str, MapStyle]], mask: Bool[np.ndarray, "x y z"] | None
) -> Section:
    """Show the maps of a pair, one below the other.

    Args:
        row: The pair.
        outputs: Folder with NAME_MAP.nii.gz.
        styles: By map, its title and style, in order; maps that are not there are left out.
        mask: Voxels to show; None for all.
    """
    paths = {name: outputs / f"{row.name}_{name}.nii.gz" for name in styles}
    read = {styles[name][0]: reorient(nifti.read(path)) for name, path in paths.items() if path.exists()}
    if not read:
        return Section(row.name, [Note("The maps are no longer in this folder.", "warning")])
    spacing, arrays = next(iter(read.values())).spacing, {title: volume.array for title, volume in read.items()}
    figure = slice_maps(
        arrays, spacing, mask=mask, num_slices=4, caption=f"{row.name}, {row.subject}: " + ", ".join(read) + ".",
        styles=one_range(arrays, dict(styles.values())),
    )  # fmt: skip
    return Section(row.name, [*(Note(text) for text in row.notes), figure])


def one_range(arrays: Mapping[str, Float[np.ndarray, "x y z"]], styles: Mapping[str, MapStyle]) -> dict[str, MapStyle]:
    """Return styles with limits: one range for maps of one unit and colours, and 0 in the middle of diverging ones."""
    found = {}
    for title, style in styles.items():
        alike = [
            array for other, array in arrays.items()
            if (styles[other].unit, styles[other].colormap) == (style.unit, style.colormap)
        ]  # fmt: skip
        if title in arrays and alike and style.limits is None:
            ends = np.array([np.percentile(array, (0.5, 99.5)) for array in alike])
            low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
            if style.colormap in DIVERGING:
                low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
            style = dataclasses.replace(style, limits=(low, high) if low < high else None)
        found[title] = style
    return found


def pairs_page(
    run: Finished[Any, PairSummary],
    title: str,
    ours: str,
    caption: str,
    styles: Mapping[str, tuple[str, MapStyle]],
    reading: Sequence[str],
) -> Page:
    """Show scores, maps of some pairs, and what else was found of them.

    Args:
        run: The run.
        title: System and stage.
        ours: The method that the tiles are about.
        caption: Of the table of scores.
        styles: As of `pair_section`.
        reading: How to read all this.
    """
    summary, pairs = run.summary, run.summary.pairs
    values: dict[str, list[float]] = {}
    for pair in pairs:
        for name, value in pair.further.items():
            values.setdefault(name, []).append(value)
    rows = [(name, float(np.mean(found)), min(found), max(found)) for name, found in values.items()]
    sections = [
        Section("Notes", [Note(text) for text in summary.notes]),
        Section("Scores", [score_table(summary.scores, caption)]),
        *(pair_section(pair, run.outputs, styles, None) for pair in pairs[:MOST_PICTURES]),
        Section("Further", [Table(("what", "mean", "least", "largest"), rows, "Over pairs.")]),
        Section("How to read this", [Text(reading)]),
    ]
    tiles: list[Tile] = [("Pairs", len(pairs), f"{summary.failed} failed")]
    for line in summary.scores:
        if line.method == ours and line.measure in ("ssim", "psnr", "positivity balanced_accuracy"):
            ends = "" if line.low is None or line.high is None else f"95 % interval {line.low:.3g} to {line.high:.3g}"
            tiles.append((" ".join(spell(word) for word in line.measure.split()), f"{line.estimate:.3g}", ends))
    return Page(title, f"Synthesised and measured maps of {len(pairs)} pairs", tiles, sections)

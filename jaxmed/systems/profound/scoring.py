"""Quality of scans and pictures from their files, and how well a score agrees with what a reader gave."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxmed.arrays.grid import resample_to
from jaxmed.data.sequences import find_case
from jaxmed.errors import InputError
from jaxmed.io.images import read_image
from jaxmed.io.scans import ScanFiles, kind_of, read_volume
from jaxmed.metrics import weighted
from jaxmed.metrics.image_quality import Quality, measure_quality
from jaxmed.metrics.statistics import Interval, bootstrap, bootstrap_all, spearman, weighted_spearman
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.report.slices import slice_image
from jaxmed.volume import Volume

T2W = "t2w"
DIFFUSION = ("adc", "hbv", "dwi")
CHANNELS = tuple(words.split("|")[0] for words in PREPROCESS.sequences)
LEAST_AGREEING = 5
"""Records from which an agreement is told."""

_measure = jax.jit(measure_quality, static_argnums=1)


class Measured(NamedTuple):
    """A file and its measures.

    Attributes:
        quality: The measures, as numbers.
        plane: What lies in the middle of it, to look at with the first row on top.
        spacing: Voxel size in mm along each axis; empty for a picture.
        notes: What is unexpected about the file.
    """

    quality: dict[str, float]
    plane: Float[np.ndarray, "row column"]
    spacing: tuple[float, ...]
    notes: tuple[str, ...]


class Agreement(NamedTuple):
    """How a score goes with given labels.

    Attributes:
        rank: Spearman's correlation, with an interval over subjects.
        kappa: Cohen's kappa, weighted by squares, of labels and of scores cut into as many classes of the same sizes.
        records: Number of both.
    """

    rank: Interval
    kappa: Interval
    records: int


def quality(image: Volume | str | Path | Shaped[Any, "..."], reference: Volume | str | Path | None = None) -> Quality:
    """Measure how good a scan or picture is, without a better one to compare it with.

    Args:
        image: A volume, a file, a DICOM folder, or an array of two or three axes (colours of a picture last).
        reference: The T2-weighted scan of the same case, on any grid, by which the distortion of a diffusion scan is
            told.

    Returns:
        Measures and a score from 0 to 100. Scores of one kind of image may be compared with each other.

    Raises:
        InputError: A file cannot be read, or reference and image do not overlap.
    """
    array, spacing, volume, _ = _open(image)
    other = None
    if reference is not None:
        if volume is None:
            raise InputError("reference", "none beside a picture or an array", "one")
        other = _reference(reference, volume)
    return _measure(jnp.asarray(array), spacing, other)


def measure_file(scan: ScanFiles, reference: Path | None = None) -> Measured:
    """Measure a file; see `quality`."""
    array, spacing, volume, notes = _open(scan)
    other = None if reference is None or volume is None else _reference(reference, volume)
    found = jax.device_get(_measure(jnp.asarray(array), spacing, other))
    numbers = {name: float(value) for name, value in found._asdict().items() if np.isfinite(value)}
    thick = int(np.argmax(spacing)) if spacing else 0
    plane = array if array.ndim == 2 else slice_image(array, thick, array.shape[thick] // 2)
    return Measured(numbers, plane, spacing, notes)


def score_case(sequences: Sequence[str], scan: ScanFiles) -> dict[str, float]:
    """Return the score of every sequence of a case that is there, by the name of its channel.

    Args:
        sequences: By which the files of the channels are found, see `data.sequences`.
        scan: One of them, or their folder.
    """
    paths = find_case(scan, sequences).paths
    named = {name: path for name, path in zip(CHANNELS, paths, strict=True) if path is not None}
    found = {}
    for name, path in named.items():
        reference = None if name == T2W else named.get(T2W)
        found[name] = measure_file(ScanFiles(path, fill=scan.fill), reference).quality["score"]
    return found


def find_reference(path: Path) -> Path | None:
    """Return the T2-weighted scan beside a diffusion scan, told by its name: case_t2w.nii.gz beside case_adc.nii.gz."""
    for word in DIFFUSION:
        before, found, after = path.name.lower().rpartition(word)
        if found and (not before or before[-1] in "_-. "):
            start = len(before)
            partner = path.with_name(path.name[:start] + T2W + path.name[start + len(word) :])
            return partner if partner.exists() else None
    return None


def agree(
    scores: Float[np.ndarray, " record"],
    labels: Float[np.ndarray, " record"],
    subjects: Shaped[np.ndarray, " record"],
    seed: int = 0,
) -> Agreement | None:
    """Compare scores with labels; None for fewer than five records, or where one of the two does not vary.

    Args:
        scores: What was measured.
        labels: PI-QUAL or the like, larger is better; truth values as 0 and 1.
        subjects: Whose records are drawn together.
        seed: Seed of the resamples.
    """
    if len(scores) < LEAST_AGREEING or spearman(scores, labels) is None or len(np.unique(subjects)) < 2:
        return None
    classes, truth = np.unique(labels, return_inverse=True)
    cells = truth * len(classes) + cut_like(scores, truth)

    def kappa(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = weighted.count_cells(cells, weights, len(classes))
        return {"kappa": weighted.from_confusion(counts)["kappa_quadratic"]}

    rank = bootstrap(partial(weighted_spearman, scores, labels), subjects, seed=seed, num_resamples=500)
    return Agreement(rank, bootstrap_all(kappa, subjects, seed=seed, num_resamples=500)["kappa"], len(scores))


def cut_like(scores: Float[np.ndarray, " record"], classes: Int[np.ndarray, " record"]) -> Int[np.ndarray, " record"]:
    """Cut scores into classes of the sizes that the given ones have, the lowest scores into the first."""
    found = np.empty(len(scores), int)
    found[np.argsort(scores, kind="stable")] = np.sort(classes)
    return found


def _open(
    image: Any,
) -> tuple[Float[np.ndarray, "*space"], tuple[float, ...], Volume | None, tuple[str, ...]]:
    if isinstance(image, str | Path):
        image = ScanFiles(Path(image))
    if isinstance(image, ScanFiles):
        if kind_of(image.path) in ("picture", "array"):
            return _grey(read_image(image.path, allow_constant=False, fill=image.fill), image.path), (), None, ()
        read = read_volume(image)
        return np.asarray(read.volume.array, np.float32), read.volume.spacing, read.volume, read.notes
    if isinstance(image, Volume):
        return np.asarray(image.array, np.float32), image.spacing, image, ()
    return _grey(np.asarray(image), "image"), (), None, ()


def _grey(array: np.ndarray, where: object) -> Float[np.ndarray, "*space"]:
    array = array.astype(np.float32)
    if array.ndim == 3 and array.shape[2] == 3:
        return array.mean(-1)
    if array.ndim not in (2, 3) or min(array.shape) < 8:
        raise InputError(where, "an image of two or three axes, each of 8 or more", f"shape {array.shape}")
    return array


def _reference(reference: Volume | str | Path, volume: Volume) -> Float[Any, "*space"]:
    other = reference if isinstance(reference, Volume) else read_volume(Path(reference)).volume
    moved = np.asarray(resample_to(other, volume.grid, order=1).array, np.float32)
    if not moved.any():
        raise InputError("reference", "a scan of the same place", "one that does not overlap", "check the affines")
    return jnp.asarray(moved)

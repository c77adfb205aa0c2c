"""Diffusion acquisitions: shells, gradient directions, magnitude noise, and what a scan must hold to be fitted.

b-values are in s/mm^2 and directions are unit vectors. Tables are NumPy arrays on the host; noise is drawn on the
device from a key.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.errors import InputError
from jaxmed.io.gradients import GradientTable

SERIES_TOLERANCE = 0.15
"""Unweighted images of one scan differ by less than this in their median; drift is a few percent."""


@dataclasses.dataclass(frozen=True)
class Shell:
    """Rows of a gradient table whose b-values lie together.

    Attributes:
        bval: Their mean b-value in s/mm^2.
        rows: Their row numbers.
    """

    bval: float
    rows: tuple[int, ...]


def find_shells(
    bvals: Float[np.ndarray, " measurement"], b0_threshold: float = 50.0, tolerance: float = 50.0
) -> list[Shell]:
    """Group b-values into shells, for reports and checks; a fit keeps every row's own b-value.

    Args:
        bvals: b-values in s/mm^2.
        b0_threshold: Rows at or below it are the b = 0 shell.
        tolerance: Neighbouring b-values closer than this share a shell.

    Returns:
        Shells in ascending order; the b = 0 shell first, where there is one.
    """
    rows = np.argsort(bvals, kind="stable")
    groups: list[list[int]] = [[int(row) for row in rows if bvals[row] <= b0_threshold]]
    for row in rows[len(groups[0]) :]:
        start_of_shells = len(groups) == 1
        if start_of_shells or bvals[row] - bvals[groups[-1][-1]] > tolerance:
            groups.append([])
        groups[-1].append(int(row))
    return [Shell(float(np.mean(bvals[group])), tuple(group)) for group in groups if group]


TENSOR_MAX_BVAL = 1200.0
"""Largest b-value, in s/mm^2, at which a single tensor still describes tissue."""
MIN_AXES = 6
"""Different axes that determine a diffusion tensor, and that a shell of its own has."""
SAME_AXIS = 5.0
"""Axes nearer than this, in degrees, count as one: a head that moves turns a repeated direction by a degree or two."""
MIN_BVAL_RATIO = 1.25
"""Between the mean b-values of a lower and a higher shell; shells nearer than this say the same thing twice."""
HCP_THRESHOLD = 100.0
"""What Human Connectome 7T scans want, whose unweighted images have b = 55 to 65."""
NEARLY_UNWEIGHTED = 70.0
"""Above it an image is weighted, if weakly."""


def count_axes(bvecs: Float[np.ndarray, "row 3"]) -> int:
    """Count the different axes among unit directions: repetitions and antipodes are one, zeros none."""
    rest = bvecs[np.any(bvecs, axis=1)]
    count, least = 0, np.cos(np.radians(SAME_AXIS))
    while len(rest):
        count += 1
        rest = rest[np.abs(rest @ rest[0]) < least]
    return count


def spans_tensors(bvecs: Float[np.ndarray, "row 3"]) -> bool:
    """Return whether unit directions determine a diffusion tensor: six different axes, not on a plane or a cone."""
    x, y, z = bvecs.T
    design = np.stack([x * x, y * y, z * z, x * y, x * z, y * z], axis=1)
    return count_axes(bvecs) >= MIN_AXES and int(np.linalg.matrix_rank(design, tol=0.005 * len(bvecs) ** 0.5)) == 6


def has_two_shells(bvals: Float[np.ndarray, " row"], bvecs: Float[np.ndarray, "row 3"]) -> bool:
    """Return whether weighted rows fall into a lower and a higher part that say different things.

    Both need directions of their own and their mean b-values a real ratio: one stray image is no shell, nor are ten
    whose b-value a scanner has rounded.
    """
    for cut in np.unique(bvals)[1:]:
        lower, upper = bvals < cut, bvals >= cut
        if bvals[upper].mean() < MIN_BVAL_RATIO * bvals[lower].mean():
            continue
        if count_axes(bvecs[lower]) >= MIN_AXES and count_axes(bvecs[upper]) >= MIN_AXES:
            return True
    return False


def check_protocol(
    gradients: GradientTable, where: object, b0_threshold: float, *, needs_two_shells: bool = True
) -> list[str]:
    """Refuse tables that cannot be fitted or trained for, and return notes on the others.

    Args:
        gradients: A checked table.
        where: The file or argument that messages name.
        b0_threshold: Rows up to this b-value are unweighted.
        needs_two_shells: Whether one shell is refused: NODDI of one shell looks like maps and means nothing.

    Raises:
        InputError: Nothing is unweighted, directions repeat a few axes or lie on a plane, or there is one shell only.
    """
    bvals = gradients.bvals
    is_weighted = bvals > b0_threshold
    if is_weighted.all():
        lowest = float(bvals.min())
        advice = "raise the b0-threshold if these images are meant as b = 0"
        if lowest <= HCP_THRESHOLD:
            advice = f"--fit.b0-threshold {HCP_THRESHOLD:g} takes them as unweighted, as HCP 7T scans want"
        expected = f"an unweighted image (b <= {b0_threshold:g} s/mm^2)"
        raise InputError(where, expected, f"a smallest b-value of {lowest:g}", advice)
    weighted, directions = bvals[is_weighted], gradients.bvecs[is_weighted]
    if not spans_tensors(directions):
        axes = count_axes(directions)
        found = f"{len(directions)} images on {axes} different axes" if axes < MIN_AXES else "axes on a plane or line"
        raise InputError(where, f"weighted images in {MIN_AXES} or more different directions", found)
    if needs_two_shells and not has_two_shells(weighted, directions):
        _refuse_one_shell(where, weighted, directions)
    return _protocol_notes(bvals, b0_threshold)


def _refuse_one_shell(where: object, bvals: np.ndarray, bvecs: np.ndarray) -> None:
    shells = find_shells(bvals, b0_threshold=-1.0)
    found = f"one at b = {shells[0].bval:.0f} s/mm^2"
    if len(shells) > 1:
        axes = [count_axes(bvecs[list(shell.rows)]) for shell in shells]
        counts = [f"{count} at b = {shell.bval:.0f}" for count, shell in zip(axes, shells, strict=True)]
        found = (
            f"axes: {', '.join(counts)}, where a shell has {MIN_AXES} axes of its own and {MIN_BVAL_RATIO:g} times the "
        )
        found += "b of the one below"
    advice = "one shell cannot tell neurite density from free water, so its maps mean nothing; "
    advice += "--allow-single-shell (allow_single_shell=True in Python) takes it anyway"
    raise InputError(where, "two or more weighted shells", found, advice)


def _protocol_notes(bvals: np.ndarray, b0_threshold: float) -> list[str]:
    notes = []
    weighted = np.unique(bvals[bvals > b0_threshold])
    shells = [bvals[list(shell.rows)] for shell in find_shells(bvals, b0_threshold)[1:]]
    if len(weighted) > len(shells):
        ranges = ", ".join(f"{min(b):g}" + (f" to {max(b):g}" if np.ptp(b) > 0 else "") for b in shells)
        notes.append(
            f"{len(weighted)} different b-values make {len(shells)} shell(s) ({ranges} s/mm^2): shells are for checks "
            "and tables, every image was fitted at its own b-value."
        )
    nearly = (bvals > b0_threshold) & (bvals <= NEARLY_UNWEIGHTED)
    if nearly.any():
        notes.append(
            f"{int(nearly.sum())} image(s) at b = {bvals[nearly].min():g} to {bvals[nearly].max():g} count as "
            f"weighted; --fit.b0-threshold {HCP_THRESHOLD:g} takes them as unweighted, as HCP 7T scans want."
        )
    return notes


def check_table(table: GradientTable, where: object, b0_threshold: float, *, needs_two_shells: bool) -> GradientTable:
    """Return a table with the notes of `check_protocol` added."""
    notes = check_protocol(table, where, b0_threshold, needs_two_shells=needs_two_shells)
    return table._replace(notes=(*table.notes, *notes))


def group_rows(bvals: Float[np.ndarray, " row"], b0_threshold: float, most: int) -> list[Int[np.ndarray, " member"]]:
    """Give the commonest weighted b-values a group each, at most `most`, and the rest one together."""
    weighted = np.flatnonzero(bvals > b0_threshold)
    values, counts = np.unique(bvals[weighted], return_counts=True)
    if len(values) > most:
        common = values[np.argsort(-counts, kind="stable")[: most - 1]]
        values = values[np.isin(values, common) & (counts >= 6)]
    groups = [np.flatnonzero(bvals == value) for value in values]
    rest = weighted[~np.isin(bvals[weighted], values)]
    return groups + ([rest] if len(rest) else [])


def tensor_design(bvals: Float[np.ndarray, " row"], bvecs: Float[np.ndarray, "row 3"]) -> Float[np.ndarray, "row 7"]:
    """Return the rows of the log-linear tensor model, -b g_i g_j in ms/um^2 and 1; a zero direction is every one."""
    gi, gj = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    products = np.where(np.any(bvecs, axis=1)[:, None], bvecs[:, gi] * bvecs[:, gj], (gi == gj) / 3)
    pairs = products * np.where(gi == gj, 1.0, 2.0)
    return np.concatenate([-1e-3 * bvals[:, None] * pairs, np.ones((len(bvals), 1))], axis=1)


def tensor_rows(
    bvals: Float[np.ndarray, " row"], design: Float[np.ndarray, "row 7"], b0_threshold: float
) -> Float[np.ndarray, " row"]:
    """Choose rows for the tensor: low b where they determine it, shell by shell more where they do not."""
    limits = [TENSOR_MAX_BVAL] + [max(bvals[list(shell.rows)]) for shell in find_shells(bvals, b0_threshold)]
    for limit in sorted(limit for limit in limits if limit >= TENSOR_MAX_BVAL):
        rows = bvals <= limit
        if rows.sum() >= 7 and np.linalg.matrix_rank(design[rows], tol=1e-3) == 7:
            return rows.astype(float)
    return np.ones(len(bvals))


def smooth_basis(
    bvals: Float[np.ndarray, " row"], bvecs: Float[np.ndarray, "row 3"]
) -> Float[np.ndarray, "row column"] | None:
    """Return an orthonormal basis of signals that vary smoothly with b and direction.

    Columns: 1, b^3, the products of two components of the direction times b, and those of four times b^2 (of two where
    rows are few). None where there are too few rows to leave noise over.
    """
    b = (bvals / bvals.max())[:, None]
    two, four = (
        np.stack(
            [np.prod(bvecs[:, list(axes)], axis=1) for axes in itertools.combinations_with_replacement(range(3), n)]
        )
        for n in (2, 4)
    )
    for highest in (four, two):
        columns = np.concatenate([np.ones_like(b), b**3, b * two.T, b**2 * highest.T], axis=1)
        left, values, _ = np.linalg.svd(columns, full_matrices=False)
        basis = left[:, values > 1e-6 * values[0]]
        if 2 * basis.shape[1] <= len(bvals):
            return basis
    return None


def spread_directions(count: int) -> Float[np.ndarray, "count 3"]:
    """Spread directions evenly over a half sphere by the golden-angle spiral."""
    height = (np.arange(count) + 0.5) / count
    angle = np.pi * (1 + 5**0.5) * np.arange(count)
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=-1)


def two_shell_protocol(
    num_b0: int = 9, shells: tuple[tuple[int, float], ...] = ((30, 711.0), (60, 2855.0))
) -> tuple[Float[np.ndarray, " measurement"], Float[np.ndarray, "measurement 3"]]:
    """Make the gradient table of a typical NODDI scan.

    Args:
        num_b0: Images without diffusion weighting.
        shells: Number of directions and b-value of each shell.

    Returns:
        b-values in s/mm^2, and unit directions (zero at b = 0).

    Source: the widely used 9 + 30 + 60 protocol after Zhang et al., NeuroImage 2012, section 2.4.
    """
    bvals = [np.zeros(num_b0)] + [np.full(count, bval) for count, bval in shells]
    bvecs = [np.zeros((num_b0, 3))] + [spread_directions(count) for count, _ in shells]
    return np.concatenate(bvals), np.concatenate(bvecs)


def add_rician_noise(
    key: Key[Array, ""], signal: Float[Array | np.ndarray, "*batch"], sigma: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """Return the magnitude of a signal with complex Gaussian noise.

    Args:
        key: Consumed.
        signal: Noise-free magnitude.
        sigma: Standard deviation of each of the two channels, in the unit of the signal.
    """
    real, imaginary = sigma * jax.random.normal(key, (2, *signal.shape))
    return jnp.hypot(signal + real, imaginary)


def estimate_sigma(repeats: Float[np.ndarray, "voxel repeat"]) -> float:
    """Estimate the channel noise of magnitude images from repeated acquisitions.

    The spread over repeats is corrected for the narrowing of the Rician distribution at low signal, per voxel;
    the median over voxels is robust to motion and flow.

    Args:
        repeats: Repeated magnitudes, for example the b = 0 images; at least two per voxel.

    Returns:
        Sigma, in the unit of the magnitudes.

    Source: Koay and Basser, J. Magn. Reson. 2006, equations 12 to 18 (the fixed point), on the pooled variance.
    """
    repeats = np.asarray(repeats, np.float64)  # squares of large intensities leave float32
    mean = repeats.mean(axis=1)
    variance = repeats.var(axis=1, ddof=1)
    inside = (mean > 0) & (variance > 0)
    if not inside.any():
        return 0.0
    # The median of a variance with few degrees of freedom sits below its mean by a known factor (chi-square).
    freedom = repeats.shape[1] - 1
    pooled = np.median(variance[inside]) * freedom / scipy.special.chdtri(freedom, 0.5)
    ratio = np.median(mean[inside]) / np.sqrt(pooled)
    snr = max(ratio, 1.0)
    for _ in range(50):
        snr = np.sqrt(max(_koay_correction(snr) * (1 + ratio**2) - 2, 0.0))
    return float(np.sqrt(pooled / _koay_correction(snr)))


def _koay_correction(snr: float) -> float:
    """Return the variance of a Rician magnitude relative to the channel variance."""
    quarter = snr**2 / 4
    bracket = (2 + snr**2) * scipy.special.i0e(quarter) + snr**2 * scipy.special.i1e(quarter)
    return 2 + snr**2 - np.pi / 8 * bracket**2


def series_scales(
    signals: Float[np.ndarray, "voxel image"], is_b0: Bool[np.ndarray, " image"]
) -> Float[np.ndarray, " image"]:
    """Return the brightness of each image's series relative to the first.

    A series is a run of images from one run of unweighted images to the next; its brightness is the median over voxels
    of its unweighted images. Scanners scale series apart, and files that join them keep the difference.
    """
    starts = np.flatnonzero(is_b0 & ~np.concatenate([[False], is_b0[:-1]]))
    # Images before the first unweighted one belong to its series.
    series = np.maximum(np.searchsorted(starts, np.arange(len(is_b0)), side="right") - 1, 0)
    usable = np.isfinite(signals).all(axis=1)
    levels = np.array(
        [np.median(signals[usable][:, is_b0 & (series == index)].mean(axis=1)) for index in range(len(starts))]
    )
    if levels[0] <= 0:
        return np.ones(len(is_b0))
    return (levels / levels[0])[series]


def check_series(
    signals: Float[np.ndarray, "voxel image"], is_b0: Bool[np.ndarray, " image"], scale: bool, notes: list[str]
) -> Float[np.ndarray, " image"] | None:
    """Note series that differ in brightness, and return what to divide their images by where asked to."""
    scales = series_scales(signals, is_b0)
    if np.max(np.abs(np.log(np.maximum(scales, 1e-6)))) <= np.log(1 + SERIES_TOLERANCE):
        return None
    image = int(np.argmax(np.abs(np.log(np.maximum(scales, 1e-6)))))
    said = (
        f"Unweighted images differ in brightness: those of image {image + 1} on have {scales[image]:.2f} of the first"
    )
    if scale:
        notes.append(f"{said}; every series was divided by its own.")
        return scales
    notes.append(
        f"{said}. If series were scaled apart, the maps are wrong: --scale-series divides each by its own unweighted "
        "images."
    )
    return None


def choose_sigma(
    noise: str, sigma: float | None, b0: Float[np.ndarray, "voxel repeat"], notes: list[str]
) -> float | None:
    """Return the noise level of the Rician likelihood, or None for least squares.

    Raises:
        InputError: Rician was asked for and the noise is not known.
    """
    if noise == "gaussian":
        return None
    if sigma is not None:
        return sigma
    repeats = b0[np.isfinite(b0).all(axis=1)]
    if repeats.shape[1] >= 3:
        found = estimate_sigma(repeats)
        if found > 0:
            notes.append(f"Noise was estimated from {repeats.shape[1]} unweighted images: sigma = {found:.4g}.")
            return found
    if noise == "rician":
        raise InputError(
            "sigma",
            "a noise level for the Rician likelihood",
            f"{repeats.shape[1]} unweighted image(s)",
            "give --sigma",
        )
    notes.append(
        f"With {repeats.shape[1]} unweighted image(s) the noise is not known: squares were minimised. "
        "Give --sigma for the Rician likelihood."
    )
    return None


def attenuation_notes(
    signals: Float[np.ndarray, "voxel image"],
    s0: Float[np.ndarray, " voxel"],
    bvals: Float[np.ndarray, " image"],
    b0_threshold: float,
    free_diffusivity: float,
) -> list[str]:
    """Note shells whose mean signal cannot be diffusion: above the unweighted one, or below that of free water."""
    notes = []
    for shell in find_shells(bvals, b0_threshold)[1:]:
        level = mean_attenuation(signals, s0, shell.rows)
        free = float(np.exp(-1e-3 * shell.bval * free_diffusivity))
        where = f"At b = {shell.bval:.0f} the mean signal is {level:.2f} of the unweighted one"
        if level > 1.0:
            notes.append(f"{where}, more than diffusion allows: were the images scaled apart?")
        elif level < 0.8 * free:
            notes.append(f"{where}, less than the {free:.2f} of free water: were the images scaled apart?")
    return notes


@dataclasses.dataclass(frozen=True)
class ShellSignal:
    """A shell: mean b-value in s/mm^2, number of images, and mean signal relative to the unweighted one."""

    bval: float
    images: int
    signal: float


def shell_signals(
    signals: Float[np.ndarray, "voxel measurement"],
    s0: Float[np.ndarray, " voxel"],
    bvals: Float[np.ndarray, " measurement"],
    b0_threshold: float,
) -> tuple[ShellSignal, ...]:
    """Return what is left of the signal in every shell."""
    shells = find_shells(bvals, b0_threshold)
    return tuple(ShellSignal(s.bval, len(s.rows), mean_attenuation(signals, s0, s.rows)) for s in shells)


def mean_attenuation(signals: np.ndarray, s0: np.ndarray, rows: tuple[int, ...]) -> float:
    """Return the mean over voxels of the mean signal of some images relative to the unweighted signal."""
    return float(np.mean(signals[:, list(rows)].mean(axis=1) / s0))

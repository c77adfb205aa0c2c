"""Fit NODDI to a simulated two-shell acquisition: row `noddi_fit`, peers AMICO and dmipy-fit.

All start from signals in host memory and end with maps in host memory. Voxels cover the whole
parameter range uniformly, with Rician noise at SNR 30, and the error beside each time is the error
against the known parameters: over all voxels, where tissue fills more than half of the voxel, in the
range of healthy tissue (`_healthy`: NDI .3 to .8, ODI below .7, FWF below .3), and (`_known`) where the
Cramer-Rao bound of the parameter is below 0.1, beside that bound: elsewhere the data say little, and an
estimator shows its prior. jaxmed is measured twice, with least squares (what
AMICO minimises) and with the Rician likelihood. AMICO runs as its authors run it (files, scheme, 500
directions, its default solver, one thread per pinned core, always on the CPU); its `compile_s` is the
generation and loading of its kernels, which it needs once per protocol. dmipy-fit (its documentation's
NODDI-Watson, its default optimiser, one process per core) takes so long that it gets 200 voxels, and jaxmed
the same 200 in a row of their own; the set-up of its grid is inside its time. A noise-free run of AMICO
recovers mid-range parameters to 0.006 here, so its files, axes and units are as it expects them.
"""

import contextlib
import functools
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import nibabel as nib
import numpy as np
from timing import (
    Conditions,
    Measurement,
    Peak,
    Row,
    alternate,
    describe_cpu,
    emit,
    first_call,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.physics.acquisition import add_rician_noise, two_shell_protocol
from jaxmed.physics.cramer_rao import cramer_rao
from jaxmed.physics.microstructure import noddi_model
from jaxmed.physics.noddi import order_for, signal
from jaxmed.systems.noddi.fitting import Maps, fit
from jaxmed.systems.noddi.protocol import GRID_DEGREE, GRID_KAPPA, GRID_NDI, NUM_NODES

SNR = 30.0
S0 = 1000.0
DMIPY_VOXELS = 200
KNOWN = 0.1
"""Cramer-Rao bound below which a parameter counts as known by the data."""

# Image shapes, because the peer reads images; `pod` takes the GPU's for every device.
SHAPES = {"smoke": (16, 16, 1), "cpu": (25, 25, 32), "gpu": (100, 100, 100)}

# What jaxmed maximises, and the noise level it is told.
LIKELIHOODS = {"least squares": None, "Rician likelihood": S0 / SNR}


class Voxels(NamedTuple):
    """Simulated voxels with their truth, on the host.

    Attributes:
        signals: Magnitudes, (voxel, measurement), float32, S0 = 1000.
        ndi: Neurite density index.
        odi: Orientation dispersion index.
        fwf: Free-water fraction.
        bound: Cramer-Rao bound of each of the three, (voxel, 3); infinite where it was not computed.
    """

    signals: np.ndarray
    ndi: np.ndarray
    odi: np.ndarray
    fwf: np.ndarray
    bound: np.ndarray


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    shape = SHAPES["gpu" if config.size == "pod" else config.size]
    if config.size == "pod":
        shape = (*shape[:2], shape[2] * jax.device_count())
    bvals, bvecs = two_shell_protocol()
    voxels = simulate(jax.random.key(0), int(np.prod(shape)), bvals, bvecs)
    peak = measure_peak()

    functions: dict[str, Callable[[], Any]] = {
        likelihood: functools.partial(fit, voxels.signals, bvals, bvecs, sigma=sigma)
        for likelihood, sigma in LIKELIHOODS.items()
    }
    first = {likelihood: first_call(function) for likelihood, function in functions.items()}
    kernels_s = None
    with contextlib.ExitStack() as stack:
        if config.peer:
            kernels_s, functions["AMICO"] = stack.enter_context(
                amico_fit(voxels.signals, shape, bvals, bvecs, conditions)
            )
        seconds = alternate(functions, config.repeats)
        maps = {name: function() for name, function in functions.items()}

    peers = {}
    if config.peer:
        peers["AMICO"] = Measurement(
            seconds["AMICO"],
            compile_s=kernels_s,
            accuracy=errors(maps["AMICO"], voxels),
            versions=versions("dmri-amico", "dipy"),
            device=describe_cpu(conditions.cores),
        )
    rows = []
    for likelihood in LIKELIHOODS:
        found = maps[likelihood]
        ours = Measurement(
            seconds[likelihood],
            # The fit compiles inside its first call for a protocol.
            compile_s=max(0.0, first[likelihood] - statistics.median(seconds[likelihood])),
            flops=count_flops(found, bvals),
            # What must move at least once: signals in, maps out.
            bytes=voxels.signals.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(found)),
            accuracy={**errors(found, voxels), "converged": float(found.converged.mean())},
        )
        workload = f"{len(voxels.ndi)} voxels x {len(bvals)} rows, SNR {SNR:.0f}, {likelihood}"
        rows += make_rows("noddi_fit", workload, {"jaxmed": ours, **peers}, conditions, peak)
    if config.peer and config.size != "smoke":
        rows += against_dmipy(voxels, bvals, bvecs, conditions, peak)
    emit(rows, config.json)


# --- Data ------------------------------------------------------------------------------------


def simulate(key: jax.Array, count: int, bvals: np.ndarray, bvecs: np.ndarray) -> Voxels:
    """Draw parameters uniformly over their range, directions over the sphere, and Rician noise."""
    draw_key, direction_key, noise_key = jax.random.split(key, 3)
    ndi, odi, fwf = jax.random.uniform(draw_key, (3, count))
    odi = 0.02 + 0.97 * odi
    direction = jax.random.normal(direction_key, (count, 3))
    direction /= jax.numpy.linalg.norm(direction, axis=-1, keepdims=True)

    @jax.jit
    def measure(key, ndi, odi, fwf, direction):
        clean = signal(ndi, odi, fwf, direction, bvals, bvecs)
        return add_rician_noise(key, S0 * clean, S0 / SNR)

    # In parts: a million voxels at once would hold the model's intermediate orders in memory.
    size = 20_000
    signals = [
        np.asarray(
            measure(
                jax.random.fold_in(noise_key, start),
                *(values[start : start + size] for values in (ndi, odi, fwf, direction)),
            )
        )
        for start in range(0, count, size)
    ]
    parameters = np.stack([np.asarray(part) for part in (ndi, odi, fwf)], axis=1)
    # Some voxels tell how an estimator stands to the bound: the rest stay out of `_known`.
    some = slice(0, min(count, max(256, min(count // 10, 20_000))))
    bound = np.full((count, 3), np.inf)
    bound[some] = cramer_rao(noddi_model(), parameters[some], np.asarray(direction)[some], bvals, bvecs, 1 / SNR).errors
    return Voxels(np.concatenate(signals), *parameters.T, bound)


def errors(maps: Any, voxels: Voxels) -> dict[str, float]:
    """Root-mean-square error and bias of each map.

    Args:
        maps: Has `ndi`, `odi` and `fwf`, each (voxel,).
        voxels: The truth.

    Returns:
        Over all voxels; as `_tissue` where the true FWF is below one half: NDI and ODI mean nothing in
        free water, and there their errors say more about the prior than the fit; as `_healthy` in the
        range of healthy tissue; as `_known` where the bound is below 0.1, with the root mean square of
        that bound as `_bound`.
    """
    tissue = voxels.fwf < 0.5
    healthy = (voxels.ndi > 0.3) & (voxels.ndi < 0.8) & (voxels.odi < 0.7) & (voxels.fwf < 0.3)
    found = {}
    for index, name in enumerate(("ndi", "odi", "fwf")):
        error = np.asarray(getattr(maps, name), np.float64) - getattr(voxels, name)
        bound = voxels.bound[:, index]
        known = bound < KNOWN
        found[name] = _rms(error)
        found[f"{name}_tissue"] = _rms(error[tissue])
        found[f"{name}_tissue_bias"] = float(error[tissue].mean())
        found[f"{name}_healthy"] = _rms(error[healthy])
        found[f"{name}_healthy_bias"] = float(error[healthy].mean())
        found[f"{name}_known"] = _rms(error[known])
        found[f"{name}_known_bias"] = float(error[known].mean())
        found[f"{name}_bound"] = _rms(bound[known])
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


# --- Implementations -------------------------------------------------------------------------


def count_flops(maps: Maps, bvals: np.ndarray) -> float:
    """Count the operations that the fit's method asks for, by formula.

    XLA's own count is of no use: it takes the body of a loop once, and iterations differ by voxel.
    Exponentials count as one operation.
    """
    degrees = order_for(bvals) // 2 + 1
    shells = len(np.unique(bvals[bvals > 50]))
    rows = int(np.sum(bvals > 50))
    # Watson moments and their slopes: a (2 degree x node) matrix product and the density; then the
    # coefficients of every shell and their slopes.
    moments = 2 * 2 * degrees * NUM_NODES + 5 * NUM_NODES + 2 * 2 * degrees**2 * shells
    # A row: three scalar products (15), Horner's rule with slope and for odi (6 per degree), compartments
    # and five derivatives (60), and 21 products summed for the normal matrix, gradient and cost (42).
    evaluation = moments + (15 + 6 * degrees + 60 + 42) * rows
    # The grid: Chebyshev polynomials, their products with the data, sums over shells, and candidates.
    sums = 3 * GRID_DEGREE + 3
    candidates = len(GRID_KAPPA) * len(GRID_NDI)
    grid = (3 * sums + 2 * shells * sums) * rows + candidates * (2 * 2 * sums * shells + 20)
    # Two weighted passes with seven unknowns.
    tensor = 2 * 2 * 7 * 8 * len(bvals)
    # One evaluation at the start and one for the standard errors.
    evaluations = float(maps.iterations.sum(dtype=np.int64)) + 2 * len(maps.iterations)
    return evaluations * evaluation + len(maps.iterations) * (grid + tensor)


class PeerMaps(NamedTuple):
    """A peer's maps under jaxmed's names, each (voxel,)."""

    ndi: np.ndarray
    odi: np.ndarray
    fwf: np.ndarray


@contextlib.contextmanager
def amico_fit(
    signals: np.ndarray,
    shape: tuple[int, ...],
    bvals: np.ndarray,
    bvecs: np.ndarray,
    conditions: Conditions,
) -> Iterator[tuple[float, Callable[[], PeerMaps]]]:
    """Set AMICO up on files in a temporary folder.

    Args:
        signals: Magnitudes, (voxel, measurement).
        shape: Image shape that holds the voxels.
        bvals: In s/mm^2.
        bvecs: Unit directions.
        conditions: Tells how many threads to use.

    Yields:
        Seconds to generate and load the kernels, and a call of AMICO's fit.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        # AMICO keeps its rotation matrices in dipy's folder, by default in the user's home.
        os.environ["DIPY_HOME"] = name
        import amico.lut
        import amico.util

        amico.set_verbose(1)
        # amico.setup() does this for 22 sets of directions once per installation; the fit
        # uses one of them.
        amico.lut.precompute_rotation_matrices(12, 500)

        image = nib.Nifti1Image(signals.reshape(*shape, -1), np.eye(4))
        nib.save(image, folder / "dwi.nii")
        np.savetxt(folder / "dwi.bval", bvals[None], fmt="%g")
        np.savetxt(folder / "dwi.bvec", bvecs.T, fmt="%.8f")
        amico.util.fsl2scheme(str(folder / "dwi.bval"), str(folder / "dwi.bvec"), str(folder / "dwi.scheme"))
        evaluation = amico.Evaluation(name, ".")
        evaluation.set_config("nthreads", len(conditions.cores))
        evaluation.load_data("dwi.nii", "dwi.scheme")
        evaluation.set_model("NODDI")

        def prepare_kernels():
            evaluation.generate_kernels(regenerate=True)
            evaluation.load_kernels()

        def call() -> PeerMaps:
            with contextlib.redirect_stdout(sys.stderr):
                evaluation.fit()
            results, model = evaluation.RESULTS, evaluation.model
            assert results is not None and model is not None  # AMICO declares them as None.
            maps = results["MAPs"]
            order = [model.maps_name.index(name) for name in ("NDI", "ODI", "FWF")]
            return PeerMaps(*(maps[..., index].ravel() for index in order))

        seconds = first_call(prepare_kernels)
        with contextlib.redirect_stdout(sys.__stdout__):
            yield seconds, call


def against_dmipy(
    voxels: Voxels, bvals: np.ndarray, bvecs: np.ndarray, conditions: Conditions, peak: Peak
) -> list[Row]:
    """Fit the first voxels with both; dmipy-fit minimises squares."""
    some = voxels._make(part[:DMIPY_VOXELS] for part in voxels)
    ours = functools.partial(fit, some.signals, bvals, bvecs)
    first = first_call(ours)
    functions = {"jaxmed": ours, "dmipy-fit": dmipy_fit(some.signals, bvals, bvecs, conditions)}
    seconds = alternate(functions, 2)
    measurements = {
        "jaxmed": Measurement(
            seconds["jaxmed"],
            compile_s=max(0.0, first - statistics.median(seconds["jaxmed"])),
            accuracy=errors(ours(), some),
        ),
        "dmipy-fit": Measurement(
            seconds["dmipy-fit"],
            accuracy=errors(functions["dmipy-fit"](), some),
            versions=versions("dmipy-fit"),
            device=describe_cpu(conditions.cores),
        ),
    }
    return make_rows(
        "noddi_fit", f"{DMIPY_VOXELS} voxels x {len(bvals)} rows, SNR {SNR:.0f}, least squares", measurements,
        conditions, peak,
    )  # fmt: skip


def dmipy_fit(
    signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray, conditions: Conditions
) -> Callable[[], PeerMaps]:
    """Put NODDI-Watson together as dmipy's documentation does, and return a call of its fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dmipy_fit.core.acquisition_scheme import acquisition_scheme_from_bvalues
        from dmipy_fit.core.modeling_framework import MultiCompartmentModel
        from dmipy_fit.distributions.distribute_models import SD1WatsonDistributed
        from dmipy_fit.signal_models.cylinder_models import C1Stick
        from dmipy_fit.signal_models.gaussian_models import G1Ball, G2Zeppelin

        directions = np.where(bvals[:, None] > 0, bvecs, [1.0, 0.0, 0.0])
        # Its units are SI; pulse durations do not matter to these compartments.
        scheme = acquisition_scheme_from_bvalues(bvals * 1e6, directions, 0.0129, 0.0218)
        bundle = SD1WatsonDistributed(models=[C1Stick(), G2Zeppelin()])
        bundle.set_tortuous_parameter("G2Zeppelin_1_lambda_perp", "C1Stick_1_lambda_par", "partial_volume_0")
        bundle.set_equal_parameter("G2Zeppelin_1_lambda_par", "C1Stick_1_lambda_par")
        bundle.set_fixed_parameter("G2Zeppelin_1_lambda_par", 1.7e-9)
        model = MultiCompartmentModel(models=[G1Ball(), bundle])
        model.set_fixed_parameter("G1Ball_1_lambda_iso", 3e-9)

    def call() -> PeerMaps:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = model.fit(
                scheme,
                signals.astype(np.float64),
                use_parallel_processing=True,
                number_of_processors=len(conditions.cores),
            ).fitted_parameters
        bundle = "SD1WatsonDistributed_1_"
        names = (f"{bundle}partial_volume_0", f"{bundle}SD1Watson_1_odi", "partial_volume_0")
        return PeerMaps(*(np.asarray(fitted[name]).ravel() for name in names))

    return call


if __name__ == "__main__":
    main()

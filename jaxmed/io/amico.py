"""AMICO's NODDI, where it is installed: the fast linearised fit that most people use, through the files it reads.

Source: Daducci et al., NeuroImage 2015; the package dmri-amico, as its authors run NODDI. It is imported only when it
is asked for, and keeps its kernels and rotation matrices in a folder that is removed afterwards.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmed.io import nifti
from jaxmed.io.gradient_match import Table
from jaxmed.io.gradients import write_gradients
from jaxmed.volume import Volume

SCALE = 1000.0
"""Signals are written with this b = 0 signal, as a scanner would."""


def is_installed() -> bool:
    """Return whether AMICO can be imported, without importing it."""
    return importlib.util.find_spec("amico") is not None


@contextlib.contextmanager
def open_amico(
    table: Table, parallel_diffusivity: float, free_diffusivity: float
) -> Iterator[Callable[[Float[np.ndarray, "voxel image"]], Float[np.ndarray, "voxel 3"]]]:
    """Yield AMICO's NODDI as a function of signals relative to b = 0; its kernels live as long as the context.

    Args:
        table: The protocol.
        parallel_diffusivity: Along the fibres, in um^2/ms, that kernels are made with.
        free_diffusivity: Diffusivity of free water, likewise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name), os.environ.get("DIPY_HOME")
        os.environ["DIPY_HOME"] = name  # where dipy's import, and AMICO's rotation matrices, would write
        try:
            evaluation = _open(folder, table, 1e-3 * parallel_diffusivity, 1e-3 * free_diffusivity)
            yield lambda signals: _estimate(evaluation, folder, signals)
        finally:
            os.environ.pop("DIPY_HOME")
            if home is not None:
                os.environ["DIPY_HOME"] = home


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dipy warns of its own bases, which AMICO chooses
        yield


def _open(folder: Path, table: Table, parallel: float, free: float) -> Any:
    with _quietly():
        # By name: where it is not installed, and it need not be, type checkers find nothing to resolve.
        amico: Any = importlib.import_module("amico")
        for part in ("lut", "util"):
            importlib.import_module(f"amico.{part}")
        amico.set_verbose(0)
        amico.lut.precompute_rotation_matrices(12, 500)
        bvals = np.where(table.is_b0, 0.0, np.array(table.bvals))
        write_gradients(folder / "dwi.bval", folder / "dwi.bvec", bvals, np.array(table.bvecs))
        bval, bvec, scheme = (str(folder / f"dwi.{suffix}") for suffix in ("bval", "bvec", "scheme"))
        amico.util.fsl2scheme(bval, bvec, scheme)
        evaluation: Any = amico.Evaluation(str(folder), ".")
        evaluation.set_config("nthreads", os.cpu_count() or 1)
        # Kernels depend on the protocol alone; AMICO wants a scan to read it from.
        _load(evaluation, folder, np.ones((1, len(bvals)), np.float32))
        evaluation.set_model("NODDI")
        evaluation.model.set(parallel, free, evaluation.model.IC_VFs, evaluation.model.IC_ODs, False)
        evaluation.generate_kernels(regenerate=True)
    return evaluation


def _load(evaluation: Any, folder: Path, signals: np.ndarray) -> None:
    volume = Volume.make(signals.reshape(len(signals), 1, 1, -1), np.eye(4))
    nifti.write(folder / "dwi.nii", volume)
    evaluation.load_data("dwi.nii", "dwi.scheme", b0_thr=0)


def _estimate(evaluation: Any, folder: Path, signals: np.ndarray) -> np.ndarray:
    with _quietly():
        _load(evaluation, folder, SCALE * np.asarray(signals, np.float32))
        evaluation.load_kernels()
        evaluation.fit()
    maps = evaluation.RESULTS["MAPs"]
    names = list(evaluation.model.maps_name)
    return np.stack([maps[..., names.index(name)].reshape(-1) for name in ("NDI", "ODI", "FWF")], axis=1)

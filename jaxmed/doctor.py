"""`jaxmed doctor`: whether this machine can run jaxmed, and what it lacks."""

import os
import platform
import shutil
import sys
from pathlib import Path

from jaxmed.versions import package_version

CORE = (
    "jax jaxlib flax optax orbax-checkpoint diffrax jraph nibabel numpy scipy grain tyro rich jaxtyping "
    "safetensors scikit-learn matplotlib pillow flatbuffers"
).split()
EXTRAS = {
    "dicom": (("pydicom", "highdicom"), "read DICOM series, write DICOM maps"),
    "onnx": (("onnx", "onnxruntime"), "export networks for a scanner"),
    "tensorboard": (("tensorboardX",), "training curves in TensorBoard"),
    "notebooks": (("jupytext", "nbmake", "ipykernel"), "run the notebooks"),
    "plan": (("libtpu",), "compile for a TPU pod without one"),
    "dev": (("pytest", "ruff", "pyright"), "tests, linters, types"),
}


def examine() -> int:
    """Print what was found; return 0 unless the core cannot run."""
    print(f"jaxmed {package_version('jaxmed') or '(not installed)'}, Python {platform.python_version()}")
    print(f"{platform.system()} {platform.machine()}, {_usable_cores()} cores, {_memory()}")
    print(f"disk: {_disk()}\n")
    missing = [name for name in CORE if package_version(name) is None]
    print("Core packages")
    print("  " + ", ".join(f"{name} {package_version(name)}" for name in CORE if name not in missing))
    if missing:
        print(f"  MISSING: {', '.join(missing)}; install with: pip install jaxmed")
    print("\nDevices")
    problem = _show_devices() if "jax" not in missing else "jax is not installed"
    print("\nExtras")
    for extra, (packages, purpose) in EXTRAS.items():
        absent = [name for name in packages if package_version(name) is None]
        state = f"missing {', '.join(absent)}: pip install 'jaxmed[{extra}]'" if absent else "ready"
        print(f"  {extra:<12} {purpose:<36} {state}")
    if problem or missing or sys.version_info < (3, 11):
        print(f"\nThe core cannot run: {problem or 'packages are missing'}.")
        return 1
    print("\nThe core runs.")
    return 0


def _show_devices() -> str | None:
    """Print every device with its memory after one small computation; return what failed."""
    try:
        import jax
        import jax.numpy as jnp

        value = float(jax.jit(lambda x: jnp.sum(x @ x))(jnp.ones((64, 64))))
    except Exception as error:  # whatever a driver raises is what the user needs to read
        print(f"  jax does not run: {error}")
        return "jax cannot compute"
    for device in jax.devices():
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        print(f"  {device.platform}:{device.id} {device.device_kind}{memory}")
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia").exists():
        print("  an NVIDIA driver is here, but jax sees no GPU: pip install 'jaxmed[cuda]'")
    print(f"  convolutions on the CPU: {_convolutions()}")
    return None if value == 64.0**3 else "a matrix product came out wrong"


def _convolutions() -> str:
    """Say who computes the convolutions of the CPU, and why."""
    from jaxmed.errors import InputError
    from jaxmed.nn.onednn import find_road

    try:
        road = find_road()
    except InputError as error:
        return str(error)
    return f"{'oneDNN' if road.name == 'onednn' else 'XLA, several times slower in 3D'}; {road.reason}"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return "memory unknown"
    return f"{total:.1f} GiB of memory, {free:.1f} GiB free"


def _disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    return f"{usage.free / 2**30:.1f} GiB free in the current folder"

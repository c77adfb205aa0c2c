"""Eight virtual CPU devices, runtime checks of shapes and types, and fixtures that every test may use."""

import gc
import os
import shutil
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

# Before jax is imported, or they have no effect; processes that a test starts inherit them.
# Most of the suite's time is compilation: LLVM's optimisations would take a third of it, the newer of XLA's two ways
# to write a fused loop half of the rest, and neither changes a result by more than rounding.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            "--xla_backend_optimization_level=0",
            # An option that XLA does not know ends the process: later versions have the newer way alone.
            *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_force_host_platform_device_count=8",
            *os.environ.get("XLA_FLAGS", "").split(),
        ]
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Stages run with the same shapes in many tests: what one process has compiled, the others read.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp("-jaxmed")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Every annotated function of the package checks its arguments and results while the tests run. An int may stand for a
# float, as in every Python type checker; the hook wants a name that it can import.
checker = types.ModuleType("jaxmed_checker")
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked_closures = set()


def check(function):
    """Check a function; one that every call of another defines anew, the first time: a check takes 1 ms to make."""
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" in function.__qualname__:
        if code in _checked_closures:
            return function
        _checked_closures.add(code)
    return _check(function)


checker.__dict__["check"] = check
sys.modules["jaxmed_checker"] = checker
install_import_hook("jaxmed", "jaxmed_checker.check")

ROOT = Path(__file__).resolve().parents[1]


# Compiled programs stay mapped, and Linux allows 65,530 mappings: beyond them the compiler crashes.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000


def pytest_configure(config):
    """Let xdist take files as they come: it would begin with those of most tests, which are the quickest."""
    config.option.loadscopereorder = False


def pytest_unconfigure(config):
    """Remove the compiled programs, where no caller and no other worker has a use for them."""
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if not hasattr(config, "workerinput") and programs.endswith("-jaxmed"):
        shutil.rmtree(programs, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Begin with whole stages, the longest files: the many short ones after them keep every worker busy to the end."""
    items.sort(key=lambda item: "systems" not in item.path.parts)


def pytest_collection_finish():
    """Leave modules and tests out of garbage collection, and collect less often: half of its time, 3 % of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def drop_programs():
    """Forget what the tests of a file have compiled, before a process has too many programs to compile another."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets, which are not part of the repository."""
    folder = Path(os.environ.get("JAXMED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data sets are not here: set JAXMED_DATA to their folder")
    return folder

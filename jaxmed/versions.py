"""Versions of the software that makes a result, read without importing it."""

import importlib.metadata
import platform

RECORDED = ("jaxmed", "jax", "jaxlib", "flax", "numpy")


def software_versions() -> dict[str, str]:
    """Return the versions that a run records; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in RECORDED:
        version = package_version(name)
        if version is not None:
            versions[name] = version
    return versions


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def software_name() -> str:
    """Return name and version, as sidecars and headers carry them."""
    return f"jaxmed {package_version('jaxmed') or 'unknown'}"

"""Imports point downward: the table of the README's architecture section, checked on the source."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

PACKAGE = Path(__file__).resolve().parents[1] / "jaxmed"
ROWS = [
    {"errors", "contents", "files", "volume", "versions"},
    {"arrays", "io", "config"},
    {"nn", "physics", "solvers", "metrics", "data"},
    {"models", "synthesis"},
    {"objectives", "diffusion", "rl"},
    {"train", "report"},
    {"recipes"},
    {"systems"},
    {"cli", "weights", "plan", "doctor", "__main__"},
]
ROW = {name: index for index, row in enumerate(ROWS) for name in row}
HOMES = {
    "flax": {"nn", "models"},
    "orbax": {"train/checkpoint.py", "io/weights_files.py"},
    "grain": {"data"},
    "diffrax": {"solvers/ode.py"},
    "jraph": {"arrays/graphs.py"},
    "nibabel": {"io/nifti.py"},
    "onnx": {"io/onnx.py"},
    "onnxruntime": {"io/onnx.py"},
    "pydicom": {"io/dicom_files.py", "io/dicom_pixels.py", "io/dicom.py", "io/parametric_map.py"},
    "highdicom": {"io/parametric_map.py"},
    "matplotlib": {"report"},
    "tyro": {"cli.py", "recipes/training.py", "systems/igndmoe/cohort_fit.py", "systems/igndmoe/dual.py"},
    "amico": {"io/amico.py"},
    "blackjax": {"physics/posterior.py"},
    "mctx": {"rl/search.py"},
    "torch": set(),
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def problems(path: Path) -> list[str]:
    place = path.relative_to(PACKAGE).as_posix()
    own = place.removesuffix(".py").split("/")
    if own == ["__init__"]:
        return []
    found = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxmed" and len(parts) > 1:
            other = parts[1]
            same_folder = other == own[0] and other != "systems"
            same_system = other == own[0] == "systems" and (len(parts) < 3 or parts[2] == own[1])
            # Files of the bottom and top row are modules, not folders: they may see one another.
            flat = ROW[other] == ROW[own[0]] and ROW[other] in (0, len(ROWS) - 1)
            if not (same_folder or same_system or flat or ROW[other] < ROW[own[0]]):
                found.append(f"{place} imports {name}")
        elif parts[0] in HOMES and not any(place == home or place.startswith(home + "/") for home in HOMES[parts[0]]):
            found.append(f"{place} imports {parts[0]}, whose home is {sorted(HOMES[parts[0]])}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path):
    assert problems(path) == []


def test_init_files_hold_prose_and_lazy_calls_only():
    for path in PACKAGE.rglob("__init__.py"):
        docstring, *rest = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        for node in rest:
            allowed = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            allowed |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            allowed |= isinstance(node, ast.ImportFrom) and node.module == "typing"
            assert allowed, f"{path}: {ast.unparse(node)[:60]}"


def test_every_folder_has_a_row():
    folders = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert folders <= set(ROW)

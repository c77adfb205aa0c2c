"""Notebooks and their scripts are one text in two forms; `scripts/test --notebooks` runs them."""

import ast
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_notebook_equals_its_script_and_stays_small(path):
    script, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells]
    assert len(notebook.cells) <= 15
    outputs = [cell.get("outputs", []) for cell in notebook.cells if cell.cell_type == "code"]
    assert any(outputs), "stored without its outputs"
    assert not any(output["output_type"] == "error" for cell in outputs for output in cell)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_import_public_names_of_jaxmed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxmed"):
            assert not any(alias.name.startswith("_") for alias in node.names)

"""jaxmed weights: what it prints and writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.arrays.task import Task
from jaxmed.cli import main
from jaxmed.io import pickles, safetensors
from jaxmed.models.published.load import load_published
from jaxmed.weights import COMMANDS

pytestmark = pytest.mark.core

REFERENCES = Path(__file__).resolve().parent / "references"
MAE = str(REFERENCES / "tangerine_mae_24.pth")
HEADS = ["--heads", "2", "--decoder-heads", "4"]


def run(capsys, *words):
    code = main(["weights", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_commands_explain_themselves(capsys):
    for words in ([], ["--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0 and all(f"jaxmed weights {name}" in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main(["weights", name, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert caught.value.code == 0 and f"jaxmed weights {name}" in out
        assert name == "list" or "Example: jaxmed weights" in out


def test_help_needs_no_jax():
    code = "import sys; from jaxmed.cli import main; main(['weights']); assert not {'jax', 'tyro'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_show_prints_the_card_of_a_model_that_has_one(capsys, tmp_path):
    assert run(capsys, "import", MAE, "--out", tmp_path / "run" / "outputs" / "model", *HEADS)[0] == 0
    place = tmp_path / "run"
    assert "README.md" not in run(capsys, "show", place)[1]
    (place / "outputs" / "model" / "README.md").write_text("# A card\n")
    for given in (place, place / "outputs" / "model"):
        out = run(capsys, "show", given)[1]
        assert out.endswith(f"{place / 'outputs' / 'model' / 'README.md'}\n\n# A card\n")
    # A card is no reason not to replace what lies beside it.
    assert run(capsys, "import", MAE, "--out", place / "outputs" / "model", "--overwrite", *HEADS)[0] == 0


def test_list_says_where_the_licence_and_the_keys(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    tangerine = ("tangerine", "mae_pretrained.pth", "18835750", "CC-BY-NC 4.0", "decoder_pos_embed", "fc_norm")
    for word in (*tangerine, "guided_diffusion", "256x256_diffusion_uncond.pt", "MIT", "time_embed"):
        assert word in out


def test_show_says_what_a_file_holds(capsys, tmp_path):
    code, out, _ = run(capsys, "show", MAE, *HEADS)
    assert code == 0
    out = " ".join(out.split())
    for words in (
        "family tangerine",
        "kind mae: masked autoencoder, encoder and decoder",
        "input 8 x 8 x 8 voxels, 1 channel, in patches of 4 x 4 x 4: 8 tokens",
        "encoder width 24, depth 1, heads 2, hidden 96",
        "decoder width 16, depth 2, heads 4, hidden 64",
        "preprocess size 8 x 8 x 8, axes zyx, fit stretch, interpolation bspline, edge clamp, kind window, "
        "window -1200 to 800",
        "licence CC-BY-NC 4.0",
        "left over none missing none",
    ):
        assert words in out
    tensors = pickles.read_checkpoint(MAE)["model"]
    count = sum(array.size for array in tensors.values())
    tables = 9 * (24 + 16)
    assert f"parameters {count:,}" in out and f"of them {tables} in constant" in out and f"used {len(tensors)}" in out
    partial = {name: array for name, array in tensors.items() if name != "decoder_norm.bias"} | {"x": np.zeros(2)}
    safetensors.write(tmp_path / "partial.safetensors", partial)
    code, out, _ = run(capsys, "show", tmp_path / "partial.safetensors", *HEADS)
    assert code == 0 and "its encoder alone" in out and "1: decoder_norm.bias" in " ".join(out.split())
    assert "mask_token" in out and " x" in out


def test_imported_and_exported_weights_are_the_original_ones(capsys, tmp_path):
    folder, file = tmp_path / "deep" / "own", tmp_path / "again.safetensors"
    code, out, _ = run(capsys, "import", MAE, "--out", folder, *HEADS)
    assert code == 0 and f"Written: {folder}" in out and "left over" in out
    assert sorted(path.name for path in folder.iterdir()) == ["parameters.safetensors", "record.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["own"], "no temporary folder stays"
    assert json.loads((folder / "record.json").read_text())["licence"].startswith("CC-BY-NC")
    assert run(capsys, "show", folder)[0] == 0
    assert run(capsys, "export", folder, "--out", file)[0] == 0
    original, again = pickles.read_checkpoint(MAE)["model"], safetensors.read(file)
    assert set(again) == set(original)
    assert all(again[name].tobytes() == array.tobytes() for name, array in original.items())


def test_a_classifier_learns_what_its_outputs_mean(capsys, tmp_path):
    file, folder = REFERENCES / "tangerine_linear.safetensors", tmp_path / "own"
    words = ["import", file, "--out", folder, "--heads", "2"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "not told: give --task" in out and load_published(folder).task is None
    named = ["--task", "multiclass", "--names", "none", "solid", "subsolid"]
    code, out, _ = run(capsys, *words, "--overwrite", *named)
    assert code == 0 and "multiclass: none, solid, subsolid" in out
    assert load_published(folder).task == Task("multiclass", ("none", "solid", "subsolid"))


def test_nothing_is_overwritten_unasked(capsys, tmp_path):
    folder, file = tmp_path / "own", tmp_path / "a.safetensors"
    for words, place in ((["import", MAE, "--out", folder], folder), (["export", MAE, "--out", file], file)):
        assert run(capsys, *words, *HEADS)[0] == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        code, out, err = run(capsys, *words, *HEADS)
        assert code == 2 and str(place) in err and "--overwrite" in err and err.count("\n") == 1 and out == ""
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert run(capsys, *words, *HEADS, "--overwrite")[0] == 0
    (folder / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, "import", MAE, "--out", folder, *HEADS, "--overwrite")
    assert code == 2 and "one holding thesis.txt" in err and (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["impotr", "x"], "jaxmed: weights impotr: expected a command, found an unknown word; did you mean 'import'?"),
        (["import", MAE], "jaxmed: --out: expected a value, found nothing"),
        (["show"], "jaxmed: PATH: expected a value, found nothing"),
        (["show", "nowhere.pth"], "jaxmed: nowhere.pth: expected a PyTorch checkpoint, found no such file"),
        (["show", MAE, "--heads", "x"], "jaxmed: --heads: expected None or INT, found x"),
        (["show", MAE, "--haeds", "2"], "found an unknown one; did you mean '--heads'?"),
        (["show", MAE], "shapes do not tell heads: jaxmed weights import --heads N"),
        (
            ["show", MAE, "--family", "tangerin"],
            "jaxmed: family: expected auto or one of tangerine, retfound, dinov2, dinov3, guided_diffusion, "
            "brainfm, profound, cocolit, llava, lpips, found tangerin",
        ),
        (["export", MAE, "--out", "a.onnx"], "a name ending in .safetensors or .stablehlo, found a.onnx"),
        (["import", MAE, "--out", MAE, *HEADS], "expected a folder for the weights, found a file"),
        (["import", MAE, "--out", "x", *HEADS, "--names", "a"], "give --task too"),
        (["import", MAE, "--out", "x", "--task", "binry"],
         "--task: expected one of None, binary, multiclass, multilabel, regression, found binry"),
        (["import", MAE, "--out", "x", "--task", "binary"], "expected one name per output"),
        (["import", MAE, "--out", "x", *HEADS, "--task", "binary", "--names", "a"], "found a masked autoencoder"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_with_nothing_written(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("jaxmed: ")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_trace(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run(capsys, "import", MAE, "--out", tmp_path / "file" / "own", *HEADS)
    assert code == 2 and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_ending_in_stablehlo_is_a_program(capsys, tmp_path):
    """Only that the command hands it on: tests/models/published/test_stablehlo.py runs the program."""
    file = tmp_path / "model.stablehlo"
    code, _, err = run(capsys, "export", MAE, "--out", file, *HEADS)
    assert code == 2 and "classifier" in err and not file.exists()

"""`jaxmed data`: packing through the command line, and synthetic data sets as files."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.data.store import open_store
from jaxmed.data_command import SIZES, packing_of
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for number in range(5):
        array = np.random.default_rng(number).integers(-1000, 200, (8, 8, 8)).astype(np.int16)
        nifti.write(tmp_path / "scans" / f"{number}.nii.gz", Volume.make(array, np.eye(4)))
        rows.append({"path": f"{number}.nii.gz", "split": "train" if number else "test", "label": number % 2})
    write_table(tmp_path / "scans" / "scans.csv", tuple(rows[0]), rows)
    return tmp_path / "scans" / "scans.csv"


def pack(manifest, out, *words):
    size = ["--preprocess.size", "8", "8", "8"]
    given = ["data", "pack", "--stage", "tangerine pretrain", "--data.manifest", str(manifest), "--out", str(out)]
    return main([*given, *size, "--quiet", *words])


def test_a_manifest_becomes_a_store_past_a_broken_file(manifest, tmp_path, capsys):
    out, place = tmp_path / "store", manifest.parent / "3.nii.gz"
    whole = place.read_bytes()
    place.write_bytes(whole[:50])
    assert pack(manifest, out) == 1
    assert "4 records in 1 files; 1 failed, see outputs/failed.csv" in capsys.readouterr().out
    with (out / "outputs" / "failed.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == str(place) and row["id"] == "3" and "3.nii.gz" in row["reason"]
    place.write_bytes(whole)
    assert pack(manifest, out) == 0 and not (out / "outputs" / "failed.csv").exists()
    stored = open_store(out)
    expected = dataclasses.replace(PREPROCESS, size=(8, 8, 8))
    assert stored.settings.preprocess == expected and stored.settings.dtype == "float16"
    np.testing.assert_allclose(stored[3]["image"], expected(place), rtol=0, atol=2**-12)
    assert read_table(out / "records.csv").column("label") == ["0", "1", "0", "1", "0"]
    assert {path.name for path in out.iterdir()} == {"store.json", "records.csv", "shards", "outputs", "log.txt"}


def test_another_setting_needs_another_place_or_to_replace_the_store(manifest, tmp_path, capsys):
    out = tmp_path / "store"
    assert pack(manifest, out, "--data.split", "train") == 0 and len(open_store(out)) == 4
    assert pack(manifest, out, "--dtype", "float32") == 2
    told = capsys.readouterr().err
    assert "a store of dtype float32, found one of dtype float16; choose another --out" in told
    assert told.count("\n") == 1
    assert pack(manifest, out, "--dtype", "float32", "--overwrite") == 0
    assert open_store(out).settings.dtype == "float32" and len(open_store(out)) == 5
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    assert pack(manifest, tmp_path / "mine", "--overwrite") == 2
    assert "found one holding notes" in capsys.readouterr().err and (tmp_path / "mine" / "notes").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "pak"], "data pak: expected a command, found an unknown word; did you mean 'pack'?"),
        (["data", "pack"], "--out: expected a value, found nothing"),
        (["data", "pack", "--out", "x"], "data.manifest, input: expected one of them, found neither"),
        (["data", "pack", "--stage", "tangerine", "--out", "x"], '--stage: expected "SYSTEM STAGE", found'),
        (["data", "pack", "--stage", "noddi fit", "--out", "x"], "a stage with --preprocess options, found noddi fit"),
        (["data", "pack", "--preset", "smoke", "--out", "x"], "--preset: expected one of a stage, found 'smoke'"),
        (["data", "phantoms", "chst", "--out", "x"], "expected one of answers, brain, chest"),
        (["data", "phantoms", "chest", "--out", "x", "--size", "8", "8"], "--size: expected 3 numbers for chest"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, *["--quiet"] * (words[1] == "pack")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_preprocessing_comes_from_a_stage_or_from_weights():
    assert packing_of("tangerine pretrain", "smoke", None)(out=Path("x")).preprocess.size == (32, 32, 32)
    assert packing_of("retfound pretrain", None, None)(out=Path("x")).preprocess.channels == 3
    with pytest.raises(InputError, match="--stage, --weights: expected one of them, found both"):
        packing_of("tangerine pretrain", None, Path("weights"))


SMALL = {
    "brain": (32, 32), "chest": (32, 32, 32), "connectome": (6,), "diffusion": (6, 6, 2), "heads": (48, 56, 48),
    "retina": (32,), "textures": (16,),
}  # fmt: skip
FILES = {
    "answers": ".csv",
    "cine": ".npz",
    "connectome": ".csv",
    "retina": ".png",
    "puzzles": ".png",
    "textures": ".png",
}


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_every_kind_of_phantom_is_written_as_files(kind, tmp_path, capsys):
    """One program is compiled for each kind at most; a table names files that are there."""
    words = ["--size", *map(str, SMALL[kind])] if kind in SMALL else []
    assert main(["data", "phantoms", kind, "--out", str(tmp_path / kind), "--subjects", "6", *words]) == 0
    written = capsys.readouterr().out.removeprefix("Written: ").strip()
    assert written.startswith(str(tmp_path / kind))
    files = [path for path in (tmp_path / kind).rglob("*") if path.is_file()]
    assert any(path.name.endswith(FILES.get(kind, ".nii.gz")) for path in files)
    if kind in ("answers", "diffusion", "connectome"):
        return
    table = read_table(written)
    column = "scan_path" if kind == "pairs" else "path"
    assert all((table.path.parent / cell).exists() for cell in table.column(column))


def test_the_command_says_what_it_takes(capsys):
    assert main(["data"]) == 0
    assert "jaxmed data pack" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "pack", "--help"])
    shown = capsys.readouterr().out
    for word in ("--data.manifest", "--preprocess.size", "--out", "--shard-mb", "--stage", "outputs/failed.csv"):
        assert word in shown

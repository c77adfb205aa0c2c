"""A preset is a size, never a data set: files that are given take the place of synthetic data, in every stage."""

import numpy as np
import pytest

from jaxmed.cli import STAGES, load_stage, main

pytestmark = pytest.mark.core

# Options of every stage that name files where a preset would generate data or train a model. Of several they go
# together; further ones stand for the same data.
FILES = {
    "tangerine pretrain": (["--input"], ["--data.manifest"]),
    "tangerine adapt": (["--data.manifest"],),
    "tangerine embed": (["--input"], ["--data.manifest"]),
    "tangerine predict": (["--input"], ["--data.manifest"]),
    "tangerine efficiency": (["--data.manifest"],),
    "retfound pretrain": (["--input"], ["--data.manifest"]),
    "retfound adapt": (["--data.manifest"],),
    "retfound embed": (["--input"], ["--data.manifest"]),
    "retfound predict": (["--input"], ["--data.manifest"]),
    "retfound compare": (["--data.manifest"],),
    "profound pretrain": (["--input"], ["--data.manifest"]),
    "profound adapt": (["--data.manifest"],),
    "profound segment": (["--data.manifest"],),
    "profound predict": (["--input"], ["--data.manifest"]),
    "profound quality": (["--input"], ["--data.manifest"]),
    "profound quality-study": (["--data.manifest"],),
    "noddi fit": (["--dwi", "--bvals", "--bvecs"],),
    "noddi train": (["--bvals", "--bvecs"],),
    "noddi predict": (["--dwi", "--bvals", "--bvecs"],),
    "noddi export": (["--weights"],),
    "noddi evaluate": (["--weights"], ["--bvals", "--bvecs"]),
    "brainfm generate": (["--input"], ["--data.manifest"]),
    "brainfm train": (["--input"], ["--data.manifest"], ["--data.store"]),
    "brainfm predict": (["--input"],),
    "cocolit train-autoencoder": (["--data.manifest"],),
    "cocolit encode": (["--data.manifest"],),
    "cocolit train-diffusion": (["--data.manifest"],),
    "cocolit train-controlnet": (["--data.manifest"],),
    "cocolit translate": (["--input"], ["--data.manifest"]),
    "cocolit evaluate": (["--data.manifest"],),
    "dynamicdps train-prior": (["--input"], ["--data.manifest"], ["--data.labels"]),
    "dynamicdps train-initial": (["--input"], ["--data.manifest"], ["--data.labels"]),
    "dynamicdps calibrate": (["--input"],),
    "dynamicdps enhance": (["--input"],),
    "dynamicdps compare": (["--input"], ["--manifest"]),
    "igndmoe fit": (["--connectome", "--table"], ["--table"]),
    "igndmoe attribute": (["--connectome", "--table"], ["--table"]),
    "igndmoe compare": (["--connectome", "--table"], ["--table"]),
    "igndmoe stage": (["--weights", "--table"], ["--table"]),
    "igndmoe forecast": (["--weights", "--table"], ["--table"]),
    "mupm perturb": (["--data.manifest"],),
    "mupm answer": (["--questions"],),
    "mupm propagate": (["--table"],),
    "mupm transfer": (["--table"],),
    "mupm redundancy": (["--table"],),
    "selfplay meta-train": (["--data.manifest"],),
    "selfplay train-policy": (["--data.manifest"],),
    "selfplay adapt": (["--data.manifest"],),
    "selfplay think": (["--input"],),
    "selfplay compare": (["--data.manifest"],),
}
SIMULATIONS = {"noddi simulate", "igndmoe simulate"}
CASES = [
    (name, preset, options)
    for name, several in FILES.items()
    for preset in ("smoke", "laptop")
    for options in several
    if hasattr(load_stage(*name.split()), preset)
]


def test_every_stage_that_reads_files_is_tried():
    assert set(FILES) | SIMULATIONS == set(STAGES)


@pytest.mark.parametrize(
    ("name", "preset", "options"), CASES, ids=[f"{name} {preset} {options[0]}" for name, preset, options in CASES]
)
def test_files_take_the_place_of_synthetic_data_in_every_preset(name, preset, options, tmp_path, capsys):
    """A file that is not there is what the stage complains of: it has looked for it, and generated nothing."""
    words = [word for option in options for word in (option, str(tmp_path / f"absent{option[2:]}"))]
    assert main([*name.split(), "--preset", preset, *words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxmed: ") and said.count("\n") == 1
    assert "preset" not in said.replace("or try --preset smoke", ""), said
    is_named = str(tmp_path / "absent") in said
    assert is_named or said.startswith(("jaxmed: weights:", "jaxmed: connectome:")), said
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.*"))


def test_a_preset_trains_on_the_files_that_are_given(tmp_path):
    """Of three cubes one is held out; a smoke run on phantoms would have sixteen."""
    generator = np.random.default_rng(0)
    (tmp_path / "cubes").mkdir()
    for number in range(3):
        volume = generator.uniform(0, 1, (32, 32, 32)).astype(np.float32)
        np.savez(tmp_path / "cubes" / f"{number}.npz", volume=volume)
    words = ["--preset", "smoke", "--input", str(tmp_path / "cubes"), "--epochs", "2", "--out", str(tmp_path / "run")]
    assert main(["tangerine", "pretrain", *words, "--loader.batch-size", "2"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 volumes to train on, 1 held out." in log
    assert not list((tmp_path / "run").rglob("scans.csv"))


def test_epochs_that_decide_over_steps_are_told_and_the_size_is_the_models():
    from jaxmed.config import to_record
    from jaxmed.systems.tangerine.stages import pretrain
    from jaxmed.train.loop import LoopConfig, length_notes

    (note,) = length_notes(LoopConfig(steps=50), 40)
    assert note == "The length is 40 epochs; loop.steps 50 is not looked at (--epochs 0 takes it)."
    assert length_notes(LoopConfig(steps=50), 0) == length_notes(LoopConfig(), 40) == []
    assert to_record(pretrain.laptop())["preprocess"]["size"] == [32, 32, 32]
    assert to_record(pretrain.paper())["preprocess"]["size"] == [256, 256, 256]

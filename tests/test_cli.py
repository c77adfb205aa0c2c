"""The command line's own words."""

import io
import os
import subprocess
import sys
import typing

import pytest

from jaxmed.cli import COMMANDS, STAGES, SYSTEMS, load_stage, main, parse_error
from jaxmed.completion import write_completion
from jaxmed.recipes.training import NO_PREFIX

pytestmark = pytest.mark.core


def test_overview_lists_every_stage_and_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in (*STAGES, *SYSTEMS, *COMMANDS):
        assert name in printed


def test_overview_and_explanation_import_no_jax():
    code = (
        "import sys; from jaxmed.cli import main; main([]); main(['noddi'])\n"
        "assert not {'jax', 'tyro', 'numpy.random', 'matplotlib'} & set(sys.modules), 'slow start'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_presets_help_and_run(name, capsys):
    module = load_stage(*name.split())
    assert module.smoke() and module.paper() and callable(module.run)
    assert callable(getattr(module, "page", None) or module.report)
    with pytest.raises(SystemExit) as caught:
        main([*name.split(), "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in ("--preset smoke", "--out", "--overwrite", "--resume", "--quiet", "--debug", "--profile", "--bids"):
        assert word in printed


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_explained_with_paper_units_and_stages(system, capsys):
    assert main([system]) == 0
    printed = capsys.readouterr().out
    stages = [name for name in STAGES if name.split()[0] == system]
    assert "arXiv" in printed and all(f"jaxmed {name}" in printed for name in stages)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nodi"], "jaxmed: nodi: expected a system or a command, found an unknown word; did you mean 'noddi'?"),
        (["noddi", "fitt"], "jaxmed: noddi fitt: expected a stage, found an unknown word; did you mean 'fit'?"),
        (["noddi", "fit"], "jaxmed: --out: expected a value, found nothing"),
        (["noddi", "fit", "--preset"], "jaxmed: --preset: expected a value, found nothing"),
        (["report", "nowhere"], "config.json: expected a JSON file, found no such file"),
    ],
)
def test_a_wrong_word_ends_in_one_line(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_an_error_that_the_parser_words_anew_still_ends_in_one_line():
    screen = "╭─ Oh ─╮\n│ Something else │\n│ went wrong │\n│ ───── │\n│ hint │\n╰───╯"
    assert str(parse_error(screen, "jaxmed x y")) == (
        "arguments: expected valid options, found Something else went wrong; see jaxmed x y --help"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (["Unrecognized options: --head, 2", "-", "Perhaps you meant:", "--heads INT"],
         "--head, 2: expected a known option, found an unknown one; did you mean '--heads'?"),
        (["Missing from jaxmed x y:", "PATH", "A file. (required)", "-", "For full helptext"],
         "PATH: expected a value, found nothing; see jaxmed x y --help"),
        (["Error parsing --n: no type matching {None}|INT could be instantiated from", "['k'].", "", "Got errors:"],
         "--n: expected None or INT, found k; see jaxmed x y --help"),
        (["invalid choice 'z' for argument '--kind'. Expected one of ('b',", "'a').", "-"],
         "--kind: expected one of a, b, found z; see jaxmed x y --help"),
    ],
)  # fmt: skip
def test_both_styles_of_the_parser_end_in_the_same_line(text, told):
    """A box where the terminal has UTF-8, rules of dashes elsewhere."""
    box = ["╭─ Title ──╮", *(f"│ {'─' * 9 if line == '-' else line} │" for line in text), "╰──────────╯"]
    plain = [" Title  ", " -------- ", *(f"  {'-' * 9 if line == '-' else line}  " for line in text)]
    assert str(parse_error("\n".join(box), "jaxmed x y")) == told
    assert str(parse_error("\n".join(plain), "jaxmed x y")) == told


def test_version_and_doctor(capsys):
    assert main(["--version"]) == 0
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "The core runs." in printed and "Extras" in printed


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_stages_and_options(shell, capsys):
    """Of all stages the script takes half a minute to write."""
    write_completion(shell, ("noddi fit", "noddi predict", "tangerine pretrain"))
    script = capsys.readouterr().out
    words = "noddi pretrain phantoms --data.manifest --data.store smoke --profile --topology"
    for word in words.split():
        assert word in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60).returncode == 0


def test_completion_explains_itself_and_knows_its_shells(capsys):
    assert main(["completion"]) == 0 and "bash-completion" in capsys.readouterr().out
    assert main(["completion", "fishy"]) == 2
    assert "completion: expected one of bash, zsh, found fishy" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m jaxmed doctor | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_no_screen_can_show_are_told_by_their_codes(tmp_path, monkeypatch, encoding):
    shown = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", shown[0])
    monkeypatch.setattr(sys, "stderr", shown[1])
    name = os.fsdecode(b"caf\xe9-\xc3\xa9")
    assert main(["report", str(tmp_path / name)]) == 2
    print(name)
    for stream in shown:
        stream.flush()
        assert rb"caf\udce9-" in stream.buffer.getvalue()


def test_a_run_folder_whose_name_is_no_utf8_is_refused(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    assert main(["noddi", "simulate", "--preset", "smoke", "--out", str(tmp_path / name)]) == 2
    assert "expected a folder whose name is UTF-8, found surrogates not allowed; choose" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


READ_SCANS = [name for name in STAGES if name.split()[0] in ("tangerine", "dynamicdps", "selfplay")]


def reading_options(name):
    """Settings of a stage, or the record among them whose options carry no prefix either."""
    config = load_stage(*name.split()).Config()
    while not hasattr(config, "series"):
        hints = typing.get_type_hints(type(config), include_extras=True)
        config = getattr(config, next(name for name, hint in hints.items() if NO_PREFIX in typing.get_args(hint)))
    return config


@pytest.mark.parametrize("name", READ_SCANS)
def test_every_stage_that_reads_scans_takes_a_fill(name):
    assert reading_options(name).fill is None  # of which the command line makes --fill


@pytest.mark.parametrize("name", [*READ_SCANS, "noddi fit", "noddi predict"])
def test_every_stage_that_reads_scans_lets_one_name_a_series(name):
    assert not reading_options(name).series  # of which the command line makes --series

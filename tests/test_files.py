"""Errors in one line, and files that are never half-written."""

import errno
import itertools
import json
import os
import pickle
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from jaxmed import files
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, require_file, require_room, unique_names, walk_files, write_json, write_text
from jaxmed.volume import Volume, require_same_grid

pytestmark = pytest.mark.core


def test_error_is_one_line_and_survives_pickling():
    error = InputError("a.csv", "two\nclasses", "one", "add\tmore")
    assert str(error) == "a.csv: expected two classes, found one; add more"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(InputError("a", "b", "c")) == "a: expected b, found c"


def test_atomic_path_keeps_suffix_and_leaves_one_file(tmp_path):
    with atomic_path(tmp_path / "deep" / "map.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"x")
        assert not (tmp_path / "deep" / "map.nii.gz").exists()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["map.nii.gz"]


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_a_user_can_cause_while_writing_is_told(tmp_path, code):
    path = tmp_path / "a.txt"
    with pytest.raises(InputError, match="a.txt: expected") as caught:
        with atomic_path(path) as temporary:
            temporary.write_text("part")
            raise OSError(code, "reason")
    assert caught.value.advice
    assert not list(tmp_path.iterdir())


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "no", "another.txt")


def test_folder_below_a_file_and_folder_as_file_are_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="folder"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(InputError, match="folder"):
        write_text(tmp_path, "x")


def test_json_takes_numpy_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": np.float32(1.5), "b": np.arange(2), "c": tmp_path})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content == {"a": 1.5, "b": [0, 1], "c": str(tmp_path)}
    with pytest.raises(InputError, match="b.json: expected finite numbers"):
        write_json(tmp_path / "b.json", {"a": float("nan")})


@pytest.mark.parametrize(
    ("name", "found"),
    [("no.nii", "no such"), ("", "folder"), ("a.txt", "suffix"), ("e.nii", "emp")],
)
def test_unusable_files_are_told(tmp_path, name, found):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "e.nii").write_text("")
    with pytest.raises(InputError, match=found):
        require_file(tmp_path / name, "a NIfTI file", (".nii",))


@pytest.mark.parametrize(("kind", "found"), [("pipe", "a named pipe"), ("socket", "a socket"), ("device", "a device")])
def test_what_is_no_regular_file_is_told_unopened(tmp_path, monkeypatch, kind, found):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path("a.nii")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"a.nii: expected a NIfTI file, found {found}; write its content to a file"):
        require_file(path, "a NIfTI file", (".nii",))
    with pytest.raises(InputError, match=f"a.nii: expected a file or a folder, found {found}"):
        list(walk_files(path))


def test_claims_of_a_header_are_held_against_memory_and_the_packed_size(monkeypatch):
    monkeypatch.setattr(files, "_memory", lambda: 2**34)
    require_room("a.nii", 2**34)
    with pytest.raises(
        InputError, match="a.nii: expected data that fit into this machine's memory of 16 GiB, found 2 TiB"
    ):
        require_room("a.nii", 2**41)
    require_room("a.nii.gz", 2**31, 10)  # small ones at any ratio
    require_room("a.nii.gz", 2**33, 2**28)
    with pytest.raises(InputError, match=r"expected at most 2 GiB, or 40 times .*, found 8 GiB packed into 8 MiB;"):
        require_room("a.nii.gz", 2**33, 2**23)


def test_file_names_that_are_no_utf8_can_be_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.nii")
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == r"caf\udce9.nii"
    write_json(tmp_path / "a.json", {"path": Path(name)})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": name}


def test_volume_refuses_what_has_no_place():
    array = np.zeros((2, 3, 4), np.float32)
    assert Volume.make(array, np.diag([1.0, 2.0, 3.0, 1.0])).spacing == (1, 2, 3)
    for affine in (np.diag([1.0, 1.0, 0.0, 1.0]), np.full((4, 4), np.nan), np.ones((4, 4))):
        with pytest.raises(InputError, match="affine"):
            Volume.make(array, affine)
    with pytest.raises(InputError, match="axes"):
        Volume.make(array[0], np.eye(4))
    with pytest.raises(InputError, match="spacing"):
        Volume(array, np.eye(4), (1.0, 1.0, 2.0))


@pytest.mark.parametrize("edge", [1e-2, 1.0, 30.0])
def test_grids_match_within_a_hundredth_of_a_voxel_at_the_corners(edge):
    scale = np.diag([edge, edge, 4 * edge, 1])
    a = Volume.make(np.zeros((201, 3, 4)), scale)
    near, far = scale.copy(), scale.copy()
    near[0, 0] += 4e-5 * edge
    far[0, 0] += 6e-5 * edge
    require_same_grid(a, Volume.make(a.array, near), "a.nii", "b.nii")
    with pytest.raises(InputError, match="a.nii: expected the grid of b.nii"):
        require_same_grid(a, Volume.make(a.array, far), "a.nii", "b.nii")
    with pytest.raises(InputError, match="shape"):
        require_same_grid(a, Volume.make(a.array[1:], near), "a.nii", "b.nii")


ENDINGS = ("enhanced", "mask")
SUFFIXES = (".nii", ".nii.gz", ".png")
PLACES = (
    *("x.nii.gz", "x.nii", "x.png", "X.nii.gz", "x_2.nii.gz", "x_enhanced.nii.gz", "x_enhanced_enhanced.nii"),
    *("a_b.nii.gz", "a/b.nii.gz", "a__b.nii.gz", "a/b/.nii.gz", "A/B.nii", "a-b.nii"),
    *(
        "caf\u00e9.nii",
        "cafe\u0301.nii",
        "CAFE\u0301.nii",
        "stra\u00dfe.nii",
        "STRASSE.nii",
        "\ufb01le.nii",
        "file.nii",
    ),
    *("summary.nii.gz", "Scans.nii", "...", "", "\udcff\udcfe.nii", "?.nii", "*.nii"),
    *(f"{'long' * 60}{n}.nii.gz" for n in (1, 2)),
    *(f"{n}{'long' * 60}.nii.gz" for n in (1, 2)),
    "\u8133" * 200 + ".nii",
)


def written(name):
    """All names that the results of a file have, as a file system sees them that tells neither case nor accents."""
    return {unicodedata.normalize("NFKC", f"{name}{ending}").casefold() for ending in ("", *(f"_{e}" for e in ENDINGS))}


@pytest.mark.parametrize("order", (1, -1))
def test_no_file_writes_over_the_results_of_another(order):
    names = unique_names(PLACES[::order], SUFFIXES, ENDINGS, ("summary", "scans"))
    assert len(names) == len(PLACES) and names == unique_names(PLACES[::order], SUFFIXES, ENDINGS, ("summary", "scans"))
    for first, second in itertools.combinations(names, 2):
        assert written(first).isdisjoint(written(second)), (first, second)
    for name in names:
        assert not written(name) & {"summary", "scans"}
        # With an ending, a suffix and what a temporary name adds it stays below the 255 bytes of file systems.
        assert len(name.encode()) <= 125 and name == name.strip("._-") != "" and "__" not in name and "/" not in name


def test_names_are_those_of_the_files():
    assert unique_names(["s1/T1.nii.gz", "s2/T1.nii.gz", "T1.png"], SUFFIXES) == ["s1_T1", "s2_T1", "T1"]
    assert unique_names(["x.nii.gz", "x_enhanced.nii.gz"], SUFFIXES, ENDINGS) == ["x", "x_enhanced_2"]
    assert unique_names(["x_enhanced.nii.gz", "x.nii.gz"], SUFFIXES, ENDINGS) == ["x_enhanced", "x_2"]
    assert unique_names(["T1.nii"] * 20_000, SUFFIXES)[-1] == "T1_20000"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, -np.inf])])
def test_a_record_of_numbers_that_are_not_finite_is_one_line_and_no_file(value, tmp_path):
    with pytest.raises(
        InputError, match=r"summary.json: expected finite numbers, found NaN or Inf; the run has diverged"
    ):
        write_json(tmp_path / "summary.json", {"score": value})
    assert not list(tmp_path.iterdir())

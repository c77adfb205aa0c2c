"""Which scans lie under a folder: each once, series brought together, and what is none passed over."""

import os
import shutil

import numpy as np
import pytest
from scan_files import make_slices, save_slices, strip_preamble, write_object

from jaxmed.data.scans import describe, find_scans
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles, kind_of, read_volume
from jaxmed.volume import Volume

AFFINE = np.array([[-0.7, 0, 0, 9], [0, -0.8, 0, 8], [0, 0, 2.5, -4], [0, 0, 0, 1.0]])
KINDS = ("nifti", "dicom", "array")
ALL = (*KINDS, "picture")


def scan(seed=0, count=5):
    return Volume.make(np.random.default_rng(seed).integers(-1000, 3000, (6, 4, count)).astype(np.float32), AFFINE)


def names(found, folder):
    return [os.path.relpath(path, folder) for path in found.paths]


def shown(found):
    """Return the first voxel of each scan."""
    return [float(read_volume(one).volume.array[0, 0, 0]) for one in found.scans]


def first(seed):
    return float(scan(seed).array[0, 0, 0])


def test_files_of_all_kinds_are_found_and_hidden_ones_are_not(tmp_path):
    for name in ("a.nii", "B.NII.GZ", "sub/c.nii.gz", "._a.nii", ".cache/d.nii", "__MACOSX/e.nii"):
        nifti.write(tmp_path / "made.nii.gz" if name.lower().endswith("gz") else tmp_path / "made.nii", scan())
        (tmp_path / name).parent.mkdir(exist_ok=True)
        next(tmp_path.glob("made*")).rename(tmp_path / name)
    np.savez(tmp_path / "cube.npz", volume=scan().array)
    (tmp_path / "notes.txt").write_text("a.nii")
    (tmp_path / "p.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    assert names(find_scans(tmp_path, KINDS), tmp_path) == ["B.NII.GZ", "a.nii", "cube.npz", "sub/c.nii.gz"]
    assert names(find_scans(tmp_path, ("nifti",)), tmp_path) == ["B.NII.GZ", "a.nii", "sub/c.nii.gz"]
    assert "p.png" in names(find_scans(tmp_path, ALL), tmp_path)
    # A folder that is hidden itself is what was asked for.
    assert names(find_scans(tmp_path / ".cache", KINDS), tmp_path) == [".cache/d.nii"]


def test_links_count_once(tmp_path):
    nifti.write(tmp_path / "store" / "a.nii", scan())
    nifti.write(tmp_path / "in" / "b.nii", scan())
    for name, target in (("a.nii", "store/a.nii"), ("again.nii", "store/a.nii"), ("c.nii", "in/b.nii"), ("f", "store")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "lost.nii").symlink_to(tmp_path / "nowhere")
    assert names(find_scans(tmp_path / "in", KINDS), tmp_path / "in") == ["a.nii", "b.nii"]


@pytest.mark.parametrize("name", ["{:03d}.dcm", "{:03d}.DCM", "{:03d}.IMA", "IM{:04d}", "1.2.840.{}"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_series_is_one_scan_under_any_names(name, bare, tmp_path):
    for path in save_slices(make_slices(scan()), tmp_path / "s", name):
        assert kind_of(path) == "dicom"
        if bare:
            strip_preamble(path)
            assert kind_of(path) == "dicom"
    found = find_scans(tmp_path, KINDS)
    assert shown(found) == [first(0)] and found.scans[0].path == tmp_path / "s"
    assert describe(found.scans[0]) == ((6, 4, 5), "LPS")


def test_a_series_in_several_folders_is_one_scan(tmp_path):
    slices = make_slices(scan(count=6))
    for number in range(3):
        save_slices(slices[2 * number : 2 * number + 2], tmp_path / f"p/{number:04d}")
    (one,) = find_scans(tmp_path, KINDS).scans
    assert one.path == tmp_path / "p" and not one.files
    np.testing.assert_array_equal(read_volume(one).volume.array, scan(count=6).array)


def test_series_in_alternating_folders_are_told_apart(tmp_path):
    for seed in (0, 1):
        for number, data in enumerate(make_slices(scan(seed))):
            save_slices([data], tmp_path / f"{2 * number + seed:04d}")
    found = find_scans(tmp_path, KINDS)
    assert shown(found) == [first(0), first(1)] and len(set(found.paths)) == 2
    assert [len(one.files) for one in found.scans] == [5, 5]
    chosen = find_scans(tmp_path, KINDS, found.scans[1].files and make_uid(found.scans[1].files[0]))
    assert shown(chosen) == [first(1)]


def make_uid(path):
    return str(pytest.importorskip("pydicom").dcmread(path).SeriesInstanceUID)


def test_each_folder_of_a_tree_is_a_scan(tmp_path):
    for seed in range(3):
        save_slices(make_slices(scan(seed)), tmp_path / f"p{seed}" / "ct")
    found = find_scans(tmp_path, KINDS)
    assert names(found, tmp_path) == ["p0/ct", "p1/ct", "p2/ct"]
    assert shown(found) == [first(seed) for seed in range(3)]
    assert len({one.study for one in found.scans}) == 3


def test_two_series_of_one_folder_fail_until_one_is_named(tmp_path):
    for seed, words in enumerate(("Lung", "Soft")):
        save_slices(make_slices(scan(seed), SeriesDescription=words), tmp_path / "a", f"{seed}_{{}}")
    save_slices(make_slices(scan(2), SeriesDescription="Lung"), tmp_path / "b")
    found = find_scans(tmp_path, KINDS)
    assert names(found, tmp_path) == ["a", "b"]
    with pytest.raises(InputError, match=r"a: expected one series, found 2: .*Lung, CT, 5 slices.*--series"):
        read_volume(found.scans[0])
    assert shown(find_scans(tmp_path, KINDS, "lung")) == [first(0), first(2)]
    assert shown(find_scans(tmp_path, KINDS, "Soft")) == [first(1)]
    with pytest.raises(InputError, match=r"expected the series Bone, found .*\(Soft, CT, 5 slices\)"):
        find_scans(tmp_path, KINDS, "Bone")


def test_a_localiser_is_no_scan_and_alone_it_is_told(tmp_path):
    save_slices(make_slices(scan()), tmp_path / "a")
    save_slices(make_slices(scan(1, 1)), tmp_path / "a", "loc{}.dcm")
    save_slices(make_slices(scan(1, 1)), tmp_path / "scout", "loc{}.dcm")
    found = find_scans(tmp_path, KINDS)
    assert names(found, tmp_path) == ["a", "scout"]
    assert read_volume(found.scans[0]).notes[0].endswith("passed over")
    with pytest.raises(InputError, match="several slices, found one plane of shape 6 x 4 x 1"):
        read_volume(found.scans[1])


def test_a_broken_file_fails_its_own_scan_alone(tmp_path):
    for seed in range(2):
        paths = save_slices(make_slices(scan(seed)), tmp_path / f"p{seed}")
    paths[2].write_bytes(paths[2].read_bytes()[:300])
    (tmp_path / "p2").mkdir()
    (tmp_path / "p2" / "0.dcm").write_bytes(b"")
    found = find_scans(tmp_path, KINDS)
    assert names(found, tmp_path) == ["p0", "p1", "p2"]
    read_volume(found.scans[0])
    for one, words in zip(found.scans[1:], ("002.dcm", "no DICOM image"), strict=True):
        with pytest.raises(InputError, match=words):
            read_volume(one)


def test_a_nifti_beside_its_own_dicom_counts_once(tmp_path):
    pytest.importorskip("pydicom")
    folder = tmp_path / "a"
    save_slices(make_slices(scan()), folder)
    turned = Volume.make(np.ascontiguousarray(scan().array[:, ::-1]), AFFINE @ np.diag([1, -1, 1, 1]) + offset(3))
    nifti.write(folder / "converted.nii.gz", turned)
    nifti.write(folder / "scaled.nii.gz", Volume.make(scan().array * 2 + 1024, AFFINE))
    nifti.write(folder / "other.nii.gz", scan(1))  # on the same grid, of other values
    nifti.write(tmp_path / "elsewhere.nii.gz", scan())
    found = find_scans(tmp_path, KINDS)
    assert names(found, tmp_path) == ["a", "a/other.nii.gz", "elsewhere.nii.gz"]
    assert len(found.notes) == 2 and all("taken once, from the DICOM files" in note for note in found.notes)


def offset(rows):
    """Return what moves an affine to the last row, so that rows run the other way."""
    moved = np.zeros((4, 4))
    moved[:, 3] = rows * AFFINE[:, 1]
    return moved


def test_pictures_beside_slices_are_previews(tmp_path):
    save_slices(make_slices(scan()), tmp_path / "a")
    for place in (tmp_path / "a" / "preview.jpg", tmp_path / "own.png"):
        place.write_bytes(b"some picture")
    found = find_scans(tmp_path, ALL)
    assert names(found, tmp_path) == ["a", "own.png"]
    assert found.notes == (f"{tmp_path / 'a' / 'preview.jpg'} lies in a folder of DICOM slices: passed over",)


def test_a_copy_of_a_series_and_an_index_are_no_second_scan(tmp_path):
    save_slices(make_slices(scan()), tmp_path / "disc" / "PT0" / "SE0", "IM{}")
    write_object(tmp_path / "disc" / "DICOMDIR", "1.2.840.10008.1.3.10")
    (one,) = find_scans(tmp_path / "disc", KINDS).scans
    assert shown(find_scans(tmp_path / "disc" / "DICOMDIR", KINDS)) == [first(0)]
    shutil.copytree(one.path, tmp_path / "disc" / "copy")
    (both,) = find_scans(tmp_path, KINDS).scans
    volume, _, notes = read_volume(both)
    assert volume.array.shape == (6, 4, 5) and "5 slices are there twice" in notes[0]


@pytest.mark.parametrize("axis", range(3))
def test_a_plane_is_no_volume(axis, tmp_path):
    plane = Volume.make(np.take(scan().array, [0], axis), AFFINE)
    nifti.write(tmp_path / "plane.nii", plane)
    for look in (read_volume, describe):
        with pytest.raises(InputError, match=r"plane.nii: expected a volume of several slices, found one plane"):
            look(ScanFiles(tmp_path / "plane.nii"))
    assert read_volume(tmp_path / "plane.nii", allow_plane=True).volume.array.shape == plane.array.shape


def test_a_single_slice_names_its_folder(tmp_path):
    paths = save_slices(make_slices(scan()), tmp_path / "s")
    for look in (read_volume, describe):
        with pytest.raises(InputError, match=f"give the folder of the whole series: {tmp_path / 's'}"):
            look(ScanFiles(paths[2]))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(400)])
def test_what_is_no_scan_is_told(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="a: expected a (scan|NIfTI file)"):
        read_volume(tmp_path / "a")
    with pytest.raises(InputError, match="none in this folder"):
        find_scans(tmp_path, KINDS)
    with pytest.raises(InputError, match="a volume or a folder of volumes, found nothing"):
        find_scans(tmp_path / "nowhere", KINDS)


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_fill_values_are_refused_or_replaced_in_scans_of_every_kind(tmp_path, kind):
    volume = scan()
    array = volume.array.copy()
    array[0] = -1e30
    if kind == "nifti":
        nifti.write(tmp_path / "a.nii.gz", Volume.make(array, volume.affine))
    else:
        slices = make_slices(volume)
        for one in slices[1:]:
            one.RescaleSlope = "1e30"  # of a whole slice
        save_slices(slices, tmp_path)
    with pytest.raises(
        InputError, match=r"expected intensities of at most 1e\+09 in size, .*; replace them with --fill"
    ):
        read_volume(find_scans(tmp_path, KINDS).scans[0])
    found = find_scans(tmp_path, KINDS, fill=-1000.0)
    assert [one.fill for one in found.scans] == [-1000.0]
    read = read_volume(found.scans[0]).volume.array
    if kind == "nifti":
        np.testing.assert_array_equal(read, np.where(array < -1e9, -1000, array))
    else:
        assert np.abs(read).max() < 4000

"""The store of subjects: what is read, computed, cut, padded, and refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmed.data.label_table import TABLES
from jaxmed.data.subject_files import list_subjects
from jaxmed.data.subject_store import Location, close_store, open_store, write_subject
from jaxmed.data.surface_distances import encode, signed_distance
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.volume import Volume

pytestmark = pytest.mark.core
TABLE = TABLES["freesurfer"]()
SHAPE = (40, 44, 36)
GRID = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
CENTER = np.array([19.5, 21.5, 17.5])


def head():
    """A ball of cortex around white matter, in two halves, with a scalp."""
    radius = np.linalg.norm(GRID - CENTER, axis=-1)
    is_left = GRID[..., 0] < 20
    labels = np.where(radius < 14, 516, 0)
    labels = np.where(radius < 11, np.where(is_left, 3, 42), labels)
    return np.where(radius < 7, np.where(is_left, 2, 41), labels).astype(np.int16)


def write(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.write(path, Volume.make(array, np.eye(4) if affine is None else affine))
    return path


def stored(folder, labels_path, locate=None, table=TABLE, **others):
    (files,) = list_subjects(None, labels_path)
    files = dataclasses.replace(files, others=dict(others))
    write_subject(folder, files, table, locate)
    close_store(folder, [files], table)
    return open_store(folder)


def about_brain(store, array, affine=None):
    """Cut or pad an array as the store has done it, by its affine."""
    start = np.rint(np.linalg.solve(np.eye(4) if affine is None else affine, store.affine(0))[:3, 3]).astype(int)
    size = store[0]["size"]
    padded = np.zeros((*(np.array(SHAPE) + 100), *array.shape[3:]), array.dtype)
    padded[tuple(slice(50, 50 + n) for n in SHAPE)] = array
    return padded[tuple(slice(50 + low, 50 + low + n) for low, n in zip(start, size, strict=True))]


def test_a_coarser_grid_is_every_second_voxel(tmp_path):
    store = stored(tmp_path / "store", write(tmp_path / "a.nii.gz", head()))
    fine, coarse = store[0], dataclasses.replace(store, step=2)[0]
    assert coarse.keys() == fine.keys()
    for name in ("labels", "segmentation", "distances", "defaced"):
        np.testing.assert_array_equal(coarse[name], fine[name][::2, ::2, ::2])
    np.testing.assert_array_equal(coarse["size"], -(-fine["size"] // 2))
    assert repr(dataclasses.replace(store, step=2)) != repr(store)


def test_a_label_map_becomes_labels_classes_and_distances(tmp_path):
    store = stored(tmp_path / "store", write(tmp_path / "a.nii.gz", head()))
    subject = store[0]
    # The brain with 24 voxels on every side, padded behind to a multiple of 8.
    size = subject["size"]
    np.testing.assert_array_equal(size, [22 + 2 * 24] * 3)
    assert store.shape == (72, 72, 72) and subject["labels"].shape == store.shape
    inner = tuple(slice(n) for n in size)
    np.testing.assert_array_equal(subject["labels"][inner], TABLE.generation(about_brain(store, head())))
    np.testing.assert_array_equal(subject["segmentation"][inner], TABLE.index(about_brain(store, head()), ""))
    assert set(subject) == {"labels", "segmentation", "distances", "defaced", "size", "mirror", "read"}
    assert (subject["read"] == -1).all() and (subject["mirror"] == TABLE.mirror).all()
    assert (subject["distances"][size[0] :] == 255).all()


def test_distances_are_those_of_analytic_surfaces(tmp_path):
    """A half-ball's distance to its curved surface is the radius, to half a voxel of discretisation."""
    radius = np.linalg.norm(GRID - CENTER, axis=-1)
    found = signed_distance(radius < 11)
    near = np.abs(radius - 11) < 4
    assert np.abs(found - (radius - 11))[near].max() < 0.8 and np.abs(found - (radius - 11))[near].mean() < 0.25
    assert (np.sign(found) == np.where(radius < 11, -1, 1)).all()
    np.testing.assert_array_equal(
        encode(np.array([[[-9.0, -1.0, 0.0, 3.0, 9.0]]], np.float32)).reshape(-1), [0, 108, 128, 188, 255]
    )
    store = stored(tmp_path / "store", write(tmp_path / "a.nii.gz", head()))
    distances = store[0]["distances"]
    # Along the ray that leaves the left half at its side: the pial surface 11 voxels from the centre, the white at 7.
    ray = distances[:70, 35, 35, :].astype(float)
    place = np.arange(70) - 34.5
    outside = (place < -8) & (place > -14)
    np.testing.assert_allclose((ray[outside, 0] - 128) / 20, -place[outside] - 11, atol=0.55)
    np.testing.assert_allclose(
        (ray[(place < -5) & (place > -9), 1] - 128) / 20, -place[(place < -5) & (place > -9)] - 7, atol=0.55
    )
    assert (ray[place > 2, 0] > 128).all() and (ray[place < -2, 2] > 128).all()


def test_scans_coordinates_and_masks_come_along_in_two_bytes(tmp_path):
    rng = np.random.default_rng(1)
    t1, ct = rng.uniform(0, 900, SHAPE).astype(np.float32), rng.integers(-1000, 1500, SHAPE).astype(np.int16)
    files = {"T1": write(tmp_path / "t1.nii", t1), "CT": write(tmp_path / "ct.nii", ct)}
    files["defaced"] = write(tmp_path / "mask.nii", (GRID[..., 1] > 30).astype(np.uint8))
    matrix = np.diag([1.1, 0.9, 1.0, 1.0])
    matrix[:3, 3] = (5.0, -20.0, 3.0)
    oblique = np.eye(4)
    turn = np.deg2rad(20.0)
    oblique[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    oblique[:3, 3] = (-30.0, -25.0, 12.0)
    files = {
        name: write(tmp_path / f"{name}.nii.gz", nifti.read(path, dtype=np.float32).array, oblique)
        for name, path in files.items()
    }
    seen = []

    def locate(volume):
        seen.append(volume)
        return Location(matrix, 0.9)

    store = stored(tmp_path / "store", write(tmp_path / "a.nii.gz", head(), oblique), locate, **files)
    subject = store[0]
    inner = tuple(slice(n) for n in subject["size"])
    assert subject["images"].shape == (*store.shape, 4) and subject["images"].dtype == np.int16
    np.testing.assert_array_equal(subject["present"], [True, False, False, True])
    np.testing.assert_allclose(
        subject["images"][inner][..., 0] * subject["image_scale"][0], about_brain(store, t1, oblique), atol=0.02
    )
    np.testing.assert_array_equal(
        subject["images"][inner][..., 3] * subject["image_scale"][3], about_brain(store, ct, oblique)
    )
    np.testing.assert_array_equal(subject["defaced"][inner], about_brain(store, GRID[..., 1] > 30, oblique))
    # Coordinates are those of the world behind the oblique affine, whatever was cut.
    voxels = np.stack(np.meshgrid(*map(np.arange, subject["size"]), indexing="ij"), -1)
    world = voxels @ store.affine(0)[:3, :3].T + store.affine(0)[:3, 3]
    expected = world @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(subject["coordinates"][inner] / 100, expected, atol=0.006)
    assert len(seen) == 1 and seen[0].array.dtype == np.uint8
    assert json.loads((store.path / "a" / "subject.json").read_text())["overlap"] == 0.9


def test_other_orientations_and_voxel_sizes_become_upright_millimetres(tmp_path):
    lia = np.array([[-1.0, 0, 0, 39], [0, 0, 1, 0], [0, -1, 0, 43], [0, 0, 0, 1]])
    turned = np.ascontiguousarray(np.transpose(head(), (0, 2, 1))[::-1, ::-1])
    lia[2, 3] = 35
    upright = stored(tmp_path / "one", write(tmp_path / "a.nii.gz", head()))[0]
    other = stored(tmp_path / "two", write(tmp_path / "b.nii.gz", turned, lia))[0]
    np.testing.assert_array_equal(other["segmentation"], upright["segmentation"])
    coarse = stored(tmp_path / "three", write(tmp_path / "c.nii.gz", head(), np.diag([2.0, 2, 2, 1])))[0]
    assert (coarse["segmentation"] > 0).sum() == pytest.approx(8 * (upright["segmentation"] > 0).sum(), rel=0.02)


def test_a_store_is_complete_or_absent_and_continues(tmp_path):
    path = write(tmp_path / "a.nii.gz", head())
    (files,) = list_subjects(None, path)
    record = write_subject(tmp_path / "store", files, TABLE, None)
    path.unlink()
    assert write_subject(tmp_path / "store", files, TABLE, None) == record  # what is there is not read again
    with pytest.raises(InputError, match="a store of subjects"):
        open_store(tmp_path / "store")
    assert [one.name for one in (tmp_path / "store").iterdir()] == ["a"]
    close_store(tmp_path / "store", [files], TABLE)
    assert open_store(tmp_path / "store").table == TABLE


def table(folder, rows, header="path,subject,split,T1,dataset,age"):
    path = folder / "subjects.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_table_names_subjects_splits_scans_and_data_sets(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.nii.gz", head() + 0 * ord(name))
    write(tmp_path / "b_t1.nii.gz", rng.uniform(0, 9, SHAPE).astype(np.float32))
    manifest = table(tmp_path, ["a.nii.gz,one,train,,,71.5", "b.nii.gz,two,test,b_t1.nii.gz,HCP,"])
    files = list_subjects(manifest, None)
    for one in files:
        write_subject(tmp_path / "store", one, TABLE, None)
    close_store(tmp_path / "store", files, TABLE)
    store = open_store(tmp_path / "store")
    assert store.names == ("one", "two") and store.splits == ("train", "test") and store.channels == 1
    assert store.name(1).endswith("two") and "two" in repr(store)
    np.testing.assert_allclose(store[1]["read"], [0.3333, 0.6667, 0, 0])
    assert not store[0]["present"].any() and store[1]["present"].all()
    assert store[0].keys() == store[1].keys()
    assert store[0]["age"] == 71.5 and np.isnan(store[1]["age"])


def test_the_papers_file_names_are_brought_together(tmp_path):
    folder = tmp_path / "Gen"
    for ending, array in (("brainseg_with_extracerebral", head()), ("T1w", head()), ("lp_dist_map", head())):
        write(folder / f"ADNI3.0012.{ending}.nii", array)
    with pytest.raises(InputError, match="all of lp, lw, rp, rw, or none, found no lw, rp, rw"):
        list_subjects(None, folder)
    (folder / "ADNI3.0012.lp_dist_map.nii").unlink()
    (one,) = list_subjects(None, folder)
    assert one.dataset == "ADNI3" and one.images == ("T1",) and one.path.name.startswith("ADNI3.0012.brainseg")
    (folder / "ADNI3.0012.brainseg_with_extracerebral.nii").unlink()
    with pytest.raises(InputError, match="a label map beside the other files"):
        list_subjects(None, folder)


def test_the_papers_lists_state_splits_and_ages_and_its_masks_are_found(tmp_path):
    folder = tmp_path / "Gen"
    for stem in ("ADNI.one", "HCP.two"):
        for ending in ("brainseg", "brainseg_with_extracerebral", "T1w", "T1w.defacingmask"):
            write(folder / f"{stem}.{ending}.nii", head())
    (folder / "train.txt").write_text("/elsewhere/HCP.two.T1w.nii\nmissing.three.T1w.nii\n")
    (folder / "test.txt").write_text("ADNI.one.T1w.nii\n")
    (folder / "participants_age.txt").write_text("HCP.two 31.5\n\n")
    one, two = list_subjects(None, folder)
    assert (one.split, one.age, two.split, two.age) == ("test", None, "train", 31.5)
    # The map with extra-cerebral labels, whatever the order of the names.
    assert one.path.name == "ADNI.one.brainseg_with_extracerebral.nii"
    assert one.others["defaced"].name == "ADNI.one.T1w.defacingmask.nii" and one.images == ("T1",)
    for name, text, message in (
        ("test.txt", "HCP.two.T1w.nii", "every subject in one split, found HCP.two in train too"),
        ("participants_age.txt", "HCP.two young", "a name and an age in years in every line, found HCP.two young"),
        ("train.txt", "nobody.T1w.nii", "files or names of subjects"),
    ):
        (folder / "test.txt").write_text("ADNI.one\n")
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=message):
            list_subjects(None, folder)
        (folder / "participants_age.txt").unlink(missing_ok=True)


def test_what_is_wrong_with_files_is_told(tmp_path):
    labels = head()
    labels[20, 20, 20] = 999
    with pytest.raises(
        InputError, match=r"bad.nii.gz: expected labels of the table freesurfer, found 999 \(1 voxels\)"
    ):
        stored(tmp_path / "s", write(tmp_path / "bad.nii.gz", labels))
    good = write(tmp_path / "a.nii.gz", head())
    other = write(tmp_path / "t1.nii.gz", np.zeros((40, 44, 30), np.float32))
    with pytest.raises(InputError, match=r"t1.nii.gz: expected the shape of .*a.nii.gz"):
        stored(tmp_path / "s", good, T1=other)
    moved = np.eye(4)
    moved[0, 3] = 3.0
    shifted = write(tmp_path / "t1b.nii.gz", head().astype(np.float32), moved)
    with pytest.raises(InputError, match=r"t1b.nii.gz: expected the grid of .*a.nii.gz.*differs by 3 mm"):
        stored(tmp_path / "s", good, T1=shifted)
    with pytest.raises(InputError, match="an image with contrast"):
        stored(tmp_path / "s", write(tmp_path / "c.nii.gz", np.zeros(SHAPE, np.int16)))
    with pytest.raises(InputError, match="no such file"):
        list_subjects(None, tmp_path / "absent.nii.gz")
    with pytest.raises(InputError, match="a file under 'T1', found no such file"):
        list_subjects(table(tmp_path, ["a.nii.gz,one,train,gone.nii.gz,,"]), None)
    with pytest.raises(InputError, match="fractions"):
        stored(tmp_path / "s", write(tmp_path / "f.nii.gz", head() + np.float32(0.4)))

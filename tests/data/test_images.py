"""Training images of scans and label maps: who is held out, which slices, what is drawn from labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.brain_labels import simplify_labels
from jaxmed.data.images import PREPROCESS, Cut, ImageData, ImageSource, list_files, read_images
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.tables import write_table
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.label_images import DEEP, FLUID, WHITE, ImageMaker, SyntheticConfig, draw_t1_means
from jaxmed.volume import Volume

pytestmark = pytest.mark.core


def sized(size, **changes):
    return dataclasses.replace(PREPROCESS, size=size, **changes)


FRAME = sized((16, 16))


def labelled(shape=(20, 18, 10)):
    """Fluid around grey matter around white matter, and skin around all."""
    places = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(place**2 for place in places))
    labels = np.select([radius < 0.4, radius < 0.6, radius < 0.75, radius < 0.85], [41, 3, 24, 508], 0)
    return labels.astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in "abcd":
        image = (labelled() > 0) * generator.uniform(50, 90, (20, 18, 10))
        nifti.write(tmp_path / "scans" / f"{name}.nii.gz", Volume.make(image.astype(np.float32), np.eye(4)))
    for name in "xy":
        nifti.write(tmp_path / "labels" / f"{name}.nii.gz", Volume.make(labelled(), np.eye(4)))
    return tmp_path


def manifest(folder, rows, columns=("path", "subject", "split", "kind")):
    write_table(folder / "table.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows])
    return folder / "table.csv"


def test_files_of_folders_are_held_out_by_kind(folder):
    listed = list_files(ImageData(labels=folder / "labels", validation=0.25), folder / "scans", 0)
    assert len(listed.scans) == 6
    assert [listed.count("train", kind) for kind in ("image", "labels")] == [3, 1]
    assert [listed.count("validation", kind) for kind in ("image", "labels")] == [1, 1]
    assert listed == list_files(ImageData(labels=folder / "labels", validation=0.25), folder / "scans", 0)


def test_a_column_decides_who_is_held_out(folder):
    rows = [
        ("scans/a.nii.gz", "p", "train", ""),
        ("scans/b.nii.gz", "q", "test", "image"),
        ("labels/x.nii.gz", "r", "validation", "labels"),
    ]
    table = manifest(folder, rows)
    listed = list_files(ImageData(manifest=table), None, 0)
    assert listed.kinds == ("image", "image", "labels") and listed.splits == ("train", "test", "validation")
    rows = [("scans/a.nii.gz", "p", "train", ""), ("scans/b.nii.gz", "", "test", "")]
    (note,) = list_files(ImageData(manifest=manifest(folder, rows)), None, 0).notes
    assert note == "1 of 2 records have no subject: each of these counts as a subject of its own."


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("scans/a.nii.gz", "p", "train", ""), ("scans/b.nii.gz", "p", "test", "")], "every subject in one split"),
        (
            [("scans/a.nii.gz", "", "train", ""), ("scans/../scans/a.nii.gz", "q", "test", "")],
            "every file in one split",
        ),
        ([("scans/a.nii.gz", "p", "trian", "")], "one of train, validation, test under 'split'"),
        ([("scans/a.nii.gz", "p", "train", "mask")], "one of image, labels under 'kind'"),
        ([("scans/a.nii.gz", "p", "test", "")], "rows with split 'train', found only test"),
        ([("scans/zz.nii.gz", "p", "train", "")], "1 of 1 missing"),
    ],
)
def test_wrong_tables_are_refused(rows, words, folder):
    with pytest.raises(InputError, match=words):
        list_files(ImageData(manifest=manifest(folder, rows)), None, 0)


def test_slices_run_over_the_head_and_labels_lose_skin_and_side(folder):
    data = ImageData(labels=folder / "labels", validation=0.0, slices=(0.2, 0.8), every=2)
    source = read_images(list_files(data, folder / "scans", 0), "train", data, FRAME, 2)
    # The head spans slices 1 to 8, without its skin 2 to 7: from 2.4 to 6.6, and from 3 to 6, every other.
    assert [source.names.count(str(folder / "scans" / f"{name}.nii.gz")) for name in "abcd"] == [3] * 4
    assert [source.names.count(str(folder / "labels" / f"{name}.nii.gz")) for name in "xy"] == [2] * 2
    first, last = source[0], source[len(source) - 1]
    assert first["voxels"].dtype == np.float16 and first["voxels"].shape == (16, 16) and not first["is_labels"]
    assert last["is_labels"] and set(np.unique(last["voxels"])) == {0, 2, 3, 24}
    assert read_images(list_files(data, folder / "scans", 0), "validation", data, FRAME, 1) is None


def test_volumes_give_patches_of_the_head(folder):
    data, frame = ImageData(validation=0.0, patches=5), sized((4, 4, 4))
    source = read_images(list_files(data, folder / "scans", 0), "train", data, frame, 1)
    assert len(source) == 20 and source.name(7).endswith("b.nii.gz")
    assert all(image.shape < (20, 18, 10) for image in source.images)
    patches = [Cut((4, 4, 4))(source[0], np.random.default_rng(seed))["voxels"] for seed in range(3)]
    assert all(patch.shape == (4, 4, 4) and patch.dtype == np.float32 for patch in patches)
    assert (patches[0] != patches[1]).any()


def test_broken_files_are_told_at_once(folder):
    for name in "ab":
        (folder / "scans" / f"{name}.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"2 of 4 broken: .*a.nii.gz.*; .*b.nii.gz"):
        read_images(list_files(ImageData(validation=0.0), folder / "scans", 0), "train", ImageData(), FRAME, 2)
    nifti.write(folder / "labels" / "y.nii.gz", Volume.make(np.full((4, 4, 4), 502, np.int16), np.eye(4)))
    with pytest.raises(InputError, match="y.nii.gz"):
        data = ImageData(labels=folder / "labels" / "y.nii.gz")
        read_images(list_files(data, None, 0), "train", data, FRAME, 1)


def test_left_and_right_are_exchanged_along_x():
    voxels = jnp.arange(12.0).reshape(4, 3)
    fields = {"voxels": voxels, "is_labels": jnp.bool_(False)}
    key = jax.random.key(3)
    np.testing.assert_array_equal(ImageMaker(None, flip=0.0)(key, fields)[..., 0], voxels)
    np.testing.assert_array_equal(ImageMaker(None, flip=1.0)(key, fields)[..., 0], voxels[::-1])
    np.testing.assert_array_equal(ImageMaker(None, axis=None, flip=1.0)(key, fields)[..., 0], voxels)


def test_drawn_images_are_dark_outside_and_of_t1_order_where_asked():
    labels = jnp.asarray(simplify_labels(labelled()[:, :, 5]))
    still = DeformationConfig(0.0, 0.0, 0.0, amplitude=0.0)
    maker = ImageMaker(SyntheticConfig(1.0, (1.0, 2.0), (0.0, 0.0), 0.0, deformation=still), flip=0.0)
    keys, kinds = jax.random.split(jax.random.key(0), 4), jnp.array([True, True, True, False])
    fields = {"voxels": jnp.broadcast_to(labels * 1.0, (4, *labels.shape)), "is_labels": kinds}
    images = jax.jit(jax.vmap(maker))(keys, fields)[..., 0]
    for image in images[:3]:
        fluid, grey, white = (float(image[labels == label].mean()) for label in (24, 3, 2))
        assert 0 < fluid < grey < white < 2
        np.testing.assert_array_equal(image[labels == 0], 0)
    assert float(jnp.abs(images[0] - images[1]).mean()) > 0.02
    np.testing.assert_array_equal(images[3], labels)  # a scan stays as it is
    means = jax.vmap(draw_t1_means)(jax.random.split(jax.random.key(1), 50))
    fluid, deep, white = (np.asarray(means)[:, list(group)].mean(1) for group in (FLUID, DEEP, WHITE))
    assert (fluid < np.asarray(means)[:, 3]).all() and (deep < white).all() and not np.asarray(means)[:, 0].any()


def test_sources_tell_themselves_apart():
    one, other = (ImageSource([np.zeros((2, 2), np.uint8)] * n, [f"{n}.nii"] * n) for n in (1, 2))
    assert repr(one) != repr(other) and len(other) == 2


def test_labels_are_drawn_finer_and_scans_stay_as_they_are(folder):
    data, frame = ImageData(labels=folder / "labels", validation=0.0, supersample=2), sized((8, 8), spacing=(2.0,))
    source = read_images(list_files(data, folder / "scans", 0), "train", data, frame, 1)
    cut, make = Cut((8, 8), 2), ImageMaker(None, 2, None)
    scan, labels = (
        jax.tree.map(jnp.asarray, cut(source[row], np.random.default_rng(0))) for row in (3, len(source) - 3)
    )
    assert scan["voxels"].shape == labels["voxels"].shape == (16, 16) and labels["is_labels"]
    np.testing.assert_allclose(make(jax.random.key(0), scan)[..., 0], source[3]["voxels"], rtol=1e-6)
    # Means of the four labels under each voxel.
    means = labels["voxels"].reshape(8, 2, 8, 2).mean((1, 3))
    np.testing.assert_allclose(make(jax.random.key(0), labels)[..., 0], means, rtol=1e-6)
    with pytest.raises(InputError, match="data.supersample: expected 1 where preprocess.spacing"):
        read_images(list_files(data, None, 0), "train", data, sized((8, 8)), 1)

"""Puzzles: the shapes are what they are called, lie within the image, and are to be found in it; files say the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import read_image
from jaxmed.io.tables import read_table, require_disjoint_subjects, resolve_paths
from jaxmed.synthesis.phantoms.puzzles import (
    FAMILIES,
    NOVEL_FAMILIES,
    TRAIN_FAMILIES,
    VALIDATION_FAMILIES,
    PuzzleConfig,
    make_puzzle,
)
from jaxmed.synthesis.phantoms.write_puzzles import COLUMNS, Counts, write_puzzle_cohort

pytestmark = pytest.mark.core
CLEAN = PuzzleConfig(radius=(0.8, 0.8), noise=0.0, bias_std=(0.0, 0.0), num_distractors=0, intensity=(1.0, 1.0))
UNEVEN = dataclasses.replace(CLEAN, bias_std=(0.5, 0.5), background=0.3)
NO_PREFIX, SOLID = (48, 40), (28, 28, 28)
COUNTS = Counts(train=4, validation=4, support=2, test=2)  # four of each family
ALL = np.repeat(np.arange(len(FAMILIES)), 4)


@functools.cache
def puzzles():
    """Images and masks of four poses of every family, drawn at once with the keys of a cohort of seed 4."""
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(4), number))(jnp.arange(len(ALL)))
    draw = functools.partial(make_puzzle, shape=NO_PREFIX, config=CLEAN)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys, jnp.asarray(ALL)))


@pytest.fixture(scope="module")
def solids(tmp_path_factory):
    """Table of a cohort of solids of one radius."""
    manifest = write_puzzle_cohort(tmp_path_factory.mktemp("solids"), 4, COUNTS, SOLID, UNEVEN)
    return read_table(manifest, required=COLUMNS)


def of(name):
    return puzzles().mask[FAMILIES.index(name) == ALL]


def elongation(mask):
    variances = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T.astype(float)))
    return np.sqrt(variances[-1] / variances[0])


def test_the_split_is_five_one_two():
    assert (len(TRAIN_FAMILIES), len(VALIDATION_FAMILIES), len(NOVEL_FAMILIES)) == (5, 1, 2)
    assert sorted((*TRAIN_FAMILIES, *VALIDATION_FAMILIES, *NOVEL_FAMILIES)) == list(range(len(FAMILIES)))


def test_every_shape_is_one_piece_wholly_within_the_image(solids):
    for mask in (*puzzles().mask, *(nifti.read(path).array > 0 for path in resolve_paths(solids, "mask"))):
        pieces = np.empty(mask.shape, np.int32)
        ndimage.label(mask, np.ones([3] * mask.ndim), output=pieces)
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.sum() - sizes.max() <= 2  # the end of a horn may be cut off by the lattice
        # Shapes end at 0.97 of their radius: no more than a tip reaches the outermost voxels.
        assert all(np.take(mask, [0, -1], axis).sum() <= 3 for axis in range(mask.ndim))


def test_flat_shapes_have_the_form_of_their_family():
    for name, low, high in (("disk", 1, 1.05), ("square", 1, 1.1), ("bar", 2.8, 3.6), ("crescent", 1.3, 3.0)):
        assert all(low <= elongation(mask) < high for mask in of(name)), name
    for name in FAMILIES:
        holes = [(ndimage.binary_fill_holes(mask) & ~mask).sum() for mask in of(name)]
        if name == "ring":
            np.testing.assert_allclose(holes, np.pi * (0.42 * 16) ** 2, rtol=0.06)
        else:
            assert not any(holes), name
    for name, folds in (("cross", 4), ("star", 5)):
        assert all(strongest_fold(mask) == folds for mask in of(name)), name


def test_flat_shapes_have_the_area_of_their_family():
    rod, core = 2 * 0.9 * 2 * 0.28, (2 * 0.28) ** 2
    areas = {
        "disk": np.pi * 0.95**2,
        "ring": np.pi * (0.96**2 - 0.42**2),
        "square": 2 * 0.95**2,
        "bar": rod,
        "cross": 2 * rod - core,
        "crescent": np.pi * 0.95**2 - lens(0.95, 0.75, 0.45),
        "star": 5 * 0.95 * 0.45 * np.sin(np.pi / 5),
    }
    for name, area in areas.items():
        np.testing.assert_allclose(of(name).sum((1, 2)), area * 16**2, rtol=0.04, err_msg=name)
    blobs = of("blob").sum((1, 2))
    assert np.mean(blobs) == pytest.approx(np.pi * (0.68 * 16) ** 2, rel=0.2)
    assert len({round(elongation(mask), 2) for mask in of("blob")}) == 4


def lens(first, second, distance):
    """Area that two circles share: of each a segment, by the law of cosines."""
    a = np.arccos((distance**2 + first**2 - second**2) / (2 * distance * first))
    b = np.arccos((distance**2 + second**2 - first**2) / (2 * distance * second))
    return first**2 * (a - np.sin(2 * a) / 2) + second**2 * (b - np.sin(2 * b) / 2)


def strongest_fold(mask):
    """Order of the rotational symmetry of a flat shape, 3 to 7: the largest Fourier part of its outline."""
    places = np.argwhere(mask) - np.argwhere(mask).mean(0)
    angle, length = np.arctan2(places[:, 1], places[:, 0]), np.hypot(*places.T)
    parts = [abs(np.sum(length**2 * np.exp(1j * n * angle))) / np.sum(length**2) for n in range(3, 8)]
    return 3 + int(np.argmax(parts))


def test_solids_have_the_volume_of_their_family(solids):
    rod, core = 2 * 0.9 * (2 * 0.28) ** 2, (2 * 0.28) ** 3
    volumes = {
        "disk": 4 / 3 * np.pi * 0.95**3,
        "ring": 2 * np.pi**2 * 0.69 * 0.27**2,
        "square": (2 * 0.95) ** 3 / 3**1.5,
        "bar": rod,
        "cross": 3 * rod - 2 * core,
        "star": 2 * 0.3 * 5 * 0.95 * 0.45 * np.sin(np.pi / 5),
    }
    radius = 0.8 * 28 / 2
    found = [int(nifti.read(path).array.sum()) for path in resolve_paths(solids, "mask")]
    for name, volume in volumes.items():
        counts = [count for count, task in zip(found, solids.column("task"), strict=True) if task == name]
        np.testing.assert_allclose(counts, volume * radius**3, rtol=0.05, err_msg=name)
    blobs = [count for count, task in zip(found, solids.column("task"), strict=True) if task == "blob"]
    assert len(set(blobs)) == 4 and np.mean(blobs) == pytest.approx(4 / 3 * np.pi * (0.68 * radius) ** 3, rel=0.25)


def test_solid_puzzles_are_nifti_files_about_the_origin(solids):
    image, mask = (nifti.read(resolve_paths(solids, column)[0]) for column in ("path", "mask"))
    nifti.require_same_grid(image, mask, "image", "mask")
    assert image.grid.shape == SOLID and image.spacing == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(image.affine[:3, 3], -13.5)
    assert image.array[mask.array == 1].mean() > 0.8 > 0.5 > image.array[mask.array == 0].mean()


def test_the_gain_is_smooth_and_values_are_clipped(solids):
    for path, mask in zip(resolve_paths(solids), resolve_paths(solids, "mask"), strict=True):
        image = nifti.read(path).array
        around = np.where(ndimage.binary_dilation(nifti.read(mask).array, iterations=2), np.nan, image)
        assert 0 <= image.min() and image.max() <= 1 and np.nanstd(around) > 0.01
        # 2 to 4 control points over 28 voxels: neighbours are alike.
        steps = np.concatenate([np.diff(np.log(around), axis=axis).ravel() for axis in range(3)])
        assert np.sqrt(np.nanmean(steps**2)) < 0.12


@pytest.mark.parametrize(
    "wrong",
    [
        {"radius": (0.5, 1.5)}, {"intensity": (0.9, 0.5)}, {"background": 0.9}, {"noise": -1.0},
        {"bias_points": (0.5, 2.0)}, {"bias_std": (0.3, 0.1)},
    ],
)  # fmt: skip
def test_impossible_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PuzzleConfig(**wrong)


def test_a_cohort_is_written_once_and_read_as_it_was_drawn(tmp_path):
    manifest = write_puzzle_cohort(tmp_path, 4, COUNTS, NO_PREFIX, CLEAN)
    table = read_table(manifest, required=COLUMNS)
    require_disjoint_subjects(table)
    assert table.column("split") == ["train"] * 20 + ["validation"] * 4 + ["support", "support", "test", "test"] * 2
    assert table.column("task") == [FAMILIES[family] for family in ALL]
    images, masks = resolve_paths(table), resolve_paths(table, "mask")
    # One by one from files, and drawn at once.
    read = np.stack([read_image(path) for path in images])
    np.testing.assert_allclose(read, puzzles().image, atol=0.5 / 255 + 1e-4)
    differing = np.stack([read_image(path) for path in masks]) != puzzles().mask
    assert differing.sum() <= 2
    times = [path.stat().st_mtime_ns for path in images]
    images[0].unlink()
    assert write_puzzle_cohort(tmp_path, 4, COUNTS, NO_PREFIX, CLEAN) == manifest
    assert [path.stat().st_mtime_ns for path in images[1:]] == times[1:] and images[0].exists()
    with pytest.raises(InputError, match="a cohort of seed 5"):
        write_puzzle_cohort(tmp_path, 5, COUNTS, NO_PREFIX, CLEAN)


@pytest.mark.parametrize(
    ("counts", "shape", "named"), [((0, 0, 0, 0), (8, 8), "counts"), ((1, 1, 1, 1), (4, 8), "shape")]
)
def test_impossible_cohorts_are_named(counts, shape, named, tmp_path):
    with pytest.raises(InputError, match=named):
        write_puzzle_cohort(tmp_path, 4, Counts(*counts), shape)

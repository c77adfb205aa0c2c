"""The road of an MRI into the networks' space and of a map back: sizes, borders, places, and what is refused."""

import jax
import numpy as np
import pytest

from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig
from jaxmed.models.published import cocolit
from jaxmed.recipes.template_space import require_template_space
from jaxmed.solvers.registration import RegistrationConfig
from jaxmed.synthesis.phantoms.cohort import centred_affine
from jaxmed.systems.cocolit.preparation import (
    ADVICE,
    MNI152,
    fit_preprocess,
    network_input,
    on_scan_grid,
    prepare,
    require_brain,
)
from jaxmed.systems.cocolit.translation import crop_latent, pad_latent
from jaxmed.volume import Grid, Volume

PREPROCESS = fit_preprocess(cocolit.MRI, MNI152, AutoencoderKlConfig())
SUVR = fit_preprocess(cocolit.SUVR, MNI152, AutoencoderKlConfig())


def test_a_scan_of_mni_space_has_the_released_sizes_and_borders():
    array = np.zeros(MNI152.shape, np.float32)
    array[60:120, 60:150, 60:120] = 50.0
    found = network_input(Volume.make(array, MNI152.affine), PREPROCESS)
    assert found.shape == PREPROCESS.size == SUVR.size == (128, 152, 128)
    # Zeros are added before values are scaled: brighter than WhiteStripe's background.
    assert found[0, 0, 0] == pytest.approx(2.015, abs=1e-3)
    assert found[64, 76, 64] == pytest.approx((50 + 49.757356) / 24.688688, rel=1e-5)
    (mean,), (std,) = SUVR.intensity.mean, SUVR.intensity.std
    assert -mean / std == pytest.approx(-0.555, abs=1e-3)


def test_latents_are_padded_in_the_middle_and_cut_back():
    latent = jax.random.normal(jax.random.key(0), (32, 38, 32, 4))
    padded = pad_latent(latent, 4)
    assert padded.shape == (32, 40, 32, 4) and not padded[:, 0].any() and not padded[:, -1].any()
    np.testing.assert_array_equal(crop_latent(padded, (32, 38, 32)), latent)
    np.testing.assert_array_equal(padded[:, 1:-1], latent)
    odd = pad_latent(latent[:, :37], 4)
    assert not odd[:, 0].any() and not odd[:, -2:].any()
    np.testing.assert_array_equal(crop_latent(odd, (32, 37, 32)), latent[:, :37])


def test_a_map_comes_back_to_the_same_places_in_mm():
    """A value that is linear in the place stays so under splines, and no voxel is moved."""
    places = PREPROCESS.input_grid(MNI152).affine
    indices = np.stack(np.meshgrid(*map(np.arange, PREPROCESS.size), indexing="ij"), -1)
    slope = np.array([0.01, -0.02, 0.015])
    values = ((indices @ places[:3, :3].T + places[:3, 3]) @ slope).astype(np.float32)
    found = on_scan_grid(values, PREPROCESS, MNI152)
    assert found.grid.shape == MNI152.shape
    np.testing.assert_array_equal(found.affine, MNI152.affine)
    own = np.stack(np.meshgrid(*map(np.arange, MNI152.shape), indexing="ij"), -1)[10:-10:17, 10:-10:17, 10:-10:17]
    expected = (own @ MNI152.affine[:3, :3].T + MNI152.affine[:3, 3]) @ slope
    np.testing.assert_allclose(found.array[10:-10:17, 10:-10:17, 10:-10:17], expected, atol=2e-3)


GRID = Grid((20, 24, 20), centred_affine((20, 24, 20), [8.0, 8.0, 8.0]))


def at(affine, shape=GRID.shape):
    return Volume.make(np.zeros(shape, np.float32), affine)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (at(np.diag([-1.0, 1, 1, 1]) @ GRID.affine), "expected the template's axes, RAS, found LAS"),
        (at(GRID.affine @ np.diag([0.5, 1, 1, 1])), "voxels of 8 x 8 x 8 mm, found 4 x 8 x 8"),
        (at(GRID.affine, (20, 24, 21)), "20 x 24 x 20 voxels, found 20 x 24 x 21"),
        (at(GRID.affine + np.eye(4)[3] * np.array([[3.0], [4], [0], [0]])), "one that lies 5 mm beside it"),
    ],
)
def test_another_space_is_refused_in_one_line(volume, message):
    with pytest.raises(InputError, match=message) as error:
        require_template_space(volume, GRID, "scan.nii.gz", ADVICE)
    assert "--preprocess" in str(error.value) and "\n" not in str(error.value)
    require_template_space(at(GRID.affine), GRID, "scan.nii.gz", ADVICE)


def ellipsoid(places, radii):
    return (np.square(places / radii).sum(-1) < 1).astype(np.float32)


def head(affine, shape=GRID.shape, skull=0.0):
    """A brain of white matter in grey matter in fluid, all off the middle of the world, and a skull around it."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    places = indices @ affine[:3, :3].T + affine[:3, 3] - np.array([4.0, -6.0, 2.0])
    rng = np.random.default_rng(0)
    mask = ellipsoid(places, [56, 70, 52])
    array = 30 * mask + 40 * ellipsoid(places, [50, 64, 46]) + 40 * ellipsoid(places - [6, 10, 0], [34, 46, 24])
    array += mask * rng.normal(0, 3.0, shape)
    return (array + skull * (1 - mask)).astype(np.float32), mask > 0


def test_a_scan_from_elsewhere_is_brought_onto_the_template_and_scaled():
    template = Volume.make(head(GRID.affine)[0], GRID.affine)
    turn = np.deg2rad(12.0)
    motion = np.array(
        [[np.cos(turn), -np.sin(turn), 0, 9], [np.sin(turn), np.cos(turn), 0, -7], [0, 0, 1.05, 5], [0, 0, 0, 1]]
    )
    array, mask = head(GRID.affine, skull=60.0)
    config = RegistrationConfig("correlation", steps=60)
    found = prepare(Volume.make(array, motion @ GRID.affine), mask, template, config=config)
    assert found.correlation is not None and found.correlation > 0.95 and not found.notes
    corners = np.array([[40.0, 0, 0, 1], [0, 50, 0, 1], [0, 0, 40, 1], [-30, -30, 20, 1]])
    distance = np.linalg.norm((corners @ np.asarray(found.matrix).T - corners @ motion.T)[:, :3], axis=1)
    assert distance.max() < 2.0  # a quarter of a voxel
    assert found.volume.grid.shape == GRID.shape and np.array_equal(found.volume.affine, GRID.affine)
    white = template.array > 100
    assert abs(float(np.median(found.volume.array[white]))) < 2 and found.volume.array.min() < -20
    assert np.mean(found.mask != head(GRID.affine)[1]) < 0.03
    with pytest.raises(InputError, match="expected a brain without its skull"):
        require_brain(array, "scan.nii.gz")


def test_the_preprocessing_of_small_weights_fits_any_grid():
    bare = Preprocess((8, 8, 8), spacing=(12.0,), intensity=Intensity("keep", mean=(1.0,), std=(2.0,)))
    found = fit_preprocess(bare, GRID, AutoencoderKlConfig(widths=(32, 32), blocks=(1, 1)))
    assert found.size == (16, 16, 16) and found.intensity == bare.intensity  # of 13.7, 16.3, 13.7 voxels

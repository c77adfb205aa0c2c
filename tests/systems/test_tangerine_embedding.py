"""Features: what each kind is, of a masked autoencoder and of a classifier, from every form a scan can have."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tangerine import SIZE, axial, classifier, cubes, masked_autoencoder, scan

from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.metrics.feature_space import DUPLICATE, find_neighbours, principal_plane
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.vit import Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.recipes.encoder_calls import view
from jaxmed.recipes.encoder_features import BASIC, features
from jaxmed.systems import tangerine
from jaxmed.volume import Volume

KINDS = BASIC
REFERENCES = Path(__file__).resolve().parents[1] / "references"
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(scope="module")
def mae():
    return masked_autoencoder()


def tokens_of(published, images, final_norm=False):
    """Tokens by the encoder alone, every patch in its place."""
    config = dataclasses.replace(published.config.encoder, final_norm=final_norm)
    return np.asarray(jax.jit(make_model(Vit(config)).apply)(published.params["encoder"], images))


def normalise(x, norm):
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def test_every_kind_of_a_masked_autoencoder_is_what_it_says(mae):
    tokens = tokens_of(mae, cubes())
    concat = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
    found = {kind: tangerine.embed(mae, cubes(), kind) for kind in KINDS}
    np.testing.assert_allclose(found["class"], tokens[:, 0], **CLOSE)
    np.testing.assert_allclose(found["pooled"], tokens[:, 1:].mean(1), **CLOSE)
    np.testing.assert_allclose(found["concat"], concat, **CLOSE)
    # The layer norm of a new head: each scan's features have mean 0 and variance 1.
    start = {"scale": np.ones(48), "bias": np.zeros(48)}
    np.testing.assert_allclose(found["pre_logits"], normalise(concat, start), atol=2e-6)
    assert np.abs(tokens - tokens_of(mae, cubes(), final_norm=True)).max() > 0.1  # the norm that is left out matters


def test_pre_logits_of_a_classifier_are_what_enters_its_head():
    published = classifier()
    concat = np.asarray(tangerine.embed(published, cubes(), "concat"))
    found = np.asarray(tangerine.embed(published, cubes(), "pre_logits"))
    np.testing.assert_allclose(found, normalise(concat, published.params["head"]["norm"]), atol=2e-6)
    logits = found @ published.params["head"]["linear"]["kernel"] + published.params["head"]["linear"]["bias"]
    np.testing.assert_allclose(jax.jit(published.model.apply)(published.params, cubes())[0], logits, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "class"])
def test_embeddings_of_classifiers_equal_those_of_the_exporter_in_pytorch(name):
    """Before any final norm; scripts/make_references.py wrote them with tests/support/torch_tangerine.py."""
    published = load_published(REFERENCES / f"tangerine_{name}.safetensors", heads=2)
    with np.load(REFERENCES / f"tangerine_{name}_embeddings.npz") as stored:
        for kind in KINDS:
            found = tangerine.embed(published, stored["image"], kind)
            np.testing.assert_allclose(found, stored[kind], atol=2e-5, rtol=0, err_msg=kind)


def test_a_head_that_pools_the_class_token_has_its_final_norm_in_pre_logits_alone():
    published = classifier(pool="class")
    raw, normed = (tokens_of(published, cubes(), final_norm=final_norm) for final_norm in (False, True))
    expected = {"class": raw[:, 0], "pooled": raw[:, 1:].mean(1), "pre_logits": normed[:, 0]}
    for kind, value in expected.items():
        np.testing.assert_allclose(tangerine.embed(published, cubes(), kind), value, **CLOSE)
    assert np.abs(raw - normed).max() > 0.1


def test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_cubes(mae):
    """Gradients against finite differences of a projection, by the weights as a pytree and by the cubes."""
    given, kind = jnp.asarray(cubes(2)), "pre_logits"
    along = np.random.default_rng(1).standard_normal(48).astype(np.float32)

    @jax.jit
    def loss(published, given):
        return (tangerine.embed_cubes(published, given, kind) @ along).mean()

    by_weights, by_cubes = jax.jit(jax.grad(loss, argnums=(0, 1)))(mae, given)
    assert isinstance(by_weights, Published) and by_weights.config == mae.config
    assert jax.tree.structure(by_weights) == jax.tree.structure(mae)
    rng, step = np.random.default_rng(0), 1e-2
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / leaf.size**0.5, mae)
    push = rng.standard_normal(given.shape).astype(np.float32) / given.size**0.5

    def difference(at):
        return float(at(step) - at(-step)) / (2 * step)

    slope = difference(lambda h: loss(jax.tree.map(lambda leaf, way: leaf + h * way, mae, direction), given))
    products = jax.tree.map(lambda gradient, way: jnp.vdot(gradient, way), by_weights, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=2e-2, atol=1e-5)
    slope = difference(lambda h: loss(mae, given + h * push))
    np.testing.assert_allclose(jnp.vdot(by_cubes, push), slope, rtol=2e-2, atol=1e-6)
    mapped = jax.jit(jax.vmap(lambda cube: tangerine.embed_cubes(mae, cube[None], kind)[0]))(given)
    np.testing.assert_allclose(mapped, tangerine.embed(mae, given, kind), atol=2e-5)


def test_the_driver_refuses_traced_arrays_and_names_the_core(mae):
    for call in (
        lambda: jax.jit(lambda given: tangerine.embed(mae, given))(cubes()),
        lambda: jax.vmap(lambda given: tangerine.embed(mae, given))(cubes()),
        lambda: jax.grad(lambda given: tangerine.embed(mae, given).sum())(cubes()),
        lambda: jax.jit(lambda published: tangerine.embed(published, cubes()))(mae),
    ):
        with pytest.raises(InputError, match=r"found one that jax traces; .*, and tangerine.embed_cubes inside"):
            call()


def test_a_batch_of_one_is_the_element_of_a_batch(mae):
    whole = tangerine.embed(mae, cubes())
    for number, cube in enumerate(cubes()):
        np.testing.assert_allclose(tangerine.embed(mae, cube), whole[number], **CLOSE)
        np.testing.assert_allclose(tangerine.embed(mae, cube[None])[0], whole[number], **CLOSE)


def test_volume_file_array_and_cube_have_the_same_features(mae, tmp_path):
    volume = scan()
    nifti.write(tmp_path / "scan.nii.gz", volume)
    np.savez(tmp_path / "scan.npz", volume=mae.preprocess(volume))
    expected = tangerine.embed(mae, mae.preprocess(volume))
    for given in (volume, tmp_path / "scan.nii.gz", str(tmp_path / "scan.npz"), volume.array):
        np.testing.assert_allclose(tangerine.embed(mae, given), expected, **CLOSE)


def test_the_published_sizes():
    config = MaeConfig(VitConfig(scan=True))
    model = view(dataclasses.replace(masked_autoencoder(), config=config, params={"encoder": None}))
    image = jax.ShapeDtypeStruct((2, 256, 256, 256, 1), np.float32)
    shapes = jax.eval_shape(model.encoder.init, jax.random.key(0))
    params = {**model.params, "encoder": shapes}
    found = jax.eval_shape(lambda p, x: features(model.encoder, model.head, p, x), params, image)
    assert {kind: found[kind].shape for kind in KINDS} == {
        "class": (2, 1024), "pooled": (2, 1024), "concat": (2, 2048), "pre_logits": (2, 2048)
    }  # fmt: skip


def test_what_is_unexpected_about_a_scan_is_a_warning(mae):
    with pytest.warns(UserWarning) as told:
        tangerine.embed(mae, Volume.make(scan().array, axial()[:, [2, 1, 0, 3]]))
    lines = [str(warning.message) for warning in told]
    assert len(lines) == 2 and all("use axes='xyz' unless" in line for line in lines)
    assert lines[0].startswith("axis D of the cube runs left-right") and lines[1].startswith("axis W")
    with pytest.warns(UserWarning, match="do not look like CT in HU"):
        tangerine.embed(mae, scan().array + 2000)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (cubes()[:, :8], r"prepared cubes \[batch, 16, 16, 16, 1\], found shape \(3, 8, 16, 16, 1\)"),
        (cubes() * 2000 - 1200, r"prepared cubes in \[0, 1\]"),
        (np.full(SIZE, -1000.0), "an image with contrast"),
        (np.full((2, 2), 0.5), "prepared cubes"),
    ],
)
def test_what_is_no_scan_is_refused(mae, given, expected):
    with pytest.raises(InputError, match=expected):
        tangerine.embed(mae, given)


# Many scans side by side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 5), (6, 40), (4, 1), (2, 3)])
def test_the_plane_holds_the_largest_spread(shape):
    rows = np.random.default_rng(1).normal(size=shape).astype(np.float32) * np.linspace(3, 1, shape[1])
    plane = principal_plane(rows)
    values = np.linalg.svd(rows.astype(np.float64) - rows.mean(0, dtype=np.float64), compute_uv=False)
    values = np.append(values, 0.0)[:2]
    np.testing.assert_allclose((plane.places**2).sum(0), values**2, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plane.places.mean(0), 0, atol=1e-9)
    centred = rows - rows.mean(0)
    assert plane.explained == pytest.approx(tuple(values**2 / (centred.astype(np.float64) ** 2).sum()), abs=1e-6)


def test_neighbours_are_those_of_all_distances(monkeypatch):
    monkeypatch.setattr("jaxmed.metrics.feature_space.BLOCK", 7)
    rows = np.random.default_rng(2).normal(size=(25, 6)) + 100.0
    rows[3] = rows[11] + 1e-7  # two files of one scan
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    typical = np.sqrt((distances**2).sum() / (25 * 24))
    np.fill_diagonal(distances, np.inf)
    found = find_neighbours(rows)
    np.testing.assert_array_equal(found.index, distances.argmin(1))
    np.testing.assert_allclose(found.distance, distances.min(1) / typical, atol=1e-9)
    assert set(np.flatnonzero(found.distance < DUPLICATE)) == {3, 11}


def test_scans_that_are_all_the_same_are_at_distance_zero():
    found, plane = find_neighbours(np.ones((3, 4))), principal_plane(np.ones((3, 4)))
    np.testing.assert_array_equal(found.distance, 0)
    assert plane.explained == (0.0, 0.0)

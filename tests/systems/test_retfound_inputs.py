"""What `jaxmed retfound` makes of odd pictures, odd folders of classes and odd weights, through the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from scan_files import only_line, rows_of
from tiny_dino import TINY_DINO3, WITH_REGISTERS, write_dino

from jaxmed.cli import main
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.images import read_image, write_png
from jaxmed.io.tables import write_table
from jaxmed.models.published.load import load_published
from jaxmed.models.vit import Vit
from jaxmed.nn.model import make_model
from jaxmed.systems import retfound
from jaxmed.systems.retfound.adaptation import PictureInput

RANDOM = np.random.default_rng(0)
# What an evaluation resizes a picture to before it cuts 28 x 28 out of it: such pictures go in as they are.
COLOUR = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)


def run(stage, out, *words):
    return main(["retfound", stage, "--preset", "smoke", "--out", str(out), "--quiet", *map(str, words)])


def features_of(run_folder, kind="pre_logits"):
    with np.load(run_folder / "outputs" / "embeddings.npz") as file:
        return dict(zip(file["id"].tolist(), file[kind], strict=True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp("weights") / "dinov2.safetensors")


# Pictures ------------------------------------------------------------------------------------------------------------


def write_turned(path):
    """Write a picture as a camera held on its side stores it."""
    turned = Image.fromarray(np.ascontiguousarray(RANDOM.integers(0, 256, (48, 32, 3), np.uint8)))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path, exif=exif, quality=95)


@pytest.fixture(scope="module")
def embedded(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    grey = COLOUR[..., 0]
    write_png(folder / "colour.png", COLOUR)
    Image.fromarray(np.dstack([COLOUR, grey])).save(folder / "alpha.png")
    write_png(folder / "grey.png", grey)
    write_png(folder / "three_greys.png", np.repeat(grey[..., None], 3, axis=2))
    write_png(folder / "deep.png", grey.astype(np.uint16) * np.uint16(257))
    inks = Image.fromarray(np.ascontiguousarray(COLOUR[::-1])).convert("CMYK")
    inks.save(folder / "inks.tif")
    inks.convert("RGB").save(folder / "of_inks.png")
    write_turned(folder / "turned.jpg")
    with Image.open(folder / "turned.jpg") as picture:
        ImageOps.exif_transpose(picture).save(folder / "upright.png")
    (folder / "cut_off.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:900])
    out = tmp_path_factory.mktemp("embedded") / "run"
    assert run("embed", out, "--input", folder, "--weights", weights) == 1
    return out


@pytest.mark.parametrize(
    "one,other",
    [("alpha", "colour"), ("grey", "three_greys"), ("deep", "grey"), ("inks", "of_inks"), ("turned", "upright")],
)
def test_pictures_of_every_form_are_what_they_show(embedded, one, other):
    found = features_of(embedded)
    np.testing.assert_allclose(found[one], found[other], atol=2e-5, rtol=0)
    assert np.abs(found[one] - found["colour" if other != "colour" else "grey"]).max() > 1e-2


def test_a_truncated_picture_fails_alone(embedded):
    (failed,) = rows_of(embedded / "outputs" / "failed.csv")
    assert failed["id"] == "cut_off" and "expected a whole image, found a damaged one" in failed["reason"]
    assert len(features_of(embedded)) == 9


# Folders of classes, and tables --------------------------------------------------------------------------------------


def tree(root, counts):
    """Write pictures, {"train/mild": 4}; 0 makes an empty folder."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for number in range(count):
            name = f"{place.replace('/', '_')}_{number}.png"
            write_png(root / place / name, RANDOM.integers(0, 256, (32, 32, 3), np.uint8))
    return root


WHOLE = {f"{split}/{name}": 4 for split in ("train", "val", "test") for name in ("mild", "none")}
FOLDERS = {
    "empty class": (WHOLE | {"val/none": 0}, "val/none: expected pictures of the class 'none', found an empty folder"),
    "missing class": (
        {place: count for place, count in WHOLE.items() if place != "test/mild"},
        "test/mild: expected pictures of the class 'mild', found no such folder",
    ),
    "one class": (
        {place: count for place, count in WHOLE.items() if place.endswith("none")},
        "expected two or more class folders, found only 'none'",
    ),
}


@pytest.mark.parametrize("mistake", FOLDERS)
@pytest.mark.parametrize("stage", ["adapt", "compare"])
def test_folders_of_classes_that_cannot_be_learnt_from_are_one_line(stage, mistake, tmp_path, capsys):
    counts, message = FOLDERS[mistake]
    words = ["--encoders", "one=random", "other=random"] if stage == "compare" else []
    assert run(stage, tmp_path / "run", "--data.manifest", tree(tmp_path / "eyes", counts), *words) == 2
    assert message in only_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_fold_of_one_class_is_one_line(split, tmp_path, capsys):
    folder = tree(tmp_path / "eyes", {"all": 12})
    rows = [
        {"path": path.name, "label": "mild" if number % 2 and fold != split else "none", "split": fold}
        for number, (path, fold) in enumerate(
            zip(sorted((folder / "all").iterdir()), ["train"] * 4 + ["validation"] * 4 + ["test"] * 4, strict=True)
        )
    ]
    write_table(folder / "all" / "eyes.csv", list(rows[0]), rows)
    words = ["--data.manifest", folder / "all" / "eyes.csv", "--encoders", "one=random", "other=random"]
    assert run("compare", tmp_path / "run", *words) == 2
    assert "class" in only_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["train/none", "test/mild", "camera/mild"])
def test_a_study_looks_at_its_pictures_before_it_starts(place, tmp_path, capsys):
    root = tree(tmp_path / "eyes", WHOLE)
    camera = tree(tmp_path / "camera", {"mild": 3, "none": 3})
    broken = sorted((camera / "mild" if place == "camera/mild" else root / place).iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:300])
    words = ["--data.manifest", root, "--data.external", f"camera={camera}", "--data.check", 1000]
    assert run("compare", tmp_path / "run", *words, "--encoders", "one=random", "other=random") == 2
    line = only_line(capsys)
    assert f"{broken}: expected a whole image" in line and not (tmp_path / "run").exists()


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["backbone.", "teacher.backbone.", "module."])
def test_prefixes_that_were_left_on_change_nothing(prefix, embedded, tmp_path):
    place = write_dino(tmp_path / "weights.safetensors", prefix=prefix)
    write_png(tmp_path / "colour.png", COLOUR)
    assert run("embed", tmp_path / "run", "--input", tmp_path / "colour.png", "--weights", place) == 0
    found = features_of(tmp_path / "run")["colour"]
    np.testing.assert_allclose(found, features_of(embedded)["colour"], atol=2e-5, rtol=0)


def test_unknown_prefixes_are_no_random_features(tmp_path, capsys):
    place = write_dino(tmp_path / "weights.safetensors", prefix="encoder_q.")
    write_png(tmp_path / "colour.png", COLOUR)
    assert run("embed", tmp_path / "run", "--input", tmp_path / "colour.png", "--weights", place) == 2
    line = only_line(capsys)
    assert "encoder_q." in line and not (tmp_path / "run").exists()


def test_a_dinov3_file_given_as_dinov2_is_told(tmp_path, capsys):
    place = write_dino(tmp_path / "v3.safetensors", TINY_DINO3, generation="dinov3")
    assert main(["weights", "show", str(place), "--family", "dinov2"]) == 2
    assert "expected weights of dinov2, found weights of dinov3: no table of positions" in only_line(capsys)


# From Python ---------------------------------------------------------------------------------------------------------


def test_features_from_python_are_those_of_the_stage(embedded, weights, tmp_path):
    """The example of five lines: weights, a file, an array of 8 bits, a batch of prepared images, another feature."""
    published = load_published(weights)
    write_png(tmp_path / "eye.png", COLOUR)
    feature = retfound.embed(published, tmp_path / "eye.png")
    batch = np.stack([published.preprocess(COLOUR / np.float32(255))] * 2)
    found = [feature, retfound.embed(published, COLOUR), *retfound.embed(published, batch)]
    for one in found:
        np.testing.assert_allclose(one, features_of(embedded)["colour"], atol=2e-5, rtol=0)
    mean = retfound.embed(published, COLOUR, "pooled")
    np.testing.assert_allclose(mean, features_of(embedded, "pooled")["colour"], atol=2e-5, rtol=0)


def test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_images(weights):
    """Gradients against finite differences of a projection, by the weights as a pytree and by the images."""
    published, rng, step = load_published(weights), np.random.default_rng(0), 1e-2
    given = jnp.asarray(rng.standard_normal((2, 28, 28, 3)), jnp.float32)
    along = jnp.asarray(rng.standard_normal(384) / 384**0.5, jnp.float32)

    @jax.jit
    def loss(published, given):
        return (retfound.embed_prepared(published, given) @ along).mean()

    by_weights, by_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(published, given)
    assert jax.tree.structure(by_weights) == jax.tree.structure(published)
    way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / leaf.size**0.5, published)
    push = jnp.asarray(rng.standard_normal(given.shape) / given.size**0.5, jnp.float32)

    def slope(at):
        return float(at(step) - at(-step)) / (2 * step)

    products = jax.tree.leaves(jax.tree.map(jnp.vdot, by_weights, way))
    expected = slope(lambda h: loss(jax.tree.map(lambda leaf, one: leaf + h * one, published, way), given))
    np.testing.assert_allclose(sum(products), expected, rtol=2e-2, atol=1e-4)
    expected = slope(lambda h: loss(published, given + h * push))
    np.testing.assert_allclose(jnp.vdot(by_images, push), expected, rtol=2e-2, atol=1e-4)
    mapped = jax.jit(jax.vmap(lambda image: retfound.embed_prepared(published, image[None])[0]))(given)
    np.testing.assert_allclose(mapped, retfound.embed_prepared(published, given), atol=2e-5)


# Further features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """Write a photograph of a disc that is off the middle."""
    rows, columns = np.ogrid[:90, :120]
    disc = (rows - 50) ** 2 + (columns - 70) ** 2 <= 35**2
    picture = np.where(disc[..., None], RANDOM.integers(60, 220, (90, 120, 3)), 2)
    path = tmp_path_factory.mktemp("eye") / "eye.png"
    write_png(path, picture.astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def looked(photograph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("registers")
    place = write_dino(folder / "registers.safetensors", WITH_REGISTERS)
    words = ["--input", photograph, "--weights", place, "--picture.crop", "disc", "--attention", "--layers", 1]
    assert run("embed", folder / "run", *words, "--kinds", "registers", "layers", "pre_logits") == 0
    return folder / "run", load_published(place)


def test_registers_and_class_tokens_of_blocks_are_features(looked, photograph):
    folder, published = looked
    found = {kind: features_of(folder, kind)["eye"] for kind in ("registers", "layers", "pre_logits")}
    assert {kind: len(one) for kind, one in found.items()} == {"registers": 4 * 384, "layers": 384, "pre_logits": 384}
    np.testing.assert_allclose(found["layers"], found["pre_logits"], atol=1e-5)
    prepared = jnp.asarray(PictureInput(crop="disc").apply(published.preprocess)(photograph))
    tokens = published.model.apply(published.params, prepared[None])
    np.testing.assert_allclose(found["registers"], np.asarray(tokens)[0, 1:5].reshape(-1), atol=2e-5)
    again = retfound.embed(published, prepared, "registers")
    np.testing.assert_allclose(again, found["registers"], atol=2e-5)


def test_attention_lies_on_the_pixels_of_the_picture(looked, photograph):
    folder, published = looked
    place = folder / "outputs" / "attention"
    prepared = jnp.asarray(PictureInput(crop="disc").apply(published.preprocess)(photograph))
    weights = make_model(Vit(WITH_REGISTERS)).apply(published.params["encoder"], prepared[None], method="attention")
    expected = np.asarray(weights)[0, :, 0, 5:].mean(axis=0)
    told = json.loads((place / "eye.json").read_text())
    assert told["sum"] == pytest.approx(float(expected.sum()), abs=1e-5) and told["sum"] < 1
    volume = nifti.read(place / "eye.nii.gz").array
    assert volume.shape == (90, 120, 1) and volume.max() == pytest.approx(expected.max(), rel=0.2)
    picture, shown = read_image(photograph), read_image(place / "eye_overlay.png")
    assert shown.shape == (90, 120, 3)
    outside = volume[..., 0] == 0
    assert outside.any() and not outside.all()
    np.testing.assert_allclose(shown[outside], picture[outside], atol=1 / 255)
    assert np.abs(shown[~outside] - picture[~outside]).mean() > 0.05
    assert "What it looks at" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--kinds", "registers"], "kinds: expected no registers, of weights without such tokens"),
        (["--kinds", "layers"], "layers: expected at most the encoder's 1 blocks, found 4"),
    ],
)
def test_features_that_an_encoder_does_not_have_are_refused(words, message, weights, photograph, tmp_path, capsys):
    assert run("embed", tmp_path / "run", "--input", photograph, "--weights", weights, *words) == 2
    assert message in only_line(capsys) and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=message.partition(":")[0]):
        retfound.embed(load_published(weights), COLOUR, words[1])


def test_a_photograph_of_1411_pixels_is_cropped_cut_and_looked_at(shared_data, weights, tmp_path):
    """A real photograph, at another size than the weights' and one that is not square."""
    path = shared_data / "fundus_photo" / "retina.jpg"
    words = ["--input", path, "--weights", weights, "--picture.crop", "disc", "--image-size", 84, 56, "--attention"]
    assert run("embed", tmp_path / "run", *words) == 0
    place = tmp_path / "run" / "outputs" / "attention"
    assert nifti.read(place / "retina.nii.gz").array.shape == (1411, 1411, 1)
    assert read_image(place / "retina_overlay.png").shape == (1411, 1411, 3)
    told = json.loads((place / "retina.json").read_text())
    assert told["constants"]["patch_grid"] == [6, 4] and told["constants"]["preprocess"]["crop"] == "disc"
    assert features_of(tmp_path / "run", "pooled")["retina"].shape == (384,)

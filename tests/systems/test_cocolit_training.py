"""All stages of CoCoLIT but translate, end to end on phantoms in one chain, and what a user can have wrong in them."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.trees import named_leaves
from jaxmed.cli import main
from jaxmed.io import nifti
from jaxmed.models.autoencoder_kl import autoencoder
from jaxmed.models.published.load import load_published
from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort
from jaxmed.systems.cocolit.networks import WeightsConfig, read_models
from jaxmed.systems.cocolit.stages import train_autoencoder, train_controlnet, train_diffusion


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def run(*words):
    return main(["cocolit", *map(str, words), "--quiet"])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluate at smoke size: makes phantoms, both autoencoders, latents, U-Net and ControlNet by itself."""
    place = tmp_path_factory.mktemp("cocolit") / "run"
    assert run("evaluate", "--preset", "smoke", "--out", place) == 0
    return place


@pytest.fixture(scope="module")
def trained(evaluated):
    return evaluated / "inputs" / "train-controlnet"


def metrics(place, name):
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def summary(place):
    return json.loads((place / "outputs" / "summary.json").read_text())


def test_autoencoders_learn_to_reconstruct(trained):
    for modality in ("mri", "suvr"):
        place = trained / "inputs" / "encode" / "inputs" / f"autoencoder_{modality}"
        errors = metrics(place, "reconstruction")
        assert np.mean(errors[-3:]) < 0.7 * errors[0]
        published = load_published(place / "outputs" / "model")
        assert published.report.kind == "autoencoder" and not published.report.missing
        (mean,) = published.preprocess.intensity.mean
        assert (mean < -40) == (modality == "mri")
        assert summary(place)["images"] == {"train": 6, "held out": 2}
        shown = {name: nifti.read(place / "outputs" / f"{name}.nii.gz").array for name in ("image", "reconstruction")}
        assert np.abs(shown["image"] - shown["reconstruction"]).mean() == pytest.approx(
            summary(place)["error"], rel=1e-3
        )
        assert "adversarial" in (place / "report.html").read_text()


def test_latents_are_means_channels_first_and_stand_in_the_released_table(trained):
    place = trained / "inputs" / "encode"
    with open(place / "outputs" / "latents.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {"split", "scan_path", "suvr_path", "scan_latent_path", "suvr_latent_path"} <= set(rows[0])
    published = load_published(place / "inputs" / "autoencoder_suvr" / "outputs" / "model")
    with np.load(place / "outputs" / rows[0]["suvr_latent_path"]) as stored:
        latent = stored["data"]
    image = published.preprocess(rows[0]["suvr_path"])
    expected = jax.jit(autoencoder(published.config).encode)(published.params, jnp.asarray(image[None]))[0][0]
    assert latent.shape == (4, 8, 8, 8)
    np.testing.assert_allclose(np.moveaxis(latent, 0, -1), expected, atol=1e-4)
    moments = summary(place)["latents"]["suvr"]
    values = np.stack([np.load(place / "outputs" / row["suvr_latent_path"])["data"] for row in rows])
    found = [values.mean(), values.std(), np.mean(np.abs(values) > 1)]
    np.testing.assert_allclose([moments[name] for name in ("mean", "std", "beyond")], found, atol=1e-5)


def test_the_unet_learns_and_the_controlnet_starts_from_it(trained):
    place = trained / "inputs" / "train-diffusion"
    losses = metrics(place, "loss")
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2])
    assert load_published(place / "outputs" / "model").report.kind == "latent-denoiser"
    assert summary(trained)["pairs"] == {"train": 6, "held out": 2}
    assert {"noise_error", "image_error"} <= set(json.loads((trained / "metrics.jsonl").read_text().splitlines()[0]))


def test_translate_reads_what_training_leaves(trained):
    models = read_models(WeightsConfig(trained / "outputs" / "models"))
    before = load_published(trained / "inputs" / "train-diffusion" / "outputs" / "model")
    for name, leaf in named_leaves(before.params).items():  # held as it was
        np.testing.assert_array_equal(leaf, named_leaves(models.unet.params)[name])
    pet = load_published(trained / "inputs" / "encode" / "inputs" / "autoencoder_suvr" / "outputs" / "model")
    for part in pet.params:
        change = largest(jax.tree.map(jnp.subtract, models.pet.params[part], pet.params[part]))
        assert (change > 0) == (part in ("decoder", "from_latent")), part
    assert largest(models.controlnet.params["after_middle"]) > 0  # it started at 0
    assert models.mri.preprocess.spacing == models.pet.preprocess.spacing == (12.0,)


def test_maps_are_scored_against_pet_beside_pix2pix_and_the_mri_of_another(evaluated):
    found, outputs = summary(evaluated), evaluated / "outputs"
    assert found["failed"] == 0 and len(found["pairs"]) == 2
    methods = ["CoCoLIT", "CoCoLIT, MRI of another", "pix2pix"]
    for pair in found["pairs"]:
        name = pair["name"]
        maps = {what: nifti.read(outputs / f"{name}_{what}.nii.gz").array for what in (
            "mri", "pet", "suvr", "spread", "difference"
        )}  # fmt: skip
        assert all(volume.shape == (16, 16, 16) for volume in maps.values()) and maps["spread"].min() >= 0
        np.testing.assert_allclose(maps["difference"], maps["suvr"] - maps["pet"], atol=1e-5)
        assert list(pair["images"]) == methods and set(pair["regions"]["cortical"]) == {*methods, "measured"}
        span = np.ptp(maps["pet"])
        error = np.mean(np.square(maps["difference"].astype(np.float64))) / span**2
        assert pair["images"]["CoCoLIT"]["mse"] == pytest.approx(error, rel=1e-3)
        assert pair["images"]["CoCoLIT"]["psnr"] == pytest.approx(-10 * np.log10(error), abs=0.01)
        assert pair["further"]["change by the MRI of another, rms"] > 0
        assert pair["further"]["bias, rms"] > 0 and pair["further"]["bias in theory, rms"] > 0
    measures = {line["measure"] for line in found["scores"]}
    assert {"ssim", "psnr", "mse", "cortical mae", "cortical bias"} <= measures
    errors = {line["method"]: line["estimate"] for line in found["scores"] if line["measure"] == "mse"}
    assert errors["CoCoLIT"] == pytest.approx(np.mean([pair["images"]["CoCoLIT"]["mse"] for pair in found["pairs"]]))
    page = (evaluated / "report.html").read_text()
    assert all(word in page for word in ("Synthesised", "Spread", "Difference", "pix2pix", "1.326"))


def test_the_presets_paper_are_the_published_recipe():
    """Batches, rates and epochs of the three stages."""
    paper = train_autoencoder.paper(), train_diffusion.paper(), train_controlnet.paper()
    assert [one.train.epochs for one in paper] == [200, 500, 300]
    assert [one.train.loader.batch_size for one in paper] == [16, 16, 2]
    assert [one.train.optimizer.peak_lr for one in paper] == [2e-4, 2.5e-5, 2.5e-5]
    assert [one.train.optimizer.weight_decay for one in paper] == [0, 0.01, 0.01]
    assert paper[0].train.accumulation == 16 and paper[0].train.optimizer.end_lr == 2e-5
    loss = paper[0].loss
    assert (loss.divergence, loss.perceptual, loss.adversarial) == (1e-7, 1e-3, 0.025) and not loss.match_release
    assert paper[2].image_loss == "wisl" and paper[2].init_from_unet and paper[2].remat_decoder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_amyloid_cohort(tmp_path_factory.mktemp("pairs"), 0, 2, (12, 12, 12), 16.0)


def spoiled(pairs, **changes):
    """Write the table with other cells in its first row, or columns left out (None)."""
    with open(pairs) as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in rows[0] if changes.get(name, "") is not None]
    rows[0] |= {name: value for name, value in changes.items() if value is not None}
    place = pairs.parent / "spoiled.csv"
    with open(place, "w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return place


@pytest.mark.core
@pytest.mark.parametrize(
    ("stage", "changes", "words", "said"),
    [
        ("train-autoencoder", {"scan_path": None}, [], "a column 'scan_path'"),
        ("train-autoencoder", {"scan_path": "none.nii.gz"}, [], "none.nii.gz"),
        ("train-autoencoder", {"split": "training"}, [], "one of train, validation, test under 'split'"),
        ("train-autoencoder", {"split": "valid"}, [], "records of split train"),
        ("train-autoencoder", {}, ["--size", "20", "24", "25"], "three multiples of 2"),
        ("train-autoencoder", {}, ["--weights", "nothing"], "nothing"),
        ("encode", {}, [], "weights.mri: expected the autoencoder of MRI"),
        ("train-diffusion", {}, [], "a column 'suvr_latent_path'"),
        ("train-diffusion", {"suvr_latent_path": "mri/pair_0000.nii.gz"}, [], "a latent: a .npz file"),
        ("train-controlnet", {}, [], "a column 'scan_latent_path'"),
        ("train-autoencoder", {}, ["--perceptual", "nothing"], "nothing"),
        ("evaluate", {}, ["--split", "test"], "pairs of split test"),
        ("evaluate", {}, [], "weights.mri: expected the autoencoder of MRI"),
    ],
)
def test_mistakes_are_told_in_one_line(stage, changes, words, said, pairs, tmp_path, capsys):
    if "suvr_latent_path" in changes:
        with open(pairs) as file:
            rows = list(csv.DictReader(file))
        place = pairs.parent / "latents.csv"
        place.write_text(
            "suvr_latent_path,split\n" + "".join(f"{changes['suvr_latent_path']},train\n" for _ in rows[:1])
        )
    else:
        place = spoiled(pairs, **changes)
    out = tmp_path / "run"
    assert run(stage, "--preset", "smoke", "--data.manifest", place, *words, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxmed: ") and error.count("\n") == 1 and said in error, error
    assert not (out / "metrics.jsonl").exists()

"""Tiny TANGERINE models with weights that are no start values, and scans as files."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxmed.arrays.position import sincos
from jaxmed.arrays.task import Task
from jaxmed.arrays.trees import map_named
from jaxmed.io import nifti
from jaxmed.models.heads import Classifier, ClassifierConfig, HeadConfig
from jaxmed.models.mae import Mae, MaeConfig
from jaxmed.models.published.load import ImportReport, Published, published_record
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig
from jaxmed.nn.model import make_model
from jaxmed.train.checkpoint import export_parameters
from jaxmed.volume import Volume

SIZE = (16, 16, 16)
VIT = VitConfig(SIZE, (4, 4, 4), width=24, depth=2, heads=2, hidden=48)
MAE = MaeConfig(VIT, decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_hidden=48)
BINARY = Task("binary", ("nodule",))
CLASSES = Task("multiclass", ("healthy", "nodule", "emphysema"))
LABELS = Task("multilabel", ("nodule", "emphysema"))
VALUES = Task("regression", ("age",), (60.0,), (10.0,))


def classifier(task=CLASSES, **head) -> Published:
    encoder = dataclasses.replace(VIT, final_norm=head.get("pool") == "class")
    config = ClassifierConfig(encoder, HeadConfig(len(task.names), **head))
    return _published(make_model(Classifier(config)), config, "classifier", task)


def masked_autoencoder() -> Published:
    noise = np.zeros((1, VIT.num_tokens), np.float32)
    return _published(make_model(Mae(MAE)), MAE, "mae", None, noise)


def _published(model, config, kind, task, *inputs) -> Published:
    # Drawn here, by shape: to compile an initialiser takes longer than most tests.
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *SIZE, 1), np.float32), *inputs)
    generator = np.random.default_rng(0)

    def draw(name, leaf):
        if name.endswith("position"):
            return sincos(leaf.shape[-1], VIT.grid)
        if name.endswith("kernel"):
            return (generator.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])).astype(np.float32)
        # Norms and biases are not at their start values, or half of the mistakes could not be seen.
        centre = 1.0 if name.endswith(("scale", "var")) else 0.0
        return (centre + 0.2 * generator.standard_normal(leaf.shape)).astype(np.float32)

    report = ImportReport("tangerine", kind, (), (), (), "for tests only")
    return Published(model, map_named(draw, shapes), dataclasses.replace(PREPROCESS, size=SIZE), config, report, task)


def export(published: Published, folder: Path) -> Path:
    export_parameters(folder, published.params, published_record(published))
    return folder


def cubes(number=3, seed=0):
    return np.random.default_rng(seed).random((number, *SIZE, 1)).astype(np.float32)


def axial(shape=(20, 18, 9), spacing=(2.0, 2.5, 5.0)):
    """The affine of slices from the feet up, rows from the front to the back, columns from right to left: LPS."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [30.0, 20.0, -100.0]
    return affine


def scan(seed=0, shape=(20, 18, 9), affine=None) -> Volume:
    array = np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)
    return Volume.make(array, axial() if affine is None else affine)


def write_scans(folder: Path, number=5) -> Path:
    """Write scans of different shapes, and a manifest with labels."""
    rows = ["path,subject,label,split"]
    for seed in range(number):
        nifti.write(folder / f"scan_{seed}.nii.gz", scan(seed, (20 - seed, 18, 9 + seed)))
        rows.append(f"scan_{seed}.nii.gz,s{seed},{('healthy', 'nodule', 'emphysema')[seed % 3]},test")
    (folder / "scans.csv").write_text("\n".join(rows) + "\n")
    return folder / "scans.csv"

"""Toy train: a linear autoencoder on phantom volumes, through every part of the engine."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from toy import EDGE, RULES, init

from jaxmed.data.augment import AugmentConfig, augment
from jaxmed.data.intensity import Intensity
from jaxmed.data.loader import LoaderConfig, evaluation_batches
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import FileSource, SubsetSource
from jaxmed.data.splits import SPLITS, label_fractions, split_subjects, write_split_table
from jaxmed.files import write_text
from jaxmed.io import nifti
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.classification import score
from jaxmed.nn.model import Network
from jaxmed.recipes.training import TrainConfig, TrainData, run_training
from jaxmed.report.figures import curves
from jaxmed.report.page import Section, render
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start
from jaxmed.volume import Volume

AUGMENTATION = AugmentConfig(
    flip_axes=(0,), bias_probability=0.5, bias_strength=0.1, gamma_probability=0.2, intensity_probability=0.3,
    noise_probability=0.2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    subjects: int = 24
    fraction: float = 1.0
    train: TrainConfig = TrainConfig(
        OptimizerConfig(peak_lr=1e-2, warmup_steps=3),
        LoopConfig(steps=30, log_every=5, save_every=10, evaluate_every=10, best="error", best_is="smallest"),
        LoaderConfig(batch_size=8),
        MeshConfig(data=1),
        accumulation=2,
        ema_decay=0.9,
    )


def write_phantoms(folder: Path, subjects: int) -> Path:
    """Write two noisy balls per subject, large ones for label 1, as NIfTI files with a manifest."""
    generator = np.random.default_rng(0)
    place = np.linspace(-1, 1, EDGE)
    radius = np.sqrt(place[:, None, None] ** 2 + place[None, :, None] ** 2 + place[None, None, :] ** 2)
    rows = []
    for number in range(2 * subjects):
        label = number // 2 % 2
        array = (radius < (0.6, 1.2)[label]) + 0.05 * generator.standard_normal(radius.shape)
        nifti.write(folder / f"{number}.nii.gz", Volume.make(array.astype(np.float32), np.diag([2.0, 2, 2, 1])))
        rows.append({"path": f"{number}.nii.gz", "subject": f"s{number // 2}", "label": label})
    write_table(folder / "scans.csv", ("path", "subject", "label"), rows)
    return folder / "scans.csv"


def prepare(fields, generator):
    preprocess = Preprocess((EDGE,) * 3, intensity=Intensity("window", window=(0.0, 1.0)))
    return {"image": preprocess(fields["image"]), "label": fields["label"]}


def loss(params, keys, batch):
    images = jax.vmap(lambda key, image: augment(key, image, AUGMENTATION)[0])(keys, batch["image"])
    return jnp.mean(errors(params, keys, {"image": images})["error"]), {}


def errors(params, keys, batch):
    images = batch["image"]
    return {"error": jnp.mean(jnp.square(reconstruct(params, images) - images.reshape(len(images), -1)), axis=1)}


def encode(params, images):
    return images.reshape(len(images), -1) @ params["encoder"]["kernel"] + params["encoder"]["bias"]


def reconstruct(params, images):
    return encode(params, images) @ params["decoder"]["kernel"] + params["decoder"]["bias"]


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    start(folder)
    seed = config.train.seed
    table = read_table(write_phantoms(folder.path / "inputs", config.subjects), ("path", "subject", "label"))
    subjects, labels = table.column("subject"), np.asarray(table.integers("label"))
    splits = split_subjects(subjects, (0.5, 0.25, 0.25), seed, list(labels))
    write_split_table(folder.outputs / "splits.csv", table, splits)
    table = read_table(folder.outputs / "splits.csv")
    rows = {name: np.flatnonzero(np.array(table.column("split")) == name) for name in SPLITS}
    training = rows["train"]
    subset = label_fractions([subjects[row] for row in training], list(labels[training]), (config.fraction,), seed)
    training = training[subset[config.fraction]]
    values = {"label": np.array(table.floats("label"), np.float32)}
    source = FileSource({"image": tuple(map(Path, table.column("path")))}, values)

    def read(name):
        index = training if name == "train" else rows[name]
        batches = list(evaluation_batches(SubsetSource(source, index), prepare, config.train.loader))
        kept = np.concatenate([batch["weight"] for batch in batches]) > 0
        return tuple(np.concatenate([batch[field] for batch in batches])[kept] for field in ("image", "label"))

    data = TrainData(SubsetSource(source, training), SubsetSource(source, rows["validation"]), prepare)
    log = Log(folder.path, folder.options.quiet)
    network = Network(init, reconstruct, RULES)
    state = run_training(config.train, network, loss, data, folder=folder, log=log, score=errors)

    export_parameters(folder.outputs / "encoder", state.params["encoder"], {"family": "toy"})
    (images, known), (tests, truth) = read("train"), read("test")
    codes = np.asarray(encode(state.params, images))
    axis = codes[known > 0].mean(0) - codes[known == 0].mean(0)
    middle = 0.5 * (codes[known > 0].mean(0) + codes[known == 0].mean(0))
    probabilities = 1 / (1 + np.exp(-(np.asarray(encode(state.params, tests)) - middle) @ axis))
    metrics = score(truth.astype(np.int64), probabilities, "binary")
    lines = [line for line in log.read_metrics() if "loss" in line]
    series = {"loss": (np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines]))}
    figure = curves(series, xlabel="step", ylabel="loss", caption="Training.")
    write_text(folder.report, render("Toy", "A linear autoencoder.", sections=[Section("Training", [figure])]))
    final = log.read_metrics()[-1]["evaluation/error"]
    return metrics | {"error": final, "first": lines[0]["loss"], "last": lines[-1]["loss"]}

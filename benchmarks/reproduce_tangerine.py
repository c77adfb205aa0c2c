"""Test every sentence of arXiv:2507.01881's abstract that can be tested on the data there is.

Small masked autoencoders are pre-trained without labels and fine-tuned; the same model from random weights, with the
same recipe, labels and order, is the baseline. Three sets:

- chests: phantom chest CTs at 32^3, four findings, and the same findings on another scanner (noise, field of view);
- x-rays: a subset of PneumoniaMNIST, 28 x 28, five seeds (CC BY 4.0, Yang et al. 2023, Kermany et al. 2018);
- sarcoma: crops of five patients' CTs, tumour or not, each patient left out once (CC BY 3.0, Vallieres et al. 2015).

What counts as "holds" was fixed before the first run; every interval is Student's 95 % interval over seeds (over
patients for the sarcomas), and a sentence holds where the whole interval lies on its side, in all sets that it is
tested on:

- fast convergence: the pre-trained model needs fewer steps to 95 % of the baseline's best validation AUROC;
- label efficiency: with 10 % of the labels its test AUROC is not below the baseline's with all of them;
- wide range of tasks with limited labels: with 10 % of the labels it is above the baseline with the same 10 %;
- generalises: on the other scanner its AUROC is above the baseline's.

The table goes to benchmarks/results/reproduce_tangerine.md, the figures to reproduce_tangerine.json beside it. Real
sets are looked for in JAXMED_DATA; what is not there is not tested, and the table names what it was tested on.

    JAXMED_DATA=/path/to/data python benchmarks/reproduce_tangerine.py --size cpu
"""

import dataclasses
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from jaxmed.arrays.task import Task
from jaxmed.data.augment import draw_flips, flip
from jaxmed.data.loader import LoaderConfig
from jaxmed.data.records import ArraySource, SubsetSource
from jaxmed.data.splits import label_fractions
from jaxmed.files import write_json, write_text
from jaxmed.metrics.classification import auroc
from jaxmed.metrics.convergence import first_reach, read_curve
from jaxmed.metrics.statistics import mean_interval
from jaxmed.models.heads import HeadConfig
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.adapt import AdaptConfig, adapt, score, take_encoder
from jaxmed.recipes.pretrain_mae import pretrain
from jaxmed.recipes.training import TrainConfig, TrainData
from jaxmed.synthesis.phantoms.chest import FINDINGS, ChestConfig, make_chest
from jaxmed.train.log import Log
from jaxmed.train.loop import LoopConfig
from jaxmed.train.mesh import MeshConfig
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, RunOptions, open_run, start
from jaxmed.versions import software_versions

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("pretrained", "scratch")
FEW = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        chests: To pre-train on, a tenth and all of which have labels; a third more to select on, and to test on.
        elsewhere: Chests of the other scanner.
        pretrain_steps: Of pre-training, batch 16.
        steps: Of fine-tuning, batch 16; the same for few and for all labels.
        seeds: Repetitions on chests and x-rays.
        xrays: Of PneumoniaMNIST to train on; 0 takes all.
        crops: Of each class and patient.
    """

    chests: int
    elsewhere: int
    pretrain_steps: int
    steps: int
    seeds: int
    xrays: int
    crops: int


SIZES = {
    "smoke": Size(60, 20, 40, 12, 2, 200, 4),
    "cpu": Size(600, 300, 4500, 200, 5, 0, 24),
}


class Arrays(NamedTuple):
    """Images in [0, 1], [record, *space, 1], and one label per record."""

    image: np.ndarray
    label: np.ndarray

    def source(self, rows: np.ndarray | None = None) -> Any:
        """Return the records, or some of them, as the recipes read them."""
        whole = ArraySource({"image": self.image, "target": self.label[:, None].astype(np.float32)})
        return whole if rows is None else SubsetSource(whole, rows)


class Cell(NamedTuple):
    """What a fine-tuning gives: AUROC on each test set, and its validation curve."""

    scores: dict[str, float]
    curve: Any


@dataclasses.dataclass(frozen=True)
class Flip:
    """Flips of a volume along some axes. Hashable, so that runs share a program."""

    axes: tuple[int, ...]
    probability: float = 0.2

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Return the image, flipped or not."""
        return flip(image, draw_flips(key, image.ndim - 1, self.axes, self.probability))


def main(size: Literal["smoke", "cpu"] = "smoke", out: Path = ROOT / "benchmarks" / "results") -> None:
    """Run the experiments and write the table.

    Args:
        size: "smoke" only shows that everything runs.
        out: Folder of the table and the figures.
    """
    began = time.monotonic()
    settings, data = SIZES[size], Path(os.environ.get("JAXMED_DATA", ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = {"chests": on_chests(settings, work)}
        if (data / "pneumoniamnist_subset").is_dir():
            found["x-rays"] = on_xrays(settings, work, data / "pneumoniamnist_subset" / "pneumonia_trainval.npz")
        if (data / "sts_mr_pet_ct").is_dir():
            found["sarcoma"] = on_sarcoma(settings, work, data / "sts_mr_pet_ct")
    seconds = time.monotonic() - began
    table = render(found, size, seconds)
    print(table)
    write_text(out / "reproduce_tangerine.md", table)
    write_json(
        out / "reproduce_tangerine.json",
        {"size": size, "seconds": seconds, "versions": software_versions(), "results": found},
    )


# Experiments ---------------------------------------------------------------------------------------------------------


def on_chests(size: Size, work: Path) -> dict[str, Any]:
    """Four findings on phantom chests, each a task; the same on another scanner."""
    third = size.chests // 3
    images, flags = make_chests(size.chests + 2 * third, 0, ChestConfig(severity=(0.5, 1.0)))
    others, other_flags = make_chests(
        size.elsewhere, 1, ChestConfig(severity=(0.5, 1.0), noise=40.0, field_of_view=(350.0, 350.0, 330.0))
    )
    train, validation = np.arange(size.chests), np.arange(size.chests, size.chests + third)
    test = np.arange(size.chests + third, len(images))
    encoder = VitConfig((32,) * 3, (8,) * 3, width=96, depth=3, heads=3, hidden=384, patch_gain=8.0)
    start = pretrain_on(size, work / "chests", encoder, Arrays(images[train], flags[train, 0]), (1, 2))
    found: dict[str, Any] = {}
    for column, finding in enumerate(FINDINGS):
        here, there = Arrays(images, flags[:, column]), Arrays(others, other_flags[:, column])
        tests = {"here": here.source(test), "elsewhere": there.source()}
        draws = [nested(here.label[train], seed) for seed in range(size.seeds)]
        found[finding] = [
            compare_arms(
                size, work / finding / str(seed), encoder, start, here, draw, validation, tests, (1, 2), seed
            )
            for seed, draw in enumerate(draws)
        ]  # fmt: skip
    return found


def on_xrays(size: Size, work: Path, path: Path) -> dict[str, Any]:
    """Pneumonia or not on 28 x 28 chest x-rays; the file's own validation images are the test."""
    with np.load(path) as content:
        pool, labels = content["train_images"], content["train_labels"][:, 0]
        tests, test_labels = content["val_images"], content["val_labels"][:, 0]
    chosen = np.random.default_rng(0).permutation(len(pool))[: size.xrays or len(pool)]
    pool, labels = pool[chosen], labels[chosen]
    image = np.concatenate([pool, tests])[..., None].astype(np.float32) / 255
    whole = Arrays(image, np.concatenate([labels, test_labels]).astype(np.int64))
    cut = len(pool) * 4 // 5
    validation, test = np.arange(cut, len(pool)), np.arange(len(pool), len(image))
    encoder = VitConfig((28, 28), (4, 4), channels=1, width=96, depth=3, heads=3, hidden=384, patch_gain=8.0)
    start = pretrain_on(size, work / "xrays", encoder, Arrays(image[:cut], whole.label[:cut]), (1,))
    runs = [
        compare_arms(
            size, work / "xray" / str(seed), encoder, start, whole, nested(whole.label[:cut], seed), validation,
            {"here": whole.source(test)}, (1,), seed,
        )
        for seed in range(size.seeds)
    ]  # fmt: skip
    return {"pneumonia": runs}


def on_sarcoma(size: Size, work: Path, data: Path) -> dict[str, Any]:
    """Tumour or not in 40 mm crops of CT, one patient left out, another to select on; all others pre-train."""
    crops = load_crops(data, work / "crops", size.crops)
    patients = sorted(set(crops["subject"]))
    encoder = VitConfig((32,) * 3, (8,) * 3, width=96, depth=3, heads=3, hidden=384, patch_gain=8.0)
    whole = Arrays(crops["image"], crops["label"])
    runs = []
    for number, patient in enumerate(patients):
        selector = patients[(number + 1) % len(patients)]
        train = np.flatnonzero(~np.isin(crops["subject"], [patient, selector]))
        validation, test = (np.flatnonzero(crops["subject"] == name) for name in (selector, patient))
        start = pretrain_on(
            size, work / "sarcoma" / patient, encoder, Arrays(whole.image[train], whole.label[train]), (1, 2)
        )
        draw = nested(whole.label[train], number)
        draw = {fraction: train[rows] for fraction, rows in draw.items()}
        runs.append(
            compare_arms(
                size, work / "tumour" / patient, encoder, start, whole, draw, validation,
                {"here": whole.source(test)}, (1, 2), number,
            )
        )  # fmt: skip
    return {"tumour": runs}


def compare_arms(
    size: Size, work: Path, encoder: VitConfig, start: Any, data: Arrays, draw: dict[float, np.ndarray],
    validation: np.ndarray, tests: dict[str, Any], flips: tuple[int, ...], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune both arms with few and with all labels, and return scores and steps to a level."""
    row: dict[str, Any] = {}
    for fraction, rows in draw.items():
        cells = {
            arm: fine_tune(
                size, work / f"{arm}-{fraction}", encoder, start if arm == "pretrained" else None, data.source(rows),
                data.source(validation), tests, flips, seed,
            )
            for arm in ARMS
        }  # fmt: skip
        level = 0.95 * cells["scratch"].curve.best
        for arm, cell in cells.items():
            steps = first_reach(cell.curve, level).epochs
            row[f"{arm} {fraction:g}"] = {**cell.scores, "steps": size.steps if steps is None else steps}
    return row


def pretrain_on(size: Size, work: Path, encoder: VitConfig, data: Arrays, flips: tuple[int, ...]) -> Any:
    """Pre-train a masked autoencoder without labels and return its encoder for the classifier."""
    model = MaeConfig(encoder, decoder_width=48, decoder_depth=2, decoder_heads=3, decoder_hidden=192)
    optimizer = OptimizerConfig(peak_lr=2e-3, b2=0.95, weight_decay=0.05, warmup_steps=size.pretrain_steps // 10)
    loop = LoopConfig(size.pretrain_steps, log_every=100, save_every=0)
    config = TrainConfig(optimizer, loop, LoaderConfig(16), MeshConfig(data=1))
    folder = make_run(work, config)
    params, _ = pretrain(
        config,
        masked_model(model),
        TrainData(data.source(), None, image_only),
        folder=folder,
        log=Log(folder.path, quiet=True),
        augment=Flip(flips),
    )
    return take_encoder(params, vit_encoder(dataclasses.replace(encoder, final_norm=False)), "pre-trained")


def fine_tune(
    size: Size, work: Path, encoder: VitConfig, start_from: Any, train: Any, validation: Any, tests: dict[str, Any],
    flips: tuple[int, ...], seed: int,
) -> Cell:  # fmt: skip
    """Fine-tune a classifier, keep the parameters of best validation AUROC, and score the test sets."""
    optimizer = OptimizerConfig(
        peak_lr=1e-3, end_lr=1e-5, weight_decay=0.05, layer_decay=0.75, warmup_steps=size.steps // 20
    )
    every = max(size.steps // 10, 1)
    loop = LoopConfig(size.steps, log_every=every, save_every=0, evaluate_every=every)
    train_config = TrainConfig(optimizer, loop, LoaderConfig(16), MeshConfig(data=1), seed=seed)
    config = AdaptConfig(train_config, evaluate_epochs=0, select="auroc")
    model = vit_encoder(dataclasses.replace(encoder, final_norm=False))
    folder = make_run(work, config)
    adapted = adapt(
        config, model, HeadConfig(1), Task(), TrainData(train, validation, as_stored), folder=folder,
        log=Log(folder.path, quiet=True), augment=Flip(flips), start=start_from,
    )  # fmt: skip
    scores = {}
    for name, source in tests.items():
        logits = score(config, model, adapted.head, adapted.params, source, as_stored)[:, 0]
        truth = np.array([source[row]["target"][0] for row in range(len(source))]).astype(np.int64)
        scores[name] = float(auroc(truth, logits))
    return Cell(scores, read_curve(adapted.history, "auroc", 1.0))


def make_run(work: Path, config: object) -> RunFolder:
    """Make the folder that a recipe writes its checkpoints to."""
    folder = open_run("tangerine", "reproduction", config, RunOptions(work, quiet=True))
    start(folder)
    return folder


def image_only(fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
    """Return what pre-training looks at."""
    return {"image": np.asarray(fields["image"], np.float32)}


def as_stored(fields: dict[str, Any], generator: object = None) -> dict[str, Any]:
    """Return a record that is ready."""
    return {"image": np.asarray(fields["image"], np.float32), "target": fields["target"]}


def nested(labels: np.ndarray, seed: int) -> dict[float, np.ndarray]:
    """Return a tenth of the records, by class, and all of them."""
    names = [str(row) for row in range(len(labels))]
    return dict(label_fractions(names, labels.tolist(), (FEW, 1.0), seed))


# Data ----------------------------------------------------------------------------------------------------------------


def make_chests(count: int, seed: int, config: ChestConfig) -> tuple[np.ndarray, np.ndarray]:
    """Make phantom chests, each finding in half of them, as a model sees them."""
    flags = np.random.default_rng(seed).random((count, len(FINDINGS))) < 0.5
    scan = jax.jit(functools.partial(make_chest, shape=(32, 32, 32), config=config))
    keys = jax.random.split(jax.random.key(seed), count)
    arrays = np.stack([np.asarray(scan(key, flag).array) for key, flag in zip(keys, flags, strict=True)])
    window = np.clip((arrays.transpose(0, 3, 2, 1) + 1200) / 2000, 0, 1)
    return window[..., None].astype(np.float32), flags.astype(np.int64)


def load_crops(data: Path, out: Path, number: int) -> dict[str, np.ndarray]:
    """Cut the crops and bring each to 32^3 as TANGERINE's preprocessing does."""
    spec = importlib.util.spec_from_file_location("prepare_sts_crops", ROOT / "scripts" / "prepare_sts_crops.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [
        row
        for number_of, folder in enumerate(sorted(data.glob("STS_*")))
        for row in script.cut_patient(folder, out, 40.0, number, np.random.default_rng(number_of))
    ]
    prepare: Callable[[Path], np.ndarray] = dataclasses.replace(PREPROCESS, size=(32, 32, 32))
    return {
        "image": np.stack([prepare(out / row["path"]) for row in rows]),
        "label": np.array([row["label"] for row in rows], np.int64),
        "subject": np.array([row["subject"] for row in rows]),
    }


# The table -----------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """Differences between arms over repetitions; positive where a sentence is right."""

    name: str
    values: np.ndarray
    unit: str


def difference(found: dict[str, Any], left: str, right: str, measure: str) -> dict[str, np.ndarray]:
    """Return per task the differences `left` minus `right` of a measure over its runs, where both have it."""
    return {
        f"{group}, {task}": np.array([run[left][measure] - run[right][measure] for run in runs])
        for group, tasks in found.items()
        for task, runs in tasks.items()
        if measure in runs[0][left]
    }


def judge(differences: dict[str, np.ndarray], *, allow_equal: bool = False) -> tuple[str, str]:
    """Return the verdict and the figures: mean difference with its interval, task by task."""
    lines, right = [], []
    for name, values in differences.items():
        middle, low, high = mean_interval(values)[:3]
        right.append(low >= 0 if allow_equal else low > 0)
        lines.append(f"{name}: {middle:+.3g} [{low:+.3g}, {high:+.3g}]")
    verdict = "holds" if all(right) else "does not hold" if not any(right) else f"holds in {sum(right)} of {len(right)}"
    return verdict, "<br>".join(lines)


def means_of(found: dict[str, Any], arm: str, measure: str = "here") -> str:
    """Return mean scores of an arm, task by task."""
    return "; ".join(
        f"{task} {np.mean([run[arm][measure] for run in runs]):.3f}"
        for tasks in found.values()
        for task, runs in tasks.items()
        if measure in runs[0][arm]
    )


def render(found: dict[str, Any], size: str, seconds: float) -> str:
    """Return the table in Markdown."""
    few, every = f"{FEW:g}", "1"
    faster = {
        name: -values for name, values in difference(found, f"pretrained {every}", f"scratch {every}", "steps").items()
    }
    rows = [
        ("Designed for broad accessibility and rapid adaptation, TANGERINE can be fine-tuned off the shelf for a wide "
         "range of disease-specific tasks with limited computational resources and training data.",
         *judge(difference(found, f"pretrained {few}", f"scratch {few}", "here")),
         "no figure", "AUROC with 10 % of the labels, minus scratch with the same"),
        ("Relative to models trained from scratch, TANGERINE demonstrates fast convergence during fine-tuning, thereby "
         "requiring significantly fewer GPU hours,",
         *judge(faster), "no figure", "steps saved until 95 % of the best validation AUROC of scratch, all labels"),
        ("and displays strong label efficiency, achieving comparable or superior performance with a fraction of "
         "fine-tuning data.",
         *judge(difference(found, f"pretrained {few}", f"scratch {every}", "here"), allow_equal=True),
         "no figure", "AUROC with 10 % of the labels, minus scratch with all"),
        ("while generalising robustly across diverse clinical centres.",
         *judge({**difference(found, f"pretrained {every}", f"scratch {every}", "elsewhere")}),
         "no figure", "AUROC on the other scanner with all labels, minus scratch; phantoms, not centres"),
        ("TANGERINE achieves state-of-the-art performance across 14 disease classification tasks",
         "cannot be tested here", "the tasks' data and the 98,000 scans are not public", "no figure", ""),
        ("Pretrained using self-supervised learning on over 98,000 thoracic LDCTs",
         "cannot be tested here", "a statement about the authors' data", "98,000", ""),
        ("a computationally frugal, open-source vision foundation model; modest computational requirements",
         "cannot be tested here", "no accelerator; the CPU step is in RESULTS.md (mae3d_step)", "no figure", ""),
    ]  # fmt: skip
    lines = [
        "# arXiv:2507.01881 (TANGERINE): sentences of the abstract, tested",
        "",
        f"`python benchmarks/reproduce_tangerine.py --size {size}`, {seconds / 60:.0f} minutes on this machine's CPU. "
        "Small models on phantoms, x-rays and crops: comparable in direction, not in value. Intervals are Student's "
        "95 %, over seeds, or over patients (sarcoma).",
        "",
        "| sentence | verdict | our figure | what it is | published |",
        "|---|---|---|---|---|",
        *(f"| {text} | {verdict} | {figure} | {what} | {told} |" for text, verdict, figure, told, what in rows),
        "",
        "Mean AUROC on the test sets:",
        "",
        "| arm, share of labels | tasks | another scanner |",
        "|---|---|---|",
        *(
            f"| {arm}, {fraction} | {means_of(found, f'{arm} {fraction}')} "
            f"| {means_of(found, f'{arm} {fraction}', 'elsewhere')} |"
            for arm in ARMS for fraction in (few, every)
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)

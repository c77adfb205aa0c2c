"""ProFound quality-study: how many good images fine-tuning needs: quality x labels x arm x seed, with a conclusion."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.types import Params
from jaxmed.config import Number, Seed, Share, checked, to_record
from jaxmed.data.cohort import read_labelled_sets
from jaxmed.data.inputs import check_scans
from jaxmed.data.intensity import Intensity
from jaxmed.data.labels import LabelConfig
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import restore_npz
from jaxmed.io.tables import read_table, write_table
from jaxmed.metrics.cohort import spell
from jaxmed.models.convnext import convnext_encoder
from jaxmed.models.encoder import Encoder
from jaxmed.models.fcmae import FcmaeConfig
from jaxmed.models.heads import HeadConfig
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.published.load import load_published
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.recipes.adapt import take_encoder
from jaxmed.recipes.encoder_calls import view
from jaxmed.recipes.quality_deployment import run_deployment, write_proposal
from jaxmed.recipes.quality_findings import (
    Draws,
    Findings,
    Grid,
    as_rows,
    conclude,
    deployment_choice,
    derive,
    grid_of,
    mixed_model,
)
from jaxmed.recipes.quality_grid import (
    ARMS,
    Fitter,
    GradedImages,
    GridConfig,
    Plan,
    balance_labels,
    by_test_set,
    headline,
    make_fitter,
    plan_grid,
    read_images,
    run_grid,
    scores_of,
)
from jaxmed.recipes.quality_patients import cell_intervals, resample_cells
from jaxmed.recipes.quality_records import QualityConfig, read_flags, read_scores
from jaxmed.recipes.stage import Clock, begin, finish
from jaxmed.recipes.study import Cell, Result
from jaxmed.recipes.study_sections import MOST_EXAMPLES, keep_examples
from jaxmed.recipes.study_tables import summarise, write_tables
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.recipes.vmapped_fits import FitConfig, pretrain_masked
from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort
from jaxmed.systems.profound.cases import write_cases
from jaxmed.systems.profound.study_report import Choice, Summary, compare_arms, page
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log
from jaxmed.train.optimizer import OptimizerConfig
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True
CHECKED = 64  # records read from end to end before the run begins, evenly spread; of the others the headers are
PICTURES = Preprocess(
    (28, 28), 3, axes="xyz", fit="stretch", intensity=Intensity("unit", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
)
SMALL = MaeConfig(
    VitConfig((28, 28), (4, 4), 3, width=64, depth=3, heads=4, hidden=256),
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    decoder_hidden=128,
    mask_ratio=0.6,
    norm_target=True,
    sigmoid=False,
)
EFFECTS = ("column", "estimate", "low", "high", "p")


@dataclasses.dataclass(frozen=True)
@checked
class StudyData:
    """Which records are learnt from and scored.

    Attributes:
        manifest: CSV with path, label, subject, split and quality. Or a folder of classes.
        fractions: Shares of subjects in train, validation and test, where there is no column split.
        synthetic: Phantom subjects to write where no manifest is given.
        deployment: CSV with the quality of records where the model is to be used: the study says which fine-tuning set
            suits it, tries it out, and writes it as a manifest, outputs/proposal.csv, for adapt: --data.weight chosen
            takes the subset, --data.weight weight all records with weights.
    """

    manifest: Path | None = None
    fractions: tuple[Share, Share, Share] = (0.5, 0.1, 0.4)
    synthetic: Number = 0
    deployment: Path | None = None


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """A study of image quality and labels.

    Attributes:
        data: The records.
        label: What is learnt.
        quality: What counts as high quality, or which records are made worse on purpose.
        weights: Weights of the arm "pretrained", with their sizes and preprocessing; without any the model below is
            pre-trained on the images of the fine-tuning pool, of both qualities, without labels.
        preprocess: A file to the network's input, where there are no weights.
        transformer: Masked autoencoder that is pre-trained, its encoder fine-tuned, where there are no weights.
        pretraining: How that goes.
        fit: How every cell is fine-tuned. As in the released code, classes are drawn evenly and the parameters of the
            lowest validation loss are kept, on validation records of the cell's share of high quality.
            --fit.evaluations 0 takes the last step and lets validation records join those of training. Deviation:
            images are flipped and shifted only, not rotated, zoomed or blurred, so that quality stays what it is.
        study: What is varied.
        seed: Of the first repetition, of the draws and of the images that are made worse.
    """

    data: StudyData = StudyData()
    label: LabelConfig = LabelConfig()
    quality: QualityConfig = QualityConfig()
    weights: Path | None = None
    preprocess: Preprocess = PICTURES
    transformer: MaeConfig = SMALL
    pretraining: FitConfig = FitConfig(1500, 64, OptimizerConfig(peak_lr=1e-3, warmup_steps=100, weight_decay=0.05))
    fit: FitConfig = FitConfig(evaluations=10)
    study: Annotated[GridConfig, NO_PREFIX] = GridConfig()
    seed: Seed = 0

    def __post_init__(self) -> None:
        encoder = self.transformer.encoder
        if self.weights is None and (encoder.image_size, encoder.channels) != (
            self.preprocess.size,
            self.preprocess.channels,
        ):
            found = f"{self.preprocess.size} of {self.preprocess.channels}"
            wanted = f"{encoder.image_size} of {encoder.channels} channels, as transformer.encoder has"
            raise ValueError(f"preprocess.size: expected {wanted}, found {found}")


def paper() -> Config:
    """Every share and number of labels, five seeds, on your manifest and weights: on accelerators."""
    return Config()


def laptop() -> Config:
    """Small models at 28 pixels, three numbers of labels, five seeds: on your pictures, or on 400 phantom eyes."""
    return Config(
        StudyData(synthetic=400), quality=QualityConfig(simulate=0.5), study=GridConfig(labels=(0.1, 0.3, 1.0))
    )


def smoke() -> Config:
    """Tiny models at 28 pixels, two shares, two numbers of labels, two seeds: on your pictures, or on phantom eyes."""
    encoder = dataclasses.replace(SMALL.encoder, patch_size=(7, 7), width=32, depth=2, heads=2, hidden=64)
    short = OptimizerConfig(peak_lr=2e-3, warmup_steps=5, weight_decay=0.05)
    return Config(
        StudyData(synthetic=100),
        quality=QualityConfig(simulate=0.5),
        transformer=dataclasses.replace(SMALL, encoder=encoder),
        pretraining=FitConfig(60, 32, short, 1),
        fit=FitConfig(40, 16, short, 1, evaluations=2),
        study=GridConfig((0.0, 0.5, 1.0), (0.0, 0.5, 1.0), (0.5, 1.0), 2, together=2),
    )


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, pre-train, run every cell that is not finished, write tables and report.

    Returns:
        1 when cells failed.
    """
    clock = Clock()
    manifest = _with_synthetic(config, folder)
    if manifest is None:
        raise InputError("data.manifest", "a table of labelled records", "nothing", "or try --preset smoke")
    sets = read_labelled_sets(manifest, (), config.label, config.data.fractions, config.seed)
    labels = ["/".join(cells) for cells in sets.cohort.cells]
    subjects = sets.cohort.subjects.astype(str).tolist()
    flags, is_to_worsen = read_flags(sets.table, config.quality, subjects, labels, config.seed)
    deployed = _deployed_share(config)
    published = None if config.weights is None else load_published(config.weights)
    preprocess = config.preprocess if published is None else published.preprocess
    found_notes = check_scans(sets.cohort.scans, preprocess, CHECKED, 2)
    empty = np.zeros((len(flags), 0), np.float32)
    selects = config.fit.evaluations > 0
    plan = plan_grid(config.study, GradedImages(sets, flags, empty, empty), config.seed, selects=selects)
    start(folder, is_shared=config.study.processes > 1)
    size, test_size = plan.size, len(next(iter(plan.tests.values())))
    made = (
        [
            f"{int((~flags).sum())} of {len(flags)} records were made worse on purpose: {config.quality.kind}, "
            f"strength {config.quality.strength:g}."
        ]
        if is_to_worsen
        else []
    )
    notes = [
        *sets.notes,
        *found_notes,
        *made,
        f"Largest fine-tuning set {size} records, every test set {test_size}; "
        + (
            f"the best of {config.fit.evaluations} evaluations on {len(plan.validation[config.study.shares[0]])} "
            "validation records of the same share of high quality is kept."
            if selects
            else "nothing is selected on validation records, which join those of training."
        ),
    ]
    log = begin(folder, notes)
    data = read_images(sets, flags, preprocess, config.quality if is_to_worsen else None, config.seed)
    _write_records(folder.outputs / "records.csv", data)
    shown, good = _to_look_at(data.shown), min(int(flags.sum()), MOST_EXAMPLES)
    keep_examples(folder.outputs, "high", shown[:good])
    keep_examples(folder.outputs, "low", shown[good:])
    clock.lap("read, and make worse")
    if published is None:
        encoder, given = _pretrained(config, folder, data, plan)
    else:
        # A masked autoencoder of convolutions has no head that it could be looked at with.
        is_fcmae = isinstance(published.config, FcmaeConfig)
        encoder = convnext_encoder(published.config.encoder) if is_fcmae else view(published).encoder
        given = take_encoder(dict(published.params), encoder, str(config.weights))["encoder"]
        notes += published.report.lines
    clock.lap("pre-train")
    head = HeadConfig(len(sets.meaning.task.names), "mean")
    count = len(ARMS) * len(config.study.labels) * len(config.study.shares) * config.study.seeds
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    announce(log, "Fine-tuning", params=shapes, count=count, unit="cells", smaller=folder.smaller)
    record = to_record(config)
    record["study"] |= {"processes": None, "process": None, "together": None}
    fitter = make_fitter(config.study, config.fit, encoder, head, given, data, plan)
    done = run_grid(config.study, fitter, ARMS, data, plan, config.seed, folder.path, record, log)
    clock.lap("run the cells of this part")
    if len(done.results) + len(done.failures) < count:
        log.say("Other parts of this study are not finished yet: the last one to end writes the report.")
        return done.exit_code
    metric = headline(data)
    findings, choice, lines = None, None, []
    if done.results:
        results = by_test_set(done.results)
        draws = resample_cells(done.results, partial(_read_values, folder.path), data, plan, config.seed)
        if draws is None:
            notes.append("Predictions of some cells are lost: intervals are over seeds alone, not over patients.")
        findings = derive(results, metric, draws)
        lines = conclude(findings, spell(metric))
        _write_study(folder.outputs, results, metric, findings, draws)
        clock.lap("resample patients")
        if deployed is not None:
            arm = ARMS[0] if any(result.cell["arm"] == ARMS[0] for result in results) else ARMS[1]
            grid = grid_of(results, metric, arm, max(config.study.labels), draws)
            choice = _choose(config, grid, fitter, arm, data, plan, deployed, folder, record, log)
            clock.lap("try the proposal")
            lines.append(_say_choice(choice, spell(metric)))
        for line in lines:
            log.say(line)
    summary = Summary(
        sets.meaning.task.kind,
        metric,
        size,
        test_size,
        float(flags.mean()),
        count,
        len(done.failures),
        config.study.seeds,
        findings,
        choice,
        tuple(lines),
        tuple(notes),
    )
    finish(folder, config, summary, clock, page)
    return done.exit_code


def _with_synthetic(config: Config, folder: RunFolder) -> Path | None:
    """Write phantom eyes, or prostates for a network of volumes, where no manifest is given and some are asked for."""
    if config.data.manifest is not None or not config.data.synthetic:
        return config.data.manifest
    start(folder, is_shared=config.study.processes > 1)
    if len(config.preprocess.size) == 3:
        return write_cases(folder, config.seed, config.data.synthetic, fractions=config.data.fractions)
    edge, fractions = max(config.preprocess.size[0], 32), config.data.fractions
    return write_retina_cohort(folder.path / "inputs", config.seed, config.data.synthetic, edge, fractions=fractions)


def _deployed_share(config: Config) -> float | None:
    if config.data.deployment is None:
        return None
    table = read_table(config.data.deployment, required=(config.quality.column,))
    scores = read_scores(table, config.quality.column)
    threshold = 0.5 if set(np.unique(scores)) <= {0.0, 1.0} else config.quality.threshold
    return float((scores[np.isfinite(scores)] >= threshold).mean())


def _pretrained(config: Config, folder: RunFolder, data: GradedImages, plan: Plan) -> tuple[Encoder, Params]:
    """Pre-train on the pool without labels, or read what an earlier start has made."""
    place = folder.outputs / "pretrained"
    encoder = vit_encoder(dataclasses.replace(config.transformer.encoder, final_norm=False))
    if (place / "parameters.safetensors").exists():
        params: Any = load_published(place).params
    else:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        params, losses = pretrain_masked(
            config.pretraining, masked_model(config.transformer), jnp.asarray(data.images[plan.pool]), key
        )
        export_parameters(
            place,
            params,
            {
                "family": "retfound" if len(config.preprocess.size) == 2 else "profound",
                "kind": "mae",
                "config": to_record(config.transformer),
                "preprocess": to_record(config.preprocess),
            },
        )
        rows = [{"step": step, "loss": float(loss)} for step, loss in enumerate(losses)]
        write_table(folder.outputs / "pretraining.csv", ("step", "loss"), rows)
    return encoder, take_encoder(params, encoder, str(place))["encoder"]


def _write_records(path: Path, data: GradedImages) -> None:
    """Count records by split, label, quality and site, the table in which confounding shows."""
    table, cohort = data.sets.table, data.sets.cohort
    sites = table.column("site") if "site" in table.columns else [""] * len(data.is_high)
    counts: dict[tuple[str, str, str, str], int] = {}
    for split, label, flag, site in zip(cohort.splits, balance_labels(data), data.is_high, sites, strict=True):
        key = str(split), str(label), "high" if flag else "low", site
        counts[key] = counts.get(key, 0) + 1
    columns = ("split", "label", "quality", "site", "records")
    write_table(path, columns, [dict(zip(columns, (*key, counts[key]), strict=True)) for key in sorted(counts)])


def _to_look_at(images: Float[np.ndarray, "image *size channel"]) -> Float[np.ndarray, "image row column"]:
    """Return grey pictures, or the middle slice of the first channel the radiological way (axes z, y, x), in [0, 1]."""
    planes = images.mean(-1) if images.ndim == 4 else images[:, images.shape[1] // 2, ::-1, ::-1, 0]
    low, high = np.percentile(planes, (0.5, 99.5))
    return np.clip((planes - low) / max(float(high - low), 1e-6), 0, 1)


def _read_values(place: Path, cell: Cell) -> np.ndarray | None:
    found = restore_npz(scores_of(place, cell))
    return None if found is None else found.get("values")


def _write_study(
    outputs: Path, results: Sequence[Result], metric: str, findings: Findings, draws: Draws | None
) -> None:
    if draws is not None:
        rows = cell_intervals(results, metric, draws)
        write_table(outputs / "intervals.csv", list(rows[0]), rows)
    by = ("arm", "labels", "tuned_high", "tested_high")
    tests = compare_arms(results, metric)
    write_tables(outputs, results, summarise(results, by, metric), tests)
    columns = ("measure", "of", "mean", "low", "high", "p")
    rows = [
        *as_rows(findings.mismatch, "mismatch penalty"),
        *as_rows(findings.necessity, "slope along high quality"),
        *as_rows(findings.gains, "pretrained minus scratch"),
    ]
    rows += [("labels saved", share, factor, None, None, None) for share, factor in findings.labels_saved.items()]
    write_table(outputs / "findings.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows])
    model = mixed_model(results, metric)
    if model is not None:
        write_table(
            outputs / "mixed_model.csv", EFFECTS, [dict(zip(EFFECTS, effect, strict=True)) for effect in model.effects]
        )


def _choose(
    config: Config,
    grid: Grid,
    fitter: Fitter,
    arm: str,
    data: GradedImages,
    plan: Plan,
    deployed: float,
    folder: RunFolder,
    record: object,
    log: Log,
) -> Choice:
    """Write which records suit a deployment, and how much each counts where all are used; measure what either gains."""
    own = float(data.is_high[plan.pool].mean())
    chosen, gain = deployment_choice(grid, deployed, own)
    proposal = folder.outputs / "proposal.csv"
    write_proposal(proposal, config.label.columns, data, plan, chosen, deployed, config.seed)
    effect = run_deployment(
        config.study, fitter, arm, data, plan, chosen, deployed, config.seed, folder.outputs / "deployment", record, log
    )
    return Choice(deployed, own, chosen, gain.mean, gain.low, gain.high, effect)


def _say_choice(choice: Choice, name: str) -> str:
    interval = "" if choice.low is None else f" [{choice.low:+.3f}, {choice.high:+.3f}]"
    gain = "" if choice.gain is None else f": {choice.gain:+.3f}{interval} in {name} over the records' own share"
    return (
        f"Where {choice.deployed:.0%} of the images are of high quality, fine-tune with {choice.chosen:.0%} (the "
        f"records at hand have {choice.own:.0%}){gain}.{_say_effect(choice, name)}"
    )


def _say_effect(choice: Choice, name: str) -> str:
    words = {"chosen": "fine-tuning on the chosen records", "weighted": "weighting all of them"}
    told = []
    for kind, gain in choice.effect.items():
        if gain.mean is not None:
            interval = "" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
            told.append(f"{words[kind]} gained {gain.mean:+.3f}{interval}")
    return f" Tried out on test records like that, {' and '.join(told)} in {name}." if told else ""

"""Stage `jaxmed mupm propagate`: coefficients of image, text and covariance, how they predict, what it saves."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Bounds, Count, Seed, checked
from jaxmed.data.splits import assign_folds, draw_subsets
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import read_table, write_columns, write_table
from jaxmed.metrics.cohort import error_statistics
from jaxmed.metrics.statistics import bootstrap_all, spearman
from jaxmed.metrics.uncertainty import judge
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import Band, Bar, agreement, bars, curves
from jaxmed.report.page import Block, Note, Section, Table, Text
from jaxmed.report.risk import risk_blocks
from jaxmed.systems.mupm.answers import (
    AnswerConfig,
    Answers,
    given_or_planted,
    measured_cases,
    noise_of,
    require_decided,
    variances_of,
)
from jaxmed.systems.mupm.branches import Variances, count_calls, redraw_predictions
from jaxmed.systems.mupm.doubt import calibration, given_answers, uncertainties
from jaxmed.systems.mupm.regression import (
    PREDICTORS,
    FitConfig,
    coefficient_intervals,
    few_cases,
    fit,
    held_out,
    make_design,
    predict,
    score,
)
from jaxmed.train.run_folder import RunFolder

REDRAWS = 200
"""Resamples of the draws: the spread of a spread to 5 %."""
TARGET = 0.1
"""Half-width of the interval of V predicted for which draws are counted, relative."""


@dataclasses.dataclass(frozen=True)
@checked
class StudyConfig(FitConfig):
    """How coefficients are fitted and tried.

    Attributes:
        cases: Numbers of cases to fit on, to see how few suffice; those beyond the table are left out.
        repeats: Subsets drawn of each number.
        folds: Parts of the subjects; each is predicted by a fit on the others.
        resamples: Refits on resampled subjects, for intervals.
    """

    cases: tuple[Count, ...] = (1, 2, 5, 10, 20, 50)
    repeats: Annotated[int, Bounds(2, 100_000)] = 200
    folds: Annotated[int, Bounds(2, 1_000)] = 5
    resamples: Annotated[int, Bounds(10, 1_000_000)] = 10_000


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Fit the propagation model to a table of answers.

    Attributes:
        table: CSV of answers; `jaxmed mupm` says which columns.
        data: How it is read.
        fit: How coefficients are fitted and tried.
        seed: Seed of folds, subsets, resamples and the planted table.
    """

    table: Path | None = None
    data: AnswerConfig = AnswerConfig()
    fit: StudyConfig = StudyConfig()
    seed: Seed = 0


def paper() -> Config:
    """Your answers, least squares as published, 10,000 resamples."""
    return Config()


def smoke() -> Config:
    """In seconds: your answers, or forty cases with planted coefficients, blurred by the few draws of each."""
    return Config(data=AnswerConfig(synthetic=40), fit=StudyConfig(cases=(1, 2, 5, 10, 20), repeats=50, resamples=1000))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found.

    Attributes:
        cases: In the table.
        subjects: In the table.
        fitted: Cases with all three branches.
        classes: Names of the options.
        draws: Perturbed answers per branch, at most.
        coefficients: Estimate, and both ends of the interval, by predictor.
        vif: Variance inflation, by predictor.
        condition: Condition number of the predictors.
        own_rows: Scores on the rows of the fit itself, as released.
        held_out: Estimate and both ends of scores of cases that the fit had not seen.
        held_out_r2: R2 of rows, of rows above 0 and of sums per case, not seen.
        rank_correlation: Spearman's, of predicted and measured V of unseen cases.
        ablations: R2 of unseen rows with fewer predictors, by name.
        calls: Of the model per case, with the joint branch and where it is predicted.
        draw_spread: Standard deviation of V predicted for a case by the choice of draws, relative to its mean.
        draws_needed: Draws for a 95 % interval of 10 % on either side.
        noise: V_0, mean over cases of the sum over classes; None where nobody measured it.
        signal: The same sum of V.
        accuracy: Share of right answers; None without labels.
        doubts: AUROC for wrong answers with its interval, and area under risk over coverage, by measure.
        calibration: Expected calibration error, and the released pseudo-calibration.
        notes: What a reader should know.
    """

    cases: int
    subjects: int
    fitted: int
    classes: tuple[str, ...]
    draws: int
    coefficients: dict[str, tuple[float, float, float]]
    vif: dict[str, float]
    condition: float
    own_rows: dict[str, float | None]
    held_out: dict[str, tuple[float, float, float]]
    held_out_r2: dict[str, float | None]
    rank_correlation: float | None
    ablations: dict[str, float | None]
    calls: dict[str, int]
    draw_spread: float
    draws_needed: int
    noise: float | None
    signal: float
    accuracy: float | None
    doubts: dict[str, dict[str, float | None]]
    calibration: dict[str, float | None]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read answers, fit, hold out, fit on few, count what is saved, look at wrong answers."""
    clock = Clock()
    answers = given_or_planted(config.table, config.data, config.seed, folder)
    variances = variances_of(answers, config.data)
    is_fitted, notes = measured_cases(variances), list(answers.notes)
    subjects = np.array(answers.subjects)[is_fitted]
    if len(set(subjects)) < 3:
        expected = "three subjects or more with answers of all branches"
        raise InputError(answers.path, expected, len(set(subjects)), "branch joint is needed to fit, not to predict")
    if missing := int((~is_fitted).sum()):
        notes.append(f"{missing} cases lack answers of a branch: they are not fitted to; V is predicted where it can.")
    chosen = Variances(*(jnp.asarray(np.asarray(part)[is_fitted]) for part in variances))
    found = jax.jit(partial(fit, config=config.fit))(chosen.image, chosen.text, chosen.covariance, chosen.joint)
    require_decided(answers, np.asarray(found.coefficients), chosen)
    log = begin(folder, notes)
    clock.lap("read and fit")

    design = make_design(chosen.image, chosen.text, chosen.covariance)
    intervals = coefficient_intervals(
        design, chosen.joint, tuple(subjects), config.fit, seed=config.seed, resamples=config.fit.resamples
    )
    clock.lap("refits on resampled subjects")
    folds = assign_folds(subjects, min(config.fit.folds, len(set(subjects))), config.seed)
    unseen = _hold_out(design, chosen.joint, folds, config.fit)
    ablations = _ablate(design, chosen.joint, folds, config.fit)
    rows = np.repeat(subjects, len(answers.classes))
    statistics = error_statistics(np.asarray(chosen.joint).ravel(), np.asarray(unseen).ravel())
    scores = bootstrap_all(
        lambda weights: {name: one(weights) for name, one in statistics.items()}, rows, seed=config.seed
    )
    clock.lap("held-out subjects")
    _try_few(design, chosen.joint, config, folder.outputs)
    clock.lap("fits on few cases")

    spread, needed = _draw_spread(answers, found.coefficients, config)
    predicted = np.asarray(predict(found.coefficients, make_design(*variances[:3])))
    accuracy, doubts, calibrated = _doubt(answers, variances, predicted, config.seed, folder.outputs)
    _write(answers, variances, predicted, folder.outputs)
    write_npz(folder.outputs / "unseen.npz", {"measured": np.asarray(chosen.joint), "predicted": np.asarray(unseen)})
    clock.lap("draws, wrong answers, files")
    own, other = found.scores._asdict(), jax.jit(score)(chosen.joint, unseen)._asdict()
    sums = [np.asarray(part).sum(axis=1) for part in (unseen, chosen.joint)]
    noise = noise_of(answers) if answers.repeats.is_valid.any() else None
    log.metrics(0, {name: float(value) for name, value in zip(PREDICTORS, found.coefficients, strict=True)})
    summary = Summary(
        len(answers.cases), len(set(answers.subjects)), int(is_fitted.sum()), answers.classes,
        int(answers.branches.is_valid.sum(axis=2).max()),
        {name: (one.estimate, one.low, one.high) for name, one in intervals.items()},
        {name: float(value) for name, value in zip(PREDICTORS, found.vif, strict=True)}, float(found.condition),
        {name: _number(value) for name, value in own.items()},
        {name: (one.estimate, one.low, one.high) for name, one in scores.items()},
        {name: _number(other[name]) for name in ("r2", "r2_nonzero", "r2_case")}, spearman(*sums), ablations,
        count_calls(int(answers.branches.is_valid[:, :2].sum(axis=2).max())), spread, needed,
        None if noise is None else float(jnp.nanmean(noise.sum(axis=1))), float(sums[1].mean()),
        accuracy, doubts, calibrated, tuple(notes),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)


def _hold_out(design, v, folds, config):
    program = jax.jit(partial(held_out, num_folds=int(folds.max()) + 1, config=config))
    return program(design, v, jnp.asarray(folds))


def _ablate(design, v, folds, config) -> dict[str, float | None]:
    """Return R2 of unseen rows of smaller models; those with an intercept are the release's."""
    one = jnp.ones_like(design[..., :1])
    smaller = {
        "V_I, V_T": design[..., :2],
        "V_I, V_T, intercept": jnp.concatenate([design[..., :2], one], -1),
        "V_I, intercept": jnp.concatenate([design[..., :1], one], -1),
        "V_T, intercept": jnp.concatenate([design[..., 1:2], one], -1),
    }
    return {name: _number(score(v, _hold_out(part, v, folds, config)).r2) for name, part in smaller.items()}


def _try_few(design, v, config: Config, outputs: Path) -> None:
    program, rows = jax.jit(partial(few_cases, config=config.fit)), []
    for size in sorted({size for size in config.fit.cases if size < len(v)}):
        subsets = draw_subsets(config.seed, len(v), size, config.fit.repeats)
        coefficients, r2 = map(np.asarray, program(design, v, jnp.asarray(subsets)))
        is_decided = np.isfinite(coefficients).all(axis=1)
        row: dict[str, object] = {"cases": size, "subsets": len(subsets), "decided": int(is_decided.sum())}
        for name, values in [*zip(PREDICTORS, coefficients.T, strict=True), ("r2", r2)]:
            kept = values[np.isfinite(values)]
            ends = np.quantile(kept, (0.5, 0.025, 0.975)) if len(kept) else (None, None, None)
            row |= {f"{name}{end}": value for end, value in zip(("", "_low", "_high"), ends, strict=True)}
        rows.append(row)
    columns = [f"{name}{end}" for name in (*PREDICTORS, "r2") for end in ("", "_low", "_high")]
    write_table(outputs / "few_cases.csv", ("cases", "subsets", "decided", *columns), rows)


def _draw_spread(answers: Answers, coefficients, config: Config) -> tuple[float, int]:
    """Return the relative spread of V predicted by the choice of draws, and the draws for an interval of 10 %.

    Spreads fall with the root of the number of draws.
    """
    program = jax.jit(partial(redraw_predictions, kind=config.data.covariance, number=REDRAWS))
    key = jax.random.key(config.seed)
    block = answers.branches
    sums = np.asarray(program(key, jnp.asarray(block.answers), jnp.asarray(block.is_valid), coefficients))
    known = np.isfinite(sums).all(axis=0)
    mean = float(np.abs(sums[:, known].mean(axis=0)).mean())
    spread = float(sums[:, known].std(axis=0, ddof=1).mean()) / mean if mean > 0 else 0.0
    draws = block.is_valid[:, :2].sum(axis=2)[known].mean()
    return spread, int(np.ceil(draws * (1.96 * spread / TARGET) ** 2))


def _doubt(answers: Answers, variances: Variances, predicted: np.ndarray, seed: int, outputs: Path):
    given = given_answers(answers)
    is_known = (answers.labels >= 0) & (given >= 0)
    if not is_known.any():
        return None, {}, {}
    is_wrong, subjects = given[is_known] != answers.labels[is_known], np.array(answers.subjects)[is_known]
    doubts, risks = {}, {}
    for name, values in uncertainties(answers, variances, predicted).items():
        if np.isfinite(values[is_known]).all():
            one = judge(values[is_known], is_wrong, subjects, seed)
            auroc = one.auroc or (None, None, None)
            doubts[name] = dict(zip(("auroc", "low", "high"), auroc, strict=True)) | {
                "area": one.area,
                "best": one.best,
            }
            risks["coverage"], risks[name] = one.curve.coverage, one.curve.risk
    write_columns(outputs / "risk_coverage.csv", risks)
    return float(1 - is_wrong.mean()), doubts, calibration(answers, is_known, variances, is_wrong)


def _write(answers: Answers, variances: Variances, predicted: np.ndarray, outputs: Path) -> None:
    parts = {"v_image": variances.image, "v_text": variances.text, "covariance": variances.covariance}
    parts |= {"v": variances.joint, "v_predicted": predicted}
    number = len(answers.classes)
    rows = {"case": np.repeat(answers.cases, number), "class": np.tile(answers.classes, len(answers.cases))}
    write_columns(outputs / "variances.csv", rows | {name: np.asarray(part).ravel() for name, part in parts.items()})
    given = given_answers(answers)
    words = [answers.classes[place] if place >= 0 else "" for place in given]
    labels = [answers.classes[place] if place >= 0 else "" for place in answers.labels]
    sums = {name: np.asarray(part).sum(axis=1) for name, part in parts.items()}
    columns = {"case": answers.cases, "subject": answers.subjects, "answer": words, "label": labels} | sums
    write_columns(outputs / "cases.csv", columns)


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def page(run: Finished[Config, Summary]) -> Page:
    """Show coefficients, what they predict, how few cases suffice, and whether doubt is justified."""
    summary = run.summary
    signs = {"image": "b1, of V_I", "text": "b2, of V_T", "covariance": "b3, of C"}
    caption = "Coefficients with 95 % intervals from refits on resampled subjects."
    names = [Bar(signs[name], *values) for name, values in summary.coefficients.items()]
    vif = [(signs[name], *summary.coefficients[name], summary.vif[name]) for name in PREDICTORS]
    blocks: list[Block] = [bars(names, xlabel="coefficient", caption=caption)]
    words = "Variance inflation above about 10 says that coefficients trade off: only their sum of effects is known."
    blocks.append(Table(("Coefficient", "Estimate", "Low", "High", "Variance inflation"), vif, words))
    sections = [Section("What adds up", blocks), Section("What it predicts", _predicted(run))]
    sections += [Section("How few cases suffice", [*_few(run)]), Section("When to doubt an answer", _wrong(run))]
    text = Text([
        "outputs/variances.csv has V_I, V_T, C, V and V predicted per case and class, cases.csv sums with answers.",
        "V_I and the others are variances of the probability of an option over perturbed inputs: squares, not percent.",
    ])  # fmt: skip
    sections.append(Section("How to read it", [*(Note(note) for note in summary.notes), text]))
    saved = 1 - summary.calls["predicted"] / summary.calls["measured"]
    r2 = summary.held_out["r2"]
    return Page(
        "Uncertainty of image and text",
        f"{summary.fitted} cases of {summary.subjects} subjects, {len(summary.classes)} options, "
        f"up to {summary.draws} perturbations of each kind",
        [
            ("Image", summary.coefficients["image"][0], "coefficient of V_I"),
            ("Text", summary.coefficients["text"][0], "coefficient of V_T"),
            ("Covariance", summary.coefficients["covariance"][0], "coefficient of C"),
            ("Held-out R2", r2[0], f"{r2[1]:.3g} to {r2[2]:.3g}, subjects not fitted to"),
            ("Calls saved", f"{100 * saved:.0f} %", f"{summary.calls['predicted']} for {summary.calls['measured']}"),
        ],
        sections,
    )


def _predicted(run: Finished[Config, Summary]) -> list[Block]:
    summary = run.summary
    with np.load(run.outputs / "unseen.npz") as stored:
        measured, predicted = stored["measured"].sum(axis=1), stored["predicted"].sum(axis=1)
    caption = "Joint variance of each case, summed over options: measured, and predicted by a fit on other subjects."
    figure = agreement({"V": measured}, {"V": predicted}, caption=caption, words=("measured", "predicted"))
    names = {"r2": "all rows", "r2_nonzero": "rows above 0", "r2_case": "sums over the options of a case"}
    rows = [(names[name], summary.held_out_r2[name], summary.own_rows[name]) for name in names]
    scores = Table(("R2 of", "Subjects not fitted to", "The fit's own rows"), rows,
                   "The release reports the last column alone, which no other case need reach.")  # fmt: skip
    smaller = [("V_I, V_T, C", summary.held_out_r2["r2"]), *summary.ablations.items()]
    text = (
        f"By the choice of perturbations V predicted for a case has a standard deviation of "
        f"{100 * summary.draw_spread:.0f} %; a 95 % interval of 10 % to either side takes about "
        f"{summary.draws_needed} draws per branch."
    )
    told = [text]
    if summary.noise is not None:
        told.append(
            f"Identical inputs give a variance V_0 of {summary.noise:.3g} where V is {summary.signal:.3g}: that part "
            "is decoding, not doubt about the inputs."
        )
    return [figure, scores, Table(("Predictors", "R2 of unseen rows"), smaller, "Models with fewer predictors."),
            Text(told)]  # fmt: skip


def _few(run: Finished[Config, Summary]) -> list[Block]:
    path = run.outputs / "few_cases.csv"
    if path.read_text().count("\n") < 2:
        return [Text(["The table has no more cases than the fewest that were to be tried."])]
    table = read_table(path)
    sizes = np.array(table.floats("cases"))

    def band(name: str) -> Band:
        parts = [np.array(table.floats(name + end, allow_missing=True)) for end in ("", "_low", "_high")]
        reach = 5 * max(1.0, *(abs(part[-1]) for part in parts))  # one case may give coefficients of thousands
        return Band(sizes, *(np.where(np.abs(part) <= reach, part, np.nan) for part in parts))

    signs = {"image": "b1, image", "text": "b2, text", "covariance": "b3, covariance"}
    words = f"Median and middle 95 % of {run.config.fit.repeats} subsets; what is far off is in outputs/few_cases.csv."
    lines = curves({signs[name]: band(name) for name in PREDICTORS}, xlabel="cases fitted to", ylabel="coefficient",
                   caption=f"Coefficients fitted on few cases. {words}", log_x=True)  # fmt: skip
    r2 = curves({"R2": band("r2")}, xlabel="cases fitted to", ylabel="R2 of all other cases", log_x=True,
                caption=f"What such fits explain of the cases that they have not seen. {words}")  # fmt: skip
    return [lines, r2]


def _wrong(run: Finished[Config, Summary]) -> list[Block]:
    summary = run.summary
    if not summary.doubts:
        return [Text(["Without the column 'label' nobody knows which answers are wrong."])]
    stored = read_table(run.outputs / "risk_coverage.csv")
    coverage = np.array(stored.floats("coverage"))
    lines = {name: (coverage, np.array(stored.floats(name))) for name in stored.columns if name != "coverage"}
    errors = [("expected calibration error of the probabilities", summary.calibration["ece"]),
              ("released pseudo-calibration of variances", summary.calibration["decile"])]  # fmt: skip
    words = "The pseudo-confidence of the second rises with the variance: a low value is not good calibration."
    text = f"{100 * (summary.accuracy or 0):.0f} % of the answers are right."
    return [Text([text]), *risk_blocks(summary.doubts, lines), Table(("Calibration", "Error"), errors, words)]

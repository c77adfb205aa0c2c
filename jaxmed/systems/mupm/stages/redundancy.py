"""Stage `jaxmed mupm redundancy`: which factors of the input change neither the uncertainty nor the answers."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Bounds, Seed, Share, checked
from jaxmed.errors import InputError
from jaxmed.io.tables import write_columns
from jaxmed.metrics.statistics import bootstrap, weighted_mean
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.systems.mupm.answers import (
    AnswerConfig,
    Answers,
    Block,
    given_or_planted,
    measured_cases,
    require_decided,
    variances_of,
    without_factor,
)
from jaxmed.systems.mupm.branches import Variances, redraw_predictions
from jaxmed.systems.mupm.regression import FitConfig, fit, make_design, predict
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Find factors that say nothing.

    Attributes:
        table: CSV of answers, some of them to inputs without a factor (column factor).
        data: How it is read.
        fit: How coefficients are fitted.
        margin: Largest change of V predicted that still counts as none, relative to its mean.
        redraws: Resamples of the draws, to tell what chance alone changes.
        seed: Seed of resamples and the planted table.
    """

    table: Path | None = None
    data: AnswerConfig = AnswerConfig()
    fit: FitConfig = FitConfig()
    margin: Share = 0.1
    redraws: Annotated[int, Bounds(20, 100_000)] = 1000
    seed: Seed = 0


def paper() -> Config:
    """Your answers, least squares as published."""
    return Config()


def smoke() -> Config:
    """In seconds: your answers, or planted ones in which one factor of three says nothing."""
    return Config(data=AnswerConfig(synthetic=40), redraws=200)


@dataclasses.dataclass(frozen=True)
class Factor:
    """What leaving out one factor changes.

    Attributes:
        cases: Asked without it.
        change: Mean absolute change of V predicted, relative to its mean.
        chance: What chance changes at most, of all factors at once in 95 of 100 draws of the same perturbations.
        difference: Mean change of V predicted, relative to its mean, and both ends of its interval over subjects.
        switched: Share of cases whose answer is another.
        accuracy: Change of the share of right answers and both ends; None without labels.
        verdict: "redundant", "matters" or "undecided".
    """

    cases: int
    change: float
    chance: float
    difference: tuple[float, float, float]
    switched: float
    accuracy: tuple[float, float, float] | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found.

    Attributes:
        cases: In the table.
        coefficients: Of V_I, V_T and C.
        factors: By name.
        notes: What a reader should know.
    """

    cases: int
    coefficients: tuple[float, float, float]
    factors: dict[str, Factor]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read, fit on the whole inputs, leave out one factor after another."""
    clock = Clock()
    answers = given_or_planted(config.table, config.data, config.seed, folder)
    if not answers.factors:
        advice = "ask again without a factor; jaxmed mupm says how rows are named"
        raise InputError(answers.path, "answers without a factor, named in the column 'factor'", "none", advice)
    variances = variances_of(answers, config.data)
    is_fitted = measured_cases(variances)
    chosen = Variances(*(jnp.asarray(np.asarray(part)[is_fitted]) for part in variances))
    if not is_fitted.any():
        raise InputError(answers.path, "cases with answers of branches image, text and joint", "none")
    found = jax.jit(partial(fit, config=config.fit))(chosen.image, chosen.text, chosen.covariance, chosen.joint)
    require_decided(answers, np.asarray(found.coefficients), chosen)
    log = begin(folder, answers.notes)
    clock.lap("read and fit")

    whole = predict(found.coefficients, make_design(*variances[:3])).sum(-1)
    block = answers.branches
    program = jax.jit(partial(redraw_predictions, kind=config.data.covariance, number=2 * config.redraws))
    redrawn = program(
        jax.random.key(config.seed), jnp.asarray(block.answers), jnp.asarray(block.is_valid), found.coefficients
    )
    by_chance = np.abs(np.asarray(redrawn[: config.redraws] - redrawn[config.redraws :]))
    factors, table = {}, {"case": list(answers.cases), "whole": np.asarray(whole)}
    for name in answers.factors:
        part, is_asked = without_factor(answers, name)
        left = np.asarray(
            predict(found.coefficients, make_design(*variances_of(answers, config.data, part)[:3])).sum(-1)
        )
        is_known = is_asked & np.isfinite(left) & np.isfinite(np.asarray(whole))
        if len({answers.subjects[case] for case in np.flatnonzero(is_known)}) < 2:
            raise InputError(f"{answers.path} factor '{name}'", "two subjects or more asked without it", "fewer")
        factors[name] = _compare(
            answers, part, is_known, np.asarray(whole), left, by_chance, config, 1 - 0.05 / len(answers.factors)
        )
        table[name] = np.where(is_known, left, np.nan)
        log.say(f"Without {name}: {factors[name].verdict}")
    write_columns(folder.outputs / "predicted.csv", table)
    clock.lap("factors")
    first, second, third = map(float, found.coefficients)
    summary = Summary(len(answers.cases), (first, second, third), factors, answers.notes)
    finish(folder, config, summary, clock, page)


def _compare(
    answers: Answers, part: Block, is_known: np.ndarray, whole: np.ndarray, left: np.ndarray, by_chance: np.ndarray,
    config: Config, level: float,
) -> Factor:  # fmt: skip
    """Compare predictions without a factor with those of the whole input, against what chance would change."""
    seed, margin = config.seed, config.margin
    subjects = np.array(answers.subjects)[is_known]
    mean = float(np.abs(whole[is_known]).mean()) or 1.0
    changes = (left - whole)[is_known] / mean
    change = float(np.abs(changes).mean())
    chance = float(np.quantile(by_chance[:, is_known].mean(axis=1) / mean, level))
    difference = bootstrap(weighted_mean(changes), subjects, seed=seed, level=level)
    before, after = _options(answers.branches)[is_known], _options(part)[is_known]
    labels, accuracy = answers.labels[is_known], None
    if (labels >= 0).all():
        gained = (after == labels).astype(np.float64) - (before == labels)
        found = bootstrap(weighted_mean(gained), subjects, seed=seed, level=level)
        accuracy = (found.estimate, found.low, found.high)
    same_answers = accuracy is None or accuracy[1] <= 0 <= accuracy[2]
    is_small = -margin <= difference.low and difference.high <= margin
    has_sign = difference.low > 0 or difference.high < 0
    verdict = "undecided"
    if change > chance or not same_answers or (has_sign and not is_small):
        verdict = "matters"
    elif is_small:
        verdict = "redundant"
    return Factor(
        int(is_known.sum()), change, chance, (difference.estimate, difference.low, difference.high),
        float((before != after).mean()), accuracy, verdict,
    )  # fmt: skip


def _options(block: Block) -> np.ndarray:
    """Return the option answered on average with image or text varied: factors are left out of these branches."""
    return np.where(block.is_valid[:, :2, :, None], block.answers[:, :2], 0).sum(axis=(1, 2)).argmax(axis=1)


def page(run: Finished[Config, Summary]) -> Page:
    """Show what each factor changes, beside what chance changes."""
    summary = run.summary
    strips = []
    for name, one in summary.factors.items():
        strips += [
            Bar("without it", 100 * one.change, group=name),
            Bar("chance, at most", 100 * one.chance, group=name),
        ]
    caption = (
        "Mean absolute change of the predicted joint variance; chance: what redrawn perturbations change of any factor."
    )
    figure = bars(strips, xlabel="change of V predicted (%)", caption=caption)
    rows = [
        (name, one.verdict, one.cases, *(100 * end for end in one.difference), 100 * one.switched,
         None if one.accuracy is None else 100 * one.accuracy[0])
        for name, one in summary.factors.items()
    ]  # fmt: skip
    heads = ("Factor", "Verdict", "Cases", "V predicted (%)", "Low", "High", "Other answers (%)", "Accuracy (%)")
    words = (
        "Signed changes, 95 % intervals for all factors at once (Bonferroni, over subjects). Redundant: these lie "
        "within the margin, single cases change no more than by chance, nor accuracy. Undecided: ask more cases."
    )
    redundant = [name for name, one in summary.factors.items() if one.verdict == "redundant"]
    text = "A factor that does not move the model may still matter to the patient: this tells about the model alone."
    return Page(
        "Redundant inputs",
        f"{summary.cases} cases asked again without each of {len(summary.factors)} factors",
        [
            ("Factors", len(summary.factors), ", ".join(summary.factors)),
            ("Redundant", len(redundant), ", ".join(redundant) or "none"),
        ],
        [
            Section("What leaving out changes", [figure, Table(heads, rows, words)]),
            Section("How to read it", [*(Note(note) for note in summary.notes), Text([text])]),
        ],
    )

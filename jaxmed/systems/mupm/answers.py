"""The table back-end: answers that any model has given already, from a CSV to arrays.

A row is an answer: `case`; `branch` (image, text, joint, or repeat for identical inputs); `draw`, 0 for the
unperturbed input; and either the probability of every option (columns p_OPTION) or the text of an `answer`. Optional:
`subject` (one per case otherwise), `label` (the right option), `factor` (what was left out of the input; empty for the
whole input). Any other column may group cases.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Real

from jaxmed.config import Number, checked
from jaxmed.data.option_answers import OTHER, REFUSAL, match_answer
from jaxmed.errors import InputError, listed
from jaxmed.files import require_given
from jaxmed.io.tables import Table, read_table
from jaxmed.metrics.uncertainty import draw_variance
from jaxmed.synthesis.phantoms.answers import AnswersConfig, write_answers
from jaxmed.systems.mupm.branches import BRANCHES, Covariance, Variances, branch_variances
from jaxmed.train.run_folder import RunFolder, start

KEYWORDS = (
    "Cardiac", "Cardiomyopathy", "Chronic", "Complications", "Conduction", "Failure", "Hypertensive", "Ischaemic",
    "Pericarditis", "Pulmonary", "Valve",
)  # fmt: skip
"""The released classes: the first of them found in an answer is the answer."""
MOST_CLASSES = 50
Readout = Literal["auto", "probabilities", "answers"]


@dataclasses.dataclass(frozen=True)
@checked
class AnswerConfig:
    """How a table of answers is read.

    Attributes:
        readout: "probabilities" (columns p_OPTION), "answers" (text, one-hot) or whichever the table has.
        options: Names of the options of a text answer, in the order of the letters A, B, C; by default every
            different answer is a class.
        covariance: C is "geometric", sqrt(V_I V_T), or "empirical", where draws of image and text were paired.
        subtract_noise: Whether V_0, the variance of the branch "repeat", is taken off all variances.
        match_release: Read text answers as the released code does: first of its eleven keywords, answers without one
            dropped, the unperturbed answer counted among the draws and one of each branch left out at random.
        synthetic: Cases of a table with planted coefficients, where no table is given; 0 asks for one.
    """

    readout: Readout = "auto"
    options: tuple[str, ...] = ()
    covariance: Covariance = "geometric"
    subtract_noise: bool = False
    match_release: bool = False
    synthetic: Number = 0

    def __post_init__(self) -> None:
        if 0 < self.synthetic < 4:
            raise ValueError(f"synthetic: expected 0, or 4 cases or more, found {self.synthetic}")


class Block(NamedTuple):
    """Answers of some branches under several draws.

    Attributes:
        answers: Distributions over classes; 0 where there is none.
        is_valid: Where there is one.
    """

    answers: Float32[np.ndarray, "case branch draw class"]
    is_valid: Bool[np.ndarray, "case branch draw"]


class Answers(NamedTuple):
    """A table of answers as arrays.

    Attributes:
        path: The table.
        cases: Names.
        subjects: Of each case.
        classes: Names of the options, and of what is none of them.
        labels: Place of the right class; -1 where it is not known.
        branches: Perturbed answers of image, text and joint.
        baseline: The answer to the unperturbed input, the mean over all that there are; NaN where there is none.
        repeats: Answers to identical inputs; no draws where there are none.
        factors: Branches image and text without one factor of the input.
        groups: Columns that have one value per case.
        notes: What a reader should know.
    """

    path: Path
    cases: tuple[str, ...]
    subjects: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Int[np.ndarray, " case"]
    branches: Block
    baseline: Float32[np.ndarray, "case class"]
    repeats: Block
    factors: dict[str, Block]
    groups: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def given_or_planted(table: Path | None, config: AnswerConfig, seed: int, folder: RunFolder) -> Answers:
    """Read the table that was given, or write a planted one into the run and read that.

    Raises:
        InputError: There is no table and none is to be made, or something is wrong with it.
    """
    if table is None and config.synthetic:
        start(folder)
        planted = AnswersConfig(cases=config.synthetic, is_exact=False)
        made = write_answers(folder.path / "inputs" / "answers.csv", seed, planted)
        answers, truth = read_answers(made, config, seed), (1, 1, 2 * planted.correlation)
        note = f"Coefficients {truth} are planted; {planted.draws} draws blur V_I and V_T, which pulls estimates down."
        return answers._replace(notes=(*answers.notes, note))
    return read_answers(require_given(table, "table"), config, seed)


def read_answers(path: Path, config: AnswerConfig, seed: int) -> Answers:
    """Read a table of answers.

    Args:
        path: CSV; the module says which columns.
        config: How it is read.
        seed: Of the draws that match_release leaves out.

    Raises:
        InputError: A column or value is missing or wrong, an answer stands twice, or a case contradicts itself.
    """
    table = read_table(path, ("case", "branch", "draw"), ("subject", "label", "factor", "answer"))
    notes = [table.note] if table.note else []
    classes, values = _read_values(table, config, notes)
    draws = table.integers("draw")
    factors = [row.get("factor", "") for row in table.rows]
    names = tuple(dict.fromkeys(table.column("case")))
    place = {name: number for number, name in enumerate(names)}
    found: dict[tuple[str, str], dict[tuple[int, int], np.ndarray]] = {}
    seen: dict[tuple[str, str, str, int], int] = {}
    for row, line, draw, factor, value in zip(table.rows, table.lines, draws, factors, values, strict=True):
        branch = row["branch"].lower()
        if branch not in (*BRANCHES, "repeat"):
            raise table.wrong(line, "image, text, joint or repeat under 'branch'", f"'{row['branch']}'")
        if factor and branch not in ("image", "text"):
            raise table.wrong(line, "branch image or text where a factor is left out", f"'{branch}'")
        if draw < 0:
            raise table.wrong(line, "0 or a larger number under 'draw'", str(draw))
        key = (row["case"], branch, factor, draw)
        if key in seen:
            advice = "number the draws of a branch"
            raise table.wrong(line, "one answer per case, branch, factor and draw", f"line {seen[key]} again", advice)
        seen[key] = line
        if value is not None:
            found.setdefault((factor, branch), {})[place[row["case"]], draw] = value
    if not any((branch in ("image", "text")) for factor, branch in found if not factor):
        raise InputError(path, "answers of the branches image and text", "none of them")
    number, size = len(names), len(classes)

    def block(branches: Sequence[str], factor: str = "", first: int = 1) -> Block:
        chosen = [found.get((factor, branch), {}) for branch in branches]
        most = max((draw for one in chosen for _, draw in one), default=first - 1)
        answers = np.zeros((number, len(branches), max(most - first + 1, 0), size), np.float32)
        is_valid = np.zeros(answers.shape[:3], bool)
        for branch, one in enumerate(chosen):
            for (case, draw), value in one.items():
                if draw >= first:
                    answers[case, branch, draw - first], is_valid[case, branch, draw - first] = value, True
        return Block(answers, is_valid)

    branches = block(BRANCHES, first=0 if config.match_release else 1)
    if config.match_release:
        _leave_one_out(branches.is_valid, seed)
    unperturbed = block((*BRANCHES, "repeat"), first=0)
    baseline = _mean_answer(Block(unperturbed.answers[:, :3, :1], unperturbed.is_valid[:, :3, :1]))
    left_out = list(dict.fromkeys(factor for factor in factors if factor))
    taken = {"case", "branch", "draw", "factor", "answer", "label", *(f"p_{name}" for name in classes)}
    groups = {name: table.one_per("case", name) for name in table.columns if name not in taken}
    subjects = groups.pop("subject", None)
    if subjects is None and "subject" in table.columns:
        raise InputError(path, "one subject per case", "a case with several under 'subject'")
    return Answers(
        table.path, names, subjects or names, classes, _labels(table, names, classes), branches, baseline,
        Block(unperturbed.answers[:, 3:], unperturbed.is_valid[:, 3:]),
        {factor: block(("image", "text"), factor) for factor in left_out},
        {name: values for name, values in groups.items() if values is not None}, tuple(notes),
    )  # fmt: skip


def variances_of(answers: Answers, config: AnswerConfig, block: Block | None = None) -> Variances:
    """Return the variances of every case, or those of other answers to it.

    Raises:
        InputError: V_0 is to be taken off and nobody measured it.
    """
    noise = None
    if config.subtract_noise:
        if not (answers.repeats.is_valid.sum(axis=(1, 2)) > 1).all():
            raise InputError(answers.path, "two or more answers of branch repeat for every case", "fewer",
                             "ask them again with identical inputs, or leave out --data.subtract-noise")  # fmt: skip
        noise = noise_of(answers)
    given = block or answers.branches
    return branch_variances(jnp.asarray(given.answers), jnp.asarray(given.is_valid), config.covariance, noise)


def noise_of(answers: Answers) -> Float[Array, "case class"]:
    """Return V_0: the variance of answers to identical inputs, which is that of decoding; NaN where not measured."""
    return draw_variance(jnp.asarray(answers.repeats.answers[:, 0]), jnp.asarray(answers.repeats.is_valid[:, 0]))


def measured_cases(variances: Variances) -> Bool[np.ndarray, " case"]:
    """Say for which cases all three branches give a variance: those that a fit is made of."""
    is_known = np.isfinite(np.stack([np.asarray(part) for part in variances]))
    return np.asarray(is_known.all(axis=(0, 2)))


def without_factor(answers: Answers, name: str) -> tuple[Block, Bool[np.ndarray, " case"]]:
    """Return branches where a factor of the input is left out, and the cases that were asked so.

    A branch that nobody asked without the factor stays as it is, and so does the joint branch.
    """
    whole, part = answers.branches, answers.factors[name]
    most = max(whole.is_valid.shape[2], part.is_valid.shape[2])

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, 0), (0, most - array.shape[2]), *[(0, 0)] * (array.ndim - 3)])

    found, is_valid = padded(whole.answers), padded(whole.is_valid)
    is_given = part.is_valid.sum(axis=2) > 1
    for branch in range(2):
        rows = is_given[:, branch]
        found[rows, branch] = padded(part.answers)[rows, branch]
        is_valid[rows, branch] = padded(part.is_valid)[rows, branch]
    return Block(found, is_valid), is_given.any(axis=1)


def require_decided(answers: Answers, coefficients: Real[np.ndarray, "3"], variances: Variances) -> None:
    """Refuse answers that do not tell the three coefficients apart.

    Raises:
        InputError: An input changes no answer, or changes it in proportion to the other everywhere.
    """
    if np.isfinite(coefficients).all():
        return
    for name, part in (("image", variances.image), ("text", variances.text)):
        if not np.asarray(part).any():
            advice = f"perturb the {name} more, or take probabilities in place of sampled answers"
            raise InputError(answers.path, f"answers that change with the {name}", "the same ones everywhere", advice)
    raise InputError(
        answers.path, "V_I, V_T and C that are no multiples of one another", "a singular fit",
        "give more cases, or --fit.method ridge",
    )  # fmt: skip


def match_keyword(text: str) -> str | None:
    """Return the first of the released keywords, in their order, that an answer holds; None for none."""
    return next((word for word in KEYWORDS if word.lower() in text.lower()), None)


def _read_values(
    table: Table, config: AnswerConfig, notes: list[str]
) -> tuple[tuple[str, ...], list[np.ndarray | None]]:
    """Return classes, and a distribution for every row; None where a row has no answer."""
    columns = [name for name in table.columns if name.startswith("p_") and len(name) > 2]
    readout = config.readout
    if readout == "auto":
        readout = "probabilities" if columns and not config.match_release else "answers"
    if readout == "probabilities":
        if len(columns) < 2:
            raise InputError(table.path, "two or more columns p_OPTION", listed(columns) or "none")
        return _read_probabilities(table, columns, notes)
    if "answer" not in table.columns:
        advice = "columns p_OPTION are probabilities" if not columns else "--data.readout probabilities reads p_OPTION"
        raise InputError(table.path, "a column 'answer'", f"the columns {listed(table.columns)}", advice)
    return _read_texts(table, config, notes)


def _read_probabilities(table: Table, columns: list[str], notes: list[str]):
    cells = np.array([table.floats(name, allow_missing=True) for name in columns]).T
    missing = np.asarray(np.isnan(cells))
    rows = np.asarray(missing.all(axis=1))
    for row, line in enumerate(table.lines):
        total = np.nansum(cells[row])
        if missing[row].any() and not rows[row]:
            raise table.wrong(line, "a probability for every option, or for none", f"{missing[row].sum()} empty cells")
        if not rows[row] and (cells[row].min() < 0 or total > 1.001):
            raise table.wrong(line, "probabilities of at least 0 that sum to at most 1", f"a sum of {total:.6g}")
    rest = 1 - np.nansum(cells, axis=1)
    names = tuple(name[2:] for name in columns)
    if (rest[~rows] > 1e-3).any():  # a model's list of likely tokens may be cut
        names, cells = (*names, OTHER), np.column_stack([cells, np.maximum(rest, 0)])
        notes.append(f"Probabilities that sum to less than 1 have the rest as the class '{OTHER}'.")
    if rows.any():
        notes.append(f"{rows.sum()} rows have no probabilities and are left out.")
    return names, [None if empty else value.astype(np.float32) for empty, value in zip(rows, cells, strict=True)]


def _read_texts(table: Table, config: AnswerConfig, notes: list[str]):
    # The release looks for its keywords in what was said, not in the option that it means.
    texts = table.column("reply" if config.match_release and "reply" in table.columns else "answer")
    if config.match_release:
        words = [match_keyword(text) for text in texts]
        names = KEYWORDS
    elif config.options:
        if len(config.options) < 2 or len(config.options) > 26:
            raise InputError("data.options", "2 to 26 names", len(config.options))
        words = [match_answer(text, config.options) if text else None for text in texts]
        names = (*config.options, REFUSAL, OTHER)
    else:
        words = [text or None for text in texts]
        labels = table.column("label") if "label" in table.columns else []
        names = tuple(sorted({word for word in (*words, *labels) if word}))
        if not 2 <= len(names) <= MOST_CLASSES:
            advice = "give --data.options to find them in sentences"
            raise InputError(f"{table.path} 'answer'", f"2 to {MOST_CLASSES} different answers", len(names), advice)
    dropped = sum(word is None for word in words)
    if dropped:
        notes.append(f"{dropped} of {len(words)} answers are empty or match nothing and are left out.")
    for name in (REFUSAL, OTHER):
        if config.options and (number := words.count(name)):
            notes.append(f"{number} of {len(words)} answers are of the class '{name}'.")
    unit = np.eye(len(names), dtype=np.float32)
    return names, [None if word is None else unit[names.index(word)] for word in words]


def _leave_one_out(is_valid: np.ndarray, seed: int) -> None:
    """Drop one answer of every full branch at random, as the release draws 20 of 21."""
    rng = np.random.default_rng(seed)
    for case, branch in np.ndindex(*is_valid.shape[:2]):
        if is_valid[case, branch].all():
            is_valid[case, branch, rng.integers(is_valid.shape[2])] = False


def _mean_answer(block: Block) -> Float32[np.ndarray, "case class"]:
    count = block.is_valid.sum(axis=(1, 2)).astype(np.float32)[:, None]
    total = block.answers.sum(axis=(1, 2))
    return np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0)


def _labels(table: Table, cases: Sequence[str], classes: Sequence[str]) -> Int[np.ndarray, " case"]:
    if "label" not in table.columns:
        return np.full(len(cases), -1)
    cells: dict[str, str] = {}
    for row, line in zip(table.rows, table.lines, strict=True):
        if cells.setdefault(row["case"], row["label"]) != row["label"]:
            raise table.wrong(line, f"the label of case '{row['case']}' as before", f"'{row['label']}'")
        if row["label"] and row["label"] not in classes:
            advice = f"known: {listed(classes)}"
            raise table.wrong(line, "one of the options under 'label'", f"'{row['label']}'", advice)
    return np.array([classes.index(cells[case]) if cells[case] else -1 for case in cases])

"""Stage `jaxmed mupm answer`: a model answers the questions of `perturb`, each once, for `propagate`."""

import dataclasses
import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from jaxmed.config import Bounds, Number, Seed, checked
from jaxmed.data.chat import OpenAICompatible
from jaxmed.data.option_answers import OTHER, REFUSAL, Decoding, Reply
from jaxmed.errors import InputError
from jaxmed.files import require_given
from jaxmed.io.tables import write_table
from jaxmed.recipes.asked_models import (
    Backend,
    answer_cells,
    ask_all,
    endpoint_backend,
    mean_shares,
    read_questions,
    stand_in_backend,
)
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.small_answerer import SmallConfig, small_backend
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.figures import Bar, bars
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.train.run_folder import RunFolder

TRIES_FAILED_AGAIN = True
NOT_KEPT = ("image", "text", "options", "index")
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Ask a model.

    Attributes:
        questions: Table that `jaxmed mupm perturb` wrote, or the folder of that run.
        model: "endpoint" (any that speaks OpenAI's protocol), "llava" (run here, from --weights), "small" (trained here
            in minutes on drawn hearts, for synthetic cases) or "stand-in" (knows nothing: to try the road).
        endpoint: Of model endpoint; nothing is sent anywhere without it.
        weights: Of model llava: the folder of a checkpoint.
        small: Of model small: its training.
        decoding: How it answers.
        slices: Slices of a volume that are shown beside one another; PNGs are shown as they are.
        cache: File of replies, kept for further runs too; by default in the run.
        synthetic: Beating hearts to ask about, where no questions are given; 0 asks for questions.
        seed: Seed of drawn answers.
    """

    questions: Path | None = None
    model: Literal["endpoint", "llava", "small", "stand-in"] = "endpoint"
    endpoint: OpenAICompatible = OpenAICompatible()
    weights: Path | None = None
    small: SmallConfig = SmallConfig()
    decoding: Decoding = Decoding()
    slices: Annotated[int, Bounds(1, 64)] = 9
    cache: Path | None = None
    synthetic: Number = 0
    seed: Seed = 0


def paper() -> Config:
    """Your questions to a model of yours, probabilities of the options."""
    return Config()


def smoke() -> Config:
    """In seconds: your questions, or those about a few beating hearts, to the stand-in."""
    return Config(model="stand-in", synthetic=4)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was answered.

    Attributes:
        questions: In the table.
        different: Of them; each of these was asked once.
        failed: Without an answer.
        refused: Answers of the class refusal.
        other: Answers that name no option.
        silent: Answers without probabilities, where these were wanted.
        shares: Mean probability of every class, by branch; of one-hot answers where there are no probabilities.
        examples: Case, branch, draw and reply of the first few.
        notes: What a reader should know.
    """

    questions: int
    different: int
    failed: int
    refused: int
    other: int
    silent: int
    shares: dict[str, dict[str, float]]
    examples: tuple[tuple[str, str, str, str], ...]
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> int | None:
    """Read the questions, ask each different one once, write the answers."""
    clock, path = Clock(), config.questions
    if path is None and not config.synthetic:
        require_given(path, "questions")
    backend = _backend(config)
    seed_of = partial(_seed, config=config)
    table, inquiries = read_questions(path, config.decoding, seed_of) if path is not None else (None, [])
    log = begin(folder, () if table is None or not table.note else (table.note,))
    if table is None:
        changes = {"data.synthetic": config.synthetic, "seed": config.seed}
        made = nested_run(folder, "mupm perturb", changes, log, "Perturbing synthetic cases first.")
        table, inquiries = read_questions(made.path, config.decoding, seed_of)
    clock.lap("read")
    backend = backend or small_backend(config.small, folder.checkpoints, config.decoding, config.slices, log)
    kept = config.cache or folder.checkpoints / "replies.jsonl"
    replies = ask_all(inquiries, backend, kept, config.slices, log)
    clock.lap("ask")

    good = [place for place, reply in enumerate(replies) if isinstance(reply, Reply)]
    failed = [
        {"path": str(inquiries[place].image), "id": _name(table.rows[place]), "reason": str(reply)}
        for place, reply in enumerate(replies)
        if not isinstance(reply, Reply)
    ]
    write_failed(folder.outputs, failed)
    if not good:
        raise InputError(table.path, "one answer or more", "none", failed[0]["reason"])
    rows = [table.rows[place] for place in good]
    answers = [reply for reply in replies if isinstance(reply, Reply)]
    asked = [inquiries[place] for place in good]
    classes, cells = answer_cells(asked, answers)
    named = [name for name in table.columns if name not in NOT_KEPT and name not in ("answer", "reply", *classes)]
    columns = (*named, "answer", "reply", *classes)
    write_table(
        folder.outputs / "answers.csv", columns,
        [{name: row[name] for name in named} | cell for row, cell in zip(rows, cells, strict=True)],
    )  # fmt: skip
    clock.lap("write")

    meant = Counter(str(cell["answer"]) for cell in cells)
    wanted = config.decoding.readout == "probabilities"
    silent = sum(reply.probabilities is None and not reply.is_refusal for reply in answers) if wanted else 0
    summary = Summary(
        len(replies), len(set(inquiries)), len(failed), meant[REFUSAL], meant[OTHER], silent,
        mean_shares(rows, cells, classes),
        tuple((row["case"], row["branch"], row["draw"], str(cell["reply"])[:300])
              for row, cell in zip(rows[:EXAMPLES], cells, strict=False)),
        tuple(_notes(config, silent, len(answers), bool(classes))),
    )  # fmt: skip
    finish(folder, config, summary, clock, page)
    return 1 if failed else None


def _backend(config: Config) -> Backend | None:
    """Return who answers; None for the small model, which is trained when the run has begun."""
    match config.model:
        case "small":
            return None
        case "endpoint":
            return endpoint_backend(config.endpoint, config.decoding, config.slices)
        case "stand-in":
            return stand_in_backend(config.decoding, config.slices)
    from jaxmed.recipes.llava_answers import llava_backend

    return llava_backend(require_given(config.weights, "weights"), config.decoding, config.slices)


def _seed(row: dict[str, str], config: Config) -> int:
    """Return a seed that tells draws of one question apart: identical inputs are drawn anew for V_0 and each branch.

    Probabilities are no draws: only repeats, which measure what the model itself changes, are asked again.
    """
    words = [config.seed, row["case"]]
    if config.decoding.readout == "answers" or row["branch"].lower() == "repeat":
        words += [row["branch"].lower(), row.get("factor", ""), row["draw"]]
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:4], "big") >> 1


def _notes(config: Config, silent: int, answers: int, has_shares: bool) -> list[str]:
    notes = []
    if config.model == "stand-in":
        notes.append("No model was asked: the stand-in knows nothing, and what it says about a patient is chance.")
    if silent and has_shares:
        notes.append(
            f"{silent} of {answers} answers have no probabilities: jaxmed mupm propagate leaves them out, or reads "
            "all as text with --data.readout answers."
        )
    elif silent:
        notes.append(
            "The model tells no probabilities: its answers are read as text, which holds the noise of decoding."
        )
    return notes


def _name(row: dict[str, str]) -> str:
    return "-".join(part for part in (row["case"], row["branch"], row.get("factor", ""), row["draw"]) if part)


def page(run: Finished[Config, Summary]) -> Page:
    """Show what was answered, how much of it means something, and how to go on."""
    summary, config = run.summary, run.config
    strips = [
        Bar(name, value, group=branch) for branch, shares in summary.shares.items() for name, value in shares.items()
    ]
    caption = "Mean probability of every class by what was varied. Where branches differ, it moves answers one way."
    words = "The first answers as they were given."
    who = config.model if config.model != "endpoint" else f"{config.endpoint.model} behind an endpoint"
    text = Text([
        "outputs/answers.csv has a row per answer: what it means (answer), what was said (reply) and the probabilities "
        "of the options. Give it to jaxmed mupm propagate --table, transfer or redundancy.",
        "A refusal is a class of its own: it is an answer too, and may depend on how the question is put.",
    ])  # fmt: skip
    return Page(
        "Answers of a model",
        f"{summary.questions} questions, {summary.different} different ones, answered by {who}",
        [
            ("Answers", summary.questions - summary.failed, f"{summary.failed} failed"),
            ("Refusals", summary.refused, "a class of their own"),
            ("Neither option nor refusal", summary.other, "read by their text"),
            ("Without probabilities", summary.silent, "where these were wanted"),
        ],
        [
            Section("What was answered", [bars(strips, xlabel="mean probability", caption=caption)]),
            Section("Examples", [Table(("Case", "Varied", "Draw", "Reply"), list(summary.examples), words)]),
            Section("How to go on", [*(Note(note) for note in summary.notes), text]),
        ],
    )

"""Models that are asked multiple-choice questions about pictures, whatever runs them: one record, one way to ask.

A `Backend` answers a list of questions and tells each answer as it comes. `ask_all` asks every different question once:
replies stand in a file that only grows, so that a killed run goes on without paying twice.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmed.config import to_record
from jaxmed.data import chat
from jaxmed.data.chat import ChatReply, ChatRequest, OpenAICompatible
from jaxmed.data.cine import picture_of, png_of
from jaxmed.data.option_answers import REFUSAL, Decoding, Inquiry, Reply, letter_probabilities, letters, meaning_of
from jaxmed.errors import InputError, reason_of
from jaxmed.io.json_lines import append_lines, read_lines
from jaxmed.io.tables import Table, read_table, resolve_path
from jaxmed.synthesis.phantoms.stand_in import stand_in_probabilities
from jaxmed.train.log import Log

Tell = Callable[[int, Reply | str], None]
NEEDED = ("case", "branch", "draw", "image", "text", "options")
FIRST_WORDS = 8
"""Tokens of an answer whose probabilities are wanted: the letter may stand behind "(" or "The answer is"."""


class Backend(NamedTuple):
    """A model that can be asked.

    Attributes:
        identity: What decides its answers beside the question: replies are kept under it.
        ask: (questions, tell) -> None; calls tell(place, reply), or tell(place, reason) where there is none, for each,
            in any order. Raises InputError where nothing can be answered.
    """

    identity: str
    ask: Callable[[Sequence[Inquiry], Tell], None]


def read_questions(
    path: Path, decoding: Decoding, seed_of: Callable[[dict[str, str]], int]
) -> tuple[Table, list[Inquiry]]:
    """Return the table of questions, and each as it is asked.

    Args:
        path: CSV with columns case, branch, draw, image (relative to it), text and options (separated by |); or a run
            that wrote one as outputs/questions.csv.
        decoding: Its instruction ends every question.
        seed_of: Seed of a row: equal questions with equal seeds are one question.

    Raises:
        InputError: A column is missing, a row has fewer than two options or one of them twice, or no picture is there.
    """
    path = path / "outputs" / "questions.csv" if path.is_dir() else path
    table = read_table(path, NEEDED, ("subject", "label", "factor", "index"))
    inquiries = []
    for row, line in zip(table.rows, table.lines, strict=True):
        options = tuple(name.strip() for name in row["options"].split("|"))
        if not 2 <= len(options) <= 26 or len(set(options)) < len(options) or "" in options:
            raise table.wrong(line, "2 to 26 different options, separated by |", f"'{row['options']}'")
        image = resolve_path(row["image"], table.path.parent)
        text = f"{row['text']}\n{decoding.instruction}".strip()
        inquiries.append(Inquiry(image, text, options, seed_of(row)))
    if not any(one.image.exists() for one in inquiries):
        raise InputError(table.path, "pictures under 'image'", "none", f"paths start at {table.path.parent}")
    return table, inquiries


def endpoint_backend(config: OpenAICompatible, decoding: Decoding, slices: int) -> Backend:
    """Return a model behind an endpoint; volumes are shown as a montage of slices.

    Raises:
        InputError: No address, model or key is given as it should be.
    """
    url, _ = chat.address_of(config), chat.key_of(config)
    wants_probabilities = decoding.readout == "probabilities"

    def request(one: Inquiry) -> ChatRequest:
        png = png_of(one.image, slices)
        if wants_probabilities:
            return ChatRequest(png, one.text, 0.0, 1.0, FIRST_WORDS, one.seed, True)
        return ChatRequest(png, one.text, decoding.temperature, decoding.top_p, decoding.max_tokens, one.seed, False)

    def ask(inquiries: Sequence[Inquiry], tell: Tell) -> None:
        def told(place: int, found: ChatReply | str) -> None:
            if isinstance(found, str):
                return tell(place, found)
            number = len(inquiries[place].options)
            is_told = wants_probabilities and not found.is_refusal and found.tokens is not None
            shares = letter_probabilities(found.tokens, number) if is_told and found.tokens else None
            tell(place, Reply(found.text, shares, found.is_refusal))

        chat.converse([lambda one=one: request(one) for one in inquiries], config, told)

    asked = to_record(decoding) | {"url": url, "model": config.model, "top": config.top_logprobs, "slices": slices}
    return Backend(json.dumps(asked, sort_keys=True), ask)


def stand_in_backend(decoding: Decoding, slices: int) -> Backend:
    """Return a stand-in without any knowledge, to try the road: fixed random sums over picture and words."""

    def ask(inquiries: Sequence[Inquiry], tell: Tell) -> None:
        for place, one in enumerate(inquiries):
            shares = stand_in_probabilities(picture_of(one.image, slices), one.text, len(one.options))
            letter = int(shares.argmax())
            if decoding.readout == "answers":
                letter = int(np.random.default_rng(one.seed).choice(len(shares), p=shares))
            told = tuple(map(float, shares)) if decoding.readout == "probabilities" else None
            tell(place, Reply(letters(len(shares))[letter], told, False))

    return Backend(json.dumps(to_record(decoding) | {"model": "stand-in", "slices": slices}, sort_keys=True), ask)


def ask_all(inquiries: Sequence[Inquiry], backend: Backend, kept: Path, slices: int, log: Log) -> list[Reply | str]:
    """Ask every different question that has no reply yet.

    Args:
        inquiries: Equal ones are asked once.
        backend: Who answers.
        kept: File of replies, which grows; see `io.json_lines`.
        slices: Of volumes.
        log: Gets progress and what fails.

    Returns:
        A reply for each, or the reason why there is none.

    Raises:
        InputError: Nothing can be answered, or replies cannot be kept.
    """
    keys, failed = _keys(inquiries, backend.identity, slices)
    known = {key: _reply(record) for key, record in read_lines(kept).items()}
    todo = {key: one for key, one in zip(keys, inquiries, strict=True) if key not in known and key not in failed}
    if done := len(set(keys) & set(known)):
        log.say(f"{done:,} questions were answered before and are not asked again.")
    places, count = list(todo), 0
    with append_lines(kept) as append, log.progress("Asking", len(places), "questions") as update:

        def tell(place: int, found: Reply | str) -> None:
            nonlocal count
            count += 1
            if isinstance(found, str):
                failed[places[place]] = found
                log.say(f"Failed: {found}")
            else:
                append(places[place], found._asdict())
                known[places[place]] = found
            update(count)

        if places:
            backend.ask(list(todo.values()), tell)
    return [known[key] if key in known else failed[key] for key in keys]


def answer_cells(asked: Sequence[Inquiry], answers: Sequence[Reply]) -> tuple[tuple[str, ...], list[dict[str, object]]]:
    """Return the columns of probabilities, and the cells of every answer: what it means, what was said, probabilities.

    An option that a case was not offered has probability 0. A refusal has probability 1 of its own class.
    """
    options = tuple(dict.fromkeys(name for one in asked for name in one.options))
    has_shares = any(reply.probabilities is not None for reply in answers)
    classes: tuple[str, ...] = ()
    if has_shares:
        refused = any(reply.is_refusal for reply in answers)
        classes = tuple(f"p_{name}" for name in (*options, *((REFUSAL,) if refused else ())))
    cells = []
    for one, reply in zip(asked, answers, strict=True):
        cell: dict[str, object] = {"answer": meaning_of(reply, one.options), "reply": reply.text}
        if has_shares and reply.is_refusal:
            cell |= dict.fromkeys(classes, 0) | {f"p_{REFUSAL}": 1}
        elif reply.probabilities is not None:
            shares = zip(one.options, reply.probabilities, strict=True)
            cell |= dict.fromkeys(classes, 0) | {f"p_{name}": f"{share:.8f}" for name, share in shares}
        cells.append(cell)
    return classes, cells


def mean_shares(
    rows: Sequence[dict[str, str]], cells: Sequence[dict[str, object]], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the mean probability of every class by branch, whole inputs alone."""
    found: dict[str, dict[str, list[float]]] = {}
    names = [name[2:] for name in classes] or sorted({str(cell["answer"]) for cell in cells})
    for row, cell in zip(rows, cells, strict=True):
        if row.get("factor") or (classes and classes[0] not in cell):
            continue
        one = found.setdefault(row["branch"].lower(), {name: [] for name in names})
        for name in names:
            one[name].append(float(str(cell[f"p_{name}"])) if classes else float(cell["answer"] == name))
    return {branch: {name: float(np.mean(values)) for name, values in one.items()} for branch, one in found.items()}


def _keys(inquiries: Sequence[Inquiry], identity: str, slices: int) -> tuple[list[str], dict[str, str]]:
    """Return the key of each question, which the bytes of its picture decide, and by key what is wrong with some."""
    pictures: dict[Path, str] = {}
    keys, failed = [], {}
    for one in inquiries:
        if one.image not in pictures:
            try:
                pictures[one.image] = hashlib.sha256(png_of(one.image, slices)).hexdigest()
            except (InputError, OSError, MemoryError) as error:
                pictures[one.image] = f"broken: {reason_of(error, one.image)}"
        picture = pictures[one.image]
        words = json.dumps([identity, picture, one.text, one.options, one.seed])
        keys.append(hashlib.sha256(words.encode()).hexdigest())
        if picture.startswith("broken: "):
            failed[keys[-1]] = picture.removeprefix("broken: ")
    return keys, failed


def _reply(record: dict) -> Reply:
    shares = record["probabilities"]
    return Reply(record["text"], None if shares is None else tuple(shares), record["is_refusal"])

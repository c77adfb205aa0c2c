"""What a model's answer to a multiple-choice question means: one of the options, a refusal, or none of these."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from jaxmed.config import Bounds, Fraction, Seed, Size, checked

REFUSAL, OTHER = "refusal", "other"
REFUSED = re.compile(
    r"\b(i (can(no|')t|am (not able|unable)|won't)|i'm (sorry|unable|not able)|as an ai|cannot (provide|give|offer))\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
@checked
class Decoding:
    """How a model answers.

    Attributes:
        readout: "probabilities" of the options' letters, in one forward pass and without the noise of decoding; or
            "answers", drawn as text, as the release has them.
        temperature: Of drawn answers.
        top_p: Mass of likely tokens that drawn answers are made of.
        max_tokens: Of a drawn answer; with probabilities the letter comes within the first few.
        instruction: Ends every question.
    """

    readout: Literal["probabilities", "answers"] = "probabilities"
    temperature: Annotated[float, Bounds(0, 10)] = 1.0
    top_p: Fraction = 0.9
    max_tokens: Size = 64
    instruction: str = "Answer with the letter of one option."


class Inquiry(NamedTuple):
    """One multiple-choice question about a picture.

    Attributes:
        image: A picture or volume.
        text: The question, its options and what else is to be said.
        options: Names, in the order of the letters A, B, C.
        seed: Of a drawn answer; other seeds give other draws of one question.
    """

    image: Path
    text: str
    options: tuple[str, ...]
    seed: Seed


class Reply(NamedTuple):
    """One answer.

    Attributes:
        text: What was said.
        probabilities: Of the options; None where the model does not tell.
        is_refusal: Whether the model refused.
    """

    text: str
    probabilities: tuple[float, ...] | None
    is_refusal: bool


def meaning_of(reply: Reply, options: Sequence[str]) -> str:
    """Return the option that a reply means, `REFUSAL` or `OTHER`."""
    return REFUSAL if reply.is_refusal else match_answer(reply.text, options)


def letters(number: int) -> str:
    """Return the letters of so many options."""
    return "".join(chr(ord("A") + place) for place in range(number))


def block_of(options: Sequence[str]) -> str:
    """Return the lines that offer the options: "A. valve" and so on."""
    return "\n".join(f"{letter}. {name}" for letter, name in zip(letters(len(options)), options, strict=True))


def letter_probabilities(tokens: Sequence[tuple[str, Mapping[str, float]]], number: int) -> tuple[float, ...] | None:
    """Return the probabilities of the options where an answer names its letter.

    That is at the first token that is such a letter, or, where there is none, at the first with a letter or digit in
    it: "(" or "**" say nothing. Several tokens may spell one letter ("A", " A", "(a"): their probabilities are added.

    Args:
        tokens: Of an answer in order: each, and log-probabilities of what might have stood there, by token.
        number: Options.

    Returns:
        They sum to at most 1; the rest is other words, and whatever the list of likely tokens left out. None where no
        token says anything.
    """
    found = dict.fromkeys(letters(number), 0.0)
    words = [(re.sub(r"[\W_]", "", token), likely) for token, likely in tokens]
    likely = next((likely for word, likely in words if word in found), None)
    likely = likely or next((likely for word, likely in words if word), None)
    if not likely:
        return None
    for token, logarithm in likely.items():
        spelt = re.sub(r"[\W_]", "", token).upper()
        if spelt in found and math.isfinite(logarithm):
            found[spelt] += math.exp(logarithm)
    total = max(1.0, sum(found.values()))  # rounding
    return tuple(value / total for value in found.values())


def match_answer(text: str, options: Sequence[str]) -> str:
    """Return the option that an answer means, `REFUSAL` or `OTHER`.

    A letter that stands as one ("B", "(b)", "B. valve", "the answer is B") comes before names; of names the longest
    that is found, the earliest of equally long ones.
    """
    last = chr(ord("A") + len(options) - 1)
    for pattern in (
        rf"(?i)^\W*([A-{last}])\s*(?:[).:,]|$)",
        rf"(?i)\(([A-{last}])\)",
        rf"\b(?i:answer|option)(?:\s+is)?\s*:?\s*([A-{last}])\b",  # "the answer is a valve" has an article
    ):
        if hit := re.search(pattern, text):
            return options[ord(hit[1].upper()) - ord("A")]
    # Before names: it may name the disease that it will not speak of.
    if text.strip().lower() == REFUSAL or REFUSED.search(text):
        return REFUSAL
    names = [name for name in options if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)]
    return max(names, key=len) if names else OTHER

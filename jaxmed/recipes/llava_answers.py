"""LLaVA as a model that is asked: pictures and questions to probabilities of the options, or to drawn answers.

Questions about one picture share what the model has read of it: only their words are computed, in batches. Questions
that each have a picture of their own are batched too.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.data.cine import picture_of
from jaxmed.data.option_answers import Decoding, Inquiry, Reply, letters
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError, require_extra
from jaxmed.models.llava import (
    LlavaConfig,
    Sampling,
    Texts,
    answer_texts,
    next_logits,
    read_prefix,
    require_placeholders,
)
from jaxmed.models.published.load import load_published
from jaxmed.nn.model import Model
from jaxmed.recipes.asked_models import Backend, Tell

TEMPLATE = "USER: <image>\n{text} ASSISTANT:"
PLACEHOLDER = "<image>"
BATCH = 8
ROUND = 32
"""Texts are padded to multiples of so many tokens: each length is a compiled program."""


class LlavaAnswerer(NamedTuple):
    """A LLaVA model with what stands around it.

    Attributes:
        model: Of `models.llava.Llava`.
        params: Its parameters.
        config: Its sizes.
        preprocess: A picture to its input.
        tokenizer: Of the package tokenizers.
        end: Token that ends an answer.
        name: Where it was read from.
    """

    model: Model
    params: Params
    config: LlavaConfig
    preprocess: Preprocess
    tokenizer: Any
    end: int
    name: str


def read_llava(folder: Path) -> LlavaAnswerer:
    """Read weights and tokenizer.json from a folder, as Hugging Face has them.

    Raises:
        InputError: Something is missing, of another model, or the tokenizer does not know the placeholder.
    """
    tokenizers = require_extra("tokenizers", "llava", "model", "for LLaVA")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(path, "the tokenizer beside the weights", "no such file", "copy the whole folder")
    published = load_published(folder, "llava")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise InputError(path, "a tokenizer in JSON", str(error)[:200], "copy it again") from error
    number = tokenizer.token_to_id(PLACEHOLDER)
    if number != published.config.image_token:
        expected = f"'{PLACEHOLDER}' as token {published.config.image_token}, as config.json says"
        raise InputError(path, expected, number)
    end = next((tokenizer.token_to_id(word) for word in ("</s>", "<|eot_id|>", "<|end|>")
                if tokenizer.token_to_id(word) is not None), 2)  # fmt: skip
    parts = published.model, published.params, published.config, published.preprocess
    return LlavaAnswerer(*parts, tokenizer, end, str(folder))


def split_prompt(answerer: LlavaAnswerer, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens up to the image, placeholders included, and those of the words behind it.

    Raises:
        InputError: The words hold a placeholder themselves.
    """
    numbers = answerer.tokenizer.encode(TEMPLATE.format(text=text)).ids
    image, count = answerer.config.image_token, answerer.config.vision.tokens
    places = [place for place, number in enumerate(numbers) if number == image]
    if len(places) != 1:
        raise InputError("text", f"a question without '{PLACEHOLDER}'", f"{len(places) - 1} of them")
    before = [*numbers[: places[0]], *[image] * count]
    require_placeholders(np.array([before]), answerer.config)
    return before, numbers[places[0] + 1 :]


def letter_tokens(tokenizer: Any, number: int) -> list[list[int]]:
    """Return the tokens that spell each option's letter, with and without a space before it.

    Raises:
        InputError: The tokenizer has none for a letter.
    """
    found = []
    for letter in letters(number):
        spelt = [tokenizer.token_to_id(f"{space}{letter}") for space in ("", "▁", "Ġ")]
        found.append([token for token in spelt if token is not None])
        if not found[-1]:
            raise InputError("tokenizer", f"a token for the letter {letter}", "none")
    return found


def option_probabilities(
    logits: Float[np.ndarray, " token_id"], tokens: Sequence[Sequence[int]]
) -> Float[np.ndarray, " option"]:
    """Return the softmax over the options' letters, each the sum of what spells it; other words are left out."""
    sums = np.array([np.logaddexp.reduce(logits[list(spelt)].astype(np.float64)) for spelt in tokens])
    shares = np.exp(sums - sums.max())
    return shares / shares.sum()


class Group(NamedTuple):
    """Questions that go through the model together: about one picture, or about one each."""

    places: tuple[int, ...]
    is_shared: bool


def group_by_image(images: Sequence[Path], batch: int = BATCH) -> list[Group]:
    """Put questions about one picture together, and those that have a picture for themselves."""
    by_image: dict[Path, list[int]] = {}
    for place, image in enumerate(images):
        by_image.setdefault(image, []).append(place)
    alone = [places[0] for places in by_image.values() if len(places) == 1]
    shared = [places for places in by_image.values() if len(places) > 1]
    found = [Group(tuple(part), True) for places in shared for part in _chunks(places, batch)]
    return [*found, *(Group(tuple(part), False) for part in _chunks(alone, batch))]


def llava_backend(folder: Path, decoding: Decoding, slices: int) -> Backend:
    """Return LLaVA from a folder of weights; volumes are shown as a montage of slices.

    Raises:
        InputError: See `read_llava`.
    """
    answerer = read_llava(folder)
    asked = to_record(decoding) | {"weights": answerer.name, "slices": slices, "template": TEMPLATE}
    ask = functools.partial(ask_llava, answerer, decoding, slices)
    return Backend(json.dumps(asked, sort_keys=True), ask)


def ask_llava(
    answerer: LlavaAnswerer, decoding: Decoding, slices: int, inquiries: Sequence[Inquiry], tell: Tell
) -> None:
    """Answer questions, each picture read once; what a question is told depends on nothing else that is asked."""
    model, config, params = answerer.model, answerer.config, jax.device_put(answerer.params)
    prefix_of = jax.jit(functools.partial(read_prefix, model))
    logits_of = jax.jit(lambda params, prefix, texts: next_logits(model, params, prefix, texts)[0])
    sampling = Sampling(decoding.max_tokens, decoding.temperature, decoding.top_p, answerer.end)

    @jax.jit
    def draw(params: Params, prefix: Any, texts: Texts, keys: Any) -> Any:
        return answer_texts(model, params, config, prefix, texts, keys, sampling)

    spellings = functools.lru_cache(functools.partial(letter_tokens, answerer.tokenizer))
    image_of = _reader(answerer.preprocess, slices)
    prefix: Any = None
    last: Path | None = None
    for group in group_by_image([one.image for one in inquiries]):
        asked = [inquiries[place] for place in group.places]
        prompts = [split_prompt(answerer, one.text) for one in asked]
        texts = _pad([words for _, words in prompts], BATCH)
        if not group.is_shared or last != asked[0].image:
            kept = asked[:1] if group.is_shared else [*asked, *[asked[-1]] * (BATCH - len(asked))]
            images = jnp.asarray(np.stack([image_of(one.image) for one in kept]))
            before = jnp.asarray([prompts[0][0]] * len(kept))  # the same for all: the template's
            prefix, last = prefix_of(params, images, before), asked[0].image if group.is_shared else None
        if decoding.readout == "probabilities":
            rows = np.asarray(logits_of(params, prefix, texts))
            for place, one, row in zip(group.places, asked, rows, strict=False):
                shares = option_probabilities(row, spellings(len(one.options)))
                letter = letters(len(one.options))[int(shares.argmax())]
                tell(place, Reply(letter, tuple(map(float, shares)), False))
            continue
        seeds = [one.seed for one in asked] + [0] * (BATCH - len(asked))
        drawn = np.asarray(draw(params, prefix, texts, jnp.stack([jax.random.key(seed) for seed in seeds])))
        for place, row in zip(group.places, drawn, strict=False):
            tell(place, Reply(answerer.tokenizer.decode(_until(row.tolist(), answerer.end)).strip(), None, False))


def _reader(preprocess: Preprocess, slices: int) -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        return preprocess(np.repeat(picture_of(path, slices)[..., None], preprocess.channels, axis=-1))

    return read


def _pad(rows: Sequence[Sequence[int]], batch: int) -> Texts:
    """Return texts of one length, and of a whole batch, which repeats the last one."""
    longest = max(len(row) for row in rows)
    length = -(-longest // ROUND) * ROUND
    filled = [*rows, *[rows[-1]] * (batch - len(rows))]
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in filled], np.int32)
    return Texts(jnp.asarray(tokens), jnp.asarray([len(row) for row in filled], jnp.int32))


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))

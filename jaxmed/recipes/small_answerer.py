"""A small model of our own that is asked: LLaVA's parts, trained in minutes on drawn hearts and records.

It knows nothing of patients. It is there so that perturbed questions, answers, coefficients and every figure can be
made by anyone, with a model that really reads picture and words: symptoms and history in the training records are
wrong at times, and pictures are moved, so neither input decides alone.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Key

from jaxmed.arrays.trees import replace
from jaxmed.arrays.types import Params
from jaxmed.config import Bounds, Positive, Seed, Share, Size, checked, to_record
from jaxmed.data.intensity import Intensity
from jaxmed.data.option_answers import Decoding, block_of, letters
from jaxmed.data.preprocess import Preprocess
from jaxmed.io import safetensors
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import ClipConfig, Llava, LlavaConfig, Texts, next_logits, read_prefix
from jaxmed.nn.model import Model, make_model
from jaxmed.recipes.asked_models import Backend
from jaxmed.recipes.llava_answers import PLACEHOLDER, TEMPLATE, LlavaAnswerer, ask_llava, split_prompt
from jaxmed.synthesis.image_moves import ImageConfig, perturb_images
from jaxmed.synthesis.phantoms.cine import CONDITIONS, HISTORY, SYMPTOMS, TASKS, beating_heart, draw_record
from jaxmed.synthesis.record_texts import QUESTIONS, TEMPLATES, facts_of, known_fields, question, render
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log

EDGE = 32
"""Pixels of a picture along both axes."""
# About zero: the layer norm on patches without a constant would make bright and dark ones the same.
INTENSITY = Intensity("unit", mean=(0.35,), std=(0.25,))
LENGTH = 160
"""Tokens of a training text, at most."""
CHUNK = 25
"""Steps of one compiled program, after which progress is told."""


@dataclasses.dataclass(frozen=True)
@checked
class SmallConfig:
    """Training of the small model.

    Attributes:
        cases: Drawn hearts with records.
        views: Perturbed pictures, and texts in other words, of each case.
        steps: Updates.
        batch: Questions of an update.
        rate: Largest learning rate.
        confusion: Probability that symptoms, and likewise the history, of a training record say nothing.
        omission: Probability that a field of a training record is missing.
        seed: Of cases, parameters and order.
    """

    cases: Annotated[int, Bounds(3, 100_000)] = 600
    views: Annotated[int, Bounds(1, 100)] = 8
    steps: Size = 500
    batch: Size = 32
    rate: Positive = 2e-3
    confusion: Share = 0.4
    omission: Share = 0.5
    seed: Seed = 0


class Encoded(NamedTuple):
    """What a tokenizer makes of a text."""

    ids: list[int]


class WordTokenizer(NamedTuple):
    """A tokenizer of words in lower case and single digits; it has the calls of the package tokenizers that are used.

    Attributes:
        words: Numbers by word; 0 ends an answer, 1 is the placeholder of an image, 2 any unknown word.
    """

    words: dict[str, int]

    def encode(self, text: str) -> Encoded:
        """Return the numbers of a text's words."""
        return Encoded([self.words.get(word, 2) for word in _split(text)])

    def token_to_id(self, word: str) -> int | None:
        """Return the number of a word; None for an unknown one."""
        return self.words.get(word.lower())

    def decode(self, numbers: list[int]) -> str:
        """Return words; a single letter as a capital."""
        names = list(self.words)
        words = [names[number] for number in numbers if number > 2]
        return " ".join(word.upper() if len(word) == 1 else word for word in words)


class Questions(NamedTuple):
    """Training questions; picture and text of a case are drawn apart.

    Attributes:
        images: As the network sees them.
        tokens: Of the words behind the picture.
        lengths: Tokens of each text.
        answers: Token of the right letter.
    """

    images: Float32[np.ndarray, "case view row column 1"]
    tokens: Int[np.ndarray, "case view token"]
    lengths: Int[np.ndarray, "case view"]
    answers: Int[np.ndarray, "case view"]


def make_tokenizer() -> WordTokenizer:
    """Return a tokenizer that knows the words of the phantom's facts, of their templates and of the options."""
    fields = known_fields(facts_of(draw_record(np.random.default_rng(0), CONDITIONS[0])))
    texts = [
        *(template for field in fields for template in TEMPLATES[field]), *QUESTIONS, *SYMPTOMS.values(),
        *HISTORY.values(), *(name for options in TASKS.values() for name in options.values()), TEMPLATE,
        Decoding().instruction, "woman man never former current none rarely daily", "0123456789", " ".join(letters(26)),
    ]  # fmt: skip
    words = dict.fromkeys(word for text in texts for word in _split(text) if word != PLACEHOLDER)
    return WordTokenizer({word: number for number, word in enumerate(["</s>", PLACEHOLDER, "<unk>", *words])})


def model_config(tokenizer: WordTokenizer) -> LlavaConfig:
    """Return the sizes: 64 patches, averaged in blocks of four to 16 tokens, and two blocks in either transformer."""
    return LlavaConfig(
        ClipConfig(EDGE, 4, 1, 64, 2, 4, 128, layer=-1, pool=2),
        LlamaConfig(len(tokenizer.words), 64, 2, 4, 4, 16, 128),
        1,
    )


def small_answerer(params: Params) -> LlavaAnswerer:
    """Return the model as LLaVA is asked."""
    tokenizer = make_tokenizer()
    config = model_config(tokenizer)
    preprocess = Preprocess((EDGE, EDGE), 1, axes="xyz", fit="stretch", intensity=INTENSITY)
    return LlavaAnswerer(make_model(Llava(config)), params, config, preprocess, tokenizer, 0, "small")


def draw_questions(config: SmallConfig, answerer: LlavaAnswerer) -> Questions:
    """Draw hearts and records, each in several perturbed pictures and texts, about all `TASKS`."""
    rng = np.random.default_rng(config.seed)
    program = jax.jit(functools.partial(perturb_images, config=ImageConfig()), static_argnums=2)
    keys = jax.random.split(jax.random.key(config.seed), (config.cases, config.views))
    shape = (config.cases, config.views)
    images = np.zeros((*shape, EDGE, EDGE, 1), np.float32)
    tokens, lengths, answers = (
        np.zeros((*shape, LENGTH), np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    for case in range(config.cases):
        condition = CONDITIONS[case % len(CONDITIONS)]
        cine = beating_heart(rng, condition)
        images[case, ..., 0] = np.asarray(program(keys[case], jnp.asarray(cine), (1.0, 1.0)))
        images[case, 0, ..., 0] = (cine[0] - cine[0].min()) / (cine[0].max() - cine[0].min())  # the stored picture
        facts = facts_of(draw_record(rng, condition, config.confusion))
        for view in range(config.views):
            options = TASKS[list(TASKS)[rng.integers(len(TASKS))]]
            names = tuple(dict.fromkeys(options.values()))
            missing = [field for field in known_fields(facts)[1:] if rng.random() < config.omission]
            asked = question(rng, f"in {rng.integers(1, 11)} years", block_of(names))
            text = f"{render(rng, facts, missing)}\n{asked}\n{Decoding().instruction}"
            words = split_prompt(answerer, text)[1][:LENGTH]
            tokens[case, view, : len(words)], lengths[case, view] = words, len(words)
            letter = letters(len(names))[names.index(options[condition])]
            answers[case, view] = answerer.tokenizer.token_to_id(letter)
    images = (images - np.float32(INTENSITY.mean[0])) / np.float32(INTENSITY.std[0])
    return Questions(images, tokens, lengths, answers)


def answer_loss(
    model: Model, params: Params, image: Float[Array, "batch row column 1"], before: Any, texts: Texts, answers: Any
) -> Float[Array, ""]:
    """Return the mean cross-entropy of the right letter, in nats, among all words."""
    prefix = read_prefix(model, params, image, before)
    logits, _ = next_logits(model, params, prefix, texts)
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


def train_small(config: SmallConfig, log: Log | None = None) -> tuple[Params, Float[np.ndarray, " step"]]:
    """Train from drawn parameters.

    Args:
        config: How long, and on what.
        log: Gets progress.

    Returns:
        Parameters, and the loss of every step.
    """
    if log is not None:
        log.say(f"Drawing {config.cases:,} cases for the small model: up to a minute or two on a CPU.")
    answerer = small_answerer({})
    model, before = answerer.model, jnp.asarray([split_prompt(answerer, "")[0]] * config.batch)
    data = jax.tree.map(jnp.asarray, draw_questions(config, answerer))
    data = data._replace(tokens=data.tokens[..., : int(data.lengths.max())])
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    params = model.init(init_key, data.images[:1, 0], before[:1])
    warmup = min(50, max(1, config.steps // 5))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.rate, warmup, config.steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def step(carry: Any, key: Key[Array, ""]) -> tuple[Any, Array]:
        params, state = carry
        case_key, image_key, text_key = jax.random.split(key, 3)
        case = jax.random.randint(case_key, (config.batch,), 0, config.cases)
        image, text = (jax.random.randint(one, (config.batch,), 0, config.views) for one in (image_key, text_key))
        texts = Texts(data.tokens[case, text], data.lengths[case, text])
        loss, gradient = jax.value_and_grad(answer_loss, argnums=1)(
            model, params, data.images[case, image], before, texts, data.answers[case, text]
        )
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    # One program for all chunks; the last one may be shorter and then is a second program.
    program = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry, losses, keys = (params, optimizer.init(params)), [], jax.random.split(order_key, config.steps)
    for start in range(0, config.steps, CHUNK):
        carry, found = program(carry, keys[start : start + CHUNK])
        losses.append(np.asarray(found))
        if log is not None:
            log.say(f"Training the small model: step {start + len(found):,} of {config.steps:,}, "
                    f"loss {losses[-1].mean():.3f}")  # fmt: skip
    return jax.tree.map(np.asarray, carry[0]), np.concatenate(losses)


def small_backend(config: SmallConfig, folder: Path, decoding: Decoding, slices: int, log: Log) -> Backend:
    """Return the small model, trained now, or as it was left in a folder by a run of the same configuration.

    Args:
        config: Its training.
        folder: Where it is kept.
        decoding: How it answers.
        slices: Of volumes.
        log: Gets progress.
    """
    answerer, place = small_answerer({}), folder / "small"
    if (place / "parameters.safetensors").is_file():  # written by one rename, after the record
        leaves = safetensors.read(place / "parameters.safetensors")
        sizes = answerer.config.vision.image_size
        image, tokens = jnp.zeros((1, sizes, sizes, 1)), jnp.asarray([split_prompt(answerer, "")[0]])
        params = replace(jax.eval_shape(answerer.model.init, jax.random.key(0), image, tokens), leaves)
    else:
        params, _ = train_small(config, log)
        export_parameters(place, params, to_record(config))
    asked = to_record(decoding) | {"model": "small", "training": to_record(config), "slices": slices}
    # It has learnt to say a letter, and not to stop after it.
    said = dataclasses.replace(decoding, max_tokens=1)
    ask = functools.partial(ask_llava, answerer._replace(params=params), said, slices)
    return Backend(json.dumps(asked, sort_keys=True), ask)


def _split(text: str) -> list[str]:
    return re.findall(rf"{PLACEHOLDER}|\d|[^\W\d]+", text.lower())

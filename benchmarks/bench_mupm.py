"""Uncertainty of multimodal models: rows `shared_prefix`, `llava_decode`, `readouts` and `bootstrap_refits`.

`shared_prefix`: probabilities of the options for R rewritten questions about one picture, where the picture and the
words before it are read once; "plain" reads each question with its picture anew and writes an answer of some tokens, as
the release does. Accuracy: the largest difference of the first token's logits between the two roads.
`llava_decode`: tokens of the decoder, one after another with the cache of keys and values, after the same prefix; the
peer is transformers, with our weights, greedy, in float32. Accuracy: the share of equal tokens.
`readouts`: how much an answer varies with the words of a question, summed over options: from the probabilities of the
options for R wordings, and from drawn answers until the standard error is the same. Drawn answers hold the noise of
decoding, which only several answers to a wording tell apart (ANOVA's component); how many is the best of 2, 4, 8, 16.
The model is our small one, trained here, and a drawn answer is one token: the least that one can cost. Accuracy:
forward passes of both, their ratio (and its median over records), standard errors, the variance that both find.
`bootstrap_refits`: 10,000 refits of the propagation model on resampled cases.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import (
    Conditions,
    Measurement,
    Peak,
    Row,
    alternate,
    compile_apart,
    describe_cpu,
    emit,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.arrays.trees import named_leaves
from jaxmed.data.option_answers import Decoding, block_of
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import (
    ClipConfig,
    Llava,
    LlavaConfig,
    Sampling,
    Texts,
    answer_texts,
    next_logits,
    read_prefix,
)
from jaxmed.models.published.llava import entries
from jaxmed.models.published.names import to_tensor
from jaxmed.nn.model import make_model
from jaxmed.recipes.llava_answers import LlavaAnswerer, letter_tokens, split_prompt
from jaxmed.recipes.small_answerer import SmallConfig, small_answerer, train_small
from jaxmed.synthesis.phantoms.cine import CONDITIONS, TASKS, beating_heart, draw_record
from jaxmed.synthesis.record_texts import facts_of, question, render
from jaxmed.systems.mupm.regression import FitConfig, case_products, make_design, refit
from jaxmed.train.announce import count_operations


class Workload(NamedTuple):
    """One size.

    Attributes:
        config: Of the model.
        draws: Questions about one picture.
        words: Tokens of a question.
        answer: Tokens of an answer that is written.
        resamples: Refits.
        small: Training of the small model whose readouts are compared.
        records: Of people who are asked about.
        pool: Wordings of the question about each of them, which are drawn from.
    """

    config: LlavaConfig
    draws: int
    words: int
    answer: int
    resamples: int = 10_000
    small: SmallConfig = SmallConfig()
    records: int = 9
    pool: int = 480


def sized(image: int, vision: tuple[int, int, int], text: tuple[int, int, int, int], dtype: Any = "float32"):
    """Return a model of an image size, and width, depth and heads of both transformers."""
    width, depth, heads, key_heads = text
    return LlavaConfig(
        ClipConfig(image, 14, 3, *vision, 4 * vision[0]),
        LlamaConfig(4096, width, depth, heads, key_heads, width // heads, 11 * width // 4, dtype=dtype),
        4000,
    )


WORKLOADS = {
    "smoke": Workload(sized(28, (32, 2, 2), (32, 2, 4, 2)), 4, 6, 4, 100, SmallConfig(3, 2, 20), 3, 16),
    "cpu": Workload(sized(224, (384, 6, 6), (512, 8, 8, 4)), 20, 120, 64),
    "gpu": Workload(sized(336, (1024, 24, 16), (2048, 16, 32, 8), "bfloat16"), 20, 240, 64),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    bench = Bench(WORKLOADS[config.size], config.peer, config.repeats, conditions, measure_peak())
    emit([*bench.shared(), *bench.decode(), *bench.readouts(), *bench.refits()], config.json)


class Bench:
    """A model under drawn weights, a picture and questions about it."""

    def __init__(self, work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak):
        """Draw all that is measured."""
        self.work, self.repeats, self.conditions, self.peak = work, repeats, conditions, peak
        config, rng = work.config, np.random.default_rng(0)
        self.model = make_model(Llava(config))
        size = config.vision.image_size
        self.image = jnp.asarray(rng.standard_normal((1, size, size, 3)), jnp.float32)
        self.before = jnp.asarray([[1, 5, 9, *[config.image_token] * config.vision.tokens]])
        self.words = jnp.asarray(rng.integers(3, 3999, (work.draws, work.words)))
        self.texts = Texts(self.words, jnp.full(work.draws, work.words))
        self.keys = jax.random.split(jax.random.key(0), work.draws)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.image, self.before)

        def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
            values = rng.standard_normal(shape.shape).astype(np.float32)
            return jnp.asarray(1 + 0.1 * values if len(shape.shape) == 1 else values / np.sqrt(shape.shape[0]))

        self.params = jax.tree.map(leaf, shapes)
        self.peer = Transformers(work, self.params, len(conditions.cores)) if with_peer else None

    @property
    def said(self) -> str:
        """The model in words."""
        text, vision = self.work.config.text, self.work.config.vision
        return f"decoder {text.width} x {text.depth}, {vision.tokens} image tokens, {text.dtype}"

    def shared(self) -> list[Row]:
        """Measure one pass over questions behind a shared prefix, and reading and writing each anew."""
        model, work, sampling = self.model, self.work, Sampling(self.work.answer, end=-1)

        def readout(params: Any, image: Any, before: Any, texts: Texts) -> Any:
            return next_logits(model, params, read_prefix(model, params, image, before), texts)[0]

        def first(params: Any, image: Any, before: Any, text: Texts) -> Any:
            prefix = read_prefix(model, params, image, before)
            return next_logits(model, params, prefix, text)[0]

        def plain(params: Any, image: Any, before: Any, text: Texts) -> Any:
            prefix = read_prefix(model, params, image, before)
            return answer_texts(model, params, work.config, prefix, text, self.keys[:1], sampling)

        inputs = (self.params, self.image, self.before)
        ours, one = compile_apart(readout, *inputs, self.texts), Texts(self.words[:1], self.texts.lengths[:1])
        theirs, alone = compile_apart(plain, *inputs, one), jax.jit(first)

        def repeat(call: Callable[..., Any]) -> list[Any]:
            return [call(*inputs, Texts(row[None], self.texts.lengths[:1])) for row in self.words]

        difference = jnp.abs(ours.call(*inputs, self.texts) - jnp.concatenate(repeat(alone))).max()
        functions = {"jaxmed": lambda: ours.call(*inputs, self.texts), "plain": lambda: repeat(theirs.call)}
        seconds = alternate(functions, self.repeats)
        flops = count_operations(jax.make_jaxpr(readout)(*inputs, self.texts).jaxpr)
        accuracy = {"difference": float(difference)}
        measured = {
            "jaxmed": Measurement(seconds["jaxmed"], ours.seconds, flops, accuracy=accuracy),
            "plain": Measurement(seconds["plain"], theirs.seconds),
        }
        said = f"{work.draws} questions of {work.words} tokens about one picture, {self.said}"
        return make_rows("shared_prefix", said, measured, self.conditions, self.peak)

    def decode(self) -> list[Row]:
        """Measure tokens after one prompt, greedy."""
        model, work, sampling = self.model, self.work, Sampling(self.work.answer, end=-1)
        one = Texts(self.words[:1], self.texts.lengths[:1])

        def write(params: Any, prefix: Any, text: Texts) -> Any:
            return answer_texts(model, params, work.config, prefix, text, self.keys[:1], sampling)

        prefix = jax.jit(functools.partial(read_prefix, model))(self.params, self.image, self.before)
        ours = compile_apart(write, self.params, prefix, one)
        functions: dict[str, Any] = {"jaxmed": lambda: ours.call(self.params, prefix, one)}
        accuracy = {}
        if self.peer:
            read = self.peer.read(np.asarray(self.image), np.asarray(self.before))
            functions["transformers"] = functools.partial(self.peer.write, read, np.asarray(self.words[:1]))
            same = np.asarray(functions["jaxmed"]()) == functions["transformers"]()
            accuracy["equal_tokens"] = float(same.mean())
        seconds = alternate(functions, self.repeats)
        flops = count_operations(jax.make_jaxpr(write)(self.params, prefix, one).jaxpr)
        measured = {"jaxmed": Measurement(seconds["jaxmed"], ours.seconds, flops, accuracy=accuracy)}
        if "transformers" in seconds:
            device = describe_cpu(self.conditions.cores) if jax.default_backend() == "cpu" else None
            measured["transformers"] = Measurement(
                seconds["transformers"], versions=versions("torch", "transformers"), device=device
            )
        said = f"a question of {work.words} tokens and {work.answer} answered, {self.said}"
        return make_rows("llava_decode", said, measured, self.conditions, self.peak)

    def readouts(self) -> list[Row]:
        """Measure a variance over wordings from probabilities, and from drawn answers for the same standard error."""
        work, rng = self.work, np.random.default_rng(1)
        answerer = small_answerer(jax.tree.map(jnp.asarray, train_small(work.small)[0]))
        asked = [draw_wordings(rng, answerer, number, work.pool) for number in range(work.records)]
        shares = [wording_shares(answerer, one) for one in asked]
        plans = [equal_error(rng, one, work.draws) for one in shares]
        ratios = np.array([plan.passes / work.draws for plan in plans])
        least = int(ratios.argmin())
        plan, wordings = plans[least], asked[least]
        drawn_variance = draw_estimates(rng, shares[least], plan.answers, plan.passes // plan.answers)
        model, params, config = answerer.model, answerer.params, answerer.config
        first = Texts(wordings.texts.tokens[: work.draws], wordings.texts.lengths[: work.draws])

        def probabilities(texts: Texts) -> Any:
            prefix = read_prefix(model, params, wordings.image, wordings.before)
            return jax.nn.softmax(next_logits(model, params, prefix, texts)[0][:, wordings.letters])

        def drawn(texts: Texts, keys: Any) -> Any:
            prefix = read_prefix(model, params, wordings.image, wordings.before)
            return answer_texts(model, params, config, prefix, texts, keys, Sampling(1, 1.0, 1.0, end=-1))

        ours, theirs = compile_apart(probabilities, first), compile_apart(drawn, first, self.keys)
        calls = -(-plan.passes // work.draws)
        functions = {
            "jaxmed": lambda: ours.call(first),
            "drawn answers": lambda: [theirs.call(first, self.keys) for _ in range(calls)],
        }
        seconds = alternate(functions, self.repeats)
        accuracy = {
            "passes": work.draws, "passes_drawn": plan.passes, "fewer_passes": float(ratios[least]),
            "fewer_passes_median": float(np.median(ratios)), "answers_per_wording": plan.answers,
            "variance": float(shares[least].var(0).sum()), "standard_error": plan.error,
            "variance_drawn": float(drawn_variance.mean()), "standard_error_drawn": float(drawn_variance.std()),
        }  # fmt: skip
        measured = {
            "jaxmed": Measurement(seconds["jaxmed"], ours.seconds, accuracy=accuracy),
            "drawn answers": Measurement(seconds["drawn answers"], theirs.seconds),
        }
        said = (f"variance over {work.draws} wordings, small model of {work.small.steps} steps, of {work.records} "
                "records the one where drawn answers do best")  # fmt: skip
        return make_rows("readouts", said, measured, self.conditions, self.peak)

    def refits(self) -> list[Row]:
        """Measure refits of the propagation model."""
        rng, config = np.random.default_rng(0), FitConfig()
        parts = rng.uniform(0.01, 0.2, (2, 50, 11)).astype(np.float32)
        design = make_design(parts[0], parts[1], np.sqrt(parts[0] * parts[1]))
        products = case_products(design, jnp.asarray(parts.sum(0)), config)
        weights = jnp.asarray(rng.multinomial(50, np.full(50, 0.02), self.work.resamples), jnp.float32)
        ours = compile_apart(functools.partial(refit, config=config), products, weights)
        seconds = alternate({"jaxmed": lambda: ours.call(products, weights)}, self.repeats)
        found = np.asarray(ours.call(products, weights))
        error = float(np.abs(np.nanmedian(found, axis=0) - np.array([1, 1, 0])).max())
        measured = {"jaxmed": Measurement(seconds["jaxmed"], ours.seconds, accuracy={"error": error})}
        said = f"{self.work.resamples:,} refits of 50 cases x 11 classes"
        return make_rows("bootstrap_refits", said, measured, self.conditions, self.peak)


# --- Readouts --------------------------------------------------------------------------------


class Wordings(NamedTuple):
    """One person's picture, and the question about it in many wordings.

    Attributes:
        image: As the network sees it.
        before: Tokens up to the picture.
        texts: Behind it.
        letters: Token of every option.
    """

    image: jax.Array
    before: jax.Array
    texts: Texts
    letters: jax.Array


class EqualError(NamedTuple):
    """Drawn answers that tell a variance as well as probabilities do.

    Attributes:
        passes: Answers drawn in all.
        answers: To every wording.
        error: Standard error from probabilities.
    """

    passes: int
    answers: int
    error: float


def draw_wordings(rng: np.random.Generator, answerer: LlavaAnswerer, number: int, count: int) -> Wordings:
    """Draw a heart and a record, and ask for the condition in other words each time."""
    condition = CONDITIONS[number % len(CONDITIONS)]
    picture, facts = beating_heart(rng, condition)[0], facts_of(draw_record(rng, condition))
    names = tuple(TASKS["condition"])
    prompts = [
        split_prompt(answerer, f"{render(rng, facts)}\n{question(rng, 'in 2 years', block_of(names))}\n"
                     f"{Decoding().instruction}")
        for _ in range(count)
    ]  # fmt: skip
    rows = [words for _, words in prompts]
    tokens = np.zeros((count, max(map(len, rows))), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    letters = [spelt[0] for spelt in letter_tokens(answerer.tokenizer, len(names))]
    image = jnp.asarray(answerer.preprocess(picture[..., None]))[None]
    texts = Texts(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows]))
    return Wordings(image, jnp.asarray([prompts[0][0]]), texts, jnp.asarray(letters))


def wording_shares(answerer: LlavaAnswerer, asked: Wordings) -> np.ndarray:
    """Return the probabilities of the options, (wording, option)."""
    model, params = answerer.model, answerer.params
    prefix = read_prefix(model, params, asked.image, asked.before)
    logits = jax.jit(functools.partial(next_logits, model))(params, prefix, asked.texts)[0]
    return np.asarray(jax.nn.softmax(logits[:, asked.letters].astype(jnp.float32)), np.float64)


def between_variance(counts: np.ndarray) -> np.ndarray:
    """Return the unbiased variance between wordings from drawn answers, summed over options: ANOVA's component.

    The variance of the wordings' shares is that of their probabilities and an m-th part of the noise of decoding, which
    the answers to one wording estimate.

    Args:
        counts: Answers of each option, (..., wording, option); the same number m >= 2 for every wording.
    """
    answers = counts.sum(-1, keepdims=True)
    shares = counts / answers
    noise = (shares * (1 - shares) / (answers - 1)).mean(-2)  # of a wording's share
    return (shares.var(-2, ddof=1) - noise).sum(-1)


def draw_estimates(
    rng: np.random.Generator, shares: np.ndarray, answers: int, wordings: int, trials: int = 500
) -> np.ndarray:
    """Return estimates of the variance, each from so many answers drawn to each of so many wordings of the pool."""
    places = rng.integers(len(shares), size=(trials, wordings))
    return np.array([between_variance(rng.multinomial(answers, shares[one])) for one in places])


def equal_error(rng: np.random.Generator, shares: np.ndarray, draws: int) -> EqualError:
    """Find how many drawn answers have the standard error of `draws` wordings' probabilities, by simulation.

    Args:
        rng: Draws wordings and answers.
        shares: Probabilities of the options for every wording of the pool, (wording, option).
        draws: Wordings whose probabilities are read.
    """
    places = rng.integers(len(shares), size=(2000, draws))
    error = shares[places].var(1, ddof=1).sum(-1).std()
    # The squared error falls as the number of wordings grows: one simulation of many tells how many it takes.
    many, needed = 20 * draws, {}
    for answers in (2, 4, 8, 16):
        found = draw_estimates(rng, shares, answers, many).std()
        needed[answers] = max(2, round(many * (found / error) ** 2))
    answers = min(needed, key=lambda one: one * needed[one])
    return EqualError(answers * needed[answers], answers, float(error))


# --- The peer --------------------------------------------------------------------------------


class Transformers:
    """transformers' LLaVA with our weights."""

    def __init__(self, work: Workload, params: Any, threads: int):
        """Build it."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.kind = torch.bfloat16 if work.config.text.dtype == "bfloat16" else torch.float32
        self.answer = work.answer
        clip, text = work.config.vision, work.config.text
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=clip.width, intermediate_size=clip.hidden, num_hidden_layers=clip.depth,
                num_attention_heads=clip.heads, image_size=clip.image_size, patch_size=clip.patch_size,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=text.vocabulary, hidden_size=text.width, intermediate_size=text.hidden,
                num_hidden_layers=text.depth, num_attention_heads=text.heads, num_key_value_heads=text.key_heads,
                rms_norm_eps=text.epsilon, max_position_embeddings=4096,
                rope_parameters={"rope_type": "default", "rope_theta": text.theta},
            ),
            image_token_index=work.config.image_token, image_seq_length=clip.tokens,
        )  # fmt: skip
        model = transformers.LlavaForConditionalGeneration(config)
        leaves, names = named_leaves(params), model.state_dict().keys()
        # The module has the names of the newest layout, or those with vision_model. in them.
        naming = "new" if any(".vision_model." in name for name in names) else "newest"
        tensors = {one.name: torch.tensor(to_tensor(one, leaves[one.path])) for one in entries(work.config, naming)}
        found = model.load_state_dict(tensors, strict=False)
        if found.unexpected_keys or any("post_layernorm" not in name for name in found.missing_keys):
            raise ValueError(f"transformers names its tensors otherwise: {found}")
        self.model = model.eval().requires_grad_(False).to(self.device, self.kind)

    def read(self, image: np.ndarray, before: np.ndarray) -> Any:
        """Return the cache after a picture and the words before it."""
        import torch

        pixels = torch.from_numpy(np.moveaxis(image, -1, 1).copy()).to(self.device, self.kind)
        with torch.no_grad():
            found = self.model(input_ids=torch.from_numpy(before).long().to(self.device), pixel_values=pixels)
        return found.past_key_values

    def write(self, cache: Any, words: np.ndarray) -> np.ndarray:
        """Read on and write greedy tokens; the cache is as before afterwards."""
        import torch

        length, found = cache.get_seq_length(), []
        tokens = torch.from_numpy(words).long().to(self.device)
        with torch.no_grad():
            for _ in range(self.answer):
                logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
                tokens = logits[:, -1:].argmax(-1)
                found.append(tokens)
        cache.crop(length - cache.get_seq_length())  # so many from the end
        return torch.cat(found, 1).cpu().numpy()


if __name__ == "__main__":
    main()

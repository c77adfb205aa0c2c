"""LLaVA in parts: the decoder against NumPy, what was read once against reading it all, answers, placeholders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import TINY, tensors_of

from jaxmed.errors import InputError
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import (
    ClipConfig,
    Llava,
    Sampling,
    Texts,
    answer_texts,
    choose,
    next_logits,
    read_prefix,
    require_placeholders,
    splice,
)
from jaxmed.models.published import llava
from jaxmed.models.published.names import collect
from jaxmed.nn.model import make_model

MODEL = make_model(Llava(TINY))
BEFORE = [1, 3, 98, 98, 98, 98]  # four placeholders: 28 pixels in patches of 14
WORDS = ([7, 9, 11, 5, 20], [8, 4, 2], [30])


@pytest.fixture(scope="module")
def params():
    return collect("drawn", llava.entries(TINY), tensors_of()).params


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 28, 28, 3)), jnp.float32)


@pytest.fixture(scope="module")
def whole(params):
    """Return the logits behind a text that is read at once."""
    apply = jax.jit(MODEL.apply)

    def logits(image, words):
        # One length for all: what follows a token does not change it.
        tokens = np.array([BEFORE + words + [0] * (14 - len(BEFORE) - len(words))])
        return np.asarray(apply(params, image[None], jnp.asarray(tokens)))[0, len(BEFORE) + len(words) - 1]

    return logits


def padded(rows, length=6):
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)
    return Texts(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


def test_the_decoder_is_what_numpy_makes_of_its_equations(params):
    """Token by token and head by head, in float64."""
    config, tokens = TINY.text, np.array([3, 50, 7, 7, 12])
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["language"])

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * scale

    def turn(x, position):
        half = config.head_width // 2
        angle = position / config.theta ** (np.arange(half) / half)
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    x = weights["table"][tokens]
    for layer in range(config.depth):
        block = weights[f"layer_{layer}"]
        normed = norm(x, block["norm1"]["scale"])
        mixed = np.zeros((len(tokens), config.heads, config.head_width))
        for head in range(config.heads):
            group = head * config.key_heads // config.heads
            queries = [turn(row @ block["query"]["kernel"][:, head], t) for t, row in enumerate(normed)]
            keys = [turn(row @ block["key"]["kernel"][:, group], t) for t, row in enumerate(normed)]
            values = normed @ block["value"]["kernel"][:, group]
            for t in range(len(tokens)):
                scores = np.array([queries[t] @ keys[s] for s in range(t + 1)]) / np.sqrt(config.head_width)
                shares = np.exp(scores - scores.max())
                mixed[t, head] = shares / shares.sum() @ values[: t + 1]
        x = x + mixed.reshape(len(tokens), -1) @ block["out"]["kernel"]
        normed = norm(x, block["norm2"]["scale"])
        gate = normed @ block["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ block["up"]["kernel"])) @ block["down"]["kernel"]
    expected = norm(x, weights["norm"]["scale"]) @ weights["head"]["kernel"]
    positions, is_valid = jnp.arange(5)[None], jnp.ones((1, 5), bool)
    stream, segment = MODEL.apply(params, jnp.asarray(tokens)[None], positions, is_valid, (), method="read_on")
    assert segment.keys.shape == (config.depth, 1, 5, config.key_heads, config.head_width)
    found = MODEL.apply(params, stream, method="logits")[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_image_is_read_by_clips_equations(params, images):
    """Patches, class token, positions, the first norm, quick GELU; the state before the last block, without class."""
    weights, config = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["vision"]), TINY.vision
    image = np.asarray(images[0], np.float64)

    def norm(x, part):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.epsilon) * part["scale"] + part["bias"]

    patches = [image[r : r + 14, c : c + 14].reshape(-1) for r in (0, 14) for c in (0, 14)]
    x = np.concatenate([weights["class_token"][None], np.array(patches) @ weights["patch_embed"]["kernel"]])
    x = norm(x + weights["position"], weights["first_norm"])
    for layer in range(config.depth - 1):
        block = weights["blocks"][f"layer_{layer}"]
        qkv = np.einsum("tw,wphd->tphd", norm(x, block["norm1"]), block["attention"]["qkv"]["kernel"])
        q, k, v = np.moveaxis(qkv + block["attention"]["qkv"]["bias"], 1, 0)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + mixed @ block["attention"]["out"]["kernel"] + block["attention"]["out"]["bias"]
        hidden = norm(x, block["norm2"]) @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + hidden @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"]
    found = MODEL.apply(params, images[:1], method=lambda module, image: module.vision(image))
    np.testing.assert_allclose(found[0], x[1:], atol=2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_read_once_serves_every_text(params, images, whole, shared):
    """One picture for three texts of different lengths, held once; and three pictures, one for each."""
    chosen = images[:1] if shared else images
    prefix = read_prefix(MODEL, params, chosen, jnp.asarray([BEFORE] * len(chosen)))
    assert prefix.keys.shape[1] == len(chosen)
    found, segment = next_logits(MODEL, params, prefix, padded(WORDS))
    assert segment.keys.shape[1:3] == (3, 6)
    for place, words in enumerate(WORDS):
        expected = whole(images[0 if shared else place], words)
        np.testing.assert_allclose(found[place], expected, atol=2e-5)
    alone, _ = next_logits(
        MODEL, params, read_prefix(MODEL, params, images[:1], jnp.asarray([BEFORE])), padded(WORDS[:1])
    )
    np.testing.assert_allclose(alone[0], found[0], atol=1e-5)


def test_greedy_answers_are_those_of_reading_everything_anew(params, images, whole):
    """Keys and values of answers are kept from token to token."""
    sampling = Sampling(4, end=-1)
    program = jax.jit(functools.partial(answer_texts, MODEL, config=TINY, sampling=sampling))
    prefix = read_prefix(MODEL, params, images[:1], jnp.asarray([BEFORE]))
    keys = jax.random.split(jax.random.key(0), 3)
    found = np.asarray(program(params, prefix=prefix, texts=padded(WORDS), keys=keys))
    for place, words in enumerate(WORDS):
        said = []
        for _ in range(4):
            said.append(int(whole(images[0], [*words, *said]).argmax()))
        assert found[place].tolist() == said
    # An answer that has ended stays so.
    end = int(found[0, 1])
    ended = answer_texts(MODEL, params, TINY, prefix, padded(WORDS), keys, sampling._replace(end=end))
    first = found[0].tolist().index(end)
    assert np.asarray(ended)[0].tolist() == found[0, :first].tolist() + [end] * (4 - first)


def test_draws_are_named_by_their_keys_and_keep_to_likely_tokens():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(logits, (4000, 4))
    drawn = np.asarray(choose(rows, keys, Sampling(1, 1.0, 1.0)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    few = np.asarray(choose(rows, keys, Sampling(1, 1.0, 0.7)))
    np.testing.assert_allclose(np.bincount(few, minlength=4) / 4000, [0.625, 0.375, 0, 0], atol=0.03)
    assert (np.asarray(choose(rows, keys, Sampling(1, 1.0, 0.4))) == 0).all()
    cold = np.asarray(choose(rows, keys, Sampling(1, 0.5, 1.0)))
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(cold, minlength=4) / 4000, squares / squares.sum(), atol=0.03)
    assert (np.asarray(choose(rows, keys, Sampling(1))) == 0).all()
    np.testing.assert_array_equal(np.asarray(choose(rows[5:9], keys[5:9], Sampling(1, 1.0))), drawn[5:9])


def test_placeholders_are_found_by_their_number_and_counted():
    words = jnp.arange(12, dtype=jnp.float32).reshape(1, 6, 2)
    features = jnp.array([[[-1.0, -2.0], [-3.0, -4.0]]])
    is_image = jnp.array([[False, False, True, False, True, False]])
    found = np.asarray(splice(words, is_image, features))[0]
    np.testing.assert_array_equal(found[[2, 4]], features[0])
    np.testing.assert_array_equal(found[[0, 1, 3, 5]], np.asarray(words)[0, [0, 1, 3, 5]])  # no word is lost
    require_placeholders(np.array([BEFORE]), TINY)
    for wrong in ([1, 3, 98, 98, 98], [98] * 5, [1, 2, 3]):
        with pytest.raises(
            InputError, match=f"expected 4 placeholders, token 98, for one image, found {wrong.count(98)}"
        ):
            require_placeholders(np.array([wrong]), TINY)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LlamaConfig(heads=4, key_heads=3), "a divisor of heads"),
        (lambda: LlamaConfig(head_width=7), "an even width"),
        (lambda: LlamaConfig(vocabulary=1), "2 to 2,000,000"),
        (lambda: ClipConfig(layer=30), "a hidden state of 24 blocks"),
        (lambda: ClipConfig(image_size=335), "335"),
        (lambda: ClipConfig(pool=5), "24, 24"),
        (lambda: ClipConfig(pool=2, class_token=True), "pool: expected 1 where the class token is handed on"),
    ],
)
def test_sizes_that_are_no_model_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()

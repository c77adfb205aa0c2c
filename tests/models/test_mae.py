"""The masked autoencoder: what its encoder sees, what its decoder predicts, and which parameters learn."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import draw_noise, random_masking, restore_order
from jaxmed.arrays.trees import named_leaves
from jaxmed.models.mae import FROZEN, TANGERINE_BASE, TANGERINE_LARGE, Mae, MaeConfig
from jaxmed.models.vit import Blocks, Vit, VitConfig
from jaxmed.nn.model import make_model
from jaxmed.nn.transformer import LayerNorm
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer

CONFIG = MaeConfig(
    VitConfig((16, 8, 8), (4, 4, 4), width=16, depth=1, heads=2, hidden=24),
    decoder_width=12, decoder_depth=1, decoder_heads=2, decoder_hidden=20,
)  # fmt: skip
MODEL = make_model(Mae(CONFIG))
IMAGE = jax.random.uniform(jax.random.key(1), (2, 16, 8, 8, 1))
run = jax.jit(MODEL.apply)
NOISE = draw_noise(jax.random.split(jax.random.key(2), 2), 16)


@pytest.fixture(scope="module")
def params():
    fresh = jax.jit(MODEL.init)(jax.random.key(0), IMAGE, NOISE)
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def output(params):
    return run(params, IMAGE, NOISE)


def test_a_quarter_is_seen_and_the_rest_predicted(output):
    assert output.tokens.shape == (2, 5, 16)  # class token and 4 of 16 patches
    assert output.prediction.shape == (2, 12, 64)
    assert 0 < float(output.prediction.min()) and float(output.prediction.max()) < 1  # the sigmoid


def test_the_encoder_is_the_vision_transformer_on_kept_patches(params, output):
    kept = random_masking(NOISE, 0.75).kept
    expected = jax.jit(make_model(Vit(CONFIG.encoder)).apply)(params["encoder"], IMAGE, kept)
    np.testing.assert_allclose(output.tokens, expected, atol=3e-6)


def test_the_decoder_equals_the_form_that_restores_the_order(params, output):
    """As the paper has it: mask tokens to their places, positions added, all patches predicted, in their own order."""
    masking = output.masking

    @jax.jit
    def restored(p, tokens):
        seen = tokens @ p["embed"]["kernel"] + p["embed"]["bias"]
        guessed = jnp.broadcast_to(p["mask_token"], (2, 12, 12))
        patches = restore_order(jnp.concatenate([seen[:, 1:], guessed], axis=1), masking)
        x = jnp.concatenate([seen[:, :1], patches], axis=1) + p["position"]
        x = make_model(Blocks(CONFIG.block, 1)).apply(p["blocks"], x)
        x = make_model(LayerNorm()).apply(p["norm"], x)
        return jax.nn.sigmoid(x @ p["prediction"]["kernel"] + p["prediction"]["bias"])[:, 1:]

    expected = restored(params["decoder"], output.tokens)
    for image in range(2):
        np.testing.assert_allclose(output.prediction[image], expected[image][masking.hidden[image]], atol=3e-6)
    everything = jax.jit(partial(MODEL.apply, all_patches=True))(params, IMAGE, NOISE)
    np.testing.assert_allclose(restore_order(everything.prediction, masking), expected, atol=3e-6)


def test_hidden_voxels_do_not_reach_the_prediction(params, output):
    hidden = int(output.masking.hidden[0, 0])
    place = np.unravel_index(hidden, CONFIG.encoder.grid)
    window = tuple(slice(4 * p, 4 * p + 4) for p in place)
    changed = IMAGE.at[(0, *window)].set(0.5)
    np.testing.assert_array_equal(run(params, changed, NOISE).prediction, output.prediction)


def test_scan_and_remat_predict_the_same(params, output):
    encoder = dataclasses.replace(CONFIG.encoder, scan=True, remat=True)
    other = make_model(Mae(dataclasses.replace(CONFIG, encoder=encoder)))
    np.testing.assert_allclose(jax.jit(other.apply)(params, IMAGE, NOISE).prediction, output.prediction, atol=3e-6)


def test_bfloat16_is_finite_and_close(params, output):
    encoder = dataclasses.replace(CONFIG.encoder, dtype="bfloat16")
    half = make_model(Mae(dataclasses.replace(CONFIG, encoder=encoder)))
    prediction = jax.jit(half.apply)(params, IMAGE, NOISE).prediction
    assert prediction.dtype == jnp.float32 and bool(jnp.isfinite(prediction).all())
    np.testing.assert_allclose(prediction, output.prediction, atol=0.02)


def test_the_optimizer_moves_everything_but_the_tables(params):
    settings = OptimizerConfig(peak_lr=1e-2, b2=0.95, weight_decay=0.05, decay="constant", frozen=FROZEN)
    optimizer = make_optimizer(settings, 10)

    @jax.jit
    def update(params):
        state = optimizer.init(params)
        return optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)

    updates, state = update(params)
    still = [name for name, leaf in named_leaves(updates).items() if not leaf.any()]
    assert still == ["decoder/position", "encoder/position"]
    # Nor do they have a place in the optimizer's state.
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.shape in ((17, 16), (17, 12))]


def test_published_models_have_their_sizes():
    def sizes(config):
        encoder = config.encoder
        image = jax.ShapeDtypeStruct((1, *encoder.image_size, 1), jnp.float32)
        noise = jax.ShapeDtypeStruct((1, encoder.num_tokens), jnp.float32)
        shapes = jax.eval_shape(make_model(Mae(config)).init, jax.random.key(0), image, noise)
        return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}

    large = sizes(TANGERINE_LARGE)
    assert large["encoder"] == 306_507_776 + 4_195_328
    assert large["decoder"] == 29_944_320
    assert sizes(TANGERINE_BASE)["decoder"] == large["decoder"] - 256 * 512  # the same but for a narrower embedding


@pytest.mark.core
def test_settings_are_checked():
    with pytest.raises(ValueError, match="mask_ratio: expected some of 4096 patches kept and some hidden, found 1"):
        MaeConfig(mask_ratio=1.0)
    with pytest.raises(ValueError, match="norm_target: expected no sigmoid"):
        MaeConfig(norm_target=True)
    with pytest.raises(ValueError, match="heads"):
        MaeConfig(decoder_heads=7)

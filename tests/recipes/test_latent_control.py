"""A ControlNet beside a U-Net of latents, on arrays: what moves, what it costs, and that it can be learnt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.diffusion.schedule import VpDiscrete, expand_like
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import ImportReport, Published
from jaxmed.models.unet_latent import ControlNetConfig, LatentUnetConfig, control_net, latent_unet
from jaxmed.recipes.latent_control import ControlParts, control_loss, decoder_of, image_loss, make_control

UNET = LatentUnetConfig(
    widths=(4, 4), blocks=(1, 1), attention_levels=(False, False), head_channels=4, groups=2, channels=2, outputs=2
)
PET = AutoencoderKlConfig(widths=(2, 4), blocks=(1, 1), latent_channels=2, groups=2)
CHAIN = VpDiscrete(betas="scaled-linear")
CONTROL = ControlNetConfig(UNET, 2, (4,))
PARTS = ControlParts(latent_unet(UNET), control_net(CONTROL), PET, CHAIN)
KEYS = jax.random.split(jax.random.key(1), 2)
# A latent of 3 voxels, padded to 4.
BATCH = {
    "condition": jax.random.normal(jax.random.key(2), (2, 4, 4, 4, 2)),
    "latent": jax.random.normal(jax.random.key(3), (2, 4, 4, 4, 2)),
    "image": jax.random.normal(jax.random.key(4), (2, 6, 8, 8, 1)),
}


@functools.cache
@jax.jit
def draw():
    """Draw parameters as training starts."""
    latent, time, image = BATCH["latent"], jnp.zeros(2), jnp.zeros((1, 2, 2, 2, 1))
    return {
        "unet": PARTS.unet.init(jax.random.key(0), latent, time),
        "controlnet": PARTS.control.init(jax.random.key(0), latent, time, BATCH["condition"]),
        "decoder": decoder_of(autoencoder(PET).init(jax.random.key(0), image)),
    }


@pytest.fixture(scope="module")
def params():
    """Return parameters of which none is 0, so that every path counts."""
    leaves, tree = jax.tree.flatten(draw())
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return tree.unflatten([
        leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def differentiated(params):
    """Return the losses of each kind with their terms, and the gradient of WISL's image: one program."""

    def image(params):
        found = {kind: control_loss(PARTS, kind, params, KEYS, BATCH) for kind in ("wisl", "isl", "none")}
        return found["wisl"][1]["image_error"], found

    return jax.jit(jax.value_and_grad(image, has_aux=True))(params)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_the_image_moves_decoder_and_controlnet_and_nothing_else(differentiated):
    """The ControlNet through the expected noise; the U-Net is held, and there is no encoder to reach."""
    gradient = differentiated[1]
    assert largest(gradient["unet"]) == 0
    assert all(largest(part) > 0 for part in gradient["controlnet"].values())
    assert set(gradient["decoder"]) == {"from_latent", "decoder"}
    assert all(largest(part) > 0 for part in gradient["decoder"].values())


def test_the_loss_is_that_of_the_noise_and_of_the_image_that_follows(params, differentiated):
    found = differentiated[0][1]
    values, terms = ({kind: pair[number] for kind, pair in found.items()} for number in (0, 1))
    noise_keys, t = [], []
    for key in KEYS:
        first, second = jax.random.split(key)
        t.append(float(CHAIN.draw_times(first[None])[0]))
        noise_keys.append(second)
    t = jnp.array(t)
    noise = jnp.stack([jax.random.normal(key, BATCH["latent"].shape[1:]) for key in noise_keys])
    alpha_bar = jnp.asarray(CHAIN.alpha_bar_table[np.asarray(t, int)], jnp.float32)
    alpha, sigma = expand_like(jnp.sqrt(alpha_bar), noise), expand_like(jnp.sqrt(1 - alpha_bar), noise)
    noisy = alpha * BATCH["latent"] + sigma * noise

    @jax.jit
    def predict(params, noisy):
        residuals = PARTS.control.apply(params["controlnet"], noisy, t, BATCH["condition"])
        found = PARTS.unet.apply(params["unet"], noisy, t, residuals)
        latent = ((noisy - sigma * found) / alpha)[:, :3]  # of the padding the larger part comes last
        return found, autoencoder(PET).decode(params["decoder"], latent)

    expected, images = predict(params, noisy)
    error, images = float(jnp.mean((expected - noise) ** 2)), np.asarray(images)
    each = np.abs(images - np.asarray(BATCH["image"])).mean((1, 2, 3, 4))
    weighted = {"wisl": np.mean((1000 - np.asarray(t)) / 1000 * each), "isl": each.mean(), "none": 0.0}
    for kind, image in weighted.items():
        assert float(values[kind]) == pytest.approx(error + image, rel=2e-3), kind
        assert float(terms[kind]["noise_error"]) == pytest.approx(error, rel=1e-4)
    assert float(terms["wisl"]["image_error"]) < float(terms["isl"]["image_error"])


def test_an_exact_latent_and_decoder_cost_nothing(params):
    latent = BATCH["latent"][:, :3]
    image = jax.jit(autoencoder(PET).decode)(params["decoder"], latent)
    loss = jax.jit(functools.partial(image_loss, PET, params["decoder"], BATCH["latent"]))
    weight = jnp.array([1.0, 0.001])
    assert float(loss(image, weight)) < 1e-6
    off = [float(loss(image + 1, factor * weight)) for factor in (1, 2)]
    assert off == pytest.approx([0.5005, 1.001], rel=1e-4)  # linear in the weights


@pytest.mark.slow
def test_one_pair_can_be_learnt_by_heart(params):
    """Overfitting: with one subject, the loss of the ControlNet with the decoder falls far below that of the start."""
    batch = {name: value[:1] for name, value in BATCH.items()}
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        loss = lambda params: control_loss(PARTS, "wisl", params, key[None], batch)  # noqa: E731
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), terms

    train = jax.jit(lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys)[1])
    # A U-Net as training starts gives 0, and is held: here it has weights that a ControlNet can work on.
    terms = train(params, jax.random.split(jax.random.key(9), 600))
    first, last = ({name: float(np.mean(value[part])) for name, value in terms.items()} for part in (
        slice(0, 50), slice(-50, None)
    ))  # fmt: skip
    assert last["noise_error"] < 0.7 * first["noise_error"] and last["image_error"] < 0.3 * first["image_error"]


def published(config, params):
    report = ImportReport(cocolit.NAME, cocolit.facts(config).kind, (), (), (), "")
    return Published(cocolit.make_cocolit_model(config, ()), params, cocolit.preprocess(config), config, report)


@pytest.mark.parametrize(("kind", "from_unet", "frozen"), [("wisl", True, 1), ("none", False, 2)])
def test_a_loss_without_images_leaves_the_decoder(params, kind, from_unet, frozen):
    unet, image = published(UNET, params["unet"]), published(PET, params["decoder"])
    network, parts, start = make_control(
        CONTROL, unet, image, CHAIN, (4, 4, 4), kind, from_unet=from_unet, remat_decoder=False, dtype="float32"
    )
    assert len(network.frozen) == frozen and ("controlnet" in start) == from_unet
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert parts.image.divisor == PET.divisor and set(start["decoder"]) == {"from_latent", "decoder"}

"""An autoencoder against a discriminator: whose gradient is whose, and the loss against its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.patch_discriminator import PatchDiscriminatorConfig, patch_discriminator
from jaxmed.recipes.adversarial_autoencoder import AutoencoderLossConfig, adversarial_autoencoder_loss

pytestmark = pytest.mark.core

CODER = autoencoder(AutoencoderKlConfig(dimensions=2, widths=(4, 8), blocks=(1, 1), latent_channels=2, groups=2))
CRITIC = patch_discriminator(PatchDiscriminatorConfig(dimensions=2, width=4, layers=1))
IMAGE = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
KEYS = jax.random.split(jax.random.key(2), 2)
LOSS = AutoencoderLossConfig(divergence=1e-3, adversarial=0.5)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    draw = jax.jit(lambda keys: (CODER.init(keys[0], IMAGE), CRITIC.init(keys[1], IMAGE)))
    return dict(zip(("autoencoder", "discriminator"), draw(keys), strict=True))


def differentiate(params, config):
    def loss(params):
        return adversarial_autoencoder_loss(CODER, CRITIC, config, params, KEYS, IMAGE)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def found(params):
    return differentiate(params, LOSS)


def squared(logits, target):
    return np.mean((np.where(logits > 0, logits, 0.05 * logits) - target) ** 2)


def test_the_terms_are_those_of_numpy(params, found):
    (value, terms), _ = found
    mean, deviation = CODER.encode(params["autoencoder"], IMAGE)
    noise = jnp.stack([jax.random.normal(jax.random.split(key)[0], mean.shape[1:]) for key in KEYS])
    made = np.asarray(CODER.decode(params["autoencoder"], mean + deviation * noise))
    mean, deviation, image = np.asarray(mean), np.asarray(deviation), np.asarray(IMAGE)
    real, fake = (np.asarray(CRITIC.apply(params["discriminator"], jnp.asarray(one))) for one in (image, made))
    expected = {
        "reconstruction": np.mean(np.abs(made - image)),
        "divergence": np.sum(0.5 * (mean**2 + deviation**2 - np.log(deviation**2) - 1)) / 2,
        "adversarial": squared(fake, 1.0),
        "discriminator": 0.5 * (squared(fake, 0.0) + squared(real, 1.0)),
    }
    for name, number in expected.items():
        assert float(terms[name]) == pytest.approx(number, rel=1e-4), name
    total = expected["reconstruction"] + 1e-3 * expected["divergence"]
    total += 0.5 * (expected["adversarial"] + expected["discriminator"])
    assert float(value) == pytest.approx(total, rel=1e-4)


def test_no_gradient_meets_the_wrong_network(params, found):
    """The autoencoder's is that of its own terms, the discriminator's that of its own."""

    def parts(own, opponent):
        both = {"autoencoder": own, "discriminator": opponent}
        _, terms = adversarial_autoencoder_loss(CODER, CRITIC, LOSS, both, KEYS, IMAGE)
        coder = terms["reconstruction"] + 1e-3 * terms["divergence"] + 0.5 * terms["adversarial"]
        return jnp.stack([coder, 0.5 * terms["discriminator"]])

    own, opponent = jax.jit(jax.jacrev(parts, argnums=(0, 1)))(params["autoencoder"], params["discriminator"])
    gradient = found[1]
    for name, whole, row in (("autoencoder", own, 0), ("discriminator", opponent, 1)):
        for leaf, both in zip(jax.tree.leaves(gradient[name]), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(leaf, both[row], atol=1e-6 + 1e-4 * float(jnp.abs(both).max()))
            assert not np.asarray(both[1 - row]).any()
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["discriminator"]["head"]))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["autoencoder"]["decoder"]))


def test_the_released_discriminator_gets_the_autoencoders_gradient_too(params, found):
    _, released = differentiate(params, dataclasses.replace(LOSS, match_release=True))

    def adversarial(opponent):
        both = params | {"discriminator": opponent}
        release = dataclasses.replace(LOSS, match_release=True)
        return 0.5 * adversarial_autoencoder_loss(CODER, CRITIC, release, both, KEYS, IMAGE)[1]["adversarial"]

    extra = jax.jit(jax.grad(adversarial))(params["discriminator"])
    sums = jax.tree.map(jnp.add, found[1]["discriminator"], extra)
    for one, two in zip(jax.tree.leaves(released["discriminator"]), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6 + 1e-4 * float(jnp.abs(two).max()))
    for one, two in zip(
        jax.tree.leaves(released["autoencoder"]), jax.tree.leaves(found[1]["autoencoder"]), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-6 + 1e-4 * float(jnp.abs(two).max()))


def test_a_perceptual_term_counts_by_its_weight(params, found):
    """Its keys are those that the latent's noise has not used."""
    seen = []

    def perceptual(keys, made, image):
        seen.append(keys)
        return jnp.square(made - image).mean()

    config = dataclasses.replace(LOSS, perceptual=3.0)
    value, terms = jax.jit(
        lambda params: adversarial_autoencoder_loss(CODER, CRITIC, config, params, KEYS, IMAGE, perceptual)
    )(params)
    assert seen[0].shape == KEYS.shape and float(terms["perceptual"]) > 0
    assert float(value) == pytest.approx(float(found[0][0]) + 3 * float(terms["perceptual"]), rel=1e-4)


@pytest.mark.peers
def test_loss_and_gradient_are_those_of_torch(params, found):
    """From the same reconstruction on: the discriminator's layers and both adversarial terms in PyTorch."""
    torch = pytest.importorskip("torch")
    opponent = {
        name: {key: torch.tensor(np.asarray(leaf), requires_grad=True) for key, leaf in part.items()}
        for name, part in params["discriminator"].items()
    }

    def judge(x):
        for name, stride, has_norm in (("layer_0", 2, False), ("layer_1", 1, True), ("head", 1, None)):
            kernel = opponent[name]["kernel"].permute(3, 2, 0, 1)
            x = torch.nn.functional.conv2d(x, kernel, opponent[name].get("bias"), stride=stride, padding=1)
            x = torch.nn.functional.instance_norm(x) if has_norm else x
            x = x if has_norm is None else torch.nn.functional.leaky_relu(x, 0.2)
        return torch.nn.functional.leaky_relu(x, 0.05)

    mean, deviation = CODER.encode(params["autoencoder"], IMAGE)
    noise = jnp.stack([jax.random.normal(jax.random.split(key)[0], mean.shape[1:]) for key in KEYS])
    made = CODER.decode(params["autoencoder"], mean + deviation * noise)
    real, fake = (torch.tensor(np.moveaxis(np.asarray(one), -1, 1).copy()) for one in (IMAGE, made))
    loss = 0.5 * ((judge(fake) ** 2).mean() + ((judge(real) - 1) ** 2).mean())
    assert float(found[0][1]["discriminator"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    adversarial = float(((judge(fake) - 1) ** 2).mean().detach())
    assert float(found[0][1]["adversarial"]) == pytest.approx(adversarial, rel=1e-4)
    (0.5 * loss).backward()
    for name, part in opponent.items():
        for key, leaf in part.items():
            own = np.asarray(found[1]["discriminator"][name][key])
            expected = leaf.grad.numpy()
            np.testing.assert_allclose(own, expected, atol=1e-6 + 1e-3 * np.abs(expected).max())

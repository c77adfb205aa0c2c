"""Where the parameters of every large model live on 8, 64 and 256 devices: nothing large is copied to all of them.

Meshes are abstract, so no device is needed; depths are cut, widths are the published ones.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxmed.arrays.trees import matches, named_leaves
from jaxmed.models.autoencoder_kl import COCOLIT_AUTOENCODER, autoencoder
from jaxmed.models.dino import dinov2, dinov3
from jaxmed.models.fcmae import FcmaeConfig, fcmae_model
from jaxmed.models.mae import MaeConfig, masked_model
from jaxmed.models.unet_brain import BRAINFM, brain_unet
from jaxmed.models.unet_guided import ADM_256, guided_unet
from jaxmed.models.unet_latent import COCOLIT_UNET, latent_unet
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.nn.model import Network
from jaxmed.recipes.dino_loss import DinoConfig, dino_network
from jaxmed.train.mesh import SMALLEST_SPLIT, param_shardings

pytestmark = pytest.mark.core

# Tables of positions are whole by intent; one of 256^3 voxels has 4.2 million entries.
WHOLE_BY_RULE = (r"(^|/)position$",)


def of_encoder(config):
    encoder = vit_encoder(config)
    return Network(lambda key: {"encoder": encoder.init(key)}, encoder.apply, encoder.rules)


def of_latents():
    model, shape = latent_unet(COCOLIT_UNET), (1, 32, 40, 32, 4)
    return Network(lambda key: model.init(key, jnp.zeros(shape), jnp.zeros(1)), model.apply)


def of_images():
    model = autoencoder(COCOLIT_AUTOENCODER)
    return Network(lambda key: model.init(key, jnp.zeros((1, 32, 32, 32, 1))), model.apply)


MODELS = {
    "tangerine": lambda: masked_model(MaeConfig(VitConfig(depth=2), decoder_depth=1)).network,
    "dinov2-g": lambda: dino_network(
        DinoConfig(dinov2("g", image_size=(224, 224), depth=2, mask_token=True), local_size=(98, 98))
    ),
    "dinov3-7B": lambda: of_encoder(dinov3("7B", depth=2)),
    "profound": lambda: fcmae_model(FcmaeConfig()).network,
    "brainfm": lambda: brain_unet(BRAINFM, (160, 160, 160)),
    "guided": lambda: guided_unet(ADM_256, (64, 64)),
    "cocolit": of_latents,
    "cocolit-autoencoder": of_images,
}
MESHES = [(8, 1), (4, 2), (64, 1), (16, 4), (256, 1), (32, 8)]


def abstract_mesh(data, model):
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="module")
def shapes():
    made = {}

    def find(name):
        if name not in made:
            network = MODELS[name]()
            made[name] = network, jax.eval_shape(network.init, jax.random.key(0))
        return made[name]

    return find


def copied(params, mesh, rules):
    """Return the large parameters that every device holds whole although one of their axes could be split."""
    places = named_leaves(param_shardings(params, mesh, rules))
    return [
        name
        for name, leaf in named_leaves(params).items()
        if math.prod(leaf.shape) >= SMALLEST_SPLIT
        and not matches(name, WHOLE_BY_RULE)
        and any(size % mesh.shape["data"] == 0 for size in leaf.shape)
        and "data" not in places[name].spec
    ]


@pytest.mark.parametrize(("data", "model"), MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_large_is_copied_to_every_device(name, data, model, shapes):
    network, params = shapes(name)
    mesh = abstract_mesh(data, model)
    assert copied(params, mesh, network.rules) == []
    places, leaves = named_leaves(param_shardings(params, mesh, network.rules)), named_leaves(params)
    held = sum(math.prod(places[name].shard_shape(leaf.shape)) for name, leaf in leaves.items())
    tables = sum(math.prod(leaf.shape) for name, leaf in leaves.items() if matches(name, WHOLE_BY_RULE))
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    # What is small or divides by nothing is copied: 16 million numbers at most, 64 MB.
    assert held - tables <= total / data + 2**24


def unsplit_kernels(params, rules):
    """Return the kernels of a transformer's blocks that are not split over both axes."""
    places = named_leaves(param_shardings(params, abstract_mesh(32, 8), rules))
    kernels = {leaf: place for leaf, place in places.items() if matches(leaf, (r"(qkv|out|fc1|fc2)/kernel$",))}
    assert kernels
    return [leaf for leaf, place in kernels.items() if not {"data", "model"} <= set(place.spec)]


@pytest.mark.parametrize("name", ["tangerine", "dinov2-g", "dinov3-7B"])
def test_transformers_are_split_over_both_axes(name, shapes):
    network, params = shapes(name)
    assert unsplit_kernels(params, network.rules) == []


@pytest.mark.parametrize("removed", ["qkv", "out", "fc1", "fc2"])
def test_a_rule_that_is_missing_is_caught(removed, shapes):
    network, params = shapes("dinov3-7B")
    left = tuple((pattern, spec) for pattern, spec in network.rules if f"{removed}/kernel" not in pattern)
    found = unsplit_kernels(params, left)
    assert found and all(leaf.endswith(f"{removed}/kernel") for leaf in found)


def test_a_rule_that_keeps_a_kernel_whole_is_caught(shapes):
    network, params = shapes("tangerine")
    planted = ((r"mlp/fc1/kernel$", PartitionSpec()), *network.rules)
    found = copied(params, abstract_mesh(64, 1), planted)
    assert found and all(name.endswith("mlp/fc1/kernel") for name in found)


def test_tables_of_positions_are_whole(shapes):
    network, params = shapes("tangerine")
    places = named_leaves(param_shardings(params, abstract_mesh(64, 4), network.rules))
    assert all(places[name].spec == PartitionSpec() for name in places if matches(name, WHOLE_BY_RULE))


def test_moments_lie_where_their_parameters_lie(shapes):
    network, params = shapes("dinov3-7B")
    state = {"params": params, "opt_state": ({"mu": params, "nu": params},)}
    places = named_leaves(param_shardings(state, abstract_mesh(64, 4), network.rules))
    for name in named_leaves(params):
        assert places[f"params/{name}"].spec == places[f"opt_state/0/mu/{name}"].spec


def test_an_encoder_of_7_billion_parameters_fits_small_chips():
    # Parameters and two moments, float32, on 64 chips of 16 GB: 1.3 GB of each.
    config = dinov3("7B")
    small = of_encoder(dataclasses.replace(config, depth=1))
    params = jax.eval_shape(small.init, jax.random.key(0))
    places, leaves = named_leaves(param_shardings(params, abstract_mesh(64, 1), small.rules)), named_leaves(params)
    block = [name for name in leaves if "/blocks/" in f"/{name}"]
    held = sum(math.prod(places[name].shard_shape(leaves[name].shape)) for name in block)
    whole = sum(math.prod(leaves[name].shape) for name in block)
    assert 40 * whole > 6.5e9
    assert 3 * 4 * 40 * held < 1.4e9

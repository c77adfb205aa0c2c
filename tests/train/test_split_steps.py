"""Steps whose parameters are split over "data": the same numbers as on one device, and nothing but parameters sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmed.arrays.layers import Holding, holding_layers, layer_holding
from jaxmed.arrays.trees import named_leaves
from jaxmed.models.vit import VitConfig, vit_encoder
from jaxmed.planning.program_text import parse_program
from jaxmed.planning.traffic import measure_work
from jaxmed.train.mesh import MeshConfig, abstract, hold_layers, make_mesh, param_shardings
from jaxmed.train.state import TrainState
from jaxmed.train.step import make_train_step

CONFIG = VitConfig(
    (8, 8), (4, 4), 3, width=16, depth=2, heads=2, hidden=32, remat=True, scan=True, attention="xla", mlp="swiglu"
)
ENCODER = vit_encoder(CONFIG)
OPTIMIZER = optax.sgd(0.1)


def loss(params, keys, batch):
    return jnp.mean(jnp.square(ENCODER.apply(params["encoder"], batch["image"]))), {}


def first_state(key):
    params = {"encoder": ENCODER.init(key)}
    return TrainState(jnp.zeros((), jnp.int32), params, None, OPTIMIZER.init(params), key)


def make(data, model):
    """Return a step on a mesh, whose leaves of 64 numbers are large, and where its state lies."""
    mesh = make_mesh(MeshConfig(data, model))
    shapes = jax.eval_shape(first_state, jax.random.key(0))
    places = param_shardings(shapes, mesh, ENCODER.rules, smallest_split=64)
    return make_train_step(loss, OPTIMIZER, state=abstract(shapes, places)), places, mesh


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((8, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(images):
    step, places, mesh = make(1, 1)
    batch = {"image": jax.device_put(images, NamedSharding(mesh, P("data")))}
    return jax.device_get(step(jax.jit(first_state, out_shardings=places)(jax.random.key(0)), batch)[0].params)


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2)])
def test_a_split_step_has_the_numbers_of_one_device_and_sends_no_activations_along_data(data, model, alone, images):
    step, places, mesh = make(data, model)
    state = jax.jit(first_state, out_shardings=places)(jax.random.key(0))
    batch = {"image": jax.device_put(images, NamedSharding(mesh, P("data")))}
    kernel = state.params["encoder"]["blocks"]["layer_0"]["mlp"]["fc2"]["kernel"]
    assert "data" in kernel.sharding.spec
    compiled = step.lower(state, batch).compile()
    found = named_leaves(jax.device_get(compiled(state, batch)[0].params))
    for name, leaf in named_leaves(alone).items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=2e-6, err_msg=name)
    work = measure_work(parse_program(compiled.as_text()), {"data": data, "model": model})
    assert {message.kind for message in work.messages if message.axis == "data"} <= {
        "all-gather", "all-reduce", "reduce-scatter",
    }  # fmt: skip


def test_layers_are_held_as_the_step_says_and_not_at_all_outside_of_one():
    mesh = make_mesh()
    places = {
        "encoder": {"blocks": {"layer_0": {"fc1": {"kernel": NamedSharding(mesh, P("data"))}}}},
        "head": {"kernel": NamedSharding(mesh, P("data"))},
    }
    assert layer_holding() == Holding() and not hold_layers(places).has_tensor_splits
    tensor = {"head": {"kernel": NamedSharding(make_mesh(MeshConfig(4, 2)), P(None, "model"))}}
    assert hold_layers(tensor) == Holding(has_tensor_splits=True)
    with holding_layers(hold_layers(places)):
        holding = layer_holding()
        layer = {"fc1": {"kernel": jnp.ones((8, 4))}, "fc2": {"kernel": jnp.ones((8, 4))}}
        split, whole = jax.jit(holding.split)(layer), jax.jit(holding.whole)(layer)
        assert split["fc1"]["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
        assert whole["fc1"]["kernel"].sharding.is_fully_replicated
        odd = {"fc1": {"kernel": jnp.ones((6, 4))}}  # of a narrower column, which does not divide
        assert jax.jit(holding.split)(odd)["fc1"]["kernel"].shape == (6, 4)
    assert layer_holding() == Holding()

"""Meshes and layouts, on eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxmed.errors import InputError
from jaxmed.recipes.training import TrainConfig
from jaxmed.train import mesh
from jaxmed.train.mesh import (
    MeshConfig,
    abstract_batch,
    gathered,
    hold_split,
    hold_whole,
    make_mesh,
    param_shardings,
    process_slice,
    shard_batch,
    without_data,
)

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Stage:
    train: TrainConfig = TrainConfig()
    rate: float = 0.5


def test_a_stage_joins_its_processes_where_its_mesh_asks(monkeypatch):
    joined = []
    monkeypatch.setattr(mesh, "join", lambda *place: joined.append(place))
    assert not mesh.join_where_asked(Stage()) and not joined
    asking = MeshConfig(distributed=True, coordinator="a:1", processes=2, process=1)
    assert mesh.join_where_asked(Stage(TrainConfig(mesh=asking))) and joined == [("a:1", 2, 1)]


def test_axes_fill_the_devices():
    assert dict(make_mesh().shape) == {"data": 8, "model": 1}
    assert dict(make_mesh(MeshConfig(model=2)).shape) == {"data": 4, "model": 2}
    assert dict(make_mesh(MeshConfig(data=3)).shape) == {"data": 3, "model": 1}


@pytest.mark.parametrize("config", [MeshConfig(data=9), MeshConfig(model=3), MeshConfig(data=5, model=2)])
def test_axes_that_do_not_fit_are_refused(config):
    with pytest.raises(InputError, match=r"mesh: expected axes that fill 8 device"):
        make_mesh(config)


@pytest.mark.parametrize("settings", [{"data": -1}, {"model": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MeshConfig(**settings)


def test_layout_follows_the_first_rule_then_size():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    shapes = {
        "attention": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
        "large": jnp.ones((30, 64, 256)),
        "odd": jnp.ones((7, 9)),
        "moments": {"attention": {"kernel": jnp.ones((8, 6)), "kernel_scale": jnp.ones(())}},
    }
    rules = (("attention/kernel", P(None, "model")), ("kernel", P("data")))
    found = jax.tree.map(lambda sharding: sharding.spec, param_shardings(shapes, mesh, rules, smallest_split=1000))
    assert found["attention"] == {"kernel": P(None, "model"), "bias": P()}
    assert found["large"] == P(None, None, "data")
    assert found["odd"] == P()
    assert found["moments"]["attention"] == {"kernel": P(None, "model"), "kernel_scale": P()}


def test_large_leaves_are_split_over_data_besides_their_rule_and_an_empty_rule_keeps_them_whole():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    shapes = {
        "fc1": jnp.ones((64, 32)),
        "fc2": jnp.ones((32, 64)),
        "table": jnp.ones((64, 64)),
        "odd": jnp.ones((6, 64)),
    }
    rules = (("fc1", P(None, "model")), ("fc2", P("model", None)), ("table", P()), ("odd", P(None, "model")))
    found = jax.tree.map(lambda sharding: sharding.spec, param_shardings(shapes, mesh, rules, smallest_split=100))
    assert found["fc1"] == P("data", "model")
    assert found["fc2"] == P("model", "data")
    assert found["table"] == P()
    assert found["odd"] == P(None, "model")  # 6 rows do not divide


def test_an_abstract_mesh_tells_the_same_without_devices():
    shapes, rules = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}, (("kernel", P(None, "model")),)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    real, told = (param_shardings(shapes, one, rules, smallest_split=100) for one in (mesh, mesh.abstract_mesh))
    assert real["kernel"].spec == told["kernel"].spec == P("data", "model")


def test_a_partition_without_data_keeps_the_rest():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    assert without_data(NamedSharding(mesh, P("data", "model"))) == P(None, "model")
    assert without_data(NamedSharding(mesh, P(("data", "model"), None))) == P("model", None)
    assert without_data(NamedSharding(mesh, P(None, "model"))) is None
    assert without_data(NamedSharding(make_mesh(MeshConfig(data=1)), P("data"))) is None
    assert without_data(SingleDeviceSharding(jax.devices()[0])) is None


def test_parameters_held_whole_leave_the_batch_where_it_is():
    """Without it the compiler would split the product by its columns, and give every device all rows."""
    mesh = make_mesh()
    split, rows = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data"))
    params = {"kernel": jax.device_put(jnp.arange(64.0).reshape(8, 8), split)}
    places = {"kernel": split}

    @jax.jit
    def gradient(params, x):
        def loss(params):
            return jnp.sum((x @ hold_whole(params, places)["kernel"]) ** 2)

        return hold_split(jax.grad(loss)(params), places)

    x = jax.device_put(jnp.arange(128.0).reshape(16, 8) / 100, rows)
    found = gradient(params, x)["kernel"]
    assert found.sharding.is_equivalent_to(split, 2)
    kernel = np.arange(64.0).reshape(8, 8)
    np.testing.assert_allclose(found, 2 * np.asarray(x).T @ (np.asarray(x) @ kernel), rtol=1e-5)
    text = gradient.lower(params, x).compile().as_text() or ""
    assert "all-gather" in text and "all-to-all" not in text


def test_gathered_parameters_are_whole_along_data():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    params = {
        "kernel": jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("data", "model"))),
        "bias": jax.device_put(jnp.ones(8), NamedSharding(mesh, P())),
    }
    found = gathered(params)
    assert found["kernel"].sharding.spec == P(None, "model")
    np.testing.assert_array_equal(found["kernel"], params["kernel"])
    assert gathered({"bias": params["bias"]})["bias"] is params["bias"]


def test_an_abstract_batch_is_placed_as_a_batch_is():
    mesh = make_mesh()
    batch = shard_batch({"image": np.zeros((16, 4), np.float32), "record": np.arange(16)}, mesh)
    told = abstract_batch({"image": jax.ShapeDtypeStruct((4,), jnp.float32)}, 16, mesh)
    assert set(told) == set(batch)
    for name, array in batch.items():
        assert (told[name].shape, told[name].dtype) == (array.shape, array.dtype)
        assert told[name].sharding.is_equivalent_to(array.sharding, array.ndim)


def test_a_rule_that_does_not_divide_names_the_parameter():
    with pytest.raises(ValueError, match="kernel: expected a size that data = 8 divides, got 6"):
        param_shardings({"kernel": jnp.ones(6)}, make_mesh(), (("kernel", P("data")),))


def test_shard_batch_splits_and_keeps_the_order():
    mesh = make_mesh()
    assert process_slice(mesh) == (0, 1)
    batch = shard_batch({"image": np.arange(16.0).reshape(16, 1)}, mesh)
    np.testing.assert_array_equal(batch["image"], np.arange(16.0).reshape(16, 1))
    assert batch["image"].addressable_shards[0].data.shape == (2, 1)
    with pytest.raises(InputError, match="batch_size: expected a multiple of the 8 devices along data, found 12"):
        shard_batch({"image": np.zeros((12, 1))}, mesh)

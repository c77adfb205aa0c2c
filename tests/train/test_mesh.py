"""Meshes and layouts, on eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmed.errors import InputError
from jaxmed.recipes.training import TrainConfig
from jaxmed.train import mesh
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings, process_slice, shard_batch

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

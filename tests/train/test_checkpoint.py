"""Checkpoints: other meshes, damaged files, full disks, other models."""

import gc
import json
import os
import random
import resource
import shutil
import subprocess
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxmed.arrays.trees import named_leaves
from jaxmed.errors import InputError
from jaxmed.io.weights_files import load_parameters
from jaxmed.train.checkpoint import Checkpoints, export_parameters
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.optimizer import OptimizerConfig, make_optimizer
from jaxmed.train.state import create_state

# TensorStore leaves coroutines behind a failed read or write; Python tells of them whenever it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_here():
    """Let Python find those coroutines before another test is blamed for them."""
    yield
    gc.collect()


def make_state(seed=0, mesh=MeshConfig(data=1), width=toy.WIDTH, config=OptimizerConfig()):
    optimizer = make_optimizer(config, 10)
    mesh = make_mesh(mesh)
    return create_state(
        jax.random.key(seed), lambda key: toy.init(key, width), optimizer, mesh, rules=toy.RULES, ema=True
    )


def plain(state):
    return {
        name: np.asarray(jax.random.key_data(leaf) if name == "key" else leaf)
        for name, leaf in named_leaves(state).items()
    }


def assert_equal(found, expected):
    found, expected = plain(found), plain(expected)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, made on 4 x 2 devices: step 3 of seed 3 and step 5 of seed 5."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    mesh = MeshConfig(data=4, model=2)
    with Checkpoints(folder, {"note": "kept"}) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, make_state(step, mesh))
    return folder


@pytest.mark.core
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1), MeshConfig(data=4, model=2)])
def test_saved_on_4x2_restored_elsewhere(saved, mesh):
    target = make_state(0, mesh)
    with Checkpoints(saved) as checkpoints:
        step, state = checkpoints.restore(target)
    assert step == 5
    assert_equal(state, make_state(5))
    assert jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, target.params)
    places = [(a.sharding, b.sharding) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True)]
    assert all(found == wanted for found, wanted in places)


@pytest.mark.core
def test_the_record_holds_the_configuration(saved):
    record = json.loads((saved / "5" / "record" / "metadata").read_text())
    assert record["note"] == "kept"
    assert record["arrays"]["params/encoder/kernel"] == [[64, 16], "float32"]


@pytest.mark.core
def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(make_state()) is None


def test_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path / "state", keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_state())
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
        checkpoints.discard_after(3)
        assert checkpoints.steps() == [3]


@pytest.mark.parametrize("seed", range(12))
def test_a_truncated_checkpoint_is_skipped_or_was_whole(saved, tmp_path, seed):
    """Cut one file of the newest checkpoint at a random byte: step 3 is taken with a warning, or step 5 is intact."""
    draw = random.Random(seed)
    folder = tmp_path / "state"
    shutil.copytree(saved, folder)
    files = sorted(path for path in (folder / "5").rglob("*") if path.is_file())
    # Seed 0 cuts every file of the arrays; the others one file, which may hold nothing that is read back.
    arrays = [path for path in files if "state" in path.relative_to(folder).parts]
    for victim in [files[draw.randrange(len(files))]] if seed else arrays:
        os.truncate(victim, draw.randrange(victim.stat().st_size))
    with warnings.catch_warnings(record=True) as caught, Checkpoints(folder) as checkpoints:
        warnings.simplefilter("always")
        step, state = checkpoints.restore(make_state())
        left = checkpoints.steps()
    assert_equal(state, make_state(step))
    told = [str(item.message) for item in caught if "is damaged" in str(item.message)]
    assert (step, len(told)) in ((5, 0), (3, 1))
    if seed == 0:
        assert step == 3
    if step == 3:
        assert "checkpoint 5 is damaged" in told[0] and "continuing from step 3" in told[0]
        assert left == [3]


def test_a_changed_byte_of_an_array_is_noticed(saved, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(saved, folder)
    record = folder / "5" / "record" / "metadata"
    content = json.loads(record.read_text())
    content["checksums"]["params/encoder/kernel"] ^= 1
    record.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="the bits of params/encoder/kernel differ"), Checkpoints(folder) as points:
        assert points.restore(make_state()).step == 3


def test_no_good_checkpoint_is_an_error(saved, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(saved, folder)
    for step in (3, 5):
        (folder / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match="expected a good checkpoint, found checkpoint 5 is damaged") as caught:
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore(make_state())
    assert "--no-resume" in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / "5").is_dir() and (folder / "3").is_dir()  # nothing was deleted


def test_another_models_checkpoint_names_the_parameters(saved):
    with pytest.raises(InputError, match="expected a checkpoint of this model") as caught, Checkpoints(saved) as points:
        points.restore(make_state(width=8))
    assert "params/decoder/kernel of [16, 64] float32, not [64, 8] float32" not in str(caught.value)
    assert "params/encoder/bias of [16] float32, not [8] float32" in str(caught.value)
    with pytest.raises(InputError, match="no opt_state|an unknown opt_state"), Checkpoints(saved) as points:
        points.restore(make_state(config=OptimizerConfig(kind="sgd")))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting a small file system needs the rights of root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_in_one_line_and_the_old_checkpoint_stays(small_disk):
    folder = small_disk / "state"
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(1, make_state(1))
    with pytest.raises(InputError, match="enough space to write") as caught:
        with Checkpoints(folder, keep=3) as checkpoints:
            for step in range(2, 40):
                checkpoints.save(step, make_state(step, width=64) if step > 2 else make_state(step))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    for path in folder.iterdir():  # what a later run would do first, with space made
        if path.name.isdigit() and int(path.name) > 2:
            shutil.rmtree(path)
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.restore(make_state())
    assert_equal(state, make_state(step))


def test_a_read_only_disk_is_told_in_one_line(small_disk):
    folder = small_disk / "state"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="a writable place, found read-only file system"):
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.restore(make_state()).step == 1
            checkpoints.save(2, make_state(2))
    with pytest.raises(InputError, match="read-only file system"), Checkpoints(small_disk / "other") as checkpoints:
        checkpoints.save(2, make_state(2))


def test_a_file_that_may_not_grow_is_told_in_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match="file too large"), Checkpoints(tmp_path / "state") as checkpoints:
            state = make_state(width=512)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            checkpoints.save(1, state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.core
def test_exported_parameters_come_back_exactly(tmp_path):
    params = {**toy.init(jax.random.key(0)), "low": {"precision": jnp.ones((3, 2), jnp.bfloat16)}}
    export_parameters(tmp_path / "encoder", params, {"family": "toy"})
    found, record = load_parameters(tmp_path / "encoder")
    assert record == {"family": "toy"}
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))
    assert found["low"]["precision"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="no such file"):
        load_parameters(tmp_path / "nowhere")

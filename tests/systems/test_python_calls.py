"""The calls of the Python interface under jit, vmap and grad: host drivers refuse and name what jax goes through.

The functions that jax goes through are compared with finite differences where their systems are tested; the table
below says where.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dino import write_dino

from jaxmed.arrays.graphs import make_graph
from jaxmed.arrays.visits import Visits
from jaxmed.diffusion.samplers import sample
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.models.published.load import load_published
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.systems import brainfm, cocolit, dynamicdps, igndmoe, mupm, noddi, retfound, selfplay, tangerine
from jaxmed.systems.selfplay import system_one

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "tests" / "references"
BVALS, BVECS = two_shell_protocol()


class Driver(NamedTuple):
    """A call that looks at values, with what it says when they are traced."""

    call: Any
    run: Any  # from the argument that is traced
    argument: Any
    words: str
    announced: str


def embed(values):
    return tangerine.embed(load_published(REFERENCES / "tangerine_linear.safetensors", heads=2), values)


@functools.cache
def tiny_dino():
    with tempfile.TemporaryDirectory() as folder:
        return load_published(write_dino(Path(folder) / "dino.safetensors"))


def embed_image(values):
    return retfound.embed(tiny_dino(), values)


def predict_brain(values):
    return brainfm.predict(load_published(REFERENCES / "brainfm.pth"), values).maps["T1"]


def fit_course(values):
    adjacency = np.ones((4, 4)) - np.eye(4)
    visits = Visits(values, jnp.zeros((3, 1)), jnp.ones((3, 1), bool))
    return igndmoe.fit(visits, make_graph(adjacency)).errors


def think(image):
    config = system_one.SystemOneConfig(
        GeneratorConfig("plain", widths=(4,)), VerifierConfig("plain", widths=(4,), dense=(8,))
    )
    params = system_one.init_params(jax.random.key(0), config, (8, 8))
    return selfplay.think(jax.random.key(0), system_one.SystemOne(config, params), image).values


DRIVERS = {
    "noddi.fit": Driver(
        noddi.fit, lambda signals: noddi.fit(signals, BVALS, BVECS).ndi, np.ones((3, 99), np.float32),
        "noddi.fit_voxels", "driver on the host",
    ),
    "noddi.train": Driver(
        noddi.train, lambda bvals: noddi.train(jax.random.key(0), bvals, BVECS), np.asarray(BVALS, np.float32),
        "noddi.predict", "driver on the host",
    ),
    "igndmoe.fit": Driver(
        igndmoe.fit, fit_course, np.full((3, 1, 4), 0.5, np.float32), "igndmoe.fit_on_device", "the host's driver",
    ),
    "tangerine.embed": Driver(
        tangerine.embed, embed, np.zeros((24, 24, 24), np.float32), "tangerine.embed_cubes", "driver on the host",
    ),
    "retfound.embed": Driver(
        retfound.embed, embed_image, np.zeros((28, 28, 3), np.float32), "retfound.embed_prepared", "driver on the host",
    ),
    "brainfm.predict": Driver(
        brainfm.predict, predict_brain, np.zeros((8, 8, 8), np.float32), "brainfm.predict_maps", "driver on the host",
    ),
    "selfplay.think": Driver(
        selfplay.think, think, np.zeros((8, 8), np.float32), "rl.selfplay.iterate", "driver on the host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_refuses_what_is_traced_and_names_what_to_call(name, transform):
    driver = DRIVERS[name]
    argument = np.stack([driver.argument] * 2) if transform is jax.vmap else driver.argument
    with pytest.raises(ValueError, match="traced|traces") as error:
        transform(driver.run)(argument)
    assert driver.words in str(error.value) and "\n" not in str(error.value)
    assert driver.announced in " ".join(driver.call.__doc__.split())


TRACEABLE = {
    noddi.fit_voxels: ("systems/test_noddi_fitting.py", "test_the_fit_of_voxels_is_differentiable"),
    igndmoe.fit_on_device: (
        "systems/test_igndmoe_fitting.py", "test_a_traced_fit_is_the_hosts_and_what_cannot_be_traced_says_so",
    ),
    tangerine.embed_cubes: (
        "systems/test_tangerine_embedding.py",
        "test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_cubes",
    ),
    retfound.embed_prepared: (
        "systems/test_retfound_inputs.py",
        "test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_images",
    ),
    brainfm.predict_maps: (
        "systems/test_brainfm_prediction.py", "test_the_core_is_jitted_mapped_and_differentiated_by_weights_and_images",
    ),
    cocolit.translate: ("systems/test_cocolit_translation.py", "test_the_call_composes_with_jit_vmap_and_grad"),
    mupm.fit: ("systems/test_mupm_regression.py", "test_the_call_composes_with_jit_vmap_and_grad"),
    dynamicdps.enhance: ("systems/test_dynamicdps_enhancement.py", "test_the_call_composes_with_jit_vmap_and_grad"),
    sample: ("diffusion/test_samplers.py", "test_the_call_composes_with_jit_vmap_and_grad"),
}  # fmt: skip


@pytest.mark.parametrize("call", TRACEABLE, ids=lambda call: call.__name__)
def test_what_jax_goes_through_is_tested_against_finite_differences(call):
    file, name = TRACEABLE[call]
    text = (ROOT / "tests" / file).read_text()
    assert f"def {name}(" in text and call.__name__ in text
    assert "jit" in call.__doc__, "the docstring says which transformations go through"

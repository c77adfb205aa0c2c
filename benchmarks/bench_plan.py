"""Predicted against measured time of a training step on meshes of CPU devices: rows `plan_step`.

The step of TANGERINE's pre-training at a small size, on 1, 2 and 4 virtual devices that share the pinned cores. The
prediction is that of `jaxmed plan --topology cpu:N`: a roofline of the compiled program under the rates of a matrix
product and a copy, measured here. The accuracy column holds the predicted seconds and their ratio to the measured ones.
"""

import dataclasses
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from timing import Measurement, alternate, emit, make_rows, measure_peak, parse_config, prepare

from jaxmed.plan import find_rates
from jaxmed.planning.layouts import Layout
from jaxmed.planning.topologies import find_topology
from jaxmed.recipes.planned_step import arrange, evaluate
from jaxmed.systems.tangerine.stages import pretrain
from jaxmed.train.mesh import MeshConfig, make_mesh

# Edge of the volumes, width, depth and batch.
SIZES = {"smoke": (32, 64, 2, 4), "cpu": (96, 384, 6, 8), "gpu": (96, 384, 6, 8), "pod": (96, 384, 6, 8)}


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak, stage = measure_peak(), make_config(*SIZES[config.size])
    rows = []
    for devices in (1, 2, 4):
        topology, layout = find_topology(f"cpu:{devices}"), Layout(devices, 1, SIZES[config.size][3], 1, False)
        found = evaluate(pretrain, stage, layout, topology, jax.devices(), find_rates(topology, stage))
        run = make_run(arrange(stage, layout), devices)
        (seconds,) = alternate({"jaxmed": run}, config.repeats).values()
        median = sorted(seconds)[len(seconds) // 2]
        accuracy = {"predicted_s": found.seconds, "predicted_over_measured": found.seconds / median}
        measured = {"jaxmed": Measurement(tuple(seconds), flops=devices * found.flops, accuracy=accuracy)}
        rows += make_rows("plan_step", f"{devices} device(s), {found.bound}-bound", measured, conditions, peak)
    emit(rows, config.json)


def make_config(edge: int, width: int, depth: int, batch: int) -> pretrain.Config:
    """Return a pre-training of a small model."""
    config = pretrain.smoke()
    encoder = dataclasses.replace(
        config.model.encoder, image_size=(edge,) * 3, width=width, depth=depth, heads=width // 32, hidden=4 * width
    )
    loader = dataclasses.replace(config.train.loader, batch_size=batch)
    model = dataclasses.replace(config.model, encoder=encoder)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, loader=loader))


def make_run(config: pretrain.Config, devices: int):
    """Return the function that takes one step, of zeros, and waits for it."""
    workload = pretrain.plan_step(config, make_mesh(MeshConfig(devices, 1), jax.devices()[:devices]))
    state, batch = (jax.tree.map(fill, tree) for tree in workload.arguments)

    def run():
        nonlocal state
        state, metrics = workload.step(state, batch)
        return metrics

    return run


def fill(leaf):
    """Return zeros in a leaf's place, or a key where it is one."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.device_put(jax.random.key(0) if is_key else jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)


if __name__ == "__main__":
    main()

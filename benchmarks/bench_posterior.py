"""Posterior sampling with a guided-diffusion prior: rows `dps_step` and `dynamicdps_run`, peer a PyTorch loop.

The network of the CPU size has 1.2 M parameters (32 channels, multipliers 1, 2, 2, one block a level, attention at the
coarsest) on images of 64 x 64; weights are drawn, the same ones on both sides, because a step takes as long whatever
they are. The operator is a resize to half and back and a Gaussian blur, as two matrix products on both sides.

`dps_step` is a step of DPS: network forward and backward through the operator, ancestral step, gradient step. jaxmed
scans over a run of steps in one program; the peer is the loop of the official code on the same weights, in eager
PyTorch (channels last where that is faster; under torch.compile and autocast on a GPU). Its median is seconds per
step. `difference` is the largest deviation of an image after two steps without noise, relative to its largest value.

`dynamicdps_run` is a whole run from 5 % of the chain with strict line searches of at most six trials; its peer is DPS
over the whole chain of 1000 steps in PyTorch, as a thousand times the step measured above: all steps cost the same, and
whole chains would take minutes each. `evaluations` are the forward and backward passes of either.
"""

import copy
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import (
    Conditions,
    Measurement,
    Peak,
    Row,
    alternate,
    compile_apart,
    describe_cpu,
    emit,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.diffusion.denoiser import Denoiser, make_denoiser
from jaxmed.diffusion.posterior.dps import Dps, dps
from jaxmed.diffusion.posterior.dynamicdps import STRICT, dynamicdps
from jaxmed.diffusion.posterior.fidelity import PLAIN, evaluate
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral, plan
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_guided import CI_PRIOR, DYNAMICDPS_PRIOR, GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.physics.lowfield import LowField, linear_part, make_operator
from jaxmed.train.announce import count_operations

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
ACQUISITION = LowField(gamma=1.0, scale=2.0, sigma=1.0, noise=0.02)
SCALE = 0.3
MOST_TRIALS = 6


class Workload(NamedTuple):
    """One size.

    Attributes:
        name: In words.
        model: The prior.
        edge: Of the images.
        batch: Images at a time.
        steps: Steps of one timed call of `dps_step`.
        chain: Steps of the whole chain.
    """

    name: str
    model: GuidedUnetConfig
    edge: int
    batch: int
    steps: int
    chain: int


SMALL = dataclasses.replace(CI_PRIOR, multipliers=(1, 2), attention_factors=())
LARGE = dataclasses.replace(DYNAMICDPS_PRIOR, dtype="bfloat16")
WORKLOADS = {
    "smoke": [Workload("16 px, small U-Net", SMALL, 16, 1, 10, 100)],
    "cpu": [Workload("64 px, 1.2 M U-Net, float32", CI_PRIOR, 64, 1, 20, 1000)],
    "gpu": [Workload("256 px, 124 M U-Net, bfloat16", LARGE, 256, 8, 20, 1000)],
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    rows = []
    for work in WORKLOADS[config.size]:
        rows += measure(work, config.peer, config.repeats, conditions, peak)
    emit(rows, config.json)


def measure(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure both rows of one size."""
    torch_loop = make_torch_loop(work, len(conditions.cores)) if with_peer else None
    model = make_model(GuidedUnet(work.model))
    shape = (work.batch, work.edge, work.edge, 1)
    if torch_loop is not None:
        params = torch_loop.params
    else:
        params = model.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(work.batch))
    rng = np.random.default_rng(0)
    truth = rng.random(shape, np.float32) * 2
    operator = make_operator(shape[1:3], ACQUISITION)
    y = np.asarray(jax.vmap(operator)(truth)) + ACQUISITION.noise * rng.normal(size=shape).astype(np.float32)

    def prior(params: Any) -> Denoiser:
        return make_denoiser(partial(model.apply, params), VpDiscrete(), "epsilon", clip=(0.0, 2.0))

    def run(sampler: Ancestral) -> Callable[..., Any]:
        settings = Dps(SCALE, sampler, PLAIN)
        start = jnp.zeros(shape)
        return lambda params, key: dps(key, prior(params), y, operator, start, settings)[0]

    # The last steps of the chain, from where the estimates of a run would be.
    times = tuple(float(t) for t in range(work.steps - 1, -1, -1))
    some = compile_apart(run(Ancestral(times=times)), params, jax.random.key(1))
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(some.call, params, jax.random.key(1))}
    accuracy: dict[str, float] = {}
    if torch_loop is not None:
        accuracy["difference"] = compare(work, prior(params), y, operator, torch_loop)
        functions |= {name: partial(torch_loop.run, y, work.steps, name) for name in torch_loop.forms}
    seconds = {name: np.array(found) / work.steps for name, found in alternate(functions, repeats).items()}
    best = min(torch_loop.forms, key=lambda name: float(np.median(seconds[name]))) if torch_loop else ""
    flops = count_flops(prior(params), y, operator)
    measured = {"jaxmed": Measurement(tuple(seconds["jaxmed"]), some.seconds, flops, accuracy=accuracy)}
    peer = {"versions": versions("torch"), "device": describe_cpu(conditions.cores) if on_cpu() else None}
    if torch_loop is not None:
        measured["PyTorch"] = Measurement(tuple(seconds[best]), **peer)
    workload = f"{work.name}, batch {work.batch}, seconds per step"
    rows = make_rows("dps_step", workload, measured, conditions, peak)
    steps = {"jaxmed": seconds["jaxmed"]}
    if torch_loop is not None:
        steps["PyTorch"] = seconds[best]
    return rows + measure_run(work, prior, params, y, operator, steps, repeats, conditions, peak)


def measure_run(
    work: Workload,
    prior: Callable[[Any], Denoiser],
    params: Any,
    y: np.ndarray,
    operator: Any,
    steps: dict[str, np.ndarray],
    repeats: int,
    conditions: Conditions,
    peak: Peak,
) -> list[Row]:
    """Measure a whole DynamicDPS beside DPS over the whole chain, whose steps took `steps` seconds each."""
    sampler = Ancestral(num_steps=work.chain)
    start = StartTime(rule="fixed", fixed=work.chain // 20 - 1)
    search = dataclasses.replace(STRICT.search, max_evaluations=MOST_TRIALS)  # pyright: ignore[reportArgumentType]
    settings = dataclasses.replace(STRICT, start=start, sampler=sampler, search=search, fidelity=PLAIN)
    initial = jnp.clip(y, 0.0, 2.0)
    dynamic = compile_apart(
        lambda params, key: dynamicdps(key, prior(params), y, operator, initial, settings), params, jax.random.key(2)
    )
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(dynamic.call, params, jax.random.key(2))}
    seconds = alternate(functions, repeats)
    _, info = jax.device_get(functions["jaxmed"]())
    evaluations = float(info.evaluations.mean())
    accuracy = {
        "evaluations": evaluations,
        "evaluations_ratio": work.chain / evaluations,
        "time_ratio_to_own_dps": float(work.chain * np.median(steps["jaxmed"]) / np.median(seconds["jaxmed"])),
        "residual": float(np.nanmin(info.residuals, axis=0).mean()),
    }
    flops = count_flops(prior(params), y, operator)
    measured = {"jaxmed": Measurement(seconds["jaxmed"], dynamic.seconds, flops * evaluations, accuracy=accuracy)}
    if "PyTorch" in steps:
        measured["PyTorch, DPS"] = Measurement(
            tuple(work.chain * steps["PyTorch"]),
            accuracy={"evaluations": float(work.chain)},
            versions=versions("torch"),
            device=describe_cpu(conditions.cores) if on_cpu() else None,
        )
    workload = f"{work.name}, batch {work.batch}, {start.fixed + 1} of {work.chain} steps, {MOST_TRIALS} trials"
    return make_rows("dynamicdps_run", workload, measured, conditions, peak)


def count_flops(denoiser: Denoiser, y: np.ndarray, operator: Any) -> float:
    """Count the operations of one forward and backward pass; XLA's own count is blind to oneDNN's."""
    t = jnp.zeros(len(y))
    return count_operations(
        jax.make_jaxpr(lambda x: evaluate(denoiser, x, operator, PLAIN, x, t))(jnp.asarray(y)).jaxpr
    )


def on_cpu() -> bool:
    """Tell whether the default device is a CPU."""
    return jax.default_backend() == "cpu"


# --- The peer --------------------------------------------------------------------------------


class TorchLoop(NamedTuple):
    """DPS in PyTorch.

    Attributes:
        params: Its weights as jaxmed's parameters.
        run: (y, steps, form) -> image, over the last steps of the chain from noise.
        one: (x, y, t, form) -> x after a step without noise.
        forms: Memory formats or compilations that it runs in.
    """

    params: Any
    run: Callable[..., Any]
    one: Callable[..., Any]
    forms: tuple[str, ...]


def make_torch_loop(work: Workload, threads: int) -> TorchLoop:
    """Build the network of the official names, and the loop around it."""
    sys.path.insert(0, str(SUPPORT))
    import torch
    import torch_guided

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = work.model
    sizes = torch_guided.Sizes(
        width=config.width, multipliers=config.multipliers, blocks=config.blocks,
        attention=config.attention_factors, heads=config.heads,
    )  # fmt: skip
    network = torch_guided.Unet(sizes).eval().requires_grad_(False)
    for value in network.parameters():
        value.add_(torch.randn(value.shape) * 0.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "model.pt")
        params = load_published(Path(folder) / "model.pt", heads=config.heads).params
    device = "cpu" if on_cpu() else "cuda"
    network = network.to(device)
    plans = plan(VpDiscrete(), Ancestral())
    keep, pull, noise = (
        torch.tensor(np.asarray(column)[::-1].copy(), dtype=torch.float32)
        for column in (plans.keep, plans.pull, plans.noise)  # pyright: ignore[reportAttributeAccessIssue]
    )
    bars = torch.tensor(VpDiscrete().alpha_bar_table, dtype=torch.float32)
    linear = linear_part((work.edge, work.edge), ACQUISITION)
    matrix = torch.tensor(np.asarray(axis_matrix(linear, work.edge)), device=device)
    forms = ("contiguous", "channels last") if on_cpu() else ("compiled",)
    networks = {"contiguous": network}
    if on_cpu():
        networks["channels last"] = copy.deepcopy(network).to(memory_format=torch.channels_last)
    else:
        networks["compiled"] = torch.compile(network)

    def advance(x: Any, y: Any, t: int, form: str, fresh: Any) -> Any:
        x = x.detach().requires_grad_(True)
        with torch.autocast(device, torch.bfloat16, enabled=not on_cpu()):
            eps = networks[form](x, torch.full((len(x),), t, device=device))[0]
        mean = ((x - (1 - bars[t]).sqrt() * eps.float()) / bars[t].sqrt()).clamp(0.0, 2.0)
        residual = torch.linalg.vector_norm((y - matrix @ mean @ matrix.T).flatten(1), dim=1)
        (gradient,) = torch.autograd.grad(residual.sum(), x)
        moved = keep[t] * x.detach() + pull[t] * mean.detach() + noise[t] * fresh
        return moved - SCALE * gradient

    def prepare_input(array: np.ndarray, form: str) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1))).to(device)
        return tensor.to(memory_format=torch.channels_last) if form == "channels last" else tensor

    def run(y: np.ndarray, steps: int, form: str) -> Any:
        target = prepare_input(y, form)
        x = (1 - bars[steps - 1]).sqrt() * torch.randn_like(target)
        for t in range(steps - 1, -1, -1):
            x = advance(x, target, t, form, torch.randn_like(x))
        return np.asarray(x.cpu())

    def one(x: np.ndarray, y: np.ndarray, t: int, form: str) -> np.ndarray:
        moved = advance(prepare_input(x, form), prepare_input(y, form), t, form, 0.0)
        return np.moveaxis(np.asarray(moved.cpu()), 1, -1)

    return TorchLoop(params, run, one, forms)


def axis_matrix(linear: Any, edge: int) -> np.ndarray:
    """Return the matrix that the operator multiplies each axis by."""
    # An image that is constant along y meets rows that sum to 1 there.
    images = np.broadcast_to(np.eye(edge, dtype=np.float32)[:, :, None, None], (edge, edge, edge, 1))
    return np.asarray(jax.vmap(linear)(images))[:, :, edge // 2, 0].T


def compare(work: Workload, denoiser: Denoiser, y: np.ndarray, operator: Any, torch_loop: TorchLoop) -> float:
    """Return the largest relative difference after two steps of both without noise."""
    steps = plan(denoiser.schedule, Ancestral())
    x = ours = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    for t in (300, 299):
        row = VpDiscrete().num_steps - 1 - t
        at = evaluate(denoiser, jnp.asarray(y), operator, PLAIN, jnp.asarray(ours), jnp.full(len(y), float(t)))
        keep, pull = float(steps.keep[row]), float(steps.pull[row])  # pyright: ignore[reportAttributeAccessIssue]
        ours = np.asarray(keep * ours + pull * at.mean - SCALE * at.gradient)
        x = torch_loop.one(x, y, t, torch_loop.forms[0])
    return float(np.abs(ours - x).max() / np.abs(x).max())


if __name__ == "__main__":
    main()

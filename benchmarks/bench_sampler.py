"""Whole samplers of a diffusion prior: rows `sample_ddim50`, `sample_heun18`, `sample_2m20`, peer diffusers.

The network of the CPU size is the guided-diffusion U-Net with 1.2 M parameters (32 channels, multipliers 1, 2, 2, one
block a level, attention at the coarsest) on images of 64 x 64; weights are drawn, the same ones on both sides. jaxmed
compiles the whole sampler; the peer is the loop of a diffusers pipeline: its scheduler, the same network in PyTorch,
one call per step, in inference mode (channels last where that is faster; under torch.compile and autocast on a GPU).
Both begin by drawing noise and evaluate the network equally often: 50 times for DDIM, 35 for Heun (18 steps), 20 for
DPM-Solver++(2M). The median is seconds for a batch of images.

`difference` is the largest deviation of the images from the same noise at the same times, relative to their largest
value; Heun has none, because diffusers places and interpolates its noise levels differently there.
"""

import copy
import dataclasses
import sys
import tempfile
import warnings
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
from jaxmed.diffusion.samplers import Ddim, DpmSolver, Heun, Sampler, SamplerState, run, sample, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_guided import CI_PRIOR, DYNAMICDPS_PRIOR, GuidedUnet, GuidedUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.train.announce import count_operations

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
SCHEDULE = VpDiscrete()
CHAIN = {"num_train_timesteps": SCHEDULE.num_steps, "beta_schedule": "squaredcos_cap_v2"}


class Workload(NamedTuple):
    """One size.

    Attributes:
        name: In words.
        model: The prior.
        edge: Of the images.
        batch: Images at a time.
    """

    name: str
    model: GuidedUnetConfig
    edge: int
    batch: int


class Method(NamedTuple):
    """One sampler on both sides.

    Attributes:
        row: Name of the row.
        sampler: Ours.
        scheduler: Class of diffusers.
        options: Its arguments beside the chain's.
        steps: It is told to take.
        evaluations: Of the network, on both sides.
        is_comparable: Whether its times are steps of the chain, so that ours can visit the same.
    """

    row: str
    sampler: Sampler
    scheduler: str
    options: dict[str, Any]
    steps: int
    evaluations: int
    is_comparable: bool


SMALL = dataclasses.replace(CI_PRIOR, multipliers=(1, 2), attention_factors=())
LARGE = dataclasses.replace(DYNAMICDPS_PRIOR, dtype="bfloat16")
WORKLOADS = {
    "smoke": Workload("16 px, small U-Net", SMALL, 16, 2),
    "cpu": Workload("64 px, 1.2 M U-Net, float32", CI_PRIOR, 64, 4),
    "gpu": Workload("256 px, 124 M U-Net, bfloat16", LARGE, 256, 8),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]
EXACT = {"clip_sample": False}
METHODS = (
    Method("sample_ddim50", Ddim(50), "DDIMScheduler", {**EXACT, "timestep_spacing": "leading"}, 50, 50, True),
    Method("sample_heun18", Heun(18), "HeunDiscreteScheduler", {"use_karras_sigmas": True}, 18, 35, False),
    Method("sample_2m20", DpmSolver(20), "DPMSolverMultistepScheduler", {}, 20, 20, True),
)


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    work = WORKLOADS[config.size]
    peer = TorchPrior(work, len(conditions.cores)) if config.peer else None
    model = make_model(GuidedUnet(work.model))
    shape = (work.batch, work.edge, work.edge, 1)
    params = peer.params if peer else model.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(work.batch))
    rows = []
    for method in METHODS:
        rows += measure(method, work, model.apply, params, peer, config.repeats, conditions, peak)
    emit(rows, config.json)


def measure(
    method: Method,
    work: Workload,
    apply: Callable[..., Any],
    params: Any,
    peer: "TorchPrior | None",
    repeats: int,
    conditions: Conditions,
    peak: Peak,
) -> list[Row]:
    """Measure one sampler."""
    shape = (work.batch, work.edge, work.edge, 1)

    def prior(params: Any) -> Denoiser:
        return make_denoiser(partial(apply, params), SCHEDULE, "epsilon")

    key = jax.random.key(1)
    ours = compile_apart(lambda params, key: sample(key, prior(params), shape, method.sampler), params, key)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(ours.call, params, key)}
    if peer:
        functions |= {form: partial(peer.sample, method, shape, form) for form in peer.networks}
    seconds = alternate(functions, repeats)
    flops = count_flops(prior(params), shape)
    accuracy = {"evaluations": float(method.evaluations)}
    measured = {}
    if peer:
        if method.is_comparable:
            accuracy["difference"] = compare(method, prior(params), peer, shape)
        best = min(peer.networks, key=lambda form: float(np.median(seconds[form])))
        measured["diffusers"] = Measurement(
            seconds[best],
            accuracy={"evaluations": float(peer.calls)},
            versions=versions("torch", "diffusers"),
            device=describe_cpu(conditions.cores) if on_cpu() else None,
        )
    total = flops * method.evaluations
    measured = {"jaxmed": Measurement(seconds["jaxmed"], ours.seconds, total, accuracy=accuracy), **measured}
    workload = f"{work.name}, batch {work.batch}, {method.evaluations} evaluations"
    return make_rows(method.row, workload, measured, conditions, peak)


def count_flops(denoiser: Denoiser, shape: tuple[int, ...]) -> float:
    """Count the operations of one evaluation; XLA's own count is blind to oneDNN's."""
    return count_operations(jax.make_jaxpr(denoiser.denoise)(jnp.zeros(shape), jnp.zeros(shape[0])).jaxpr)


def on_cpu() -> bool:
    """Tell whether the default device is a CPU."""
    return jax.default_backend() == "cpu"


# --- The peer --------------------------------------------------------------------------------


class TorchPrior:
    """The network of the official names in PyTorch, and the loop of a diffusers pipeline around it.

    Attributes:
        params: Its weights as jaxmed's parameters.
        networks: Form (memory format or compilation) to network.
        calls: Of the network, in the last run.
    """

    def __init__(self, work: Workload, threads: int):
        """Draw the weights."""
        sys.path.insert(0, str(SUPPORT))
        import torch
        import torch_guided  # pyright: ignore[reportMissingImports]

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
            self.params = load_published(Path(folder) / "model.pt", heads=config.heads).params
        self.device = "cpu" if on_cpu() else "cuda"
        network = network.to(self.device)
        if on_cpu():
            last = copy.deepcopy(network).to(memory_format=torch.channels_last)
            self.networks = {"contiguous": network, "channels last": last}
        else:
            self.networks = {"compiled": torch.compile(network)}
        self.calls = 0

    def scheduler(self, method: Method) -> Any:
        """Return the scheduler of a method, with its steps set."""
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = getattr(diffusers, method.scheduler)(**CHAIN, **method.options)
            scheduler.set_timesteps(method.steps)
        return scheduler

    def sample(self, method: Method, shape: tuple[int, ...], form: str, x: np.ndarray | None = None) -> np.ndarray:
        """Sample a batch, from given noise or from new."""
        import torch

        scheduler = self.scheduler(method)
        batch, *space, channels = shape
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=not on_cpu()):
            if x is None:
                image = torch.randn(batch, channels, *space, device=self.device)
            else:
                image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(self.device)
            image = image * scheduler.init_noise_sigma
            if form == "channels last":
                image = image.to(memory_format=torch.channels_last)
            self.calls = 0
            for t in scheduler.timesteps:
                time = t.expand(batch).to(self.device)
                noise = self.networks[form](scheduler.scale_model_input(image, t), time)[0].float()
                image = scheduler.step(noise, t, image).prev_sample
                self.calls += 1
        return np.moveaxis(image.cpu().numpy(), 1, -1)


def compare(method: Method, denoiser: Denoiser, peer: TorchPrior, shape: tuple[int, ...]) -> float:
    """Return the largest relative difference of images from the same noise at the peer's times."""
    times = tuple(float(t) for t in peer.scheduler(method).timesteps)
    sampler = dataclasses.replace(method.sampler, times=times)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    keys = sample_keys(jax.random.key(0), jnp.arange(shape[0]))
    ours = np.asarray(jax.jit(lambda x: run(keys, denoiser, SamplerState(x, jnp.zeros_like(x)), sampler))(x))
    theirs = peer.sample(method, shape, next(iter(peer.networks)), x)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    main()

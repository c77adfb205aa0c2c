"""A brain image drawn from labels: row `synth_128`, peers plain PyTorch, and on request what it costs with all targets.

32 labels are rendered at their own resolution, deformed (affine, and a stationary velocity field squared seven times),
bent by gamma, multiplied by a bias field, blurred and sampled at 1.5 x 1.5 x 5 mm or another recipe, given noise and
brought back to 1 mm; the classes are warped along. jaxmed draws recipes of every kind, which cost it the same; the peer
does the one of clinical slices, with `grid_sample`, `interpolate` and small matrix products, on the same number of
threads, in inference mode. Its median is seconds per sample.

`difference` is the largest deviation of the deformation from the peer's, in voxels, from the same velocity field.
`folds` is the share of voxels whose Jacobian is not positive, under jaxmed. Row `synth_targets` has images of two
modalities, distances and coordinates as targets too, of a padded subject, without a peer.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
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

from jaxmed.arrays.warping import jacobian_determinant
from jaxmed.synthesis.brain import generate
from jaxmed.synthesis.brain_draws import GeneratorConfig
from jaxmed.synthesis.deformation import DeformationConfig, draw_displacement, integrate

NUM_LABELS = 32
STEPS = 7
RESOLUTION = (1.5, 1.5, 5.0)


class Workload(NamedTuple):
    """One size.

    Attributes:
        edge: Voxels along each axis.
        batch: Samples of one call.
    """

    edge: int
    batch: int


WORKLOADS = {"smoke": Workload(32, 1), "cpu": Workload(128, 1), "gpu": Workload(160, 4), "pod": Workload(160, 4)}


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    work = WORKLOADS[config.size]
    rows = measure(work, config.peer, config.repeats, conditions, peak)
    emit(rows + measure_targets(work, config.repeats, conditions, peak), config.json)


def settings(work: Workload, num_steps: int = STEPS) -> GeneratorConfig:
    """Return the configuration of a size."""
    deformation = DeformationConfig(integrate_svf=True, svf_steps=num_steps)
    return GeneratorConfig((work.edge, work.edge, work.edge), deformation=deformation)


def make_labels(edge: int) -> np.ndarray:
    """Return nested ellipsoids, turned and shifted, with labels from 0 to 31."""
    axes = np.linspace(-1, 1, edge)
    x, y, z = np.meshgrid(axes, axes, axes, indexing="ij")
    radius = np.sqrt((x / 0.9) ** 2 + (y / 0.95) ** 2 + (z / 0.85) ** 2)
    wedge = np.floor((np.arctan2(y, x) + np.pi) / (2 * np.pi) * 7.99)
    shell = np.clip(np.floor((1 - radius) * 5), 0, 3)
    return np.where(radius < 1, 1 + (shell * 8 + wedge) % (NUM_LABELS - 1), 0).astype(np.uint8)


def measure(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure images of labels."""
    labels = make_labels(work.edge)
    subject = {"labels": jnp.asarray(labels), "segmentation": jnp.asarray(labels % 20)}
    config = settings(work)
    keys = jax.random.split(jax.random.key(0), work.batch)
    draw = partial(generate, config=config)

    def several(keys: Any, subject: Any) -> Any:
        return draw(keys[0], subject) if work.batch == 1 else jax.vmap(draw, (0, None))(keys, subject)

    compiled = compile_apart(several, keys, subject)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(compiled.call, keys, subject)}
    field = jax.jit(lambda key: draw_displacement(key, config.shape, config.deformation))
    accuracy = {"folds": float((jax.jit(jacobian_determinant)(field(keys[0])) <= 0).mean())}
    torch_draw = make_torch(labels, len(conditions.cores)) if with_peer else None
    if torch_draw is not None:
        functions["PyTorch"] = lambda: [torch_draw.sample() for _ in range(work.batch)]
        accuracy["difference"] = compare(config, keys[0], torch_draw)
    seconds = {name: np.array(found) / work.batch for name, found in alternate(functions, repeats).items()}
    image, _ = functions["jaxmed"]()
    assert float(image.max()) == 1.0
    measured = {
        "jaxmed": Measurement(tuple(seconds["jaxmed"]), compiled.seconds, compiled.flops, compiled.bytes, accuracy)
    }
    if torch_draw is not None:
        device = describe_cpu(conditions.cores) if jax.default_backend() == "cpu" else None
        measured["PyTorch"] = Measurement(tuple(seconds["PyTorch"]), versions=versions("torch"), device=device)
    workload = f"{work.edge}^3, {NUM_LABELS} labels, SVF {STEPS} steps, batch {work.batch}, seconds per sample"
    return make_rows("synth_128", workload, measured, conditions, peak)


def measure_targets(work: Workload, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure images with all targets, of a padded subject with two scans."""
    edge = work.edge + work.edge // 4
    labels = make_labels(edge)
    rng = np.random.default_rng(0)
    subject = {
        "labels": jnp.asarray(labels),
        "segmentation": jnp.asarray(labels % 20),
        "distances": jnp.asarray(rng.integers(0, 255, (*labels.shape, 4), np.uint8)),
        "coordinates": jnp.asarray(rng.integers(-9000, 9000, (*labels.shape, 3), np.int16)),
        "images": jnp.asarray(rng.integers(0, 900, (*labels.shape, 2), np.int16)),
        "present": jnp.array([True, True]),
        "size": jnp.array([edge - 4] * 3, jnp.int32),
    }
    draw = partial(generate, config=GeneratorConfig((work.edge, work.edge, work.edge)))
    keys = jax.random.split(jax.random.key(0), work.batch)

    def several(keys: Any, subject: Any) -> Any:
        return draw(keys[0], subject) if work.batch == 1 else jax.vmap(draw, (0, None))(keys, subject)

    compiled = compile_apart(several, keys, subject)
    seconds = alternate({"jaxmed": partial(compiled.call, keys, subject)}, repeats)["jaxmed"]
    each = tuple(np.array(seconds) / work.batch)
    measured = {"jaxmed": Measurement(each, compiled.seconds, compiled.flops, compiled.bytes)}
    workload = f"{work.edge}^3 of {edge}^3, all targets, batch {work.batch}, seconds per sample"
    return make_rows("synth_targets", workload, measured, conditions, peak)


def compare(config: GeneratorConfig, key: Any, peer: "TorchDraw") -> float:
    """Return the largest difference of the deformation from the peer's, in voxels."""
    raw = dataclasses.replace(config.deformation, integrate_svf=False)
    velocity = jax.jit(lambda key: draw_displacement(key, config.shape, raw))(key)
    ours = jax.jit(partial(integrate, num_steps=STEPS))(velocity)
    return float(np.abs(np.asarray(ours) - peer.integrate(np.asarray(velocity))).max())


# --- The peer --------------------------------------------------------------------------------


class TorchDraw(NamedTuple):
    """The generator in PyTorch.

    Attributes:
        sample: Draws an image and its classes.
        integrate: Velocity field to displacement, NumPy (x, y, z, axis) to the same.
    """

    sample: Callable[[], Any]
    integrate: Callable[[np.ndarray], np.ndarray]


def make_torch(labels: np.ndarray, threads: int) -> TorchDraw:
    """Build the peer: plain PyTorch, tensors of the whole volume, its own interpolation."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    shape = labels.shape
    native = torch.tensor(labels.astype(np.int64), device=device)
    classes = torch.tensor((labels % 20).astype(np.float32), device=device)[None, None]
    sizes = torch.tensor(shape, device=device, dtype=torch.float32)
    axes = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in shape), indexing="ij")
    grid = torch.stack(axes)  # axis, x, y, z

    def look_up(image: Any, places: Any, mode: str) -> Any:
        """Sample (1, channel, x, y, z) at places (axis, x, y, z) in voxels; outer voxels repeat."""
        unit = places.permute(1, 2, 3, 0).flip(-1) * (2 / (sizes.flip(0) - 1)) - 1
        return F.grid_sample(image, unit[None], mode=mode, padding_mode="border", align_corners=True)

    def expand(velocity: Any) -> Any:
        field = velocity / 2**STEPS
        for _ in range(STEPS):
            field = field + look_up(field[None], grid + field, "bilinear")[0]
        return field

    def smooth(scale: float, channels: int, spread: float) -> Any:
        coarse = [max(1, round(scale * n)) for n in shape]
        values = spread * torch.randn(1, channels, *coarse, device=device)
        return F.interpolate(values, shape, mode="trilinear", align_corners=False)[0]

    def uniform(low: float, high: float, *size: int) -> Any:
        return low + (high - low) * torch.rand(*size, device=device)

    def affine() -> Any:
        angles, shears = torch.deg2rad(uniform(-15, 15, 3)), uniform(-0.2, 0.2, 3)
        matrix = torch.eye(3, device=device)
        for axis in range(3):
            c, s = torch.cos(angles[axis]), torch.sin(angles[axis])
            one, two = (axis + 1) % 3, (axis + 2) % 3
            turn = torch.eye(3, device=device)
            turn[one, one], turn[two, two], turn[one, two], turn[two, one] = c, c, -s, s
            matrix = matrix @ turn
        shear = torch.eye(3, device=device)
        shear[1, 0], shear[2, 0], shear[0, 1] = shears
        return uniform(0.8, 1.2, 3)[:, None] * (shear @ matrix)

    def sampling(size: int, n: int, sigma: float) -> Any:
        """Return the matrix that blurs and samples an axis."""
        centre = (torch.arange(size, device=device) + 0.5) * (n / size) - 0.5
        taps = torch.arange(n, device=device)
        near = torch.clamp(1 - (centre[:, None] - taps).abs(), min=0)
        kernel = torch.exp(-0.5 * ((taps[:, None] - taps) / max(sigma, 1e-3)) ** 2)
        return near @ (kernel / kernel.sum(1, keepdim=True))

    def apply(matrices: list[Any], image: Any) -> Any:
        image = torch.einsum("ax,xyz->ayz", matrices[0], image)
        image = torch.einsum("by,ayz->abz", matrices[1], image)
        return torch.einsum("cz,abz->abc", matrices[2], image)

    @torch.inference_mode()
    def sample() -> Any:
        mean, std = uniform(25, 225, 256), uniform(5, 25, 256)
        image = (mean[native] + std[native] * torch.randn(shape, device=device)).clamp_(min=0)
        field = expand(smooth(0.05, 3, 4 * float(torch.rand(()))))
        middle = ((sizes - 1) / 2)[:, None, None, None]
        places = torch.einsum("ij,jxyz->ixyz", affine(), grid - middle + field) + middle
        image = look_up(image[None, None], places, "bilinear")[0, 0]
        warped = look_up(classes, places, "nearest")[0, 0].long()
        image = 300 * (image / 300) ** float(torch.exp(0.1 * torch.randn(())))
        log_bias = smooth(0.03, 1, 0.1 + 0.5 * float(torch.rand(())))[0]
        image = image * torch.exp(log_bias)
        low = [max(1, int(n / r)) for n, r in zip(shape, RESOLUTION, strict=True)]
        sigmas = [0.51 * r for r in RESOLUTION]
        downs = [sampling(size, n, sigma) for size, n, sigma in zip(low, shape, sigmas, strict=True)]
        coarse = apply(downs, image)
        coarse = (coarse + (5 + 10 * float(torch.rand(()))) * torch.randn_like(coarse)).clamp_(min=0)
        back = F.interpolate(coarse[None, None], shape, mode="trilinear", align_corners=False)[0, 0]
        peak = back.max()
        return back / peak, warped, log_bias, (image - back) / peak

    def integrate_array(velocity: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            moved = expand(torch.tensor(np.moveaxis(velocity, -1, 0).copy(), device=device))
        return np.moveaxis(moved.cpu().numpy(), 0, -1)

    return TorchDraw(sample, integrate_array)


if __name__ == "__main__":
    main()

"""Latent diffusion in CoCoLIT: rows `ae_encode`, `ae_decode`, `ldm_unet`, `ldm_controlnet`, `ldm_train`, `ldm_ddim50`.

The autoencoder from an image to its latent and back; the U-Net of latents alone, and with its ControlNet; a training
step of the ControlNet, whose U-Net is frozen (mean squared error of the noise, AdamW); 50 steps of DDIM of both, where
ours computes what it tells the ControlNet of the condition once. The peer is MONAI, under the same weights, all of them
drawn (fresh networks answer zeros). `difference` is the largest deviation from it, relative to its largest
value; of the training step, of the losses of the first two steps.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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

from jaxmed.arrays.trees import named_leaves
from jaxmed.diffusion.denoiser import make_denoiser
from jaxmed.diffusion.samplers import Ddim, SamplerState, run, sample_keys
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.published.cocolit import entries
from jaxmed.models.published.names import to_tensor
from jaxmed.models.unet_latent import ControlNetConfig, LatentUnetConfig, control_net, latent_unet
from jaxmed.train.announce import count_operations

CHAIN = VpDiscrete(betas="scaled-linear")
STEPS, CLIP = 50, (-1.0, 1.0)
LEARNING_RATE = 2.5e-5


class Workload(NamedTuple):
    """One size.

    Attributes:
        image: Voxels of the autoencoder's image along each axis.
        ae_widths: Channels of its levels.
        latent: Voxels of the U-Net's latent along each axis.
        widths: Channels of its levels, the first of which does not attend.
        batch: Latents.
        groups: Of the norms.
        dtype: Of activations and products.
    """

    image: int
    ae_widths: tuple[int, ...]
    latent: int
    widths: tuple[int, ...]
    batch: int = 1
    groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def autoencoder(self) -> AutoencoderKlConfig:
        """Sizes of the autoencoder."""
        blocks = (2,) * len(self.ae_widths)
        return AutoencoderKlConfig(widths=self.ae_widths, blocks=blocks, groups=self.groups, dtype=self.dtype)

    @property
    def unet(self) -> LatentUnetConfig:
        """Sizes of the U-Net."""
        attends = tuple(level > 0 for level in range(len(self.widths)))
        return LatentUnetConfig(
            widths=self.widths, blocks=(2,) * len(self.widths), attention_levels=attends, head_channels=self.widths[-1],
            groups=self.groups, dtype=self.dtype,
        )  # fmt: skip

    @property
    def control(self) -> ControlNetConfig:
        """Sizes of the ControlNet."""
        return ControlNetConfig(self.unet, condition_widths=self.widths[:1])


WORKLOADS = {
    "smoke": Workload(8, (8, 16), 4, (8, 16), groups=8),
    "cpu": Workload(48, (32, 64, 128), 16, (128, 128, 128)),
    "gpu": Workload(128, (64, 128, 256), 40, (256, 256, 256), batch=4, dtype="bfloat16"),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    bench = Bench(WORKLOADS[config.size], config.peer, config.repeats, conditions, measure_peak())
    emit([*bench.coder(), *bench.networks(), *bench.training(), *bench.chain()], config.json)


def draw(shapes: Any, seed: int) -> Any:
    """Return parameters of which none is zero: kernels that keep the variance, scales about 1."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[:-1]))
        return jnp.asarray(1 + 0.1 * values if path.endswith("scale") else values * (1 if len(shape) > 1 else 0.1),
                           jnp.float32)  # fmt: skip

    leaves = {name: leaf(name, value.shape) for name, value in named_leaves(shapes).items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in named_leaves(shapes)])


@dataclasses.dataclass
class Bench:
    """The networks of a size under drawn weights, and how they are measured.

    Attributes:
        work: The size.
        with_peer: Whether MONAI runs beside.
        repeats: Timed calls.
        conditions: Of the process.
        peak: Of the machine.
    """

    work: Workload
    with_peer: bool
    repeats: int
    conditions: Conditions
    peak: Peak

    def __post_init__(self) -> None:
        """Draw weights and inputs."""
        work, rng = self.work, np.random.default_rng(0)
        grid = (work.batch, *(work.latent,) * 3, 4)
        self.image = rng.standard_normal((1, *(work.image,) * 3, 1)).astype(np.float32)
        small = (1, *(work.image // work.autoencoder.divisor,) * 3, 4)
        self.coded = rng.standard_normal(small).astype(np.float32)
        self.z, self.condition, self.noise = (rng.standard_normal(grid).astype(np.float32) for _ in range(3))
        self.t = np.full(work.batch, 500.0, np.float32)
        key = jax.random.key(0)
        self.ae, self.unet, self.control = (
            autoencoder(work.autoencoder), latent_unet(work.unet), control_net(work.control)
        )  # fmt: skip
        self.params = {
            "ae": draw(jax.eval_shape(self.ae.init, key, self.image), 1),
            "unet": draw(jax.eval_shape(self.unet.init, key, self.z, self.t), 2),
            "control": draw(jax.eval_shape(self.control.init, key, self.z, self.t, self.condition), 3),
        }
        self.monai = Monai(work, self.params, len(self.conditions.cores)) if self.with_peer else None

    def coder(self) -> list[Row]:
        """Measure encoding and decoding."""
        said = f"{'-'.join(map(str, self.work.ae_widths))} channels, {self.work.image}^3, {self.work.dtype}"
        params, monai = self.params["ae"], self.monai
        encode = self.row("ae_encode", f"KL autoencoder, {said}", lambda p, x: self.ae.encode(p, x)[0],
                          (params, self.image), monai and partial(monai.encode, self.image))  # fmt: skip
        return encode + self.row("ae_decode", f"KL autoencoder, {said}", self.ae.decode, (params, self.coded),
                                 monai and partial(monai.decode, self.coded))  # fmt: skip

    def networks(self) -> list[Row]:
        """Measure a step of the U-Net, alone and with its ControlNet."""
        monai, inputs = self.monai, (self.z, self.t, self.condition)

        def both(params: Any, z: Any, t: Any, condition: Any) -> jax.Array:
            return self.unet.apply(params["unet"], z, t, self.control.apply(params["control"], z, t, condition))

        alone = self.row("ldm_unet", self.said("U-Net"), lambda p, z, t: self.unet.apply(p["unet"], z, t),
                         (self.params, self.z, self.t), monai and partial(monai.step, self.z, self.t))  # fmt: skip
        return alone + self.row("ldm_controlnet", self.said("U-Net and ControlNet"), both, (self.params, *inputs),
                                monai and partial(monai.step, *inputs))  # fmt: skip

    def training(self) -> list[Row]:
        """Measure a training step of the ControlNet, each side on a state of its own that goes on from step to step."""
        optimizer, frozen = optax.adamw(LEARNING_RATE, weight_decay=1e-2), self.params["unet"]
        params = jax.tree.map(jnp.copy, self.params["control"])
        inputs = jax.device_put((self.z, self.t, self.condition, self.noise))

        def step(frozen: Any, params: Any, moments: Any, z: Any, t: Any, condition: Any, noise: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                found = self.unet.apply(frozen, z, t, self.control.apply(params, z, t, condition))
                return jnp.mean((found - noise) ** 2)

            value, gradient = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return optax.apply_updates(params, updates), moments, value

        state = [params, optimizer.init(params)]
        ours = compile_apart(step, frozen, *state, *inputs)
        flops = count_operations(jax.make_jaxpr(step)(frozen, *state, *inputs).jaxpr)

        def advance() -> jax.Array:
            state[0], state[1], value = ours.call(frozen, *state, *inputs)
            return value

        functions, accuracy = {"jaxmed": advance}, {}
        if self.monai:
            theirs = self.monai.make_step(self.z, self.t, self.condition, self.noise)
            losses = np.array([[float(advance()) for _ in range(2)], [float(theirs()) for _ in range(2)]])
            accuracy["difference"] = float(np.abs(losses[0] / losses[1] - 1).max())
            functions["MONAI"] = theirs
        said = self.said("a training step of the ControlNet") + ", AdamW"
        return self.rows("ldm_train", said, functions, ours.seconds, flops, accuracy)

    def chain(self) -> list[Row]:
        """Measure 50 steps of DDIM."""
        sampler = Ddim(times=CHAIN.leading_times(STEPS))

        def sample(params: Any, z: Any, condition: Any) -> jax.Array:
            told = params["control"]
            embedded = self.control.embed_condition(told, condition)

            def predict(z: jax.Array, t: jax.Array) -> jax.Array:
                residuals = self.control.control(told, z, self.control.embed(told, t), embedded)
                return self.unet.denoise(params["unet"], z, self.unet.embed(params["unet"], t), residuals)

            denoiser = make_denoiser(predict, CHAIN, "epsilon")
            keys = sample_keys(jax.random.key(0), jnp.arange(len(z)))
            return run(keys, denoiser, SamplerState(z, jnp.zeros_like(z)), sampler, CLIP)

        theirs = self.monai and partial(self.monai.sample, self.z, self.condition)
        said = self.said(f"{STEPS} steps of DDIM, U-Net and ControlNet")
        return self.row("ldm_ddim50", said, sample, (self.params, self.z, self.condition), theirs)

    def said(self, what: str) -> str:
        """Say a workload of the latent networks in words."""
        work = self.work
        return f"{what}, {'-'.join(map(str, work.widths))} channels, {work.latent}^3, batch {work.batch}, {work.dtype}"

    def row(self, name: str, said: str, function: Callable[..., Any], inputs: Any, theirs: Any) -> list[Row]:
        """Measure a function of arrays, beside MONAI's where there is one."""
        inputs = jax.device_put(inputs)
        ours = compile_apart(function, *inputs)
        flops = count_operations(jax.make_jaxpr(function)(*inputs).jaxpr)
        functions, accuracy = {"jaxmed": lambda: ours.call(*inputs)}, {}
        if theirs:
            found, expected = np.asarray(functions["jaxmed"]()), theirs()
            expected = np.moveaxis(expected.detach().float().cpu().numpy(), 1, -1)
            accuracy["difference"] = float(np.abs(found - expected).max() / np.abs(expected).max())
            functions["MONAI"] = theirs
        return self.rows(name, said, functions, ours.seconds, flops, accuracy)

    def rows(
        self, name: str, said: str, functions: dict[str, Any], compile_s: float, flops: float, accuracy: dict[str, Any]
    ) -> list[Row]:
        """Let them alternate, and return the rows."""
        seconds = alternate(functions, self.repeats)
        measured = {"jaxmed": Measurement(seconds["jaxmed"], compile_s, flops, accuracy=accuracy)}
        if "MONAI" in seconds:
            device = describe_cpu(self.conditions.cores) if jax.default_backend() == "cpu" else None
            measured["MONAI"] = Measurement(seconds["MONAI"], versions=versions("torch", "monai"), device=device)
        return make_rows(name, said, measured, self.conditions, self.peak)


# --- The peer --------------------------------------------------------------------------------


class Monai:
    """MONAI's networks with our weights."""

    def __init__(self, work: Workload, params: Any, threads: int):
        """Build them."""
        import torch
        from functorch.einops import rearrange
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
        from monai.networks.blocks import selfattention
        from monai.networks.nets.controlnet import ControlNet
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
        from monai.networks.schedulers.ddim import DDIMScheduler

        class Rearrange(torch.nn.Module):
            """What MONAI takes of einops, which nothing else here needs; PyTorch has its function."""

            def __init__(self, pattern: str, **lengths: int):
                super().__init__()
                self.pattern, self.lengths = pattern, lengths

            def forward(self, x: Any) -> Any:
                return rearrange(x, self.pattern, **self.lengths)

        selfattention.Rearrange = Rearrange  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.cast = torch.autocast(self.device, torch.bfloat16, enabled=work.dtype == "bfloat16")
        levels, groups = len(work.widths), work.groups
        attends = tuple(level > 0 for level in range(levels))
        settings = {
            "spatial_dims": 3, "in_channels": 4, "num_res_blocks": 2, "channels": work.widths, "include_fc": False,
            "attention_levels": attends, "num_head_channels": work.widths[-1], "resblock_updown": True,
            "norm_num_groups": groups, "use_flash_attention": self.device == "cuda",
        }  # fmt: skip
        coder = AutoencoderKlMaisi(
            3, 1, 1, (2,) * len(work.ae_widths), work.ae_widths, (False,) * len(work.ae_widths), 4, groups,
            num_splits=1, norm_float16=False, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
            use_convtranspose=False,
        )  # fmt: skip
        unet = DiffusionModelUNet(**settings, out_channels=4)
        control = ControlNet(**settings, conditioning_embedding_in_channels=4,
                             conditioning_embedding_num_channels=work.widths[:1])  # fmt: skip
        self.coder = self.fill(coder, work.autoencoder, params["ae"])
        self.unet = self.fill(unet, work.unet, params["unet"])
        self.control = self.fill(control, work.control, params["control"])
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=0.0015,
                                       beta_end=0.0205, clip_sample=True)  # fmt: skip
        self.scheduler.set_timesteps(STEPS)
        # Its newer versions begin at 999 and step by 20.4 on average; the released tool walks 980, 960, ..., as we do.
        self.scheduler.timesteps = torch.tensor(CHAIN.leading_times(STEPS)).long()

    def fill(self, model: Any, config: Any, params: Any) -> Any:
        """Give a model our weights."""
        import torch

        leaves = named_leaves(params)
        tensors = {entry.name: torch.tensor(to_tensor(entry, leaves[entry.path])) for entry in entries(config, "core")}
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False).to(self.device)

    def tensor(self, array: np.ndarray) -> Any:
        """Put an array onto the device, channels first."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1))).to(self.device)

    def encode(self, image: np.ndarray) -> Any:
        """Return the mean latent."""
        with self.cast:
            return self.finish(self.coder.encode(self.tensor(image))[0])

    def decode(self, latent: np.ndarray) -> Any:
        """Return the image of a latent."""
        with self.cast:
            return self.finish(self.coder.decode(self.tensor(latent)))

    def step(self, z: np.ndarray, t: np.ndarray, condition: np.ndarray | None = None) -> Any:
        """Return the noise that is found."""
        import torch

        told = None if condition is None else self.tensor(condition)
        with self.cast:
            return self.finish(self.predict(self.tensor(z), torch.from_numpy(t).to(self.device), told))

    def predict(self, z: Any, t: Any, condition: Any) -> Any:
        """Run the U-Net, and the ControlNet where there is a condition."""
        if condition is None:
            return self.unet(z, t)
        skips, middle = self.control(z, t, condition)
        return self.unet(z, t, down_block_additional_residuals=skips, mid_block_additional_residual=middle)

    def sample(self, z: np.ndarray, condition: np.ndarray) -> Any:
        """Walk the chain as the released tool does."""
        import torch

        latents, told = self.tensor(z), self.tensor(condition)
        with self.cast:
            for t in self.scheduler.timesteps:
                noise = self.predict(latents, torch.full((len(z),), float(t), device=self.device), told)
                latents, _ = self.scheduler.step(noise, int(t), latents)
            return self.finish(latents)

    def make_step(self, z: np.ndarray, t: np.ndarray, condition: np.ndarray, noise: np.ndarray) -> Callable[[], Any]:
        """Return a training step of the ControlNet."""
        import torch

        self.control.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.control.parameters(), LEARNING_RATE, weight_decay=1e-2, foreach=True)
        arrays = [self.tensor(array) for array in (z, condition, noise)]
        times = torch.from_numpy(t).to(self.device)

        def step() -> Any:
            optimizer.zero_grad()
            with self.cast:
                loss = ((self.predict(arrays[0], times, arrays[1]) - arrays[2]) ** 2).mean()
            loss.backward()
            optimizer.step()
            return self.finish(loss.detach())

        return step

    def finish(self, result: Any) -> Any:
        """Wait for the device."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return result


if __name__ == "__main__":
    main()

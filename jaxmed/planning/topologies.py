"""Machines by name, with the figures that their makers publish."""

import dataclasses
import math
import re
from typing import Literal

from jaxmed.errors import InputError, nearest

Kind = Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: In words.
        kind: What programs are compiled for.
        flops: Operations per second of dense matrix products, in bfloat16.
        float32_flops: The same of float32 arrays at JAX's default precision: a TPU rounds their products to bfloat16,
            an NVIDIA GPU to TF32.
        memory: Bytes.
        bandwidth: Bytes per second to and from memory.
        link: Bytes per second that a chip sends to its neighbours over all links together.
        per_host: Chips of one host.
        source: Where the figures are from.
    """

    name: str
    kind: Kind
    flops: float
    float32_flops: float
    memory: float
    bandwidth: float
    link: float
    per_host: int
    source: str


V5P = Chip(
    "TPU v5p", "tpu", 459e12, 459e12, 95e9, 2765e9, 600e9, 4,
    "cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 2,765 GB/s, 4,800 Gbit/s between chips",
)  # fmt: skip
V5E = Chip(
    "TPU v5e", "tpu", 197e12, 197e12, 16e9, 819e9, 200e9, 8,
    "cloud.google.com/tpu/docs/v6e: 197 TFLOP/s, 16 GB, 819 GB/s, 1,600 Gbit/s between chips",
)  # fmt: skip
V6E = Chip(
    "TPU v6e", "tpu", 918e12, 918e12, 32e9, 1640e9, 400e9, 8,
    "cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,640 GB/s, 3,200 Gbit/s between chips",
)  # fmt: skip
H100 = Chip(
    "NVIDIA H100 SXM", "gpu", 989e12, 494e12, 80e9, 3350e9, 450e9, 8,
    "NVIDIA's data sheet: 989 TFLOP/s without sparsity (TF32 494), 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways",
)  # fmt: skip
H200 = Chip(
    "NVIDIA H200 SXM", "gpu", 989e12, 494e12, 141e9, 4800e9, 450e9, 8,
    "NVIDIA's data sheet: 989 TFLOP/s without sparsity (TF32 494), 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways",
)  # fmt: skip
TPUS = {"v5p": V5P, "v5e": V5E, "v6e": V6E}
GPUS = {"h100": H100, "h200": H200}
EXAMPLES = "v5p:4x4x4, v5e:16x16, v6e:16x16, h100x8, h200x8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Several chips of one kind.

    Attributes:
        word: As it is written on the command line.
        count: Number of chips.
        chip: Of which kind; None for a CPU, whose figures are measured where the plan is made.
    """

    word: str
    count: int
    chip: Chip | None

    @property
    def kind(self) -> Kind:
        """What programs are compiled for."""
        return "cpu" if self.chip is None else self.chip.kind


def find_topology(word: str) -> Topology:
    """Return the machine that a word such as "v5p:4x4x4", "h200x8" or "cpu:8" names.

    Raises:
        InputError: It names none.
    """
    if found := re.fullmatch(r"cpu:(\d+)", word):
        return Topology(word, _positive(word, int(found[1])), None)
    if found := re.fullmatch(r"(\w+?)x(\d+)", word):
        if found[1] in GPUS:
            return Topology(word, _positive(word, int(found[2])), GPUS[found[1]])
    elif found := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", word):
        if found[1] in TPUS:
            lengths = [int(length) for length in found[2].split("x")]
            axes = 3 if found[1] == "v5p" else 2
            if len(lengths) != axes:
                raise InputError("topology", f"{axes} lengths for {found[1]}, as in {EXAMPLES}", word)
            return Topology(word, _positive(word, math.prod(lengths)), TPUS[found[1]])
    known = [*TPUS, *GPUS, "cpu"]
    raise InputError("topology", f"a machine such as {EXAMPLES}", word, nearest(re.split(r"[:x]", word)[0], known))


def _positive(word: str, count: int) -> int:
    if not 1 <= count <= 65_536:
        raise InputError("topology", "1 to 65,536 chips", word)
    return count

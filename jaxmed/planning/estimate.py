"""From what a program holds and does to memory, time and utilisation, with what is assumed on the way.

A roofline: products at a share of the chip's peak, traffic at a share of its bandwidth, whichever takes longer;
messages come on top, because whether the compiler hides them is not known beforehand.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmed.planning.topologies import Chip
from jaxmed.planning.traffic import Message, Work

PRODUCTS, TRAFFIC, LINKS = 0.6, 0.8, 0.8
"""Shares of the published rates of products, memory and links that are taken to be reached."""
USABLE = 0.92
"""Share of a chip's memory that a program may take; the rest is the runtime's."""
ASSUMPTIONS = (
    f"Products reach {PRODUCTS:.0%} of the published peak, memory and links {TRAFFIC:.0%} of theirs; products and "
    "memory traffic overlap, messages do not overlap with either.",
    "The quickest time is that of published rates with everything overlapped, the slowest that of the shares with "
    "nothing overlapped.",
    "Every operand of an instruction comes from memory each time, which caches make better; layouts add padding, which "
    "makes it worse.",
    "Messages go round rings and use all links of a chip.",
    f"A program may take {USABLE:.0%} of a chip's memory (on GPUs set XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE:g}).",
    "Input arrives in time; nothing but the step is counted.",
)
CPU_PROGRAM = (
    "GPUs: the program is XLA's for a mesh of CPU devices. It keeps some bfloat16 intermediates in float32, fuses "
    "less, and sums gradients that are split over devices by an all-reduce, which sends twice what a reduce-scatter "
    "does: temporaries, traffic and messages are upper bounds. Attention is that by blocks where a GPU calls cuDNN."
)


class Rates(NamedTuple):
    """What one chip does in a second.

    Attributes:
        flops: Operations of matrix products.
        bandwidth: Bytes to and from memory.
        link: Bytes sent.
        memory: Bytes that it has.
        is_measured: Whether these are what was reached here, of which no share is taken.
    """

    flops: float
    bandwidth: float
    link: float
    memory: float
    is_measured: bool = False


class Prediction(NamedTuple):
    """How long a step takes.

    Attributes:
        products: Seconds of matrix products.
        traffic: Seconds of memory traffic.
        messages: Seconds of exchanges, by axis of the mesh.
        seconds: Of a step.
        quickest: See `ASSUMPTIONS`.
        slowest: See `ASSUMPTIONS`.
        utilisation: Share of the peak of products that the step uses, recomputed products included.
        bound: What takes longest: "products", "traffic" or "messages".
    """

    products: float
    traffic: float
    messages: Mapping[str, float]
    seconds: float
    quickest: float
    slowest: float
    utilisation: float
    bound: str


class Memory(NamedTuple):
    """Bytes of one chip.

    Attributes:
        arguments: By part: parameters, optimiser, batch.
        temporaries: Activations and whatever else the program works in.
        outputs: Results that do not take the place of an argument.
        code: The program itself.
    """

    arguments: Mapping[str, float]
    temporaries: float
    outputs: float
    code: float = 0.0

    @property
    def total(self) -> float:
        """Bytes at most at once."""
        return sum(self.arguments.values()) + self.temporaries + self.outputs + self.code


class Input(NamedTuple):
    """What the hosts must deliver.

    Attributes:
        records: Each second, of all hosts.
        megabytes: Each second, of all hosts, as arrays.
        records_per_host: Each second.
        megabytes_per_host: Each second.
    """

    records: float
    megabytes: float
    records_per_host: float
    megabytes_per_host: float


def rates_of(chip: Chip, dtype: str) -> Rates:
    """Return the published rates of a chip for products of a type."""
    flops = chip.flops if dtype == "bfloat16" else chip.float32_flops
    return Rates(flops, chip.bandwidth, chip.link, chip.memory)


def predict(work: Work, rates: Rates) -> Prediction:
    """Predict the time of a step from the work of one chip."""
    products, traffic, links = (1.0, 1.0, 1.0) if rates.is_measured else (PRODUCTS, TRAFFIC, LINKS)
    peak = work.flops / rates.flops, work.bytes / rates.bandwidth
    computing, moving = peak[0] / products, peak[1] / traffic
    messages = {axis: sent / (rates.link * links) for axis, sent in sent_by_axis(work.messages).items()}
    exchanged = sum(messages.values())
    seconds = max(computing, moving) + exchanged
    parts = {"products": computing, "traffic": moving, "messages": exchanged}
    return Prediction(
        computing, moving, messages, seconds, max(*peak, exchanged * links), computing + moving + exchanged,
        peak[0] / seconds if seconds else 0.0, max(parts, key=lambda name: parts[name]),
    )  # fmt: skip


def sent_by_axis(messages: Sequence[Message]) -> dict[str, float]:
    """Return the bytes that a chip sends along each axis of the mesh."""
    found: dict[str, float] = {}
    for message in messages:
        if message.axis != "none":
            found[message.axis] = found.get(message.axis, 0.0) + message.sent
    return found


def needed_input(records: int, record_bytes: float, seconds: float, chips: int, per_host: int) -> Input:
    """Return what the hosts must deliver.

    Args:
        records: In a step, of all chips.
        record_bytes: Of the arrays of one record.
        seconds: Of a step.
        chips: Their number.
        per_host: Chips of one host.
    """
    rate = records / seconds if seconds else math.inf
    hosts = max(-(-chips // per_host), 1)
    megabytes = rate * record_bytes / 1e6
    return Input(rate, megabytes, rate / hosts, megabytes / hosts)


def largest_batch(first: tuple[int, float], second: tuple[int, float], capacity: float, multiple: int) -> int:
    """Return the largest batch whose memory fits, a straight line through two that were compiled; 0 for none.

    Args:
        first: Records of a batch, and bytes of a chip.
        second: The same of another batch.
        capacity: Bytes that a program may take.
        multiple: That a batch must be of.
    """
    (less, low), (more, high) = sorted((first, second))
    if more == less:
        raise ValueError(f"second: expected another batch than {less}")
    slope = (high - low) / (more - less)
    if slope <= 0:  # what grows with the batch is hidden under something else
        return more if high <= capacity else 0
    most = less + (capacity - low) / slope
    return max(int(most // multiple) * multiple, 0)

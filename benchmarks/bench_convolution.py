"""Convolutions alone: rows `conv_forward`, `conv_by_input`, `conv_by_kernel`, peer PyTorch.

Each row is one shape of the table of `nn/convolution_cpu.py`, float32: the convolution, its gradient by the input or
its gradient by the kernel, each a compiled program of its own. The peer is PyTorch's convolution, or the part of
`convolution_backward` asked for alone, in the faster of its memory formats (contiguous and channels last).
`difference` is the largest deviation of the results from each other, relative to the largest value. `fraction_of_peak`
counts the operations of the convolution itself, so Winograd's may exceed 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
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

from jaxmed.nn.convolution import Slot, conv, count_operations

ROWS: dict[Slot, str] = {"y": "conv_forward", "x": "conv_by_input", "kernel": "conv_by_kernel"}


class Workload(NamedTuple):
    """One shape.

    Attributes:
        channels: Of the input.
        features: Channels of the result.
        space: Voxels along each axis.
        batch: Images.
        window: Edge of the window.
        stride: Voxels between windows.
        groups: Groups of channels.
        gives: Passes that are measured.
    """

    channels: int
    features: int
    space: tuple[int, ...]
    batch: int = 1
    window: int = 3
    stride: int = 1
    groups: int = 1
    gives: tuple[Slot, ...] = ("y", "x", "kernel")

    def describe(self) -> str:
        """Say it in words."""
        kind = "depthwise" if self.groups == self.channels > 1 else f"{self.channels} to {self.features} channels"
        if self.groups == self.channels > 1:
            kind += f", {self.channels} channels"
        window = " x ".join([str(self.window)] * len(self.space))
        return f"{kind}, {' x '.join(map(str, self.space))}, window {window}, stride {self.stride}, batch {self.batch}"


WORKLOADS = {
    "smoke": [
        Workload(4, 8, (6, 6, 6)),
        Workload(6, 6, (8, 8), batch=2, stride=2),
        Workload(6, 6, (5, 5, 5), groups=6),
    ],
    "cpu": [
        Workload(16, 16, (64, 64, 64)),
        Workload(32, 16, (64, 64, 64)),
        Workload(32, 32, (32, 32, 32)),
        Workload(32, 32, (64, 64, 64)),
        Workload(64, 64, (32, 32, 32)),
        Workload(128, 128, (16, 16, 16)),
        Workload(256, 256, (8, 8, 8)),
        Workload(1, 16, (64, 64, 64), gives=("y", "kernel")),
        Workload(32, 64, (32, 32, 32), stride=2),
        Workload(64, 64, (64, 64), batch=4),
        Workload(64, 128, (64, 64), batch=4, stride=2),
        Workload(32, 32, (64, 64), batch=4),
        Workload(96, 96, (16, 24, 24), window=7, groups=96),
        Workload(96, 96, (56, 56), batch=4, window=7, groups=96),
    ],
    "gpu": [Workload(64, 64, (64, 64, 64), batch=4), Workload(96, 96, (56, 56), batch=32, window=7, groups=96)],
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
    """Measure the passes of one shape."""
    rng = np.random.default_rng(0)
    shape = (work.batch, *work.space, work.channels)
    window = (work.window,) * len(work.space)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*window, work.channels // work.groups, work.features)).astype(np.float32)
    convolve = partial(conv, stride=work.stride, groups=work.groups)
    y = rng.normal(size=jax.eval_shape(convolve, x, kernel).shape).astype(np.float32)
    programs: dict[Slot, tuple[Callable[..., Any], tuple[np.ndarray, np.ndarray]]] = {
        "y": (convolve, (x, kernel)),
        "x": (lambda kernel, y: jax.linear_transpose(lambda x: convolve(x, kernel), x)(y)[0], (kernel, y)),
        "kernel": (lambda x, y: jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(y)[0], (x, y)),
    }
    peers = TorchConvolution(work, x, kernel, y, len(conditions.cores)) if with_peer else None
    rows = []
    for gives in work.gives:
        function, given = programs[gives]
        ours = compile_apart(function, *given)
        arrays = jax.device_put(given)
        functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(ours.call, *arrays)}
        if peers:
            functions |= {form: partial(peers.run, gives, form) for form in peers.forms}
        seconds = alternate(functions, repeats)
        result = np.asarray(ours.call(*arrays))
        flops = count_operations(gives, *(array.shape for array in given), result.shape)
        accuracy, measured = {}, {}
        if peers:
            best = min(peers.forms, key=lambda form: float(np.median(seconds[form])))
            theirs = peers.result(gives, best)
            accuracy["difference"] = float(np.abs(result - theirs).max() / np.abs(theirs).max())
            device = describe_cpu(conditions.cores) if jax.default_backend() == "cpu" else None
            measured["PyTorch"] = Measurement(seconds[best], versions=versions("torch"), device=device)
        ours_measured = Measurement(seconds["jaxmed"], ours.seconds, flops, accuracy=accuracy)
        rows += make_rows(ROWS[gives], work.describe(), {"jaxmed": ours_measured, **measured}, conditions, peak)
    return rows


class TorchConvolution:
    """One shape in PyTorch.

    Attributes:
        forms: Memory formats.
    """

    def __init__(self, work: Workload, x: np.ndarray, kernel: np.ndarray, y: np.ndarray, threads: int):
        """Take the arrays over, channels first, in each format."""
        import torch

        torch.set_num_threads(threads)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        self.forms = {"contiguous": torch.contiguous_format, "channels last": last}
        space = len(work.space)
        turned = np.transpose(kernel, (space + 1, space, *range(space)))
        first = {"x": np.moveaxis(x, -1, 1), "kernel": turned, "y": np.moveaxis(y, -1, 1)}
        self.arrays = {
            form: {
                slot: torch.from_numpy(np.ascontiguousarray(array)).to(self.device).to(memory_format=layout)
                for slot, array in first.items()
            }
            for form, layout in self.forms.items()
        }
        edges = [work.window // 2] * space
        self.options = ([work.stride] * space, edges, [1] * space, False, [0] * space, work.groups)

    def run(self, gives: Slot, form: str) -> Any:
        """Compute one pass, and wait for it."""
        import torch

        arrays = self.arrays[form]
        with torch.no_grad():
            if gives == "y":
                found = torch.ops.aten.convolution(arrays["x"], arrays["kernel"], None, *self.options)
            else:
                wanted = [gives == "x", gives == "kernel", False]
                backward = torch.ops.aten.convolution_backward
                given = (arrays["y"], arrays["x"], arrays["kernel"], None)
                found = backward(*given, *self.options, wanted)[0 if gives == "x" else 1]
        if self.device == "cuda":
            torch.cuda.synchronize()
        return found

    def result(self, gives: Slot, form: str) -> np.ndarray:
        """Return one pass in our order of axes."""
        found = self.run(gives, form).cpu().contiguous().numpy()
        if gives == "kernel":
            return np.transpose(found, (*range(2, found.ndim), 1, 0))
        return np.moveaxis(found, 1, -1)


if __name__ == "__main__":
    main()

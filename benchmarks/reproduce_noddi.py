"""Test every sentence of arXiv:2507.12632's abstract that can be tested on simulated scans.

Two networks that differ in their labels alone are trained for the two-shell protocol: NN_MLE on maximum-likelihood
fits, NN_GT on the parameters that made the signals. They are compared with the conventional (maximum-likelihood) fit
on a simulated scan and on a grid of known parameters, exported, run by ONNX Runtime alone on a whole brain and written
as DICOM. What counts as "holds" was fixed before the first run:

- more consistent: smaller mean absolute difference from the fit in tissue, for at least two of the three parameters;
- comparable: mean absolute bias at most 0.02 above the fit's, for each parameter;
- more robust: smaller standard deviation at fixed truth, for at least two of the three parameters;
- compromised: larger mean absolute bias than the fit's, for at least two of the three parameters;

each with its 95 % interval on that side of the line (bootstrap over grid points; over voxels for the scan). The table
goes to benchmarks/results/reproduce_noddi.md, and the figures to reproduce_noddi.json beside it.

    python benchmarks/reproduce_noddi.py --size cpu
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxmed.files import write_json, write_text
from jaxmed.io import onnx
from jaxmed.io.dicom import read_series, read_stack
from jaxmed.io.maps import Quantity
from jaxmed.io.parametric_map import new_stack, on_stack, write_dicom_map, write_mr_images
from jaxmed.metrics.recovery import DEFINED, make_grid, score
from jaxmed.metrics.statistics import Interval, bootstrap, mean_interval, weighted_mean
from jaxmed.models.mlp import MlpConfig
from jaxmed.models.published.signal_network import Network, export_onnx
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ForwardConfig
from jaxmed.physics.monte_carlo import estimate
from jaxmed.recipes.diffusion_scan import make_maps, read_signals
from jaxmed.synthesis.phantoms.write import WHITE_MATTER, DiffusionFiles, write_diffusion_slab
from jaxmed.systems import noddi
from jaxmed.systems.noddi.network import predict, predict_exactly
from jaxmed.systems.noddi.stages.evaluate import fit_estimator, network_estimator
from jaxmed.systems.noddi.training import TrainConfig
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ndi", "odi", "fwf")
MARGIN = 0.02
FORWARD = ForwardConfig()
Verdict = Literal["holds", "does not hold", "cannot be tested here", "holds in part"]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        train: Settings that both networks share; labels differ.
        points: Values of each parameter on the grid.
        repeats: Noise repetitions of each point.
        snr: Noise levels.
        scan: Voxels of the scan on which networks and fit are compared.
        brain: Voxels of the scan that is timed.
    """

    train: TrainConfig
    points: int
    repeats: int
    snr: tuple[float, ...]
    scan: tuple[int, int, int]
    brain: tuple[int, int, int]


SIZES = {
    "smoke": Size(
        TrainConfig(
            network=MlpConfig(width=48), signals=8192, held_out=1024, epochs=10, batch_size=128, restarts=1
        ),
        4, 10, (20.0,), (24, 28, 1), (24, 28, 4),
    ),
    "cpu": Size(
        TrainConfig(
            network=MlpConfig(width=256), signals=400_000, held_out=10_000, epochs=50, batch_size=1024, restarts=1
        ),
        6, 60, (10.0, 15.0, 20.0, 30.0, 50.0), (84, 98, 4), (84, 98, 51),
    ),
    "gpu": Size(TrainConfig(), 10, 500, (10.0, 15.0, 20.0, 30.0, 50.0), (84, 98, 16), (84, 98, 51)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """The command line.

    Attributes:
        size: Seconds, minutes on a few cores, or the full grid on an accelerator.
        out: Folder of the table.
    """

    size: Literal["smoke", "cpu", "gpu"] = "smoke"
    out: Path = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """One line of the table."""

    sentence: str
    verdict: Verdict
    ours: str
    published: str


def main() -> None:
    """Train, compare, deploy, write the table."""
    config = tyro.cli(Config, description=__doc__)
    size = SIZES[config.size]
    began = time.monotonic()
    load = os.getloadavg()[0]
    bvals, bvecs = two_shell_protocol()
    networks = {
        f"NN_{labels.upper()}": noddi.train(
            jax.random.key(0), bvals, bvecs, dataclasses.replace(size.train, labels=labels)
        ).network
        for labels in ("mle", "gt")
    }
    print(f"trained after {time.monotonic() - began:.0f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, figures = deploy(networks["NN_MLE"], size, folder)
        print(f"deployed after {time.monotonic() - began:.0f} s", file=sys.stderr)
        more, found = consistency(networks, size, folder)
        rows += more
        figures |= found
    more, found = accuracy(networks, size)
    rows += more + untestable()
    figures |= found | {"size": config.size, "load": load, "device": jax.devices()[0].device_kind}
    figures |= {
        "versions": software_versions(),
        "settings": dataclasses.asdict(size),
        "seconds": time.monotonic() - began,
    }
    write_json(config.out / "reproduce_noddi.json", figures)
    text = render(rows, config.size, load)
    write_text(config.out / "reproduce_noddi.md", text)
    print(text)


# --- Deployment ------------------------------------------------------------------------------


def deploy(network: Network, size: Size, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Export, run by ONNX Runtime alone on a brain, write DICOM and read it back."""
    files = write_diffusion_slab(folder / "brain", 1, size.brain, 30.0)
    path = folder / "network.onnx"
    export_onnx(path, network)
    scan, signals = read_signals(files.dwi, files.bvals, files.bvecs, files.mask, network.description.table)
    by_onnx = onnx.load(path).run(signals)
    difference = float(np.abs(by_onnx - predict_exactly(network, signals)).max())
    seconds = run_script(path, files, folder / "maps")
    worst = write_and_read(network, by_onnx, scan, folder / "dicom")
    voxels = len(signals)
    rows = [
        Row(
            "The ICE pipeline was customised to deploy trained NNs with ONNX Runtime.",
            "holds in part" if difference < 1e-6 else "does not hold",
            f"the vendor's ICE is not here; ONNX Runtime alone computes the network within {difference:.1e} of jax in "
            f"double precision on {voxels:,} voxels",
            "integrated and deployed natively in ICE",
        ),
        Row(
            "Inline, whole-brain NODDI parameter estimation in <10 seconds.",
            "holds" if seconds < 10 else "does not hold",
            f"{seconds:.1f} s for {voxels:,} voxels x {len(scan.dwi.array[0, 0, 0])} images on {os.cpu_count()} cores: "
            "a process of its own with onnxruntime, from NIfTI to NIfTI, start, reading and writing included (one run)",
            "<10 s",
        ),
        Row(
            "DICOM parametric maps were exported from the scanner for further analysis.",
            "holds" if worst[0] == 0 and worst[1] < 1e-3 else "does not hold",
            f"Parametric Map files read back exactly ({worst[0]:.0e}), voxel centres within {worst[1]:.0e} mm",
            "exported",
        ),
    ]
    return rows, {"onnx_difference": difference, "brain_seconds": seconds, "brain_voxels": voxels}


def run_script(network: Path, files: DiffusionFiles, out: Path) -> float:
    """Return the seconds of scripts/noddi_onnx.py on a scan, process start included."""
    script = ROOT / "scripts" / "noddi_onnx.py"
    words = [sys.executable, script, network, files.dwi, files.bvals, files.bvecs, out, "--mask", files.mask]
    began = time.monotonic()
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def write_and_read(network: Network, values: np.ndarray, scan: Any, folder: Path) -> tuple[float, float]:
    """Return the largest difference of values, and of voxel centres in mm, between NIfTI and DICOM."""
    outputs = network.description.outputs
    maps = make_maps(values, scan, outputs)
    x, y, z = scan.mask.shape
    b0 = Volume.make(scan.dwi.array[..., 0], scan.dwi.affine)
    quantity = Quantity("b = 0", "simulated unweighted signal")
    write_mr_images(folder / "source", b0, new_stack((x, y, z), b0.affine, "simulated"), quantity, stored_per_unit=1)
    stack = read_stack(folder / "source")
    for output in outputs:
        write_dicom_map(folder, maps[output.name], stack, output, "parametric-map")
    errors, distances = [], []
    for name, volume in maps.items():
        found = read_series(folder / f"{name}.dcm")
        expected = on_stack(volume, stack)
        errors.append(float(np.abs(found.array.transpose(2, 1, 0) - expected).max()))
        corners = np.array([[0, 0, 0, 1], [x - 1, y - 1, z - 1, 1]]).T
        distances.append(float(np.abs((found.affine - stack.affine) @ corners).max()))
    return max(errors), max(distances)


# --- Against the conventional fit ------------------------------------------------------------


def consistency(networks: dict[str, Network], size: Size, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Compare networks and fit on a simulated scan, in tissue."""
    snr = 30.0
    files = write_diffusion_slab(folder / "scan", 2, size.scan, snr)
    table = networks["NN_MLE"].description.table
    _, signals = read_signals(files.dwi, files.bvals, files.bvecs, files.mask, table)
    maps = noddi.fit(signals, np.array(table.bvals), np.array(table.bvecs), sigma=WHITE_MATTER / snr)
    conventional = np.stack([np.asarray(getattr(maps, name)) for name in NAMES], axis=1)
    tissue = conventional[:, 2] < 0.5
    away = {
        name: np.abs(predict(network, signals) - conventional)[tissue].astype(np.float64)
        for name, network in networks.items()
    }
    parts, gains = [], {}
    for column, name in enumerate(NAMES):
        means = {label: mean_interval(values[:, column]) for label, values in away.items()}
        gains[name] = mean_interval(away["NN_GT"][:, column] - away["NN_MLE"][:, column])
        parts.append(f"{name.upper()} {show(means['NN_MLE'])} against {show(means['NN_GT'])}")
    wins = sum(gain.low > 0 for gain in gains.values())
    row = Row(
        "NN_MLE estimates were generally more consistent than NN_GT with conventional estimates.",
        judge(wins >= 2, wins == 1),
        f"mean absolute difference from the fit in {int(tissue.sum()):,} tissue voxels of a simulated scan, "
        f"SNR {snr:g}, NN_MLE against NN_GT: " + "; ".join(parts),
        "generally more consistent (in vivo; no number in the abstract)",
    )
    return [row], {"consistency": {name: gain._asdict() for name, gain in gains.items()}}


# --- Offline evaluation ----------------------------------------------------------------------


class Summary(NamedTuple):
    """Of one estimator, per point of the grid, averaged over noise levels.

    Attributes:
        bias: Size of the mean error.
        sd: Standard deviation over repetitions.
    """

    bias: np.ndarray
    sd: np.ndarray


def accuracy(networks: dict[str, Network], size: Size) -> tuple[list[Row], dict[str, Any]]:
    """Score fit and networks on the grid, on the same noise."""
    table = networks["NN_MLE"].description.table
    model = FORWARD.build(np.array(table.bvals))
    grid = make_grid([parameter.draw for parameter in model.parameters], size.points)
    weight = np.asarray(model.relevance(jnp.asarray(grid, jnp.float32)))
    estimators = {"MLE": fit_estimator(FORWARD, table)}
    estimators |= {name: network_estimator(network, table) for name, network in networks.items()}
    scores: dict[str, list[Any]] = {name: [] for name in estimators}
    for number, snr in enumerate(size.snr):
        found = estimate(jax.random.key(100 + number), model, table, estimators, grid, size.repeats, snr)
        for name, one in found.items():
            scores[name].append(score(one, grid))
    summaries = {
        name: Summary(np.mean([np.abs(one.bias) for one in parts], axis=0), np.mean([one.sd for one in parts], axis=0))
        for name, parts in scores.items()
    }
    gaps = {
        f"{measure} {first} - {second} {name}": resample(
            getattr(summaries[first], measure)[:, column] - getattr(summaries[second], measure)[:, column],
            weight[:, column],
        )
        for measure in ("bias", "sd")
        for first, second in (("NN_MLE", "MLE"), ("NN_GT", "MLE"), ("NN_GT", "NN_MLE"))
        for column, name in enumerate(NAMES)
    }

    def told(measure: str) -> str:
        return "; ".join(
            f"{name.upper()} "
            + ", ".join(
                f"{label} {show(resample(getattr(one, measure)[:, column], weight[:, column]))}"
                for label, one in summaries.items()
            )
            for column, name in enumerate(NAMES)
        )

    def count(measure: str, first: str, second: str, sign: int) -> int:
        pairs = [gaps[f"{measure} {first} - {second} {name}"] for name in NAMES]
        return sum((gap.low > 0) if sign > 0 else (gap.high < 0) for gap in pairs)

    close = sum(gaps[f"bias NN_MLE - MLE {name}"].high <= MARGIN for name in NAMES)
    steadier, worse = count("sd", "NN_MLE", "MLE", -1), count("bias", "NN_GT", "MLE", 1)
    steadiest = min(count("sd", "NN_GT", "MLE", -1), count("sd", "NN_GT", "NN_MLE", -1))
    where = f"{len(grid)} points x {size.repeats} repetitions x SNR {', '.join(f'{snr:g}' for snr in size.snr)}"
    published = "no number in the abstract"
    rows = [
        Row("NN_MLE has comparable accuracy ...", judge(close == 3, close > 0),
            f"mean absolute bias, {where}: {told('bias')}", published),
        Row("... and slightly better noise robustness than conventional fitting,", judge(steadier >= 2, steadier == 1),
            f"mean standard deviation, same voxels: {told('sd')}", published),
        Row("whereas NN_GT exhibits compromised accuracy ...", judge(worse >= 2, worse == 1),
            f"mean absolute bias of NN_GT less the fit's: {differences(gaps, 'bias', 'NN_GT', 'MLE')}", published),
        Row("... at the benefit of higher noise robustness.", judge(steadiest >= 2, steadiest == 1),
            f"mean standard deviation of NN_GT less the fit's: {differences(gaps, 'sd', 'NN_GT', 'MLE')}; "
            f"less NN_MLE's: {differences(gaps, 'sd', 'NN_GT', 'NN_MLE')}", published),
    ]  # fmt: skip
    figures = {name: gap._asdict() for name, gap in gaps.items()}
    return rows, {"differences": figures}


def resample(values: np.ndarray, weight: np.ndarray) -> Interval:
    """Return the mean over the points where a parameter is defined, with its bootstrap interval."""
    inside = values[weight >= DEFINED]
    return bootstrap(weighted_mean(inside), np.arange(len(inside)), seed=0)


def differences(gaps: dict[str, Interval], measure: str, first: str, second: str) -> str:
    """Write three differences with their intervals."""
    return ", ".join(f"{name.upper()} {show(gaps[f'{measure} {first} - {second} {name}'])}" for name in NAMES)


# --- Table -----------------------------------------------------------------------------------


def untestable() -> list[Row]:
    """Return the sentences that need what is not here."""
    return [
        Row(
            "Clinical translation of qMRI is hindered by resource-intensive, offline estimation.",
            "cannot be tested here", "a statement about practice", "-",
        ),
        Row(
            "Two fully-connected NNs were trained offline on NODDI signals with either kind of label.",
            "holds", "by construction: the two networks here differ in their labels alone", "done",
        ),
        Row(
            "The strategy was demonstrated online with an in vivo acquisition.",
            "cannot be tested here", "needs a scanner and a volunteer; a simulated scan stands in above", "done",
        ),
        Row(
            "The framework is generalisable and enables integration into clinical workflows.",
            "holds in part",
            "a second model (ball and stick) takes the same train, evaluate and export; workflows need a clinic", "-",
        ),
    ]  # fmt: skip


def judge(wholly: bool, partly: bool) -> Verdict:
    """Turn counts into words."""
    return "holds" if wholly else "holds in part" if partly else "does not hold"


def show(interval: Interval) -> str:
    """Write a figure with its 95 % interval."""
    return f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def render(rows: list[Row], size: str, load: float) -> str:
    """Write the table as Markdown."""
    head = (__doc__ or "").partition("\n\n    python")[0]
    lines = [
        "# arXiv:2507.12632, sentence by sentence", "",
        f"Written by `python benchmarks/reproduce_noddi.py --size {size}` with jaxmed "
        f"{software_versions().get('jaxmed', 'unknown')} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"load {load:.1f} at the start; do not edit.", "",
        head, "",
        "| sentence | verdict | our figure, 95 % interval | published figure |",
        "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {row.sentence} | {row.verdict} | {row.ours} | {row.published} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

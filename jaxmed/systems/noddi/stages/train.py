"""Stage `jaxmed noddi train`: train a network for one protocol on simulated signals."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import Seed, checked
from jaxmed.io.gradients import write_gradients
from jaxmed.io.maps import Quantity
from jaxmed.io.numpy_files import write_npz
from jaxmed.models.mlp import MlpConfig
from jaxmed.models.published.signal_network import Network, network_record
from jaxmed.physics.acquisition import Shell, find_shells, two_shell_protocol
from jaxmed.physics.microstructure import simulate
from jaxmed.recipes.diffusion_scan import read_table
from jaxmed.recipes.restarts import State, Step, run_epochs_in_folder
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.figures import curves
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.recovery import validation_section
from jaxmed.systems.noddi.network import predict
from jaxmed.systems.noddi.training import TINY, TrainConfig, Trained, train
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import export_parameters
from jaxmed.train.log import Log, read_metrics
from jaxmed.train.run_folder import RunFolder

VALIDATION_VOXELS = 5000
VALIDATION_SNR = 30.0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Train a network for one protocol.

    Attributes:
        bvals: FSL text file of b-values in s/mm^2; scans may have its images in another order.
        bvecs: FSL text file of unit gradient directions, 3 x N or N x 3.
        synthetic: Take a two-shell protocol (9 + 30 + 60 images) where no files are given.
        allow_single_shell: Train NODDI although only one shell is weighted. Its maps are not NODDI.
        train: Labels, network, length.
        seed: Seed of the signals, the network and their order.
    """

    bvals: Path | None = None
    bvecs: Path | None = None
    synthetic: bool = False
    allow_single_shell: bool = False
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: Seed = 0


def paper() -> Config:
    """A million signals, maximum-likelihood labels, four restarts: for your protocol, on an accelerator."""
    return Config()


def laptop() -> Config:
    """150,000 signals of your protocol, or of one of two shells, in minutes on a few cores."""
    settings = TrainConfig(
        network=MlpConfig(width=128),
        signals=150_000,
        held_out=10_000,
        epochs=40,
        batch_size=1024,
        restarts=2,
        snr=(10.0, 50.0),
    )
    return Config(synthetic=True, train=settings)


def smoke() -> Config:
    """A tiny network for your protocol, or one of two shells, in seconds."""
    return Config(synthetic=True, train=dataclasses.replace(TINY, restarts=2))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What training found.

    Attributes:
        protocol: Hash of the table.
        parameters: Numbers that were trained.
        best: Which restart, from 0.
        held_out_loss: Loss of the best restart.
        notes: What was repaired in the table.
    """

    protocol: str
    images: int
    shells: tuple[Shell, ...]
    outputs: tuple[Quantity, ...]
    parameters: int
    labels: str
    best: int
    held_out_loss: float
    notes: tuple[str, ...]


def run(config: Config, folder: RunFolder) -> None:
    """Read the protocol, train, export the network, write the report."""
    clock, (bvals, bvecs), notes = Clock(), two_shell_protocol(), ()
    if not (config.synthetic and config.bvals is None and config.bvecs is None):
        needs_two_shells = config.train.forward.kind == "noddi" and not config.allow_single_shell
        threshold = config.train.b0_threshold
        bvals, bvecs, notes = read_table(config.bvals, config.bvecs, threshold, needs_two_shells=needs_two_shells)
    log = begin(folder, notes)
    model = folder.outputs / "model"
    write_gradients(model / "protocol.bval", model / "protocol.bvec", bvals, bvecs)
    announce(
        log, f"Training {config.train.restarts} networks on {config.train.signals:,} signals of {len(bvals)} images",
        count=config.train.epochs, unit="epochs", smaller=folder.smaller,
    )  # fmt: skip
    train_key, validation_key = jax.random.split(jax.random.key(config.seed))
    trained = train_in_folder(train_key, bvals, bvecs, config.train, folder, log)
    clock.lap("simulate, label and train, compilation included")
    export_parameters(model, trained.network.params, network_record(trained.network.description))
    write_validation(folder.outputs / "validation.npz", validation_key, trained.network)
    description, loss = trained.network.description, float(trained.losses[-1, 1, trained.best])
    log.say(f"Restart {trained.best + 1} was best, with a held-out loss of {loss:.5f}.")
    summary = Summary(
        protocol=description.table.hash,
        images=len(bvals),
        shells=tuple(find_shells(bvals, config.train.b0_threshold)),
        outputs=description.outputs,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(trained.network.params)),
        labels=description.labels,
        best=trained.best,
        held_out_loss=loss,
        notes=notes,
    )
    finish(folder, config, summary, clock, page)


def train_in_folder(
    key: jax.Array, bvals: np.ndarray, bvecs: np.ndarray, config: TrainConfig, folder: RunFolder, log: Log
) -> Trained:
    """Train, saving to and continuing from RUN/checkpoints, with a line of metrics per epoch."""
    with contextlib.ExitStack() as labelling:

        def loop(state: State, step: Step) -> State:
            labelling.close()  # a terminal has room for one bar
            return run_epochs_in_folder(state, step, folder, log)

        on_block = labelling.enter_context(log.progress("Simulating and labelling", config.signals, "signals"))
        return train(key, bvals, bvecs, config, allow_single_shell=True, loop=loop, on_block=on_block)


def write_validation(path: Path, key: jax.Array, network: Network) -> None:
    """Apply a network to fresh signals at one noise level, and keep truth and estimate for the report."""
    table = network.description.table
    model = network.description.forward.build(np.array(table.bvals))
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    voxels = simulate(key, model, VALIDATION_VOXELS, bvals, bvecs, (VALIDATION_SNR, VALIDATION_SNR))
    estimate = predict(network, voxels.signals)
    weight = model.relevance(voxels.parameters)
    write_npz(path, {"truth": voxels.parameters, "estimate": estimate, "weight": weight})


def page(run: Finished[Config, Summary]) -> Page:
    """Show the learning curves, the network against the truth, and its protocol."""
    summary, settings = run.summary, run.config.train
    lines = read_metrics(run.path)
    shells = [(round(shell.bval), len(shell.rows)) for shell in summary.shells]
    protocol = [
        Table(("b (s/mm^2)", "Images"), shells, "Shells of the gradient table that the network belongs to."),
        Text([f"Protocol hash: {summary.protocol}"]),
    ]
    reading = Text(
        [
            "The network serves scans of this protocol in this order alone; its table travels with it. Apply "
            "it with jaxmed noddi predict --weights RUN, compare it with fits by jaxmed noddi evaluate "
            "--weights RUN, and take it to a scanner with jaxmed noddi export --weights RUN.",
            "Labels that are fits of the noisy signals give estimates with little bias and the spread of a "
            "fit; true parameters as labels give less spread and shrink every estimate to the middle.",
            "After arXiv:2507.12632. For research only, not for diagnosis.",
        ]
    )
    return Page(
        "A network for one protocol",
        f"{summary.parameters:,} parameters, trained on {settings.signals:,} simulated signals of "
        f"{summary.images} images with labels '{summary.labels}'",
        [
            ("Epochs", len(lines), f"restart {summary.best + 1} was best"),
            ("Held-out loss", float(f"{summary.held_out_loss:.3g}"), "mean squared error, share of each range"),
            ("Labels", summary.labels.split()[0].upper(), "what the network learned"),
            ("Protocol", summary.protocol[:8], "start of its hash; other tables are refused"),
        ],
        [
            _curves_section(summary, lines),
            validation_section(run.outputs / "validation.npz", summary.outputs, VALIDATION_SNR),
            Section("Protocol", protocol),
            Section("How to read this", [reading]),
        ],
    )


def _curves_section(summary: Summary, lines: list[dict[str, float]]) -> Section:
    steps = np.array([line["step"] for line in lines])
    shown = {
        label: (steps, np.array([line[name] for line in lines]))
        for label, name in (("training", "loss"), ("held out", "held_out_loss"))
    }
    what = "the reproduced signals" if summary.labels == "self" else "the labels, each as a share of its range"
    caption = f"Mean squared error of {what}, of the restart that was best in each epoch. Labels from fits hold the "
    caption += "fits' own spread, which no network can predict wholly: the curve does not reach 0."
    losses = np.concatenate([values for _, values in shown.values()])
    # Within a decade a logarithmic axis has no room for numbers.
    log = bool(losses.max() > 10 * losses.min())
    figure = curves(shown, xlabel="epoch", ylabel="loss", log=log, caption=caption)
    return Section("Training", [*(Note(text) for text in summary.notes), figure])

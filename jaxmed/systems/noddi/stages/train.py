"""Stage `jaxmed noddi train`: train a network for one protocol on simulated signals."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxmed.config import Seed, checked
from jaxmed.io.gradients import write_gradients
from jaxmed.io.numpy_files import write_npz
from jaxmed.models.mlp import MlpConfig
from jaxmed.physics.acquisition import find_shells, two_shell_protocol
from jaxmed.physics.microstructure import simulate
from jaxmed.systems.noddi.network import Network, predict, save
from jaxmed.systems.noddi.reading import read_table
from jaxmed.systems.noddi.train_page import write_page
from jaxmed.systems.noddi.training import State, TrainConfig, Trained, train
from jaxmed.train.announce import announce
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder, start, write_summary

SECONDS_BETWEEN_SAVES = 20.0
VALIDATION_VOXELS = 5000
VALIDATION_SNR = 30.0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Train a network for one protocol.

    Attributes:
        bvals: FSL text file of b-values in s/mm^2; scans may have its images in another order.
        bvecs: FSL text file of unit gradient directions, 3 x N or N x 3.
        embedded: Take a two-shell protocol (9 + 30 + 60 images) where no files are given.
        allow_single_shell: Train NODDI although only one shell is weighted. Its maps are not NODDI.
        train: Labels, network, length.
        seed: Of signals, network and order.
    """

    bvals: Path | None = None
    bvecs: Path | None = None
    embedded: bool = False
    allow_single_shell: bool = False
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: Seed = 0


def paper() -> Config:
    """A million signals, maximum-likelihood labels, four restarts: for your protocol, on an accelerator."""
    return Config()


def laptop() -> Config:
    """150,000 signals of your protocol, or of one of two shells, in minutes on a few cores."""
    network = MlpConfig(width=128)
    settings = TrainConfig(
        network=network, signals=150_000, held_out=10_000, epochs=40, batch_size=1024, restarts=2, snr=(10.0, 50.0)
    )
    return Config(embedded=True, train=settings)


def smoke() -> Config:
    """A tiny network for your protocol, or one of two shells, in seconds."""
    network = MlpConfig(width=48)
    settings = TrainConfig(network=network, signals=8192, held_out=2048, epochs=20, batch_size=128, restarts=2)
    return Config(embedded=True, train=settings)


def run(config: Config, folder: RunFolder) -> None:
    """Read the protocol, train, export the network, write the report."""
    began = time.monotonic()
    if config.embedded and config.bvals is None and config.bvecs is None:
        bvals, bvecs = two_shell_protocol()
        notes: list[str] = []
    else:
        needs_two_shells = config.train.forward.kind == "noddi" and not config.allow_single_shell
        table = read_table(config.bvals, config.bvecs, config.train.b0_threshold, needs_two_shells=needs_two_shells)
        bvals, bvecs, notes = table.bvals, table.bvecs, list(table.notes)
    start(folder)
    write_gradients(
        folder.outputs / "model" / "protocol.bval", folder.outputs / "model" / "protocol.bvec", bvals, bvecs
    )
    log = Log(folder.path, folder.options.quiet)
    for note in notes:
        log.say(f"Note: {note}")
    announce(
        log, f"Training {config.train.restarts} networks on {config.train.signals:,} signals of {len(bvals)} images",
        count=config.train.epochs, unit="epochs", smaller=folder.smaller,
    )  # fmt: skip
    train_key, validation_key = jax.random.split(jax.random.key(config.seed))
    trained = train_in_folder(train_key, bvals, bvecs, config.train, folder, log)
    seconds = time.monotonic() - began
    save(folder.outputs / "model", trained.network)
    write_validation(folder.outputs / "validation.npz", validation_key, trained.network)
    description = trained.network.description
    log.say(f"Restart {trained.best + 1} was best, with a held-out loss of {trained.losses[-1, 1, trained.best]:.5f}.")
    summary = {
        "protocol": description.table.hash,
        "images": len(bvals),
        "shells": [{"bval": s.bval, "images": len(s.rows)} for s in find_shells(bvals, config.train.b0_threshold)],
        "outputs": [dataclasses.asdict(output) for output in description.outputs],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.network.params)),
        "labels": description.labels,
        "best": trained.best,
        "held_out_loss": float(trained.losses[-1, 1, trained.best]),
        "validation_snr": VALIDATION_SNR,
        "notes": notes,
        "device": jax.devices()[0].device_kind,
        "command": f"jaxmed noddi train --config {shlex.quote(str(folder.path / 'config.json'))} --out RUN",
        "seconds": {"simulate, label and train, compilation included": seconds},
    }
    write_summary(folder, summary)
    write_page(folder.path)


report = write_page


def train_in_folder(
    key: jax.Array, bvals: np.ndarray, bvecs: np.ndarray, config: TrainConfig, folder: RunFolder, log: Log
) -> Trained:
    """Train, saving to and continuing from RUN/checkpoints, with a line of metrics per epoch."""
    last_save = time.monotonic()
    update_epochs: Callable[..., None] | None = None
    with (
        contextlib.ExitStack() as bars,
        Checkpoints(folder.checkpoints / "state", {"run": folder.record}) as checkpoints,
    ):

        def restore(state: State) -> State:
            nonlocal update_epochs
            labelling.close()  # a terminal has room for one bar
            found = checkpoints.restore(state)
            log.rewind(0 if found is None else found.step)
            if found is not None:
                log.say(f"Continuing after epoch {found.step} of an interrupted run.")
            update_epochs = bars.enter_context(
                log.progress("Training", config.epochs, "epochs", 0 if found is None else found.step)
            )
            return state if found is None else found.state

        def on_epoch(state: State) -> None:
            nonlocal last_save
            epoch = int(state.epoch)
            losses = np.asarray(state.losses[epoch - 1])
            best = int(losses[1].argmin())
            log.metrics(epoch, {"loss": float(losses[0, best]), "held_out_loss": float(losses[1, best])})
            assert update_epochs is not None  # restore is called first
            update_epochs(epoch, f"held-out loss {losses[1, best]:.5f}")
            if epoch == config.epochs or time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                checkpoints.save(epoch, state)
                last_save = time.monotonic()

        labelling = bars.enter_context(contextlib.ExitStack())
        on_block = labelling.enter_context(log.progress("Simulating and labelling", config.signals, "signals"))
        return train(
            key, bvals, bvecs, config, allow_single_shell=True, restore=restore, on_epoch=on_epoch, on_block=on_block
        )


def write_validation(path: Path, key: jax.Array, network: Network) -> None:
    """Apply a network to fresh signals at one noise level, and keep truth and estimate for the report."""
    table = network.description.table
    model = network.description.forward.build(np.array(table.bvals))
    bvals, bvecs = np.array(table.bvals), np.array(table.bvecs)
    voxels = simulate(key, model, VALIDATION_VOXELS, bvals, bvecs, (VALIDATION_SNR, VALIDATION_SNR))
    estimate = predict(network, voxels.signals)
    weight = model.relevance(voxels.parameters)
    write_npz(path, {"truth": voxels.parameters, "estimate": estimate, "weight": weight})

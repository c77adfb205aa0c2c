"""What the training stages share: tables of pairs and of latents, and the loss of the ControlNet.

Source: CoCoLIT, arXiv:2508.01292, its abstract and official code.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from jaxmed.arrays.types import Params, Scalar
from jaxmed.config import Number, Share, checked
from jaxmed.data.cohort import groups_of, hold_out, stated_splits
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import FileSource, SubsetSource
from jaxmed.diffusion.schedule import expand_like
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import read_member
from jaxmed.io.tables import Table, read_table, resolve_paths
from jaxmed.models.autoencoder_kl import AutoencoderKlConfig, autoencoder
from jaxmed.models.published import cocolit
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.unet_latent import Control, LatentDenoiser
from jaxmed.objectives.autoencoding import time_weight, weighted_absolute_error
from jaxmed.recipes.fitted_probes import identity
from jaxmed.recipes.stage import begin, first_only, nested_run
from jaxmed.recipes.training import TrainData
from jaxmed.report.figures import curves
from jaxmed.report.page import Figure
from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort
from jaxmed.systems.cocolit.networks import KINDS
from jaxmed.systems.cocolit.translation import CHAIN, crop_latent
from jaxmed.train.log import series
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder, start

SOURCE = "Method: CoCoLIT, arXiv:2508.01292. For research only, not for diagnosis."
COLUMNS = {"mri": "scan_path", "suvr": "suvr_path"}
LATENT_COLUMNS = {"mri": "scan_latent_path", "suvr": "suvr_latent_path"}
WORDS = {"valid": "validation"}
"""Splits that the released table names otherwise."""
BEST = LoopConfig(best="loss", best_is="smallest")
Modality = Literal["mri", "suvr"]
Latent = Float32[np.ndarray, "i j k channel"]


@dataclasses.dataclass(frozen=True)
@checked
class PairData:
    """Which pairs of MRI and PET are trained on.

    Attributes:
        manifest: CSV with the columns scan_path (T1-weighted MRI) and suvr_path (map of SUVR on the same grid), and
            optionally subject and split (train, valid or validation, test); what `encode` writes has the columns
            scan_latent_path and suvr_latent_path besides.
        synthetic: Draw this many phantom pairs where no table is given.
        linked: Whether uptake of phantoms follows the atrophy that their MRI shows; else nothing predicts it.
        validation: Share of the subjects to hold out where the table has no column split.
    """

    manifest: Path | None = None
    synthetic: Number = 0
    linked: bool = True
    validation: Share = 0.1


def find_pairs(data: PairData, folder: RunFolder, seed: int, needed: Sequence[str]) -> Table:
    """Read the table of pairs, or write phantoms and theirs; splits are filled in, and named as everywhere here.

    Args:
        data: Which.
        folder: Of the run; phantoms go to its inputs.
        seed: Of phantoms and of who is held out.
        needed: Columns of files that must be there.

    Raises:
        InputError: There is no table, or something is wrong with it.
    """
    manifest = data.manifest
    if manifest is None:
        if not data.synthetic:
            advice = "give --data.manifest CSV, or try --preset smoke"
            raise InputError("data.manifest", f"a table with {' and '.join(needed)}", "nothing", advice)
        place = folder.path / "inputs" / "pairs"
        first_only(lambda: (start(folder), write_pairs(place, data, seed)), "pairs")
        manifest = place / "pairs.csv"
    table = read_table(manifest, needed, ("subject", "split"))
    for column in needed:
        resolve_paths(table, column)
    if "split" in table.columns:
        rows = tuple({**row, "split": WORDS.get(row["split"], row["split"])} for row in table.rows)
        table = dataclasses.replace(table, rows=rows)
        stated_splits(table, column=needed[0])
        return table
    splits = hold_out(groups_of(table, needed[0]), data.validation, seed)
    rows = tuple({**row, "split": split} for row, split in zip(table.rows, splits, strict=True))
    return dataclasses.replace(table, columns=(*table.columns, "split"), rows=rows)


def find_latents(data: PairData, folder: RunFolder, seed: int) -> PairData:
    """Return the data as it is, or that of phantoms, which are encoded first."""
    if data.manifest is not None or not data.synthetic:
        return data
    changes = {"data.synthetic": data.synthetic, "data.linked": data.linked, "seed": seed}
    why = "No latents are given: phantoms are encoded."
    nested = nested_run(folder, "cocolit encode", changes, begin(folder), why)
    return dataclasses.replace(data, manifest=nested.outputs / "latents.csv")


def write_pairs(place: Path, data: PairData, seed: int) -> Path:
    """Write phantom pairs."""
    return write_amyloid_cohort(place, seed, data.synthetic, linked=data.linked)


def make_data(table: Table, readers: Mapping[str, tuple[str, Callable[[Path], Any]]]) -> TrainData:
    """Return the records of a table: to train on, and held out.

    Args:
        table: With a column split.
        readers: By field, the column of its files and how one is read.

    Raises:
        InputError: Nothing is to be trained on, or the first record cannot be read.
    """
    files = {field: tuple(resolve_paths(table, column)) for field, (column, _) in readers.items()}
    source = FileSource(files, readers={field: read for field, (_, read) in readers.items()})
    splits = np.array(table.column("split"))
    training, held_out = (np.flatnonzero(splits == split) for split in ("train", "validation"))
    if not len(training):
        raise InputError(table.path, "records of split train", "none", "check the column split")
    source[int(training[0])]
    return TrainData(
        SubsetSource(source, training), SubsetSource(source, held_out) if len(held_out) else None, identity
    )


def make_preprocess(
    modality: Modality, size: tuple[int, ...], spacing: float, mean: float | None = None, std: float | None = None
) -> Preprocess:
    """Return how files become an autoencoder's input: padded about the middle, and only then scaled.

    Args:
        modality: Of which the released mean and deviation are taken where none is given.
        size: Voxels.
        spacing: In mm.
        mean: Of intensities, the padding included.
        std: Their deviation.
    """
    released = cocolit.MRI if modality == "mri" else cocolit.SUVR
    mean = released.intensity.mean[0] if mean is None else mean
    std = released.intensity.std[0] if std is None else std
    intensity = dataclasses.replace(released.intensity, mean=(mean,), std=(std,))
    return dataclasses.replace(
        released, size=size, spacing=(spacing,), intensity=intensity, interpolation="linear-first"
    )


def read_network(name: str, path: Path | None) -> Published:
    """Read a network of this system: a run, or weights.

    Args:
        name: mri, pet, unet or controlnet.
        path: Where it is.

    Raises:
        InputError: Nothing is given, or it is another network.
    """
    kind, title = KINDS[name]
    if path is None:
        raise InputError(f"weights.{name}", title, "nothing", f"give --weights.{name}, or try --preset smoke")
    found = load_published(path)
    if found.report.family != cocolit.NAME or found.report.kind != kind:
        other = f"a {found.report.kind} of {found.report.family}"
        raise InputError(path, title, other, f"check --weights.{name}")
    if name == "pet" and found.preprocess.intensity == cocolit.MRI.intensity:
        # The released files say nothing of their input: two of one kind are told apart by what they are given for.
        return dataclasses.replace(
            found, preprocess=dataclasses.replace(found.preprocess, intensity=cocolit.SUVR.intensity)
        )
    return found


def read_latent(multiple: int) -> Callable[[Path], Latent]:
    """Return the function from a file of `encode` to a latent, zeros added on both sides up to a multiple."""
    return partial(_read_latent, multiple=multiple)


def _read_latent(path: Path, multiple: int) -> Latent:
    advice = "make it with jaxmed cocolit encode"
    try:
        array = read_member(path, "data")
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path, "a latent: a .npz file with the array 'data'", str(error), advice) from error
    if array.ndim != 4 or not np.isfinite(array).all():
        found = f"shape {array.shape}" if array.ndim != 4 else "NaN or Inf"
        raise InputError(path, "finite numbers of shape [channel, i, j, k]", found, advice)
    latent = np.moveaxis(array, 0, -1).astype(np.float32)
    extra = [-length % multiple for length in latent.shape[:3]]
    return np.pad(latent, [*((one // 2, one - one // 2) for one in extra), (0, 0)])


# The loss of the ControlNet -----------------------------------------------------------------------------------------

ImageLoss = Literal["wisl", "isl", "none"]


class ControlParts(NamedTuple):
    """The networks of the third stage.

    Attributes:
        unet: Held as it is.
        control: Trained.
        pet: Sizes of the autoencoder whose decoder is trained too.
    """

    unet: LatentDenoiser
    control: Control
    pet: AutoencoderKlConfig


def control_loss(
    parts: ControlParts,
    kind: ImageLoss,
    params: Params,
    keys: Key[Array, " batch"],
    batch: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the squared error of the noise that is expected given the MRI, plus that of the image which follows.

    The image is the decoded latent that is expected at the drawn time, which is not clipped. Late times, where the
    error of the noise is multiplied by up to a hundred, count little in "wisl" and as all others in "isl".

    Args:
        parts: The networks.
        kind: "wisl" (weights fall with time), "isl" (all 1), or "none" (noise alone; the decoder stays).
        params: "unet" (constant), "controlnet" and "decoder", the last with what decoding reads.
        keys: One for each pair, for its time and its noise.
        batch: "mri" and "suvr", padded latents [batch, i, j, k, channel]; for images "image" [batch, x, y, z, 1].

    Source: CoCoLIT, arXiv:2508.01292, official code.
    """
    latent, condition = batch["suvr"], batch["mri"]
    time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    t = CHAIN.draw_times(time_keys)
    noise = jax.vmap(lambda key, one: jax.random.normal(key, one.shape))(noise_keys, latent)
    alpha, sigma = expand_like(CHAIN.alpha(t), latent), expand_like(CHAIN.sigma(t), latent)
    noisy = alpha * latent + sigma * noise
    held = jax.lax.stop_gradient(params["unet"])
    residuals = parts.control.apply(params["controlnet"], noisy, t, condition)
    found = parts.unet.apply(held, noisy, t, residuals)
    error = jnp.mean(jnp.square(found - noise))
    if kind == "none":
        return error, {"noise_error": error}
    weight = time_weight(t, CHAIN.num_steps) if kind == "wisl" else jnp.ones_like(t)
    value = image_loss(parts.pet, params["decoder"], (noisy - sigma * found) / alpha, batch["image"], weight)
    return error + value, {"noise_error": error, "image_error": value}


def image_loss(
    pet: AutoencoderKlConfig,
    decoder: Params,
    latent: Float[Array, "batch i j k channel"],
    image: Float[Array, "batch x y z 1"],
    weight: Float[Array, " batch"],
) -> Scalar:
    """Return the weighted mean absolute error of decoded latents, whose padding is cut off.

    Args:
        pet: Sizes of the autoencoder.
        decoder: Its parameters "from_latent" and "decoder".
        latent: Padded.
        image: In the autoencoder's unit.
        weight: Of each pair.
    """
    inner = tuple(length // pet.divisor for length in image.shape[1:4])
    cut = jax.vmap(partial(crop_latent, shape=inner))(latent)
    return weighted_absolute_error(autoencoder(pet).decode(decoder, cut), image, weight)


def decoder_of(params: Params) -> Params:
    """Return the part of an autoencoder's parameters that decoding reads."""
    return {name: params[name] for name in ("from_latent", "decoder")}


# The page -----------------------------------------------------------------------------------------------------------


def loss_figure(lines: list[dict[str, float]], names: Mapping[str, str], caption: str) -> Figure:
    """Draw series of metrics.jsonl over steps, by label; those that are not there are left out."""
    found = {label: series(lines, name) for label, name in names.items()}
    shown = {label: line for label, line in found.items() if len(line[0])}
    return curves(shown, xlabel="step", ylabel="loss", log=True, caption=caption)

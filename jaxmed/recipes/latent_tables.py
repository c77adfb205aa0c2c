"""Latents of paired images as files: encode every pair once, and train on what is kept.

`encode_pairs` takes the files of a table through an autoencoder for each column and writes outputs/NAME/ROW.npz, key
"data", channels first, as MONAI's scripts do; `write_latents` adds their places to the table, and `read_latent` reads
one back for a network that halves its input.

Source: the table and files of CoCoLIT (arXiv:2508.01292) and BrLP, official code.
"""

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxmed.errors import InputError
from jaxmed.io.numpy_files import read_member, write_npz
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import Table, write_table
from jaxmed.models.autoencoder_kl import autoencoder
from jaxmed.models.published.load import Published
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, map_images
from jaxmed.report import page as report
from jaxmed.train.announce import announce
from jaxmed.train.log import Log

Latent: TypeAlias = Float32[np.ndarray, "i j k channel"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A pair that is encoded; outputs/NAME.json.

    Attributes:
        name: Of its files.
        path: The first of its images.
        notes: What is unexpected about it.
        mean: Mean of the latent, by image.
        std: Its standard deviation.
        beyond: Share of its entries beyond -1 and 1.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    mean: dict[str, float]
    std: dict[str, float]
    beyond: dict[str, float]


def encode_pairs(
    networks: Mapping[str, Published],
    files: Mapping[str, Sequence[Path]],
    outputs: Path,
    log: Log,
    dtype: Literal["float32", "bfloat16"] = "float32",
    smaller: str = "",
) -> tuple[tuple[Encoded, ...], int]:
    """Encode the images of every pair, those of the same number belonging together.

    Args:
        networks: The autoencoder of each image, by its name.
        files: The images, by the same names.
        outputs: Folder of results.
        log: Gets what fails.
        dtype: Type of the networks' products.
        smaller: What fits a smaller machine, for the announcement.

    Returns:
        The pairs that are done, and how many failed.
    """
    first = next(iter(networks))
    others = [name for name in networks if name != first]
    inputs = [
        Inputs(f"{row:05d}", ScanFiles(path), {name: files[name][row] for name in others})
        for row, path in enumerate(files[first])
    ]
    encoders = {name: make_encoder(network, dtype) for name, network in networks.items()}
    image = jax.ShapeDtypeStruct((*networks[first].preprocess.volume_size, 1), jnp.float32)
    announce(
        log, "Encoding", params=[one.params for one in networks.values()], batch=image,
        count=len(networks) * len(inputs), unit="images", smaller=smaller,
    )  # fmt: skip

    def work(number: int, one: Inputs, tell: Tell) -> Encoded:
        numbers: dict[str, dict[str, float]] = {"mean": {}, "std": {}, "beyond": {}}
        for name, encode in encoders.items():
            tell(f"{one.name}: {name}")
            latent = encode(files[name][number])
            write_npz(outputs / name / f"{one.name}.npz", {"data": latent})
            for what, value in moments_of(latent).items():
                numbers[what][name] = value
        return Encoded(one.name, str(one.path), (), **numbers)

    last = list(networks)[-1]
    return map_images(inputs, work, Encoded, outputs, log, "Encoding", lambda row: {"std": row.std[last]})


def make_encoder(network: Published, dtype: Any) -> Callable[[Path], np.ndarray]:
    """Return the function from a file to its latent, [channel, i, j, k]: the mean, without noise; compiled once."""
    model = autoencoder(dataclasses.replace(network.config, dtype=dtype, remat=False))
    encode = jax.jit(lambda params, image: model.encode(params, image[None])[0][0])

    def read(path: Path) -> np.ndarray:
        latent = np.asarray(encode(network.params, network.preprocess(path)), np.float32)
        if not np.isfinite(latent).all():
            raise InputError(path, "a finite latent", "NaN or Inf", "check the weights, or --dtype")
        return np.moveaxis(latent, -1, 0)

    return read


def moments_of(latent: Float32[np.ndarray, "..."]) -> dict[str, float]:
    """Return mean and standard deviation of a latent's entries, and the share of them beyond -1 and 1."""
    found = {"mean": latent.mean(), "std": latent.std(), "beyond": np.mean(np.abs(latent) > 1)}
    return {name: float(value) for name, value in found.items()}


def pooled_moments(done: Sequence[Encoded], name: str) -> dict[str, float]:
    """Return mean, deviation and share beyond -1 and 1 of all latents of one image together."""
    mean = np.array([row.mean[name] for row in done])
    square = np.array([row.std[name] for row in done]) ** 2 + mean**2
    beyond = float(np.mean([row.beyond[name] for row in done]))
    return {"mean": float(mean.mean()), "std": math.sqrt(square.mean() - mean.mean() ** 2), "beyond": beyond}


def moments_table(latents: Mapping[str, Mapping[str, float]]) -> report.Table:
    """Return `pooled_moments` of each image for a page."""
    rows = [(name, *numbers.values()) for name, numbers in latents.items()]
    return report.Table(("of", "mean", "deviation", "beyond -1 and 1"), rows, "All latents together.")


def write_latents(
    path: Path,
    table: Table,
    files: Mapping[str, Sequence[Path]],
    columns: Mapping[str, str],
    latent_columns: Mapping[str, str],
    done: Sequence[Encoded],
) -> None:
    """Write the table of pairs with the places of their latents, relative to it.

    Args:
        path: The new table, in the folder that `encode_pairs` wrote to.
        table: The pairs.
        files: Their images, by name.
        columns: Columns of the images, by name.
        latent_columns: Columns that their latents get.
        done: The pairs that are encoded; others are left out.

    Raises:
        InputError: None is.
    """
    kept, rows = {one.name for one in done}, []
    for number, row in enumerate(table.rows):
        name = f"{number:05d}"
        if name in kept:
            own = {column: str(files[image][number].absolute()) for image, column in columns.items()}
            latents = {column: f"{image}/{name}.npz" for image, column in latent_columns.items()}
            rows.append({**row, **own, **latents})
    if not rows:
        raise InputError(table.path, "pairs that can be encoded", "none", "outputs/failed.csv has the reasons")
    write_table(path, tuple(rows[0]), rows)


def read_latent(multiple: int) -> Callable[[Path], Latent]:
    """Return the function from a file of `encode_pairs` to a latent, zeros added on both sides up to a multiple."""
    return partial(_read_latent, multiple=multiple)


def _read_latent(path: Path, multiple: int) -> Latent:
    advice = "make it with the stage encode"
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

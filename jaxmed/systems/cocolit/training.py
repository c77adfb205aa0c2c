"""What the stages that read pairs share: their tables, phantoms, and how files become the networks' input.

Source: CoCoLIT, arXiv:2508.01292, its abstract and official code.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxmed.config import Number, Share, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.io.tables import Table
from jaxmed.models.published import cocolit
from jaxmed.recipes.pair_tables import read_pairs
from jaxmed.recipes.stage import begin, first_only, nested_run
from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort
from jaxmed.train.loop import LoopConfig
from jaxmed.train.run_folder import RunFolder, start

SOURCE = "Method: CoCoLIT, arXiv:2508.01292. For research only, not for diagnosis."
COLUMNS = {"mri": "scan_path", "suvr": "suvr_path"}
LATENT_COLUMNS = {"mri": "scan_latent_path", "suvr": "suvr_latent_path"}
WORDS = {"valid": "validation"}
"""Splits that the released table names otherwise."""
BEST = LoopConfig(best="loss", best_is="smallest")
Modality = Literal["mri", "suvr"]


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
    return read_pairs(manifest, needed, data.validation, seed, WORDS)


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

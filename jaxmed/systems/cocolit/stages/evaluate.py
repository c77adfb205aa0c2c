"""CoCoLIT evaluate: synthesised maps against measured ones; what the MRI does, and what averaging latents costs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Number, Positive, Seed, Size, checked
from jaxmed.data.cohort import subjects_of
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.io.scans import ScanFiles
from jaxmed.io.tables import resolve_paths
from jaxmed.recipes.latent_tables import moments_of
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, map_images
from jaxmed.recipes.paired_maps import (
    MEASURED,
    Measured,
    compare_averages,
    pairs_page,
    read_region,
    region_means,
    rms,
    score_pair,
    score_pairs,
)
from jaxmed.recipes.paired_maps import PairSummary as Summary
from jaxmed.recipes.pix2pix import Pix2PixConfig, fit_files, translate_image
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import MapStyle
from jaxmed.synthesis.phantoms.write_amyloid import REGION
from jaxmed.systems.cocolit.networks import TINY_SAMPLES, TINY_SAMPLING, WeightsConfig, read_models
from jaxmed.systems.cocolit.training import COLUMNS, SOURCE, PairData, find_pairs
from jaxmed.systems.cocolit.translation import POSITIVE, Models, SamplingConfig, predict_bias, translate
from jaxmed.train.announce import announce
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume, require_same_grid

TRIES_FAILED_AGAIN = True
OURS, OTHER, BASELINE = "CoCoLIT", "CoCoLIT, MRI of another", "pix2pix"
MAPS = {
    "mri": ("MRI", MapStyle("WhiteStripe", colormap="gray")),
    "pet": ("PET", MapStyle("SUVR", colormap="inferno")),
    "suvr": ("Synthesised", MapStyle("SUVR", colormap="inferno")),
    "spread": ("Spread", MapStyle("SUVR", colormap="viridis")),
    "difference": ("Difference", MapStyle("SUVR", colormap="RdBu_r")),
}


@dataclasses.dataclass(frozen=True)
@checked
class RegionPlaces:
    """Masks of regions, in the space of the scans.

    Attributes:
        cortical: The cortical composite, whose mean decides on positivity.
        hippocampal: The hippocampi.
    """

    cortical: Path | None = None
    hippocampal: Path | None = None


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Scores of synthesised maps, on the networks' grid and in SUVR.

    Attributes:
        data: The pairs, as for training.
        split: Which of them.
        weights: The networks.
        regions: Masks of regions.
        samples: Latents that are averaged.
        sampling: How they are drawn; --no-spread leaves the bias of averaging out.
        threshold: SUVR of the cortical composite above which amyloid counts as positive.
        limits: SUVR that become 0 and 1 for SSIM, PSNR and MSE; each PET's own least and largest where none are given.
        exchange: Translate each MRI's neighbour in its place too: how far the MRI steers.
        directions: Over which the decoder's curvature is averaged, for the bias that theory has; 0 leaves it out.
        baseline: pix2pix, trained on the pairs of split train; --baseline.steps 0 leaves it out.
        dtype: Type of the networks' products.
        seed: Seed of samples, resamples and phantoms.
    """

    data: PairData = PairData()
    split: Literal["train", "validation", "test"] = "test"
    weights: WeightsConfig = WeightsConfig()
    regions: RegionPlaces = RegionPlaces()
    samples: Size = 64
    sampling: Annotated[SamplingConfig, NO_PREFIX] = SamplingConfig()
    threshold: Positive = POSITIVE
    limits: tuple[float, float] | None = None
    exchange: bool = True
    directions: Number = 8
    baseline: Pix2PixConfig = Pix2PixConfig(steps=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0


def paper() -> Config:
    """64 samples of 50 steps: an accelerator."""
    return Config()


def laptop() -> Config:
    """8 samples of 25 steps and a small pix2pix, on networks of the presets laptop."""
    return Config(samples=8, sampling=SamplingConfig(steps=25), baseline=Pix2PixConfig(steps=1000))


def smoke() -> Config:
    """Your pairs and networks, or phantoms through all stages before this one; a few samples of few steps."""
    return Config(
        PairData(synthetic=8), "validation", samples=TINY_SAMPLES, sampling=TINY_SAMPLING, directions=2,
        baseline=Pix2PixConfig(
            steps=10, model=dataclasses.replace(Pix2PixConfig().model, width=8, multipliers=(1, 2)),
            discriminator=dataclasses.replace(Pix2PixConfig().discriminator, width=4, layers=1),
        ),
    )  # fmt: skip


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, translate and measure every pair, score them together. Returns 1 when pairs failed."""
    clock, asked = Clock(), config
    config = synthetic_inputs(config, folder)
    table = find_pairs(config.data, folder, config.seed, tuple(COLUMNS.values()))
    rows = [row for row, split in enumerate(table.column("split")) if split == config.split]
    if not rows:
        raise InputError(table.path, f"pairs of split {config.split}", "none", "set --split, or the column split")
    models = jax.device_put(read_models(config.weights, config.dtype))
    sizes = [one.preprocess.volume_size for one in (models.mri, models.pet)]
    if sizes[0] != sizes[1]:
        raise InputError("weights.pet", f"maps of {sizes[0]} voxels, as weights.mri takes", f"{sizes[1]}")
    masks = {name: place for name, place in dataclasses.asdict(config.regions).items() if place is not None}
    regions = {name: read_region(Path(place)) for name, place in masks.items()}
    files = {name: resolve_paths(table, column) for name, column in COLUMNS.items()}
    log = begin(folder, () if regions else ("No masks of regions are given: nothing is said of positivity.",))
    readers = (models.mri.preprocess, models.pet.preprocess)
    trained = [row for row, split in enumerate(table.column("split")) if split == "train"]
    baseline = fit_files(config.baseline, config.seed + 1, [
        (read, [files[name][row] for row in trained]) for read, name in zip(readers, COLUMNS, strict=True)
    ])  # fmt: skip
    image = jax.ShapeDtypeStruct(sizes[0], jnp.float32)
    count = len(rows) * (1 + config.exchange)
    announce(
        log, f"Translating, {config.samples} samples each", params=[one.params for one in models], batch=image,
        count=count, unit="scans", smaller=folder.smaller,
    )  # fmt: skip
    clock.lap("read, and train the baseline")
    subjects = subjects_of(table, COLUMNS["mri"])
    inputs = [Inputs(f"{row:05d}", ScanFiles(files["mri"][row]), {"suvr": files["suvr"][row]}) for row in rows]
    others = [files["mri"][row] for row in (*rows[1:], rows[0])] if config.exchange and len(rows) > 1 else None

    def work(number: int, one: Inputs, tell: Tell) -> Measured:
        tell(f"{one.name}: drawing {config.samples} samples")
        other = None if others is None else others[number]
        return measure(config, models, regions, baseline, one, other, subjects[rows[number]], folder.outputs)

    done, failed = map_images(
        inputs, work, Measured, folder.outputs, log, "Translating", lambda row: {"ssim": row.images[OURS]["ssim"]}
    )
    clock.lap("translate and measure, compilation included")
    scores, notes = score_pairs(done, config.threshold, config.seed) if done else ((), ())
    finish(folder, asked, Summary(done, failed, scores, notes), clock, page)
    return 1 if failed else 0


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Return the configuration with everything that is missing made of phantoms, by the stages before this one."""
    if config.data.manifest is not None or not config.data.synthetic:
        return config
    if config.weights.is_given:
        raise InputError("data.manifest", "the pairs to translate", "nothing", "give it, or leave --weights out")
    changes = {"data.synthetic": config.data.synthetic, "data.linked": config.data.linked, "train.seed": config.seed}
    why = "No networks are given: tiny ones are trained on phantoms, through all stages."
    nested = nested_run(folder, "cocolit train-controlnet", changes, begin(folder), why)
    encoded = nested.path / "inputs" / "encode"
    data = dataclasses.replace(config.data, manifest=encoded / "outputs" / "latents.csv")
    regions = RegionPlaces(encoded / "inputs" / "pairs" / REGION)
    weights = WeightsConfig(nested.outputs / "models")
    return dataclasses.replace(config, data=data, weights=weights, regions=regions)


def measure(
    config: Config, models: Models, regions: Mapping[str, Volume], baseline: Any, one: Inputs, other: Path | None,
    subject: str, outputs: Path,
) -> Measured:  # fmt: skip
    """Translate the MRI of a pair, write the maps, and measure them against the PET.

    Raises:
        InputError: A file cannot be read, or MRI and PET are on different grids.
    """
    place, key = one.beside["suvr"], jax.random.key(config.seed)
    assert place is not None
    scan_grid = nifti.read(one.path).grid
    require_same_grid(nifti.read(place).grid, scan_grid, str(place), str(one.path))
    (mean,), (std,) = models.pet.preprocess.intensity.mean, models.pet.preprocess.intensity.std
    mri, truth = models.mri.preprocess(one.path)[..., 0], std * models.pet.preprocess(place)[..., 0] + mean
    found = jax.device_get(translate(key, models, mri, config.samples, config.sampling))
    images = {OURS: np.asarray(found.suvr)}
    if other is not None:
        exchanged = models.mri.preprocess(other)[..., 0]
        images[OTHER] = np.asarray(translate(key, models, exchanged, config.samples, config.sampling).suvr)
    if baseline is not None:
        made = translate_image(config.baseline, baseline, jnp.asarray(mri)[None, ..., None])
        images[BASELINE] = std * np.asarray(made)[0, ..., 0] + mean
    further = {f"latent {name}": value for name, value in moments_of(found.latent).items()}
    further["latents at the limit"] = float(found.at_limit)
    if other is not None:
        further["change by the MRI of another, rms"] = rms(images[OURS] - images[OTHER])
    if found.mean_map is not None and config.samples > 1:
        theory = None
        if config.directions:
            theory_key = jax.random.key(config.seed + 2)
            theory = np.asarray(predict_bias(theory_key, models, found, config.samples, config.directions))
        further |= compare_averages(images[OURS], np.asarray(found.mean_map), theory)
    grid = models.mri.preprocess.input_grid(scan_grid)
    (centre,), (width,) = models.mri.preprocess.intensity.mean, models.mri.preprocess.intensity.std
    shown = {"mri": width * mri + centre, "pet": truth, "suvr": images[OURS], "difference": images[OURS] - truth}
    shown |= {} if found.spread is None or config.samples == 1 else {"spread": np.asarray(found.spread)}
    for name, array in shown.items():
        definition, style = MAPS[name]
        volume = Volume.make(np.asarray(array, np.float32), grid.affine)
        write_map(outputs, f"{one.name}_{name}", volume, definition, style.unit, {"path": str(one.path)})
    scores = {method: score_pair(truth, image, config.limits) for method, image in images.items()}
    return Measured(
        one.name, str(one.path), (), subject, scores, region_means(regions, grid, images | {MEASURED: truth}), further
    )


READING = (
    "SSIM (3D, Gaussian window of 11 voxels), PSNR and MSE are of the whole volume on the networks' grid, after each "
    "pair was scaled so that the limits in the configuration (the PET's own least and largest value where there are "
    "none) became 0 and 1; nothing is clipped. The paper's scaling and masking are not known: its figures may differ "
    "by that alone.",
    "Positivity is that of the mean of the cortical composite, in measured and in synthesised maps. Correlations of "
    "regional means are what the paper calls CABC (cortical) and HABC (hippocampal), as far as that can be told.",
    "With the MRI of another subject, and the same noise, scores fall as far as the MRI steers the map. Averaging "
    "latents before decoding differs from averaging maps by a bias that vanishes where the decoder is linear; theory "
    "has it to second order, covariances between entries of the latent left out.",
    "Intervals are of 95 %, bootstrapped over subjects.",
    SOURCE,
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show the scores, the pairs, and what was found of samples and averages."""
    caption = f"Means and agreement over pairs; positive above {run.config.threshold:g} SUVR."
    return pairs_page(run, "CoCoLIT against PET", OURS, caption, MAPS, READING)

"""CoCoLIT translate: a map of amyloid PET from every T1-weighted MRI, and where its samples disagree."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmed.arrays.grid import reorient
from jaxmed.config import Seed, Size, checked, to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import find_records
from jaxmed.errors import InputError
from jaxmed.files import write_json
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.io.tables import resolve_path, write_table
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, list_inputs, map_images
from jaxmed.recipes.scan_job import ScanData
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.report.volumes import show_volumes
from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort
from jaxmed.systems.cocolit.networks import (
    TINY_SAMPLES,
    TINY_SAMPLING,
    WeightsConfig,
    planned_models,
    read_models,
    write_tiny_models,
)
from jaxmed.systems.cocolit.preparation import (
    MNI152,
    Prepared,
    fit_preprocess,
    network_input,
    on_scan_grid,
    prepare,
    read_prepared,
    read_raw,
    require_brain,
)
from jaxmed.systems.cocolit.translation import POSITIVE, Models, SamplingConfig, Translation, translate
from jaxmed.train.announce import announce
from jaxmed.train.mesh import MeshConfig, abstract, make_mesh
from jaxmed.train.run_folder import RunFolder
from jaxmed.train.workload import Workload
from jaxmed.volume import Grid, Volume

TRIES_FAILED_AGAIN = True
MAPS = {
    "mri": ("the MRI as the networks see it: on the template's grid, by WhiteStripe", "1"),
    "suvr": ("synthesised SUVR: the decoded mean of the latents", "SUVR"),
    "spread": ("standard deviation of the decoded samples", "SUVR"),
    "mean_map": ("mean of the decoded samples", "SUVR"),
    "mask": ("the brain, on the template's grid", "1"),
}
RELEASED = {"--i": "--input", "--o": "--copy", "--m": "--samples", "--ddim-n": "--steps", "--ddim_n": "--steps"}
"""Options of the released tool, and ours."""
AT_LIMIT = 0.01
"""Share of latent entries at the ends of the clipping from which a scan says it."""


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Maps of SUVR from MRI.

    Attributes:
        data: Scans listed in a table; a column mask names the mask of each.
        input: A scan, or a folder of scans: T1-weighted, in MNI152 space at 1 mm, skull-stripped, by WhiteStripe.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: The networks.
        samples: Latents that are averaged: 64 in the paper; the released tool draws 1 unless it is told.
        sampling: How they are drawn.
        preprocess: Take any T1-weighted MRI: cut out the brain, align it with the template, scale it by WhiteStripe.
        mask: With --preprocess: mask of the brain, or a folder of masks by the same file names; none for scans without
            a skull.
        template: The MNI152 brain, T1-weighted: what --preprocess aligns with. Its grid is what inputs must have; that
            of MNI152 at 1 mm where none is given.
        copy: File (.nii, .nii.gz) that gets a copy of the map of a single scan; the run folder is then beside it unless
            --out says otherwise.
        mesh: The devices; mesh.data shares the samples of a chunk.
        dtype: Type of the networks' products.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the samples, the same for every scan, and of what is synthetic.
    """

    data: ScanData = ScanData()
    input: Path | None = None
    series: str = ""
    weights: WeightsConfig = WeightsConfig()
    samples: Size = 64
    sampling: Annotated[SamplingConfig, NO_PREFIX] = SamplingConfig()
    preprocess: bool = False
    mask: Path | None = None
    template: Path | None = None
    copy: Path | None = None
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    fill: float | None = None
    seed: Seed = 0


def paper() -> Config:
    """64 samples of 50 steps, as in the paper: an accelerator, or days of a CPU for each scan."""
    return Config()


def laptop() -> Config:
    """One sample of 10 steps: with the released networks about ten minutes on a few cores."""
    return Config(samples=1, sampling=SamplingConfig(steps=10, chunk=1, spread=False))


def smoke() -> Config:
    """Two phantom brains and tiny random networks, in seconds; the maps mean nothing."""
    return Config(data=ScanData(synthetic=2), samples=TINY_SAMPLES, sampling=TINY_SAMPLING)


@dataclasses.dataclass(frozen=True)
class Scan:
    """What became of a scan; outputs/NAME.json.

    Attributes:
        name: Name of its results.
        path: The scan.
        notes: What is unexpected about it.
        shape: Voxels of the map.
        mean_suvr: Within the brain.
        share_positive: Share of the brain above the threshold of positivity.
        mean_spread: Mean of the spread within the brain; None where samples were not decoded.
        bias: Root mean square within the brain of map minus mean of the decoded samples, in SUVR; None likewise.
        at_limit: Share of latent entries at or beyond -1 and 1.
        correlation: With the template, where the scan was aligned with it.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    shape: tuple[int, ...]
    mean_suvr: float
    share_positive: float
    mean_spread: float | None
    bias: float | None
    at_limit: float
    correlation: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scans, how many failed, samples, and what a user should know."""

    scans: tuple[Scan, ...]
    failed: int
    samples: int
    notes: tuple[str, ...]


class Plan(NamedTuple):
    """What stays the same from scan to scan.

    Attributes:
        read: From the files of a scan to its MRI in the template's space.
        preprocess: From there to the networks' input.
        run: From that to the map, compiled once.
        constants: For sidecars.
        config: Of the stage.
        outputs: Folder of results.
    """

    read: Callable[[Inputs], Prepared]
    preprocess: Preprocess
    run: Callable[[np.ndarray], Translation]
    constants: dict[str, Any]
    config: Config
    outputs: Path


def released_words(words: Sequence[str]) -> list[str]:
    """Give options of the released tool our names; with --o alone the run folder is beside that file."""
    pairs = [word.partition("=") for word in words]
    words = [RELEASED.get(name, name) + equals + value for name, equals, value in pairs]
    has_out = any(word == "--out" or word.startswith("--out=") for word in words)
    copies = [
        word.partition("=")[2] if word.startswith("--copy=") else (words[number + 1 : number + 2] or [""])[0]
        for number, word in enumerate(words)
        if word == "--copy" or word.startswith("--copy=")
    ]
    if has_out or not copies or not copies[0]:
        return words
    place = Path(copies[0])
    return [*words, "--out", str(place.with_name(place.name.removesuffix(".gz").removesuffix(".nii") + "_run"))]


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, translate every scan, write maps, table and page. Returns 1 when scans failed."""
    clock, asked = Clock(), config
    if config.data.synthetic and (not _has_scans(config) or not config.weights.is_given):
        config = synthetic_inputs(config, folder)
    if not _has_scans(config):
        raise InputError("input", "scans", "nothing", "give --input or --data.manifest, or try --preset smoke")
    inputs, passed = list_scans(config)
    template = read_template(config)
    grid = MNI152 if template is None else template.grid
    if len(inputs) == 1:  # a mistake, not a failure among many
        one = inputs[0]
        read_raw(one.scan, one.beside["mask"]) if config.preprocess else read_prepared(one.scan, grid)
    models = read_models(config.weights, config.dtype)
    plan = make_plan(config, models, template, grid, folder.outputs)
    notes = (*make_notes(config, models), *passed)
    log = begin(folder, notes)
    image = jax.ShapeDtypeStruct(plan.preprocess.volume_size, jnp.float32)
    announce(
        log, f"Translating, {config.samples} samples each", params=[one.params for one in models], batch=image,
        count=len(inputs), unit="scans", program=jax.make_jaxpr(plan.run)(image), devices=config.mesh.data,
        smaller=folder.smaller,
    )  # fmt: skip
    clock.lap("read and check")
    scans, failed = map_images(
        inputs, lambda number, one, tell: process_scan(plan, one, tell), Scan, folder.outputs, log, "Translating",
        lambda row: {"mean_suvr": row.mean_suvr, "share_positive": row.share_positive},
    )  # fmt: skip
    clock.lap("translate, compilation included")
    rows = [to_record(scan) | {"notes": "; ".join(scan.notes)} for scan in scans]
    if rows:
        write_table(folder.outputs / "scans.csv", tuple(rows[0]), rows)
    log.say(f"Amyloid counts as positive where SUVR is above {POSITIVE}.")
    finish(folder, asked, Summary(scans, failed, config.samples, notes), clock, page)
    return 1 if failed else 0


def _has_scans(config: Config) -> bool:
    return config.input is not None or config.data.manifest is not None


def list_scans(config: Config) -> tuple[list[Inputs], tuple[str, ...]]:
    """Find the scans and their masks; return them, and notes on what was passed over.

    Raises:
        InputError: There are none, one has no mask, or options contradict each other.
    """
    if not config.preprocess and config.mask is not None:
        raise InputError("mask", "none without --preprocess", config.mask, "add --preprocess, or leave it out")
    if config.preprocess and config.template is None:
        raise InputError("template", "the MNI152 brain to align with", "nothing", "give --template FILE")
    if config.data.manifest is not None and config.mask is not None:
        raise InputError("mask", "a column mask in the manifest", config.mask, "leave --mask out")
    if config.data.manifest is None and config.input is not None:
        found, passed = list_inputs(config.input, {"mask": config.mask}, tuple(MAPS), config.series, config.fill)
    else:
        manifest = config.data.manifest
        records, passed = find_records(manifest, config.input, config.data.split, config.series, config.fill)
        assert manifest is not None
        masks = [row["mask"] if config.preprocess and row.get("mask") else "" for row in (r.row for r in records)]
        found = [
            Inputs(record.name, record.scan, {"mask": resolve_path(mask, manifest.parent) if mask else None})
            for record, mask in zip(records, masks, strict=True)
        ]
    if config.copy is not None:
        if len(found) > 1:
            raise InputError("copy", "one scan", f"{len(found)}", "leave it out: every map is in RUN/outputs")
        if not config.copy.name.lower().endswith(nifti.SUFFIXES):
            raise InputError("copy", f"a file {' or '.join(nifti.SUFFIXES)}", config.copy.name)
    return found, passed


def read_template(config: Config) -> Volume | None:
    """Read the template, which is a brain where scans are to be aligned with it; None where none is given.

    Raises:
        InputError: It cannot be read, or has a skull.
    """
    if config.template is None:
        return None
    volume = nifti.read(config.template, dimensions=(3,), allow_constant=False)
    if config.preprocess:
        require_brain(volume.array, config.template, "give the template of the brain alone")
    return volume


def make_plan(config: Config, models: Models, template: Volume | None, grid: Grid, outputs: Path) -> Plan:
    """Put the networks onto the devices, and prepare the program.

    Raises:
        InputError: The samples of a chunk do not divide over the devices.
    """
    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh)
    models = jax.device_put(models, NamedSharding(mesh, PartitionSpec()) if mesh.shape["data"] > 1 else None)

    def read(one: Inputs) -> Prepared:
        if template is None or not config.preprocess:
            return read_prepared(one.scan, grid)
        volume, inside, notes = read_raw(one.scan, one.beside["mask"])
        return prepare(volume, inside, template, notes, one.path)

    constants = {
        "samples": config.samples, "sampling": to_record(config.sampling), "seed": config.seed,
        "positive_above": POSITIVE, "licence": models.pet.report.licence,
    }  # fmt: skip
    preprocess = fit_preprocess(models.mri.preprocess, grid, models.mri.config)
    return Plan(
        read, preprocess, lambda image: program(jax.random.key(config.seed), models, image), constants, config, outputs
    )


def make_program(config: Config, mesh: Mesh) -> Callable[..., Translation]:
    """Return the function from a key, the networks and an MRI to its map, compiled once; samples share the devices.

    Raises:
        InputError: The samples of a chunk do not divide over the devices.
    """
    size, count, sharding = min(config.sampling.chunk, config.samples), mesh.shape["data"], None
    if count > 1:
        if size % count:
            expected = f"a multiple of the {count} devices of mesh.data"
            raise InputError("chunk", expected, size, "change --chunk or --samples, or --mesh.data")
        sharding = NamedSharding(mesh, PartitionSpec("data"))
    return partial(translate, m=config.samples, config=config.sampling, sharding=sharding)


def plan_step(config: Config, mesh: Mesh) -> Workload:
    """Return the translation of a scan by the released networks, and the shapes of its arguments; nothing is read."""
    whole, models = NamedSharding(mesh, PartitionSpec()), planned_models(config.dtype)
    preprocess = fit_preprocess(models.mri.preprocess, MNI152, models.mri.config)
    image = jax.ShapeDtypeStruct(preprocess.volume_size, jnp.float32)
    given = jax.eval_shape(jax.random.key, 0), models, image
    key, models, placed = abstract(given, jax.tree.map(lambda _: whole, given))
    step = jax.jit(make_program(config, mesh))
    notes = (f"A step is a scan: {config.samples} samples of {config.sampling.steps} steps by the released networks.",)
    parts = {"parameters": models, "batch": placed}
    return Workload(step, (key, models, placed), parts, 1, {"image": image}, "scans", notes)


def process_scan(plan: Plan, one: Inputs, tell: Tell) -> Scan:
    """Translate a scan, and write its maps.

    Raises:
        InputError: For whatever is wrong with the scan, or the weights give numbers that are not finite.
    """
    config = plan.config
    tell(f"{one.name}: reading")
    scan = plan.read(one)
    grid = scan.volume.grid
    tell(f"{one.name}: drawing {config.samples} samples")
    found = jax.device_get(plan.run(network_input(scan.volume, plan.preprocess)))
    if not np.isfinite(found.suvr).all():
        raise InputError("weights", "a finite map", "NaN or Inf", "check the weights, or --dtype")
    tell(f"{one.name}: writing")
    has_spread = config.samples > 1 and found.spread is not None
    values = {"suvr": found.suvr} | ({"spread": found.spread, "mean_map": found.mean_map} if has_spread else {})
    maps = {name: on_scan_grid(value, plan.preprocess, grid) for name, value in values.items()}
    if has_spread:  # splines swing below 0
        maps["spread"] = Volume.make(np.maximum(maps["spread"].array, 0), grid.affine)
    kept = {"mri": scan.volume} | {name: volume for name, volume in maps.items() if name != "mean_map"}
    if scan.matrix is not None:
        kept["mask"] = Volume.make(scan.mask.astype(np.uint8), grid.affine)
        write_json(plan.outputs / f"{one.name}_affine.json", {"template_to_scan_mm": scan.matrix.tolist()})
    reference = None if config.preprocess else one.path
    for name, volume in kept.items():
        definition, unit = MAPS[name]
        write_map(plan.outputs, f"{one.name}_{name}", volume, definition, unit, plan.constants, reference=reference)
    if config.copy is not None:
        nifti.write(config.copy, maps["suvr"])
    suvr, notes = maps["suvr"].array[scan.mask], list(scan.notes)
    if found.at_limit >= AT_LIMIT:
        where = "held at -1 or 1 by the released clipping (--no-clip leaves them free)" if config.sampling.clip else (
            "beyond -1 and 1, where the released clipping would have held them"
        )  # fmt: skip
        notes.append(f"{found.at_limit:.0%} of the latents' entries are {where}")
    bias = (maps["suvr"].array - maps["mean_map"].array)[scan.mask] if has_spread else None
    return Scan(
        name=one.name, path=str(one.path), notes=tuple(notes), shape=grid.shape, mean_suvr=float(suvr.mean()),
        share_positive=float(np.mean(suvr > POSITIVE)),
        mean_spread=float(maps["spread"].array[scan.mask].mean()) if has_spread else None,
        bias=None if bias is None else float(np.sqrt(np.mean(np.square(bias)))),
        at_limit=float(found.at_limit), correlation=scan.correlation,
    )  # fmt: skip


def make_notes(config: Config, models: Models) -> list[str]:
    """Say what a user should know about this run."""
    notes = [f"Weights: {models.pet.report.licence}."]
    for one in models:
        notes += [text for text in one.report.remarks if "does not tell MRI" not in text and text not in notes]
    if config.samples == 1:
        notes.append("One sample: there is no spread to show, and no noise is averaged out.")
    return notes


# Synthetic inputs ----------------------------------------------------------------------------------------------------

SHAPE = (32, 32, 32)
"""Of phantom brains and their template, of 6 mm; the tiny networks see voxels twice as large."""


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Write phantom brains as prepared scans, their template, and tiny random networks, where none are given."""
    if _has_scans(config):
        list_scans(config)  # a mistake there costs no work
    log = begin(folder)
    place = folder.path / "inputs"
    if not config.weights.is_given:
        log.say("No networks are given: tiny ones of random numbers are made; their maps mean nothing.")
        write_tiny_models(place / "weights", config.seed)
        config = dataclasses.replace(config, weights=WeightsConfig(place / "weights"))
    if _has_scans(config):
        return config
    template, scans = write_phantoms(place, config.seed, config.data.synthetic)
    return dataclasses.replace(config, input=scans, template=config.template or template, preprocess=False, mask=None)


def write_phantoms(folder: Path, seed: int, count: int) -> tuple[Path, Path]:
    """Write a template, and phantom brains by WhiteStripe on its grid; return the template and the folder of scans."""
    manifest = write_brain_cohort(folder / "truth", seed, count + 1, SHAPE)
    first, *others = sorted((manifest.parent / "scans").iterdir())
    template = stripped(first)
    nifti.write(folder / "template.nii.gz", template)
    for path in others:
        brain = stripped(path)
        made = prepare(brain, brain.array > 0, template)
        nifti.write(folder / "scans" / path.name, made.volume)
    return folder / "template.nii.gz", folder / "scans"


def stripped(path: Path) -> Volume:
    """Return a phantom brain with 0 around it: what has no label."""
    volume, labels = nifti.read(path), nifti.read(path.parents[1] / "labels" / path.name, dtype=np.int32)
    inside = labels.array > 0
    return Volume.make(np.where(inside, np.maximum(volume.array, 1e-3), 0).astype(np.float32), volume.affine)


# The page ------------------------------------------------------------------------------------------------------------

MOST_PICTURES = 8
READING = (
    "A synthesised map shows what the networks expect of brains that look like this MRI. It is no measurement: people "
    "with like MRI differ in amyloid, and the spread shows only where the samples of this model disagree.",
    f"Amyloid counts as positive where the SUVR of a cortical composite is above {POSITIVE}; the share of the brain "
    "above it is not that decision.",
    "For research only, not for diagnosis. Method: CoCoLIT, arXiv:2508.01292.",
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show MRI, map and spread of each scan, and what was found of them."""
    summary, scans = run.summary, run.summary.scans
    sections = [Section("Notes", [Note(text) for text in summary.notes])]
    if summary.failed:
        text = f"{summary.failed} scans failed: see outputs/failed.csv for the reasons."
        sections.insert(0, Section("Failed scans", [Note(text, "warning")]))
    sections += [scan_section(run.outputs, scan, is_viewed=scan is scans[0]) for scan in scans[:MOST_PICTURES]]
    columns = ("scan", "mean SUVR", f"above {POSITIVE}", "spread", "bias of averaging", "latents at the limit",
               "correlation with the template")  # fmt: skip
    rows = [
        (s.name, s.mean_suvr, f"{s.share_positive:.1%}", s.mean_spread, s.bias, f"{s.at_limit:.1%}", s.correlation)
        for s in scans
    ]
    caption = "Within the brain. The bias is the root mean square of map minus mean of the decoded samples, in SUVR."
    sections.append(Section("Scans", [Table(columns, rows, caption)]))
    sections.append(Section("How to read this", [Text(READING)]))
    tiles: list[tuple[str, object, str]] = [
        ("Scans", len(scans), f"{summary.failed} failed"),
        ("Samples", summary.samples, "latents averaged for each"),
        ("Threshold", POSITIVE, "SUVR above which amyloid is positive"),
    ]
    return Page("Amyloid PET from MRI", f"CoCoLIT on {len(scans)} scans", tiles, sections)


def scan_section(outputs: Path, scan: Scan, *, is_viewed: bool) -> Section:
    """Show a scan with its map and its spread: in slices, and in a viewer."""
    titles = {"mri": "MRI", "suvr": "Synthesised", "spread": "Spread"}
    names = [name for name in titles if name != "spread" or scan.mean_spread is not None]
    try:
        read = {name: reorient(nifti.read(outputs / f"{scan.name}_{name}.nii.gz")) for name in names}
    except (OSError, InputError):
        return Section(scan.name, [Note("The maps are no longer in this folder.", "warning")])
    inside = require_brain(read["mri"].array, scan.path)
    styles = {"MRI": MapStyle("WhiteStripe", colormap="gray"), "Synthesised": MapStyle("SUVR", colormap="inferno")}
    styles["Spread"] = MapStyle("SUVR", colormap="viridis")
    shown = show_volumes(
        {titles[name]: volume for name, volume in read.items()}, mask=inside, whole=("MRI",), is_viewed=is_viewed,
        caption=f"{scan.name}: the MRI, the synthesised map, and the standard deviation of its samples.", styles=styles,
    )  # fmt: skip
    return Section(scan.name, [*(Note(text) for text in scan.notes), *shown])

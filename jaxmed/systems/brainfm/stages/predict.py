"""BrainFM predict: every map of every scan, at the network's voxel size and on the grid of the scan."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.config import Decay, Number, Seed, Size, checked
from jaxmed.data.head_scans import Modality
from jaxmed.data.preprocess import Loaded
from jaxmed.data.subject_files import modality_of
from jaxmed.errors import InputError
from jaxmed.files import require_given, write_json
from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import read_table, write_table
from jaxmed.models.published.brainfm import make_unet
from jaxmed.models.published.load import Published, load_published
from jaxmed.models.unet_brain import VOLUME_SHARDING, BrainUnetConfig, largest_activation
from jaxmed.recipes.coordinate_maps import affine_to_atlas, bring, find_in, warped_label_scores
from jaxmed.recipes.map_files import Tell
from jaxmed.recipes.map_images import Inputs, list_inputs, map_images
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish, nested_run
from jaxmed.report.page import Note, Section, Table, Text
from jaxmed.synthesis.phantoms.write_heads import write_small_heads
from jaxmed.systems.brainfm.evaluation import robustness
from jaxmed.systems.brainfm.pages import registration_sections, robustness_sections, scan_section, truth_sections
from jaxmed.systems.brainfm.prediction import MAPS, Prediction, on_input_grid, predict_input, read_scan
from jaxmed.systems.brainfm.truth import Truth, dice_by_label, read_labels, read_truth, score_maps
from jaxmed.train.announce import announce, require_memory
from jaxmed.train.mesh import MeshConfig, make_mesh, param_shardings
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

TRIES_FAILED_AGAIN = True
HEAD = 160.0  # mm along each axis that a scan is taken to have before it is read
NATIVE = "native"  # in the names of maps on the grid of the scan


@dataclasses.dataclass(frozen=True)
@checked
class Reading:
    """How scans are read.

    Attributes:
        average: Whether the last of four axes, of colours or echoes, is averaged; such scans are refused otherwise.
        crop: Whether what is 0 around the head is cut off before the network sees it; its norms depend on that.
    """

    average: bool = False
    crop: bool = False


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Maps of scans.

    Attributes:
        input: A scan (NIfTI, DICOM), or a folder of scans.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: A run of train, or published weights.
        modality: "CT" cuts intensities to 0 to 80 HU; "auto" takes scans with values below -500 for CT.
        reading: How scans are read.
        tiling: The whole volume at once, or windows, whose maps are averaged: for volumes that do not fit into memory.
        window: Voxels of a window along each axis.
        overlap: Share of a window that its neighbour has too.
        labels: Label map of the scan in the network's labels, or a folder of them by the same file names: Dice.
        truth: Further true maps: errors of images, distances, the bias field and coordinates.
        atlas: Image in MNI space that is warped onto every scan.
        atlas_labels: Its label map in the network's labels: Dice with --labels where it is warped.
        reference: Scan that is brought onto every other by the coordinates of both.
        reference_labels: Its label map in the network's labels: Dice with --labels where it is brought, and in mm how
            far from the centres of its structures those of the scan are found.
        robustness: Ask the network about worse versions of every scan too: thick slices, bias, another contrast,
            deformation, ghosts, motion; told by modality, which file names say (sub-1_T1w.nii.gz, A.1.FLAIR.nii).
        structures: CSV with label and name, for tables.
        native: Write maps on the grid of the scan too.
        feature: Write the feature of every voxel too, as NPZ.
        synthetic: Predict so many phantom heads where no scans are given, by a tiny network where none is given.
        mesh: The devices; mesh.model splits a large volume along x.
        dtype: Type of the network's products.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of the phantoms, and of worse versions.
    """

    input: Path | None = None
    series: str = ""
    weights: Path | None = None
    modality: Modality = "auto"
    reading: Reading = Reading()
    tiling: Literal["whole", "windows"] = "whole"
    window: tuple[Size, Size, Size] = (160, 160, 160)
    overlap: Decay = 0.5
    labels: Path | None = None
    truth: Truth = Truth()
    atlas: Path | None = None
    atlas_labels: Path | None = None
    reference: Path | None = None
    reference_labels: Path | None = None
    robustness: bool = False
    structures: Path | None = None
    native: bool = True
    feature: bool = False
    synthetic: Number = 0
    mesh: MeshConfig = MeshConfig(data=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    fill: float | None = None
    seed: Seed = 0


def paper() -> Config:
    """The whole volume at once, as the authors' code: an accelerator, or 20 GB and minutes for each scan."""
    return Config()


def laptop() -> Config:
    """Windows of 96 voxels, which take 2 GB with the released network."""
    return Config(tiling="windows", window=(96, 96, 96))


def smoke() -> Config:
    """Two phantom heads and a tiny network made on the spot, in seconds."""
    return Config(synthetic=2)


@dataclasses.dataclass(frozen=True)
class Scan:
    """What became of a scan; outputs/NAME.json.

    Attributes:
        name: Name of its results.
        path: The scan.
        notes: What is unexpected about it.
        shape: Voxels of the network's input.
        spacing_mm: Their size.
        is_ct: Whether it was read as CT.
        modality: T1, T2, FLAIR or CT, by its name or because it was read as CT; empty where neither tells.
        maps: What was written.
        volumes_ml: Volume of each label, by the sum of its probabilities.
        dice: Of each label of its label map.
        scores: Against the truth, as far as it is known; see `evaluation.compare`.
        registration: Of label maps that are brought onto it, "atlas" or "reference"; see
            `coordinates.warped_label_scores`.
        to_mni: Affine map from the world of the scan to MNI space, in mm, by rows; empty without coordinates.
        residual_mm: Median distance between the coordinates and that map.
        age: In years, where the network tells it.
        robustness: By condition, what changes; see `evaluation.robustness`.
    """

    name: str
    path: str
    notes: tuple[str, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    is_ct: bool
    modality: str
    maps: tuple[str, ...]
    volumes_ml: dict[str, float]
    dice: dict[str, float]
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    registration: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    to_mni: tuple[tuple[float, ...], ...] = ()
    residual_mm: float | None = None
    age: float | None = None
    robustness: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scans, how many failed, and the network."""

    scans: tuple[Scan, ...]
    failed: int
    tasks: tuple[str, ...]
    parameters: int
    notes: tuple[str, ...]


class Bringing(NamedTuple):
    """What is brought onto every scan: an image, where a scan's brain voxels are in its world, and its labels."""

    image: Volume | None
    find: Callable[[np.ndarray], np.ndarray]
    labels: Volume | None


class Plan(NamedTuple):
    """What stays the same from scan to scan."""

    published: Published
    read: Callable[..., Loaded]
    run: Callable[..., Prediction]
    brought: Mapping[str, Bringing]
    config: Config
    outputs: Path


def run(config: Config, folder: RunFolder) -> int:
    """Read and check, run the network on every scan, write maps, tables and the page. Returns 1 when scans failed."""
    clock, asked = Clock(), config
    if config.synthetic and (config.input is None or config.weights is None):
        config = synthetic_inputs(config, folder)
    require_given(config.input, "input", "scans, or a folder of them")
    require_given(config.weights, "weights", "the weights of a network")
    published = read_network(config)
    require_tasks(config, published.config.tasks)
    volumes = read_volumes(config)
    names = read_names(config)
    inputs, passed = list_scans(config)
    read = partial(
        read_scan, published, modality=config.modality, fill=config.fill, average=config.reading.average,
        crop=config.reading.crop,
    )  # fmt: skip
    first = read(inputs[0].scan) if len(inputs) == 1 else None
    other = None if config.reference is None else read(config.reference)
    size = config.window if config.tiling == "windows" else (round(HEAD / published.preprocess.spacing[0]),) * 3
    size = size if first is None or config.tiling == "windows" else first.volume.array.shape
    require_memory(
        6 * largest_activation(published.config, size), "", f"a pass over {' x '.join(map(str, size))} voxels",
        "set --tiling windows, or a smaller --window",
    )  # fmt: skip
    log = begin(folder, (*published.report.lines, *passed))
    image = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    announce(
        log, "Predicting", params=published.params, batch=image, count=len(inputs), unit="scans",
        program=jax.make_jaxpr(published.model.apply)(published.params, image), smaller=folder.smaller,
    )  # fmt: skip
    predict = partial(
        predict_input, published, window=config.window if config.tiling == "windows" else None, overlap=config.overlap,
        feature=config.feature, sharding=split_volume(config),
    )  # fmt: skip
    reference = None if other is None else predict(other, other.volume.array)
    plan = Plan(published, read, predict, list_brought(volumes, reference), config, folder.outputs)
    clock.lap("read and check")
    scans, failed = map_images(
        inputs, lambda number, one, tell: process_scan(plan, one, tell), Scan, folder.outputs, log, "Predicting",
        lambda row: {"brain_ml": sum(row.volumes_ml.values())} | row.scores,
    )  # fmt: skip
    clock.lap("predict, compilation included")
    write_tables(folder.outputs, scans, names)
    size = sum(leaf.size for leaf in jax.tree.leaves(published.params))
    summary = Summary(scans, failed, published.config.tasks, size, (*published.report.lines, *passed))
    finish(folder, asked, summary, clock, page)
    return 1 if failed else 0


def synthetic_inputs(config: Config, folder: RunFolder) -> Config:
    """Write phantom heads where no scans are given, and train a tiny network where none is given."""
    if config.input is not None:
        list_scans(config)  # a mistake there costs no training
    log = begin(folder)
    if config.input is None:
        place = folder.path / "inputs" / "heads"
        write_small_heads(place, config.seed + 1, config.synthetic)
        labels = place / "labels" if config.weights is None else config.labels
        config = dataclasses.replace(config, input=place / "scans", labels=labels)
    if config.weights is None:
        changes = {"train.seed": config.seed}
        nested = nested_run(folder, "brainfm train", changes, log, "No network is given: a tiny one is trained.")
        config = dataclasses.replace(config, weights=nested.outputs / "model")
    return config


def list_scans(config: Config) -> tuple[list[Inputs], tuple[str, ...]]:
    """Find the scans, and the label map of each by its name; return them, and notes on what was passed over.

    Raises:
        InputError: There are none, or one has no partner.
    """
    assert config.input is not None
    beside = {"labels": config.labels} | config.truth.places
    return list_inputs(config.input, beside, (*MAPS, NATIVE), config.series, config.fill)


def require_tasks(config: Config, tasks: Sequence[str]) -> None:
    """Refuse what needs a map that the network does not tell.

    Raises:
        InputError: Something does.
    """
    asked = {"labels": ("segmentation", config.labels), "atlas": ("registration", config.atlas)}
    asked |= {"reference": ("registration", config.reference)}
    named = {"bias_field": "bias_field_log", "coordinates": "registration"}
    asked |= {f"truth.{name}": (named.get(name, name), path) for name, path in config.truth.places.items()}
    for name, (task, path) in asked.items():
        if path is not None and task not in tasks:
            found = f"one with {', '.join(tasks)}"
            raise InputError(
                f"--{name}", f"a network with the task {task}", found, "leave it out, or take other --weights"
            )


def read_volumes(config: Config) -> dict[str, Volume]:
    """Read the atlas, and the label maps of atlas and reference.

    Raises:
        InputError: One cannot be read, or there is nothing to compare it with.
    """
    found = {} if config.atlas is None else {"atlas": nifti.read(config.atlas, dimensions=(3,))}
    for name, path in (("atlas", config.atlas_labels), ("reference", config.reference_labels)):
        if path is None:
            continue
        if config.labels is None or (name == "reference" and config.reference is None):
            wanted = "--labels" if config.labels is None else "--reference"
            raise InputError(f"{name}-labels", f"{wanted} beside it, to compare with", "none", f"give {wanted}")
        found[f"{name}_labels"] = nifti.read(path, dimensions=(3,), dtype=np.int32, allow_constant=False)
    return found


def list_brought(volumes: Mapping[str, Volume], reference: Prediction | None) -> dict[str, Bringing]:
    """Return what is brought onto every scan, by name.

    Raises:
        InputError: The network tells no coordinates of the reference, or finds no brain in it.
    """
    found = {}
    if "atlas" in volumes or "atlas_labels" in volumes:
        found["atlas"] = Bringing(volumes.get("atlas"), lambda places: places, volumes.get("atlas_labels"))
    if reference is not None:
        image, labels = reference.scan.volume, volumes.get("reference_labels")
        found["reference"] = Bringing(image, find_in(reference.located), labels)
    return found


def read_network(config: Config) -> Published:
    """Read the weights, and put them onto the devices.

    Raises:
        InputError: They are of another kind of network.
    """
    assert config.weights is not None
    published = load_published(config.weights)
    if not isinstance(published.config, BrainUnetConfig):
        raise InputError(config.weights, "a multi-task network of brains", f"a {published.report.kind}")
    sizes = dataclasses.replace(published.config, dtype=config.dtype, remat=False)
    mesh = make_mesh(config.mesh)
    params = jax.device_put(published.params, param_shardings(published.params, mesh, ((r".", PartitionSpec()),)))
    return dataclasses.replace(published, params=params, config=sizes, model=make_unet(sizes, published.params))


def split_volume(config: Config) -> NamedSharding | None:
    """Return how a volume is split over the devices of mesh.model; None where there is one."""
    mesh = make_mesh(config.mesh)
    return NamedSharding(mesh, VOLUME_SHARDING) if mesh.shape["model"] > 1 else None


def process_scan(plan: Plan, one: Inputs, tell: Tell) -> Scan:
    """Run the network on a scan, and write its maps.

    Raises:
        InputError: For whatever is wrong with the scan or what belongs to it.
    """
    config, published = plan.config, plan.published
    tell(f"{one.name}: network")
    scan = plan.read(one.scan)
    found = plan.run(scan, scan.volume.array)
    labels = read_labels(found, one.beside["labels"])
    truth = read_truth(found, {name: one.beside[name] for name in config.truth.places})
    worse = {}
    if config.robustness:
        tell(f"{one.name}: worse versions")
        worse = robustness(found, labels, partial(plan.run, scan), jax.random.key(config.seed))
    tell(f"{one.name}: writing")
    maps, notes = dict(found.maps), [*found.scan.notes]
    to_mni, residual = (), None
    if "coordinates" in maps:
        try:
            fit = affine_to_atlas(found.located)
            to_mni, residual = tuple(map(tuple, fit.matrix.tolist())), fit.residual
        except InputError as error:
            notes.append(f"no affine map to MNI space: {error}")
    registration = {}
    for name, brought in plan.brought.items():
        world = brought.find(found.located.of_brain)
        if brought.image is not None:
            maps[name] = bring(found.brain, world, brought.image)
        if brought.labels is not None and labels is not None:
            registration[name] = warped_label_scores(found.brain, labels, world, brought.labels)
    volume = found.scan.volume
    constants = {"weights": str(config.weights), "licence": published.report.licence, "tiling": config.tiling}
    classes = {"labels": [*published.config.labels]} if "segmentation" in maps else {}
    native = on_input_grid(found, maps) if config.native else {}
    for name, values in {"input": volume.array, **maps}.items():
        definition, unit = ("the scan as the network saw it, between 0 and 1", "1") if name == "input" else MAPS[name]
        further = constants | (classes if name == "segmentation" else {})
        write_map(plan.outputs, f"{one.name}_{name}", Volume.make(values, volume.affine), definition, unit, further)
        if name in native:
            stem = f"{one.name}_{name}_{NATIVE}"
            write_map(plan.outputs, stem, native[name], definition, unit, further, reference=one.path)
    if found.feature is not None:
        write_npz(plan.outputs / f"{one.name}_feature.npz", {"feature": found.feature, "affine": volume.affine})
    if to_mni:
        write_json(plan.outputs / f"{one.name}_affine.json", {"scan_to_mni_mm": to_mni, "residual_mm": residual})
    millilitres = float(np.prod(volume.spacing)) / 1000
    is_ct = found.scan.intensity.kind == "window"
    return Scan(
        name=one.name, path=str(one.path), notes=tuple(notes), shape=volume.array.shape, spacing_mm=volume.spacing,
        is_ct=is_ct, modality="CT" if is_ct else modality_of(one.path.name), maps=tuple(maps),
        volumes_ml={str(label): count * millilitres for label, count in found.voxels.items() if label},
        dice=dice_by_label(found, labels), scores=score_maps(found, labels, truth), registration=registration,
        to_mni=to_mni, residual_mm=residual, age=found.age, robustness=worse,
    )  # fmt: skip


def read_names(config: Config) -> dict[int, str]:
    """Read the names of labels: as they are given, or as a run of train has left them beside its network.

    Raises:
        InputError: The table lacks a column, or a label is no whole number.
    """
    path, weights = config.structures, config.weights
    if path is None and weights is not None:
        places = [folder / "structures.csv" for folder in (weights / "outputs", weights.parent)]
        path = next((one for one in places if one.exists()), None)
    if path is None:
        return {}
    table = read_table(path, ("label", "name"))
    return dict(zip(table.integers("label"), table.column("name"), strict=True))


def write_tables(outputs: Path, scans: tuple[Scan, ...], names: Mapping[int, str]) -> None:
    """Write scans.csv, volumes.csv with a row for every label of every scan, and robustness.csv."""
    figures = [
        {"residual_mm": scan.residual_mm, "age": scan.age} | scan.scores
        | {f"{name}_{score}": value for name, scores in scan.registration.items() for score, value in scores.items()}
        for scan in scans
    ]  # fmt: skip
    tables: dict[str, list[dict[str, Any]]] = {
        "scans": [
            {"id": scan.name, "path": scan.path, "is_ct": int(scan.is_ct)} | told(row)
            for scan, row in zip(scans, figures, strict=True)
        ],
        "volumes": [
            {"id": scan.name, "label": label, "name": names.get(int(label), ""), "volume_ml": f"{value:.6g}"}
            | told({"dice": scan.dice.get(label)})
            for scan in scans for label, value in scan.volumes_ml.items()
        ],
        "robustness": [
            {"id": scan.name, "modality": scan.modality, "condition": condition} | told(values)
            for scan in scans for condition, values in scan.robustness.items()
        ],
    }  # fmt: skip
    for table, rows in tables.items():
        columns = tuple(dict.fromkeys(name for row in rows for name in row))
        if rows:
            write_table(outputs / f"{table}.csv", columns, rows)


def told(figures: Mapping[str, float | None]) -> dict[str, str]:
    """Return figures as they stand in a table; nothing for None."""
    return {name: "" if value is None else f"{value:.6g}" for name, value in figures.items()}


# The page -----------------------------------------------------------------------------------------------------------

MOST_PICTURES = 8
READING = (
    "Synthesized images are what the network expects of a contrast, not measurements. Distances, coordinates and the "
    "bias field mean something inside of the head alone.",
    "Of maps with several channels the first is shown: the left pial surface, and the coordinate from left to right.",
    "The norms of the network depend on the field of view: windows are close to the whole volume, not equal to it.",
)


def page(run: Finished[Config, Summary]) -> Page:
    """Show each scan and its maps, volumes, and Dice where there is truth."""
    summary, scans = run.summary, run.summary.scans
    sections = [Section("Notes", [Note(text) for text in summary.notes])]
    if summary.failed:
        text = f"{summary.failed} scans failed: see outputs/failed.csv for the reasons."
        sections.insert(0, Section("Failed scans", [Note(text, "warning")]))
    sections += [scan_section(run.outputs, s.name, s.maps, is_viewed=s is scans[0]) for s in scans[:MOST_PICTURES]]
    rows = [
        (scan.name, " x ".join(map(str, scan.shape)), "CT" if scan.is_ct else "any", sum(scan.volumes_ml.values()),
         scan.residual_mm, scan.scores.get("dice"))
        for scan in scans
    ]  # fmt: skip
    columns = ("scan", "voxels", "read as", "labelled (ml)", "residual of the affine map (mm)", "mean Dice")
    caption = "outputs/volumes.csv holds every label; volumes are sums of probabilities."
    sections.append(Section("Scans", [Table(columns, rows, caption)]))
    sections += truth_sections({scan.name: scan.scores for scan in scans if scan.scores})
    sections += registration_sections({scan.name: scan.registration for scan in scans if scan.registration})
    sections += robustness_sections([(scan.modality, scan.robustness) for scan in scans if scan.robustness])
    sections.append(Section("How to read this", [Text(READING)]))
    tiles: list[tuple[str, object, str]] = [
        ("Scans", len(scans), f"{summary.failed} failed"),
        ("Tasks", len(summary.tasks), ", ".join(summary.tasks)),
        ("Parameters", f"{summary.parameters:,}", "of the network"),
    ]
    if known := [scan.scores["dice"] for scan in scans if "dice" in scan.scores]:
        tiles.append(("Dice", f"{float(np.mean(known)):.3f}", "mean over labels and scans"))
    return Page("Maps of brain scans", f"BrainFM on {len(scans)} scans", tiles, sections)

"""Stage `jaxmed brainfm generate`: a store of subjects from label maps and scans, and images drawn from it."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.config import Count, Number, Seed, checked
from jaxmed.data.label_table import find_table
from jaxmed.data.subject_files import list_subjects
from jaxmed.data.subject_store import SubjectStore, check_subject, find_store, open_store
from jaxmed.io.maps import write_map
from jaxmed.recipes.mni_space import make_locate
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.recipes.subject_stores import make_store
from jaxmed.report.figures import MapStyle, slice_maps
from jaxmed.report.page import Block, Figure, Note, Section, Table, Text
from jaxmed.report.parameter_maps import read_map
from jaxmed.solvers.registration import RegistrationConfig
from jaxmed.synthesis.brain import draw_of, folded_share, generate
from jaxmed.synthesis.brain_draws import MODALITIES, SYNTHETIC, GeneratorConfig
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.phantoms.cohort import centred_affine
from jaxmed.synthesis.phantoms.write_heads import write_small_heads
from jaxmed.train.log import Log
from jaxmed.train.run_folder import RunFolder
from jaxmed.volume import Volume

SHOWN_SLICES = 4
# Name of a target and its channel, unit and range on the page.
TARGETS: tuple[tuple[str, str, int | None, MapStyle], ...] = (
    ("segmentation", "class", None, MapStyle(colormap="viridis")),
    ("distance", "left pial", 0, MapStyle("mm", (-3, 3), "RdBu_r")),
    ("distance", "right white", 3, MapStyle("mm", (-3, 3), "RdBu_r")),
    ("registration", "MNI x", 0, MapStyle("mm / 100", (-1, 1), "RdBu_r")),
    ("registration", "MNI z", 2, MapStyle("mm / 100", (-1, 1), "RdBu_r")),
    ("T1", "T1", 0, MapStyle(colormap="gray")),
    ("bias_field_log", "log bias", 0, MapStyle(limits=(-1, 1), colormap="RdBu_r")),
    ("high_res_residual", "lost detail", 0, MapStyle(limits=(-0.3, 0.3), colormap="RdBu_r")),
    ("pathology", "lesion", 0, MapStyle(limits=(0, 1))),
)
DEFINITIONS = {
    "image": ("Image as a network takes it", "1"),
    "mild_image": ("The same, with mild bias, gamma and noise", "1"),
    "segmentation": ("Class, in the order of the store's table", "1"),
    "distance": ("Signed distance to left pial, left white, right pial and right white surface, cut off", "mm"),
    "registration": ("Place in MNI space, divided by 100 mm", "1"),
    "T1": ("T1-weighted scan in [0, 1]", "1"),
    "bias_field_log": ("Logarithm of the gain", "1"),
    "high_res_residual": ("Image before its resolution was lowered, less the image", "1"),
    "pathology": ("1 in lesions", "1"),
}


@dataclasses.dataclass(frozen=True)
@checked
class SubjectData:
    """Which subjects are read.

    Attributes:
        manifest: CSV with the column path (label map as NIfTI); optionally subject, split, age, dataset, generation,
            T1, T2, FLAIR, CT, lp, lw, rp, rw, mni_x, mni_y, mni_z, defaced and lesion.
        synthetic: Draw this many phantom heads where no files are given.
    """

    manifest: Path | None = None
    synthetic: Number = 0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Make a store of subjects, and draw images from it.

    Attributes:
        data: A table of subjects.
        input: A label map, a folder of them (also with the paper's file names), or a store or run, instead of a table.
        table: What the labels mean: freesurfer, brainfm, brainfm-hemisphere, or a CSV with the columns label, name,
            side, class, generation and surface.
        template: Maps of grey and of white matter in MNI space, for coordinates where there are no maps of them.
        registration: How subjects are aligned with the template.
        store: Make the store and draw nothing.
        generator: How images are drawn.
        subjects: Subjects of which images are drawn, at most.
        images: Images of each.
        seed: Seed of the images.
    """

    data: SubjectData = SubjectData()
    input: Path | None = None
    table: str = "freesurfer"
    template: tuple[Path, ...] = ()
    registration: RegistrationConfig = RegistrationConfig()
    store: bool = False
    generator: GeneratorConfig = GeneratorConfig()
    subjects: Count = 2
    images: Count = 6
    seed: Seed = 0


def paper() -> Config:
    """Volumes of 160 x 160 x 160 voxels, as the paper trains on."""
    return Config()


def laptop() -> Config:
    """Volumes of 96 x 96 x 96 voxels, in minutes; phantom heads where no files are given."""
    return Config(SubjectData(synthetic=4), generator=GeneratorConfig((96, 96, 96)))


def smoke() -> Config:
    """Small volumes, in seconds; phantom heads where no files are given."""
    deformation = DeformationConfig(control_scale=(0.1, 0.2), amplitude=1.0)
    generator = GeneratorConfig((40, 48, 40), deformation=deformation)
    registration = RegistrationConfig(blurs=(1.5,), steps=40)
    return Config(SubjectData(synthetic=3), generator=generator, registration=registration, subjects=1, images=3)


@dataclasses.dataclass(frozen=True)
class DrawnImage:
    """How an image was drawn: its file, where it comes from, and the spacing of its slices in mm.

    `folded` is the share of voxels at which the deformation turns space inside out.
    """

    name: str
    subject: str
    source: str
    resolution: tuple[float, float, float]
    is_photo: bool
    is_flipped: bool
    folded: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run made.

    Attributes:
        subjects: In the store.
        failed: That could not be read.
        classes: Of the label table.
        shape: Grid of the store.
        modalities: That any subject has.
        sizes: Megabytes of the store.
        overlaps: Of a subject with the template, by name, where it was aligned.
        images: That were drawn.
    """

    subjects: int
    failed: int
    classes: int
    shape: tuple[int, int, int]
    modalities: tuple[str, ...]
    sizes: float
    overlaps: dict[str, float]
    images: tuple[DrawnImage, ...]


def run(config: Config, folder: RunFolder) -> int:
    """Make the store, or open it, and draw images."""
    clock = Clock()
    is_given = config.input is not None or config.data.manifest is not None
    is_store = config.input is not None and find_store(config.input) is not None
    store, files, table = None, None, None
    if is_store and config.input is not None:
        store = open_store(config.input)
    else:
        table = find_table(config.table)
        if is_given or not config.data.synthetic:
            files = list_subjects(config.data.manifest, config.input)
            if len(files) == 1:
                check_subject(files[0], table)  # a mistake there leaves nothing behind
    locate = None if is_store else make_locate(config.template, config.registration)
    log = begin(folder)
    overlaps: dict[str, float] = {}
    failed = 0
    if store is None and table is not None:
        if files is None:
            log.say(f"Drawing {config.data.synthetic} phantom heads.")
            files = list_subjects(write_small_heads(folder.path / "inputs" / "heads", 0, config.data.synthetic), None)
        if not config.template:
            log.say("Note: no --template: coordinates are those of an ellipsoid of a head's size, good to about 1 cm.")
        store, overlaps, failed = make_store(folder, files, table, locate, log)
    assert store is not None
    clock.lap("make the store")
    images = () if config.store else tuple(_draw_images(config, folder, store, log))
    clock.lap("draw images")
    megabytes = sum(path.stat().st_size for path in store.path.rglob("*.npy")) / 1e6
    summary = Summary(
        subjects=len(store),
        failed=failed,
        classes=len(store.table.classes),
        shape=store.shape,
        modalities=MODALITIES[: store.channels],
        sizes=megabytes,
        overlaps=overlaps,
        images=images,
    )
    finish(folder, config, summary, clock, page)
    return int(failed > 0)


def _draw_images(config: Config, folder: RunFolder, store: SubjectStore, log: Log):
    """Draw images and write them; yield how."""
    shape = config.generator.shape
    generator = config.generator
    if generator.samples == 1:
        generator = dataclasses.replace(generator, samples=2, mild_samples=1)  # one program for both severities
    draw = jax.jit(partial(generate, config=generator))
    describe = jax.jit(lambda key, subject: (draw_of(key, subject, generator), folded_share(key, subject, generator)))
    log.say(f"Compiling the generator for {' x '.join(map(str, shape))} voxels.")
    affine = centred_affine(shape, [1.0] * 3)
    total = min(config.subjects, len(store))
    with log.progress("Drawing", total * config.images, "images") as update:
        for row in range(total):
            subject = store[row]
            for number in range(config.images):
                key = jax.random.fold_in(jax.random.key(config.seed), row * config.images + number)
                name = f"{store.names[row]}_{number}"
                images, targets = draw(key, subject)
                maps = {"image": images[-1]}
                if number == 0:
                    own = {kind: targets[kind][-1] for kind in ("bias_field_log", "high_res_residual")}
                    maps |= {"mild_image": images[0], **targets, **own}
                _write(folder.outputs / "images", name, affine, maps)
                drawn, folded = describe(key, subject)
                source = int(drawn.source)
                spacing = np.asarray(drawn.acquisition.resolution, float) * generator.resolution.voxel
                x, y, z = np.round(spacing, 2).tolist()
                yield DrawnImage(
                    name=name,
                    subject=store.names[row],
                    source="synthetic" if source == SYNTHETIC else MODALITIES[source],
                    resolution=(x, y, z),
                    is_photo=bool(drawn.photo.is_on),
                    is_flipped=bool(drawn.is_flipped),
                    folded=float(folded),
                )
                update(row * config.images + number + 1)


def _write(place: Path, name: str, affine: np.ndarray, maps: dict[str, Any]) -> None:
    for kind, (definition, unit) in DEFINITIONS.items():
        if kind not in maps:
            continue
        array = np.asarray(maps[kind])
        array = array.astype(np.uint8) if kind == "segmentation" else array.astype(np.float32)
        array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
        write_map(place, f"{name}_{kind}", Volume.make(array, affine), definition, unit, {})


def page(run: Finished[Config, Summary]) -> Page:
    """Show contrasts, severities, targets, and the subjects."""
    summary, place = run.summary, run.outputs / "images"
    sections = []
    for subject in dict.fromkeys(image.subject for image in summary.images):
        sections.append(_images_section(place, [one for one in summary.images if one.subject == subject]))
    if summary.images:
        sections.insert(1, _severity_section(place, summary.images[0].name))
        sections.insert(2, _targets_section(run, place, summary.images[0].name))
    sections.append(_store_section(run))
    tiles = [
        ("Subjects", summary.subjects, f"{summary.sizes:.0f} MB in the store"),
        ("Classes", summary.classes, run.config.table),
        ("Images", len(summary.images), " x ".join(map(str, run.config.generator.shape)) + " voxels of 1 mm"),
    ]
    subtitle = "Images drawn from label maps and scans, with what a network is to say of them"
    return Page("Brain images for training", subtitle, tiles, sections)


def _images_section(place: Path, images: list[DrawnImage]) -> Section:
    caption = "Images of this subject, drawn from its labels or scans, and the spacing in mm at which each was taken."
    files = {_title(one): place / f"{one.name}_image.nii.gz" for one in images}
    units = ["x".join(f"{step:.2g}" for step in one.resolution) for one in images]
    rows = [
        (_title(one), unit, "yes" if one.is_flipped else "no", f"{one.folded:.2%}")
        for one, unit in zip(images, units, strict=True)
    ]
    columns = ("image", "spacing (mm)", "left and right exchanged", "folded")
    told = "Folded is the share of voxels at which the deformation turns space inside out."
    blocks = [_gallery(files, caption, units), Table(columns, rows, told)]
    return Section(f"Contrasts: {images[0].subject}", blocks)


def _title(one: DrawnImage) -> str:
    number = one.name.rsplit("_", 1)[1]
    kind = "drawn" if one.source == "synthetic" else one.source
    return f"{number}: {'slabs' if one.is_photo else kind}"


def _severity_section(place: Path, name: str) -> Section:
    caption = "Two images of one subject with one deformation: mild and severe bias, gamma and noise."
    files = {word: place / f"{name}_{kind}.nii.gz" for word, kind in (("mild", "mild_image"), ("severe", "image"))}
    return Section("Severities", [_gallery(files, caption)])


def _gallery(files: dict[str, Path], caption: str, units: Sequence[str] = ()) -> Figure:
    maps = {title: read_map(path).array for title, path in files.items()}
    styles = [MapStyle(unit, (0, 1), "gray") for unit in units or [""] * len(maps)]
    return _show(maps, dict(zip(maps, styles, strict=True)), caption)


def _show(maps: dict[str, np.ndarray], styles: dict[str, MapStyle], caption: str) -> Figure:
    everywhere = np.ones(next(iter(maps.values())).shape, bool)
    spacing = (1.0, 1.0, 1.0)
    return slice_maps(maps, spacing, caption=caption, styles=styles, mask=everywhere, num_slices=SHOWN_SLICES)


def _targets_section(run: Finished[Config, Summary], place: Path, name: str) -> Section:
    maps, styles = {}, {}
    is_empty = {"T1": "T1" not in run.summary.modalities, "pathology": not run.config.generator.pathology.probability}
    for kind, title, channel, style in TARGETS:
        path = place / f"{name}_{kind}.nii.gz"
        if is_empty.get(kind, False) or not path.exists():
            continue
        array = read_map(path).array
        if array.ndim == 4 and (channel is None or channel >= array.shape[-1]):
            continue
        maps[title] = array[..., channel] if array.ndim == 4 else array
        styles[title] = style
    figure = _show(maps, styles, f"What a network is to say of image 0 of the first subject ({name}).")
    return Section("Targets", [figure])


def _store_section(run: Finished[Config, Summary]) -> Section:
    summary = run.summary
    blocks: list[Block] = []
    if summary.failed:
        blocks.append(Note(f"{summary.failed} subjects could not be read: outputs/failed.csv", "warning"))
    if summary.overlaps:
        rows = [(name, overlap) for name, overlap in summary.overlaps.items()]
        caption = "Overlap of grey and white matter with the template after affine alignment; 1 is perfect."
        blocks.append(Table(("Subject", "Overlap"), rows, caption))
    grid = " x ".join(map(str, summary.shape))
    scans = ", ".join(summary.modalities) or "none"
    blocks.append(Text([f"The store pads every subject to {grid} voxels of 1 mm. Scans: {scans}."]))
    return Section("Subjects", blocks)

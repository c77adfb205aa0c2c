"""Test every sentence of arXiv:2509.00549's abstract that can be tested on the data there is.

`jaxmed brainfm train --preset laptop` learns from label maps of heads (2 mm, 64^3) but one, twice: from images of
contrasts drawn anew every time, and from images of one contrast, like T1w; all else is the same. Both are scored on the
head that was left out, in images drawn with other keys: in contrasts that were never drawn, and in contrasts like T1w,
T2w and FLAIR. The Dice of a structure counts both sides as one; that of every side for itself stands beside it.

Two ablations at a smaller size, several seeds each: images of one deformed head from mild to severe (two a step, one
mild) against severe ones alone, on the label maps; and images that are mixed with real scans against none that are, on
two real T1w scans with their tissues, each in turn left out.

What counts as "holds" was fixed before the first run: an interval of 95 % that lies above 0. Intervals are Student's,
over images of the left-out head for the two networks of the laptop, over seeds (and left-out heads) for ablations. A
task is done where the network beats the best constant. Nothing is tuned until it holds.

The table goes to benchmarks/results/reproduce_brainfm.md, the figures to reproduce_brainfm.json beside it. With --work
the runs are kept, and one that was killed goes on; --store takes a store of the label maps that is there already.

    JAXMED_DATA=/path/to/data python benchmarks/reproduce_brainfm.py --size cpu
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxmed.cli import main as jaxmed
from jaxmed.data.subject_store import SubjectStore, open_store
from jaxmed.files import read_record, write_json, write_text
from jaxmed.io import nifti
from jaxmed.io.tables import write_table
from jaxmed.metrics.imaging import dice
from jaxmed.metrics.statistics import mean_interval
from jaxmed.models.published.load import load_published
from jaxmed.models.unet_brain import BrainUnet, BrainUnetConfig
from jaxmed.nn.model import make_model
from jaxmed.synthesis.bias_field import BiasFieldConfig
from jaxmed.synthesis.brain_draws import GeneratorConfig, Severity
from jaxmed.synthesis.contrast import ContrastConfig
from jaxmed.synthesis.deformation import DeformationConfig
from jaxmed.synthesis.resolution import ResolutionConfig
from jaxmed.systems.brainfm.stages import train
from jaxmed.systems.brainfm.training import OF_SAMPLE, Grid, draw, measures
from jaxmed.versions import software_versions
from jaxmed.volume import Volume

ROOT = Path(__file__).resolve().parents[1]
DRAWS = 77_000_000  # seed of the images that are scored; training's is the run's own
LEAST = 30  # voxels of a structure in an image for its Dice to count
# Generation labels by what they look like, and the structures that are scored, both sides as one.
LOOKS = {
    "white": (2, 7, 16, 28, 77, 85), "grey": (3, 8, 11, 12, 17, 18, 26), "pale": (10, 13),
    "fluid": (4, 5, 14, 15, 24, 72),
}  # fmt: skip
STRUCTURES = {
    "cerebral white matter": (2, 41), "cerebral cortex": (3, 42), "ventricles": (4, 5, 43, 44), "thalamus": (10, 49),
    "caudate": (11, 50), "putamen": (12, 51), "cerebellum": (7, 8, 46, 47), "brainstem": (16,),
}  # fmt: skip
LEFT = tuple(label for labels in STRUCTURES.values() for label in labels if 0 < label < 40 and label != 16)
TISSUES = {
    "white matter": (2, 41, 7, 46, 16, 28, 60),
    "grey matter": (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58),
}
OUTSIDE = (30, *range(32, 45))  # vessels, and what lies outside of the brain


def contrast(white: float, grey: float, pale: float, fluid: float, *, turned: bool = False) -> ContrastConfig:
    """Return one contrast for all images: means of tissues, a black background, and a head that differs all over."""
    values = dict(zip(LOOKS, (white, grey, pale, fluid), strict=True))
    means = [(0, 0.0)] + [(label, values[look]) for look, labels in LOOKS.items() for label in labels]
    outside = [(label, 20.0 + 53 * number % 190) for number, label in enumerate(OUTSIDE)]
    means += [(label, 230.0 - value if turned else value) for label, value in outside]
    return ContrastConfig(means=tuple(means))


T1 = contrast(180, 115, 150, 35)
CONTRASTS = {
    "never drawn": ContrastConfig(),
    "like T1w": T1,
    "like T2w": contrast(80, 120, 95, 215, turned=True),
    "like FLAIR": contrast(100, 140, 115, 30, turned=True),
}
AS_IT_IS = dict(
    read=(1.0, 0.0, 0.0, 0.0), flip=0.0, mix=0.0, samples=1, mild_samples=0, real_noise=(0.0, 0.0),
    deformation=DeformationConfig(rotation=0.0, shear=0.0, scaling=0.0, amplitude=0.0),
    severe=Severity(BiasFieldConfig(std=(0.0, 0.0)), gamma=0.0, noise=(0.0, 0.0)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        preset: Of train.
        steps: Of each of the two networks of the laptop.
        draws: Images of the left-out head in each contrast.
        small_steps: Of a network of the ablations.
        seeds: Repetitions of each.
        small_draws: Images that each of them is scored on.
        edge: Voxels of their images along each axis.
    """

    preset: str
    steps: int
    draws: int
    small_steps: int
    seeds: int
    small_draws: int
    edge: int = 32


SIZES = {"smoke": Size("smoke", 4, 2, 3, 2, 2, 16), "cpu": Size("laptop", 2800, 24, 300, 3, 16)}
ARMS = {
    "mild to severe": {"severe alone": (2, 0, 0.2), "mild to severe": (2, 1, 0.2)},
    "mix-up": {"no mix-up": (1, 0, 0.0), "mix-up": (1, 0, 0.2)},
}
"""By ablation, baseline first: images of a head in a step, how many are mild, probability of a mixture."""


class Row(NamedTuple):
    """What one image tells of a network.

    Attributes:
        study: "laptop", or an ablation.
        arm: How the network was trained.
        seed: Of it.
        head: That was left out.
        contrast: Of the image, or its severity.
        image: Its number.
        values: By measure; NaN where an image does not tell.
    """

    study: str
    arm: str
    seed: int
    head: str
    contrast: str
    image: int
    values: dict[str, float]


class Effect(NamedTuple):
    """A mean, or a mean of paired differences, with its interval."""

    estimate: float
    low: float
    high: float
    count: int

    def told(self) -> str:
        """Say it."""
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def main(
    size: Literal["smoke", "cpu"] = "smoke", out: Path = ROOT / "benchmarks" / "results", work: Path | None = None,
    store: Path | None = None, only: Literal["all", "laptop", "ablations"] = "all",
) -> None:  # fmt: skip
    """Train, score, write the table.

    Args:
        size: "smoke" only shows that everything runs, on phantom heads.
        out: Folder of the table and the figures.
        work: Folder in which the runs are kept; a temporary one by default.
        store: A store of the label maps, made by `jaxmed brainfm generate`; it is made by default.
        only: Which part is run; of the other one, the figures are kept that `out` has of the same size.
    """
    load, settings = os.getloadavg()[0], SIZES[size]
    kept, seconds = ([], 0.0) if only == "all" else earlier(out / "reproduce_brainfm.json", settings, only)
    data = Path(os.environ.get("JAXMED_DATA", ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if work is None else work
        heads = store or make_heads(size, data, place)
        scans = heads if size == "smoke" else make_scans(data, place)
        rows = kept + ([] if only == "ablations" else laptop(settings, heads, scans, place))
        rows += [] if only == "laptop" else ablations(settings, heads, scans, place)
        seconds += spent(place)
    page = render(rows, settings, size, seconds, load)
    print(page)
    write_text(out / "reproduce_brainfm.md", page)
    figures = {"size": size, "seconds": seconds, "load": load, "versions": software_versions(),
               "settings": dataclasses.asdict(settings), "rows": [recorded(row) for row in rows]}  # fmt: skip
    write_json(out / "reproduce_brainfm.json", figures)


def earlier(path: Path, settings: Size, only: str) -> tuple[list[Row], float]:
    """Return what an earlier run of the same settings found in the part that is not run now, and its seconds."""
    if not path.exists() or (found := read_record(path))["settings"] != dataclasses.asdict(settings):
        return [], 0.0
    rows = [Row(**row) for row in found["rows"] if (row["study"] == "laptop") == (only == "ablations")]
    return rows, found["seconds"] if rows else 0.0


def recorded(row: Row) -> dict[str, Any]:
    """Return a row for JSON, which has no word for what an image does not tell."""
    return row._asdict() | {"values": {name: value for name, value in row.values.items() if np.isfinite(value)}}


# Subjects ------------------------------------------------------------------------------------------------------------


def make_heads(size: str, data: Path, place: Path) -> Path:
    """Make a store of the label maps, or of phantom heads at smoke size."""
    words: list[object] = ["--preset", "smoke", "--store"]
    if size != "smoke":
        template = [data / "brain_icbm152" / f"mni_icbm152_{kind}_tal_nlin_sym_09a.nii.gz" for kind in ("gm", "wm")]
        words = ["--preset", "paper", "--store", "--input", data / "brain_labelmaps", "--template", *template]
    return run("generate", place / "heads", words)


def make_scans(data: Path, place: Path) -> Path:
    """Make a store of two real T1w scans whose labels are the tissues of their maps: white, grey, and fluid."""
    template, tissue = data / "brain_icbm152", data / "brain_t1_tissue"
    files = {
        "template": [template / f"mni_icbm152_{kind}_tal_nlin_sym_09a.nii.gz" for kind in ("t1", "gm", "wm")],
        "adult": [tissue / f"{name}.nii.gz" for name in ("t1_brain", "pve_gm", "pve_wm")],
    }
    folder, rows = place / "tissues", []
    folder.mkdir(parents=True, exist_ok=True)
    for name, paths in files.items():
        if not (folder / f"{name}.nii.gz").exists():
            scan, grey, white = (nifti.read(path) for path in paths)
            nifti.write(folder / f"{name}.nii.gz", Volume.make(tissues(scan, grey, white), scan.affine))
        rows.append({"path": folder / f"{name}.nii.gz", "subject": name, "T1": paths[0]})
    names = {0: "background", 2: "white matter", 3: "grey matter", 24: "fluid"}
    if not (folder / "table.csv").exists():  # a run that goes on refuses files that are newer than itself
        write_table(folder / "manifest.csv", ("path", "subject", "T1"), rows)
        named = [{"label": label, "name": name} for label, name in names.items()]
        write_table(folder / "table.csv", ("label", "name"), named)
    words = ["--preset", "paper", "--store", "--data.manifest", folder / "manifest.csv"]
    return run("generate", place / "scans", [*words, "--table", folder / "table.csv"])


def tissues(scan: Volume, grey: Volume, white: Volume) -> np.ndarray:
    """Return the label of the tissue with the largest share in every voxel of the brain; fluid is what is left."""
    shares = np.stack([white.array, grey.array, 255.0 - white.array - grey.array])
    labels = np.array([2, 3, 24], np.int16)[shares.argmax(0)]
    return np.where(scan.array > 0, labels, 0).astype(np.int16)


# Networks ------------------------------------------------------------------------------------------------------------


def laptop(size: Size, heads: Path, scans: Path, place: Path) -> list[Row]:
    """Train on contrasts drawn anew, and on one; score both on the last head, and on real scans."""
    store, rows = open_store(heads), []
    left_out = store.names[-1]
    fixed = [word for pair in T1.means for word in pair]
    for arm, words in {"random": [], "one contrast": ["--generator.contrast.means", *fixed]}.items():
        place_of = place / f"laptop-{arm.replace(' ', '-')}"
        words = ["--loop.steps", size.steps, "--loop.evaluate-every", 0, "--draws", 1, *words]
        run("train", place_of, ["--preset", size.preset, *of(heads, left_out), *words])
        config = train.laptop() if size.preset == "laptop" else train.smoke()
        for name, kind in CONTRASTS.items():
            generator = dataclasses.replace(config.generator, contrast=kind)
            found = score(place_of, store, left_out, config.grid, generator, size.draws)
            rows += [Row("laptop", arm, 0, left_out, name, number, values) for number, values in enumerate(found)]
        resolution = dataclasses.replace(config.generator.resolution, fine_only=True)
        generator = dataclasses.replace(config.generator, resolution=resolution, **AS_IT_IS)
        real = open_store(scans)
        for head in real.names:
            found = score(place_of, real, head, config.grid, generator, 1)
            rows += [Row("laptop", arm, 0, head, "real T1w", 0, found[0])]
    return rows


def ablations(size: Size, heads: Path, scans: Path, place: Path) -> list[Row]:
    """Train and score every arm of both ablations with every seed."""
    rows, config = [], small(size)
    for study, arms in ARMS.items():
        store = open_store(heads if study == "mild to severe" else scans)
        for left_out in store.names[-1:] if study == "mild to severe" else store.names[:2]:
            for arm, (samples, mild, mix) in arms.items():
                for seed in range(size.seeds):
                    out = place / f"{arm.replace(' ', '-')}-{left_out}-{seed}"
                    words = ["--preset", "smoke", *small_words(size), *of(store.path, left_out), "--seed", seed]
                    words += ["--generator.samples", samples, "--generator.mild-samples", mild, "--generator.mix", mix]
                    run("train", out, words)
                    for name, generator in looks(config, study).items():
                        found = score(out, store, left_out, config.grid, generator, size.small_draws)
                        rows += [Row(study, arm, seed, left_out, name, n, values) for n, values in enumerate(found)]
    return rows


def looks(config: train.Config, study: str) -> dict[str, GeneratorConfig]:
    """Return the generators of the images that an ablation is scored on."""
    plain = dataclasses.replace(config.generator, samples=1, read=(0.0, 0.0, 0.0, 0.0), mix=0.0)
    if study == "mild to severe":
        return {"severe": plain, "mild": dataclasses.replace(plain, mild_samples=1)}
    real = {name: value for name, value in AS_IT_IS.items() if name in ("read", "mix", "samples", "mild_samples")}
    return {"synthetic": plain, "real T1w": dataclasses.replace(plain, **real)}


def small(size: Size) -> train.Config:
    """Return the configuration of the ablations' networks, of which `small_words` are the words."""
    config = train.smoke()
    deformation = dataclasses.replace(config.generator.deformation, rotation=15.0, scaling=0.15, amplitude=1.0)
    resolution = ResolutionConfig(photo_probability=0.0, voxel=4.0)
    generator = dataclasses.replace(config.generator, shape=(size.edge,) * 3, deformation=deformation,
                                    resolution=resolution)  # fmt: skip
    return dataclasses.replace(config, generator=generator, grid=Grid(4, size.edge + 8))


def small_words(size: Size) -> list[object]:
    """Return the options of the ablations' networks, over the preset smoke."""
    words: list[object] = ["--generator.shape", *(size.edge,) * 3, "--generator.deformation.rotation", 15.0]
    words += ["--generator.deformation.scaling", 0.15, "--generator.resolution.voxel", 4.0]
    words += ["--grid.step", 4, "--grid.window", size.edge + 8, "--model.width", 16, "--model.levels", 3]
    words += ["--model.no-unit-features", "--loss.cross-entropy", 35.0, "--loss.distance", 0.05]
    return [*words, "--loop.steps", size.small_steps, "--loop.log-every", 10]


def of(store: Path, left_out: str) -> list[object]:
    """Return the words for training on a store but for one head."""
    return ["--data.store", store, "--data.held-out", left_out, "--data.synthetic", 0]


def run(stage: str, out: Path, words: Sequence[object]) -> Path:
    """Run a stage, or find it done; return its store where it makes one, else the run."""
    arguments = ["brainfm", stage, "--quiet", "--out", str(out), *map(str, words)]
    print(f"jaxmed {' '.join(arguments)}", flush=True)
    if code := jaxmed(arguments):
        raise SystemExit(code)
    return out / "outputs" / "store" if stage == "generate" else out


def spent(place: Path) -> float:
    """Return the seconds of all runs, as they tell them: this may be the end of several commands."""
    files = place.glob("*/timing.json")
    return float(sum(sum(read_record(path)["seconds"].values()) for path in files))


# Scores --------------------------------------------------------------------------------------------------------------


def score(
    place: Path, store: SubjectStore, head: str, grid: Grid, generator: GeneratorConfig, count: int
) -> list[dict[str, float]]:
    """Return the measures of a network on images of a head.

    Args:
        place: Of the network's run.
        store: With the head.
        head: Its name.
        grid: Of the network's training.
        generator: Of the images.
        count: How many.
    """
    published = load_published(place)
    config, own = published.config, tuple(row.label for row in store.table.classes)
    subject = dataclasses.replace(store, step=grid.step)[store.names.index(head)]
    fields = grid(subject, np.random.default_rng(0))
    rows = []
    for number in range(count):
        key = jax.random.fold_in(jax.random.key(DRAWS), number)
        image, targets = drawer(generator, len(own))(key, fields)
        values, found = jax.device_get(measurer(config, own == config.labels)(published.params, image, targets))
        labels = np.array(config.labels)[found], np.array(own)[targets["segmentation"]]
        values = {name: float(value) for name, value in values.items()}
        rows.append(values | (scores_of(*labels) if own == config.labels else tissue_scores(*labels)))
    return rows


@functools.cache
def drawer(generator: GeneratorConfig, classes: int) -> Callable[..., Any]:
    """Return the compiled generator of one image and its targets: images are the same for every network."""

    @jax.jit
    def one(key: jax.Array, fields: Mapping[str, jax.Array]) -> Any:
        images, targets = draw(key, fields, generator, range(classes))
        return images[0], targets | {name: targets[name][0] for name in OF_SAMPLE}

    return one


@functools.cache
def measurer(config: BrainUnetConfig, is_same: bool) -> Callable[..., Any]:
    """Return the compiled function from a network's parameters, an image and targets to measures and its classes."""
    network = make_model(BrainUnet(config))

    @jax.jit
    def one(params: Any, image: jax.Array, targets: Mapping[str, jax.Array]) -> Any:
        maps = {name: value[0] for name, value in network.apply(params, image[None]).items()}
        values = {**measures(config, maps, targets), **constants(targets)} if is_same else {}
        return values, maps["segmentation"].argmax(-1)

    return one


def constants(targets: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the errors of the best constants: a bias of 0, the mean place, the median distance."""
    inside = 1.0 - targets["background"]
    head = jnp.maximum(inside.sum(), 1)
    found = {"bias_of_constant": jnp.sum(jnp.abs(targets["bias_field_log"])[..., 0] * inside) / head}
    if "registration" in targets:
        middle = (targets["registration"] * inside[..., None]).sum((0, 1, 2)) / head
        error = 100 * jnp.linalg.norm(targets["registration"] - middle, axis=-1)
        found["coordinate_of_constant"] = jnp.sum(error * inside) / head
    if "distance" in targets:
        middle = jnp.median(targets["distance"], axis=(0, 1, 2))
        found["distance_of_constant"] = jnp.mean(jnp.abs(targets["distance"] - middle))
    return found


def scores_of(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the Dice of every structure that an image shows, their mean, and that of every side for itself."""
    values = {f"dice {name}": overlap(found, truth, labels) for name, labels in STRUCTURES.items()}
    sides = [overlap(found, truth, [label for label in labels if (label in LEFT) == is_left])
             for labels in STRUCTURES.values() for is_left in (True, False)]  # fmt: skip
    return values | {"dice": _mean(values.values()), "dice of sides": _mean(sides)}


def tissue_scores(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the Dice of tissues, where a truth tells white from grey matter alone."""
    values = {f"dice {name}": overlap(found, truth, labels) for name, labels in TISSUES.items()}
    return values | {"dice": _mean(values.values())}


def overlap(found: np.ndarray, truth: np.ndarray, labels: Sequence[int]) -> float:
    """Return the Dice of some labels together; NaN where the truth shows less than a few voxels of them."""
    mask = np.isin(truth, labels)
    return dice(mask, np.isin(found, labels)) if mask.sum() >= LEAST else float("nan")


def _mean(values: Any) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


# Claims --------------------------------------------------------------------------------------------------------------


def effect(values: Sequence[float]) -> Effect:
    """Return a mean with Student's interval over the values that are numbers."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) < 2:
        return Effect(float(known[0]) if len(known) else float("nan"), float("nan"), float("nan"), len(known))
    found = mean_interval(known)
    return Effect(found.estimate, found.low, found.high, len(known))


def paired(rows: Sequence[Row], study: str, arm: str, baseline: str, contrast: str, measure: str) -> Effect:
    """Return how an arm differs from the baseline in images of a contrast.

    Images pair for the two networks of the laptop. Of ablations, whose networks differ by seed too, the means over
    images pair, by seed and left-out head.
    """
    found: dict[str, dict[Any, list[float]]] = {arm: {}, baseline: {}}
    for row in rows:
        if row.study == study and row.contrast == contrast and row.arm in found:
            pair = (row.head, row.image) if study == "laptop" else (row.head, row.seed)
            found[row.arm].setdefault(pair, []).append(row.values.get(measure, float("nan")))
    return effect([_mean(found[arm][pair]) - _mean(found[baseline][pair]) for pair in found[arm]])


def level(rows: Sequence[Row], study: str, arm: str, contrast: str, measure: str) -> Effect:
    """Return the mean of a measure over the images of a contrast."""
    kept = [row for row in rows if (row.study, row.arm, row.contrast) == (study, arm, contrast)]
    return effect([row.values.get(measure, float("nan")) for row in kept])


def own_against_others(rows: Sequence[Row]) -> Effect:
    """Return by how much the network of one contrast does better in it than in contrasts that were never drawn."""
    own = {row.image: row.values["dice"] for row in _laptop(rows, "one contrast", "like T1w")}
    other = {row.image: row.values["dice"] for row in _laptop(rows, "one contrast", "never drawn")}
    return effect([own[image] - other[image] for image in own])


def _laptop(rows: Sequence[Row], arm: str, contrast: str) -> Iterator[Row]:
    return (row for row in rows if (row.study, row.arm, row.contrast) == ("laptop", arm, contrast))


TASKS = {
    "distance (mm)": ("distance_mm", "distance_of_constant"),
    "bias field (log)": ("bias_error", "bias_of_constant"),
    "coordinates (mm)": ("coordinate_mm", "coordinate_of_constant"),
}


def gains(rows: Sequence[Row]) -> dict[str, Effect]:
    """Return by how much the network of drawn contrasts beats the best constant in each task but segmentation."""
    kept = [*_laptop(rows, "random", "never drawn")]
    return {name: effect([row.values.get(constant, np.nan) - row.values.get(own, np.nan) for row in kept])
            for name, (own, constant) in TASKS.items()}  # fmt: skip


def judge(effects: Sequence[Effect]) -> str:
    """Turn intervals into a verdict: each that lies above 0 counts for the sentence."""
    known = [one for one in effects if one.count > 1]
    if not known:
        return "cannot be tested here"
    right = sum(one.low > 0 for one in known)
    return "holds" if right == len(known) else "does not hold" if not right else f"holds in {right} of {len(known)}"


def claims(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return sentence, verdict and our figure of every sentence of the abstract."""
    alone = own_against_others(rows)
    unseen = {name: paired(rows, "laptop", "random", "one contrast", name, "dice")
              for name in ("never drawn", "like T2w", "like FLAIR")}  # fmt: skip
    mild = {name: paired(rows, "mild to severe", "mild to severe", "severe alone", name, "dice")
            for name in ("severe", "mild")}  # fmt: skip
    mixed = {name: paired(rows, "mix-up", "mix-up", "no mix-up", name, "dice") for name in ("synthetic", "real T1w")}
    done = gains(rows)

    def listed(what: str, effects: Mapping[str, Effect]) -> str:
        known = [f"{what} {name}: {one.told()}" for name, one in effects.items() if one.count > 1]
        return "<br>".join(known) or "no figure"

    return [
        ("approaches [...] struggle to generalize in uncalibrated modalities, where performance is highly sensitive to "
         "the differences in MR contrast [a network of one contrast: Dice in it less Dice in others]",
         judge([alone]), alone.told() if alone.count else "no figure"),
        ("[sensitive to] resolution, and orientation", "cannot be tested here",
         "what degraded scans change is told by `jaxmed brainfm predict --robustness`"),
        ("With the proposed \"mild-to-severe\" intra-subject generation [...] BrainFM is resilient to the appearance "
         "[mild-to-severe less severe alone]", judge([*mild.values()]), listed("Dice,", mild)),
        ("and \"real-synth\" mix-up training strategy [with less without]", judge([*mixed.values()]),
         listed("Dice,", mixed)),
        ("BrainFM is resilient to the appearance of acquired images (e.g., modality, contrast, deformation, "
         "resolution, artifacts) [drawn contrasts less one contrast; images are deformed, of many resolutions, biased "
         "and noisy]", judge([*unseen.values()]), listed("Dice,", unseen)),
        ("can be directly applied to anatomy segmentation, scalp-to-cortical distance, bias field estimation, and "
         "registration [constant less network]", judge([*done.values()]), listed("error,", done)),
        ("[and] image synthesis for CT and T1w/T2w/FLAIR MRI", "cannot be tested here",
         "no scans of several modalities come with label maps here"),
        ("We evaluate the efficacy of BrainFM on eleven public datasets", "cannot be tested here",
         "they were not at hand; nor were the weights"),
    ]  # fmt: skip


# The table -----------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], settings: Size, size: str, seconds: float, load: float) -> str:
    """Return the tables in Markdown."""
    lines = [
        "# arXiv:2509.00549 (BrainFM): sentences of the abstract, tested", "",
        f"`python benchmarks/reproduce_brainfm.py --size {size}`, {seconds / 60:.0f} minutes of training on CPU cores "
        f"that others used too (load {load:.1f} at the end). Networks of the preset {settings.preset}: "
        f"{settings.steps:,} steps of one image; of the ablations: {settings.small_steps} steps, {settings.seeds} "
        f"seeds, {settings.edge}^3 voxels of 4 mm. Differences are in Dice, mean over structures, unless stated; "
        "intervals are Student's 95 %, over images of the left-out head, over seeds (and heads) for the ablations.", "",
        "| sentence | verdict | our figure | published |", "|---|---|---|---|",
        *(f"| {text} | {verdict} | {figure} | no figure |" for text, verdict, figure in claims(rows)), "",
    ]  # fmt: skip
    arms = [arm for arm in ("random", "one contrast") if any(row.arm == arm for row in rows)]
    if arms:
        kinds = [*CONTRASTS, "real T1w"]
        lines += ["Dice by contrast of the images, mean over structures of the head that was left out (in a real T1w "
                  "scan: of white and grey matter as its own maps have them); in brackets: every side for itself.", "",
                  f"| trained on | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]  # fmt: skip
        for arm in arms:
            cells = []
            for kind in kinds:
                both, sides = (level(rows, "laptop", arm, kind, name) for name in ("dice", "dice of sides"))
                cells.append(f"{both.estimate:.3f}" + (f" ({sides.estimate:.3f})" if sides.count else ""))
            lines.append(f"| {arm} contrasts | {' | '.join(cells)} |".replace("one contrast contrasts", "one contrast"))
        lines += ["", "Dice by structure in contrasts that were never drawn:", "",
                  f"| trained on | {' | '.join(STRUCTURES)} |", "|---|" + "---|" * len(STRUCTURES)]  # fmt: skip
        for arm in arms:
            found = [level(rows, "laptop", arm, "never drawn", f"dice {name}").estimate for name in STRUCTURES]
            lines.append(f"| {arm} | {' | '.join(f'{value:.3f}' for value in found)} |")
        lines += ["", "Errors of the other tasks in the same images, and of the best constant:", "",
                  "| task | random contrasts | one contrast | best constant |", "|---|---|---|---|"]  # fmt: skip
        for name, (own, constant) in TASKS.items():
            cells = [level(rows, "laptop", arm, "never drawn", own).estimate for arm in ("random", "one contrast")]
            cells.append(level(rows, "laptop", "random", "never drawn", constant).estimate)
            lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in cells)} |")
        lines.append("")
    if any(row.study in ARMS for row in rows):
        lines += ["Ablations, arm less baseline, paired by seed and left-out head:", "",
                  "| ablation | images | measure | baseline | difference | pairs |", "|---|---|---|---|---|---|",
                  *_ablations(rows), ""]  # fmt: skip
    return "\n".join(lines)


def _ablations(rows: Sequence[Row]) -> Iterator[str]:
    for study, (baseline, arm) in ARMS.items():
        kinds = dict.fromkeys(row.contrast for row in rows if row.study == study)
        for kind in kinds:
            for measure in ("dice", "distance_mm", "coordinate_mm", "bias_error", "T1_error"):
                base = level(rows, study, baseline, kind, measure)
                found = paired(rows, study, arm, baseline, kind, measure)
                if found.count > 1:
                    cells = (study, kind, measure, f"{base.estimate:.3f}", found.told(), found.count)
                    yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    tyro.cli(main)

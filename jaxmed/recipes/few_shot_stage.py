"""What the stages of few-shot segmentation share: their cases, read or made up, and pictures of masks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.config import Seed, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.tasks import Cases, TaskData, choose_task, read_manifest, read_splits
from jaxmed.io.numpy_files import write_npz
from jaxmed.metrics.imaging import dice
from jaxmed.recipes.stage import begin, nested_run
from jaxmed.recipes.training import NO_PREFIX
from jaxmed.report.masks import Panel, mask_panels, plane
from jaxmed.report.page import Figure
from jaxmed.synthesis.phantoms.write_puzzles import Counts, write_puzzle_cohort
from jaxmed.train.run_folder import RunFolder

SHOWN = 8
Failures: TypeAlias = tuple[dict[str, str], ...]
"""Path, id and reason of the records that could not be used."""


@dataclasses.dataclass(frozen=True)
@checked
class TaskInputs:
    """Cases, and the networks that see them.

    Attributes:
        data: Cases of familiar tasks (splits train and validation), or of a new one (support and test).
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        weights: The networks: a run of the stage that trained them on familiar tasks.
        preprocess: How files become images; read from the weights where it is left alone.
        fill: Intensity of voxels that have none (NaN, Inf, fill values such as -3.4e38); without it they are refused.
        seed: Seed of all that is drawn; the first of several.
    """

    data: TaskData = TaskData()
    series: str = ""
    weights: Path | None = None
    preprocess: Preprocess | None = None
    fill: float | None = None
    seed: Seed = 0

    def read(
        self, preprocess: Preprocess, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> tuple[dict[str, Cases], Failures]:
        """Read the cases of splits; see `read_splits`."""
        return read_splits(self.data, preprocess, required, optional, self.seed, self.series, self.fill)


# The type of a stage's field `inputs`: on the command line its options carry no prefix.
TaskFlags: TypeAlias = Annotated[TaskInputs, NO_PREFIX]


class NewTask(NamedTuple):
    """Cases of a task that is to be learnt from a few labels.

    Attributes:
        name: The task.
        support: Its labelled images.
        test: Its test images; None where the manifest has none.
        training: Cases of familiar tasks; None where they were not asked for, or the manifest has none.
        failed: Records that could not be used.
    """

    name: str
    support: Cases
    test: Cases | None
    training: Cases | None
    failed: Failures


def read_new_task(
    inputs: TaskInputs, preprocess: Preprocess, name: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> NewTask:
    """Read the cases of one new task, and of familiar ones; the arguments as for `TaskInputs.read` and `choose_task`.

    Raises:
        InputError: For whatever is wrong with the manifest or its files.
    """
    cases, failed = inputs.read(preprocess, required, optional)
    support, name = choose_task(cases["support"], name)
    test = choose_task(cases["test"], name)[0] if "test" in cases else None
    return NewTask(name, support, test, cases.get("train"), failed)


def synthetic_inputs(
    inputs: TaskInputs,
    folder: RunFolder,
    train: str,
    why: str,
    tiny: Preprocess,
    preprocess_of: Callable[[Path], Preprocess],
) -> TaskInputs:
    """Write puzzles where there is no manifest, and train networks on puzzles where there are no weights.

    Args:
        inputs: What there is; nothing is made where it asks for nothing synthetic.
        folder: Of the run, which is begun here when something is made.
        train: System and stage that trains the networks.
        why: The line that says so.
        tiny: The images of puzzles where neither weights nor settings tell.
        preprocess_of: Reads those of weights.
    """
    data, preprocess, weights = inputs.data, inputs.preprocess, inputs.weights
    if not data.synthetic or (data.manifest is not None and weights is not None):
        return inputs
    if data.manifest is None:
        preprocess = preprocess or (tiny if weights is None else preprocess_of(weights))
        data = puzzles = write_puzzles(data, preprocess, inputs.seed, folder)
    else:
        known = {record.split for record in read_manifest(data, inputs.seed)}
        inputs.read(preprocess or tiny, (), tuple(known))  # a mistake there costs no training
        puzzles = TaskData(synthetic=data.synthetic)
    if weights is None:
        weights = nested_run(folder, train, {"data": puzzles, "seed": inputs.seed}, begin(folder), why).path
    return dataclasses.replace(inputs, data=data, preprocess=preprocess, weights=weights)


def write_puzzles(data: TaskData, preprocess: Preprocess, seed: int, folder: RunFolder) -> TaskData:
    """Write the puzzles of a run that has no manifest, begin it, and return the settings that read them."""
    if not data.synthetic or data.manifest is not None:
        return data
    begin(folder)
    return write_synthetic(data, preprocess, seed, folder.path / "inputs" / "puzzles")


def write_synthetic(data: TaskData, preprocess: Preprocess, seed: int, folder: Path) -> TaskData:
    """Write puzzles of an image's size as files; what is there already stays."""
    half = max(data.synthetic // 2, 1)
    counts = Counts(train=data.synthetic, validation=half, support=min(half, 16), test=half)
    manifest = write_puzzle_cohort(folder, seed, counts, preprocess.size)
    # Small images hold small shapes; each is one to be found.
    return dataclasses.replace(data, manifest=manifest, synthetic=0, min_voxels=1)


def copy_test_files(data: TaskData, task: str, count: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """Copy some test images of a task and their masks, and return the folders of both."""
    places = folder / "test", folder / "test_masks"
    chosen = [row for row in read_manifest(data, seed) if (row.split, row.task) == ("test", task)][:count]
    for row in chosen:
        for place, source in zip(places, (row.path, row.mask), strict=True):
            place.mkdir(parents=True, exist_ok=True)
            (place / row.path.name).write_bytes(source.read_bytes())
    return places


@dataclasses.dataclass(frozen=True)
class CaseScore:
    """A test image: Dice before adaptation and after it, and what the method says of its own mask."""

    case: str
    subject: str
    dice_before: float
    dice: float
    score: float


def score_cases(
    cases: Cases, before: Float[Array, " case"], after: Float[Array, " case"], score: Float[Array, " case"]
) -> tuple[CaseScore, ...]:
    """Return what is known of each case, in the order of `CaseScore`, to six digits."""
    numbers = np.round(np.asarray((before, after, score), float).T, 6).tolist()
    named = zip(cases.names, cases.subjects, numbers, strict=True)
    return tuple(CaseScore(case, subject, *row) for case, subject, row in named)


def write_examples(path: Path, cases: Cases, segment: Callable[[Array], Array]) -> None:
    """Write a few images, their masks, and what a network takes for the probability of them, for the report."""
    some = cases.spread(SHOWN)
    generated = np.asarray(jax.jit(segment)(jnp.asarray(some.images)))
    write_npz(path, {"images": some.images, "masks": some.masks, "generated": generated}, is_compressed=True)


def example_figure(path: Path) -> Figure:
    """Show images with true and generated outlines."""
    with np.load(path) as stored:
        images, masks, generated = (stored[name] for name in ("images", "masks", "generated"))
    panels = []
    for image, mask, soft in zip(images, masks, generated, strict=True):
        outlines = {"true": plane(mask, mask), "generated": plane(soft > 0.5, mask)}
        panels.append(Panel(plane(image, mask), f"Dice {100 * dice(mask, soft > 0.5):.0f} %", outlines))
    return mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption="Images with the outlines of the true mask and of the generator's; of volumes, the slice with most of "
        "the mask.",
        alt=f"{len(panels)} images with outlines of true and generated masks.",
    )  # fmt: skip

"""What the network learns from, step by step: subjects of a store, images drawn of them on the device, losses.

Everything random happens inside the step, keyed by record: the generator is part of the program, and nothing but the
subject's bytes goes to the device.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Decay, Length, Number, Size, checked
from jaxmed.data.subject_store import PADDING
from jaxmed.data.windows import cut_window, middle_of
from jaxmed.errors import InputError
from jaxmed.models.unet_brain import BrainUnetConfig, Task, process
from jaxmed.objectives.brain import BrainLossConfig, brain_loss, contrastive_loss
from jaxmed.objectives.supervised import class_dice
from jaxmed.recipes.training import TrainConfig
from jaxmed.synthesis.brain import generate
from jaxmed.synthesis.brain_draws import MODALITIES, GeneratorConfig


@dataclasses.dataclass(frozen=True)
@checked
class Subjects:
    """Who is trained on.

    Attributes:
        manifest: CSV of subjects as generate reads it, from which a store is made.
        store: Instead: a store, or the run of generate that made one.
        table: What labels mean, as of generate.
        template: Maps of grey and of white matter in MNI space, as of generate.
        validation: Share of the subjects held out, where the store states no splits.
        held_out: Names of subjects to hold out, instead of a share.
        synthetic: Phantom heads to train on where no subjects are given.
    """

    manifest: Path | None = None
    store: Path | None = None
    table: str = "freesurfer"
    template: tuple[Path, ...] = ()
    validation: Decay = 0.1
    held_out: tuple[str, ...] = ()
    synthetic: Number = 0


Variant: TypeAlias = Literal[
    "joint", "synthesis", "segmentation", "distance", "registration", "bias-field", "super-resolution",
    "low-resolution", "shift", "hemisphere",
]  # fmt: skip
OF_SAMPLE = ("bias_field_log", "high_res_residual")
"""Targets that each image of a subject has of its own."""


class Schedule(NamedTuple):
    """Tasks of a variant, its epochs as a share of the joint run's, and where in it the learning rate drops."""

    tasks: tuple[Task, ...]
    epochs: float
    drop_at: float


VARIANTS: dict[Variant, Schedule] = {
    "joint": Schedule((), 1.0, 0.5),
    "synthesis": Schedule(("T1", "T2", "FLAIR", "CT"), 0.4, 0.4),
    "segmentation": Schedule(("segmentation",), 0.4, 0.6),
    "distance": Schedule(("distance",), 0.4, 0.6),
    "registration": Schedule(("registration",), 0.32, 0.75),
    "bias-field": Schedule(("bias_field_log",), 0.32, 0.75),
    "super-resolution": Schedule(("high_res_residual",), 0.32, 1.0),
    "low-resolution": Schedule((), 1.0, 0.5),
    "shift": Schedule((), 1.0, 0.6),
    "hemisphere": Schedule((), 1.0, 0.4),
}
"""Source: the released trainer's configurations, of 5000 epochs at most."""


def apply_variant(
    variant: Variant, model: BrainUnetConfig, generator: GeneratorConfig, train: TrainConfig
) -> tuple[BrainUnetConfig, GeneratorConfig, TrainConfig]:
    """Return the settings of a variant: its tasks, what the generator draws, and its schedule where epochs count."""
    tasks, epochs, drop_at = VARIANTS[variant]
    if tasks:
        model = dataclasses.replace(model, tasks=tasks)
    if variant in ("low-resolution", "super-resolution"):
        resolution = dataclasses.replace(generator.resolution, low_only=True)
        generator = dataclasses.replace(generator, resolution=resolution)
    if variant == "shift":
        deformation = dataclasses.replace(generator.deformation, random_shift=True)
        generator = dataclasses.replace(generator, deformation=deformation)
    if variant == "hemisphere":
        generator = dataclasses.replace(generator, hemisphere=True)
        model = dataclasses.replace(model, tasks=tuple(task for task in model.tasks if task != "CT"), surfaces=2)
    if train.epochs:
        optimizer = dataclasses.replace(train.optimizer, drop_at=drop_at)
        train = dataclasses.replace(train, epochs=train.epochs * epochs, optimizer=optimizer)
    return model, generator, train


@dataclasses.dataclass(frozen=True)
@checked
class Grid:
    """How a subject's arrays reach the device; called as a record's transform, which cuts the window.

    Attributes:
        step: Every so many voxels along each axis are read of the store: 2 trains at 2 mm.
        window: Voxels along each axis, then, of a window about the middle of what has a class; 0 takes the whole head.
    """

    step: Size = 1
    window: Length = 0

    def __call__(self, fields: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Return the arrays within the window, and their new size."""
        del generator
        found = {name: np.asarray(value) for name, value in fields.items()}
        if not self.window:
            return found
        volumes, size = [name for name, value in found.items() if value.ndim >= 3], (self.window,) * 3
        starts = [place - self.window // 2 for place in middle_of(found["segmentation"] > 0)]
        found |= {name: cut_window(found[name], starts, size, PADDING.get(name, 0)) for name in volumes}
        return found | {"size": np.full(3, self.window, found["size"].dtype)}


def teachable(
    model: BrainUnetConfig, generator: GeneratorConfig, record: Mapping[str, Any], channels: int
) -> tuple[BrainUnetConfig, tuple[str, ...]]:
    """Return the network without tasks that a store has nothing to teach of, and a note on those.

    Args:
        model: As it is asked for.
        generator: Of its images.
        record: A subject.
        channels: Modalities of the store's images.

    Raises:
        InputError: Nothing is left.
    """
    is_there = {name: number < channels for number, name in enumerate(MODALITIES)} | {
        "distance": "distances" in record,
        "registration": "coordinates" in record,
        "pathology": generator.pathology.probability > 0,
        "age": "age" in record,
    }
    tasks = tuple(task for task in model.tasks if is_there.get(task, True))
    if not tasks:
        raise InputError("store", f"something to teach {', '.join(model.tasks)}", "nothing of it")
    left = [task for task in model.tasks if task not in tasks]
    notes = (f"Not learnt, because the subjects lack it: {', '.join(left)}.",) if left else ()
    return dataclasses.replace(model, tasks=tasks), notes


def make_loss(
    apply: Callable[..., Any],
    model: BrainUnetConfig,
    generator: GeneratorConfig,
    settings: BrainLossConfig,
    classes: Sequence[int],
    sharding: NamedSharding | None = None,
) -> Callable[..., tuple[Scalar, dict[str, Scalar]]]:
    """Return the loss of training: images are drawn of a batch of subjects, run through the network and compared.

    Args:
        apply: The network.
        model: Its sizes.
        generator: How images are drawn.
        settings: What counts how much.
        classes: The network's class for each class of the store.
        sharding: Of images over the devices; None leaves it to the compiler.
    """

    def loss(params: Params, keys: Key[Array, " batch"], batch: Mapping[str, Array]) -> Any:
        subjects = {name: value for name, value in batch.items() if name != "record"}
        images, targets = jax.vmap(lambda key, one: draw(key, one, generator, classes))(keys, subjects)
        images = images if sharding is None else jax.lax.with_sharding_constraint(images, sharding)
        return loss_of_images(apply, model, settings, params, images, targets)

    return loss


def draw(
    key: KeyArray, subject: Mapping[str, Array], config: GeneratorConfig, classes: Sequence[int]
) -> tuple[Float[Array, "sample x y z 1"], dict[str, Array]]:
    """Return images of a subject along an axis of their own, and targets whose classes are the network's."""
    images, targets = generate(key, subject, config)
    targets["segmentation"] = jnp.array(classes, jnp.int32)[targets["segmentation"]]
    if "age" in subject:
        targets["age"] = subject["age"]
    if config.samples > 1:
        return images, targets
    return images[None], targets | {name: targets[name][None] for name in OF_SAMPLE}


def loss_of_images(
    apply: Callable[..., Any],
    model: BrainUnetConfig,
    settings: BrainLossConfig,
    params: Params,
    images: Float[Array, "batch sample x y z 1"],
    targets: Mapping[str, Array],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return the mean loss of images, those of one subject sharing its targets; and that of each task."""
    batch, samples = images.shape[:2]
    maps = apply(params, images.reshape(-1, *images.shape[2:]), feature=settings.contrastive > 0)
    maps = {name: value.reshape(batch, samples, *value.shape[1:]) for name, value in maps.items()}
    features = maps.pop("feature", None)
    axes = {name: 0 if name in OF_SAMPLE else None for name in targets}
    each = jax.vmap(lambda one, wanted: brain_loss(model, settings, one, wanted), (0, axes))
    total, tasks = jax.vmap(each)(maps, dict(targets))
    total, tasks = total.mean(), {name: value.mean() for name, value in tasks.items()}
    if features is not None:
        tasks["contrastive"] = contrastive_loss(features[:, 0], features[:, 1], settings.temperatures)
        total += settings.contrastive * tasks["contrastive"]
    return total, tasks


def measures(
    model: BrainUnetConfig, maps: Mapping[str, Array], targets: Mapping[str, Array]
) -> dict[str, Float[Array, ""]]:
    """Return how good the maps of one image are, in the units of a user.

    `dice`: mean over the classes of the image but the background; `distance_mm`: mean absolute error within the limits;
    `coordinate_mm`: mean distance in the head; `bias_error`: mean absolute error of the log field in the head;
    `T1_error` and so on: mean absolute error where there is such an image, else NaN.
    """
    found, inside = process(model, dict(maps)), 1.0 - targets["background"]
    head = jnp.maximum(inside.sum(), 1)
    result: dict[str, Array] = {}
    for task in model.tasks:
        match task:
            case "segmentation":
                scores, counts = class_dice(found[task].argmax(-1), targets[task], len(model.labels))
                is_there = (counts > 0) & (jnp.arange(len(model.labels)) > 0)
                result["dice"] = jnp.sum(jnp.where(is_there, scores, 0)) / jnp.maximum(is_there.sum(), 1)
            case "distance":
                result["distance_mm"] = jnp.mean(jnp.abs(found[task] - targets[task]))
            case "registration":
                error = 100 * jnp.linalg.norm(found[task] - targets[task], axis=-1)
                result["coordinate_mm"] = jnp.sum(error * inside) / head
            case "bias_field_log":
                result["bias_error"] = jnp.sum(jnp.abs(found[task] - targets[task])[..., 0] * inside) / head
            case "T1" | "T2" | "FLAIR" | "CT":
                error = jnp.mean(jnp.abs(found[task] - targets[task]))
                result[f"{task}_error"] = jnp.where(targets["present"][MODALITIES.index(task)], error, jnp.nan)
            case _:
                pass
    return result

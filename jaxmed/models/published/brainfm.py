"""BrainFM's weights: the multi-task U-Net of brain scans, under the key names of the released code.

A head that a file lacks is left out of the network and named in the notes; one that is not known has no place and is
named too. The file keeps pickled namespaces of its generator and training beside the tensors; they are not made.
Groups of the norms leave no trace in shapes: every released configuration has 8.

Source: BrainFM, arXiv:2509.00549, and the official code.
Deviation: the released loader leaves heads that a file lacks at random values. Scans are brought to 1 mm with the blur
of `arrays.grid`, sqrt(f^2 - 1) / 2.35 voxels for a factor f, in place of ln(5) / pi f.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, get_args

from jaxmed.arrays.task import Task
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models import unet_brain
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import Entry, count_parts, layer_norm, linear, reshaped, shape_of
from jaxmed.models.unet_brain import (
    AGE_HIDDEN,
    AGE_POOL,
    AGE_WIDTHS,
    LABELS,
    LEFT_LABELS,
    RELEASED,
    BrainUnet,
    BrainUnetConfig,
)
from jaxmed.nn.model import Model, make_model

NAME = "brainfm"
KIND = "maps"
FIRST = "backbone.encoders.0.basic_module.SingleConv1.conv.weight"
LAST = "backbone.encoders.0.basic_module.SingleConv2.conv.weight"
HEAD = "head.final_conv_"
# The network takes any size; windows of 160 voxels are those of its training.
PREPROCESS = Preprocess(
    (160, 160, 160), spacing=(1.0,), intensity=Intensity("minmax"), order="scale-first"
)  # fmt: skip
CT_WINDOW = Intensity("window", window=(0.0, 80.0))
"""HU of a CT scan, in place of the extremes of other scans."""


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family."""
    return FIRST in tensors and LAST in tensors


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> BrainUnetConfig:
    """Return the sizes of a network from the shapes of its tensors.

    Args:
        where: The file, for messages.
        tensors: By their original names.
        hints: The arguments of the training code.

    Raises:
        InputError: Tensors that tell sizes are missing or contradict each other, there is no head, or attention heads
            are told, of which it has none.
    """
    for option in ("heads", "decoder_heads"):
        if (told := getattr(hints, option)) is not None:
            name = option.replace("_", "-")
            raise InputError(name, "none for this family", told, f"leave --{name} out")
    first, last = (shape_of(where, NAME, tensors, name, 5) for name in (FIRST, LAST))
    if first[1] != 1:
        raise InputError(
            where, "a network of one channel", f"'{FIRST}' of shape {first}", "such networks are not built"
        )
    known = [task for task in get_args(unet_brain.Task) if task != "age"]
    columns = {task: shape_of(where, NAME, tensors, _head(task), 5) for task in known if _head(task) in tensors}
    if not columns:
        raise InputError(where, "a head such as " + _head("T1"), "none", "give the whole file, as it was published")
    deep = [task for task, shape in columns.items() if shape[1] != last[0]]
    if deep:
        found = f"'{_head(deep[0])}' of shape {columns[deep[0]]}"
        advice = "heads with further layers are not imported"
        raise InputError(where, f"heads on {last[0]} channels", found, advice)
    has_scale = any(columns[task][0] == 2 for task in columns if BrainUnetConfig().channels(task) == 1)
    distribution = "laplace" if hints.settings.get("uncertainty") == "laplace" else "gaussian"
    surfaces = columns.get("distance", (4,))[0] // (2 if has_scale else 1)
    labels = _labels(columns.get("segmentation", (len(LABELS),))[0])
    try:
        return BrainUnetConfig(
            width=last[0],
            levels=count_parts(where, tensors, "backbone.encoders"),
            tasks=tuple(columns),
            labels=labels,
            surfaces=surfaces,
            uncertainty=distribution if has_scale else "none",
            unit_features=hints.settings.get("unit_feat") is not False,
        )
    except ValueError as error:
        raise InputError(where, "weights of a possible network", str(error)) from error


def entries(config: BrainUnetConfig, naming: str = "") -> list[Entry]:
    """Return every tensor of a network and its parameter.

    The names inside the head of ages and of further layers of heads are ours: no released file has them.
    """
    found: list[Entry] = []
    for level in range(config.levels):
        found += _pair(f"backbone.encoders.{level}", f"backbone/encoder_{level}", config.encoder_pair(level))
    for number, level in enumerate(reversed(range(config.levels - 1))):
        found += _pair(f"backbone.decoders.{number}", f"backbone/decoder_{level}", config.decoder_pair(level))
    for task in config.dense:
        inputs = config.width
        for number, width in enumerate(config.head_widths):
            name, path = f"head.layers_{task}.{number}", f"heads/{task}/conv_{number}"
            found += [_conv(name, path, inputs, width), reshaped(f"{name}.bias", f"{path}/bias", (width,), (width,))]
            inputs = width
        outputs = config.columns(task)
        found += [
            Entry(_head(task), f"heads/{task}/kernel", (outputs, inputs, 1, 1, 1), (2, 3, 4, 1, 0), (inputs, outputs)),
            reshaped(f"{HEAD}{task}.bias", f"heads/{task}/bias", (outputs,), (outputs,)),
        ]
    return [*found, *_age(config)] if "age" in config.tasks else found


def facts(config: BrainUnetConfig) -> Facts:
    """Return what others ask of a network."""
    return Facts(KIND, image_size=config.age_size if "age" in config.tasks else None)


def make_unet(config: BrainUnetConfig, parts: Collection[str]) -> Model:
    """Return the network, which is always whole."""
    return make_model(BrainUnet(config))


def preprocess(config: BrainUnetConfig) -> Preprocess:
    """Return what the weights expect of a scan: 1 mm, RAS+, its extremes to [0, 1]; see `of_modality` for CT."""
    return PREPROCESS


def of_modality(preprocess: Preprocess, is_ct: bool) -> Preprocess:
    """Return the preprocessing of CT, whose HU are cut to [0, 80] first, or of any other modality."""
    return dataclasses.replace(preprocess, intensity=CT_WINDOW) if is_ct else preprocess


def notes(config: BrainUnetConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what a file lacks, and what it does not say."""
    found = []
    if lacking := [task for task in RELEASED if task not in config.tasks]:
        found.append(f"the file has no head for {', '.join(lacking)}")
    if "segmentation" in config.tasks and len(config.labels) not in (len(LABELS), len(LEFT_LABELS)):
        found.append(f"labels of its {len(config.labels)} classes are not known: their numbers stand in their place")
    return tuple(found)


def describe(config: BrainUnetConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    scale = "" if config.uncertainty == "none" else f", with the scale of a {config.uncertainty} distribution"
    return [
        ("kind", "multi-task U-Net of brain scans"),
        ("input", f"3D, 1 channel, {2 ** (config.levels - 1)} voxels or more along each axis"),
        ("levels", " x ".join(map(str, config.widths)) + " channels"),
        ("tasks", ", ".join(config.tasks) + scale),
        ("classes", f"{len(config.labels)}" if "segmentation" in config.tasks else "none"),
    ]


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run says about a network that it trained."""
    if "backbone/encoder_0/conv_0/kernel" not in tensors:
        return None
    settings = run.get("config") or {}
    return {"kind": KIND, "config": settings.get("model"), "preprocess": None}


def _age(config: BrainUnetConfig) -> list[Entry]:
    found, inputs = [], config.width
    for number, width in enumerate(AGE_WIDTHS):
        name, path = f"head.age.conv{number}", f"heads/age/conv_{number}"
        found += [_conv(name, path, inputs, width), reshaped(f"{name}.bias", f"{path}/bias", (width,), (width,))]
        inputs = width
    inputs *= math.prod(length // AGE_POOL // AGE_POOL for length in config.age_size)
    for number, width in enumerate((*AGE_HIDDEN, 1)):
        found += linear(f"head.age.linear{number}", f"heads/age/linear_{number}", inputs, width)
        inputs = width
    return found


def _labels(count: int) -> tuple[int, ...]:
    known = {len(LABELS): LABELS, len(LEFT_LABELS): LEFT_LABELS}
    return known.get(count, tuple(range(count)))


def _head(task: str) -> str:
    return f"{HEAD}{task}.weight"


def _pair(name: str, path: str, pair: tuple[tuple[int, int], tuple[int, int]]) -> list[Entry]:
    found = []
    for number, (inputs, outputs) in enumerate(pair):
        theirs = f"{name}.basic_module.SingleConv{number + 1}"
        found += layer_norm(f"{theirs}.groupnorm", f"{path}/norm_{number}", inputs)
        found.append(_conv(f"{theirs}.conv", f"{path}/conv_{number}", inputs, outputs))
    return found


def _conv(name: str, path: str, inputs: int, outputs: int) -> Entry:
    window = (3, 3, 3)
    return Entry(
        f"{name}.weight", f"{path}/kernel", (outputs, inputs, *window), (2, 3, 4, 1, 0), (*window, inputs, outputs)
    )


FAMILY = Family(
    name=NAME,
    title="BrainFM, a multi-task U-Net of brain scans of any modality (arXiv:2509.00549)",
    licence="ambiguous: the repository's LICENSE is Apache-2.0, its README claims all rights reserved; ask the authors",
    where="brainfm_pretrained.pth, by the link in the README of the official code",
    keys=(
        "backbone.encoders.N.basic_module.SingleConv{1,2}.{groupnorm.weight,groupnorm.bias,conv.weight}, "
        "backbone.decoders.N.*, head.final_conv_{T1,T2,FLAIR,CT,segmentation,distance,bias_field_log,registration,"
        "high_res_residual,pathology}.{weight,bias}, as far as there are such heads"
    ),
    kinds={KIND: Kind(BrainUnetConfig, "a multi-task U-Net")},
    recognises=recognises,
    infer=infer,
    facts=facts,
    entries=entries,
    make_model=make_unet,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=own_record,
)

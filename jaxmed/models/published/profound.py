"""ProFound's weights: a 3D ConvNeXt V2 and a transformer of prostate MRI, under the key names of the released code.

A file holds a masked autoencoder of either kind, of which the decoder may be missing; a classifier; or a segmenter. The
encoder of a masked autoencoder comes as it was trained, with the kernels of sparse convolutions, or converted to dense
ones. Nothing is told by shapes of the size of the image, which a ConvNeXt does not need.

Source: ProFound, arXiv:2603.03961, official code.
Deviation: the released loader strips and drops names by parts of them and leaves what is missing at random values.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from jaxmed.arrays.position import Interpolation
from jaxmed.arrays.task import Task
from jaxmed.arrays.types import Params
from jaxmed.config import to_record
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.convnext import (
    PROFOUND,
    ConvNextClassifier,
    ConvNextClassifierConfig,
    ConvNextConfig,
    convnext_model,
)
from jaxmed.models.fcmae import Fcmae, FcmaeConfig
from jaxmed.models.heads import ClassifierConfig, HeadConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published import timm_vit
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import Entry, count_parts, layer_norm, linear, reshaped, shape_of
from jaxmed.models.published.profound_names import decoder_entries, encoder_entries, upernet_entries
from jaxmed.models.upernet import UperNet, UperNetConfig
from jaxmed.nn.model import Model, make_model

NAME = "profound"
Config: TypeAlias = FcmaeConfig | ConvNextClassifierConfig | UperNetConfig | MaeConfig | ClassifierConfig
SEQUENCES = ("t2w", "hbv|dwi", "adc")
STEM = "downsample_layers.0.0.weight"
# Slices first; the voxel size is that of the released code, which expects it and does not resample.
# Deviation: of an odd number of voxels to add, the larger part comes before the scan, not after it.
PREPROCESS = Preprocess(
    PROFOUND.image_size, 3, axes="zyx", spacing=(1.0, 0.5, 0.5), intensity=Intensity("zscore", inside="nonzero"),
    sequences=SEQUENCES,
)  # fmt: skip
KINDS = {
    "fcmae": Kind(FcmaeConfig, "a masked autoencoder of convolutions"),
    "classifier": Kind(ConvNextClassifierConfig, "a classifier"),
    "segmenter": Kind(UperNetConfig, "a segmenter"),
    "mae": Kind(MaeConfig, "a masked autoencoder"),
    "transformer-classifier": Kind(ClassifierConfig, "a classifier on a transformer"),
}


def vit_grid(where: str, count: int) -> tuple[int, int, int]:
    """Return the grid of a transformer's patches: twice as many along rows and columns as along slices.

    Raises:
        InputError: No such grid has so many.
    """
    edge = round((count / 4) ** (1 / 3))
    if edge < 1 or 4 * edge**3 != count:
        raise InputError(where, "n x 2n x 2n positions in 'pos_embed', as published", count)
    return edge, 2 * edge, 2 * edge


VIT = timm_vit.Released(NAME, 3, heads={768: 12}, decoder_heads={384: 16}, grid=vit_grid)


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether names are those of this family: a ConvNeXt of volumes, or a transformer on oblong patches."""
    stem = next((tensors[prefix + STEM] for prefix in ("", "encoder.") if prefix + STEM in tensors), None)
    if stem is not None:
        return stem.ndim == 5
    return timm_vit.is_vit(tensors, 3, is_oblong=True)


def naming(tensors: Mapping[str, Any]) -> str:
    """Return how a file names an encoder: "" dense, "prefixed" the same within a model, "sparse" as it was trained."""
    if "encoder.stages.0.0.dwconv.kernel" in tensors:
        return "sparse"
    is_alone = not any(name.startswith(("head.", "decode_head.")) for name in tensors)
    return "prefixed" if f"encoder.{STEM}" in tensors and is_alone else ""


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> Config:
    """Return the sizes of a model from the shapes of its tensors; see `family.Family.infer`."""
    if "patch_embed.proj.weight" in tensors:
        found = timm_vit.infer(VIT, where, tensors, hints)
        is_normalised = hints.settings.get("norm_pix_loss") is not False  # the released script's
        return dataclasses.replace(found, norm_target=is_normalised) if isinstance(found, MaeConfig) else found
    for option in ("heads", "decoder_heads"):
        if (said := getattr(hints, option)) is not None:
            name = option.replace("_", "-")
            raise InputError(name, "none for a ConvNeXt", said, f"leave --{name} out")
    prefix = "encoder." if f"encoder.{STEM}" in tensors else ""
    try:
        encoder = _infer_encoder(where, tensors, prefix)
        if any(name.startswith("decode_head.") for name in tensors):
            return _infer_segmenter(where, tensors, encoder)
        if "head.0.weight" in tensors:
            hidden, outputs = (shape_of(where, NAME, tensors, f"head.{place}.weight", 2)[0] for place in (0, 3))
            return ConvNextClassifierConfig(encoder, HeadConfig(outputs, "mean", hidden, hidden_layer="relu"))
        if "head.weight" in tensors:
            return ConvNextClassifierConfig(encoder, HeadConfig(len(tensors["head.weight"]), "mean"))
        if "mask_token" not in tensors:
            return FcmaeConfig(encoder)
        ratio = hints.settings.get("mask_ratio")
        return FcmaeConfig(
            encoder, shape_of(where, NAME, tensors, "mask_token", 5)[1], count_parts(where, tensors, "decoder"),
            ratio if isinstance(ratio, float) and 0 < ratio < 1 else 0.6,
            hints.settings.get("norm_pix_loss") is not False,
        )  # fmt: skip
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible model", str(error)) from error


def facts(config: Config) -> Facts:
    """Return what others ask of a model."""
    kind = next(name for name, one in KINDS.items() if isinstance(config, one.config))
    if isinstance(config, MaeConfig | ClassifierConfig):
        return timm_vit.facts(config)._replace(kind=kind)
    outputs = None
    if isinstance(config, ConvNextClassifierConfig):
        outputs = config.head.outputs
    elif isinstance(config, UperNetConfig):  # whose task names the values of its label maps
        outputs = config.classes
    return Facts(kind, image_size=config.encoder.image_size, outputs=outputs)


def entries(config: Config, naming: str = "") -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    if isinstance(config, MaeConfig | ClassifierConfig):
        return timm_vit.entries(config)
    encoder, width = config.encoder, config.encoder.widths[-1]
    if isinstance(config, FcmaeConfig):
        prefix = "encoder." if naming else ""
        found = encoder_entries(encoder, prefix, is_sparse=naming == "sparse")
        return [*found, *layer_norm(f"{prefix}norm", "norm", width), *decoder_entries(config)]
    found = encoder_entries(encoder, "encoder.")
    if isinstance(config, UperNetConfig):
        return [*found, *layer_norm("encoder.norm", "norm", width), *upernet_entries(config)]
    head = config.head
    found += layer_norm("encoder.norm", "head/norm", width) if head.norm else []
    if not head.hidden:
        return [*found, *linear("head", "head/linear", width, head.outputs)]
    found += linear("head.0", "head/hidden", width, head.hidden)
    found += layer_norm("head.1", "head/batch_norm", head.hidden)
    for theirs, ours in (("running_mean", "mean"), ("running_var", "var")):
        found.append(reshaped(f"head.1.{theirs}", f"head/batch_norm/{ours}", (head.hidden,), (head.hidden,)))
    return [*found, *linear("head.3", "head/linear", head.hidden, head.outputs)]


def make_profound_model(config: Config, parts: Collection[str]) -> Model:
    """Return the model of some parts: without a decoder, an autoencoder is its encoder, image to tokens."""
    match config:
        case ConvNextClassifierConfig():
            return make_model(ConvNextClassifier(config))
        case UperNetConfig():
            return make_model(UperNet(config))
        case FcmaeConfig():
            return make_model(Fcmae(config)) if "decoder" in parts else convnext_model(config.encoder)
    return timm_vit.make_vit_model(config, parts)


def preprocess(config: Config) -> Preprocess:
    """Return what the weights expect of a case: T2w, high-b and ADC at 1 x 0.5 x 0.5 mm, each standardised."""
    channels = config.encoder.channels
    words = SEQUENCES if channels == len(SEQUENCES) else ()
    return dataclasses.replace(PREPROCESS, size=config.encoder.image_size, channels=channels, sequences=words)


def notes(config: Config, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what a file does not."""
    if isinstance(config, MaeConfig | ClassifierConfig):
        return ("positions are the file's: those of the released code scramble the axes of grids that are no cube",)
    size = " x ".join(map(str, config.encoder.image_size))
    return (f"the file does not tell the size of its images: {size} is taken",)


def describe(config: Config, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    if isinstance(config, MaeConfig | ClassifierConfig):
        return timm_vit.describe(config, parts, task)
    encoder, kind = config.encoder, facts(config).kind
    if kind == "fcmae":
        kind += ": masked autoencoder, encoder and decoder" if "decoder" in parts else ": its encoder alone"
    size = " x ".join(map(str, encoder.image_size))
    stages = ", ".join(f"{depth} of {width}" for depth, width in zip(encoder.depths, encoder.widths, strict=True))
    lines = [
        ("kind", kind),
        ("input", f"{size} voxels, {encoder.channels} channels"),
        ("encoder", f"ConvNeXt V2 of {sum(encoder.depths)} blocks: {stages} channels"),
    ]
    match config:
        case ConvNextClassifierConfig(head=head):
            inner = f", hidden layer of {head.hidden} with BatchNorm" if head.hidden else ""
            meaning = (
                f"{task.kind}: {', '.join(task.names)}" if task else "not told: give --task and --names when importing"
            )
            lines += [("head", f"{head.outputs} outputs on the mean{inner}"), ("task", meaning)]
        case UperNetConfig():
            lines.append(("decoder", f"UPerNet of {config.width} channels, {config.classes} logits of every voxel"))
        case FcmaeConfig() if "decoder" in parts:
            lines.append(("decoder", f"{config.decoder_depth} block of {config.decoder_width} channels"))
    return lines


def resize(
    config: Config, params: Params, image_size: tuple[int, ...], how: Interpolation = "linear"
) -> tuple[Config, Params]:
    """Return a model for images of another size: a ConvNeXt as it is, a transformer with other positions.

    Raises:
        InputError: The size does not divide into patches.
    """
    if isinstance(config, MaeConfig | ClassifierConfig):
        return timm_vit.resize(config, params, image_size, how)
    try:
        encoder = dataclasses.replace(config.encoder, image_size=image_size)
        return dataclasses.replace(config, encoder=encoder), params
    except ValueError as error:
        advice = f"take multiples of {config.encoder.patch_size}"
        raise InputError("image size", "a size that the model can have", str(error), advice) from error


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run of ProFound's system says about its parameters."""
    if run.get("system") != NAME:
        return None
    settings = run.get("config") or {}
    is_transformer = "encoder/patch_embed/kernel" in tensors
    if any(name.startswith("hidden_norm/") for name in tensors):
        raise InputError(where, "outputs/model of a finished run", "a checkpoint of a segmenter's training")
    if not any(name.startswith("head/") for name in tensors):
        kind, config = ("mae", settings.get("transformer")) if is_transformer else ("fcmae", settings.get("model"))
        return {"kind": kind, "preprocess": settings.get("preprocess"), "config": config}
    if is_transformer:
        raise InputError(where, "outputs/model of a finished run", "a checkpoint of a transformer's adaptation")
    encoder = _infer_own(where, tensors)
    hidden = tensors["head/hidden/bias"].size if "head/hidden/bias" in tensors else 0
    head = HeadConfig(tensors["head/linear/bias"].size, "mean", hidden, hidden_layer="relu")
    size = settings.get("image_size") or ()
    if any(size):
        encoder = dataclasses.replace(encoder, image_size=tuple(size))
    return {"kind": "classifier", "preprocess": None, "config": to_record(ConvNextClassifierConfig(encoder, head))}


def _infer_encoder(where: str, tensors: Mapping[str, Any], prefix: str) -> ConvNextConfig:
    stem = shape_of(where, NAME, tensors, prefix + STEM, 5)
    stages = count_parts(where, tensors, re.escape(f"{prefix}stages"))
    depths = tuple(count_parts(where, tensors, re.escape(f"{prefix}stages.{stage}")) for stage in range(stages))
    is_sparse = f"{prefix}stages.0.0.dwconv.kernel" in tensors
    widths, strides = [stem[0]], []
    for stage in range(1, stages):
        if is_sparse:
            *places, _, outputs = shape_of(where, NAME, tensors, f"{prefix}downsample_layers.{stage}.1.kernel")
            edge = round((places[0] if places else 1) ** (1 / 3))
        else:
            outputs, _, edge, *_ = shape_of(where, NAME, tensors, f"{prefix}downsample_layers.{stage}.1.weight", 5)
        widths.append(outputs)
        strides.append(edge)
    if is_sparse:
        edge = round(shape_of(where, NAME, tensors, f"{prefix}stages.0.0.dwconv.kernel", 2)[0] ** (1 / 3))
    else:
        edge = shape_of(where, NAME, tensors, f"{prefix}stages.0.0.dwconv.weight", 5)[2]
    found = ConvNextConfig((stem[2] * 64,) * 3, stem[1], depths, tuple(widths), stem[2], tuple(strides), edge)
    return _with_size(found)


def _with_size(config: ConvNextConfig) -> ConvNextConfig:
    """Give a network the published size of image where its patches divide that, else one of eight patches an axis."""
    patch = config.patch_size
    fits = all(length % edge == 0 for length, edge in zip(PROFOUND.image_size, patch, strict=True))
    size = PROFOUND.image_size if fits else tuple(8 * edge for edge in patch)
    return dataclasses.replace(config, image_size=size)


def _infer_segmenter(where: str, tensors: Mapping[str, Any], encoder: ConvNextConfig) -> UperNetConfig:
    classes, width, *_ = shape_of(where, NAME, tensors, "decode_head.classifier.weight", 5)
    auxiliary = tensors.get("auxiliary_head.classifier.weight")
    return UperNetConfig(encoder, classes, width, 0 if auxiliary is None else auxiliary.shape[1])


def _infer_own(where: str, tensors: Mapping[str, Any]) -> ConvNextConfig:
    """Return the sizes of an encoder from its parameters: a stage begins where there is a map before a block."""
    starts = sorted(int(m[1]) for name in tensors if (m := re.match(r"encoder/downsample_(\d+)/kernel$", name)))
    total = len({m[1] for name in tensors if (m := re.match(r"encoder/block_(\d+)/", name))})
    if not starts:
        raise InputError(where, "a checkpoint of an encoder", "no parameter 'encoder/downsample_0/kernel'")
    shapes = [tensors[f"encoder/downsample_{start}/kernel"].shape for start in starts]
    depths = tuple(end - start for start, end in zip(starts, [*starts[1:], total], strict=True))
    edge = tensors["encoder/block_0/depthwise/kernel"].shape[0]
    found = ConvNextConfig(
        (shapes[0][0] * 64,) * 3, shapes[0][-2], depths, tuple(shape[-1] for shape in shapes), shapes[0][0],
        tuple(shape[0] for shape in shapes[1:]), edge,
    )  # fmt: skip
    return _with_size(found)


FAMILY = Family(
    name=NAME,
    title="ProFound, a ConvNeXt V2 and a transformer of prostate MRI (arXiv:2603.03961)",
    licence="the code is Apache-2.0; ask the authors about the weights",
    where="the files that the README of the official code (ProFound, branch demo) links to",
    keys=(
        "downsample_layers.N.*, stages.S.B.{dwconv,norm,pwconv1,grn,pwconv2}.*, norm.*; pre-trained: encoder.* with "
        "*.kernel, *.ln.* and *.linear.*, proj.*, mask_token, decoder.N.*, pred.*; fine-tuned: encoder.* and "
        "head.{0,1,3}.*, or decode_head.*, auxiliary_head.*, hidden_norm.N.*; transformers in MAE's names"
    ),
    kinds=KINDS,
    recognises=recognises,
    infer=infer,
    facts=facts,
    entries=entries,
    make_model=make_profound_model,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=own_record,
    resize=resize,
    optional=("decoder", "norm", "auxiliary"),
    counters=(r"head\.1\.num_batches_tracked",),
    naming=naming,
)

"""The loss of DINOv2's pre-training: a student sees crops with patches hidden, its teacher the same crops whole.

Source: DINOv2, arXiv:2304.07193, section 4, and its official code.
Deviations: stochastic depth leaves images out one by one, where the official code takes a part of the batch through a
block; weights are drawn as those of our other transformers.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxmed.arrays.patches import patch_grid
from jaxmed.arrays.position import Interpolation, resize_table, rotary_angles
from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Bounds, Decay, Epochs, Length, NonNegative, Positive, PositiveRange, Share, Size, checked
from jaxmed.data.augment_pictures import Crops
from jaxmed.models.dino import SHARDING_RULES, DinoHead, DinoHeadConfig, dinov2
from jaxmed.models.vit import FROZEN, Vit, VitConfig, gated_rules, rotation_of
from jaxmed.nn.model import Model, Network, make_model
from jaxmed.objectives.block_masks import BlockMaskConfig, block_masks, most_hidden
from jaxmed.objectives.dino import (
    centred_targets,
    class_token_losses,
    gram_loss,
    koleo,
    move_centre,
    patch_loss,
    sinkhorn_targets,
    target_entropy,
)


@dataclasses.dataclass(frozen=True)
@checked
class DinoConfig:
    """Self-distillation without labels; the defaults are those of DINOv2's default configuration.

    Attributes:
        encoder: The transformer of student and teacher, at the size of global crops; only the student skips branches.
        head: Scores class tokens.
        shared_head: Whether it scores hidden patches too.
        patch_head: Scores hidden patches where the head is not shared.
        local_size: Pixels of local crops along each axis.
        local_crops: Number of local crops of an image.
        interpolation: How the table of positions reaches the grid of local crops, see `arrays.position.resize_matrix`.
        masking: Which patches of global crops the student does not see.
        centring: How the teacher is kept from one answer to everything: "centre", a moving average taken off its
            scores; "sinkhorn", which lets every prototype be used equally often in a batch.
        centre_momentum: What stays of the centre in a step.
        student_temperature: Divides the student's scores before the softmax.
        teacher_temperature: Divides the teacher's scores, at the first step and after `temperature_epochs`.
        temperature_epochs: Epochs over which it rises linearly.
        teacher_momentum: What stays of the teacher in a step, at the first one; rises to 1 as half a cosine.
        final_weight_decay: Weight decay at the last step, reached from optimizer.weight_decay as half a cosine.
        koleo_weight: Factor on the loss that spreads class tokens.
        patch_weight: Factor on the loss of hidden patches.
        gram_weight: Factor on the loss that keeps the similarity of patches to that of an anchor, a network that stays
            as it is (DINOv3, arXiv:2508.10104; 2 in its paper); 0 does without.
        freeze_epochs: Epochs over which prototypes stay as they are.
        embedding_rate: Factor on the learning rate of the patch embedding, besides that of its layer.
        rope_stretch: Largest factor, and one over it the smallest, on the places of patches in the student's rotations,
            drawn for all views of one size; DINOv3 trains with 2.
        train_gain: Whether the gain of each prototype is trained; else it stays 1.
        reference_batch: Images of the batch that optimizer.peak_lr is meant for: it is scaled by the square root of
            loader.batch_size over it. 0 takes the rate as it is.
    """

    encoder: VitConfig = dinov2(
        "L", image_size=(224, 224), patch_size=(16, 16), drop_path_rate=0.3, drop_path_uniform=True
    )
    head: DinoHeadConfig = DinoHeadConfig()
    shared_head: bool = True
    patch_head: DinoHeadConfig = DinoHeadConfig()
    local_size: tuple[Size, Size] = (96, 96)
    local_crops: Size = 8
    interpolation: Interpolation = "offset"
    masking: BlockMaskConfig = BlockMaskConfig()
    centring: Literal["centre", "sinkhorn"] = "centre"
    centre_momentum: Decay = 0.9
    student_temperature: Positive = 0.1
    teacher_temperature: PositiveRange = (0.04, 0.07)
    temperature_epochs: Epochs = 30
    teacher_momentum: Share = 0.992
    final_weight_decay: NonNegative = 0.4
    koleo_weight: NonNegative = 0.1
    patch_weight: NonNegative = 1.0
    gram_weight: NonNegative = 0.0
    freeze_epochs: Epochs = 1
    embedding_rate: NonNegative = 0.2
    rope_stretch: Annotated[float, Bounds(1, 100)] = 1.0
    train_gain: bool = False
    reference_batch: Length = 1024

    def __post_init__(self) -> None:
        encoder = self.encoder
        if len(encoder.image_size) != 2:
            raise ValueError(f"encoder.image_size: expected 2 axes, found {encoder.image_size}")
        if not encoder.mask_token or not encoder.final_norm:
            raise ValueError("encoder: expected one with mask_token and final_norm, found one without")
        patch_grid(self.local_size, encoder.patch_size)


class Centres(NamedTuple):
    """Moving averages of the teacher's scores.

    Attributes:
        classes: Average over class tokens.
        patches: Average over hidden patches.
    """

    classes: Float[Array, " prototype"]
    patches: Float[Array, " prototype2"]


def dino_network(config: DinoConfig) -> Network:
    """Return what is trained: an encoder and its heads."""
    encoder = config.encoder

    def init(key: KeyArray) -> Params:
        encoder_key, head_key, patch_key = jax.random.split(key, 3)
        image = jnp.zeros((1, *encoder.image_size, encoder.channels))
        token = jnp.zeros((1, encoder.width))
        params = {"encoder": make_model(Vit(encoder)).init(encoder_key, image)}
        params["dino_head"] = _head(config, config.head).init(head_key, token)
        if not config.shared_head:
            params["ibot_head"] = _head(config, config.patch_head).init(patch_key, token)
        return params

    frozen = (*(FROZEN if encoder.positions == "sincos" else ()), *(() if config.train_gain else (r"head/gain$",)))
    return Network(init, partial(encode, config), (*gated_rules(encoder.mlp), *SHARDING_RULES), frozen)


def encode(
    config: DinoConfig,
    params: Params,
    images: Float[Array, "image crop x y channel"],
    hidden: Bool[Array, "view patch"] | None = None,
    key: KeyArray | None = None,
) -> tuple[Float[Array, "image crop width"], Float[Array, "view patch width"]]:
    """Return class tokens and patches of crops of any size, a view being a crop of an image.

    Args:
        config: The run.
        params: Parameters of the encoder.
        images: Crops of one size, the crops of an image beside one another.
        hidden: Patches in whose place the mask token is seen.
        key: Switches on what is random in the student.
    """
    full, size = config.encoder, images.shape[2:4]
    encoder = dataclasses.replace(full, image_size=size)
    if full.positions != "rope" and encoder.grid != full.grid:
        table = resize_table(params["position"], full.grid, encoder.grid, how=config.interpolation)
        params = {**params, "position": table}
    rotation = None
    if full.positions == "rope" and key is not None and config.rope_stretch > 1:
        stretch_key, key = jax.random.split(key)
        most = math.log(config.rope_stretch)
        stretch = jnp.exp(jax.random.uniform(stretch_key, minval=-most, maxval=most))
        angles = rotary_angles(full.width // full.heads, encoder.grid, stretch=stretch)
        rotation = rotation_of(angles, full.prefix)
    views = images.reshape(-1, *images.shape[2:])
    tokens = make_model(Vit(encoder)).apply(params, views, hidden=hidden, key=key, rotation=rotation)
    return tokens[:, 0].reshape(*images.shape[:2], -1), tokens[:, full.prefix :]


def dino_loss(
    config: DinoConfig,
    mesh: Mesh,
    student: Params,
    teacher: Params,
    centres: Centres,
    key: KeyArray,
    crops: Crops,
    temperature: Scalar,
    anchor: Params | None = None,
) -> tuple[Scalar, tuple[Centres, dict[str, Scalar]]]:
    """Return the loss of a batch.

    Args:
        config: The run.
        mesh: Hidden patches are split over its "data" axis, as images are.
        student: Parameters of the student.
        teacher: Parameters of the teacher, held constant.
        centres: Averages over the steps before.
        key: Draws masks and stochastic depth.
        crops: The crops of each image.
        temperature: The teacher's temperature.
        anchor: Parameters of the encoder whose similarity of patches the student keeps to; None where it does not.

    Returns:
        The loss, and centres and metrics beside it.
    """
    mask_key, global_key, local_key = jax.random.split(key, 3)
    views, num_patches = 2 * len(crops.globals_), config.encoder.num_tokens
    row_count, column_count = config.encoder.grid
    masks = block_masks(mask_key, views, (row_count, column_count), config.masking)
    devices = mesh.shape["data"]
    rows = max(-(-most_hidden(config.masking, views, num_patches) // devices), 1) * devices
    # All hidden patches of the batch in an array of constant length, filled up with rows of weight 0.
    place = jnp.flatnonzero(masks, size=rows, fill_value=0)
    is_hidden = (jnp.arange(rows) < masks.sum()).astype(jnp.float32)
    weight = is_hidden / jnp.maximum(masks.sum(axis=1), 1)[place // num_patches]

    def hidden_scores(params: Params, patches: Array) -> Array:
        chosen = patches.reshape(-1, patches.shape[-1])[place]
        chosen = jax.lax.with_sharding_constraint(chosen, NamedSharding(mesh, PartitionSpec("data")))
        if config.shared_head:
            return _head(config, config.head).apply(params["dino_head"], chosen)
        return _head(config, config.patch_head).apply(params["ibot_head"], chosen)

    head = _head(config, config.head)
    class_tokens, patches = encode(config, teacher["encoder"], crops.globals_)
    scores, patch_scores = head.apply(teacher["dino_head"], class_tokens), hidden_scores(teacher, patches)
    held = jax.lax.stop_gradient((scores, patch_scores))
    targets, patch_targets, centres = _targets(config, *held, is_hidden, centres, temperature)

    class_tokens, patches = encode(config, student["encoder"], crops.globals_, masks, global_key)
    local_tokens, _ = encode(config, student["encoder"], crops.locals_, None, local_key)
    scores = head.apply(student["dino_head"], jnp.concatenate([class_tokens, local_tokens], axis=1))
    classes = class_token_losses(scores[:, :2], scores[:, 2:], targets, config.student_temperature)
    spread = koleo(class_tokens[:, 0]) + koleo(class_tokens[:, 1])
    guessed = patch_loss(hidden_scores(student, patches), patch_targets, weight, views, config.student_temperature)
    loss = classes.of_locals + classes.of_globals + config.koleo_weight * spread + config.patch_weight * guessed
    metrics = {
        "loss": loss,
        "dino_local": classes.of_locals,
        "dino_global": classes.of_globals,
        "koleo": spread / 2,
        "ibot": guessed,
        "teacher_entropy": target_entropy(targets.reshape(views, -1), jnp.ones(views)),
        "patch_entropy": target_entropy(patch_targets, is_hidden),
        "hidden": masks.mean(dtype=jnp.float32),
    }
    if anchor is not None:
        metrics["gram"] = gram_loss(patches, encode(config, anchor, crops.globals_)[1])
        loss = metrics["loss"] = loss + config.gram_weight * metrics["gram"]
    return loss, (centres, metrics)


def _targets(
    config: DinoConfig, scores: Array, patch_scores: Array, is_hidden: Array, centres: Centres, temperature: Scalar
) -> tuple[Array, Array, Centres]:
    """Return the targets of class tokens [image, 2, prototype] and of hidden patches, and the centres moved."""
    flat = scores.reshape(-1, scores.shape[-1])
    everyone = jnp.ones(len(flat))
    if config.centring == "sinkhorn":
        targets = sinkhorn_targets(flat, everyone, temperature).reshape(scores.shape)
        return targets, sinkhorn_targets(patch_scores, is_hidden, temperature), centres
    targets = centred_targets(scores, centres.classes, temperature)
    patch_targets = centred_targets(patch_scores, centres.patches, temperature)
    moved = Centres(
        move_centre(centres.classes, flat, everyone, config.centre_momentum),
        move_centre(centres.patches, patch_scores, is_hidden, config.centre_momentum),
    )
    return targets, patch_targets, moved


def _head(config: DinoConfig, head: DinoHeadConfig) -> Model:
    return make_model(DinoHead(head, config.encoder.dtype))

"""TANGERINE's weights: a transformer on cubes of a chest CT, under the key names of the released 3D-MAE code.

Number of heads and normalisation of targets leave no trace in shapes: the published widths have known heads, for others
they have to be told.

Source: TANGERINE, arXiv:2507.01881, and the official code.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published import timm_vit
from jaxmed.models.published.family import Family

# Width to blocks of the encoders in the official code.
DEPTHS = {768: 12, 1024: 24, 1280: 32}
# The whole field of view becomes a cube without reorientation, then the HU window becomes [0, 1]: the clip removes the
# overshoot of the spline. Source: preprocessing of the official 3D-MAE code.
PREPROCESS = Preprocess(
    (256, 256, 256), axes="zyx", fit="stretch", interpolation="bspline",
    intensity=Intensity("window", window=(-1200.0, 800.0)),
)  # fmt: skip
RELEASED = timm_vit.Released("tangerine", 3, heads={768: 12, 1024: 16, 1280: 16}, decoder_heads={512: 16})


def preprocess(config: MaeConfig | ClassifierConfig) -> Preprocess:
    """Return what the weights expect of a scan."""
    return dataclasses.replace(PREPROCESS, size=config.encoder.image_size)


def notes(config: MaeConfig | ClassifierConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say how the sizes of a file differ from the published ones, and what its arguments contradict."""
    width, depth = config.encoder.width, config.encoder.depth
    published, found = DEPTHS.get(width, depth), []
    if depth != published:
        found.append(f"the encoder has {depth} blocks; the published one of width {width} has {published}")
    if isinstance(config, MaeConfig) and config.sigmoid and settings.get("norm_pix_loss") is True:
        found.append(
            "its arguments say norm_pix_loss, which no sigmoid can predict: its reconstructions are not images"
        )
    return tuple(found)


FAMILY = Family(
    name=RELEASED.name,
    title="TANGERINE, a 3D masked autoencoder for low-dose chest CT (arXiv:2507.01881)",
    licence="CC-BY-NC 4.0: no commercial use, name the authors",
    where=(
        "mae_pretrained.pth, encoder and decoder, in the public research archive that the model card of the official "
        "code (3D-MAE-MedImaging) names: record 18835750"
    ),
    keys=(
        "cls_token, pos_embed, patch_embed.proj.*, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*, "
        "norm.*, decoder_embed.*, mask_token, decoder_pos_embed, decoder_blocks.N.*, decoder_norm.*, decoder_pred.0.*; "
        "fine-tuned: no norm.* and no decoder, but fc_norm.* and head.*"
    ),
    kinds=timm_vit.KINDS,
    recognises=functools.partial(timm_vit.is_vit, axes=RELEASED.axes),
    infer=functools.partial(timm_vit.infer, RELEASED),
    facts=timm_vit.facts,
    entries=timm_vit.entries,
    make_model=timm_vit.make_vit_model,
    preprocess=preprocess,
    notes=notes,
    describe=timm_vit.describe,
    own_record=functools.partial(timm_vit.own_record, RELEASED),
    resize=timm_vit.resize,
    optional=("decoder",),
    counters=timm_vit.COUNTERS,
)

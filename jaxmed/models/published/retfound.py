"""RETFound's masked autoencoders on retina, and any other 2D transformer in MAE's names.

Source: RETFound, Zhou et al., Nature 2023 (622:156), official code; MAE, arXiv:2111.06377, official code.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.config import to_record
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published import timm_vit
from jaxmed.models.published.dino import HEADS, SCALES, picture_preprocess
from jaxmed.models.published.family import Family

RELEASED = timm_vit.Released("retfound", 2, heads={**HEADS, 192: 3, 1280: 16}, decoder_heads={512: 16})


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether names are those of MAE in 2D: a table of positions, and no factors on branches."""
    is_plain = not any(name.endswith(SCALES) for name in tensors)
    return "pos_embed" in tensors and is_plain and timm_vit.is_vit(tensors, RELEASED.axes)


def preprocess(config: MaeConfig | ClassifierConfig) -> Preprocess:
    """Return what the weights expect of a picture."""
    return picture_preprocess(config.encoder.image_size)


def notes(config: MaeConfig | ClassifierConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what the class token of a masked autoencoder is worth."""
    if isinstance(config, MaeConfig):
        return ("no loss of a masked autoencoder trains its class token: features are the mean of the patch tokens",)
    return ()


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run of RETFound's system says about an encoder of this family."""
    if run.get("system") != RELEASED.name or "encoder/blocks/layer_0/scale1" in tensors:
        return None
    if "head/linear/bias" in tensors:
        return {"kind": "classifier", "preprocess": None, "config": to_record(timm_vit.infer_own(where, tensors, 2))}
    return {"kind": "mae", "preprocess": None, "config": (run.get("config") or {}).get("mae")}


FAMILY = Family(
    name=RELEASED.name,
    title="RETFound, masked autoencoders on retina, and MAE's own in 2D (Nature 2023, arXiv:2111.06377)",
    licence="RETFound: CC-BY-NC 4.0, no commercial use; MAE's own: CC-BY-NC 4.0",
    where=(
        "the gated files that RETFound's official code names (RETFound_mae_natureCFP, natureOCT, meh, shanghai); "
        "mae_pretrain_vit_*.pth of MAE's official code"
    ),
    keys=(
        "cls_token, pos_embed, patch_embed.proj.*, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*, "
        "norm.*; with the decoder decoder_embed.*, mask_token, decoder_pos_embed, decoder_blocks.N.*, decoder_norm.*, "
        "decoder_pred.*; fine-tuned: fc_norm.* and head.*"
    ),
    kinds=timm_vit.KINDS,
    recognises=recognises,
    infer=functools.partial(timm_vit.infer, RELEASED),
    facts=timm_vit.facts,
    entries=timm_vit.entries,
    make_model=timm_vit.make_vit_model,
    preprocess=preprocess,
    notes=notes,
    describe=timm_vit.describe,
    own_record=own_record,
    resize=timm_vit.resize,
    optional=("decoder",),
    counters=timm_vit.COUNTERS,
    interpolation=lambda config, naming: "size",
)

"""DINOv2 and RETFound-DINOv2: transformers under the names of `dino`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.published.dino import make_family
from jaxmed.models.vit import VitConfig


def notes(config: VitConfig | ClassifierConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say which image size the table of positions is for."""
    encoder = config.encoder if isinstance(config, ClassifierConfig) else config
    return (f"its table of positions is for {encoder.image_size[0]} pixels; another --image-size interpolates it",)


FAMILY = make_family(
    "dinov2",
    title="DINOv2, and RETFound-DINOv2 on retina (arXiv:2304.07193, 2509.03421)",
    licence="DINOv2: Apache-2.0; RETFound-DINOv2: CC-BY-NC 4.0, no commercial use",
    where=(
        "the links of the official code's README (dinov2_vits14_pretrain.pth and its like), facebook/dinov2-* "
        "on the hub of transformers, and for RETFound the gated files that its official code names "
        "(RETFound_dinov2_meh, RETFound_dinov2_shanghai)"
    ),
    keys=(
        "cls_token, pos_embed, mask_token, register_tokens (with registers), patch_embed.proj.*, "
        "blocks.N.{norm1,attn.qkv,attn.proj,ls1.gamma,norm2,mlp.fc1,mlp.fc2,ls2.gamma}, norm.*; giant: "
        "mlp.w12, mlp.w3; RETFound: under teacher, backbone.*; timm's, and transformers' of both generations; "
        "fine-tuned: head.*, or classifier.*"
    ),
    notes=notes,
)

"""DINOv3: transformers under the names of `dino`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.models.heads import ClassifierConfig
from jaxmed.models.published.dino import make_family
from jaxmed.models.vit import VitConfig


def notes(config: VitConfig | ClassifierConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say nothing: rotary positions suit every image size."""
    return ()


FAMILY = make_family(
    "dinov3",
    title="DINOv3, self-supervised transformers with rotary positions (arXiv:2508.10104)",
    licence="the DINOv3 licence: commercial use within its terms, name it",
    where=(
        "gated files that the official code names (dinov3_vits16_pretrain_*.pth and its like), and "
        "facebook/dinov3-* on the hub of transformers"
    ),
    keys=(
        "cls_token, mask_token, storage_tokens, patch_embed.proj.*, rope_embed.periods, "
        "blocks.N.{norm1,attn.qkv,attn.proj,ls1.gamma,norm2,mlp.fc1,mlp.fc2 or mlp.w1,w2,w3,ls2.gamma}, "
        "norm.*; transformers': embeddings.*, layer.N.*, norm.*"
    ),
    notes=notes,
)
